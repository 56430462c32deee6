"""THE byte layout: how the codes of one head's vector lie in 32-bit words.

A vector of D coordinates with widths 0..8 becomes W words of 32 bits. Each word is filled to its last bit where the
codes left allow it, with as many as possible of the first width of FILL_ORDER, then of the second, and so on. It holds
a run of codes of each of its widths, the widest in its lowest bits: ten 3-bit codes and one of 2 bits. A code never
straddles two words. Words of equal content are neighbours and form *segments*:

    segment (width, shift, first_word, words, slots, first):
        coordinate first + s * words + w  =  (word[first_word + w] >> (shift + s * width)) & (2^width - 1)

so one static shift serves `words` coordinates, and one broadcast shift a whole segment. Where a layout is coded by
trellis, the codes of a segment that lie in one word form a ring (trellis.py). Coordinates in *storage order*
are those of the segments one after the other; dimensions of width 0 are not stored. An array of T vectors is stored
word-major, [..., W, T]: neighbouring tokens lie side by side, heads of different W simply stack, and a kernel's lanes
read consecutive tokens.
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from numpy.typing import ArrayLike, NDArray

from .bit_allocator import allocate
from .codebook import COEFFICIENTS, MAX_BITS, dequantize, fused, levels
from .trellis import COEFFICIENTS as RING_COEFFICIENTS
from .trellis import dequantize_rings, is_ring, ring_constants, ring_levels, turn_rings

WORD_BITS = 32
# Codes of the first widths leave the most bits of a word over when alone, so they choose their company first.
FILL_ORDER = (3, 5, 7, 6, 8, 4, 2, 1)


@dataclasses.dataclass(frozen=True)
class Segment:
    """A rectangle of codes of one width: `slots` codes in each of `words` words, from bit `shift` on."""

    width: int
    shift: int
    first_word: int
    words: int
    slots: int
    first: int

    @property
    def count(self) -> int:
        """Coordinates in this segment."""
        return self.words * self.slots


class Group(NamedTuple):
    """Rows start..end of the codes that `pack` takes: of one width, and in rings of `slots` codes, or alone (0)."""

    width: int
    slots: int
    start: int
    end: int


def fill_words(counts: Sequence[int]) -> list[dict[int, int]]:
    """`counts[b]` codes of width b -> one {width: codes} per word, as full as can be, equal words together."""
    left, contents = list(counts), []
    while any(left[1:]):
        content = _fullest_word(left)
        times = min(left[width] // codes for width, codes in content.items())
        for width, codes in content.items():
            left[width] -= codes * times
        contents += [content] * times
    return contents


def _fullest_word(left: Sequence[int]) -> dict[int, int]:
    sums = [1]  # bit n is set when the widths from here on can fill n bits
    for width in reversed(FILL_ORDER):
        mask = sums[-1]
        for _ in range(min(left[width], WORD_BITS // width)):
            mask |= mask << width
        sums.append(mask & ((1 << (WORD_BITS + 1)) - 1))
    room, content = sums.pop().bit_length() - 1, {}
    for width in FILL_ORDER:
        rest, most = sums.pop(), min(left[width], room // width)
        codes = next(n for n in range(most, -1, -1) if rest >> (room - n * width) & 1)
        if codes:
            content[width] = codes
            room -= codes * width
    return dict(sorted(content.items(), reverse=True))


class Layout:
    """Where the codes of H heads lie. `widths` [H, D] in 0..8 ([D] is one head), in any order along D.

    trellis: whether codes that can form rings do. It changes what codes mean, not where they lie.
    Head h owns the words first_words[h] to first_words[h + 1] of the W in all; `segments[h]` is its table, with words
    counted from its first; `order[h]` lists its dimensions in storage order; `stored` is N, the longest of them.
    """

    def __init__(self, widths: ArrayLike, trellis: bool = False) -> None:
        table = np.atleast_2d(np.asarray(widths, dtype=np.int64))
        if table.ndim != 2 or table.size == 0 or table.min() < 0 or table.max() > MAX_BITS:
            raise ValueError(f"widths of shape {table.shape}; expected integers [H, D] in 0..{MAX_BITS}.")
        self.widths, self.trellis = table, trellis
        self.segments: list[list[Segment]] = []
        self.order: list[list[int]] = []
        self.first_words = [0]
        for row in table:
            segments = _segments(fill_words(_count(row)))
            self.segments.append(segments)
            self.order.append(_storage_order(row, segments))
            self.first_words.append(self.first_words[-1] + sum(s.words for s in segments if s.shift == 0))
        self.words = self.first_words[-1]
        self.stored = max(map(len, self.order))
        self._tables = _Tables(self)

    def in_rings(self, segment: Segment) -> bool:
        """Whether the codes of a segment that lie in one word are coded together."""
        return self.trellis and is_ring(segment.width, segment.slots)

    @property
    def heads(self) -> int:
        """H."""
        return len(self.order)

    @property
    def padding_bits(self) -> int:
        """Bits of the W words that hold no code."""
        return WORD_BITS * self.words - int(self.widths.sum())

    @property
    def nbytes(self) -> int:
        """Bytes of the index arrays."""
        return sum(a.nbytes for a in self._tables.arrays)

    def pack(self, codes: Sequence[mx.array]) -> mx.array:
        """Codes of `split`, uint32 [..., n, T] a group -> words uint32 [..., W, T]."""
        tables = self._tables
        if not codes:
            raise ValueError("nothing is stored at these widths; expected a width above 0.")
        rows = mx.left_shift(mx.concatenate(list(codes), axis=-2), tables.shifts)
        rows = mx.concatenate([rows, mx.zeros((*rows.shape[:-2], 1, rows.shape[-1]), mx.uint32)], axis=-2)
        # Fields of a word are disjoint, so their sum is their union.
        return mx.take(rows, tables.codes_of_word, axis=-2).sum(axis=-3)

    def unpack(self, words: mx.array) -> list[mx.array]:
        """Words [..., W, T] -> codes uint32 [..., n, T], one array per group; the inverse of `pack`."""
        fields = mx.right_shift(mx.take(self._checked(words), self._tables.word_of, axis=-2), self._tables.shifts)
        return [fields[..., g.start : g.end, :] & (2**g.width - 1) for g in self.groups]

    def unpack_levels(self, words: mx.array) -> mx.array:
        """Words [..., W, T] -> levels of the stored coordinates, float32 [..., H, N, T]; 0 beyond a head's own."""
        lead, tokens = words.shape[:-2], words.shape[-1]
        rows = self._checked(words).reshape(math.prod(lead), self.words, tokens)
        levels = []
        for head, order in enumerate(self.order):
            own = self.head_levels(rows, head)
            own = mx.take(own, self.places(head), axis=1) if order else own
            levels.append(mx.pad(own, [(0, 0), (0, self.stored - len(order)), (0, 0)]))
        return mx.stack(levels, axis=1).reshape(*lead, self.heads, self.stored, tokens)

    def head_levels(self, words: mx.array, head: int) -> mx.array:
        """Words [B, W, T] of all heads -> levels of a head's n stored coordinates, float32 [B, n, T], in an order of
        their own: coordinate i of the storage order is row places(head)[i]."""
        table = self._tables.of_head[head]
        batch, _, tokens = words.shape
        if not table.runs:
            return mx.zeros((batch, 0, tokens), mx.float32)
        own = words[:, self.first_words[head] : self.first_words[head + 1]]
        # Rows outermost, so that those of one kind are one block of memory, which a fused kernel runs through fastest.
        source = own.swapaxes(0, 1).reshape(own.shape[1], batch * tokens)
        if table.rings:
            source = mx.concatenate([source, *turn_rings(mx.take(source, table.ring_words, axis=0), *table.rings)])
        fields = mx.right_shift(mx.take(source, table.rows, axis=0).view(mx.int32), table.shifts)
        masked = fields[table.long :] & table.masks if table.masks.size else fields
        parts = [
            _levels(r.width, r.ring)(masked[r.start - table.long : r.end - table.long])
            if r.long
            else _levels(r.width, r.ring)(fields[r.start : r.end])
            for r in table.runs
        ]
        levels = parts[0] if len(parts) == 1 else mx.concatenate(parts)
        return levels.reshape(levels.shape[0], batch, tokens).swapaxes(0, 1)

    def places(self, head: int) -> mx.array:
        """Where `head_levels` puts each coordinate of the storage order, [n]."""
        return self._tables.of_head[head].places

    def coordinates(self, head: int) -> mx.array:
        """The coordinate of each row of `head_levels`, [n]: the inverse of `places`."""
        return self._tables.of_head[head].coordinates

    @property
    def groups(self) -> list[Group]:
        """How the rows of `split`, `pack` and `unpack` are grouped."""
        return self._tables.groups

    def split(self, z: mx.array) -> list[mx.array]:
        """Coordinates [..., H, N, T] -> rows [..., n, T] of each group; those of rings slot by slot."""
        rows = mx.take(z.flatten(-3, -2), self._tables.grouped, axis=-2)
        return [rows[..., g.start : g.end, :] for g in self.groups]

    def _checked(self, words: mx.array) -> mx.array:
        if words.shape[-2] != self.words or words.dtype != mx.uint32:
            raise ValueError(f"{words.shape[-2]} words of {words.dtype}; expected {self.words} of uint32; wrong codec.")
        return words


