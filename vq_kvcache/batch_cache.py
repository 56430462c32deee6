"""BatchSpectralKVCache: mlx-lm's protocol for the caches of several sequences, over a BatchStorage.

Outside, columns are those of mlx-lm's BatchKVCache: token j of row b is in column left_padding[b] + j of what
update_and_fetch returns and of masks, so that one mask serves layers of either class. Inside, padding is never stored.
"""

import functools
import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import BatchKVCache

from .attention import Mask, keep_pace
from .batch_storage import BatchStorage
from .cache import MOST_TOKENS, Planned, SpectralKVCache, View
from .chunks import Chunk, Chunks
from .drift import warn_once
from .spectral.codec import Plan
from .spectral.sealing import BLOCK, LAG
from .storage import Snapshot

Counts = tuple[int, ...]
MOST_PADDING = 1 << 16  # columns that a file may have beyond its longest row: some row has little padding


class RowMask(mx.array):
    """A causal mask in mlx-lm's columns that also knows itself in the rows' own positions, as `attend` wants it.

    key: left padding, columns and the rows' lengths, which the cache it is used for must have.
    """

    def __init__(self, array: mx.array, key: tuple[Counts, int, Counts], of_rows: Callable[[], Mask]) -> None:
        super().__init__(array)
        self.key, self._of_rows = key, of_rows

    @functools.cached_property
    def of_rows(self) -> Mask:
        """None, "causal" or bool [B, 1, N, T]; made once for all layers."""
        return self._of_rows()


class _BatchView(View):
    """Source of the handles of one append to a batch."""

    def __init__(self, snapshot: Snapshot, left_padding: Counts, columns: int) -> None:
        super().__init__(snapshot)
        self.left_padding, self.columns = left_padding, columns

    def decoded(self) -> tuple[mx.array, mx.array]:
        return self.snapshot.decoded(self.left_padding, self.columns)

    def of_rows(self, mask: Mask) -> Mask:
        """A mask over mlx-lm's columns, as one over the positions of each row's tokens."""
        layout = self.snapshot.layout
        if isinstance(mask, RowMask) and mask.key == (self.left_padding, self.columns, layout.lengths):
            return mask.of_rows
        if not isinstance(mask, mx.array) or mask.shape[-1] == 1:
            return mask
        if not any(self.left_padding) and self.columns == layout.length:
            return mask
        wide = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
        first = mx.array(self.left_padding, mx.int32)[:, None, None, None]
        columns = mx.clip(first + mx.arange(layout.length), 0, self.columns - 1)
        return mx.take_along_axis(mx.broadcast_to(wide, (len(first), *wide.shape[1:])), columns, axis=-1)


