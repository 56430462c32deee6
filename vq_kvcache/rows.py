"""Where the tokens of each row of a batch lie: counts as Python numbers, and as arrays that are made once per state."""

import dataclasses
import functools

import mlx.core as mx


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
    def alike(self) -> bool:
        """Whether all rows have the same counts, so that slices serve all of them."""
        return all(len(set(counts)) < 2 for counts in (self.held_sinks, self.window_start, self.packed_tokens))

    @functools.cached_property
    def array(self) -> mx.array:
        """int32 [B, 4]: held_sinks, window_start, window_end, packed_tokens."""
        ends = (self.window_end,) * len(self.held_sinks)
        counts = zip(self.held_sinks, self.window_start, ends, self.packed_tokens, strict=True)
        return mx.array(list(counts), mx.int32).reshape(-1, 4)


@functools.lru_cache(maxsize=64)
def rows_of(
    held_sinks: tuple[int, ...], window_start: tuple[int, ...], window_end: int, packed_tokens: tuple[int, ...]
) -> Rows:
    """Rows of these counts; the layers of a model, whose counts are equal, share one and its arrays."""
    return Rows(held_sinks, window_start, window_end, packed_tokens)