class _Tables:
    """The layout as index arrays, so that a few ops serve all heads: rows grouped by width; rings after the rest."""

    def __init__(self, layout: Layout) -> None:
        rows = _rows(layout)
        kinds = [(r.width, r.slots) for r in rows]
        self.of_head = [_HeadTable.of(layout, head) for head in range(layout.heads)]
        self.groups, start = [], 0
        for kind, same in itertools.groupby(kinds):
            end = start + len(list(same))
            self.groups.append(Group(*kind, start, end))
            start = end
        count = len(rows)
        self.word_of = _indices([r.word for r in rows])
        self.shifts = _column([r.shift for r in rows])
        self.grouped = _indices([r.head * layout.stored + r.position for r in rows])
        in_word: list[list[int]] = [[] for _ in range(layout.words)]
        for i, r in enumerate(rows):
            in_word[r.word].append(i)
        slots = max((len(codes) for codes in in_word), default=0)
        padded = [codes + [count] * (slots - len(codes)) for codes in in_word]
        self.codes_of_word = _indices(np.array(padded, dtype=np.uint32).reshape(layout.words, slots).T)
        # Other threads, with streams of their own, must find them computed.
        mx.eval(self.arrays)

    @property
    def arrays(self) -> list[mx.array]:
        """All of them."""
        own = [a for a in vars(self).values() if isinstance(a, mx.array)]
        return own + [a for table in self.of_head for a in table.arrays]


