"""Bytes are real: what caches and codecs say they take, and hold at the most, is what MLX's allocator counts."""

import mlx.core as mx
import pytest
from conftest import like_calibrated, pair, random_codec
from mlx_lm.models.cache import KVCache

from vq_kvcache import attention, doctor
from vq_kvcache.cache import SpectralKVCache
from vq_kvcache.measuring import active_bytes
from vq_kvcache.spectral import intercept


def layers_of(make, tokens, step, layers=6):
    """Caches of one small model, 2 KV heads of 64 in float16, filled `step` tokens at a time and evaluated."""
    caches = [make(i) for i in range(layers)]
    for start in range(0, tokens, step):
        for cache in caches:
            cache.update_and_fetch(*(mx.random.normal((1, 2, min(step, tokens - start), 64)).astype(mx.float16),) * 2)
        mx.eval([c.state for c in caches])
    return caches


@pytest.fixture(scope="module")
def plan_of_six_layers():
    return random_codec(layers=6, heads=2, key_dims=64).plan(2.0)


@pytest.fixture
def exact_buffers():
    """MLX may serve an array from a freed buffer two pages larger, and counts it whole: nothing that we hold."""
    before = mx.set_cache_limit(0)
    yield
    mx.set_cache_limit(before)


@pytest.mark.parametrize(("tokens", "step"), [(512, 1), (512, 512), (1024, 64), (2048, 2048), (3000, 512), (4096, 512)])
def test_nbytes_is_what_memory_grows_by(plan_of_six_layers, exact_buffers, tokens, step):
    before = active_bytes()
    caches = layers_of(lambda i: SpectralKVCache(plan_of_six_layers, i), tokens, step)
    grown = active_bytes() - before
    assert grown == pytest.approx(sum(c.nbytes for c in caches), rel=0.01)


def test_codec_bytes_are_what_a_plan_takes(exact_buffers):
    codec = random_codec(layers=6, heads=2, key_dims=64)
    before = active_bytes()
    plan = codec.plan(2.0)
    told = sum(SpectralKVCache(plan, i).stats()["codec_bytes"] for i in range(6))
    # Transforms are float32: per layer, K or V, and head a mean of 64, and two matrices of 64 by the stored dimensions.
    stored = sum(q.layout.stored for layer in plan.layers.values() for q in (layer.keys, layer.values))
    # The drift monitor's: eight dropped dimensions' columns of 64, and a weight of each stored dimension.
    watched = 4 * 2 * (6 * 2 * 64 * 8 + stored)
    transforms = 4 * 2 * (6 * 2 * 64 + 2 * 64 * stored)
    assert 0 < told - transforms - watched < 0.05 * told  # the rest: the layout's index tables
    assert active_bytes() - before == pytest.approx(told, rel=0.01)


@pytest.mark.parametrize("step", [512, 2048, 64])
def test_two_bits_take_a_fifth_of_full_precision(plan_of_six_layers, step):
    ours = layers_of(lambda i: SpectralKVCache(plan_of_six_layers, i), 4096, step, layers=1)
    theirs = layers_of(lambda i: KVCache(), 4096, 2048, layers=1)
    assert theirs[0].nbytes == 4096 * 2 * 2 * 64 * 2
    assert ours[0].nbytes <= 0.20 * theirs[0].nbytes


def test_decoding_never_holds_more_than_one_tile(plan_of_six_layers):
    """4,096 tokens are many tiles of keys and of values, in each of six layers: one at a time is unpacked."""
    caches = layers_of(lambda i: SpectralKVCache(plan_of_six_layers, i), 4096, 2048)
    windows = sum(c.keys.nbytes + c.values.nbytes for c in caches)
    highest = 0
    with intercept.dispatching():
        for _ in range(50):
            x = mx.random.normal((1, 4, 1, 64)).astype(mx.float16)
            mx.eval(x)
            before = active_bytes()
            mx.reset_peak_memory()
            for cache in caches:
                handles = cache.update_and_fetch(x[:, :2], x[:, 2:])
                x = mx.fast.scaled_dot_product_attention(x, *handles, scale=0.125)
            del handles
            mx.eval(x, [c.state for c in caches])
            highest = max(highest, mx.get_peak_memory() - before)
    assert highest <= attention.TILE_BYTES + windows


@pytest.mark.parametrize("cores", [1, 2])
def test_a_large_layer_is_decoded_within_the_bytes_of_its_tiles(monkeypatch, exact_buffers, cores):
    """A quarter of 24 MB, wherever the heads are computed."""
    monkeypatch.setattr(attention, "CORES", cores)
    held = doctor.snapshot(doctor.Case(128, 128, heads=4, tokens=6000))
    queries = mx.random.normal((1, 16, 1, 128))
    allowed = attention._tile_bytes(held)
    assert 5 << 20 < allowed < 7 << 20
    mx.eval(queries, held.exact_keys, held.exact_values, [words for words, _ in held.packed])
    highest = 0
    for _ in range(5):
        before = active_bytes()
        mx.reset_peak_memory()
        result = attention.attend_ops(held, queries, 0.1)
        mx.eval(result)
        del result
        highest = max(highest, mx.get_peak_memory() - before)
    assert highest <= allowed


@pytest.mark.parametrize("count", [0, 3, 100, 500])
def test_stats_add_up(packed, count):
    cache = packed()
    for start in range(0, count, 50):
        cache.update_and_fetch(*pair(min(50, count - start), seed=start))
    stats = cache.stats()
    assert stats["packed_tokens"] + stats["exact_tokens"] == cache.offset == count
    assert stats["packed_tokens"] == max(0, count - 52) // 64 * 64
    assert stats["code_bytes"] + stats["sink_bytes"] + stats["window_bytes"] == cache.nbytes
    assert stats["sink_bytes"] == min(4, count) * 2 * 2 * 32 * 2
    layer = cache._plan.layers[0]
    assert stats["codec_bytes"] == layer.keys.nbytes + layer.values.nbytes > 0
    assert (stats["code_bytes"] > 0) == (count > 116)


def test_the_lossless_codec_takes_no_bytes(lossless):
    assert lossless().stats()["codec_bytes"] == 0


def test_bits_are_kept_within_the_budget(codec):
    """Stored words of 1,024 packed tokens, padding included, against numbers x bits."""
    for bits in (1.0, 2.0, 3.5, 8.0):
        cache = SpectralKVCache(codec.plan(bits), 0, 0, 0)
        keys, values = (like_calibrated(t, 1, 1024 + 16, i) for i, t in enumerate(codec.layers[0]))
        cache.update_and_fetch(keys, values)
        assert cache.stats()["packed_tokens"] == 1024
        places = cache._storage.chunks[0].capacity
        assert 0.95 * bits <= cache.stats()["code_bytes"] * 8 / (places * 2 * 2 * 32) <= bits
