"""attend and attend_reference over rows of different lengths: each row as float64 attention over its own tokens."""

import functools

import host_kernels
import mlx.core as mx
import numpy as np
import oracle
import pytest
from conftest import like_calibrated, numpy, random_codec

from vq_kvcache import attention
from vq_kvcache.attention import attend, attend_reference
from vq_kvcache.batch_storage import BatchStorage
from vq_kvcache.chunks import Packed
from vq_kvcache.spectral.spectral_quant import RawQuantizer

HEADS, GROUPS, DIMS = 2, 3, 32
ERROR = 2e-5  # of results in float32 whose values are of size 10
# Rows: packed and exact; sinks and a short window only; sinks not yet full; as long as the first; nothing at all.
LENGTHS = (450, 30, 3, 450, 0, 200)
LONGEST = max(LENGTHS)


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    monkeypatch.setattr(attention, "TILE_BYTES", 1 << 14)


codec_of = functools.cache(random_codec)


@functools.cache
def snapshot_of(kind, lengths=LENGTHS, dims=DIMS):
    """A snapshot of rows of these lengths, fed padded; row 0 was sealed at other moments than row 3."""
    codec = codec_of(heads=HEADS, key_dims=dims)
    keys, values = (like_calibrated(t, len(lengths), LONGEST, i) for i, t in enumerate(codec.layers[0]))
    layer = codec.plan(3.0).layers[0]
    pair = [RawQuantizer(HEADS, dims, mx.float32)] * 2 if kind == "raw" else [layer.keys, layer.values]
    storage = BatchStorage(*pair, 100, 4, keys, values)
    fed = [0] * len(lengths)
    while fed != list(lengths):
        counts = [min(length - n, 37 if row else 200) for row, (length, n) in enumerate(zip(lengths, fed, strict=True))]
        columns = mx.array([[min(n + c, LONGEST - 1) for c in range(200)] for n in fed])[:, None, :, None]
        chunk = [mx.take_along_axis(x, columns, axis=2) for x in (keys, values)]
        storage.append(*chunk, (0,) * len(lengths), tuple(counts))
        storage.seal()
        fed = [a + b for a, b in zip(fed, counts, strict=True)]
    storage.check()
    return storage.snapshot()


def held_by(snapshot):
    """Keys and values of each row, float64 [H, T_b, D]."""
    decoded = [numpy(x).astype(np.float64) for x in snapshot.decoded()]
    return [tuple(x[row, :, :n] for x in decoded) for row, n in enumerate(snapshot.layout.lengths)]


def masks(length, rows):
    """Every kind of mask, by position; the positions beyond a row's tokens are visible in some."""
    generator = np.random.default_rng(length)
    some = generator.random((rows, HEADS * GROUPS, length, LONGEST)) < 0.4
    some[..., :2] = True
    return {
        "none": None,
        "causal": "causal",
        "bool 1-D": some[0, 0, 0],
        "bool 2-D": some[0, 0],
        "bool 4-D": some[:, :1],
        "bool per head": some,
        "additive 4-D": generator.normal(size=(1, 1, length, LONGEST)).astype(np.float32),
        "additive per head, hiding": np.where(some, generator.normal(size=some.shape), -np.inf).astype(np.float32),
        "additive per query": np.full((rows, 1, length, 1), 3.0, np.float32),
    }


def of_row(mask, row, tokens):
    """What `mask` says of one row's tokens."""
    if mask is None or isinstance(mask, str):
        return mask
    wide = np.asarray(mask).reshape((1,) * (4 - np.ndim(mask)) + np.shape(mask))
    own = wide[row if wide.shape[0] > 1 else 0]
    return own if own.shape[-1] == 1 else own[..., :tokens]


@pytest.mark.parametrize("name", sorted(masks(1, 1)))
@pytest.mark.parametrize("length", [1, 3, 20])
@pytest.mark.parametrize("kind", ["raw", "spectral"])
def test_each_row_attends_to_its_own_tokens(kind, length, name):
    snapshot = snapshot_of(kind)
    assert len(set(snapshot.layout.packed_tokens)) > 2
    queries = mx.random.normal((len(LENGTHS), HEADS * GROUPS, length, DIMS), key=mx.random.key(length))
    mask = masks(length, len(LENGTHS))[name]
    given = mask if mask is None or isinstance(mask, str) else mx.array(mask)
    results = {"attend": attend(snapshot, queries, 0.2, given),
               "reference": attend_reference(snapshot, queries, 0.2, given)}  # fmt: skip
    for row, (keys, values) in enumerate(held_by(snapshot)):
        own = of_row(mask, row, keys.shape[1])
        if not keys.shape[1] or (isinstance(own, str) and keys.shape[1] < length):
            continue  # queries before the first token
        expected = oracle.attention(numpy(queries)[row : row + 1], keys[None], values[None], 0.2, own)
        for which, result in results.items():
            np.testing.assert_allclose(numpy(result)[row : row + 1], expected, atol=ERROR, err_msg=f"{which} {row}")
    assert np.isfinite(numpy(results["attend"])).all()


