import inspect
import statistics

import mlx.core as mx
import numpy as np
import oracle
import pytest

from vq_kvcache.spectral import packing
from vq_kvcache.spectral.spectral_quant import EncodedVector, RawQuantizer, SpectralQuantizer, SpectralRotation

HALF = [mx.float16, mx.bfloat16]
FLOATS = [*HALF, mx.float32]


def orthogonal(dims, seed=0):
    return np.linalg.qr(np.random.default_rng(seed).normal(size=(dims, dims)))[0]


def rotation(dims=16, eigenvalues=None, mean=None, seed=0):
    """A rotation with a gap after its third dimension unless told."""
    if eigenvalues is None:
        eigenvalues = np.concatenate([[9.0, 8.5, 8.0], 0.5 * 0.8 ** np.arange(dims - 3)])
    arrays = [mx.array(np.asarray(a, dtype=np.float32)) for a in (orthogonal(dims, seed), eigenvalues)]
    return SpectralRotation(*arrays, dims, "layers.0", None if mean is None else mx.array(np.float32(mean)))


def gaussian_columns(count, dims, seed=0):
    """[N, D]: unit Gaussian quantiles in an order of its own for each column, so that errors average quickly."""
    normal = statistics.NormalDist()
    quantiles = np.array([normal.inv_cdf((i + 0.5) / count) for i in range(count)])
    generator = np.random.default_rng(seed)
    return np.stack([generator.permutation(quantiles) for _ in range(dims)], axis=1)


def vectors(rotation, shape, seed=0, dtype=mx.float32):
    """Gaussian vectors [*shape, D] with the mean and covariance of `rotation`."""
    z = np.random.default_rng(seed).normal(size=(*shape, rotation.head_dim))
    x = (z * np.sqrt(np.array(rotation.eigenvalues))) @ np.array(rotation.rotation_matrix).T
    mean = 0 if rotation.mean is None else np.array(rotation.mean)
    return mx.array((x + mean).astype(np.float32)).astype(dtype)


def general_transform(dims=12, seed=3):
    """(mean, analysis that is not orthogonal, eigenvalues, widths) for `from_transform`."""
    generator = np.random.default_rng(seed)
    analysis = orthogonal(dims, seed) * np.exp(generator.normal(size=dims)) @ orthogonal(dims, seed + 1)
    return generator.normal(size=dims), analysis, 4.0 * 0.7 ** np.arange(dims), [5, 4, 4, 3, 3, 2, 2, 1, 1, 1, 0, 0]


def test_the_documented_signatures():
    parameters = inspect.signature(SpectralQuantizer).parameters
    assert list(parameters) == ["rotation", "signal_bits", "noise_bits", "use_water_filling"]
    assert [p.default for p in parameters.values()] == [inspect.Parameter.empty, 4, 1, False]
    assert [p.annotation for p in parameters.values()] == [SpectralRotation, int, int, bool]
    assert str(inspect.signature(SpectralQuantizer.encode)).endswith(
        "keys: mlx.core.array) -> vq_kvcache.spectral.spectral_quant.EncodedVector"
    )
    decode = inspect.signature(SpectralQuantizer.decode)
    assert list(decode.parameters) == ["self", "encoded"]
    assert decode.return_annotation is mx.array
    fields = list(inspect.signature(SpectralRotation).parameters)
    assert fields == ["rotation_matrix", "eigenvalues", "head_dim", "layer_name", "mean", "values"]


def test_the_documented_names_are_importable_from_the_package():
    from vq_kvcache import spectral

    documented = {
        "SpectralQuantizer", "SpectralRotation", "calibrate_from_vectors", "calibrate_spectral_rotation",
        "compute_participation_ratio", "compute_spectral_gap", "load_cached_rotations", "save_rotations",
        "water_fill_bits",
    }  # fmt: skip
    assert documented <= set(spectral.__all__)
    assert all(hasattr(spectral, name) for name in spectral.__all__)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(), (1,), (7,), (2, 3, 5)])
