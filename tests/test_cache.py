"""SpectralKVCache keeps mlx-lm's cache contract: in lossless mode every behaviour is that of mlx-lm's own KVCache."""

import copy

import mlx.core as mx
import numpy as np
import pytest
from conftest import Feed, numpy, pair
from mlx_lm.models.cache import KVCache, QuantizedKVCache

from vq_kvcache import attention
from vq_kvcache.cache import LOSSLESS, CacheOptions, Planned, SpectralKVCache
from vq_kvcache.spectral import intercept
from vq_kvcache.spectral.codec import CodecError
from vq_kvcache.spectral.intercept import Handle

WINDOW = 32  # with 4 sinks, 116 tokens are the first to leave a packed block


# The contract. Each row is given a fresh cache and the feed, and tells what it saw.


def append_one(cache, feed):
    return [feed(cache, 1) for _ in range(120)]


def from_state(cache):
    """A cache of the same kind from what this one would save; mlx-lm before 0.32 asks for two things."""
    return type(cache).from_state(*[getattr(cache, n) for n in ("state", "meta_state") if n in dir(KVCache)])


def append_many(cache, feed):
    return [feed(cache, n) for n in (300, 70, 1, 17, 16, 5)]


def fetch_again(cache, feed):
    feed(cache, 200)
    again = fetched(cache)
    return [again, feed(cache, 3), fetched(cache)]


def fetched(cache):
    # The KVCache of mlx-lm before 0.32 has no keys_and_values; its models read `state` for it.
    held = cache.keys_and_values() if hasattr(cache, "keys_and_values") else cache.state
    return tuple(numpy(x) for x in held)


def trim_across_the_window(cache, feed):
    return [feed(cache, 200), cache.trim(20), cache.offset, feed(cache, 7), cache.trim(7), feed(cache, 90)]


def trim_into_codes(cache, feed):
    return [feed(cache, 300), cache.trim(180), cache.offset, feed(cache, 2), cache.trim(1), feed(cache, 130)]


def trim_again_and_again(cache, feed):
    seen = [feed(cache, 250)]
    for n in (3, 16, 40, 100, 60):
        seen += [cache.trim(n), cache.size(), feed(cache, 9)]
    return seen


def trim_everything(cache, feed):
    return [feed(cache, 200), cache.trim(200), cache.offset, cache.empty(), feed(cache, 150), cache.size()]


def trim_more_than_everything(cache, feed):
    return [cache.trim(3), feed(cache, 150), cache.trim(1000), cache.trim(1), cache.offset, feed(cache, 2)]


def state_round_trip(cache, feed):
    feed(cache, 200)
    mx.eval(cache.state)
    again = from_state(cache)
    return [again.offset, feed(again, 130), again.trim(50), feed(again, 1), feed(cache, 1)]


def state_set(cache, feed):
    feed(cache, 200)
    state = copy.deepcopy(cache.state)
    feed(cache, 100)
    cache.state = state
    return [cache.offset, feed(cache, 1)]


def states_are_evaluated(cache, feed):
    seen = []
    for n in (100, 100, 1, 1):
        fetched = feed(cache, n)
        mx.eval([cache.state])
        seen.append(fetched)
    return seen


def emptiness(cache, feed):
    before = [cache.empty(), cache.size(), cache.offset, cache.nbytes, cache.keys, cache.values]
    feed(cache, 1)
    return [*before, cache.empty(), cache.size(), cache.offset]


def deep_copies_part(cache, feed):
    feed(cache, 200)
    twin = copy.deepcopy(cache)
    seen = [feed(twin, 90), cache.offset, feed(cache, 1), twin.offset]
    seen += [cache.trim(150), feed(cache, 100), feed(twin, 1), twin.trim(120), feed(twin, 2), feed(cache, 1)]
    return seen


def an_empty_deep_copy(cache, feed):
    twin = copy.deepcopy(cache)
    return [feed(twin, 150), cache.empty(), cache.offset, feed(cache, 2)]


