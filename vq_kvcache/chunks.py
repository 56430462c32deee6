"""Packed codes of one layer, in a few chunks that are hardly ever moved once written."""

import dataclasses
import functools
import itertools
import mmap
from collections.abc import Hashable
from typing import Any

import mlx.core as mx

SMALLEST_CHUNK = 512  # tokens; a later chunk holds a quarter of what is packed already
MAX_CHUNKS = 8  # a kernel takes that many buffers
LEAST_INPUT = 8  # elements: Metal keeps smaller inputs in another address space
ALLOCATOR_BYTES = 64  # at most, that an allocator adds to a buffer before it rounds up to whole pages


def fill_pages(tokens: int, token_bytes: int) -> int:
    """The most tokens of `token_bytes` each that take no more memory pages than `tokens` do: room that a buffer of
    `tokens` would waste."""
    if token_bytes == 0:
        return tokens
    pages = -(-(tokens * token_bytes + ALLOCATOR_BYTES) // mmap.PAGESIZE)
    return (pages * mmap.PAGESIZE - ALLOCATOR_BYTES) // token_bytes


@dataclasses.dataclass
class Chunk:
    """Packed tokens: words uint32 [B, W, capacity], those of keys and then those of values; `tokens` are in use."""

    words: mx.array
    tokens: int

    @property
    def capacity(self) -> int:
        """Tokens it can hold."""
        return int(self.words.shape[-1])


class Packed(tuple[tuple[mx.array, int], ...]):
    """(words uint32 [B, W, capacity], columns in use) of each chunk at one moment."""

    @functools.cached_property
    def tokens(self) -> int:
        """Columns in use."""
        return sum(tokens for _, tokens in self)

    def kept(self, *reader: Hashable) -> dict[Hashable, Any]:
        """For whoever reads these codes: what they are read with, until more are packed. Every layer would find it out
        again in every step."""
        return self._kept.setdefault(reader, {})

    @functools.cached_property
    def _kept(self) -> dict[Hashable, dict[Hashable, Any]]:
        return {}

    @functools.cached_property
    def inputs(self) -> tuple[list[mx.array], tuple[tuple[int, int], ...]]:
        """What kernels read: the words, and (columns in use, capacity), of each chunk."""
        words = [_padded(held) if held.shape[-1] % 4 else held for held, _ in self]
        return words, tuple((tokens, own.shape[-1]) for (_, tokens), own in zip(self, words, strict=True))


def _padded(words: mx.array) -> mx.array:
    """Words [B, W, T] with T a multiple of four."""
    return mx.pad(words, [(0, 0), (0, 0), (0, -words.shape[-1] % 4)])


@functools.cache
def nothing(dtype: mx.Dtype) -> mx.array:
    """An operand that kernels do not read, [LEAST_INPUT]."""
    none = mx.zeros(LEAST_INPUT, dtype)
    mx.eval(none)
    return none


class Chunks:
    """Packed tokens of B rows side by side: column c of all chunks, one after another, is packed token c of each row.
    Only the last chunk may have columns that are not in use. Until more are held than `expected`, none beyond those are
    reserved; 0 is not known.
    """

    def __init__(self, chunks: list[Chunk] | None = None, expected: int = 0) -> None:
        self.held: list[Chunk] = chunks or []
        self.expected = expected
        self._packed: Packed | None = None

    @property
    def tokens(self) -> int:
        """Columns in use."""
        return sum(chunk.tokens for chunk in self.held)

    @property
    def packed(self) -> Packed:
        """What is held now; the same object until something changes."""
        if self._packed is None:
            self._packed = Packed((chunk.words, chunk.tokens) for chunk in self.held)
        return self._packed

    def take(self, rows: mx.array) -> None:
        """Keep these rows, in this order."""
        self._packed = None
        for chunk in self.held:
            chunk.words = chunk.words[rows]

    def append(self, words: mx.array) -> None:
        """Add words [B, W, n] behind the last column in use."""
        start = self.tokens
        self.extend_to(start + words.shape[-1], words.shape[0], words.shape[1])
        self.write(start, words)

    def extend_to(self, tokens: int, batch: int, width: int) -> None:
        """Put at least `tokens` columns to use; chunks are added for those that have no place."""
        self._packed = None  # or it would keep what is written over, and MLX could not write in place
        missing = tokens - self.tokens
        if missing > 0 and self.held:
            last = self.held[-1]
            taken = min(last.capacity - last.tokens, missing)
            last.tokens += taken
            missing -= taken
        if missing <= 0:
            return
        if len(self.held) == MAX_CHUNKS:
            self._join_smallest()
        wanted = max(SMALLEST_CHUNK, self.tokens // 4)
        if (left := self.expected - self.tokens) > 0:
            wanted = min(wanted, left)
        wanted = max(wanted, missing)
        # A multiple of four, because kernels fetch the words of four tokens at once.
        room = max(fill_pages(wanted, 4 * batch * width) & ~3, -(-missing // 4) * 4)
        self.held.append(Chunk(mx.zeros((batch, width, room), mx.uint32), missing))

    def write(self, column: int, words: mx.array, row: int | None = None) -> None:
        """Set columns column.. that are in use to words [B, W, n], or those of one row to words [1, W, n]."""
        self._packed = None
        first, count = 0, words.shape[-1]
        for chunk in self.held:
            a, b = max(column, first), min(column + count, first + chunk.tokens)
            if a < b:
                chunk.words = written(chunk.words, a - first, words[..., a - column : b - column], row)
            first += chunk.tokens

    def words(self, start: int, end: int) -> mx.array:
        """Words [B, W, end - start] of the columns start..end."""
        return words_between(self.packed, start, end)

    def _join_smallest(self) -> None:
        """Join the two neighbours that hold the fewest tokens together: what is packed is hardly ever copied."""
        sizes = [a.tokens + b.tokens for a, b in itertools.pairwise(self.held)]
        i = sizes.index(min(sizes))
        pair = Packed((chunk.words, chunk.tokens) for chunk in self.held[i : i + 2])
        self.held[i : i + 2] = [Chunk(words_between(pair, 0, sizes[i]), sizes[i])]

    def cut(self, tokens: int) -> None:
        """Keep no more than the first `tokens` columns."""
        self._packed = None
        excess = self.tokens - tokens
        while excess > 0:
            dropped = min(excess, self.held[-1].tokens)
            self.held[-1].tokens -= dropped
            excess -= dropped
            if self.held[-1].tokens == 0:
                self.held.pop()

    def fit(self, batch: int, width: int) -> bool:
        """Whether these are words [batch, width, ...] as `append` leaves them: for what was read from a file."""
        alike = all(
            c.words.dtype == mx.uint32 and c.words.shape == (batch, width, c.capacity) and 0 < c.tokens <= c.capacity
            for c in self.held
        )
        # Kernels write what they decode two tokens at a time.
        return alike and all(c.tokens % 4 == 0 for c in self.held[:-1])

    def copy(self) -> "Chunks":
        """An independent twin that shares the arrays."""
        return Chunks([dataclasses.replace(chunk) for chunk in self.held], self.expected)


def words_between(chunks: Packed, start: int, end: int) -> mx.array:
    """Words [B, W, end - start] of the columns start..end of (words, tokens) chunks."""
    parts, first = [], 0
    for held, tokens in chunks:
        a, b = max(start - first, 0), min(end - first, tokens)
        if a < b:
            parts.append(held[..., a:b])
        first += tokens
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)


def written(target: mx.array, start: int, update: mx.array, row: int | None = None) -> mx.array:
    """`target` with `update` at start.. of axis 2, as a new array: snapshots of the old one stay as they were.

    MLX writes in place when nothing else holds the buffer.
    """
    if update.shape == target.shape:
        # MLX would take the update as it is: one row of a batch would keep the memory of all rows.
        return mx.contiguous(update).astype(target.dtype)
    result = target.__copy__()  # without an operation
    rows = slice(None) if row is None else slice(row, row + 1)
    result[rows, :, start : start + update.shape[2]] = update
    return result