def test_what_lies_beyond_a_row_is_of_no_account():
    """Whatever numbers are in columns that hold no token, and in codes of none, attention is the same."""
    snapshot = snapshot_of("spectral")
    queries = mx.random.normal((len(LENGTHS), HEADS * GROUPS, 2, DIMS), key=mx.random.key(5))
    layout = snapshot.layout
    columns = mx.arange(snapshot.exact_keys.shape[2])[None]
    held = (columns < layout.column(0)) | ((columns >= layout.column(1)) & (columns < layout.window_end))
    exact = [mx.where(held[:, None, :, None], x, 1e4) for x in (snapshot.exact_keys, snapshot.exact_values)]
    packed, first = [], 0
    for words, tokens in snapshot.packed:
        own = mx.arange(first, first + words.shape[-1])[None] < layout.column(3)
        packed.append((mx.where(own[:, None], words, mx.array(0xFFFFFFFF, mx.uint32)), tokens))
        first += tokens
    other = type(snapshot)(*exact, Packed(packed), layout, snapshot.key_quantizer, snapshot.value_quantizer)
    for mask in (None, "causal"):
        for function in (attend, attend_reference):
            for row, length in enumerate(layout.lengths):
                if length >= 2:
                    a, b = (numpy(function(s, queries, 0.2, mask))[row] for s in (snapshot, other))
                    np.testing.assert_array_equal(a, b)


def test_sink_logits_of_rows():
    snapshot = snapshot_of("spectral")
    queries = mx.random.normal((len(LENGTHS), HEADS * GROUPS, 1, DIMS), key=mx.random.key(6))
    sinks = mx.array([-3.0, 0.0, 4.0, 30.0, 1.0, -1.0])
    result = numpy(attend(snapshot, queries, 0.2, None, sinks))
    for row, (keys, values) in enumerate(held_by(snapshot)):
        if keys.shape[1]:
            own = numpy(queries)[row : row + 1]
            expected = oracle.attention(own, keys[None], values[None], 0.2, None, numpy(sinks))
            np.testing.assert_allclose(result[row : row + 1], expected, atol=ERROR)


def test_rows_that_are_alike_need_no_gathering(monkeypatch):
    snapshot = snapshot_of("spectral", (450, 450))
    assert snapshot.layout.alike
    queries = mx.random.normal((2, HEADS * GROUPS, 3, DIMS), key=mx.random.key(7))
    expected = attend_reference(snapshot, queries, 0.2, "causal")
    monkeypatch.setattr(attention._Visible, "_of_columns", None)
    np.testing.assert_allclose(numpy(attend(snapshot, queries, 0.2, "causal")), numpy(expected), atol=ERROR)


def _check_prompt(snapshot, lengths, mask_name):
    queries = mx.random.normal((len(lengths), HEADS * GROUPS, 20, DIMS), key=mx.random.key(8))
    mask = masks(20, len(lengths))[mask_name]
    mask = mask if mask is None or isinstance(mask, str) else mx.array(mask)
    sinks = mx.arange(HEADS * GROUPS) / 3
    result = numpy(attention._attend_decoded(snapshot, queries, 0.2, mask, sinks, "cuda"))
    expected = numpy(attend_reference(snapshot, queries, 0.2, mask, sinks))
    for row, length in enumerate(lengths):
        if length >= 20:
            np.testing.assert_allclose(result[row], expected[row], atol=ERROR)


@pytest.mark.parametrize("lengths", [LENGTHS, (450, 450)])
@pytest.mark.parametrize("name", sorted(masks(1, 1)))
def test_prompts_are_attended_over_a_decoding_of_some_heads_at_a_time(monkeypatch, name, lengths):
    """What a GPU does with a prompt, its decoding kernel replaced by plain operations."""
    snapshot, seen = snapshot_of("spectral", lengths), []

    def decode_heads(held, part, first, heads, place):
        seen.append((part, first, heads))
        quantizer = (held.key_quantizer, held.value_quantizer)[part]
        return quantizer.decode_words(held.words(0, held.packed_tokens)[part])[:, first : first + heads]

    monkeypatch.setattr(attention.launches, "decode_heads", decode_heads)
    monkeypatch.setattr(attention, "DECODED_BYTES", attention._decoded_bytes(snapshot, 1))
    _check_prompt(snapshot, lengths, name)
    assert seen == [(0, 0, 1), (1, 0, 1), (0, 1, 1), (1, 1, 1)]


@pytest.mark.parametrize("lengths", [LENGTHS, (450, 450)])
@pytest.mark.parametrize("name", sorted(masks(1, 1)))
def test_prompts_are_attended_over_a_decoding_of_all_heads_where_there_is_room(monkeypatch, name, lengths):
    """The same with the kernels' text, run by the host."""
    snapshot, ran = snapshot_of("spectral", lengths), []
    monkeypatch.setattr(
        attention.launches, "run", lambda launch, _: ran.append(launch.body.name) or host_kernels.run(launch)
    )
    _check_prompt(snapshot, lengths, name)
    assert ran == ["decode", "decode", "restore"]
