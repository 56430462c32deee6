"""Launches of columns.h: attention of half precision where a kernel knows the fragments of the matrix units (CUDA).

A head's levels lie in columns of its own order: eight at a time, which are one store, then pairs; rings of 1 bit that
fill a word lie at the end, in no tile. An order tells which coordinate a column is; queries are folded, and sums
unfolded, in that order. What there is to decode is told of task by task, as lookup.h takes it.
"""

import functools
import itertools
import math
from typing import TYPE_CHECKING, NamedTuple

import mlx.core as mx
import numpy as np

from ..spectral import codebook, trellis
from ..spectral.packing import Layout, Segment
from ..spectral.spectral_quant import SpectralQuantizer
from . import COLUMNS, GROUP_BYTES, MOST_THREADS, MULTIPROCESSORS, SHARED_BYTES, Launch
from .launches import HEAD_INTS, chunk_inputs, evaluated, head_words

if TYPE_CHECKING:
    from .steps import Operands, Plan

QUERIES = 8  # of a thread group
TOKENS = 32  # of a warp's tile
# Warps of a thread group, and groups that a multiprocessor works on at once, the most warps first; few of these, and
# few lengths of a row, so that few programs serve all layers.
SIZES = ((10, 2), (8, 2), (5, 3), (6, 2), (10, 1), (8, 1), (6, 1), (4, 1), (2, 1), (1, 1))
# Warps of a multiprocessor, whose registers they share: with sums of at most NARROW columns, and with more.
NARROW, NARROW_WARPS, WIDE_WARPS = 176, MOST_THREADS // 32, 16
SHORT_ROW = 120  # columns of a row of a tile that suffice for few bits
LARGEST = 14  # the basis of the keys in half precision is below two to this
HEADER_INTS = 16
LOOKUP = 296
ALONE = 40
LIST_HEADER = 4
# Columns of the longest row beyond head_dim, which rings that are not full leave empty; it is an odd multiple of eight.
# With fewer of them more thread groups find room.
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
# Of a ring of 1 bit that fills a word, in the order of its 32 columns: of keys, of which lane c of four has the codes
# c, c + 4, ... in the fragments of columns 2 c, 2 c + 1, 2 c + 8 and 2 c + 9 of each sixteen; of values.
WHOLE_SLOTS = (
    [c + 4 * (4 * k + 2 * h + e) for k in (0, 1) for h in (0, 1) for c in range(4) for e in (0, 1)],
    [*range(32)],
)
# What the list of a head tells of, in this order: codes alone (None), rings, and rings for whose slots half of the
# columns suffice.
KINDS = (None, *((width, False) for width in RING_SLOTS), (1, True), (2, True))
# Instructions of a task of each kind, about, of a ring of 1 bit that fills a word, and of one of 2 bits.
COSTS, WHOLE_COST, TWOS_COST = (56, 66, 50, 64, 58, 58, 44, 37), 63, 35