def test_any_float_vectors_come_back_in_their_dtype_and_shape(dtype, shape):
    r = rotation(mean=np.linspace(-3, 5, 16))
    x = vectors(r, shape, dtype=dtype)
    quantizer = SpectralQuantizer(r, signal_bits=8, noise_bits=8)
    encoded = quantizer.encode(x)
    assert isinstance(encoded, EncodedVector)
    assert (encoded.shape, encoded.dtype) == (x.shape, dtype)
    decoded = quantizer.decode(encoded)
    assert (decoded.shape, decoded.dtype) == (x.shape, dtype)
    error = (decoded.astype(mx.float32) - x.astype(mx.float32)).square().mean().item()
    assert error < 3e-3 * x.astype(mx.float32).square().mean().item()


def test_codes_are_packed_words_and_nbytes_is_theirs():
    quantizer = SpectralQuantizer(rotation(16), signal_bits=4, noise_bits=1)
    encoded = quantizer.encode(mx.zeros((2, 3, 100, 16)))
    assert quantizer.widths == [4] * 3 + [1] * 13
    assert encoded.codes.dtype == mx.uint32
    assert encoded.nbytes == encoded.codes.nbytes == 2 * 3 * 100 * 4
    assert quantizer.words == 1
    assert quantizer.bits_per_value == 2.0


def test_codes_are_those_of_the_oracle_word_by_word():
    r = rotation(20, mean=np.linspace(1, -1, 20))
    quantizer = SpectralQuantizer(r, signal_bits=5, noise_bits=2)
    x = vectors(r, (50,))
    parameters = [np.array(a, dtype=np.float64) for a in (r.mean, r.rotation_matrix, r.eigenvalues)]
    codes = oracle.encode(np.array(x), *parameters, quantizer.widths)
    encoded = quantizer.encode(x)
    assert (oracle.unpack(np.array(encoded.codes).reshape(-1, 50), quantizer.widths) == codes).all()
    expected = oracle.decode(codes, *parameters, quantizer.widths)
    assert np.array(quantizer.decode(encoded)) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("bits", range(1, 9))
def test_gaussian_vectors_have_the_distortion_of_the_levels(bits):
    z = gaussian_columns(20_000, 8, seed=bits)
    r = rotation(8, eigenvalues=[8.0, 5.0, 3.0, 2.0, 1.0, 0.5, 0.2, 0.1], mean=np.arange(8.0))
    x = (z * np.sqrt(np.array(r.eigenvalues))) @ np.array(r.rotation_matrix).T + np.array(r.mean)
    quantizer = SpectralQuantizer(r, bits, bits)
    decoded = np.array(quantizer.decode(quantizer.encode(mx.array(x.astype(np.float32)))), dtype=np.float64)
    errors = ((decoded - x) @ np.array(r.rotation_matrix)) ** 2 / np.array(r.eigenvalues)
    promised = oracle.distortion(oracle.levels(bits))
    # 20,000 quantiles end at 4.06 deviations: 2.6 % of the distortion at 8 bits lies beyond.
    assert errors.mean() == pytest.approx(promised, rel=0.03)
    assert errors.mean() < oracle.distortion(oracle.lloyd_max_levels(bits)) * (1.01 if bits <= 5 else 1.05)


@pytest.mark.parametrize(("signal_bits", "noise_bits"), [(4, 1), (8, 0), (3, 2), (0, 1), (2, 5)])
def test_dimensions_before_the_gap_get_signal_bits_and_those_after_it_noise_bits(signal_bits, noise_bits):
    quantizer = SpectralQuantizer(rotation(16), signal_bits, noise_bits)
    assert quantizer.widths == [signal_bits] * 3 + [noise_bits] * 13


