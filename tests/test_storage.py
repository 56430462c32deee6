"""Storage against a plain list of tokens: whatever is appended, packed, trimmed and copied, it holds those numbers."""

import itertools
import mmap
import threading

import mlx.core as mx
import numpy as np
import pytest
from conftest import like_calibrated, random_codec
from hypothesis import given, settings
from hypothesis import strategies as st

from vq_kvcache import storage
from vq_kvcache.chunks import MAX_CHUNKS, SMALLEST_CHUNK, Chunk, Chunks, fill_pages
from vq_kvcache.kernels import launches
from vq_kvcache.rows import rows_of
from vq_kvcache.spectral.sealing import BLOCK, LAG, tokens_to_seal
from vq_kvcache.spectral.spectral_quant import RawQuantizer
from vq_kvcache.storage import Storage

DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}


def tokens(count, batch=1, heads=2, dims=8, seed=0, dtype=mx.float32):
    x = np.random.default_rng(seed).normal(size=(batch, heads, count, dims)).astype(np.float32)
    return mx.array(x).astype(dtype)


def chunk_room(count, token_bytes):
    """Tokens of a chunk that is made for `count`: what fills its memory pages, a multiple of four for the kernels."""
    return fill_pages(count, token_bytes) // 4 * 4


def raw_storage(window=32, sinks=4, heads=2, key_dims=8, value_dims=8, dtype=mx.float32):
    quantizers = (RawQuantizer(heads, d, dtype) for d in (key_dims, value_dims))
    return Storage(*quantizers, window, sinks)


def filled(count, window=32, sinks=4, step=None):
    """A raw storage that `count` tokens were appended to, `step` at a time, packed after each; and those tokens."""
    storage, keys, values = raw_storage(window, sinks), tokens(count, seed=1), tokens(count, seed=2)
    for start in range(0, count, step or count):
        end = start + (step or count)
        storage.append(keys[:, :, start:end], values[:, :, start:end])
        storage.seal()
    return storage, np.array(keys), np.array(values)


def numpy(x):
    return np.array(x.astype(mx.float32))


def assert_holds(snapshot, keys, values):
    for held, expected in zip(snapshot.decoded(), (keys, values), strict=True):
        np.testing.assert_array_equal(numpy(held), expected)


class Twin:
    """A storage and, as two NumPy arrays, what it ought to hold."""

    def __init__(self, storage, keys, values):
        self.storage, self.keys, self.values = storage, keys, values

    def append(self, keys, values):
        self.storage.append(keys, values)
        self.keys = np.concatenate([self.keys, numpy(keys)], axis=2)
        self.values = np.concatenate([self.values, numpy(values)], axis=2)

    def trim(self, count):
        left = max(self.keys.shape[2] - count, 0)
        assert self.storage.trim(count) == self.keys.shape[2] - left
        self.keys, self.values = self.keys[:, :, :left], self.values[:, :, :left]

    def copy(self):
        return Twin(self.storage.copy(), self.keys, self.values)

    def check(self):
        assert self.storage.length == self.keys.shape[2]
        if self.storage.exact_keys is not None:
            self.storage.check()
            assert_holds(self.storage.snapshot(), self.keys, self.values)


