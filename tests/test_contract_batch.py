"""The contract of batches: whatever is done to a lossless BatchSpectralKVCache, it shows what mlx-lm's own class shows.

A row of the table is a list of operations; its columns are the two classes. Both are fed as mlx-lm's generate feeds
them: prompts padded on the right, or on the left, then a token for each sequence.
"""

import copy
import functools

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from mlx_lm.models.cache import BatchKVCache, KVCache

from vq_kvcache.batch_cache import BatchSpectralKVCache
from vq_kvcache.cache import LOSSLESS, SpectralKVCache
from vq_kvcache.spectral import intercept

WINDOW, SINKS = 32, 4  # with these, 116 tokens are the first to leave a packed block
HEADS, DIMS = (4, 2), (16, 8)  # query and KV heads; dimensions of keys and of values


@functools.cache
def tokens_of(sequence):
    """Queries [Hq, T, Dk], keys [H, T, Dk] and values [H, T, Dv] of the tokens of one sequence."""
    generator = np.random.default_rng(sequence)
    shapes = (HEADS[0], DIMS[0]), (HEADS[1], DIMS[0]), (HEADS[1], DIMS[1])
    return [generator.normal(size=(heads, 1200, dims)).astype(np.float32) for heads, dims in shapes]


class Twins:
    """One batch in both classes. `seen` collects what one class showed and the other did."""

    def __init__(self, caches, sequences, lengths):
        self.caches, self.sequences, self.lengths = caches, list(sequences), list(lengths)

    @classmethod
    def merged(cls, sequences, lengths):
        """Sequences that were begun alone, those of length 0 not at all."""
        caches = [[], []]
        for kind, make in zip(caches, (lambda: SpectralKVCache(LOSSLESS, 0, WINDOW, SINKS), KVCache), strict=True):
            for sequence, length in zip(sequences, lengths, strict=True):
                kind.append(make())
                if length:
                    kind[-1].update_and_fetch(*(mx.array(x[None, :, :length]) for x in tokens_of(sequence)[1:]))
        return cls([kind[0].merge(kind) for kind in caches], sequences, lengths).check()

    @classmethod
    def padded(cls, sequences, padding):
        ours, theirs = BatchSpectralKVCache(padding, LOSSLESS, 0, WINDOW, SINKS), BatchKVCache(padding)
        return cls([ours, theirs], sequences, [-n for n in padding])

    def columns(self, starts, counts, width, left=None):
        """Arrays [B, H, width, D] with counts[b] tokens of row b from starts[b] on, and noise where there is none."""
        arrays = [np.full((len(starts), h, width, d), 7.5, np.float32) for h, d in
                  zip((*HEADS, HEADS[1]), (DIMS[0], *DIMS), strict=True)]  # fmt: skip
        for row, (sequence, start, count) in enumerate(zip(self.sequences, starts, counts, strict=True)):
            begin = 0 if left is None else left[row]
            for array, own in zip(arrays, tokens_of(sequence), strict=True):
                array[row, :, begin : begin + count] = own[:, start : start + count]
        return [mx.array(a) for a in arrays]

    def append(self, counts, width, left=None):
        """Feed `width` columns, counts[b] of them real, and compare attention, what is fetched, and masks."""
        starts = [max(n, 0) for n in self.lengths]
        queries, keys, values = self.columns(starts, counts, width, left)
        shown = []
        for cache in self.caches:
            mask = cache.make_mask(width)
            fetched = cache.update_and_fetch(keys, values)
            assert mask.shape == (len(counts), 1, width, fetched[0].shape[2])
            out = mx.fast.scaled_dot_product_attention(queries, *fetched, scale=0.25, mask=mask)
            shown.append([np.array(x) for x in (mask, *fetched, out)])
        self.lengths = [a + b for a, b in zip(starts, counts, strict=True)]
        (mask, *ours), (their_mask, *theirs) = shown
        np.testing.assert_array_equal(mask, their_mask)
        for row, count in enumerate(counts):
            begin = 0 if left is None else left[row]
            visible = their_mask[row, 0, begin : begin + count].any(axis=0)
            for mine, other in zip(ours[:2], theirs[:2], strict=True):
                assert mine.shape == other.shape
                np.testing.assert_array_equal(mine[row][:, visible], other[row][:, visible])
            real = slice(begin, begin + count)
            np.testing.assert_allclose(ours[2][row, :, real], theirs[2][row, :, real], atol=1e-5)

    def prompt(self, counts, step):
        """As PromptProcessingBatch.prompt does it: padding on the right, a chunk of `step` columns at a time."""
        width = max(counts)
        padding = [width - n for n in counts]
        if max(padding):
            for cache in self.caches:
                cache.prepare(lengths=counts, right_padding=padding)
        for start in range(0, width, step):
            left = [max(n - start, 0) for n in counts]
            chunk = min(step, width - start)
            self.append([min(n, chunk) for n in left], chunk)
        if max(padding):
            for cache in self.caches:
                cache.finalize()
        return self.check()

    def left_padded(self, counts):
        """The first columns of a batch that was made with padding on the left."""
        width = max(-n + count for n, count in zip(self.lengths, counts, strict=True))
        self.append(counts, width, [-n for n in self.lengths])
        return self.check()

    def step(self, times=1):
        for _ in range(times):
            self.append([1] * len(self.sequences), 1)
        return self.check()

    def trim(self, count):
        count = min(count, *self.lengths)  # mlx-lm hides what follows a row that was trimmed beyond its begin
        results = [cache.trim(count) for cache in self.caches]
        assert results[0] == results[1]
        self.lengths = [n - count for n in self.lengths]
        return self.check()

    def filter(self, rows):
        for cache in self.caches:
            cache.filter(rows)
        self.sequences, self.lengths = ([own[row] for row in rows] for own in (self.sequences, self.lengths))
        return self.check()

    def extend(self, other):
        for cache, theirs in zip(self.caches, other.caches, strict=True):
            cache.extend(theirs)
        self.sequences += other.sequences
        self.lengths += other.lengths
        return self.check()

    def copy(self):
        return Twins(copy.deepcopy(self.caches), self.sequences, self.lengths).check()

    def saved(self):
        names = [n for n in ("state", "meta_state") if n in dir(BatchKVCache)]

        def again(cache):
            if cache.empty() and type(cache) is BatchKVCache:  # of which mlx-lm before 0.32 has no state
                return copy.deepcopy(cache)
            mx.eval(cache.state)
            return type(cache).from_state(*(getattr(cache, n) for n in names))

        return Twins([again(cache) for cache in self.caches], self.sequences, self.lengths).check()

    def remade(self):
        """Every sequence extracted, and all merged again."""
        if self.caches[0].empty():  # of which mlx-lm cannot extract
            assert self.caches[0].extract(0).empty()
            return self
        parts = [[cache.extract(row) for row in range(len(self.sequences))] for cache in self.caches]
        for mine, other, length in zip(*parts, self.lengths, strict=True):
            assert (type(mine), type(other)) == (SpectralKVCache, KVCache)
            assert mine.offset == other.offset == length
            assert mine.empty() or mine.stats()["packed_tokens"] + mine.stats()["exact_tokens"] == length
            if length:
                for x, y in zip(mine._storage.snapshot().decoded(), (other.keys, other.values), strict=True):
                    np.testing.assert_array_equal(np.array(x), np.array(y[:, :, :length]))
        # mlx-lm cannot merge what it extracted of a row without tokens: it has keys, of no columns.
        parts[1] = [KVCache() if not c.offset else c for c in parts[1]]
        return Twins([kind[0].merge(kind) for kind in parts], self.sequences, self.lengths).check()

    def check(self):
        ours, theirs = self.caches
        assert type(ours) is BatchSpectralKVCache
        assert type(theirs) is BatchKVCache
        assert ours.empty() == theirs.empty()
        assert ours.size() == theirs.size()
        assert ours.is_trimmable() is theirs.is_trimmable() is True
        for name in ("offset", "left_padding"):
            mine, other = getattr(ours, name), getattr(theirs, name)
            assert mine.dtype == other.dtype
            assert mine.tolist() == other.tolist()
        assert ours.offset.tolist() == self.lengths
        assert ours.nbytes == sum(a.nbytes for a in ([] if ours.empty() else ours._storage.arrays))
        if not ours.empty():
            ours._storage.check()
            mask = np.arange(ours.size()) >= np.array(ours.left_padding)[:, None]
            fetched = [self.all_of(cache) for cache in self.caches]
            for mine, other in zip(*fetched, strict=True):
                assert mine.dtype == other.dtype
                np.testing.assert_array_equal(*(x.swapaxes(1, 2)[mask] for x in (mine, other)))
        return self

    @staticmethod
    def all_of(cache):
        # The BatchKVCache of mlx-lm before 0.32 has no keys_and_values.
        held = cache.keys_and_values() if hasattr(cache, "keys_and_values") else cache.state[:2]
        return [np.array(x) for x in held]