def dependencies(cache, feed):
    feed(cache, 200)
    cache.keys = mx.depends(cache.keys, mx.ones((3,)) * 2)
    cache.values = mx.depends(cache.values, mx.ones((3,)) * 2)
    return [feed(cache, 1), feed(cache, 90)]


def new_keys(cache, feed):
    feed(cache, 100)
    cache.keys, cache.values = cache.keys * 2, cache.values + 1
    return [feed(cache, 1), feed(cache, 90)]


def sizes(cache, feed):
    seen = []
    for n in (1, 60, 200):
        feed(cache, n)
        seen += [cache.size(), cache.offset, cache.is_trimmable(), type(cache.offset)]
    return seen


def masks(cache, feed):
    seen = []
    for count in (0, 150):
        if count:
            feed(cache, count)
        for n in (1, 5):
            for options in ({}, {"return_array": True}, {"window_size": 3}, {"window_size": 3, "return_array": True}):
                mask = cache.make_mask(n, **{"return_array": False, "window_size": None, **options})
                seen.append(np.array(mask) if isinstance(mask, mx.array) else mask)
    return seen


ROWS = [
    append_one, append_many, fetch_again, trim_across_the_window, trim_into_codes, trim_again_and_again,
    trim_everything, trim_more_than_everything, state_round_trip, state_set, states_are_evaluated, emptiness,
    deep_copies_part, an_empty_deep_copy, dependencies, new_keys, sizes, masks,
]  # fmt: skip


def flat(seen):
    return [x for entry in seen for x in (flat(entry) if isinstance(entry, list | tuple) else [entry])]


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("row", ROWS)
def test_it_does_what_mlx_lm_does(row, batch, lossless, full):
    feed = Feed(batch)
    ours, theirs = flat(row(lossless(WINDOW), feed)), flat(row(full(), feed))
    assert len(ours) == len(theirs) > 0
    for mine, other in zip(ours, theirs, strict=True):
        assert type(mine) is type(other)
        if isinstance(other, np.ndarray):
            np.testing.assert_array_equal(mine, other)
        else:
            assert mine == other


@pytest.mark.parametrize("dims", [(32, 32), (24, 16), (5, 0)])
@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16, mx.float32, mx.int32])
def test_any_dimensions_and_types(dims, dtype, lossless, full):
    ours, theirs = lossless(0, 0), full()
    for seed in range(3):
        x = [(a * 1000).astype(dtype) for a in pair(90, seed=seed, dims=dims, dtype=mx.float32)]
        for mine, other in zip(ours.update_and_fetch(*x), theirs.update_and_fetch(*x), strict=True):
            assert mine.dtype == other.dtype
            assert mine.shape == other.shape
            np.testing.assert_array_equal(np.array(mine.astype(mx.float32)), np.array(other.astype(mx.float32)))
    assert ours.stats()["packed_tokens"] == 192


def test_the_rows_above_really_pack_something(lossless):
    cache = lossless(WINDOW)
    Feed(1)(cache, 115)
    assert cache.stats()["packed_tokens"] == 0
    Feed(1)(cache, 1)
    assert cache.stats()["packed_tokens"] == 64


# The members.


def unseen_members():
    """Public names that KVCache, or an instance of it, has and SpectralKVCache does not define itself."""
    names = {n for n in dir(KVCache) if not n.startswith("_")} | set(vars(KVCache()))
    return names - set(vars(SpectralKVCache)) - set(vars(Planned))


def test_nothing_of_mlx_lms_cache_is_inherited_unseen(monkeypatch):
    assert {"update_and_fetch", "keys", "values", "offset", "to_quantized"} <= set(dir(KVCache)) | set(vars(KVCache()))
    assert unseen_members() == set()
    monkeypatch.setattr(KVCache, "brand_new", lambda self: None, raising=False)
    assert unseen_members() == {"brand_new"}


