"""attend and attend_reference against float64 softmax attention over the very tokens that the snapshot holds."""

import concurrent.futures
import dataclasses
import functools
import gc
import os
import subprocess
import sys

import mlx.core as mx
import numpy as np
import oracle
import pytest
from conftest import like_calibrated, random_codec

from vq_kvcache import attention, batch_cache, cache
from vq_kvcache.attention import attend, attend_reference
from vq_kvcache.chunks import Packed
from vq_kvcache.spectral.sealing import LAG
from vq_kvcache.spectral.spectral_quant import RawQuantizer
from vq_kvcache.storage import Snapshot, Storage

DTYPES = {"float16": mx.float16, "bfloat16": mx.bfloat16, "float32": mx.float32}
TOKENS = 450  # 4 sinks, 256 packed, 190 exact; tiles are of 64 at least
PACKED = 256
FLOAT32_ERROR = 1e-5  # of results in float32 whose values are of size 10: some units in the last place


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    monkeypatch.setattr(attention, "TILE_BYTES", 1 << 14)


codec_of = functools.cache(random_codec)


@functools.cache
def snapshot_of(kind, heads=2, key_dims=64, value_dims=None, dtype="float32", batch=1, bits=2.0):
    """A snapshot of TOKENS tokens, appended in two prompts; `kind` is raw or spectral."""
    codec = codec_of(heads=heads, key_dims=key_dims, value_dims=value_dims)
    keys, values = (like_calibrated(t, batch, TOKENS, i, DTYPES[dtype]) for i, t in enumerate(codec.layers[0]))
    if kind == "raw":
        pair = tuple(RawQuantizer(heads, x.shape[-1], x.dtype) for x in (keys, values))
    else:
        pair = codec.plan(bits).layers[0].keys, codec.plan(bits).layers[0].values
    storage = Storage(*pair, 150, 4)
    for start, end in ((0, 200), (200, TOKENS)):
        storage.append(keys[:, :, start:end], values[:, :, start:end])
        storage.seal()
    assert storage.packed_tokens == PACKED
    return storage.snapshot()


def queries_for(snapshot, length, groups=3, seed=9, dtype="float32"):
    batch, heads, _, dims = snapshot.exact_keys.shape
    x = np.random.default_rng(seed).normal(size=(batch, heads * groups, length, dims)).astype(np.float32)
    return mx.array(x).astype(DTYPES[dtype])


def masks(length, heads, tokens=TOKENS, batch=1):
    """Every kind of mask that mlx-lm's models pass, some of them with whole tiles hidden."""
    generator = np.random.default_rng(length)
    some = generator.random((batch, heads, length, tokens)) < 0.3
    some[..., -1] = True
    causal = np.arange(length)[:, None] + (tokens - length) >= np.arange(tokens)
    newest = causal & (np.arange(tokens) > np.arange(length)[:, None] + tokens - length - 10)
    return {
        "none": None,
        "causal": "causal",
        "bool causal": causal,
        "bool newest ten": newest,
        "bool 1-D": some[0, 0, -1],
        "bool 2-D": some[0, 0],
        "bool 4-D": some[:, :1],
        "bool per head": some,
        "bool per head, one row": some[:, :, -1:],
        "additive 4-D": generator.normal(size=(1, 1, length, tokens)).astype(np.float32),
        "additive per head, hiding": np.where(some, generator.normal(size=some.shape), -np.inf).astype(np.float32),
        "additive, lowest float16": np.where(some[:, :1], 0, -65504.0).astype(np.float32),
        "additive per row": np.full((1, 1, length, 1), 3.0, np.float32),
    }


MASKS = sorted(masks(1, 1))


def numpy(x):
    return np.array(x.astype(mx.float32), dtype=np.float64)


def as_mask(mask, dtype="float32"):
    if mask is None or isinstance(mask, str):
        return mask
    array = mx.array(mask)
    return array if array.dtype == mx.bool_ else array.astype(DTYPES[dtype])


def error_of(result, snapshot, queries, scale, mask=None, sinks=None):
    """Largest error of a result [B, Hq, L, Dv] against float64 attention over the decoded arrays."""
    keys, values = (numpy(x) for x in snapshot.decoded())
    expected = oracle.attention(numpy(queries), keys, values, scale, mask, None if sinks is None else numpy(sinks))
    assert result.shape == expected.shape
    return np.abs(numpy(result) - expected).max()


