"""What one layer holds: exact first tokens (sinks), packed codes, exact newest tokens (window). Bytes, no meaning.

Token positions 0 .. length - 1 lie as  sinks | packed | window.  Sinks and window share one buffer per keys and values;
packed tokens lie in chunks that are hardly ever moved once written.
"""

import dataclasses
import mmap
from collections.abc import Callable, Hashable
from typing import Any, TypeVar, cast

import mlx.core as mx

from .chunks import MAX_CHUNKS, Chunk, Chunks, Packed, fill_pages, words_between, written
from .drift import DriftSums
from .kernels import backend
from .kernels.launches import ChunkSizes, Codes, codes, decodes, ints, kept_by_thread, restore
from .rows import Rows, rows_of
from .spectral.sealing import BLOCK, LAG, packed_of, tokens_to_seal
from .spectral.spectral_quant import Quantizer, RawQuantizer
from .trust import encode_words, trusted_arrays, trusted_codes

T = TypeVar("T")


def most_bytes(
    tokens: int, window: int, sinks: int, heads: int, dims: tuple[int, int], itemsize: int, words: int
) -> int:
    """The most that `nbytes` of a Storage of one sequence is up to `tokens` tokens, when it was told to expect as many.

    dims: of a key and of a value.  itemsize: of their numbers.  words: of the codes of a token's keys and values.
    """
    exact = exact_room(0, window, sinks, heads * max(dims) * itemsize)
    held = exact * heads * sum(dims) * itemsize
    if packed := packed_of(tokens, window, sinks):
        held += 4 * words * packed + mmap.PAGESIZE  # chunks fill their pages, and only the last is not full of tokens
    return held


def exact_room(tokens: int, window: int, sinks: int, token_bytes: int) -> int:
    """Places for exact tokens of at most `token_bytes`: for `tokens`, and what decoding needs until the next seal."""
    return fill_pages(max(sinks + window + LAG + BLOCK, tokens), token_bytes)


