"""Where the tokens of each row of a batch lie: counts as Python numbers, and as arrays that are made once per state."""

import dataclasses
import functools

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray


@dataclasses.dataclass(frozen=True)
class Rows:
    """The content of B rows. Row b holds, in the order of its sequence:

    columns 0 .. held_sinks[b] - 1 of the exact buffers, packed tokens 0 .. packed_tokens[b] - 1, and columns
    window_start[b] .. window_end - 1 of the exact buffers.
    """

    held_sinks: tuple[int, ...]
    window_start: tuple[int, ...]
    window_end: int
    packed_tokens: tuple[int, ...]

    @functools.cached_property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each row."""
        columns = zip(self.held_sinks, self.window_start, self.packed_tokens, strict=True)
        return tuple(sinks + packed + self.window_end - start for sinks, start, packed in columns)

    @functools.cached_property
    def length(self) -> int:
        """Tokens of the longest row, T."""
        return max(self.lengths, default=0)

    @functools.cached_property
    def most_exact(self) -> int:
        """Exact tokens of the row that holds the most of them."""
        columns = zip(self.held_sinks, self.window_start, strict=True)
        return max((sinks + self.window_end - start for sinks, start in columns), default=0)

    @functools.cached_property
    def alike(self) -> bool:
        """Whether all rows have the same counts, so that slices serve all of them."""
        return all(len(set(counts)) < 2 for counts in (self.held_sinks, self.window_start, self.packed_tokens))

    @functools.cached_property
    def array(self) -> mx.array:
        """int32 [B, 4]: held_sinks, window_start, window_end, packed_tokens. Numbers, not an operation that waits to be
        run: an equal state of another thread, with a stream of its own, shares them."""
        return mx.array(self._counts)

    @functools.cached_property
    def flat(self) -> mx.array:
        """The same, int32 [4 B], as kernels read it."""
        return mx.array(self._counts.reshape(-1))

    @property
    def _counts(self) -> NDArray[np.int32]:
        ends = (self.window_end,) * len(self.held_sinks)
        counts = zip(self.held_sinks, self.window_start, ends, self.packed_tokens, strict=True)
        return np.array(list(counts), np.int32).reshape(-1, 4)

    @functools.cached_property
    def tokens(self) -> mx.array:
        """The lengths, int32 [B]."""
        return mx.array(self.lengths, mx.int32)

    def column(self, index: int) -> mx.array:
        """One of the four counts of `array`, int32 [B, 1]."""
        return self.array[:, index : index + 1]

    def order(self, first: tuple[int, ...], total: int) -> mx.array:
        """Where `total` columns are to be taken from, int32 [B, total], such that token j of row b comes to column
        first[b] + j: indices into sinks | packed | window side by side, each as wide as its widest row."""
        sinks, packed = max(self.held_sinks), max(self.packed_tokens)
        held, start, codes = self.column(0), self.column(1), self.column(3)
        token = mx.arange(total)[None] - mx.array(first, mx.int32)[:, None]
        in_codes, in_window = token - held, token - held - codes
        place = mx.where(in_window < 0, in_codes + sinks, in_window + start - min(self.window_start) + sinks + packed)
        place = mx.where(in_codes < 0, token, place)
        return mx.clip(place, 0, sinks + packed + self.window_end - min(self.window_start) - 1)

    def in_order(self, exact: mx.array, middle: mx.array | None, order: mx.array | None = None) -> mx.array:
        """Exact [B, H, C, D] and decoded packed tokens [B, H, P, D] in the order of the sequence, [B, H, T, D]; `order`
        as `order` gives it."""
        sinks, start, end = max(self.held_sinks), min(self.window_start), self.window_end
        if order is not None and not self.length:
            return mx.zeros((*exact.shape[:2], order.shape[1], exact.shape[3]), exact.dtype)
        if middle is None and sinks == start:
            parts = [exact if end == exact.shape[2] else exact[:, :, :end]]
        else:
            parts = [exact[:, :, :sinks], *([] if middle is None else [middle]), exact[:, :, start:end]]
        result = parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=2)
        return result if order is None else mx.take_along_axis(result, order[:, None, :, None], axis=2)


@functools.lru_cache(maxsize=64)
def rows_of(
    held_sinks: tuple[int, ...], window_start: tuple[int, ...], window_end: int, packed_tokens: tuple[int, ...]
) -> Rows:
    """Rows of these counts; the layers of a model, whose counts are equal, share one and its arrays."""
    return Rows(held_sinks, window_start, window_end, packed_tokens)
