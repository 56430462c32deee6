"""What one layer holds: exact first tokens (sinks), packed codes, exact newest tokens (window). Bytes, no meaning.

Token positions 0 .. length - 1 lie as  sinks | packed | window.  Sinks and window share one buffer per keys and values;
packed tokens lie in chunks that are never moved once written.
"""

import dataclasses
import mmap

import mlx.core as mx

from .drift import DriftSums
from .spectral.spectral_quant import Quantizer

BLOCK = 64  # tokens that are packed together
LAG = 16  # tokens that a seal stays behind the window, so that a speculative rollback never lands in codes
SMALLEST_CHUNK = 512  # tokens; a later chunk holds a quarter of what is packed already
ALLOCATOR_BYTES = 64  # at most, that an allocator adds to a buffer before it rounds up to whole pages


def tokens_to_seal(newest: int, window: int) -> int:
    """How many of the oldest of `newest` exact tokens (sinks not counted) are packed now: whole blocks, such that
    `window` + LAG tokens stay exact.

    Hence after n tokens without a trim, the packed ones are max(0, n - sinks - window - LAG) // BLOCK * BLOCK.
    """
    return max(0, newest - window - LAG) // BLOCK * BLOCK


def fill_pages(tokens: int, token_bytes: int) -> int:
    """The most tokens of `token_bytes` each that take no more memory pages than `tokens` do: room that a buffer of
    `tokens` would waste."""
    if token_bytes == 0:
        return tokens
    pages = -(-(tokens * token_bytes + ALLOCATOR_BYTES) // mmap.PAGESIZE)
    return (pages * mmap.PAGESIZE - ALLOCATOR_BYTES) // token_bytes


@dataclasses.dataclass
class Chunk:
    """Packed tokens: words uint32 [B, W, capacity], those of keys and then those of values; `tokens` are valid."""

    words: mx.array
    tokens: int

    @property
    def capacity(self) -> int:
        """Tokens it can hold."""
        return int(self.words.shape[-1])


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """The content of a Storage at one moment; later appends do not change it.

    exact_keys, exact_values: [B, H, E, D], `sinks` first tokens and then the newest.  packed: (words of keys and
    values, valid tokens) of each chunk, oldest first.
    """

    exact_keys: mx.array
    exact_values: mx.array
    sinks: int
    packed: tuple[tuple[mx.array, int], ...]
    key_quantizer: Quantizer
    value_quantizer: Quantizer
    keys_twice: bool = False  # keys serve as values too, and what is stored as values is not attended to

    def of_keys(self) -> "Snapshot":
        """The same with the keys in place of the values: what multi-head latent attention reads."""
        return dataclasses.replace(
            self, exact_values=self.exact_keys, value_quantizer=self.key_quantizer, keys_twice=True
        )

    @property
    def packed_tokens(self) -> int:
        """Tokens held as codes."""
        return sum(tokens for _, tokens in self.packed)

    @property
    def length(self) -> int:
        """Tokens in all."""
        return int(self.exact_keys.shape[2]) + self.packed_tokens

    def words(self, start: int, end: int) -> tuple[mx.array, mx.array]:
        """Words [B, W, end - start] of keys and values of packed tokens start..end."""
        parts, first = [], 0
        for held, tokens in self.packed:
            a, b = max(start - first, 0), min(end - first, tokens)
            if a < b:
                parts.append(held[..., a:b])
            first += tokens
        words = parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)
        split = self.key_quantizer.words
        return words[:, :split], words[:, :split] if self.keys_twice else words[:, split:]

    def decoded(self) -> tuple[mx.array, mx.array]:
        """All keys and all values, [B, H, length, D] in the model's dtype, as a lazy graph."""
        dtype, s = self.exact_keys.dtype, self.sinks
        if not self.packed:
            return self.exact_keys, self.exact_values
        key_words, value_words = self.words(0, self.packed_tokens)
        keys = self.key_quantizer.decode_words(key_words, dtype)
        values = self.value_quantizer.decode_words(value_words, self.exact_values.dtype)
        return (
            mx.concatenate([self.exact_keys[:, :, :s], keys, self.exact_keys[:, :, s:]], axis=2),
            mx.concatenate([self.exact_values[:, :, :s], values, self.exact_values[:, :, s:]], axis=2),
        )