class _Run(NamedTuple):
    """Rows start..end of fields of one kind."""

    long: bool
    width: int
    ring: bool
    start: int
    end: int


class _Field(NamedTuple):
    """Where a stored coordinate's field is, and how far to shift it; sorted, those of one kind are neighbours."""

    long: bool
    width: int
    ring: bool
    row: int
    shift: int
    position: int


@dataclasses.dataclass(frozen=True)
class _HeadTable:
    """The fields of one head, those of one kind side by side. A field's row is one of the head's words, or of the
    turned rings that follow them, the even slots of all rings and then the odd ones.

    ring_words, rings: what `turn_rings` takes.  long: the first row whose polynomial fuses with no mask before it, and
    masks of the rows from there on.
    """

    rows: mx.array
    shifts: mx.array
    runs: list[_Run]
    long: int
    masks: mx.array
    ring_words: mx.array
    rings: tuple[mx.array, ...]
    places: mx.array
    coordinates: mx.array

    @property
    def arrays(self) -> list[mx.array]:
        """All of them."""
        return [self.rows, self.shifts, self.masks, self.ring_words, *self.rings, self.places, self.coordinates]

    @classmethod
    def of(cls, layout: "Layout", head: int) -> "_HeadTable":
        """The table of a head of a layout whose segments are known."""
        segments = layout.segments[head]
        coded = [s for s in segments if layout.in_rings(s)]
        words, count, rings = sum(s.words for s in segments if s.shift == 0), sum(s.words for s in coded), 0
        fields: list[_Field] = []
        for s in segments:
            ring = s in coded
            for i in range(s.count):
                slot, w = divmod(i, s.words)
                row = words + slot % 2 * count + rings + w if ring else s.first_word + w
                shift = slot // 2 * 2 * s.width if ring else s.shift + slot * s.width
                fields.append(_Field(_is_long(s.width, ring), s.width, ring, row, shift, s.first + i))
            rings += s.words if ring else 0
        fields.sort()
        runs: list[_Run] = []
        for kind, same in itertools.groupby(fields, key=lambda f: (f.long, f.width, f.ring)):
            start = runs[-1].end if runs else 0
            runs.append(_Run(*kind, start=start, end=start + len(list(same))))
        coordinates = np.array([f.position for f in fields], dtype=np.uint32)
        return cls(
            _indices([f.row for f in fields]),
            _column([f.shift for f in fields]).astype(mx.int32),
            runs,
            sum(not f.long for f in fields),
            _column([2 ** (f.width + f.ring) - 1 for f in fields if f.long]).astype(mx.int32),
            _indices([s.first_word + w for s in coded for w in range(s.words)]),
            ring_constants([(s.shift, s.width, s.slots) for s in coded for _ in range(s.words)]),
            _indices(np.argsort(coordinates)),
            _indices(coordinates),
        )