@pytest.fixture(autouse=True)
def _dispatching():
    with intercept.dispatching():
        yield


A, B, C, D = range(4)  # sequences

# The contract.


def steps_after_prompts_of_many_lengths():
    return Twins.merged([A, B, C], [0, 0, 0]).prompt([150, 3, 77], 2048).step(100)


def prompts_in_chunks():
    return Twins.merged([A, B, C], [0, 0, 0]).prompt([700, 90, 400], 128).step(3)


def chunks_as_short_as_steps():
    return Twins.merged([A, B], [120, 0]).prompt([40, 9], 5).prompt([1, 2], 2).step(90)


def rows_of_equal_length():
    return Twins.merged([A, B], [0, 0]).prompt([200, 200], 2048).step(150).prompt([100, 100], 64)


def one_row():
    return Twins.merged([A], [0]).prompt([300], 100).step(80).trim(100).step(2).remade().step(1)


def prompts_of_one_token_and_of_none():
    return Twins.merged([A, B, C], [0, 0, 5]).prompt([1, 0, 130], 2048).step(2).prompt([0, 2, 0], 2048).step(5)


def merge_with_empties():
    return Twins.merged([A, B, C], [0, 400, 130]).step(70)


def merge_of_empties():
    return Twins.merged([A, B], [0, 0]).step(130)