def assert_no_worse_than_mlx(snapshot, queries, mask=None, sinks=None, dtype="float32"):
    """attend errs at most twice as much as MLX's own attention over the decoded arrays does."""
    scale = queries.shape[-1] ** -0.5
    options = {"scale": scale, "mask": as_mask(mask, dtype), "sinks": sinks}
    keys, values = snapshot.decoded()
    bound = error_of(mx.fast.scaled_dot_product_attention(queries, keys, values, **options), snapshot, queries,
                     scale, mask, sinks)  # fmt: skip
    result = attend(snapshot, queries, **options)
    assert result.dtype == queries.dtype
    assert error_of(result, snapshot, queries, scale, mask, sinks) <= 2 * bound + 1e-6


def test_the_reference_attends_to_the_tokens_that_were_appended():
    codec = codec_of(heads=2, key_dims=64, value_dims=None)
    keys, values = (numpy(like_calibrated(t, 1, TOKENS, i)) for i, t in enumerate(codec.layers[0]))
    snapshot = snapshot_of("raw")
    for held, appended in zip(snapshot.decoded(), (keys, values), strict=True):
        np.testing.assert_array_equal(numpy(held), appended)
    for length, mask in ((1, None), (5, "causal")):
        queries = queries_for(snapshot, length)
        expected = oracle.attention(numpy(queries), keys, values, 0.125, mask)
        np.testing.assert_allclose(
            numpy(attend_reference(snapshot, queries, 0.125, mask)), expected, atol=FLOAT32_ERROR
        )


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("length", [1, 2, 5, 16, 40])
@pytest.mark.parametrize("kind", ["raw", "spectral"])
def test_every_mask_at_every_length(kind, length, name):
    snapshot = snapshot_of(kind)
    mask = masks(length, 6)[name]
    queries = queries_for(snapshot, length)
    assert_no_worse_than_mlx(snapshot, queries, mask)
    reference = attend_reference(snapshot, queries, 0.125, as_mask(mask))
    assert error_of(reference, snapshot, queries, 0.125, mask) < FLOAT32_ERROR


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize("kind", ["raw", "spectral"])
@pytest.mark.parametrize(("key_dims", "value_dims"), [(64, 64), (80, 80), (128, 128), (96, 64)])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_heads_dimensions_and_types(groups, key_dims, value_dims, kind, dtype):
    snapshot = snapshot_of(kind, 2, key_dims, value_dims, dtype)
    queries = queries_for(snapshot, 3, groups, dtype=dtype)
    assert_no_worse_than_mlx(snapshot, queries, "causal", dtype=dtype)


@pytest.mark.parametrize("name", ["causal", "bool per head", "bool 4-D"])
@pytest.mark.parametrize("kind", ["raw", "spectral"])
def test_batches(kind, name):
    snapshot = snapshot_of(kind, batch=2)
    queries = queries_for(snapshot, 5)
    assert_no_worse_than_mlx(snapshot, queries, masks(5, 6, batch=2)[name])


@pytest.mark.parametrize("dtype", sorted(DTYPES))
@pytest.mark.parametrize(("length", "name"), [(1, "none"), (5, "causal"), (40, "bool newest ten")])
def test_sink_logits_take_weight_and_give_nothing(length, name, dtype):
    snapshot = snapshot_of("spectral", dtype=dtype)
    queries = queries_for(snapshot, length, dtype=dtype)
    sinks = mx.array([-3.0, 0.0, 4.0, 30.0, 1.0, -1.0]).astype(DTYPES[dtype])
    mask = masks(length, 6)[name]
    assert_no_worse_than_mlx(snapshot, queries, mask, sinks, dtype)
    without = attend(snapshot, queries, 0.125, as_mask(mask))
    assert float(mx.abs(attend(snapshot, queries, 0.125, as_mask(mask), sinks) - without).max()) > 0.1


