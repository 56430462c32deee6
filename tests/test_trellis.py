import math

import mlx.core as mx
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from test_packing import random_codes, width_tables

from vq_kvcache.spectral import trellis
from vq_kvcache.spectral.packing import Layout
from vq_kvcache.spectral.spectral_quant import SpectralQuantizer

# Bits that rings as long as a word save against Lloyd-Max levels, on Gaussian numbers (benchmarks/trellis.py).
SAVED = {1: 0.095, 2: 0.185, 3: 0.215, 4: 0.205, 5: 0.13}


def ring_of(z, width):
    """Codes uint32 [n, T] of rings z [n, T]."""
    return np.array(trellis.quantize_rings(mx.array(z.astype(np.float32))[:, None], width)[:, 0])


def error_of(z, codes, width):
    levels = oracle.polynomial(trellis.COEFFICIENTS[width], 2 ** (width + 1))
    return (levels[oracle.ring_neighbours(codes.astype(np.int64))] - z) ** 2


@pytest.mark.parametrize(("width", "slots"), [(1, 8), (2, 5), (2, 6), (3, 5), (1, 12)])
def test_no_other_codes_of_a_ring_are_nearer(width, slots):
    z = np.random.default_rng(0).normal(size=(slots, 40)) * 1.3
    levels = oracle.polynomial(trellis.COEFFICIENTS[width], 2 ** (width + 1))
    codes = ring_of(z, width)
    assert codes.max() < 2**width
    found = error_of(z, codes, width).sum(axis=0)
    assert found == pytest.approx([oracle.nearest_ring(z[:, t], levels) for t in range(40)], rel=1e-5)


@pytest.mark.parametrize("width", SAVED)
def test_rings_save_bits_against_codes_that_stand_alone(width):
    z = np.random.default_rng(1).normal(size=(trellis.ring_length(width), 4000))
    error = error_of(z, ring_of(z, width), width).mean()
    assert 0.5 * math.log2(oracle.distortion(oracle.lloyd_max_levels(width)) / error) > SAVED[width]


@pytest.mark.parametrize("width", SAVED)
def test_coefficients_are_where_lloyds_iteration_comes_to_rest(width):
    z = np.random.default_rng(2).normal(size=(trellis.ring_length(width), 12000))
    codes = ring_of(z, width)
    j = oracle.ring_neighbours(codes.astype(np.int64)).ravel()
    t = (2 * j + 1 - 2 ** (width + 1)) / 2 ** (width + 1)
    powers = t[:, None] ** (2 * np.arange(len(trellis.COEFFICIENTS[width])) + 1)
    fitted = np.linalg.lstsq(powers, z.ravel(), rcond=None)[0]
    now, better = (((powers @ c - z.ravel()) ** 2).mean() for c in (trellis.COEFFICIENTS[width], fitted))
    assert better > 0.998 * now


@given(width_tables(), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=40)
def test_words_of_rings_decode_as_documented(table, seed):
    layout, plain = Layout(table, trellis=True), Layout(table)
    codes = random_codes(layout, 3, seed)
    words = layout.pack(layout.split(mx.array(codes.astype(np.uint32))))
    assert (words == plain.pack(plain.split(mx.array(codes.astype(np.uint32))))).all().item()
    found = np.array(layout.unpack_levels(words))
    for h, segments in enumerate(layout.segments):
        for s in segments:
            for w in range(s.words):
                at = [s.first + slot * s.words + w for slot in range(s.slots)]
                if s.slots >= (8 if s.width == 1 else 5) and s.width <= 5:
                    levels = oracle.polynomial(trellis.COEFFICIENTS[s.width], 2 ** (s.width + 1))
                    expected = levels[oracle.ring_neighbours(codes[h, at])]
                else:
                    expected = oracle.levels(s.width)[codes[h, at]]
                assert found[h, at] == pytest.approx(expected, abs=4e-6)
        assert (found[h, len(layout.order[h]) :] == 0).all()


@given(width_tables(max_dims=48), st.integers(0, 2**32 - 1))
@settings(deadline=None, max_examples=20)
def test_a_quantizer_stores_the_nearest_rings(table, seed):
    """Through analysis, segments of any mix, packing and back, every ring has the error that the encoder found."""
    dims = len(table[0])
    identity = np.zeros(dims), np.eye(dims), np.ones(dims)
    quantizer = SpectralQuantizer.stack([SpectralQuantizer.from_transform(*identity, widths) for widths in table])
    layout = quantizer.layout
    x = np.random.default_rng(seed).normal(size=(len(table), 4, dims))
    decoded = np.array(quantizer.decode_words(quantizer.encode_words(mx.array(x.astype(np.float32)))))
    for h, segments in enumerate(layout.segments):
        for s in segments:
            if not trellis.is_ring(s.width, s.slots):
                continue
            for w in range(s.words):
                at = [layout.order[h][s.first + slot * s.words + w] for slot in range(s.slots)]
                ring = x[h][:, at].T
                best = error_of(ring, ring_of(ring, s.width), s.width).sum(axis=0)
                assert ((decoded[h][:, at].T - ring) ** 2).sum(axis=0) == pytest.approx(best, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("tokens", [1, 63, 1000])
def test_a_token_is_coded_alike_whatever_stands_beside_it(tokens, monkeypatch):
    z = np.random.default_rng(3).normal(size=(10, tokens))
    whole = ring_of(z, 3)
    monkeypatch.setattr(trellis, "TILE_NUMBERS", 70)
    assert (ring_of(z, 3) == whole).all()
    assert (ring_of(z[:, -1:], 3) == whole[:, -1:]).all()


def test_short_rings_and_wide_codes_stand_alone():
    assert [n for n in range(33) if trellis.is_ring(1, n)] == list(range(8, 33))
    assert [n for n in range(17) if trellis.is_ring(2, n)] == list(range(5, 17))
    assert [b for b in range(9) if trellis.is_ring(b, 5)] == [2, 3, 4, 5]