class BatchSpectralKVCache(Planned, BatchKVCache):  # type: ignore[misc]  # mlx-lm is untyped
    """Keys and values of one layer for several sequences: of each, first and newest tokens exact, the rest packed.

    Made by `SpectralKVCache.merge`, or empty from the padding that the first tokens will have on the left. Subclasses
    mlx-lm's BatchKVCache for its isinstance checks, overrides every public member and inherits none.
    """

    step = BLOCK

    def __init__(
        self, left_padding: Iterable[int], plan: Plan | None = None, layer: int = 0, window: int = 128, sinks: int = 4
    ) -> None:
        self._set_plan(plan, layer, window, sinks)
        self._left_padding: Counts = tuple(int(n) for n in left_padding)
        self._columns = 0
        self._right_padding: Counts | None = None
        self._ahead: Counts | None = None  # real tokens that each row still gets, where pads follow them
        self._storage: BatchStorage | None = None

    # -- what a model calls

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append keys [B, H, L, Dk] and values [B, H, L, Dv]; return handles on all of them. ValueError for another B.

        Columns that the left padding, or `prepare`, says to be pads are not kept.
        """
        added = keys.shape[2]
        if added > LAG:
            keep_pace(keys, values)
        storage = self._storage_for(keys, values)
        skipped, real = self._real(added)
        storage.append(keys, values, skipped, real)
        self._columns += added
        if self._ahead is not None:
            self._ahead = tuple(max(n - added, 0) for n in self._ahead)
        # Within a prompt chunk, queries see the chunk itself exact; single tokens are packed two blocks at a time, so
        # that one seal in 64 steps serves all rows.
        few, due = added <= LAG, storage.due
        if due >= (2 * BLOCK if few else 1):  # and not in every step: what is read may have to be waited for
            warn_once(storage.drift, self._plan_name)
            if few:
                storage.seal()
        snapshot = storage.snapshot()
        if not few and not self._pads_are_held:
            storage.seal()
        return self._handles(snapshot, self.bare_handles is True and added == 1)

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """Handles on everything held, without appending."""
        return self._handles(self._buffers().snapshot())

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None, **options: Any) -> mx.array:
        """As mlx-lm's BatchKVCache: bool [B, 1, N, columns] for the N columns that come next."""
        padding = mx.array(self._left_padding, mx.int32)
        mask: mx.array = create_causal_mask(N, self._columns, window_size=window_size, left_padding=padding, **options)
        if options:
            return mask
        skipped, real = self._real(N)
        lengths = tuple(a + b for a, b in zip(self._lengths, real, strict=True))
        of_rows = functools.partial(_causal_of_rows, N, self._lengths, skipped, real, window_size)
        return RowMask(mask, (self._left_padding, self._columns + N, lengths), of_rows)

    @property
    def offset(self) -> mx.array:
        """Tokens of each row, int32 [B]; less than 0 while padding on the left is still to come. Never changed in
        place."""
        if self._storage is not None and self._columns >= max(self._left_padding):
            return self._storage.layout.tokens.__copy__()  # the memory of one array for all layers
        coming = (min(self._columns - padding, 0) for padding in self._left_padding)
        return mx.array([a + b for a, b in zip(self._lengths, coming, strict=True)], mx.int32)

    @property
    def left_padding(self) -> mx.array:
        """Columns before the first token of each row, int32 [B]."""
        return mx.array(self._left_padding, mx.int32)

    def size(self) -> int:
        """Columns, padding included."""
        return self._columns

    def empty(self) -> bool:
        """True before the first append."""
        return self._storage is None

    def is_trimmable(self) -> bool:
        """True: codes are cut at any token."""
        return True

    def trim(self, n: int) -> int:
        """Drop the newest n tokens of every row, at most all it has; return how many columns went."""
        n = min(n, self._columns)
        if self._storage is not None:
            self._storage.trim(n)
        self._columns -= n
        self._left_padding = tuple(min(padding, self._columns) for padding in self._left_padding)
        return n

    @property
    def nbytes(self) -> int:
        """Sum of the held arrays' nbytes; the codec is shared by all caches of a model."""
        return 0 if self._storage is None else self._storage.nbytes

    @property
    def to_quantized(self) -> Any:
        """Hidden, as in SpectralKVCache."""
        raise AttributeError("a BatchSpectralKVCache is quantized already; expected no --kv-bits; use --kv-avg-bits.")

    # -- what a batch of prompts calls

    def prepare(self, *, left_padding: Any = None, lengths: Any = None, right_padding: Any = None) -> None:
        """Say which of the coming columns are pads: so many first ones of each row, or all behind `lengths`, which
        `finalize` then drops. ValueError for left padding of a cache that holds tokens."""
        if left_padding is not None:
            if self._storage is not None:
                raise ValueError("the cache holds tokens; expected an empty one; left padding comes before them.")
            self._left_padding = tuple(a + int(b) for a, b in zip(self._left_padding, left_padding, strict=True))
        if right_padding is not None and max(right_padding) > 0:
            self._right_padding = tuple(int(n) for n in right_padding)
            self._ahead = None if lengths is None else tuple(int(n) for n in lengths)

    def finalize(self) -> None:
        """Turn the padding on the right into padding on the left."""
        if self._right_padding is None:
            return
        if self._pads_are_held and self._storage is not None:
            self._storage.drop(self._right_padding)
            self._storage.seal()
        self._left_padding = tuple(a + b for a, b in zip(self._left_padding, self._right_padding, strict=True))
        self._right_padding = self._ahead = None

    def filter(self, batch_indices: Iterable[int]) -> None:
        """Keep the rows of these indices, in this order, and no column that is padding in all of them."""
        rows = [int(row) for row in batch_indices]
        self._left_padding = tuple(self._left_padding[row] for row in rows)
        self._right_padding, self._ahead = (
            None if counts is None else tuple(counts[row] for row in rows)
            for counts in (self._right_padding, self._ahead)
        )
        if not rows:
            self._storage, self._columns = None, 0
        if self._storage is not None:
            self._storage.filter(rows)
            self._drop_common_padding()

    def extend(self, other: "BatchSpectralKVCache") -> None:
        """Add the rows of another batch behind the own ones. CodecError for one that is packed otherwise."""
        self._require_same(other)
        columns, caches = max(self._columns, other._columns), (self, other)
        template = self._storage or other._storage
        if template is not None:
            held = [cache._storage or template.empty_rows(len(cache._left_padding)) for cache in caches]
            self._storage = BatchStorage.joined(held)
        self._left_padding = tuple(
            padding + columns - cache._columns for cache in caches for padding in cache._left_padding
        )
        self._columns = columns

    def extract(self, idx: int) -> SpectralKVCache:
        """A SpectralKVCache of one row, with arrays of its own."""
        cache = SpectralKVCache.__new__(SpectralKVCache)
        cache._take_plan(self)
        cache._storage = None
        if self._storage is not None and self._lengths[idx]:
            cache._storage = self._storage.extract(idx)
            mx.async_eval(*cache._storage.arrays)  # type: ignore[no-untyped-call]  # else they keep the batch's buffers
        return cache

    @classmethod
    def merge(cls, caches: Sequence[SpectralKVCache]) -> "BatchSpectralKVCache":
        """A batch of the sequences of these caches; empty ones are empty rows. mlx-lm's KVCaches are packed first.
        CodecError unless all are packed alike."""
        like = next(cache for cache in caches if isinstance(cache, SpectralKVCache))
        own = [c if isinstance(c, SpectralKVCache) else SpectralKVCache.from_cache(c, like) for c in caches]
        for cache in own:
            like._require_same(cache)
        lengths = [cache.offset for cache in own]
        batch = cls.__new__(cls)
        batch._take_plan(like)
        batch._columns = max(lengths)
        batch._left_padding = tuple(batch._columns - length for length in lengths)
        batch._right_padding = batch._ahead = batch._storage = None
        held = [BatchStorage.of(c._storage) if c._storage is not None and c.offset else None for c in own]
        template = next((storage for storage in held if storage is not None), None)
        if template is not None:
            batch._storage = BatchStorage.joined([storage or template.empty_rows(1) for storage in held])
        return batch

    # -- inside

    @property
    def _lengths(self) -> Counts:
        """Tokens of each row."""
        return (0,) * len(self._left_padding) if self._storage is None else self._storage.layout.lengths

    @property
    def _pads_are_held(self) -> bool:
        """Whether pads on the right were announced without saying where they begin: `finalize` drops them."""
        return self._right_padding is not None and self._ahead is None

    def _real(self, added: int) -> tuple[Counts, Counts]:
        """Of the next `added` columns, how many each row skips and how many it takes after these."""
        rows = len(self._left_padding)
        if self._ahead is None and self._columns >= max(self._left_padding):
            return (0,) * rows, (added,) * rows
        skipped = tuple(min(max(padding - self._columns, 0), added) for padding in self._left_padding)
        ends = self._ahead or (added,) * rows
        return skipped, tuple(max(min(end, added) - skip, 0) for end, skip in zip(ends, skipped, strict=True))

    def _drop_common_padding(self) -> None:
        common = min(*self._left_padding, self._columns)
        self._columns -= common
        self._left_padding = tuple(padding - common for padding in self._left_padding)

    def _handles(self, snapshot: Snapshot, bare: bool = False) -> tuple[mx.array, mx.array]:
        view = _BatchView(snapshot, self._left_padding, self._columns)
        padded = not snapshot.layout.alike or any(self._left_padding)
        if snapshot.length == 0 or not (snapshot.packed or padded):
            return view.decoded()
        return view.handles(bare)

    def _storage_for(self, keys: mx.array, values: mx.array) -> BatchStorage:
        if keys.shape[0] != len(self._left_padding):
            raise ValueError(
                f"keys of {keys.shape[0]} rows were given; expected {len(self._left_padding)}, the rows of the batch."
            )
        if self._storage is None:
            quantizers = self._quantizers(keys, values)
            self._storage = BatchStorage(*quantizers, self._window, self._sinks, keys, values)
        return self._storage

    def _describe(self) -> str:
        storage = self._storage
        held = {} if storage is None else {
            "held_sinks": storage.held_sinks, "window_start": storage.window_start, "window_end": storage.window_end,
            "packed_tokens": storage.packed_tokens, "chunks": [chunk.tokens for chunk in storage.codes.held],
        }  # fmt: skip
        padding = {"left_padding": self._left_padding, "columns": self._columns}
        return json.dumps({"format": 1, **self._settings, **padding, **held})

    def _read_held(self, fields: dict[str, Any]) -> dict[str, Any]:
        names = ("held_sinks", "window_start", "packed_tokens", "chunks")
        self._left_padding = tuple(int(n) for n in fields["left_padding"])
        self._columns = int(fields["columns"])
        if not all(0 <= n < 1 << 31 for n in (*self._left_padding, self._columns)) or not self._left_padding:
            raise ValueError("padding or columns that cannot be")
        self._right_padding = self._ahead = None
        if "chunks" not in fields:
            return {}
        held: dict[str, Any] = {name: tuple(int(n) for n in fields[name]) for name in names}
        return {**held, "window_end": int(fields["window_end"])}

    def _restore(self, held: dict[str, Any], arrays: list[mx.array]) -> None:
        self._storage = None
        if not held:
            if max(self._columns, len(self._left_padding)) > MOST_TOKENS:
                raise ValueError("a stored cache holds padding alone; the file is damaged; make it again.")
            return
        tokens = held.pop("chunks")
        self._require_arrays(arrays, 2 + len(tokens))
        quantizers = self._quantizers(arrays[0], arrays[1])
        storage = BatchStorage(*quantizers, self._window, self._sinks, arrays[0], arrays[1])
        storage.exact_keys, storage.exact_values = arrays[:2]
        storage.codes = Chunks([Chunk(words, n) for words, n in zip(arrays[2:], tokens, strict=True)])
        vars(storage).update(held)
        storage.check()
        lengths = zip(storage.layout.lengths, self._left_padding, strict=False)
        wide = self._columns > max(storage.layout.lengths) + MOST_PADDING
        if wide or len(self._left_padding) != storage.batch or any(a + b > self._columns for a, b in lengths if a):
            raise ValueError("a stored cache's padding does not fit its tokens; the file is damaged; make it again.")
        self._storage = storage


def _causal_of_rows(added: int, lengths: Counts, skipped: Counts, real: Counts, window_size: int | None) -> Mask:
    """The mask of `added` columns for the rows' own positions, after rows of these lengths took `real` of them. Pads
    see some token, so that no number of theirs is NaN."""
    total = tuple(a + b for a, b in zip(lengths, real, strict=True))
    longest = max(total)
    if window_size is None or window_size >= longest:
        if added == 1:
            return None
        if set(real) == {added}:
            return "causal"
    before, skips, ends = (mx.array(n, mx.int32)[:, None, None, None] for n in (lengths, skipped, total))
    position = mx.clip(before + mx.arange(added)[:, None] - skips, 0, mx.maximum(ends - 1, 0))
    token = mx.arange(longest)
    mask = token <= position
    return mask if window_size is None else mask & (token > position - window_size)