def test_float32_queries_over_a_float16_cache():
    raw = snapshot_of("raw", dtype="float16")
    queries = queries_for(raw, 2)
    assert_no_worse_than_mlx(raw, queries, "causal")
    snapshot = snapshot_of("spectral", dtype="float16")
    end = snapshot.layout.window_end
    exact = (snapshot.exact_keys[:, :, :end], snapshot.exact_values[:, :, :end])
    # The codes themselves mean more than the float16 numbers that `decoded` rounds them to.
    middle = [q.decode_words(w) for q, w in zip((snapshot.key_quantizer, snapshot.value_quantizer),
                                                snapshot.words(0, PACKED), strict=True)]  # fmt: skip
    keys, values = (mx.concatenate([e[:, :, :4], m, e[:, :, 4:]], 2) for e, m in zip(exact, middle, strict=True))
    expected = oracle.attention(numpy(queries), numpy(keys), numpy(values), 0.125, "causal")
    np.testing.assert_allclose(numpy(attend(snapshot, queries, 0.125, "causal")), expected, atol=FLOAT32_ERROR)


@pytest.mark.parametrize("length", [1, 4, 40])
def test_rows_that_see_nothing_harm_no_other(length):
    snapshot = snapshot_of("spectral")
    mask = masks(length, 6)["bool per head"]
    mask[0, 0, 0] = False
    mask[0, 3] = False
    mask[0, 3, -1, 5] = length > 1  # the newest query of the last head sees one packed token
    queries = queries_for(snapshot, length)
    result = numpy(attend(snapshot, queries, 0.125, as_mask(mask)))
    assert np.isfinite(result).all()
    seeing = mask[0].any(axis=-1)
    assert 0 < seeing.sum() < seeing.size
    with np.errstate(invalid="ignore"):
        expected = oracle.attention(numpy(queries), *map(numpy, snapshot.decoded()), 0.125, mask)
    np.testing.assert_allclose(result[0][seeing], expected[0][seeing], atol=FLOAT32_ERROR)


@pytest.mark.parametrize("visible", [slice(0, 4), slice(3, 5), slice(130, 132), slice(258, 262), slice(449, 450)])
def test_a_few_visible_tokens_anywhere(visible):
    snapshot = snapshot_of("spectral")
    mask = np.zeros((2, TOKENS), bool)
    mask[:, visible] = True
    assert_no_worse_than_mlx(snapshot, queries_for(snapshot, 2), mask)


@pytest.mark.parametrize("scale", [1.0, 8.0])
def test_scores_far_apart_do_not_overflow(scale):
    snapshot = snapshot_of("spectral")
    queries = queries_for(snapshot, 2) * 10
    result = attend(snapshot, queries, scale, "causal")
    assert error_of(result, snapshot, queries, scale, "causal") < 2e-3 * scale


def trimmed(window, sinks, trim):
    """A raw storage of 250 tokens after a trim, which may leave no window or nothing exact at all."""
    storage = Storage(RawQuantizer(2, 16, mx.float32), RawQuantizer(2, 16, mx.float32), window, sinks)
    generator = np.random.default_rng(0)
    storage.append(*(mx.array(generator.normal(size=(1, 2, 250, 16)).astype(np.float32)) for _ in range(2)))
    storage.seal()
    storage.trim(trim)
    return storage.snapshot()


@pytest.mark.parametrize(
    ("window", "sinks", "trim", "exact", "packed"),
    [(0, 0, 58, 0, 192), (0, 4, 54, 4, 192), (0, 4, 100, 4, 146), (20, 0, 5, 53, 192), (0, 0, 249, 0, 1)],
)
def test_whatever_part_is_missing(window, sinks, trim, exact, packed):
    snapshot = trimmed(window, sinks, trim)
    assert (snapshot.layout.window_end, snapshot.packed_tokens) == (exact, packed)
    for length in (1, 4):
        assert_no_worse_than_mlx(snapshot, queries_for(snapshot, length), "causal" if length <= packed else None)


def test_with_nothing_packed_it_is_the_original_attention():
    storage = Storage(RawQuantizer(2, 16, mx.float32), RawQuantizer(2, 16, mx.float32), 128, 4)
    keys, values = (mx.random.normal((1, 2, 50, 16)) for _ in range(2))
    storage.append(keys, values)
    snapshot = storage.snapshot()
    queries = queries_for(snapshot, 3)
    expected = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=0.25, mask="causal")
    assert mx.array_equal(attend(snapshot, queries, 0.25, "causal"), expected)


