"""What one layer holds: exact first tokens (sinks), packed codes, exact newest tokens (window). Bytes, no meaning.

Token positions 0 .. length - 1 lie as  sinks | packed | window.  Sinks and window share one buffer per keys and values;
packed tokens lie in chunks that are never moved once written.
"""

import dataclasses

import mlx.core as mx

from .spectral.spectral_quant import Quantizer

BLOCK = 64  # tokens that are packed together
LAG = 16  # tokens that a seal stays behind the window, so that a speculative rollback never lands in codes
SMALLEST_CHUNK = 512  # tokens; a later chunk holds a quarter of what is packed already


def tokens_to_seal(newest: int, window: int) -> int:
    """How many of the oldest of `newest` exact tokens (sinks not counted) are packed now: whole blocks, such that
    `window` + LAG tokens stay exact.

    Hence after n tokens without a trim, the packed ones are max(0, n - sinks - window - LAG) // BLOCK * BLOCK.
    """
    return max(0, newest - window - LAG) // BLOCK * BLOCK


@dataclasses.dataclass
class Chunk:
    """Packed tokens: words uint32 [B, W, capacity] of keys and of values; the first `tokens` are valid."""

    keys: mx.array
    values: mx.array
    tokens: int

    @property
    def capacity(self) -> int:
        """Tokens it can hold."""
        return int(self.keys.shape[-1])


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """The content of a Storage at one moment; later appends do not change it.

    exact_keys, exact_values: [B, H, E, D], `sinks` first tokens and then the newest.  packed: (key words, value words,
    valid tokens) of each chunk, oldest first.
    """

    exact_keys: mx.array
    exact_values: mx.array
    sinks: int
    packed: tuple[tuple[mx.array, mx.array, int], ...]
    key_quantizer: Quantizer
    value_quantizer: Quantizer

    @property
    def packed_tokens(self) -> int:
        """Tokens held as codes."""
        return sum(tokens for _, _, tokens in self.packed)

    @property
    def length(self) -> int:
        """Tokens in all."""
        return int(self.exact_keys.shape[2]) + self.packed_tokens

    def words(self, start: int, end: int) -> tuple[mx.array, mx.array]:
        """Words [B, W, end - start] of keys and values of packed tokens start..end."""
        keys, values, first = [], [], 0
        for k, v, tokens in self.packed:
            a, b = max(start - first, 0), min(end - first, tokens)
            if a < b:
                keys.append(k[..., a:b])
                values.append(v[..., a:b])
            first += tokens
        return (keys[0], values[0]) if len(keys) == 1 else (mx.concatenate(keys, -1), mx.concatenate(values, -1))

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
        return exact + [a for chunk in self.chunks for a in (chunk.keys, chunk.values)]

    @property
    def nbytes(self) -> int:
        """Sum of the arrays' nbytes, reserved capacity included."""
        return sum(a.nbytes for a in self.arrays)

    def append(self, keys: mx.array, values: mx.array) -> None:
        """Add tokens at the end, exact; call `seal` once nobody needs them exact any more."""
        start, added = self.exact_tokens, keys.shape[2]
        if self.exact_keys is None or self.exact_values is None or start + added > self.exact_keys.shape[2]:
            room = max(self.sinks + self.window + LAG + BLOCK, start + added)
            self.exact_keys = _resized(self.exact_keys, start, room, keys)
            self.exact_values = _resized(self.exact_values, start, room, values)
        self.exact_keys = _written(self.exact_keys, start, keys, axis=2)
        self.exact_values = _written(self.exact_values, start, values, axis=2)
        self.exact_tokens += added
        if not self.chunks:
            self.held_sinks = min(self.sinks, self.exact_tokens)

    def seal(self) -> None:
        """Pack the oldest exact tokens beyond the window, whole blocks of them."""
        count = tokens_to_seal(self.exact_tokens - self.held_sinks, self.window)
        if count == 0 or self.exact_keys is None or self.exact_values is None:
            return
        s = self.held_sinks
        key_words = self.key_quantizer.encode_words(self.exact_keys[:, :, s : s + count])
        value_words = self.value_quantizer.encode_words(self.exact_values[:, :, s : s + count])
        self._add_words(key_words, value_words)
        room = max(self.sinks + self.window + LAG + BLOCK, self.exact_tokens - count)
        self.exact_keys = _without(self.exact_keys, s, count, self.exact_tokens, room)
        self.exact_values = _without(self.exact_values, s, count, self.exact_tokens, room)
        self.exact_tokens -= count

    def _add_words(self, keys: mx.array, values: mx.array) -> None:
        done, count = 0, keys.shape[-1]
        if self.chunks and (free := self.chunks[-1].capacity - self.chunks[-1].tokens):
            last, done = self.chunks[-1], min(free, count)
            last.keys = _written(last.keys, last.tokens, keys[..., :done], axis=2)
            last.values = _written(last.values, last.tokens, values[..., :done], axis=2)
            last.tokens += done
        if done == count:
            return
        room = max(SMALLEST_CHUNK, self.packed_tokens // 4 // BLOCK * BLOCK, count - done)
        rest_keys, rest_values = keys[..., done:], values[..., done:]
        empty = [mx.zeros((*w.shape[:-1], room), mx.uint32) for w in (keys, values)]
        self.chunks.append(
            Chunk(_written(empty[0], 0, rest_keys, axis=2), _written(empty[1], 0, rest_values, axis=2), count - done)
        )

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
        packed = tuple((c.keys, c.values, c.tokens) for c in self.chunks)
        return Snapshot(exact[0], exact[1], self.held_sinks, packed, self.key_quantizer, self.value_quantizer)

    def check(self) -> None:
        """ValueError unless shapes and counts agree: for a storage that was read from a file."""
        if self.exact_keys is None or self.exact_values is None:
            raise ValueError("a stored cache lacks its exact tokens; the file is damaged; make it again.")
        batch, capacity = self.exact_keys.shape[0], min(self.exact_keys.shape[2], self.exact_values.shape[2])
        fits = 0 <= self.held_sinks <= self.exact_tokens <= capacity and self.exact_values.shape[0] == batch
        for chunk in self.chunks:
            for words, quantizer in ((chunk.keys, self.key_quantizer), (chunk.values, self.value_quantizer)):
                fits &= words.dtype == mx.uint32 and words.shape == (batch, quantizer.words, chunk.capacity)
            fits &= 0 < chunk.tokens <= chunk.capacity
        if not fits:
            raise ValueError("a stored cache's shapes do not fit its codec; the file is damaged; make it again.")

    def copy(self) -> "Storage":
        """An independent twin. Arrays are shared until either writes, and written ones are replaced, never changed."""
        twin = Storage(self.key_quantizer, self.value_quantizer, self.window, self.sinks)
        twin.exact_keys, twin.exact_values = self.exact_keys, self.exact_values
        twin.exact_tokens, twin.held_sinks = self.exact_tokens, self.held_sinks
        twin.chunks = [dataclasses.replace(chunk) for chunk in self.chunks]
        return twin


def _written(target: mx.array, start: int, update: mx.array, axis: int) -> mx.array:
    """`target` with `update` at start.. of axis 2, as a new array: snapshots of the old one stay as they were.

    MLX writes in place when nothing else holds the buffer.
    """
    result = mx.array(target)
    result[:, :, start : start + update.shape[axis]] = update
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