class _Row(NamedTuple):
    """Where one stored coordinate lies; slots are those of its ring, 0 outside of one."""

    slots: int
    width: int
    slot: int
    ring: int
    head: int
    position: int
    word: int
    shift: int


def _rows(layout: Layout) -> list[_Row]:
    """Every stored coordinate, the ones alone first, then by ring length, width, slot."""
    rows: list[_Row] = []
    rings = 0
    for h, segments in enumerate(layout.segments):
        for s in segments:
            coded = layout.in_rings(s)
            for w in range(s.words):
                word = layout.first_words[h] + s.first_word + w
                for slot in range(s.slots):
                    rows.append(_Row(
                        s.slots if coded else 0, s.width, slot if coded else 0, rings if coded else -1,
                        h, s.first + slot * s.words + w, word, s.shift + slot * s.width,
                    ))  # fmt: skip
                rings += coded
    rows.sort(key=lambda r: (r.slots, -r.width, *r[2:6]))
    return rows


def _indices(numbers: ArrayLike) -> mx.array:
    """As small as they fit: there are many, for every layer."""
    array = np.asarray(numbers, dtype=np.uint32)
    return mx.array(array.astype(np.uint16) if array.max(initial=0) < 2**16 else array)


def _column(numbers: Sequence[int]) -> mx.array:
    return mx.array(list(numbers), mx.uint32).reshape(len(numbers), 1)


def _count(widths: NDArray[np.int64]) -> list[int]:
    counts: list[int] = np.bincount(widths, minlength=MAX_BITS + 1).tolist()
    return counts


def _segments(contents: list[dict[int, int]]) -> list[Segment]:
    segments, first, start = [], 0, 0
    while start < len(contents):
        end = start
        while end < len(contents) and contents[end] == contents[start]:
            end += 1
        shift = 0
        for width, slots in contents[start].items():
            segments.append(Segment(width, shift, start, end - start, slots, first))
            first += slots * (end - start)
            shift += slots * width
        start = end
    return segments