@pytest.mark.parametrize("decay", [0.6, 0.9, 0.99])
@pytest.mark.parametrize(("signal_bits", "noise_bits"), [(4, 1), (6, 2), (8, 0)])
def test_water_filling_spends_the_same_bits_and_costs_no_more(decay, signal_bits, noise_bits):
    r = rotation(24, eigenvalues=np.sort(np.concatenate([[20, 15], decay ** np.arange(22)]))[::-1])
    fixed = SpectralQuantizer(r, signal_bits, noise_bits).widths
    filled = SpectralQuantizer(r, signal_bits, noise_bits, use_water_filling=True).widths
    assert sum(filled) == sum(fixed) == signal_bits * 2 + noise_bits * 22
    costs = oracle.costs(np.array(r.eigenvalues))
    spent = [sum(row[b] for row, b in zip(costs, widths, strict=True)) for widths in (filled, fixed)]
    assert spent[0] <= spent[1] * (1 + 1e-9)
    assert filled == oracle.water_fill(costs.tolist(), sum(fixed))


def test_the_mean_is_subtracted_before_and_added_after():
    mean = 50 * np.ones(16)
    with_mean, without = rotation(mean=mean), rotation()
    x = vectors(with_mean, (200,))
    quantizer, bare = SpectralQuantizer(with_mean), SpectralQuantizer(without)
    shifted = x - mx.array(mean.astype(np.float32))
    assert (quantizer.encode(x).codes == bare.encode(shifted).codes).all().item()
    found = quantizer.decode(quantizer.encode(x)) - bare.decode(bare.encode(shifted))
    assert np.array(found) == pytest.approx(50, abs=1e-4)


@pytest.mark.parametrize("dtype", HALF)
def test_a_rotation_may_be_of_half_precision(dtype):
    r = rotation(mean=np.ones(16))
    half = [a.astype(dtype) for a in (r.rotation_matrix, r.eigenvalues, r.mean)]
    quantizer = SpectralQuantizer(SpectralRotation(*half[:2], 16, "layers.0", half[2]))
    rounded = [a.astype(mx.float32) for a in half]
    expected = SpectralQuantizer(SpectralRotation(*rounded[:2], 16, "layers.0", rounded[2]))
    x = vectors(r, (20,))
    assert (quantizer.encode(x).codes == expected.encode(x).codes).all().item()


def test_a_dimension_without_variance_stays_at_the_mean():
    r = rotation(8, eigenvalues=[4.0, 2.0, 1.0, 0, 0, 0, 0, 0], mean=np.full(8, 2.0))
    quantizer = SpectralQuantizer(r, 4, 4)
    assert mx.isfinite(quantizer.analysis).all().item()
    x = np.array(quantizer.decode(quantizer.encode(vectors(r, (30,)))))
    coordinates = (x - 2.0) @ np.array(r.rotation_matrix)
    assert np.abs(coordinates[:, 3:]).max() < 1e-4
    assert np.abs(coordinates[:, :3]).max() > 1


def test_a_spectrum_of_zeros_decodes_to_the_mean():
    r = rotation(8, eigenvalues=np.zeros(8), mean=np.arange(8.0))
    quantizer = SpectralQuantizer(r)
    x = mx.random.normal((5, 8), key=mx.random.key(0))
    assert np.array(quantizer.decode(quantizer.encode(x))) == pytest.approx(np.tile(np.arange(8.0), (5, 1)), abs=1e-6)


def test_nothing_stored_decodes_to_the_mean():
    quantizer = SpectralQuantizer(rotation(8, mean=np.arange(8.0)), 0, 0)
    encoded = quantizer.encode(mx.ones((2, 1, 5, 8)))
    assert encoded.nbytes == 0
    assert np.array(quantizer.decode(encoded)) == pytest.approx(np.tile(np.arange(8.0), (2, 1, 5, 1)))


def test_no_vectors_at_all_survive():
    quantizer = SpectralQuantizer(rotation(16))
    assert quantizer.decode(quantizer.encode(mx.zeros((2, 2, 0, 16)))).shape == (2, 2, 0, 16)