@dataclasses.dataclass(eq=False)
class Snapshot:
    """The content of a Storage at one moment; later appends do not change it.

    exact_keys, exact_values: [B, H, C, D], the whole buffers; `layout` says which columns are whose.
    packed: words of keys and then values in at most MAX_CHUNKS chunks.
    """

    exact_keys: mx.array
    exact_values: mx.array
    packed: Packed
    layout: Rows
    key_quantizer: Quantizer
    value_quantizer: Quantizer
    keys_twice: bool = False  # keys serve as values too, and what is stored as values is not attended to
    _kept: dict[Hashable, Any] | None = dataclasses.field(default=None, init=False, repr=False)

    def of_keys(self) -> "Snapshot":
        """The same with the keys in place of the values: what multi-head latent attention reads."""
        return dataclasses.replace(
            self, exact_values=self.exact_keys, value_quantizer=self.key_quantizer, keys_twice=True
        )

    @property
    def rows(self) -> mx.array:
        """int32 [B, 4]: held_sinks, window_start, window_end, packed_tokens of each row."""
        return self.layout.array

    @property
    def packed_tokens(self) -> int:
        """Columns of packed tokens: those of the row that holds the most."""
        return self.packed.tokens

    @property
    def length(self) -> int:
        """Tokens of the longest row, T."""
        return self.layout.length

    def words(self, start: int, end: int) -> tuple[mx.array, mx.array]:
        """Words [B, W, end - start] of keys and values of packed tokens start..end."""
        words, split = words_between(self.packed, start, end), self.key_quantizer.words
        return words[:, :split], words[:, :split] if self.keys_twice else words[:, split:]

    def decoded(self, first: tuple[int, ...] | None = None, total: int | None = None) -> tuple[mx.array, mx.array]:
        """All keys and all values, [B, H, T, D] in the model's dtype and the order of the sequence, as a lazy graph.

        Token j of row b is in column j, or in first[b] + j of `total`; the columns of no token hold any numbers.
        """
        layout = self.layout
        first = first or (0,) * len(layout.lengths)
        total = layout.length if total is None else total
        if self.packed and self.restores:
            own, chunks = self.codes
            columns = -(-total // BLOCK) * BLOCK  # or it would be traced anew at every step
            traced = _restoring(self.place, chunks, columns)
            keys, values = traced(layout.flat, ints(first), self.exact_keys, self.exact_values, *own)
            return keys[:, :, :total], values[:, :, :total]
        order = None if layout.alike and not any(first) and total == layout.length else layout.order(first, total)
        middle: tuple[mx.array | None, mx.array | None] = self._decoded_codes() if self.packed else (None, None)
        return layout.in_order(self.exact_keys, middle[0], order), layout.in_order(self.exact_values, middle[1], order)

    def once(self, what: Hashable, make: Callable[[], T]) -> T:
        """What `make` gives, made once for these codes, kinds of exact numbers and the default device."""
        if self._kept is None:
            dtypes = self.exact_keys.dtype, self.exact_values.dtype
            self._kept = self.packed.kept(mx.default_device() == mx.gpu, self.keys_twice, dtypes)
        if what not in self._kept:
            self._kept[what] = make()
        return cast(T, self._kept[what])

    @property
    def place(self) -> str:
        """The back-end whose kernels read these codes, chosen when they are first read; "ops" for none."""
        return self.once("place", self._place)

    def _place(self) -> str:
        place = backend()
        # The kernels' tables place values' words behind the keys'.
        readable = place != "ops" and not self.keys_twice and decodes(self.key_quantizer, self.value_quantizer)
        return place if readable and self.exact_keys.dtype == self.exact_values.dtype else "ops"

    @property
    def restores(self) -> bool:
        """Whether kernels that were seen to be right turn the codes back."""
        return self.once("restores", self._restores)

    def _restores(self) -> bool:
        keys, values, place = self.exact_keys, self.exact_values, self.place
        dims = keys.shape[3], values.shape[3]
        return place != "ops" and trusted_codes(place) and trusted_arrays(place, *dims, keys.dtype)

    @property
    def codes(self) -> tuple[Codes, ChunkSizes]:
        """What the kernels read."""
        return self.once("codes", lambda: codes(self))

    def _decoded_codes(self) -> tuple[mx.array, mx.array]:
        words = self.words(0, self.packed_tokens)
        return (
            self.key_quantizer.decode_words(words[0], self.exact_keys.dtype),
            self.value_quantizer.decode_words(words[1], self.exact_values.dtype),
        )


@kept_by_thread(16)
def _restoring(place: str, chunks: ChunkSizes, columns: int) -> Callable[..., tuple[mx.array, mx.array]]:
    """`Snapshot.decoded` by the kernels, traced once for all layers of a few steps."""

    def restored(
        held: mx.array, first: mx.array, keys: mx.array, values: mx.array, *own: Any
    ) -> tuple[mx.array, mx.array]:
        return restore(Codes(*own), chunks, held, keys, values, first, columns, place)

    traced: Callable[..., tuple[mx.array, mx.array]] = mx.compile(restored)
    return traced


def write_both(
    start: int, held_keys: mx.array, held_values: mx.array, keys: mx.array, values: mx.array
) -> tuple[mx.array, mx.array]:
    """`written` for keys and values. What decoding appends is traced once for all layers of a step; of prompts, whose
    lengths differ, traces would pile up."""
    if keys.shape[2] > LAG:
        return written(held_keys, start, keys), written(held_values, start, values)
    return _writing(start)(held_keys, held_values, keys, values)


@kept_by_thread(256)  # more than the places between one seal and the next, at which every cycle comes by again
def _writing(start: int) -> Callable[..., tuple[mx.array, mx.array]]:
    def both(held_keys: mx.array, held_values: mx.array, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return written(held_keys, start, keys), written(held_values, start, values)

    traced: Callable[..., tuple[mx.array, mx.array]] = mx.compile(both)
    return traced


@kept_by_thread(16)
def _dropping(start: int, count: int, tokens: int, room: int) -> Callable[..., tuple[mx.array, mx.array]]:
    """Exact keys and values, `tokens` of them, without `count` from `start` on, in `room` columns; traced once for all
    layers."""

    def both(keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        return _without(keys, start, count, tokens, room), _without(values, start, count, tokens, room)

    traced: Callable[..., tuple[mx.array, mx.array]] = mx.compile(both)
    return traced


class Storage:
    """Keys [B, H, T, Dk] and values [B, H, T, Dv] of one layer, appended at the end, trimmed at the end.

    context: tokens to expect; no more is reserved than they take, and 0 is not known.
    """

    def __init__(
        self, key_quantizer: Quantizer, value_quantizer: Quantizer, window: int, sinks: int, context: int = 0
    ) -> None:
        self.key_quantizer, self.value_quantizer = key_quantizer, value_quantizer
        self.window, self.sinks = window, sinks
        self.exact_keys: mx.array | None = None
        self.exact_values: mx.array | None = None
        self.exact_tokens = 0
        self.held_sinks = 0
        self.codes = Chunks(expected=packed_of(context, window, sinks))
        self.drift = DriftSums()

    @property
    def chunks(self) -> list[Chunk]:
        """The codes, oldest first."""
        return self.codes.held

    @property
    def packed_tokens(self) -> int:
        """Tokens held as codes."""
        return self.codes.tokens

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
        self.exact_keys, self.exact_values = write_both(start, self.exact_keys, self.exact_values, keys, values)
        self.exact_tokens += added
        if not self.chunks:
            self.held_sinks = min(self.sinks, self.exact_tokens)

    @property
    def due(self) -> int:
        """Tokens that `seal` would pack now."""
        return tokens_to_seal(self.exact_tokens - self.held_sinks, self.window)

    def seal(self, encode: Callable[[Quantizer, mx.array], mx.array] = encode_words) -> None:
        """Pack the oldest exact tokens beyond the window, whole blocks of them; `encode` turns vectors into words."""
        count = self.due
        if count == 0 or self.exact_keys is None or self.exact_values is None:
            return
        s = self.held_sinks
        keys, values = self.exact_keys[:, :, s : s + count], self.exact_values[:, :, s : s + count]
        words = mx.concatenate([encode(self.key_quantizer, keys), encode(self.value_quantizer, values)], axis=1)
        self.codes.append(self.drift.watch(words, keys, values, self.key_quantizer, self.value_quantizer))
        room = self._room(self.exact_tokens - count, self.exact_keys, self.exact_values)
        dropped = _dropping(s, count, self.exact_tokens, room)
        self.exact_keys, self.exact_values = dropped(self.exact_keys, self.exact_values)
        self.exact_tokens -= count

    def _room(self, tokens: int, keys: mx.array, values: mx.array) -> int:
        widest = max(keys.shape[0] * keys.shape[1] * x.shape[3] * x.dtype.size for x in (keys, values))
        return exact_room(tokens, self.window, self.sinks, widest)

    def trim(self, count: int) -> int:
        """Drop the newest `count` tokens, at most all; return how many went. Codes are cut at any token."""
        count = dropped = min(count, self.length)
        from_window = min(count, self.exact_tokens - self.held_sinks)
        self.exact_tokens -= from_window
        count -= from_window
        from_codes = min(count, self.packed_tokens)
        self.codes.cut(self.packed_tokens - from_codes)
        count -= from_codes
        self.exact_tokens -= count
        self.held_sinks = min(self.held_sinks, self.exact_tokens)
        return dropped

    def snapshot(self) -> Snapshot:
        """What is held now. ValueError before the first append."""
        if self.exact_keys is None or self.exact_values is None:
            raise ValueError("the cache is empty; expected keys and values; append some first.")
        return Snapshot(
            self.exact_keys, self.exact_values, self.codes.packed, self.layout, self.key_quantizer, self.value_quantizer
        )

    @property
    def layout(self) -> Rows:
        """Where the tokens lie; the same for every row."""
        batch = 0 if self.exact_keys is None else self.exact_keys.shape[0]
        sinks, packed = (self.held_sinks,) * batch, (self.codes.packed.tokens,) * batch
        return rows_of(sinks, sinks, self.exact_tokens, packed)

    def check(self) -> None:
        """ValueError unless shapes and counts agree: for a storage that was read from a file."""
        if self.exact_keys is None or self.exact_values is None:
            raise ValueError("a stored cache lacks its exact tokens; the file is damaged; make it again.")
        batch, capacity = self.exact_keys.shape[0], self.exact_keys.shape[2]
        fits = 0 <= self.held_sinks <= self.exact_tokens <= capacity
        fits &= self.exact_values.shape[::2] == (batch, capacity) and len(self.chunks) <= MAX_CHUNKS
        width = self.key_quantizer.words + self.value_quantizer.words
        fits &= self.held_sinks == self.sinks or not self.chunks
        fits &= self.codes.fit(batch, width)
        # The room that a cache reserves: whoever asks for a wider window than the file has room for asks for memory.
        fits &= min(self.window, self.sinks) >= 0 and self.sinks + self.window + LAG + BLOCK <= capacity
        fits &= holds_vectors(self.exact_keys, self.exact_values, self.key_quantizer, self.value_quantizer)
        if not fits:
            raise ValueError("a stored cache's shapes do not fit its codec; the file is damaged; make it again.")

    def copy(self) -> "Storage":
        """An independent twin. Arrays are shared until either writes, and written ones are replaced, never changed."""
        twin = Storage(self.key_quantizer, self.value_quantizer, self.window, self.sinks)
        twin.exact_keys, twin.exact_values = self.exact_keys, self.exact_values
        twin.exact_tokens, twin.held_sinks = self.exact_tokens, self.held_sinks
        twin.drift = dataclasses.replace(self.drift)
        twin.codes = self.codes.copy()
        return twin


def holds_vectors(keys: mx.array, values: mx.array, key_quantizer: Quantizer, value_quantizer: Quantizer) -> bool:
    """Whether exact buffers that were read from a file are [B, H, C, D] of one kind of numbers, finite unless they are
    raw bits."""
    if keys.dtype != values.dtype or not mx.issubdtype(keys.dtype, mx.floating) or keys.shape[1] != values.shape[1]:
        return False
    raw = isinstance(key_quantizer, RawQuantizer), isinstance(value_quantizer, RawQuantizer)
    return all(r or bool(mx.isfinite(x).all().item()) for r, x in zip(raw, (keys, values), strict=True))


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