COUNTS = st.sampled_from([1, 2, 5, 16, 63, 64, 100, 200])
STEPS = st.one_of(
    st.tuples(st.just("append and seal"), COUNTS),
    st.tuples(st.just("append"), COUNTS),
    st.tuples(st.just("trim"), COUNTS),
    st.tuples(st.just("copy"), st.just(0)),
    st.tuples(st.just("snapshot"), st.just(0)),
)


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(st.tuples(st.integers(0, 2), STEPS), min_size=4, max_size=14),
    dtype=st.sampled_from(sorted(DTYPES)),
    batch=st.integers(1, 2),
    dims=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    window=st.integers(0, 40),
    sinks=st.integers(0, 5),
)
def test_it_holds_what_a_list_of_tokens_would(steps, dtype, batch, dims, window, sinks):
    empty = [np.zeros((batch, 2, 0, d), np.float32) for d in dims]
    twins = [Twin(raw_storage(window, sinks, 2, *dims, DTYPES[dtype]), *empty)]
    snapshots = []
    for seed, (which, (action, count)) in enumerate(steps):
        twin = twins[which % len(twins)]
        if "append" in action:
            keys, values = (tokens(count, batch, 2, d, seed + 100 * i, DTYPES[dtype]) for i, d in enumerate(dims))
            twin.append(keys, values)
            if "seal" in action:
                twin.storage.seal()
        elif action == "trim":
            twin.trim(count)
        elif action == "copy":
            twins.append(twin.copy())
        elif twin.storage.exact_keys is not None:
            snapshots.append((twin.storage.snapshot(), twin.keys, twin.values))
        twin.check()
    for twin in twins:  # what was done to one did not reach another
        twin.check()
    for snapshot, keys, values in snapshots:
        assert snapshot.length == keys.shape[2]
        assert_holds(snapshot, keys, values)


@pytest.mark.parametrize(
    ("newest", "window", "expected"),
    [(0, 128, 0), (207, 128, 0), (208, 128, 64), (271, 128, 64), (272, 128, 128), (80, 0, 64), (79, 0, 0)],
)
def test_tokens_to_seal(newest, window, expected):
    assert (BLOCK, LAG) == (64, 16)
    assert tokens_to_seal(newest, window) == expected


@pytest.mark.parametrize("step", [1, 3, 16, 17, 64, 100, 331])
@pytest.mark.parametrize(("window", "sinks"), [(32, 4), (0, 0), (5, 40)])
def test_packed_tokens_are_the_documented_number_at_every_length(step, window, sinks):
    storage = raw_storage(window, sinks)
    for n in range(step, 332, step):
        storage.append(tokens(step), tokens(step))
        storage.seal()
        assert storage.packed_tokens == max(0, n - sinks - window - 16) // 64 * 64
        assert storage.exact_tokens == n - storage.packed_tokens
        assert storage.held_sinks == min(sinks, n)


def a_twin(count=700, step=50):
    storage, keys, values = filled(count, step=step)
    return Twin(storage, keys, values)


@pytest.mark.parametrize("count", [*range(0, 700, 47), 695, 696, 697, 699, 700, 701])
def test_a_trim_of_any_depth(count):
    """Through window, codes, whole chunks and sinks, and then on as if nothing had been there."""
    twin = a_twin()
    first = chunk_room(512, 128)
    assert [c.tokens for c in twin.storage.chunks] == [first, 640 - first]
    twin.trim(count)
    twin.check()
    for seed in (5, 6):
        twin.append(tokens(90, seed=seed), tokens(90, seed=-seed + 20))
        twin.check()
        twin.storage.seal()
        twin.check()


@pytest.mark.parametrize("count", [30, 100, 300, 690, 700])
def test_what_was_trimmed_and_packed_over_stays_in_snapshots_and_copies(count):
    twin = a_twin()
    seen, copy = (twin.storage.snapshot(), twin.keys, twin.values), twin.copy()
    for each in (twin, copy):
        each.trim(count)
        for _ in range(3):
            each.append(tokens(90, seed=count), tokens(90, seed=count + 1))
            each.storage.seal()
    for each in (twin, copy):
        each.check()
    assert_holds(*seen)


def test_a_rollback_of_the_lag_never_lands_in_codes():
    storage, keys, values = filled(400, step=1)
    packed = storage.packed_tokens
    assert packed == 320
    storage.trim(LAG)
    assert storage.packed_tokens == packed
    assert_holds(storage.snapshot(), keys[:, :, :-LAG], values[:, :, :-LAG])