def test_from_transform_takes_a_basis_that_is_not_orthogonal():
    mean, analysis, eigenvalues, widths = general_transform()
    quantizer = SpectralQuantizer.from_transform(mean, analysis, eigenvalues, widths, trellis=False)
    z = np.random.default_rng(5).normal(size=(64, 12)) * np.sqrt(eigenvalues)
    x = z @ np.linalg.inv(analysis) + mean
    codes = oracle.encode(x, mean, analysis, eigenvalues, widths)
    encoded = quantizer.encode(mx.array(x.astype(np.float32)))
    assert quantizer.widths == widths
    assert (oracle.unpack(np.array(encoded.codes).reshape(-1, 64), widths) == codes).all()
    decoded = oracle.decode(codes, mean, analysis, eigenvalues, widths)
    assert np.array(quantizer.decode(encoded)) == pytest.approx(decoded, abs=1e-4)


@pytest.mark.parametrize("analysis", [np.ones((4, 4)), np.full((4, 4), np.nan), np.diag([1, 1, 1, 1e-14])])
def test_a_basis_that_cannot_be_inverted_is_refused(analysis):
    with pytest.raises(ValueError, match="analysis is singular or not finite; expected an invertible matrix"):
        SpectralQuantizer.from_transform(np.zeros(4), analysis, np.ones(4), [1] * 4)


def different_heads():
    return [
        SpectralQuantizer(rotation(16, seed=1), 4, 1),
        SpectralQuantizer(rotation(16, mean=np.arange(16.0), seed=2), 8, 3, use_water_filling=True),
        SpectralQuantizer(rotation(16, seed=3), 0, 0),
        SpectralQuantizer(rotation(16, seed=4), 7, 0),
    ]


def test_stacked_heads_equal_the_heads_one_by_one():
    heads = different_heads()
    stacked = SpectralQuantizer.stack(heads)
    x = mx.random.normal((2, 4, 9, 16), key=mx.random.key(1)) * 3
    encoded = stacked.encode(x)
    assert stacked.words == sum(q.words for q in heads)
    assert encoded.codes.shape == (2, stacked.words, 9)
    alone = [q.encode(x[:, h]) for h, q in enumerate(heads)]
    assert (encoded.codes == mx.concatenate([e.codes for e in alone], axis=-2)).all().item()
    decoded = mx.stack([q.decode(e) for q, e in zip(heads, alone, strict=True)], axis=1)
    assert mx.allclose(stacked.decode(encoded), decoded, rtol=0, atol=1e-5).item()
    assert stacked.widths == [q.widths for q in heads]
    assert stacked.encode(x[0]).codes.shape == (stacked.words, 9)


@pytest.mark.parametrize("few_tokens", [0, 512])
@pytest.mark.parametrize(("batch", "tokens"), [(1, 9), (3, 37), (2, 301)])
def test_folded_queries_and_unfolded_outputs_give_what_decoded_vectors_give(monkeypatch, batch, tokens, few_tokens):
    monkeypatch.setattr(packing, "FEW_TOKENS", few_tokens)
    quantizer = SpectralQuantizer.stack(different_heads())
    key = mx.random.split(mx.random.key(2), 3)
    words = quantizer.encode(mx.random.normal((batch, 4, tokens, 16), key=key[0]) * 3).codes
    queries = mx.random.normal((batch, 4, 3, 16), key=key[1])
    weights = mx.random.uniform(shape=(batch, 4, 3, tokens), key=key[2]) / tokens
    vectors, levels = quantizer.decode_words(words), quantizer.decode_levels(words)
    folded, constant = quantizer.fold_queries(queries)
    assert mx.allclose(folded @ levels + constant, queries @ vectors.swapaxes(-1, -2), rtol=1e-5, atol=1e-4).item()
    outputs = quantizer.unfold_outputs(weights @ levels.swapaxes(-1, -2), weights.sum(axis=-1, keepdims=True))
    assert mx.allclose(outputs, weights @ vectors, rtol=1e-5, atol=1e-4).item()
    for head in range(4):
        own = quantizer.decode_head(words, head)
        scores = quantizer.sorted_queries(folded, head) @ own
        assert mx.allclose(scores, (folded @ levels)[:, head], rtol=1e-5, atol=1e-4).item()
        tiled = quantizer.head_scores(quantizer.sorted_queries(folded, head), words, head)
        assert mx.allclose(tiled, scores, rtol=1e-5, atol=1e-4).item()
        expected = (weights @ levels.swapaxes(-1, -2))[:, head]
        for rows in (weights[:, head] @ own.swapaxes(-1, -2), quantizer.head_sums(weights[:, head], words, head)):
            sums = quantizer.stored_outputs(rows, head)
            assert sums.shape == expected.shape
            assert mx.allclose(sums, expected, rtol=1e-5, atol=1e-4).item()