@pytest.mark.parametrize("count", [0, 200])
def test_what_mlx_lm_dispatches_on_is_hidden(lossless, count):
    cache = lossless()
    if count:
        Feed(1)(cache, count)
    for name in ("to_quantized", "bits", "group_size", "__len__", "__bool__"):
        assert not hasattr(cache, name)
    assert isinstance(cache, KVCache)
    with pytest.raises(AttributeError, match="a SpectralKVCache is quantized already; expected no --kv-bits"):
        cache.to_quantized(group_size=64, bits=4)


def test_keys_are_set_only_where_there_are_some(lossless):
    cache = lossless()
    assert cache.keys is cache.values is None
    for name in ("keys", "values"):
        with pytest.raises(ValueError, match="the cache is empty; expected keys and values; append some first"):
            setattr(cache, name, mx.zeros((1, 2, 3, 4)))
    with pytest.raises(ValueError, match="the cache is empty; expected keys and values; append some first"):
        cache.keys_and_values()


# To and from mlx-lm's own cache.


@pytest.mark.parametrize("count", [0, 1, 100, 300])
def test_from_and_to_mlx_lms_cache(lossless, full, count):
    theirs, feed = full(), Feed(1)
    if count:
        feed(theirs, count)
    ours = SpectralKVCache.from_cache(theirs, lossless(WINDOW))
    assert ours.offset == count
    assert ours.stats()["packed_tokens"] == max(0, count - 4 - WINDOW - 16) // 64 * 64
    back = ours.to_kvcache()
    assert type(back) is KVCache
    assert back.offset == count
    for x, y in zip(feed(back, 3), feed(theirs, 3), strict=True):
        np.testing.assert_array_equal(x, y)


def test_from_cache_takes_the_settings_of_another(packed, full):
    theirs = full()
    Feed(1, (32, 32))(theirs, 300)
    like = packed(window=64, sinks=2)
    ours = SpectralKVCache.from_cache(theirs, like)
    assert ours.stats()["packed_tokens"] == (300 - 2 - 64 - 16) // 64 * 64
    assert ours.stats()["codec_bytes"] == like.stats()["codec_bytes"] > 0


@pytest.mark.parametrize("make", [QuantizedKVCache, lambda: SpectralKVCache(LOSSLESS), dict])
def test_from_cache_takes_nothing_else(make, lossless):
    with pytest.raises(ValueError, match=r"a (QuantizedKVCache|SpectralKVCache|dict) was given; expected mlx-lm's KV"):
        SpectralKVCache.from_cache(make(), lossless())


# Handles.


def test_handles_are_the_decoded_arrays_and_attend_from_the_codes(packed, monkeypatch):
    cache = packed()
    fetched = [cache.update_and_fetch(*pair(n, seed=n)) for n in (250, 5)][-1]
    assert all(isinstance(x, Handle) for x in fetched)
    snapshot = cache._storage.snapshot()
    for handle, decoded in zip(fetched, snapshot.decoded(), strict=True):
        assert handle.shape == (1, 2, 255, 32)
        assert handle.dtype == mx.float16
        assert mx.array_equal(handle, decoded)
    queries = mx.random.normal((1, 4, 5, 32)).astype(mx.float16)
    expected = attention.attend(snapshot, queries, 0.2, "causal")
    monkeypatch.setattr(type(snapshot), "decoded", None)  # attending decodes no more than a tile
    with intercept.dispatching():
        result = mx.fast.scaled_dot_product_attention(queries, *fetched, scale=0.2, mask="causal")
    assert mx.array_equal(result, expected)


def test_before_anything_is_packed_there_are_plain_arrays(packed):
    cache = packed()
    for fetched in (cache.update_and_fetch(*pair(100)), cache.keys_and_values()):
        assert [type(x) for x in fetched] == [mx.array] * 2


@pytest.mark.parametrize("swap", ["values twice", "the other way round", "values of another append"])
def test_unusual_pairs_of_handles_are_taken_for_arrays(packed, swap):
    cache = packed()
    cache.update_and_fetch(*pair(245))
    keys, values = cache.update_and_fetch(*pair(5, seed=1))
    again = cache.keys_and_values()
    assert all(isinstance(x, Handle) for x in (keys, values, *again))
    keys, values = {
        "values twice": (values, values), "the other way round": (values, keys),
        "values of another append": (keys, again[1]),
    }[swap]  # fmt: skip
    queries = mx.random.normal((1, 4, 5, 32)).astype(mx.float16)
    expected = intercept.original_attention()(queries, mx.array(keys), mx.array(values), scale=0.2, mask="causal")
    with intercept.dispatching():
        result = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=0.2, mask="causal")
    assert mx.array_equal(result, expected)