def _storage_order(widths: NDArray[np.int64], segments: list[Segment]) -> list[int]:
    queues = {b: [int(i) for i in np.flatnonzero(widths == b)] for b in range(1, MAX_BITS + 1)}
    order = []
    for s in segments:
        order += queues[s.width][: s.count]
        del queues[s.width][: s.count]
    return order


def _is_long(width: int, ring: bool) -> bool:
    """Whether levels of this kind take more operations than MLX fuses with a mask before them."""
    return len((RING_COEFFICIENTS if ring else COEFFICIENTS)[width]) > 2


@functools.cache
def _levels(width: int, ring: bool) -> Callable[[mx.array], mx.array]:
    """Mask, unless the fields are masked, and polynomial fused into one kernel for each kind; a code in a ring has a
    bit more, see `turn_rings`."""
    mask = -1 if _is_long(width, ring) else 2 ** (width + ring) - 1

    @fused
    def decode(fields: mx.array) -> mx.array:
        codes = fields if mask < 0 else fields & mask
        return dequantize_rings(codes, width) if ring else dequantize(codes, width)

    return decode


def pack_reference(codes: Sequence[Sequence[int]], layout: Layout) -> NDArray[np.uint32]:
    """Words [W] of one token from the codes of each head in storage order, code by code: the definition of correct."""
    words = [0] * layout.words
    for head, segments in enumerate(layout.segments):
        for s in segments:
            for slot in range(s.slots):
                for w in range(s.words):
                    code = int(codes[head][s.first + slot * s.words + w])
                    words[layout.first_words[head] + s.first_word + w] |= code << (s.shift + slot * s.width)
    return np.array(words, dtype=np.uint32)


def unpack_reference(words: NDArray[np.uint32], layout: Layout) -> NDArray[np.float64]:
    """Levels [H, N, T] of words [W, T], field by field in NumPy: what `Layout.unpack_levels` must give."""
    result = np.zeros((layout.heads, layout.stored, words.shape[-1]))
    for head, segments in enumerate(layout.segments):
        for s in segments:
            start = layout.first_words[head] + s.first_word
            run = words[start : start + s.words]
            codes = np.stack([run >> (s.shift + slot * s.width) & (2**s.width - 1) for slot in range(s.slots)])
            index, table = codes.astype(np.int64), levels(s.width)
            if layout.in_rings(s):
                low = index & 1
                index = 2 * (index ^ np.roll(low, 2, axis=0)) + np.roll(low, 1, axis=0)
                table = ring_levels(s.width)
            result[head, s.first : s.first + s.count] = table[index].reshape(s.count, -1)
    return result


def allocate_words(costs: NDArray[np.float64], words: int) -> NDArray[np.int64]:
    """Widths [D] that pack into at most `words` words and waste as few of their bits as possible.

    Greedy on `costs` [D, 9] for the largest number of bits that still fits, then bit by bit wherever one more fits.
    """
    count = len(costs)
    total = min(WORD_BITS * words, MAX_BITS * count)
    while True:
        widths = allocate(costs, total)
        if len(fill_words(_count(widths))) <= words:
            break
        total -= 1
    gains = -np.diff(costs, axis=1)
    blocked = widths >= MAX_BITS
    while int(widths.sum()) < WORD_BITS * words and not blocked.all():
        gain = np.where(blocked, -np.inf, gains[np.arange(count), np.minimum(widths, MAX_BITS - 1)])
        best = int(gain.argmax())
        widths[best] += 1
        if len(fill_words(_count(widths))) > words:
            widths[best] -= 1
            # Every dimension of this width would fail in the same way.
            blocked |= widths == widths[best]
        else:
            blocked = widths >= MAX_BITS
    return widths
