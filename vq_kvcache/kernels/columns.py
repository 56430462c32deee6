"""Launches of columns.h: attention of half precision where a kernel knows the fragments of the matrix units (CUDA).

A head's levels lie in columns of its own order: eight at a time, which are one store, then pairs. `order` tells which
coordinate a column is; queries are folded, and sums unfolded, in that order. What there is to decode is dealt to the
warps of a thread group here, once.
"""

import functools
import itertools
from typing import TYPE_CHECKING, NamedTuple

import mlx.core as mx
import numpy as np

from ..spectral import codebook, trellis
from ..spectral.packing import Layout, Segment
from ..spectral.spectral_quant import SpectralQuantizer
from . import COLUMNS, FOLD, GROUP_BYTES, MOST_GROUPS, SHARED_BYTES, Launch
from .launches import HEAD_INTS, evaluated

if TYPE_CHECKING:
    from .steps import Operands, Plan

QUERIES = 8  # of a thread group
TOKENS = 128  # of a tile
WARPS = 4
FOLD_THREADS, FOLDED = 256, 4  # of a thread group, and columns of each of its warps
HEADER_INTS = 16
LOOKUP = 288
ALONE = 32
HALF_RING = 16
MOST_FOURS = 255  # of numbers of a head's tasks
# Columns beyond head_dim, which rings that are not full leave empty: a row's length is an odd multiple of eight. With
# fewer of them more thread groups find room.
SPARE = (24, 40, 56)
# The slots of a ring in the order of its columns, eight at a time; what is left of a ring of ten goes to the pairs.
RING_SLOTS = {
    1: [half + i + 4 * m for half in (0, 16) for i in range(4) for m in range(4)],
    2: [half + start + 2 * i for half in (0, 8) for start in (0, 1) for i in range(4)],
    3: [0, 6, 2, 8, 1, 7, 3, 9],
    4: [0, 4, 2, 6, 1, 5, 3, 7],
    5: [0, 4, 1, 5, 2, 3, -1, -1],
}
RING_PAIRS = {3: [4, 5]}
# Instructions for a ring of one token, half a ring, and eight codes alone: only who does how much is judged by them.
RING_COST = {1: 66, 2: 46, 3: 72, 4: 58, 5: 56}
HALF_COST = {1: 40, 2: 34, 3: 64}
ALONE_COST = 46


class HeadColumns(NamedTuple):
    """Of one head: its tasks, warp after warp, as lookup.h tells; where those of each warp end, in fours of numbers;
    each column's coordinate, or -1; how many columns are written."""

    tasks: tuple[int, ...]
    ends: tuple[int, ...]
    order: tuple[int, ...]
    written: int


class _Task(NamedTuple):
    told: list[int]
    cost: int


class _Alone(NamedTuple):
    """A code alone."""

    coordinate: int
    word: int
    shift: int
    width: int

    @property
    def told(self) -> int:
        """It is turned until its lowest bit is bit 1. 256 codes of 8 bits are 64 words, which six bits tell apart."""
        return self.word | (self.shift - 1) % 32 << 6 | self.width << 11