def test_first_and_newest_tokens_are_exact_and_only_the_rest_passes_the_quantizer():
    codec = random_codec(heads=2, key_dims=16)
    layer = codec.plan(1.0).layers[0]
    keys, values = (like_calibrated(t, 1, 300, seed=i) for i, t in enumerate(codec.layers[0]))
    storage = Storage(layer.keys, layer.values, 32, 4)
    storage.append(keys, values)
    storage.seal()
    assert storage.packed_tokens == 192
    for held, given_, quantizer in zip(
        storage.snapshot().decoded(), (keys, values), (layer.keys, layer.values), strict=True
    ):
        different = (numpy(held) != numpy(given_)).any(axis=(0, 1, 3))
        assert different.tolist() == [False] * 4 + [True] * 192 + [False] * 104
        alone = quantizer.decode(quantizer.encode(given_[:, :, 4:196]))
        np.testing.assert_allclose(numpy(held[:, :, 4:196]), numpy(alone), rtol=1e-5, atol=1e-5)


def test_growth_leaves_full_chunks_alone_and_reserves_a_quarter():
    storage = filled(1000)[0]
    assert [(c.tokens, c.capacity) for c in storage.chunks] == [(896, chunk_room(896, 128))]
    full = {}
    for seed in range(50):
        storage.append(tokens(64, seed=seed), tokens(64, seed=seed))
        storage.seal()
        for i, chunk in enumerate(storage.chunks):
            if chunk.tokens == chunk.capacity:
                assert full.setdefault(i, chunk.words) is chunk.words
    assert len(full) >= len(storage.chunks) - 1
    packed = 0
    for before, chunk in itertools.pairwise(storage.chunks):
        assert before.tokens == before.capacity
        packed += before.tokens
        assert chunk.capacity == chunk_room(max(SMALLEST_CHUNK, packed // 4), 128)
    assert len(storage.chunks) == 7


def test_at_most_eight_chunks_whatever_was_packed():
    """A ninth joins the two neighbours that are smallest together; no other is copied."""
    storage, packed, copied = raw_storage(0, 0, heads=1, key_dims=1, value_dims=1), [], 0
    for seed in range(400):
        packed.append(tokens(64, heads=1, dims=1, seed=seed))
        before = {id(c.words): c.tokens for c in storage.chunks if c.tokens == c.capacity}
        storage.codes.append(storage.key_quantizer.encode_words(packed[-1]))
        after = {id(c.words) for c in storage.chunks}
        copied += sum(n for key, n in before.items() if key not in after)
        assert len(storage.chunks) <= MAX_CHUNKS
        assert all(c.tokens == c.capacity for c in storage.chunks[:-1])
        assert storage.chunks[-1].capacity <= fill_pages(max(SMALLEST_CHUNK, storage.packed_tokens // 4), 4)
    assert len(storage.chunks) == MAX_CHUNKS
    assert copied < storage.packed_tokens / 2
    held = storage.key_quantizer.decode_words(storage.codes.words(0, storage.packed_tokens))
    assert mx.array_equal(held, mx.concatenate(packed, axis=2))


@pytest.mark.parametrize("count", [SMALLEST_CHUNK, SMALLEST_CHUNK - 64])
def test_codes_that_fill_their_chunk_keep_no_batch_alive(count):
    """MLX takes an update of a whole array as it is, and one row of many shares the memory of all."""
    width = mmap.PAGESIZE // 16  # words of which a chunk holds SMALLEST_CHUNK tokens exactly
    batch, codes = mx.ones((8, width, count), mx.uint32), Chunks()
    mx.eval(batch)
    mx.clear_cache()
    held = mx.get_active_memory() - batch.nbytes
    codes.append(batch[1:2])
    mx.eval(codes.held[0].words)
    assert codes.held[0].capacity == SMALLEST_CHUNK
    del batch
    mx.clear_cache()
    assert mx.get_active_memory() - held <= codes.held[0].words.nbytes + mmap.PAGESIZE


def test_the_rows_of_a_snapshot_say_where_its_tokens_are():
    storage, keys, _ = filled(400, step=50)
    snapshot = storage.snapshot()
    assert snapshot.exact_keys is storage.exact_keys
    assert snapshot.exact_values is storage.exact_values
    assert snapshot.exact_keys.shape[2] > 4 + 76
    assert snapshot.rows.dtype == mx.int32
    assert snapshot.rows.tolist() == [[4, 4, 80, 320]]
    exact = numpy(snapshot.exact_keys)
    np.testing.assert_array_equal(exact[:, :, :4], keys[:, :, :4])
    np.testing.assert_array_equal(exact[:, :, 4:80], keys[:, :, -76:])
    assert raw_storage().layout.array.shape == (0, 4)


def test_states_that_are_equal_share_their_rows():
    first, second = filled(400)[0], filled(400)[0]
    assert first.snapshot().rows is second.snapshot().rows
    second.append(tokens(1), tokens(1))
    assert first.snapshot().rows is not second.snapshot().rows


def test_rows_that_one_thread_made_serve_another():
    """MLX runs what is not yet computed on a stream of the thread that asked for it first, which no other has."""
    layout = rows_of((1, 2), (3, 4), 1005, (6, 7))
    thread = threading.Thread(target=lambda: (layout.array, layout.tokens))
    thread.start()
    thread.join()
    assert layout.array.tolist() == [[1, 3, 1005, 6], [2, 4, 1005, 7]]
    assert layout.tokens.tolist() == [1009, 1010]


def test_the_exact_buffers_never_grow_with_the_context():
    storage = filled(2000, window=32, sinks=4, step=100)[0]
    assert (
        storage.exact_keys.shape == storage.exact_values.shape == (1, 2, fill_pages(4 + 32 + LAG + BLOCK, 2 * 8 * 4), 8)
    )


def test_a_snapshot_reads_words_across_chunks():
    storage, keys, _ = filled(1500, step=100)
    snapshot = storage.snapshot()
    assert len(snapshot.packed) == 3
    edges = [0, 10, 512, 1024, snapshot.packed_tokens]
    for start in edges:
        for end in (e for e in edges if e > start):
            key_words, value_words = snapshot.words(start, end)
            assert key_words.shape == value_words.shape == (1, 16, end - start)
            decoded = numpy(storage.key_quantizer.decode_words(key_words))
            np.testing.assert_array_equal(decoded, keys[:, :, 4 + start : 4 + end])


def every_array(storage):
    held = [vars(storage), vars(storage.codes), *(vars(chunk) for chunk in storage.chunks)]
    return [a for fields in held for a in fields.values() if isinstance(a, mx.array)]


@pytest.mark.parametrize("count", [1, 100, 700, 2000])
def test_nbytes_is_the_sum_of_every_array_it_holds(count):
    storage = filled(count)[0]
    arrays = every_array(storage)
    assert len(arrays) == 2 + len(storage.chunks)
    assert storage.nbytes == sum(a.nbytes for a in arrays) > 0
    assert {id(a) for a in storage.arrays} == {id(a) for a in arrays}


def test_nbytes_by_hand():
    storage = filled(700)[0]

    # Float32, 2 heads of 8 numbers: 4 + 32 + 16 + 64 exact places for keys and for values, 640 tokens in a chunk, each
    # with the room that is left in its last memory page, 64 bytes of it the allocator's.
    def filled_pages(nbytes, token_bytes):
        return ((nbytes + 64 + mmap.PAGESIZE - 1) // mmap.PAGESIZE * mmap.PAGESIZE - 64) // token_bytes * token_bytes

    codes = filled_pages(640 * 128, 128) // 512 * 512  # tokens in fours: a kernel fetches as many at once
    assert storage.nbytes == 2 * filled_pages(116 * 64, 64) + codes
    assert Storage(None, None, 1, 1).nbytes == 0


def test_a_snapshot_before_the_first_append_is_refused():
    with pytest.raises(ValueError, match="the cache is empty; expected keys and values; append some first"):
        raw_storage().snapshot()


def _without_exact(storage):
    storage.exact_values = None


def _more_tokens_than_places(storage):
    storage.exact_tokens = storage.exact_keys.shape[2] + 1


def _more_sinks_than_tokens(storage):
    storage.held_sinks = storage.exact_tokens + 1


def _negative_sinks(storage):
    storage.held_sinks = -1


def _fewer_values_than_keys(storage):
    storage.exact_values = storage.exact_values[:, :, :-1]


def _another_batch_of_values(storage):
    storage.exact_values = mx.concatenate([storage.exact_values] * 2)


def _fewer_words(storage):
    storage.chunks[0].words = storage.chunks[0].words[:, 1:]


def _fewer_places(storage):
    storage.chunks[0].words = storage.chunks[0].words[..., :-1]
    storage.chunks[0].tokens = storage.chunks[0].capacity + 1


def _fewer_sinks_than_asked_for(storage):
    storage.held_sinks -= 1


def _more_chunks_than_a_kernel_takes(storage):
    storage.codes.held = storage.chunks * (MAX_CHUNKS + 1)


def _another_batch_of_words(storage):
    storage.chunks[0].words = mx.concatenate([storage.chunks[0].words] * 2)


def _words_of_another_type(storage):
    storage.chunks[0].words = storage.chunks[0].words.astype(mx.int32)


def _more_packed_than_places(storage):
    storage.chunks[0].tokens = storage.chunks[0].capacity + 1


def _empty_chunk(storage):
    storage.chunks[0].tokens = 0


@pytest.mark.parametrize(
    "damage",
    [
        _without_exact, _more_tokens_than_places, _more_sinks_than_tokens, _negative_sinks, _fewer_values_than_keys,
        _another_batch_of_values, _fewer_words, _fewer_places, _another_batch_of_words, _words_of_another_type,
        _more_packed_than_places, _empty_chunk,
        _fewer_sinks_than_asked_for, _more_chunks_than_a_kernel_takes,
    ],
)  # fmt: skip
def test_check_refuses_what_does_not_fit(damage):
    storage = filled(300)[0]
    storage.check()
    damage(storage)
    with pytest.raises(ValueError, match=r"a stored cache.*; the file is damaged; make it again\."):
        storage.check()


@pytest.mark.parametrize(
    ("sizes", "fit"),
    [([(64, 64), (37, 64)], True), ([(38, 40), (8, 8)], False), ([(64, 64), (0, 8)], False), ([(9, 8)], False)],
)
def test_chunks_that_append_never_leaves_are_told_apart(sizes, fit):
    """Kernels read words of four tokens at once, and write levels of two."""
    chunks = Chunks([Chunk(mx.zeros((2, 3, room), mx.uint32), tokens) for tokens, room in sizes])
    assert chunks.fit(2, 3) is fit
    assert not chunks.fit(1, 3)
    assert not chunks.fit(2, 4)


def test_what_kernels_read_is_gathered_again_only_when_it_changes():
    codes = Chunks()
    codes.append(mx.zeros((1, 3, 600), mx.uint32))
    first = codes.packed
    assert codes.packed is first
    words, sizes = first.inputs
    assert sizes == ((600, words[0].shape[-1]),)
    given = launches.chunk_inputs(words)
    assert len(words) == 1
    assert len(given) == MAX_CHUNKS
    assert max(a.nbytes for a in given[1:]) < 64  # MLX counts the bytes of inputs
    for change in (
        lambda: codes.append(mx.ones((1, 3, 7), mx.uint32)),
        lambda: codes.write(3, mx.ones((1, 3, 1), mx.uint32)),
        lambda: codes.cut(604),
        lambda: codes.take(mx.array([0, 0])),
    ):
        before = codes.packed
        change()
        assert not codes._packed  # nothing holds what was written over
        assert codes.packed is not before
        assert [(w.tolist(), n) for w, n in codes.packed] == [(c.words.tolist(), c.tokens) for c in codes.held]


def test_handles_of_many_steps_are_traced_once(monkeypatch):
    """Until more is packed, or a block of tokens has come: a trace costs as much as a dozen layers."""
    launched = []

    def lazily(launch, place):
        launched.append(launch.body.name)
        return [mx.zeros(s, d) for s, d in zip(launch.output_shapes, launch.output_dtypes, strict=True)]

    monkeypatch.setattr(storage, "backend", lambda: "cuda")
    for name in ("trusted_codes", "trusted_arrays"):
        monkeypatch.setattr(storage, name, lambda *variant: True)
    monkeypatch.setattr(launches, "run", lazily)
    layer = random_codec().plan(2.0).layers[0]
    held = Storage(layer.keys, layer.values, window=32, sinks=4)
    heads, dims = held.key_quantizer.mean.shape[0], held.key_quantizer.mean.shape[-1]
    vectors = mx.zeros((1, heads, 1, dims))
    held.append(mx.zeros((1, heads, 250, dims)), mx.zeros((1, heads, 250, dims)))
    held.seal()
    for _ in range(BLOCK):
        keys, values = held.snapshot().decoded()
        assert keys.shape[2] == values.shape[2] == held.length
        held.append(vectors, vectors)
    assert launched == 2 * ["decode", "restore"]


def test_what_codes_are_read_with_is_found_once_until_more_are_packed(monkeypatch):
    asked = []
    monkeypatch.setattr(storage, "backend", lambda: asked.append(1) or "ops")
    layer = random_codec().plan(2.0).layers[0]
    held = Storage(layer.keys, layer.values, window=32, sinks=4)
    vectors = mx.zeros((1, layer.keys.mean.shape[0], 300, layer.keys.mean.shape[-1]))
    for seals in (1, 2):
        held.append(vectors, vectors)
        held.seal()
        for _ in range(3):
            snapshot = held.snapshot()
            assert snapshot.place == "ops"
            assert snapshot.of_keys().place == "ops"
        assert len(asked) == 2 * seals  # of keys and values, and of keys alone


@pytest.mark.parametrize("change", ["extend", "append", "write", "cut", "take"])
def test_codes_that_changed_are_other_codes(change):
    codes = Chunks()
    codes.append(mx.ones((2, 3, 8), mx.uint32))
    before = codes.packed
    assert codes.packed is before
    {
        "extend": lambda: codes.extend_to(12, 2, 3),
        "append": lambda: codes.append(mx.zeros((2, 3, 4), mx.uint32)),
        "write": lambda: codes.write(0, mx.zeros((2, 3, 4), mx.uint32)),
        "cut": lambda: codes.cut(4),
        "take": lambda: codes.take(mx.array([1])),
    }[change]()
    assert codes.packed is not before
    assert codes.packed.tokens == codes.tokens == {"extend": 12, "append": 12, "cut": 4}.get(change, 8)
    assert codes.packed[0][0] is codes.held[0].words


def test_what_codes_are_read_with_is_of_their_kinds_of_numbers():
    """Those of the exact tokens may change: a cache's keys can be set."""
    held, _, _ = filled(300)
    first = held.snapshot().once("kind", lambda: "as they were")
    held.exact_keys = held.exact_keys.astype(mx.float16)
    assert (first, held.snapshot().once("kind", lambda: "others")) == ("as they were", "others")


def test_appends_of_decoding_are_traced_once_and_those_of_prompts_never(monkeypatch):
    """A trace of every place between two seals is kept: each comes by again after the next one."""
    made, writing = [], storage._writing.__wrapped__
    monkeypatch.setattr(
        storage, "_writing", launches.kept_by_thread(256)(lambda start: made.append(start) or writing(start))
    )
    held, keys, values = raw_storage(), tokens(1, seed=1), tokens(1, seed=2)
    held.append(tokens(LAG + 1, seed=3), tokens(LAG + 1, seed=4))
    assert made == []
    for _ in range(3 * BLOCK):
        held.append(keys, values)
        held.seal()
    assert held.packed_tokens == 2 * BLOCK
    assert len(made) == len(set(made))
    assert len(made) < 2 * BLOCK


def test_as_many_traces_are_kept_as_there_are_places_between_two_seals():
    held = [storage._writing(start) for start in range(2 * BLOCK)]
    assert all(storage._writing(start) is own for start, own in enumerate(held))
