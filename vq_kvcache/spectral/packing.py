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
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from numpy.typing import ArrayLike, NDArray

from .bit_allocator import allocate
from .codebook import MAX_BITS, dequantize, fused, levels
from .trellis import dequantize_rings, is_ring, ring_constants, ring_levels, turn_rings

WORD_BITS = 32
# Codes of the first widths leave the most bits of a word over when alone, so they choose their company first.
FILL_ORDER = (3, 5, 7, 6, 8, 4, 2, 1)
FEW_TOKENS = 512  # of which all levels at once are small, and starting operations takes longer than running them


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
        """Words [B, W, T] of all heads -> levels of a head's stored coordinates, float32 [B, n, T], in an order of
        their own: coordinate i of the storage order is row places(head)[i], and some rows are none's."""
        batch, _, tokens = words.shape
        source, padded = self._of_head(words, head)
        parts = [_by_batch(part, batch, padded) for part in self._tables.of_head[head].levels(source)]
        return mx.concatenate([mx.zeros((batch, 0, padded)), *parts], axis=1)[..., :tokens]

    def head_scores(self, queries: mx.array, words: mx.array, head: int) -> mx.array:
        """Queries [B, R, n] @ `head_levels` -> [B, R, T], without holding all levels at once."""
        batch, _, tokens = words.shape
        source, padded = self._of_head(words, head)
        product, start = mx.zeros((batch, queries.shape[1], padded)), 0
        for part in self._tables.of_head[head].levels(source):
            levels = _by_batch(part, batch, padded)
            own = queries[..., start : start + levels.shape[1]]
            product, start = mx.addmm(product, own, levels), start + levels.shape[1]
        return product[..., :tokens]

    def head_sums(self, weights: mx.array, words: mx.array, head: int) -> mx.array:
        """Weights [B, R, T] @ the transpose of `head_levels` -> [B, R, n], without holding all levels at once; any
        numbers for rows of none."""
        batch, _, tokens = words.shape
        if batch * tokens <= FEW_TOKENS:
            return weights @ self.head_levels(words, head).swapaxes(-1, -2)
        source, padded = self._of_head(words, head)
        if padded > tokens:
            weights = mx.pad(weights, [(0, 0), (0, 0), (0, padded - tokens)])
        table = self._tables.of_head[head]
        sums = [weights @ part.reshape(batch, padded, part.shape[-1]) for part in table.token_levels(source)]
        sums += [weights @ _by_batch(part, batch, padded).swapaxes(-1, -2) for part in table.plain_levels(source)]
        return mx.take(mx.concatenate(sums, axis=-1), table.columns, axis=-1) if sums else weights[..., :0]

    def _of_head(self, words: mx.array, head: int) -> tuple[mx.array, int]:
        """Words [B, W, T] of all heads -> those of one, [W, B * t], and t, from T to an eighth more: kernels are traced
        anew for every shape, so these must stay few."""
        own = words[:, self.first_words[head] : self.first_words[head + 1]]
        # Rows outermost, so that those of one kind are one block of memory, which a fused kernel runs through fastest.
        own = own.swapaxes(0, 1)
        if added := -own.shape[2] % (1 << max(own.shape[2].bit_length() - 4, 0)):
            own = mx.pad(own, [(0, 0), (0, 0), (0, added)])
        return own.reshape(own.shape[0], own.shape[1] * own.shape[2]), own.shape[2]

    def places(self, head: int) -> mx.array:
        """Where `head_levels` puts each coordinate of the storage order, [n]."""
        return self._tables.of_head[head].places

    def coordinates(self, head: int) -> mx.array:
        """The coordinate of each row of `head_levels`, [n]; for rows of none, how many there are."""
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


class _Rings(NamedTuple):
    """A head's rings of one width and as many pairs of slots: rows start..end; `shifts` uint32 [pairs, 1, 1]."""

    width: int
    start: int
    end: int
    shifts: mx.array

    def levels(self, turned: mx.array) -> mx.array:
        """Turned rings of all kinds -> levels [2, pairs, R, T]."""
        fields = mx.right_shift(turned[:, :, self.start : self.end], self.shifts)
        return _levels(self.width, True, fields.shape[-1])(fields)

    def token_levels(self, turned: mx.array) -> mx.array:
        """Turned rings of all kinds -> levels [T, n], four slots of a ring side by side: the matrix product of MLX's
        CPU build adds numbers that lie so two times as fast, and turning bytes is cheaper than turning levels."""
        even, odd = mx.right_shift(turned[:, :, self.start : self.end], self.shifts[::2])
        tokens = turned.shape[-1]
        words = _spread(self.width, tokens)(even, odd).flatten(0, 1)
        slots = mx.contiguous(words.swapaxes(0, 1)).view(mx.uint8)  # the lowest byte first
        return _levels(self.width, True, tokens)(slots)