class Storage:
    """Keys [B, H, T, Dk] and values [B, H, T, Dv] of one layer, appended at the end, trimmed at the end."""

    def __init__(self, key_quantizer: Quantizer, value_quantizer: Quantizer, window: int, sinks: int) -> None:
        self.key_quantizer, self.value_quantizer = key_quantizer, value_quantizer
        self.window, self.sinks = window, sinks
        self.exact_keys: mx.array | None = None
        self.exact_values: mx.array | None = None
        self.exact_tokens = 0
        self.held_sinks = 0
        self.chunks: list[Chunk] = []
        self.drift = DriftSums()

    @property
    def packed_tokens(self) -> int:
        """Tokens held as codes."""
        return sum(chunk.tokens for chunk in self.chunks)

    @property
    def length(self) -> int:
        """Tokens in all."""
        return self.exact_tokens + self.packed_tokens

    @property
    def arrays(self) -> list[mx.array]:
        """Every array held."""
        exact = [a for a in (self.exact_keys, self.exact_values) if a is not None]
        return exact + [chunk.words for chunk in self.chunks]

    @property
    def nbytes(self) -> int:
        """Sum of the arrays' nbytes, reserved capacity included."""
        return sum(a.nbytes for a in self.arrays)

    def append(self, keys: mx.array, values: mx.array) -> None:
        """Add tokens at the end, exact; call `seal` once nobody needs them exact any more."""
        start, added = self.exact_tokens, keys.shape[2]
        if self.exact_keys is None or self.exact_values is None or start + added > self.exact_keys.shape[2]:
            room = self._room(start + added, keys, values)
            self.exact_keys = _resized(self.exact_keys, start, room, keys)
            self.exact_values = _resized(self.exact_values, start, room, values)
        self.exact_keys = _written(self.exact_keys, start, keys)
        self.exact_values = _written(self.exact_values, start, values)
        self.exact_tokens += added
        if not self.chunks:
            self.held_sinks = min(self.sinks, self.exact_tokens)

    @property
    def due(self) -> int:
        """Tokens that `seal` would pack now."""
        return tokens_to_seal(self.exact_tokens - self.held_sinks, self.window)

    def seal(self) -> None:
        """Pack the oldest exact tokens beyond the window, whole blocks of them."""
        count = self.due
        if count == 0 or self.exact_keys is None or self.exact_values is None:
            return
        s = self.held_sinks
        keys, values = self.exact_keys[:, :, s : s + count], self.exact_values[:, :, s : s + count]
        words = mx.concatenate(
            [self.key_quantizer.encode_words(keys), self.value_quantizer.encode_words(values)], axis=1
        )
        self._add_words(self.drift.watch(words, keys, values, self.key_quantizer, self.value_quantizer))
        room = self._room(self.exact_tokens - count, self.exact_keys, self.exact_values)
        self.exact_keys = _without(self.exact_keys, s, count, self.exact_tokens, room)
        self.exact_values = _without(self.exact_values, s, count, self.exact_tokens, room)
        self.exact_tokens -= count

    def _room(self, tokens: int, keys: mx.array, values: mx.array) -> int:
        """Places for exact tokens: at least `tokens`, and what decoding needs until the next seal."""
        wanted = max(self.sinks + self.window + LAG + BLOCK, tokens)
        widest = max(keys.shape[0] * keys.shape[1] * x.shape[3] * x.dtype.size for x in (keys, values))
        return fill_pages(wanted, widest)

    def _add_words(self, words: mx.array) -> None:
        done, count = 0, words.shape[-1]
        if self.chunks and (free := self.chunks[-1].capacity - self.chunks[-1].tokens):
            last, done = self.chunks[-1], min(free, count)
            last.words = _written(last.words, last.tokens, words[..., :done])
            last.tokens += done
        if done == count:
            return
        wanted = max(SMALLEST_CHUNK, self.packed_tokens // 4, count - done)
        room = fill_pages(wanted, 4 * words.shape[0] * words.shape[1])
        empty = mx.zeros((*words.shape[:-1], room), mx.uint32)
        self.chunks.append(Chunk(_written(empty, 0, words[..., done:]), count - done))

    def trim(self, count: int) -> int:
        """Drop the newest `count` tokens, at most all; return how many went. Codes are cut at any token."""
        count = dropped = min(count, self.length)
        from_window = min(count, self.exact_tokens - self.held_sinks)
        self.exact_tokens -= from_window
        count -= from_window
        while count and self.chunks:
            from_chunk = min(count, self.chunks[-1].tokens)
            self.chunks[-1].tokens -= from_chunk
            count -= from_chunk
            if self.chunks[-1].tokens == 0:
                self.chunks.pop()
        self.exact_tokens -= count
        self.held_sinks = min(self.held_sinks, self.exact_tokens)
        return dropped

    def snapshot(self) -> Snapshot:
        """What is held now. ValueError before the first append."""
        if self.exact_keys is None or self.exact_values is None:
            raise ValueError("the cache is empty; expected keys and values; append some first.")
        exact = [a if a.shape[2] == self.exact_tokens else a[:, :, : self.exact_tokens]
                 for a in (self.exact_keys, self.exact_values)]  # fmt: skip
        packed = tuple((c.words, c.tokens) for c in self.chunks)
        return Snapshot(exact[0], exact[1], self.held_sinks, packed, self.key_quantizer, self.value_quantizer)

    def check(self) -> None:
        """ValueError unless shapes and counts agree: for a storage that was read from a file."""
        if self.exact_keys is None or self.exact_values is None:
            raise ValueError("a stored cache lacks its exact tokens; the file is damaged; make it again.")
        batch, capacity = self.exact_keys.shape[0], min(self.exact_keys.shape[2], self.exact_values.shape[2])
        fits = 0 <= self.held_sinks <= self.exact_tokens <= capacity and self.exact_values.shape[0] == batch
        width = self.key_quantizer.words + self.value_quantizer.words
        for chunk in self.chunks:
            fits &= chunk.words.dtype == mx.uint32 and chunk.words.shape == (batch, width, chunk.capacity)
            fits &= 0 < chunk.tokens <= chunk.capacity
        if not fits:
            raise ValueError("a stored cache's shapes do not fit its codec; the file is damaged; make it again.")

    def copy(self) -> "Storage":
        """An independent twin. Arrays are shared until either writes, and written ones are replaced, never changed."""
        twin = Storage(self.key_quantizer, self.value_quantizer, self.window, self.sinks)
        twin.exact_keys, twin.exact_values = self.exact_keys, self.exact_values
        twin.exact_tokens, twin.held_sinks = self.exact_tokens, self.held_sinks
        twin.drift = dataclasses.replace(self.drift)
        twin.chunks = [dataclasses.replace(chunk) for chunk in self.chunks]
        return twin


def _written(target: mx.array, start: int, update: mx.array) -> mx.array:
    """`target` with `update` at start.. of axis 2, as a new array: snapshots of the old one stay as they were.

    MLX writes in place when nothing else holds the buffer.
    """
    result = mx.array(target)
    result[:, :, start : start + update.shape[2]] = update
    return result


def _resized(held: mx.array | None, tokens: int, room: int, like: mx.array) -> mx.array:
    batch, heads, _, dims = like.shape
    if held is None or tokens == 0:
        return mx.zeros((batch, heads, room, dims), like.dtype)
    extra = mx.zeros((batch, heads, room - tokens, dims), held.dtype)
    return mx.concatenate([held[:, :, :tokens], extra], axis=2)


def _without(held: mx.array, start: int, count: int, tokens: int, room: int) -> mx.array:
    batch, heads, _, dims = held.shape
    free = mx.zeros((batch, heads, room - (tokens - count), dims), held.dtype)
    return mx.concatenate([held[:, :, :start], held[:, :, start + count : tokens], free], axis=2)