def merge_of_short_and_long():
    return Twins.merged([A, B, C, D], [3, 1000, 116, 115]).prompt([5, 1, 30, 2], 2048).step(66)


def prompts_continued():
    return Twins.merged([A, B], [300, 20]).prompt([7, 150], 64).step(2).prompt([150, 7], 2048).step(2)


def left_padding():
    return Twins.padded([A, B, C], [2, 90, 0]).left_padded([98, 10, 100]).step(80)


def left_padding_prepared():
    twins = Twins.padded([A, B], [0, 1])
    for cache in twins.caches:
        cache.prepare(left_padding=[4, 0])
    twins.lengths = [-4, -1]
    return twins.check().left_padded([116, 119]).step(20)


def padding_everywhere_and_filtered():
    return Twins.padded([A, B, C], [10, 40, 7]).left_padded([190, 160, 193]).filter([1, 0]).step(70)


def filtered():
    twins = Twins.merged([A, B, C, D], [500, 20, 300, 130]).step(3)
    return twins.filter([1, 2, 3]).step(3).filter([2, 0]).step(70).filter([1]).step(90)


def filtered_while_empty():
    return Twins.merged([A, B, C], [0, 0, 0]).filter([2, 1]).prompt([120, 4], 2048).step(60)


def extended():
    twins = Twins.merged([A, B], [200, 30]).step(40)
    return twins.extend(Twins.merged([C], [700]).step(5)).step(70).extend(Twins.merged([D], [1])).step(70)