@dataclasses.dataclass(frozen=True)
class _HeadTable:
    """The fields of one head: those of rings, and those of codes that stand alone.

    ring_words, ring_constants: of each ring.  rows, shifts: of codes that stand alone; runs: their width, first and end
    for each width.  columns: where `head_sums` finds each row of `head_levels`; 0 for rows of none.
    """

    rings: list[_Rings]
    ring_constants: list[mx.array]
    runs: list[tuple[int, int, int]]
    ring_words: mx.array
    rows: mx.array
    shifts: mx.array
    places: mx.array
    coordinates: mx.array
    columns: mx.array

    @property
    def arrays(self) -> list[mx.array]:
        """All of them."""
        own = [a for a in vars(self).values() if isinstance(a, mx.array)]
        return own + self.ring_constants + [r.shifts for r in self.rings]

    def levels(self, source: mx.array) -> Iterator[mx.array]:
        """Words [W, T] -> levels [..., T], one kind after the other."""
        if self.rings:
            turned = self._turned(source)
            yield from (rings.levels(turned) for rings in self.rings)
        yield from self.plain_levels(source)

    def token_levels(self, source: mx.array) -> Iterator[mx.array]:
        """Words [W, T] -> levels of rings, [T, n], one kind after the other."""
        if self.rings:
            turned = self._turned(source)
            yield from (rings.token_levels(turned) for rings in self.rings)

    def _turned(self, source: mx.array) -> mx.array:
        return turn_rings(source.shape[1])(mx.take(source, self.ring_words, axis=0), *self.ring_constants)

    def plain_levels(self, source: mx.array) -> Iterator[mx.array]:
        """Words [W, T] -> levels [n, T] of codes that stand alone, of one width after the other."""
        if self.runs:
            fields = mx.right_shift(mx.take(source, self.rows, axis=0), self.shifts)
            tokens = fields.shape[1]
            parts = [_levels(width, False, tokens)(fields[start:end]) for width, start, end in self.runs]
            yield _joined(parts)

    @classmethod
    def of(cls, layout: "Layout", head: int) -> "_HeadTable":
        """The table of a head of a layout whose segments are known."""
        segments = layout.segments[head]
        coded = sorted(filter(layout.in_rings, segments), key=_kind)
        words = [(s, w) for s in coded for w in range(s.words)]
        rings: list[_Rings] = []
        rows: list[int] = []  # the coordinate of each, -1 for none
        columns: list[int] = []
        for (width, pairs), same in itertools.groupby(words, key=lambda word: _kind(word[0])):
            own, start = list(same), rings[-1].end if rings else 0
            rows += [_coordinate(s, k, w) for odd in (0, 1) for k in range(odd, 2 * pairs, 2) for s, w in own]
            columns += [_coordinate(s, k + i, w) for k in range(0, 2 * pairs, 4) for s, w in own for i in range(4)]
            shifts = _column(range(0, 2 * width * pairs, 2 * width))[:, None]
            rings.append(_Rings(width, start, start + len(own), shifts))
        others = sorted((s for s in segments if not layout.in_rings(s)), key=_kind)
        alone = [(s, slot, w) for s in others for slot in range(s.slots) for w in range(s.words)]
        rows += [_coordinate(*field) for field in alone]
        columns += [_coordinate(*field) for field in alone]
        widths = [s.width for s, _, _ in alone]
        runs = [(b, widths.index(b), widths.index(b) + widths.count(b)) for b in sorted(set(widths))]
        places = {coordinate: row for row, coordinate in enumerate(rows)}
        column_of = {coordinate: column for column, coordinate in enumerate(columns)}
        stored = len(layout.order[head])
        return cls(
            rings,
            ring_constants([(s.shift, s.width, s.slots) for s, _ in words]) if words else [],
            runs,
            _indices([s.first_word + w for s, w in words]),
            _indices([s.first_word + w for s, _, w in alone]),
            _column([s.shift + slot * s.width for s, slot, _ in alone]),
            _indices([places[i] for i in range(stored)]),
            _indices([i if i >= 0 else stored for i in rows]),
            _indices([column_of[i] if i >= 0 else 0 for i in rows]),
        )


def _coordinate(segment: Segment, slot: int, word: int) -> int:
    """In storage order; -1 where a segment has no such slot."""
    return segment.first + slot * segment.words + word if slot < segment.slots else -1


def _by_batch(levels: mx.array, batch: int, tokens: int) -> mx.array:
    """Levels [..., B * T] -> [B, n, T]."""
    rows = math.prod(levels.shape[:-1])
    if batch == 1:
        return levels.reshape(1, rows, tokens)
    return levels.reshape(rows, batch, tokens).swapaxes(0, 1)


def _joined(parts: list[mx.array]) -> mx.array:
    return mx.concatenate(parts) if len(parts) > 1 else parts[0]


def _kind(segment: Segment) -> tuple[int, int]:
    return segment.width, -(-segment.slots // 2)


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


def _column(numbers: Iterable[int]) -> mx.array:
    return mx.array(list(numbers), mx.uint32).reshape(-1, 1)


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


@functools.cache
def _levels(width: int, ring: bool, tokens: int) -> Callable[[mx.array], mx.array]:
    """Mask and polynomial fused into one kernel for each kind, of fields of so many tokens; a code in a ring has a bit
    more, see `turn_rings`."""

    def decode(fields: mx.array) -> mx.array:
        # SSE2 converts no unsigned numbers.
        codes = (fields & (2 ** (width + ring) - 1)).astype(mx.int32)
        return dequantize_rings(codes, width) if ring else dequantize(codes, width)

    return fused(decode, shapeless=False)


@functools.cache
def _spread(width: int, tokens: int) -> Callable[[mx.array, mx.array], mx.array]:
    """The j of two even and of two odd slots in the lowest bits of words, of so many tokens -> in the bytes of a
    word."""
    mask, second = 2 ** (width + 1) - 1, 2 * width

    def spread(even: mx.array, odd: mx.array) -> mx.array:
        low = (even & mask) | mx.left_shift(odd & mask, 8)
        high = mx.right_shift(even, second) & mask, mx.right_shift(odd, second) & mask
        result: mx.array = low | (mx.left_shift(high[0], 16) | mx.left_shift(high[1], 24))
        return result

    return fused(spread, shapeless=False)


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
