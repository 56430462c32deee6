"""Launches of columns.h: attention of half precision where a kernel knows the fragments of the matrix units (CUDA).

A head's levels lie in columns of its own order: eight at a time of a ring, which are one store, then pairs. `order`
tells which coordinate a column is; queries are folded, and sums unfolded, in that order.
"""

import dataclasses
import functools
from typing import TYPE_CHECKING, NamedTuple

import mlx.core as mx
import numpy as np

from ..spectral import codebook, trellis
from ..spectral.packing import Layout, Segment
from ..spectral.spectral_quant import SpectralQuantizer
from . import COLUMNS, FOLD, MOST_GROUPS, SHARED_BYTES, Launch
from .launches import HEAD_INTS, evaluated

if TYPE_CHECKING:
    from .steps import Operands, Plan

QUERIES = 8  # of a thread group
TOKENS = 128  # of a tile
WARPS = 4
FOLD_THREADS = 256
MOST_WORDS = 64  # of a head's keys, or values
MOST_RUNS = 256  # numbers that tell of their runs
HEADER_INTS = 16
LOOKUP = 272
ALONE_LEVELS = 16
SPARE = 48  # columns beyond head_dim, which rings that are not full and codes alone leave empty
# The slots of a ring in the order of its columns, eight at a time; what is left of a ring of ten goes to the pairs.
RING_SLOTS = {
    1: [half + start + 4 * i for half in (0, 16) for start in (0, 2, 1, 3) for i in range(4)],
    2: [half + start + 2 * i for half in (0, 8) for start in (0, 1) for i in range(4)],
    3: [0, 6, 2, 8, 1, 7, 3, 9],
    4: [0, 4, 2, 6, 1, 5, 3, 7],
    5: [0, 4, 1, 5, 2, 3, -1, -1],
}
RING_PAIRS = {3: [4, 5]}
# Instructions for a word of one token, and for a code alone: only who has how much to do is judged by them.
RING_COST = {1: 62, 2: 40, 3: 64, 4: 46, 5: 50}
ALONE_COST = 6


class HeadColumns(NamedTuple):
    """Of one head: its words, their rings and codes alone, as columns.h tells; each column's coordinate, or -1."""

    words: tuple[int, ...]
    runs: tuple[int, ...]
    order: tuple[int, ...]


@dataclasses.dataclass
class _Word:
    rings: list[int]
    alone: list[int]
    cost: int