class HeadColumns(NamedTuple):
    """Of one head: the numbers of its list, see lookup.h; the coordinate of each column of its tile, or -1; how many of
    these are written; the coordinates of each ring of 1 bit that fills a word, slot by slot."""

    numbers: tuple[int, ...]
    order: tuple[int, ...]
    written: int
    whole: tuple[tuple[int, ...], ...]

    def orders(self, part: int, most: int) -> list[int]:
        """The coordinates of `most` columns, or -1, of keys (0) or values (1)."""
        rings = [[ring[slot] for slot in WHOLE_SLOTS[part]] for ring in reversed(self.whole)]
        empty = [-1] * (most - len(self.order) - 32 * len(rings))
        return [*self.order, *empty, *itertools.chain(*rings)]

    @property
    def cost(self) -> int:
        """Instructions that turn the words of a tile, about."""
        counts = [n >> 8 * i & 255 for n in self.numbers[:2] for i in range(4)]
        tasks = sum(n * cost for n, cost in zip(counts, COSTS, strict=True))
        return tasks + WHOLE_COST * len(self.whole) + TWOS_COST * (self.numbers[3] >> 16 & 255)

    def fits(self, most: int) -> bool:
        """Whether `most` columns, of which the longest row holds eight less, are enough: products take 32 at a time."""
        tile = min(-(-len(self.order) // 32) * 32, most)
        return self.written <= most - 8 and tile + 32 * len(self.whole) <= most


class _Alone(NamedTuple):
    """A code alone."""

    coordinate: int
    word: int
    shift: int
    width: int

    @property
    def told(self) -> list[int]:
        """It is turned until its lowest bit is bit 1."""
        return [_word(self.word, (self.shift - 1) % 32), (2 << self.width) - 2, 2 << self.width]


def _word(word: int, shift: int) -> int:
    return 4 * TOKENS * word << 5 | shift


def _ring_slots(s: Segment) -> tuple[bool, list[int], list[int]]:
    """Of a word of rings: whether half of the columns hold it, its slots in groups of eight columns, and in a pair."""
    groups = RING_SLOTS[s.width]
    half = (s.width, True) in KINDS and s.slots <= len(groups) // 2
    return half, groups[: len(groups) // 2] if half else groups, RING_PAIRS.get(s.width, [])


def _slots(s: Segment) -> tuple[tuple[int, ...], ...]:
    """The coordinates of each word, slot by slot."""
    return tuple(tuple(s.first + slot * s.words + w for slot in range(s.slots)) for w in range(s.words))


def head_columns(layout: Layout, head: int) -> HeadColumns:
    """The columns of one head of keys, or of values."""
    rings = [(s, *_ring_slots(s)) for s in layout.segments[head] if layout.in_rings(s)]
    # The words of a segment follow one another.
    filled, twos = (next((s for s, *_ in rings if (s.width, s.slots) == full), None) for full in ((1, 32), (2, 16)))
    rings = [ring for ring in rings if ring[0] is not filled]
    rings.sort(key=lambda ring: (ring[0] is not twos, KINDS.index((ring[0].width, ring[1]))))
    alone = [
        _Alone(s.first + slot * s.words + w, s.first_word + w, s.shift + slot * s.width, s.width)
        for s in layout.segments[head]
        if not layout.in_rings(s)
        for w in range(s.words)
        for slot in range(s.slots)
    ]
    after_rings = sum(s.words * len(groups) for s, _, groups, _ in rings)
    tail = after_rings + len(alone) + len(alone) % 2
    written = max(after_rings + -(-len(alone) // 8) * 8, tail + sum(s.words * len(pairs) for s, _, _, pairs in rings))
    order = [-1] * (-(-written // 16) * 16)
    order[after_rings : after_rings + len(alone)] = [code.coordinate for code in alone]
    padded = [*alone, *alone[-1:] * (-len(alone) % 8)]
    tasks: dict[tuple[int, bool] | None, list[int]] = {kind: [] for kind in KINDS}
    tasks[None] = [n for code in padded for n in code.told]
    column, first_tail = 0, tail
    for s, half, groups, pairs in rings:
        bits = s.width * s.slots
        for w in range(s.words):
            if s is not twos:
                tasks[s.width, half] += [
                    _word(s.first_word + w, s.shift), bits - s.width, (1 << bits) - 1, bits - 2 * s.width
                ]  # fmt: skip
            for place, slot in [*enumerate(groups, column), *enumerate(pairs, tail)]:
                if 0 <= slot < s.slots:
                    order[place] = s.first + slot * s.words + w
            column, tail = column + len(groups), tail + len(pairs)
    counts = [len(own) // (4 if kind else 24) for kind, own in tasks.items()]
    full = [n for s in (filled, twos) for n in ((s.words, s.first_word) if s else (0, 0))]
    assert max(counts + full) < 256  # a byte each
    first, then, words = (sum(n << 8 * i for i, n in enumerate(part)) for part in (counts[:4], counts[4:], full))
    header = [first, then, after_rings | first_tail << 16, words]
    numbers = [*header, *itertools.chain(*tasks.values()), 0, 0, 0, 0]
    return HeadColumns(tuple(numbers), tuple(order), written, _slots(filled) if filled else ())


Heads = tuple[list[HeadColumns], list[HeadColumns]]  # of keys, and of values


def every_head(keys: SpectralQuantizer, values: SpectralQuantizer) -> Heads:
    """The columns of all heads."""
    own, others = ([head_columns(q.layout, h) for h in range(q.layout.heads)] for q in (keys, values))
    return own, others


def in_turn(costs: list[int]) -> list[int]:
    """The heads in the order of thread groups, such that dear ones share a multiprocessor with cheap ones: a GPU gives
    each of them one group before it gives any a second one."""
    cheapest, places = sorted(range(len(costs)), key=costs.__getitem__), [-1] * len(costs)
    for first in range(len(costs)):
        place, end = first, 0
        while places[place] < 0:  # from one to that which it meets, by turns from the cheap end and the dear one
            places[place] = cheapest.pop(end)
            place, end = (place + MULTIPROCESSORS) % len(costs), -1 - end
    return places


def column_table(keys: SpectralQuantizer, values: SpectralQuantizer, made: Heads, most: int) -> mx.array | None:
    """int32: header, entries of the heads of keys and then of values, in their turn, lists, and the order of each
    head's columns of values; None when a head needs more columns than products have, MC: `most`, eight more than the
    longest row."""
    layouts = keys.layout, values.layout
    heads = layouts[0].heads
    if not all(one.fits(most) for part in made for one in part):
        return None
    start = HEADER_INTS + 2 * heads * HEAD_INTS
    entries: list[int] = []
    lists: list[int] = []
    turns = in_turn([own.cost + other.cost for own, other in zip(*made, strict=True)])
    for part, (layout, own) in enumerate(zip(layouts, made, strict=True)):
        for h in turns:
            words = layout.first_words[h + 1] - layout.first_words[h]
            entries += [start + len(lists), len(own[h].numbers), words]
            entries += [layout.first_words[h] + part * keys.words, len(own[h].order), h]
            lists += own[h].numbers
    table = [
        heads, keys.words + values.words, layouts[0].stored, layouts[1].stored, most, start + len(lists),
        exponent_of(keys), *([0] * 9), *entries, *lists,
    ]  # fmt: skip
    table += [n for columns in made[1] for n in columns.orders(1, most)]
    return evaluated(mx.array(np.array(table, np.int64).astype(np.uint32).view(np.int32)))


def exponent_of(keys: SpectralQuantizer) -> int:
    """Of two, by which the basis of the keys is divided to use the range of half precision."""
    return math.frexp(np.abs(np.array(keys.synthesis)).max(initial=0.0))[1] - LARGEST


def fragments(keys: SpectralQuantizer, made: list[HeadColumns], most: int) -> mx.array:
    """The basis of the keys, divided, with its rows in the order of the columns, as uint32 [H, MC / 16, D / 16, 32, 4]:
    of each 16 columns and 16 dims, the pairs of halves that each lane of a warp has of the first factor of
    mma.m16n8k16 (PTX ISA)."""
    basis, exponent = np.array(keys.synthesis), exponent_of(keys)
    heads, _, dims = basis.shape
    turned = np.zeros((heads, most, dims), np.float16)
    for h, columns in enumerate(made):
        order = np.array(columns.orders(0, most))
        turned[h, order >= 0] = np.ldexp(basis[h, order[order >= 0]], -exponent)
    # [head, columns by 16, eight of them or the others, lane / 4, dims by 16, eight or the others, lane % 4, two]
    parts = turned.reshape(heads, most // 16, 2, 8, dims // 16, 2, 4, 2).transpose(0, 1, 4, 3, 6, 5, 2, 7)
    words = np.ascontiguousarray(parts).view(np.uint32).reshape(heads, most // 16, dims // 16, 32, 4)
    return evaluated(mx.array(words))


@functools.cache
def lookup() -> mx.array:
    """int32 [296]: eight for each width of rings, bytes of the levels of 1 and 2 bits, and of wider ones the
    polynomial, 1024 and scales, all twice; then levels of codes alone."""
    table = np.zeros(LOOKUP, np.uint32)
    rings, alone = table[:ALONE].reshape(-1, 8), table[ALONE:].view(np.float16)
    for width in (1, 2):
        halves = trellis.ring_levels(width).astype(np.float16).view(np.uint8).reshape(-1, 2)
        if width == 1:  # by the bits of slots s - 2, s - 1 and s, the lowest first
            halves = halves[[2 * ((n >> 2) ^ (n & 1)) + (n >> 1 & 1) for n in range(8)]]
        rings[width - 1, :4] = np.concatenate([halves[:, 0], halves[:, 1]]).view(np.uint32)
    for width in (3, 4, 5):
        pairs = rings[width - 1].view(np.float16).reshape(8, 2)
        pairs[:4] = np.array([*trellis.COEFFICIENTS[width], 1024.0])[:, None]
        pairs[4:6] = 2.0 ** -np.array([[width + 1, width + 3], [width + 1, width + 1]])
    levels = [np.zeros(2), *(codebook.levels(width) for width in range(1, codebook.MAX_BITS + 1))]
    alone[: 2 << codebook.MAX_BITS] = np.concatenate(levels)
    return evaluated(mx.array(table.view(np.int32)))


def least_bytes(most: int, row: int, key_dims: int, words: int, numbers: int, warps: int) -> int:
    """Shared memory that a thread group needs, see VqColumnSpace in columns.h. words, numbers: of the words of a head's
    keys and values, and of their lists."""
    before = 4 * (40 + LOOKUP + numbers) + 2 * QUERIES * (most + 8)
    own = warps * (2 * (TOKENS * row + 8) + 4 * TOKENS * words) + 4 * TOKENS  # read ahead of a list's end, for nothing
    gathering = 4 * warps * QUERIES * (most + 6)
    return max(before + max(own, gathering), 4 * QUERIES * (key_dims + 64))


class Program(NamedTuple):
    """What the kernel is compiled for besides dims and dtype. most: MC; row: columns of a row of a tile; warps: of a
    thread group; groups: that share a multiprocessor."""

    most: int
    row: int
    warps: int
    groups: int


def chosen(
    keys: SpectralQuantizer, values: SpectralQuantizer, program: Program | None = None
) -> tuple[Program, mx.array, mx.array] | None:
    """(program, table, fragments): the program with the fewest columns and then the most warps that takes these codes,
    or the given one; None when it, or every one, has too little room."""
    made = every_head(keys, values)
    dims = keys.synthesis.shape[-1], values.synthesis.shape[-1]
    words = head_words(keys, values)
    numbers = max(len(own.numbers) + len(other.numbers) for own, other in zip(*made, strict=True))
    written = max(own.written for part in made for own in part)

    def has_room(p: Program) -> bool:
        shared = least_bytes(p.most, p.row, dims[0], words, numbers, p.warps)
        enough = NARROW_WARPS if p.most <= NARROW else WIDE_WARPS
        return written <= p.row and p.warps * p.groups <= enough and shared <= shared_bytes(p.groups)

    for most in [max(dims) + spare + 8 for spare in SPARE] if program is None else [program.most]:
        row = SHORT_ROW if written <= SHORT_ROW < most - 8 else most - 8
        programs = [Program(most, row, *size) for size in SIZES] if program is None else [program]
        found = next(filter(has_room, programs), None)
        table = column_table(keys, values, made, most)
        if found and table is not None:
            return found, table, fragments(keys, made[0], most)
    return None


def shared_bytes(groups: int) -> int:
    """What each of so many groups may have: all that is there, so that one program serves many layers."""
    return SHARED_BYTES // groups // 16 * 16 - GROUP_BYTES


def _program(plan: "Plan") -> Program:
    assert plan.shape.program is not None  # or attend.h is launched
    return plan.shape.program


def attend(plan: "Plan", o: "Operands") -> Launch:
    """The launch of vq_attend_columns."""
    shape, (most, row, warps, groups) = plan.shape, _program(plan)
    every = shape.planes, plan.splits, shape.rows
    return Launch(
        COLUMNS,
        [o.queries, o.exact_keys, o.exact_values, *chunk_inputs(o.words), o.held, o.key_basis, o.key_mean, o.table,
         lookup(), o.params, o.scale, o.hidden, o.added],
        [(*every, 2), (*every, most)],
        [mx.float32, mx.float32],
        (shape.planes, plan.groups, shape.row_tiles),  # exact tokens of all planes last
        warps * 32,
        shared_bytes(groups),
        (("T", shape.dtype), ("DK", shape.key_dims), ("DV", shape.value_dims), ("MC", most), ("ROW", row),
         ("WARPS", warps)),
    )  # fmt: skip