@pytest.mark.parametrize("dtype", FLOATS)
def test_decoded_words_have_the_dtype_asked_for(dtype):
    quantizer = SpectralQuantizer.stack(different_heads())
    words = quantizer.encode_words(mx.ones((1, 4, 3, 16)))
    assert quantizer.decode_words(words, dtype).dtype == dtype


def arrays_of(thing):
    """Every MLX array among the attributes or items of an object, among theirs, and so on."""
    if isinstance(thing, mx.array):
        return [thing]
    if isinstance(thing, list | tuple):
        return [a for item in thing for a in arrays_of(item)]
    return [a for value in getattr(thing, "__dict__", {}).values() for a in arrays_of(value)]


@pytest.mark.parametrize("heads", [1, 4])
def test_nbytes_counts_every_array_that_the_transform_holds(heads):
    quantizer = SpectralQuantizer.stack(different_heads()[:heads])
    assert quantizer.head_dim == 16
    assert quantizer.nbytes == sum(a.nbytes for a in arrays_of(quantizer))
    assert quantizer.nbytes > 4 * heads * (16 + 2 * 16 * quantizer.layout.stored)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", FLOATS)
def test_vectors_that_are_not_finite_are_refused(bad, dtype):
    x = mx.ones((3, 16))
    x[1, 4] = bad
    with pytest.raises(ValueError, match="vectors hold NaN or infinity; expected finite numbers; check the model"):
        SpectralQuantizer(rotation(16)).encode(x.astype(dtype))


@pytest.mark.parametrize("shape", [(15,), (4, 17), (2, 2, 3, 8), (0,), ()])
def test_vectors_of_another_length_are_refused(shape):
    with pytest.raises(ValueError, match=r"vectors of shape \(.*\); expected \[\.\.\., 16\]; wrong codec or model"):
        SpectralQuantizer(rotation(16)).encode(mx.zeros(shape))


@pytest.mark.parametrize("dtype", [mx.int32, mx.uint32, mx.bool_])
def test_vectors_of_integers_are_refused(dtype):
    with pytest.raises(ValueError, match="expected float16, bfloat16 or float32; convert them first"):
        SpectralQuantizer(rotation(16)).encode(mx.ones((3, 16), dtype))


@pytest.mark.parametrize("shape", [(16,), (9, 16), (1, 3, 9, 16)])
def test_vectors_of_another_number_of_heads_are_refused(shape):
    with pytest.raises(ValueError, match=r"vectors of shape \(.*\); expected \[\.\.\., 4, T, 16\]"):
        SpectralQuantizer.stack(different_heads()).encode(mx.zeros(shape))


@pytest.mark.parametrize(("name", "bits"), [("signal_bits", 9), ("signal_bits", -1), ("noise_bits", 9)])
def test_widths_out_of_range_are_refused(name, bits):
    with pytest.raises(ValueError, match=rf"{name} is {bits}; expected an integer in 0\.\.8"):
        SpectralQuantizer(rotation(16), **{name: bits})


@pytest.mark.parametrize("name", ["signal_bits", "noise_bits"])
def test_fractional_widths_are_refused(name):
    with pytest.raises(ValueError, match=rf"{name} is 2\.5; expected an integer in 0\.\.8"):
        SpectralQuantizer(rotation(16), **{name: 2.5})