def test_a_long_prompt_chunk_sees_itself_exact(packed):
    keys, values = pair(300)
    cache = packed()
    first = cache.update_and_fetch(keys[:, :, :200], values[:, :, :200])
    np.testing.assert_array_equal(numpy(first[0]), numpy(keys[:, :, :200]))
    second = cache.update_and_fetch(keys[:, :, 200:], values[:, :, 200:])
    wrong = (numpy(second[0]) != numpy(keys)).any(axis=(0, 1, 3))
    assert wrong.tolist() == [False] * 4 + [True] * 128 + [False] * 168
    third = cache.update_and_fetch(*pair(16, seed=1))  # as many as a seal lags: packed first
    assert (numpy(third[0])[:, :, :300] != numpy(keys)).any(axis=(0, 1, 3)).sum() == 256 - 64 + 64


# Options.


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"bits_per_value": 0.2}, r"bits_per_value is 0\.2; expected a number from 0\.25 to 8, or one for keys"),
        ({"bits_per_value": 9}, r"bits_per_value is 9; expected a number from 0\.25 to 8, or one for keys"),
        ({"bits_per_value": "2"}, r"bits_per_value is '2'; expected a number from 0\.25 to 8, or one for keys"),
        (
            {"bits_per_value": float("nan")},
            r"bits_per_value is nan; expected a number from 0\.25 to 8, or one for keys",
        ),
        ({"window": -1}, r"window is -1; expected a whole number of tokens, 0 or more\."),
        ({"window": 1.5}, r"window is 1\.5; expected a whole number of tokens, 0 or more\."),
        ({"window": True}, r"window is True; expected a whole number of tokens, 0 or more\."),
        ({"sinks": -4}, r"sinks is -4; expected a whole number of tokens, 0 or more\."),
        ({"sinks": "4"}, r"sinks is '4'; expected a whole number of tokens, 0 or more\."),
        ({"codec": 3}, r"codec is a int; expected a Codec, a file name or None\."),
    ],
)
def test_options_out_of_range(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        SpectralKVCache.with_options(**options)


def test_options(codec, tmp_path):
    assert SpectralKVCache.with_options() == CacheOptions(2.0, 128, 4, None, False)
    options = SpectralKVCache.with_options(8, 0, 0, codec, True)
    assert options == CacheOptions(bits_per_value=8, window=0, sinks=0, codec=codec, lossless=True)
    assert SpectralKVCache.with_options(0.25, codec=tmp_path / "some.safetensors").window == 128


def test_a_cache_needs_a_plan_that_has_its_layer(codec):
    with pytest.raises(ValueError, match="SpectralKVCache was made without a plan; expected a codec's; use vq_kvcache"):
        SpectralKVCache()
    with pytest.raises(CodecError, match=r"the codec has no layer 7; it has \[0, 1\]; use this model's codec\."):
        SpectralKVCache(codec.plan(2.0), layer=7)


@pytest.mark.parametrize(
    ("heads", "dims", "sentence"),
    [
        (3, (32, 32), r"keys have 3 heads of 32; the codec is for 2 of 32; use this model's codec\."),
        (2, (16, 32), r"keys have 2 heads of 16; the codec is for 2 of 32; use this model's codec\."),
        (2, (32, 64), r"values have 2 heads of 64; the codec is for 2 of 32; use this model's codec\."),
    ],
)
def test_keys_and_values_of_another_shape_are_refused(packed, heads, dims, sentence):
    cache = packed()
    with pytest.raises(CodecError, match=sentence):
        cache.update_and_fetch(*pair(3, heads=heads, dims=dims))
    assert cache.empty()