def _ring_slots(s: Segment) -> tuple[bool, list[int], list[int]]:
    """Of a word of rings: whether half of the columns hold it, its slots in groups of eight columns, and in a pair."""
    groups, pairs = RING_SLOTS[s.width], RING_PAIRS.get(s.width, [])
    if pairs:
        half = s.slots <= min(pairs)
        return half, groups, [] if half else pairs
    half = s.width < 3 and s.slots <= len(groups) // 2
    return half, groups[: len(groups) // 2] if half else groups, []


def _dealt(tasks: list[_Task]) -> list[list[_Task]]:
    """The tasks of each warp, so that all have about as much to do: the dearest first, each to who has least."""
    warps: list[list[_Task]] = [[] for _ in range(WARPS)]
    for task in sorted(tasks, key=lambda task: -task.cost):
        min(warps, key=lambda own: sum(t.cost for t in own)).append(task)
    return warps


def head_columns(layout: Layout, head: int) -> HeadColumns:
    """The columns of one head of keys, or of values."""
    rings = [(s, *_ring_slots(s)) for s in layout.segments[head] if layout.in_rings(s)]
    alone = [
        _Alone(s.first + slot * s.words + w, s.first_word + w, s.shift + slot * s.width, s.width)
        for s in layout.segments[head]
        if not layout.in_rings(s)
        for w in range(s.words)
        for slot in range(s.slots)
    ]
    after_rings = sum(s.words * len(groups) for s, _, groups, _ in rings)
    tail = after_rings + -(-len(alone) // 8) * 8
    written = tail + sum(s.words * len(pairs) for s, _, _, pairs in rings)
    order = [-1] * (-(-written // 16) * 16)
    tasks: list[_Task] = []
    column = 0
    for s, half, groups, pairs in rings:
        bits = s.width * s.slots
        shifts = s.shift | (bits - s.width) << 8 | (bits - 2 * s.width) << 16
        for w in range(s.words):
            what = s.width | HALF_RING * half | (s.first_word + w) << 8
            cost = HALF_COST[s.width] if half else RING_COST[s.width]
            tasks.append(_Task([what, column | tail << 16, shifts, (1 << bits) - 1], cost))
            for place, slot in [*enumerate(groups, column), *enumerate(pairs, tail)]:
                if 0 <= slot < s.slots:
                    order[place] = s.first + slot * s.words + w
            column, tail = column + len(groups), tail + len(pairs)
    for start in range(0, len(alone), 8):
        eight = alone[start : start + 8]
        order[column : column + len(eight)] = [code.coordinate for code in eight]
        told = [code.told for code in eight] + [eight[-1].told] * (8 - len(eight))
        tasks.append(
            _Task([0, column, 0, 0, *(a | b << 16 for a, b in zip(told[::2], told[1::2], strict=True))], ALONE_COST)
        )
        column += 8
    dealt = _dealt(tasks)
    counts = itertools.accumulate(sum(len(task.told) // 4 for task in own) for own in dealt)
    flat = [n for own in dealt for task in own for n in task.told]
    return HeadColumns(tuple(flat), tuple(counts), tuple(order), written)


def column_table(keys: SpectralQuantizer, values: SpectralQuantizer, most: int) -> mx.array | None:
    """int32: header, entries of the heads of keys and then of values, their tasks, and the order of each head's
    columns; None when a head needs more columns than a row holds. most: MC, columns of the products, eight more than a
    row of a tile holds."""
    layouts = keys.layout, values.layout
    heads = layouts[0].heads
    made = [[head_columns(layout, h) for h in range(heads)] for layout in layouts]
    if any(one.written > most - 8 or one.ends[-1] > MOST_FOURS for part in made for one in part):
        return None
    start = HEADER_INTS + 2 * heads * HEAD_INTS
    entries: list[int] = []
    lists: list[int] = []
    for part, (layout, own) in enumerate(zip(layouts, made, strict=True)):
        for h, columns in enumerate(own):
            ends = sum(end << 8 * warp for warp, end in enumerate(columns.ends))
            words = layout.first_words[h + 1] - layout.first_words[h]
            entries += [start + len(lists), len(columns.tasks), ends, words]
            entries += [layout.first_words[h] + part * keys.words, len(columns.order)]
            lists += columns.tasks
    width = max(most, values.synthesis.shape[-1])
    orders = [start + len(lists), start + len(lists) + heads * most]
    table = [
        heads, keys.words + values.words, layouts[0].stored, layouts[1].stored, width, orders[1], orders[0], *([0] * 9),
        *entries, *lists,
    ]  # fmt: skip
    for part, own in enumerate(made):
        for columns in own:
            table += [*columns.order, *([-1] * ((width if part else most) - len(columns.order)))]
    return evaluated(mx.array(np.array(table, np.int64).astype(np.uint32).view(np.int32)))


@functools.cache
def lookup() -> mx.array:
    """int32 [288]: bytes of the levels of rings of 1 and 2 bits, polynomials of wider ones, levels of codes alone."""
    table = np.zeros(LOOKUP, np.uint32)
    for width in (1, 2):
        halves = trellis.ring_levels(width).astype(np.float16).view(np.uint8).reshape(-1, 2)
        if width == 1:  # by the bits of slots s - 2, s - 1 and s, the lowest first
            halves = halves[[2 * ((n >> 2) ^ (n & 1)) + (n >> 1 & 1) for n in range(8)]]
        table[4 * width - 4 : 4 * width] = np.concatenate([halves[:, 0], halves[:, 1]]).view(np.uint32)
    for width in (3, 4, 5):
        halves = np.array(trellis.COEFFICIENTS[width], np.float16).view(np.uint16).astype(np.uint32)
        table[4 * width - 4 : 4 * width - 1] = halves | halves << 16
    alone = np.concatenate([np.zeros(2), *(codebook.levels(width) for width in range(1, codebook.MAX_BITS + 1))])
    table[ALONE : ALONE + len(alone) // 2] = alone.astype(np.float16).view(np.uint32)
    return evaluated(mx.array(table.view(np.int32)))


def most_words(quantizer: SpectralQuantizer) -> int:
    """Words of the head that has the most."""
    first = quantizer.layout.first_words
    return max(b - a for a, b in itertools.pairwise(first))


def least_bytes(most: int, key_dims: int, words: int) -> int:
    """Shared memory that a thread group needs, see VqColumnSpace in columns.h. words: of a head's keys and values."""
    row = most - 8
    tile = 4 * (40 + LOOKUP + 2 * row) + 2 * QUERIES * (most + 8)
    gathering = 4 * WARPS * QUERIES * (most + 2)
    return max(tile + max(2 * (TOKENS * row + 8) + 4 * TOKENS * words, gathering), 4 * QUERIES * (key_dims + 64))


def groups_of(needed: int) -> int:
    """Thread groups that one multiprocessor works on at once; 0 when one needs too much."""
    return min(SHARED_BYTES // (needed + GROUP_BYTES), MOST_GROUPS)


def chosen(keys: SpectralQuantizer, values: SpectralQuantizer) -> tuple[int, int, mx.array] | None:
    """(MC, thread groups of a multiprocessor, table), or None when these codes do not fit."""
    dims = keys.synthesis.shape[-1], values.synthesis.shape[-1]
    for spare in SPARE:
        most = max(dims) + spare + 8
        table = column_table(keys, values, most)
        groups = groups_of(least_bytes(most, dims[0], most_words(keys) + most_words(values)))
        if table is not None and groups > 0:
            return most, groups, table
    return None


def shared_bytes(groups: int) -> int:
    """What each of so many groups may have: all that is there, so that one program serves many layers."""
    return SHARED_BYTES // groups // 16 * 16 - GROUP_BYTES


def fold(plan: "Plan", o: "Operands") -> Launch:
    """The launch of vq_fold_columns."""
    shape = plan.shape
    tiles, most = shape.row_tiles, shape.columns
    return Launch(
        FOLD,
        [o.queries, o.key_basis, o.key_mean, o.table, o.params, o.scale],
        [(shape.planes, tiles, QUERIES, most), (shape.planes, tiles, QUERIES)],
        [mx.float16, mx.float32],
        (-(-(most + 1) // (FOLDED * FOLD_THREADS // 32)), shape.planes, tiles),
        FOLD_THREADS,
        0,
        (("T", shape.dtype), ("DK", shape.key_dims), ("MC", most), ("THREADS", FOLD_THREADS)),
    )


def attend(plan: "Plan", o: "Operands", folded: list[mx.array]) -> Launch:
    """The launch of vq_attend_columns."""
    shape = plan.shape
    most, every = shape.columns, (shape.planes, plan.splits, shape.rows)
    return Launch(
        COLUMNS,
        [o.queries, o.exact_keys, o.exact_values, *o.words, o.held, *folded, o.table, lookup(), o.params, o.scale,
         o.hidden, o.added],
        [(*every, 2), (*every, max(most, shape.value_dims))],
        [mx.float32, mx.float32],
        (plan.splits, shape.planes, shape.row_tiles),
        WARPS * 32,
        shared_bytes(shape.groups),
        (("T", shape.dtype), ("DK", shape.key_dims), ("DV", shape.value_dims), ("MC", most)),
    )  # fmt: skip