@pytest.mark.parametrize(("matrix", "spectrum"), [((4, 3), (4,)), ((4, 4), (3,)), ((5, 5), (5,)), ((4, 4), (4, 1))])
def test_a_rotation_of_the_wrong_shape_is_refused(matrix, spectrum):
    with pytest.raises(ValueError, match=r"rotation of 'layers\.3' has shapes .*; expected \[D, D\] and \[D\]"):
        SpectralRotation(mx.zeros(matrix), mx.zeros(spectrum), 4, "layers.3")


def test_a_mean_of_the_wrong_shape_is_refused():
    with pytest.raises(ValueError, match=r"mean of 'layers\.3' has shape \(5,\); expected \[4\]"):
        SpectralRotation(mx.eye(4), mx.ones(4), 4, "layers.3", mean=mx.zeros(5))


@pytest.mark.parametrize("part", ["rotation_matrix", "eigenvalues", "mean"])
def test_a_rotation_that_is_not_finite_is_refused(part):
    parts = {"rotation_matrix": mx.eye(4), "eigenvalues": mx.ones(4), "mean": mx.zeros(4)}
    parts[part] = parts[part] * float("nan")
    with pytest.raises(ValueError, match=r"rotation of 'layers\.3' holds NaN or infinity; recalibrate"):
        SpectralRotation(**parts, head_dim=4, layer_name="layers.3")


def numbers(shape, dtype):
    """All sorts of bit patterns of a dtype, among them zeros of both signs, infinities and subnormals."""
    if not mx.issubdtype(dtype, mx.floating):
        return mx.random.randint(-(2**31), 2**31 - 1, shape, dtype, key=mx.random.key(0))
    x = mx.random.normal(shape, key=mx.random.key(0)) * 1e3
    special = mx.array([0.0, -0.0, float("inf"), -float("inf"), 1e-7, 65504.0])
    x[..., 0] = special[mx.arange(x[..., 0].size) % 6].reshape(x.shape[:-1])
    return x.astype(dtype)


@pytest.mark.parametrize("dtype", [*FLOATS, mx.int32, mx.int64])
@pytest.mark.parametrize("dims", [1, 7, 8, 33, 64])
def test_raw_words_keep_every_bit(dtype, dims):
    x = numbers((2, 3, 5, dims), dtype)
    raw = RawQuantizer(3, dims, dtype)
    words = raw.encode_words(x)
    assert words.dtype == mx.uint32
    assert words.shape == (2, raw.words, 5)
    assert raw.words == 3 * -(-dims * dtype.size // 4)
    back = raw.decode_words(words)
    assert (back.shape, back.dtype) == (x.shape, dtype)
    bits = mx.uint16 if dtype.size == 2 else mx.uint32
    assert (mx.contiguous(back).view(bits) == mx.contiguous(x).view(bits)).all().item()


def test_raw_levels_are_the_numbers_and_its_folding_changes_nothing():
    x = numbers((1, 2, 5, 6), mx.float16)[..., 1:]
    raw = RawQuantizer(2, 5, mx.float16)
    levels = raw.decode_levels(raw.encode_words(x))
    assert levels.dtype == mx.float32
    assert (levels == x.astype(mx.float32).swapaxes(-1, -2)).all().item()
    queries = mx.random.normal((1, 2, 3, 5))
    folded, constant = raw.fold_queries(queries)
    assert (folded == queries).all().item()
    assert constant.shape == (1, 2, 3, 1)
    assert (constant == 0).all().item()
    assert (raw.unfold_outputs(queries, constant + 1) == queries).all().item()
    for head in range(2):
        assert (raw.decode_head(raw.encode_words(x), head) == levels[:, head]).all().item()
        assert (raw.sorted_queries(queries, head) == queries[:, head]).all().item()
        assert (raw.stored_outputs(queries[:, head], head) == queries[:, head]).all().item()


def test_raw_words_decode_to_another_dtype_when_asked():
    raw = RawQuantizer(1, 4, mx.float16)
    assert raw.decode_words(raw.encode_words(mx.ones((1, 1, 2, 4), mx.float16)), mx.float32).dtype == mx.float32
