"""THE byte layout: how the codes of one head's vector lie in 32-bit words.

A vector of D coordinates with widths 0..8 becomes W words of 32 bits. Each word is filled to its last bit where the
codes left allow it, with as many as possible of the first width of FILL_ORDER, then of the second, and so on. It holds
a run of codes of each of its widths, the widest in its lowest bits: ten 3-bit codes and one of 2 bits. A code never
straddles two words. Words of equal content are neighbours and form *segments*:

    segment (width, shift, first_word, words, slots, first):
        coordinate first + s * words + w  =  (word[first_word + w] >> (shift + s * width)) & (2^width - 1)

so one static shift serves `words` coordinates, and one broadcast shift a whole segment. Coordinates in *storage order*
are those of the segments one after the other; dimensions of width 0 are not stored. An array of T vectors is stored
word-major, [..., W, T]: neighbouring tokens lie side by side, heads of different W simply stack, and a kernel's lanes
read consecutive tokens.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np
from numpy.typing import ArrayLike, NDArray

from .bit_allocator import allocate
from .codebook import MAX_BITS, dequantize

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

    Head h owns the words first_words[h] to first_words[h + 1] of the W in all; `segments[h]` is its table, with words
    counted from its first; `order[h]` lists its dimensions in storage order; `stored` is N, the longest of them.
    """

    def __init__(self, widths: ArrayLike) -> None:
        table = np.atleast_2d(np.asarray(widths, dtype=np.int64))
        if table.ndim != 2 or table.size == 0 or table.min() < 0 or table.max() > MAX_BITS:
            raise ValueError(f"widths of shape {table.shape}; expected integers [H, D] in 0..{MAX_BITS}.")
        self.widths = table
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
        return sum(a.nbytes for a in vars(self._tables).values() if isinstance(a, mx.array))

    def pack(self, codes: Sequence[mx.array]) -> mx.array:
        """Codes of `split`, uint32 [..., n, T] a width -> words uint32 [..., W, T]."""
        tables = self._tables
        if not codes:
            raise ValueError("nothing is stored at these widths; expected a width above 0.")
        rows = mx.left_shift(mx.concatenate(list(codes), axis=-2), tables.shifts)
        rows = mx.concatenate([rows, mx.zeros((*rows.shape[:-2], 1, rows.shape[-1]), mx.uint32)], axis=-2)
        # Fields of a word are disjoint, so their sum is their union.
        return mx.take(rows, tables.codes_of_word, axis=-2).sum(axis=-3)

    def unpack(self, words: mx.array) -> list[mx.array]:
        """Words [..., W, T] -> codes uint32 [..., n, T], one array per width of `tables`; the inverse of `pack`."""
        return [fields & (2**width - 1) for width, fields in self._fields(words)]

    def unpack_levels(self, words: mx.array) -> mx.array:
        """Words [..., W, T] -> levels of the stored coordinates, float32 [..., H, N, T]; 0 beyond a head's own."""
        lead, tokens = words.shape[:-2], words.shape[-1]
        parts = [_levels(width)(fields) for width, fields in self._fields(words)]
        parts.append(mx.zeros((*lead, 1, tokens), mx.float32))
        return mx.take(mx.concatenate(parts, axis=-2), self._tables.row_of, axis=-2)

    def split(self, z: mx.array) -> list[tuple[int, mx.array]]:
        """Coordinates [..., H, N, T] -> (width, rows [..., n, T]) in the order `pack` takes them."""
        rows = mx.take(z.flatten(-3, -2), self._tables.grouped, axis=-2)
        return [(width, rows[..., a:b, :]) for width, a, b in self._tables.groups]

    def _fields(self, words: mx.array) -> list[tuple[int, mx.array]]:
        if words.shape[-2] != self.words or words.dtype != mx.uint32:
            raise ValueError(f"{words.shape[-2]} words of {words.dtype}; expected {self.words} of uint32; wrong codec.")
        fields = mx.right_shift(mx.take(words, self._tables.word_of, axis=-2), self._tables.shifts)
        return [(width, fields[..., a:b, :]) for width, a, b in self._tables.groups]


class _Tables:
    """The layout as index arrays, so that a few ops serve all heads: rows grouped by width, then head, then order."""

    def __init__(self, layout: Layout) -> None:
        rows = []  # (width, head, position in storage order, word, shift)
        for h, segments in enumerate(layout.segments):
            for s in segments:
                for slot in range(s.slots):
                    for w in range(s.words):
                        word = layout.first_words[h] + s.first_word + w
                        rows.append((s.width, h, s.first + slot * s.words + w, word, s.shift + slot * s.width))
        rows.sort(key=lambda r: (-r[0], r[1], r[2]))
        count = len(rows)
        widths = [r[0] for r in rows]
        self.groups = [(b, widths.index(b), widths.index(b) + widths.count(b)) for b in sorted(set(widths))[::-1]]
        self.word_of = mx.array([r[3] for r in rows], mx.uint32)
        self.shifts = mx.array([r[4] for r in rows], mx.uint32).reshape(count, 1)
        self.grouped = mx.array([r[1] * layout.stored + r[2] for r in rows], mx.uint32)
        row_of = np.full((layout.heads, layout.stored), count, dtype=np.uint32)
        in_word: list[list[int]] = [[] for _ in range(layout.words)]
        for i, (_, h, position, word, _) in enumerate(rows):
            row_of[h, position] = i
            in_word[word].append(i)
        self.row_of = mx.array(row_of)
        slots = max((len(codes) for codes in in_word), default=0)
        padded = [codes + [count] * (slots - len(codes)) for codes in in_word]
        self.codes_of_word = mx.array(np.array(padded, dtype=np.uint32).reshape(layout.words, slots).T)
        # Other threads, with streams of their own, must find them computed.
        mx.eval(self.word_of, self.shifts, self.grouped, self.row_of, self.codes_of_word)


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
def _levels(width: int) -> Callable[[mx.array], mx.array]:
    """Mask and polynomial fused into one kernel for each width."""

    # Shapeless, or every context length would be traced anew, and its trace kept.
    @functools.partial(mx.compile, shapeless=True)
    def levels(fields: mx.array) -> mx.array:
        return dequantize(fields & (2**width - 1), width)

    return levels


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