def _slots_of(segment: Segment, ring: bool) -> tuple[list[int], list[int]]:
    """The slots of each word of a segment in groups of eight columns, and after all of these."""
    if not ring:
        return [], list(range(segment.slots))
    groups = RING_SLOTS[segment.width]
    if segment.width < 3 and segment.slots <= len(groups) // 2:
        groups = groups[: len(groups) // 2]
    return groups, RING_PAIRS.get(segment.width, [])


def _dealt(costs: list[int]) -> list[int]:
    """Words such that warps, which take every WARPS-th, have about as much to do: the dearest first, back and forth."""
    dear = sorted(range(len(costs)), key=lambda w: -costs[w])
    rounds = [dear[i : i + WARPS] for i in range(0, len(dear), WARPS)]
    return [w for i, one in enumerate(rounds) for w in (one if i % 2 == 0 or len(one) < WARPS else one[::-1])]


def head_columns(layout: Layout, head: int) -> HeadColumns:
    """The columns of one head of keys, or of values."""
    segments = layout.segments[head]
    rings = [layout.in_rings(s) for s in segments]
    slots = [_slots_of(s, ring) for s, ring in zip(segments, rings, strict=True)]
    tail = sum(s.words * len(groups) for s, (groups, _) in zip(segments, slots, strict=True))
    # Pairs of rings come first, so that each is one store.
    pairs = sum(s.words * len(p) for s, ring, (_, p) in zip(segments, rings, slots, strict=True) if ring)
    alone, column = tail + pairs, 0
    whole = alone + sum(s.count for s, ring in zip(segments, rings, strict=True) if not ring)
    order = [-1] * (-(-whole // 16) * 16)
    told: list[_Word] = [_Word([], [], 0) for _ in range(layout.first_words[head + 1] - layout.first_words[head])]
    for s, ring, (groups, rest) in zip(segments, rings, slots, strict=True):
        for w in range(s.words):
            word = told[s.first_word + w]
            start = tail if ring else alone
            places = [*((column + i, slot) for i, slot in enumerate(groups)),
                      *((start + i, slot) for i, slot in enumerate(rest))]  # fmt: skip
            for place, slot in places:
                if 0 <= slot < s.slots:
                    order[place] = s.first + slot * s.words + w
            if ring:
                word.rings += [s.width | s.slots << 8 | s.shift << 16, column | tail << 16]
                word.cost += RING_COST[s.width]
                column, tail = column + len(groups), tail + len(rest)
            else:
                word.alone += [s.shift + i * s.width | s.width << 8 | alone + i << 16 for i in range(s.slots)]
                word.cost += ALONE_COST * s.slots
                alone += s.slots
    words: list[int] = []
    flat: list[int] = []
    for w in _dealt([word.cost for word in told]):
        words += [w | len(told[w].rings) // 2 << 16, len(flat) | len(told[w].alone) << 16]
        flat += [*told[w].rings, *told[w].alone]
    return HeadColumns(tuple(words), tuple(flat), tuple(order))


def most_columns(key_dims: int, value_dims: int) -> int:
    """Columns of a tile, MC: a constant of the program, so that one serves all layers."""
    return max(key_dims, value_dims) + SPARE


def column_table(keys: SpectralQuantizer, values: SpectralQuantizer, most: int) -> mx.array | None:
    """int32: header, entries of the heads of keys and then of values, words and runs, and the order of each head's
    columns; None when a head needs more columns or runs than there are."""
    layouts = keys.layout, values.layout
    heads = layouts[0].heads
    made = [[head_columns(layout, h) for h in range(heads)] for layout in layouts]
    if any(
        len(c.order) > most or len(c.runs) > MOST_RUNS or len(c.words) > 2 * MOST_WORDS for part in made for c in part
    ):
        return None
    start = HEADER_INTS + 2 * heads * HEAD_INTS
    entries: list[int] = []
    lists: list[int] = []
    for part, (layout, own) in enumerate(zip(layouts, made, strict=True)):
        for h, columns in enumerate(own):
            first = start + len(lists)
            entries += [first, len(columns.words) // 2, first + len(columns.words), len(columns.runs)]
            entries += [layout.first_words[h] + part * keys.words, len(columns.order)]
            lists += [*columns.words, *columns.runs]
    width = max(most, values.synthesis.shape[-1])
    orders = [start + len(lists), start + len(lists) + heads * most]
    table = [
        heads, keys.words + values.words, layouts[0].stored, layouts[1].stored, width, orders[1], orders[0], *([0] * 9),
        *entries, *lists,
    ]  # fmt: skip
    for part, own in enumerate(made):
        for columns in own:
            table += [*columns.order, *([-1] * ((width if part else most) - len(columns.order)))]
    return evaluated(mx.array(table, mx.int32))


@functools.cache
def lookup() -> mx.array:
    """int32 [272]: bytes of the levels of rings of 1 and 2 bits, polynomials of wider ones, levels of codes alone."""
    table = np.zeros(LOOKUP, np.uint32)
    for width, first in ((1, 0), (2, 2)):
        halves = trellis.ring_levels(width).astype(np.float16).view(np.uint8).reshape(-1, 2)
        table[first : first + 2**width] = np.concatenate([halves[:, 0], halves[:, 1]]).view(np.uint32)
    for width in (3, 4, 5):
        halves = np.array(trellis.COEFFICIENTS[width], np.float16).view(np.uint16).astype(np.uint32)
        table[3 * width - 3 : 3 * width] = halves | halves << 16
    alone = np.concatenate([codebook.levels(width) for width in range(1, codebook.MAX_BITS + 1)]).astype(np.float16)
    table[ALONE_LEVELS : ALONE_LEVELS + len(alone) // 2] = alone.view(np.uint32)
    return evaluated(mx.array(table.view(np.int32)))


def shared_bytes(most: int, key_dims: int) -> int:
    """What a thread group needs, see VqColumnSpace in columns.h."""
    stride = most + 8
    head = 4 * (40 + LOOKUP + 2 * (2 * MOST_WORDS + MOST_RUNS)) + 2 * QUERIES * stride
    gathering = 4 * WARPS * QUERIES * (most + 2)
    return max(head + max(2 * TOKENS * stride, gathering), 4 * QUERIES * (key_dims + 64))


def groups_that_fill(most: int, key_dims: int) -> int:
    """Thread groups that a GPU of 132 multiprocessors works on at once."""
    return 132 * max(min(SHARED_BYTES // (shared_bytes(most, key_dims) + 1024), MOST_GROUPS), 1)


def fold(plan: "Plan", o: "Operands") -> Launch:
    """The launch of vq_fold_columns."""
    shape = plan.shape
    tiles, most = shape.row_tiles, shape.columns
    return Launch(
        FOLD,
        [o.queries, o.key_basis, o.key_mean, o.table, o.params, o.scale],
        [(shape.planes, tiles, QUERIES, most), (shape.planes, tiles, QUERIES)],
        [mx.float16, mx.float32],
        (-(-(most + 1) // (FOLD_THREADS // 32)), shape.planes, tiles),
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
        shared_bytes(most, shape.key_dims),
        (("T", shape.dtype), ("DK", shape.key_dims), ("DV", shape.value_dims), ("MC", most)),
    )  # fmt: skip
