"""What one layer holds of several sequences: BatchStorage, a Storage whose rows differ in length.

The newest exact tokens of every row end in the same column of the exact buffers, so that a token for each row is one
write; what a row has fewer of, it lacks on the left. Rows seal their own blocks, at their own places in the codes.
"""

import dataclasses
from collections.abc import Sequence

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from .chunks import MAX_CHUNKS, Chunk, Chunks, fill_pages
from .drift import DriftSums
from .rows import Rows, rows_of
from .spectral.sealing import BLOCK, LAG, tokens_to_seal
from .spectral.spectral_quant import Quantizer
from .storage import Snapshot, Storage, holds_vectors, write_both
from .trust import encode_words

Counts = tuple[int, ...]


class BatchStorage:
    """Keys [B, H, T, Dk] and values [B, H, T, Dv] of one layer; each row has its own number of tokens."""

    def __init__(
        self, key_quantizer: Quantizer, value_quantizer: Quantizer, window: int, sinks: int, keys: mx.array,
        values: mx.array,
    ) -> None:  # fmt: skip
        """Empty rows for keys and values of the batch, heads, dimensions and type of these."""
        self.key_quantizer, self.value_quantizer = key_quantizer, value_quantizer
        self.window, self.sinks = window, sinks
        batch = keys.shape[0]
        self.held_sinks: Counts = (0,) * batch
        self.window_start: Counts = (0,) * batch
        self.packed_tokens: Counts = (0,) * batch
        self.window_end = 0
        room = self._room(0, keys, values)
        self.exact_keys, self.exact_values = (_zeros(x, batch, room) for x in (keys, values))
        self.codes = Chunks()
        self.drift = DriftSums()

    @property
    def layout(self) -> Rows:
        """Where the tokens of each row lie."""
        return rows_of(self.held_sinks, self.window_start, self.window_end, self.packed_tokens)

    @property
    def batch(self) -> int:
        """Rows."""
        return len(self.held_sinks)

    @property
    def newest(self) -> list[int]:
        """Tokens in each row's window."""
        return [self.window_end - start for start in self.window_start]

    @property
    def arrays(self) -> list[mx.array]:
        """Every array held."""
        return [self.exact_keys, self.exact_values, *(chunk.words for chunk in self.codes.held)]

    @property
    def nbytes(self) -> int:
        """Sum of the arrays' nbytes, reserved capacity included."""
        return sum(a.nbytes for a in self.arrays)

    # -- adding

    def append(self, keys: mx.array, values: mx.array, skipped: Counts, real: Counts) -> None:
        """Add tokens at the ends, exact: of row b those of columns skipped[b] .. skipped[b] + real[b] - 1. Call `seal`
        once nobody needs them exact any more."""
        added = keys.shape[2]
        if real == (added,) * self.batch and (self._settled or self._fresh):
            self._append_column_block(keys, values)
            return
        held = self.exact_keys.shape[2]
        columns = [
            np.concatenate([own, np.arange(held + skip, held + skip + count)])
            for own, skip, count in zip(self._columns(), skipped, real, strict=True)
        ]
        self._place(
            mx.concatenate([self.exact_keys, keys], axis=2),
            mx.concatenate([self.exact_values, values], axis=2),
            columns,
        )

    @property
    def _settled(self) -> bool:
        """Whether the next token of every row goes to its window."""
        counts = zip(self.held_sinks, self.packed_tokens, strict=True)
        return min(self.held_sinks) == self.sinks or all(held == self.sinks or packed for held, packed in counts)

    @property
    def _fresh(self) -> bool:
        """Whether all rows hold the same few tokens, sinks only, and nothing lies behind them."""
        return not self.codes.held and set(self.held_sinks) == {self.window_end}

    def _append_column_block(self, keys: mx.array, values: mx.array) -> None:
        fresh, added = self._fresh, keys.shape[2]
        if self.window_end + added > self.exact_keys.shape[2]:
            self._close_gaps(added)
        held = self.exact_keys, self.exact_values
        self.exact_keys, self.exact_values = write_both(self.window_end, *held, keys, values)
        self.window_end += added
        if fresh:
            self.held_sinks = self.window_start = (min(self.sinks, self.window_end),) * self.batch

    def _columns(self) -> list[NDArray[np.int64]]:
        """The columns of each row's exact tokens, in the order of its sequence."""
        return [
            np.concatenate([np.arange(held), np.arange(start, self.window_end)])
            for held, start in zip(self.held_sinks, self.window_start, strict=True)
        ]

    def _place(self, keys: mx.array, values: mx.array, columns: list[NDArray[np.int64]]) -> None:
        """Make these columns of keys and values [B, H, *, D] the exact tokens, those of row b in columns[b]."""
        held = [
            old if packed else min(self.sinks, len(own))
            for old, packed, own in zip(self.held_sinks, self.packed_tokens, columns, strict=True)
        ]
        newest = [len(own) - sinks for own, sinks in zip(columns, held, strict=True)]
        end = max(held) + max(newest)
        room = self._room(end, self.exact_keys, self.exact_values)
        index = np.zeros((self.batch, room), np.int32)  # free columns repeat the first: never NaN of a padded row
        for row, (own, sinks, count) in enumerate(zip(columns, held, newest, strict=True)):
            index[row] = own[0] if len(own) else 0
            index[row, :sinks] = own[:sinks]
            index[row, end - count : end] = own[sinks:]
        places = mx.array(index)[:, None, :, None]
        self.exact_keys = mx.take_along_axis(keys, places, axis=2)
        self.exact_values = mx.take_along_axis(values, places, axis=2)
        self.held_sinks, self.window_start = tuple(held), tuple(end - count for count in newest)
        self.window_end = end

    def _room(self, columns: int, keys: mx.array, values: mx.array) -> int:
        """Columns of the exact buffers: at least these, and what decoding needs until the next seal. Rows are sealed
        together, when one has two blocks to seal."""
        wanted = max(self.sinks + self.window + LAG + 2 * BLOCK, columns)
        widest = max(self.batch * x.shape[1] * x.shape[3] * x.dtype.size for x in (keys, values))
        return fill_pages(wanted, widest)

    def _close_gaps(self, added: int) -> None:
        """Move the windows down to the sinks, and make room for `added` columns behind them."""
        end = max(self.held_sinks) + max(self.newest)
        room = self._room(end + added, self.exact_keys, self.exact_values)
        self.exact_keys, self.exact_values = self._arranged(end, room)
        moved = self.window_end - end
        self.window_start = tuple(start - moved for start in self.window_start)
        self.window_end = end

    def _arranged(self, end: int, room: int) -> tuple[mx.array, mx.array]:
        """The exact buffers with windows that end in column `end`, and `room` columns."""
        sinks, newest = max(self.held_sinks), max(self.newest)
        gap, tail = end - newest - sinks, room - end
        shorter = None
        if len(set(self.newest)) > 1 or len(set(self.held_sinks)) > 1:
            # What a shorter row has before its window is left from tokens that are packed or gone; were one NaN, it
            # would stay NaN behind every mask.
            first = mx.array([end - own for own in self.newest], mx.int32)[:, None]
            held, column = mx.array(self.held_sinks, mx.int32)[:, None], mx.arange(room)[None]
            shorter = ((column >= held) & (column < first))[:, None, :, None]

        def arranged(x: mx.array) -> mx.array:
            window = x[:, :, self.window_end - newest : self.window_end]
            parts = [x[:, :, :sinks], _zeros(x, self.batch, gap), window, _zeros(x, self.batch, tail)]
            whole = mx.concatenate(parts, axis=2)
            return whole if shorter is None else mx.where(shorter, mx.array(0, x.dtype), whole)

        return arranged(self.exact_keys), arranged(self.exact_values)

    # -- packing

    @property
    def due(self) -> int:
        """Tokens that `seal` would pack now of the row that has the most."""
        return tokens_to_seal(self.window_end - min(self.window_start, default=self.window_end), self.window)

    def seal(self) -> None:
        """Pack the oldest exact tokens beyond each row's window, whole blocks of them."""
        counts = [tokens_to_seal(count, self.window) for count in self.newest]
        if not any(counts):
            return
        packed = tuple(p + count for p, count in zip(self.packed_tokens, counts, strict=True))
        width = self.key_quantizer.words + self.value_quantizer.words
        self.codes.extend_to(max(packed), self.batch, width)
        for count in sorted(set(counts) - {0}):
            self._seal_rows([row for row, own in enumerate(counts) if own == count], count)
        self.packed_tokens = packed
        self.window_start = tuple(start + count for start, count in zip(self.window_start, counts, strict=True))
        self._close_gaps(0)

    def _seal_rows(self, rows: list[int], count: int) -> None:
        places = {(self.window_start[row], self.packed_tokens[row]) for row in rows}
        together = len(rows) == self.batch and len(places) == 1

        def oldest(x: mx.array) -> mx.array:
            if together:
                return x[:, :, self.window_start[0] : self.window_start[0] + count]
            starts = [self.window_start[row] for row in rows]
            return mx.concatenate([x[r : r + 1, :, s : s + count] for r, s in zip(rows, starts, strict=True)])

        keys, values = oldest(self.exact_keys), oldest(self.exact_values)
        encoded = [encode_words(self.key_quantizer, keys), encode_words(self.value_quantizer, values)]
        words = mx.concatenate(encoded, axis=1)
        words = self.drift.watch(words, keys, values, self.key_quantizer, self.value_quantizer)
        if together:
            self.codes.write(self.packed_tokens[0], words)
            return
        for i, row in enumerate(rows):
            self.codes.write(self.packed_tokens[row], words[i : i + 1], row)

    # -- taking away

    def trim(self, count: int) -> None:
        """Drop the newest `count` tokens of every row, at most all it has. Codes are cut at any token."""
        kept = [max(length - count, 0) for length in self.layout.lengths]
        end = max(self.window_end - count, *self.held_sinks)
        starts = [min(start, end) for start in self.window_start]
        lost = [min(count, newest) for newest in self.newest]  # of the window; what remains to drop is packed
        packed = [p - min(p, count - own) for p, own in zip(self.packed_tokens, lost, strict=True)]
        self.held_sinks = tuple(min(held, keep) for held, keep in zip(self.held_sinks, kept, strict=True))
        self.window_start, self.window_end, self.packed_tokens = tuple(starts), end, tuple(packed)
        self.codes.cut(max(packed))

    def drop(self, counts: Sequence[int]) -> None:
        """Drop the newest counts[b] exact tokens of row b, which has as many."""
        columns = [own[: len(own) - count] for own, count in zip(self._columns(), counts, strict=True)]
        self._place(self.exact_keys, self.exact_values, columns)

    def filter(self, rows: list[int]) -> None:
        """Keep these rows, in this order."""
        index = mx.array(rows, mx.int32)
        self.exact_keys, self.exact_values = self.exact_keys[index], self.exact_values[index]
        self.held_sinks = tuple(self.held_sinks[row] for row in rows)
        self.window_start = tuple(self.window_start[row] for row in rows)
        self.packed_tokens = tuple(self.packed_tokens[row] for row in rows)
        self.codes.cut(max(self.packed_tokens))
        self.codes.take(index)

    # -- joining and parting

    @classmethod
    def of(cls, storage: Storage) -> "BatchStorage":
        """The rows of a Storage, sharing its arrays. It holds something."""
        assert storage.exact_keys is not None
        assert storage.exact_values is not None
        batch = cls.__new__(cls)
        batch.key_quantizer, batch.value_quantizer = storage.key_quantizer, storage.value_quantizer
        batch.window, batch.sinks = storage.window, storage.sinks
        batch.exact_keys, batch.exact_values = storage.exact_keys, storage.exact_values
        layout = storage.layout
        batch.held_sinks, batch.window_start = layout.held_sinks, layout.window_start
        batch.window_end, batch.packed_tokens = layout.window_end, layout.packed_tokens
        batch.codes, batch.drift = storage.codes.copy(), dataclasses.replace(storage.drift)
        return batch

    def empty_rows(self, batch: int) -> "BatchStorage":
        """Rows like these that hold nothing."""
        like = [_zeros(x, batch, 0) for x in (self.exact_keys, self.exact_values)]
        return BatchStorage(self.key_quantizer, self.value_quantizer, self.window, self.sinks, *like)

    @classmethod
    def joined(cls, parts: Sequence["BatchStorage"]) -> "BatchStorage":
        """The rows of all parts, one part after another; their quantizers, window and sinks are the same."""
        first = parts[0]
        result = first.empty_rows(sum(part.batch for part in parts))
        sinks = max(max(part.held_sinks) for part in parts)
        end = sinks + max(max(part.newest) for part in parts)
        room = result._room(end, first.exact_keys, first.exact_values)
        exact = zip(*(part._arranged(end, room) for part in parts), strict=True)
        result.exact_keys, result.exact_values = (mx.concatenate(list(arrays)) for arrays in exact)
        result.held_sinks = tuple(held for part in parts for held in part.held_sinks)
        result.window_start = tuple(start + end - part.window_end for part in parts for start in part.window_start)
        result.window_end = end
        result.packed_tokens = tuple(packed for part in parts for packed in part.packed_tokens)
        result.codes = _joined_codes([(part.codes, part.batch) for part in parts])
        result.codes.expected = max(part.codes.expected for part in parts)
        result.drift = DriftSums.total([part.drift for part in parts])
        return result

    def extract(self, row: int) -> Storage:
        """A Storage of one row, with arrays of its own."""
        storage = Storage(self.key_quantizer, self.value_quantizer, self.window, self.sinks)
        held, start, end = self.held_sinks[row], self.window_start[row], self.window_end

        def exact(x: mx.array) -> mx.array:
            own = x[row : row + 1]
            return mx.concatenate([own[:, :, :held], own[:, :, start:end]], axis=2)

        storage.append(exact(self.exact_keys), exact(self.exact_values))
        storage.codes.expected = self.codes.expected
        if packed := self.packed_tokens[row]:
            storage.codes.append(self.codes.words(0, packed)[row : row + 1])
        return storage

    def copy(self) -> "BatchStorage":
        """An independent twin. Arrays are shared until either writes, and written ones are replaced, never changed."""
        twin = BatchStorage.__new__(BatchStorage)
        twin.__dict__.update(self.__dict__)
        twin.codes, twin.drift = self.codes.copy(), dataclasses.replace(self.drift)
        return twin

    # -- reading

    def snapshot(self) -> Snapshot:
        """What is held now."""
        return Snapshot(
            self.exact_keys, self.exact_values, self.codes.packed, self.layout, self.key_quantizer, self.value_quantizer
        )

    def check(self) -> None:
        """ValueError unless shapes and counts agree: for a storage that was read from a file."""
        batch, capacity = self.exact_keys.shape[0], self.exact_keys.shape[2]
        counts = self.held_sinks, self.window_start, self.packed_tokens
        fits = all(len(own) == batch > 0 for own in counts) and self.exact_values.shape[::2] == (batch, capacity)
        for held, start, packed in zip(*counts, strict=True) if fits else ():
            fits &= 0 <= held <= start <= self.window_end <= capacity and packed >= 0
            fits &= held == self.sinks or not (packed or start < self.window_end)
        fits &= self.codes.tokens == max(self.packed_tokens, default=0) and len(self.codes.held) <= MAX_CHUNKS
        width = self.key_quantizer.words + self.value_quantizer.words
        fits &= self.codes.fit(batch, width)
        # The room that a cache reserves: whoever asks for a wider window than the file has room for asks for memory.
        fits &= min(self.window, self.sinks) >= 0 and self.sinks + self.window + LAG + 2 * BLOCK <= capacity
        fits &= holds_vectors(self.exact_keys, self.exact_values, self.key_quantizer, self.value_quantizer)
        if not fits:
            raise ValueError("a stored cache's shapes do not fit its codec; the file is damaged; make it again.")


def _zeros(like: mx.array, batch: int, columns: int) -> mx.array:
    return mx.zeros((batch, like.shape[1], columns, like.shape[3]), like.dtype)


def _joined_codes(parts: Sequence[tuple[Chunks, int]]) -> Chunks:
    """The codes of all rows, in chunks as the longest part has them."""
    longest = max((codes for codes, _ in parts), key=lambda codes: codes.tokens)
    result, first = Chunks(), 0
    for chunk in longest.held:
        columns = [_columns_of(codes, batch, first, chunk) for codes, batch in parts]
        result.held.append(Chunk(mx.concatenate(columns), chunk.tokens))
        first += chunk.tokens
    return result


def _columns_of(codes: Chunks, batch: int, first: int, chunk: Chunk) -> mx.array:
    """Columns first.. of `codes`, in the width of `chunk`."""
    end = min(codes.tokens, first + chunk.tokens)
    missing = chunk.capacity - max(end - first, 0)
    parts = [mx.zeros((batch, chunk.words.shape[1], missing), mx.uint32)]
    if end > first:
        parts.insert(0, codes.words(first, end))
    return mx.concatenate(parts, axis=-1)