def extended_by_empties():
    twins = Twins.merged([A], [200]).extend(Twins.merged([B, C], [0, 0])).step(1)
    return twins.extend(Twins.merged([D], [0])).prompt([1, 130, 2, 60], 2048).step(9)


def empties_extended():
    twins = Twins.merged([A, B], [0, 0]).extend(Twins.merged([C], [0]))
    return twins.extend(Twins.merged([D], [300])).step(3)


def trimmed():
    twins = Twins.merged([A, B], [400, 150]).step(3).trim(2).step(1).trim(20).step(40)
    return twins.trim(100).step(3).trim(60).step(140)


def trimmed_away():
    return Twins.merged([A, B], [300, 130]).trim(130).step(3).trim(3).step(130)


def copies_part():
    twins = Twins.merged([A, B], [210, 40]).step(2)
    other = twins.copy().step(90)
    twins.filter([1]).step(3)
    return other.trim(20).step(1)


def state_round_trip():
    twins = Twins.merged([A, B], [0, 0]).saved().prompt([300, 9], 2048).saved().step(70).saved().step(1)
    return twins.filter([1]).saved().step(2)


def extracted_and_merged():
    return Twins.merged([A, B, C], [333, 0, 2]).prompt([1, 0, 130], 2048).remade().step(50).remade().step(90)


ROWS = [
    steps_after_prompts_of_many_lengths, prompts_in_chunks, chunks_as_short_as_steps, rows_of_equal_length, one_row,
    prompts_of_one_token_and_of_none, merge_with_empties, merge_of_empties, merge_of_short_and_long,
    prompts_continued, left_padding, left_padding_prepared, padding_everywhere_and_filtered, filtered,
    filtered_while_empty, extended, extended_by_empties, empties_extended, trimmed, trimmed_away, copies_part,
    state_round_trip, extracted_and_merged,
]  # fmt: skip


@pytest.mark.parametrize("row", ROWS)
def test_it_does_what_mlx_lm_does(row):
    row()


COUNTS = st.sampled_from([0, 1, 2, 15, 17, 64, 100, 200])
OPERATIONS = st.one_of(
    st.tuples(st.just("prompt"), st.lists(COUNTS, min_size=6, max_size=6), st.sampled_from([4, 64, 2048])),
    st.tuples(st.just("step"), st.sampled_from([1, 3, 70]), st.just(0)),
    st.tuples(st.just("trim"), COUNTS, st.just(0)),
    st.tuples(st.just("filter"), st.lists(st.integers(0, 5), min_size=1, max_size=3), st.just(0)),
    st.tuples(st.just("extend"), st.lists(COUNTS, min_size=1, max_size=2), st.just(0)),
    st.tuples(st.sampled_from(["copy", "saved", "remade"]), st.just(0), st.just(0)),
)


@settings(max_examples=40, deadline=None)
@given(begin=st.lists(COUNTS, min_size=1, max_size=3), operations=st.lists(OPERATIONS, min_size=2, max_size=6))
def test_any_sequence_of_operations(begin, operations):
    with intercept.dispatching():
        twins = Twins.merged(range(len(begin)), begin)
        for name, first, second in operations:
            rows = len(twins.sequences)
            if name == "prompt" and max(first[:rows]) and max(twins.lengths) < 700:
                twins.prompt(first[:rows], second)
            elif name in ("step", "trim") and max(twins.lengths) < 700:
                getattr(twins, name)(first)
            elif name == "filter":
                twins.filter(sorted({i % rows for i in first}))
            elif name == "extend" and rows < 5:
                twins.extend(Twins.merged(range(rows, rows + len(first)), first))
            elif name in ("copy", "saved", "remade"):
                twins = getattr(twins, name)()