@pytest.mark.parametrize("tile_bytes", [1 << 14, 1 << 17, 1 << 20])
@pytest.mark.parametrize("cores", [1, 2])
@pytest.mark.parametrize(("length", "groups"), [(1, 1), (1, 4), (16, 2), (40, 4)])
def test_a_tile_decodes_no_more_than_its_bytes(monkeypatch, tile_bytes, cores, length, groups):
    monkeypatch.setattr(attention, "TILE_BYTES", tile_bytes)
    monkeypatch.setattr(attention, "LARGE_TILE_BYTES", tile_bytes)
    monkeypatch.setattr(attention, "CORES", cores)
    asked = []
    original = Snapshot.words
    monkeypatch.setattr(Snapshot, "words", lambda self, a, b: asked.append((a, b)) or original(self, a, b))
    snapshot = snapshot_of("spectral")
    result = attend(snapshot, queries_for(snapshot, length, groups), 0.125, "causal")
    passes = 2 // cores  # two heads, one on each core
    for own in (asked[i * len(asked) // passes : (i + 1) * len(asked) // passes] for i in range(passes)):
        assert [a for a, _ in own] == [0, *(b for _, b in own[:-1])]
        assert own[-1][1] == PACKED
    largest = max(b - a for a, b in asked)
    rows = 64 * attention.COPIES, cores * groups * length  # numbers of a token's unpacking, and of its scores
    assert largest == 64 or largest * max(rows) * 4 <= tile_bytes
    assert largest == PACKED or (largest + 64) * max(rows) * 4 > tile_bytes  # nor much less
    assert error_of(result, snapshot, queries_for(snapshot, length, groups), 0.125, "causal") < FLOAT32_ERROR


@pytest.mark.parametrize(("tokens", "expected"), [(1, 1 << 14), (1 << 9, 1 << 17), (1 << 20, 1 << 18)])
def test_a_large_layer_is_decoded_in_larger_tiles(monkeypatch, tokens, expected):
    """A quarter of 2 heads' keys and values of 64 in float32, between the two bounds."""
    monkeypatch.setattr(attention, "LARGE_TILE_BYTES", 1 << 18)
    large = dataclasses.replace(snapshot_of("spectral"), packed=Packed([(mx.zeros((1, 1, 1)), tokens)]))
    assert attention._tile_bytes(large) == expected


@pytest.mark.parametrize("length", [1, 20])
@pytest.mark.parametrize("heads", [1, 3])
def test_any_number_of_cores_gives_the_same_numbers(monkeypatch, heads, length):
    snapshot = snapshot_of("spectral", heads=heads)
    queries = queries_for(snapshot, length)
    results = []
    for cores in (1, 2, 64):
        monkeypatch.setattr(attention, "CORES", cores)
        # The same tiles: sums in another order are other numbers.
        monkeypatch.setattr(attention, "_tile_tokens", lambda *_: 64)
        results.append(np.array(attend(snapshot, queries, 0.125, "causal")))
    assert (results[0] == results[1]).all()
    assert (results[0] == results[2]).all()


def test_several_threads_attend_at_once(monkeypatch):
    """Each thread has streams of its own, and other numbers to work on."""
    monkeypatch.setattr(attention, "CORES", 4)
    snapshot = snapshot_of("spectral", heads=4)
    mx.eval(snapshot.exact_keys, snapshot.exact_values, [words for words, _ in snapshot.packed])
    given = [np.array(queries_for(snapshot, 1, seed=seed)) for seed in range(4)]
    expected = [np.array(attend(snapshot, mx.array(q), 0.125)) for q in given]

    def work(index):
        return [np.array(attend(snapshot, mx.array(given[index]), 0.125)) for _ in range(20)]

    with concurrent.futures.ThreadPoolExecutor(4) as threads:
        for index, results in enumerate(threads.map(work, range(4))):
            assert all((result == expected[index]).all() for result in results)


WITHOUT_COMPILER = """
import sys
import mlx.core as mx
import numpy as np
from vq_kvcache import doctor
from vq_kvcache.attention import attend, attend_reference
held = doctor.snapshot(doctor.Case(bits=float(sys.argv[1])))
queries = mx.array(np.random.default_rng(0).normal(size=(1, 8, 1, 64)).astype(np.float32))
found, expected = (np.array(f(held, queries, 0.125)) for f in (attend, attend_reference))
print(abs(found - expected).max())
"""


@pytest.mark.parametrize("bits", ["2.25", "7.75"])
def test_it_works_without_a_compiler(tmp_path, bits):
    """MLX compiles kernels for a CPU with g++ when it first runs them; without one, operations stay apart."""
    environment = {k: v for k, v in os.environ.items() if k != "MLX_DISABLE_COMPILE"}
    environment |= {"PATH": str(tmp_path), "TMPDIR": str(tmp_path), "VQ_KVCACHE_BACKEND": "ops"}
    command = [sys.executable, "-c", WITHOUT_COMPILER, bits]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.01  # the exact tokens, and so the reference, are in float16
    assert not list(tmp_path.rglob("*.so"))  # nothing was compiled


def test_only_a_gpu_is_waited_for_and_nothing_while_tracing(monkeypatch):
    waited = []
    x = mx.zeros(3)
    with monkeypatch.context() as patched:
        patched.setattr(mx, "eval", waited.append)
        attention.wait_for(x)
        attention.keep_pace(x)
        assert not waited
        patched.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
        attention.wait_for(x)
        assert len(waited) == 1

    def traced(y):
        attention.wait_for(y)
        attention.keep_pace(y)
        return y + 1

    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(attention, "LARGE_CHUNK", 1)
    assert mx.compile(traced)(x).tolist() == [1, 1, 1]


def test_large_pieces_of_a_prompt_wait_for_the_piece_before(monkeypatch):
    did = []
    monkeypatch.setattr(attention, "_sent", attention._Sent())
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(mx, "depends", lambda marks, arrays: sum(a.item() for a in arrays))
    monkeypatch.setattr(mx, "async_eval", lambda marks: did.append(("sent", *marks)))
    monkeypatch.setattr(mx, "eval", lambda marks: did.append(("awaited", *marks)))
    monkeypatch.setattr(attention, "LARGE_CHUNK", 8)
    a, b, small = mx.array(1.0), mx.array(2.0), mx.array(3.0, mx.float16)
    attention.keep_pace(a, a)
    attention.keep_pace(small, small)
    attention.keep_pace(b, b)
    assert did == [("sent", 2), ("awaited",), ("sent", 4), ("awaited", 2)]


def test_a_prompt_waits_for_memory_that_comes_back_late(monkeypatch):
    held, waits = iter((500, 600, 601, 900, 450, 551)), []
    monkeypatch.setattr(attention, "_sent", attention._Sent())
    monkeypatch.setattr(attention, "AHEAD_BYTES", 100)
    monkeypatch.setattr(attention, "LARGE_CHUNK", 1)
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    monkeypatch.setattr(mx, "get_active_memory", lambda: next(held))
    monkeypatch.setattr(mx, "synchronize", lambda: waits.append(1))
    waited = []
    for _ in range(6):
        attention.keep_pace(mx.array(1.0))
        waited.append(len(waits))
    assert waited == [0, 0, 1, 2, 2, 3]


def test_keeping_pace_holds_nothing(monkeypatch):
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(mx.gpu))
    with mx.stream(mx.cpu):
        gc.collect()
        before, x = mx.get_active_memory(), mx.zeros(1 << 22)
        mx.eval(x)
        attention.keep_pace(x)
        mx.synchronize(mx.cpu)
        del x
        assert mx.get_active_memory() < before + (1 << 20)


@pytest.mark.parametrize("kind", ["one", "batch"])
def test_what_is_appended_keeps_pace(kind, monkeypatch):
    """Or the memory of every layer's share is held at once."""
    paced = []
    module = {"one": cache, "batch": batch_cache}[kind]
    monkeypatch.setattr(module, "keep_pace", lambda *arrays: paced.append(len(arrays)))
    made = {
        "one": lambda: cache.SpectralKVCache(cache.LOSSLESS),
        "batch": lambda: batch_cache.BatchSpectralKVCache([0], cache.LOSSLESS),
    }[kind]()
    for tokens in (LAG + 1, 1):  # not of single tokens
        keys = mx.zeros((1, 2, tokens, 64))
        made.update_and_fetch(keys, keys)
        assert paced == [2]
