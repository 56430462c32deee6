import mlx.core as mx
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vq_kvcache.spectral import codebook

widths = pytest.mark.parametrize("bits", range(1, 9))
# Mean squared errors that Max (1960) and Lloyd printed, to the digits they printed.
PUBLISHED = {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497, 5: 0.002499}


@pytest.mark.parametrize("bits", PUBLISHED)
def test_the_oracle_finds_the_distortion_that_max_published(bits):
    # Max's iteration stopped early: his figures at 4 and 5 bits are 0.04 % and 0.2 % below the true optimum.
    assert oracle.distortion(oracle.lloyd_max_levels(bits)) == pytest.approx(PUBLISHED[bits], rel=2.5e-3)


@widths
def test_the_oracle_is_at_the_fixed_point_of_lloyds_iteration(bits):
    found = oracle.polynomial_coefficients(bits)
    assert oracle.polynomial_step(oracle.levels(bits), bits) == pytest.approx(found, rel=1e-9)


@widths
def test_coefficients_are_the_fixed_point(bits):
    assert codebook.COEFFICIENTS[bits] == pytest.approx(oracle.polynomial_coefficients(bits), rel=1e-8)


@widths
def test_levels_follow_the_polynomial_rise_and_are_odd(bits):
    levels = codebook.levels(bits)
    assert levels == pytest.approx(oracle.levels(bits), abs=1e-8)
    assert (np.diff(levels) > 0).all()
    assert (levels == -levels[::-1]).all()


def test_there_are_widths_1_to_8_and_one_level_at_width_0():
    assert list(codebook.COEFFICIENTS) == list(range(1, codebook.MAX_BITS + 1)) == list(range(1, 9))
    assert codebook.levels(0).tolist() == [0.0]
    assert codebook.distortion(0) == 1.0


@widths
def test_distortion_is_that_of_the_levels_and_near_lloyd_max(bits):
    found = codebook.distortion(bits)
    assert found == pytest.approx(oracle.distortion(oracle.levels(bits)), rel=1e-9)
    best = oracle.distortion(oracle.lloyd_max_levels(bits))
    assert best * (1 - 1e-9) <= found <= best * (1.01 if bits <= 5 else 1.05)


def test_distortion_falls_with_every_bit_and_by_less_each_time():
    steps = -np.diff([codebook.distortion(b) for b in range(9)])
    assert (steps > 0).all()
    assert (np.diff(steps) < 0).all()


@widths
def test_quantized_gaussian_numbers_have_the_distortion_promised(bits):
    z = np.linspace(-8, 8, 400_001).astype(np.float32)
    weights = np.exp(-(z.astype(np.float64) ** 2) / 2)
    found = np.array(codebook.dequantize(codebook.quantize(mx.array(z), bits), bits), dtype=np.float64)
    assert np.average((z - found) ** 2, weights=weights) == pytest.approx(codebook.distortion(bits), rel=1e-3)


@widths
def test_dequantize_gives_the_levels_in_float32(bits):
    found = codebook.dequantize(mx.arange(2**bits, dtype=mx.uint32), bits)
    assert found.dtype == mx.float32
    assert np.abs(np.array(found) - oracle.levels(bits)).max() < 4e-6


def _telling_numbers(bits):
    """Numbers in and out of range, the levels, and both sides of every edge between two; none nearer than 6e-6 to an
    edge, which the rounding of the levels to float32 may move."""
    levels = oracle.levels(bits)
    edges = (levels[1:] + levels[:-1]) / 2
    far = [1e-3, 6.0, 100.0, 1e30, float(np.finfo(np.float32).max)]
    beside = np.concatenate([edges - 1e-5, edges + 1e-5])
    z = np.concatenate([beside, levels, far, np.negative(far), np.linspace(-7, 7, 20_001)]).astype(np.float32)
    return z[np.abs(z[:, None] - edges.astype(np.float32)).min(axis=1) > 6e-6]


@widths
def test_quantize_finds_the_nearest_level_by_brute_force(bits):
    z = _telling_numbers(bits)
    codes = codebook.quantize(mx.array(z), bits)
    assert codes.dtype == mx.uint32
    found = np.array(codes)
    assert set(found.tolist()) == set(range(2**bits))
    assert found.tolist() == oracle.nearest(z, oracle.levels(bits)).tolist()


@widths
@given(z=st.floats(-8, 8, width=32))
@settings(deadline=None)
def test_quantize_never_misses_a_nearer_level(bits, z):
    code = codebook.quantize(mx.array([z]), bits).item()
    errors = np.abs(z - oracle.levels(bits))
    # Two levels, each rounded to float32 (within 4e-6, as tested above), and two distances, each rounded.
    assert errors[code] <= errors.min() + 1e-5


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_quantize_takes_half_precision(dtype):
    z = mx.linspace(-4, 4, 2000).astype(dtype)
    for bits in range(1, 9):
        assert (codebook.quantize(z, bits) == codebook.quantize(z.astype(mx.float32), bits)).all().item()


def test_quantize_keeps_the_shape():
    assert codebook.quantize(mx.zeros((2, 3, 5)), 3).shape == (2, 3, 5)
    assert codebook.dequantize(mx.zeros((2, 3, 5), mx.uint32), 3).shape == (2, 3, 5)


@pytest.mark.parametrize(("device", "traces"), [(mx.cpu, 1), (mx.gpu, 2)])
def test_levels_are_fused_on_a_cpu_and_never_compiled_on_a_gpu(monkeypatch, device, traces):
    monkeypatch.setattr(mx, "default_device", lambda: mx.Device(device))
    calls = []

    @codebook.fused
    def twice(x):
        calls.append(x)
        return x + x

    assert [twice(mx.arange(n)).tolist() for n in (2, 3)] == [[0, 2], [0, 2, 4]]
    assert len(calls) == traces
