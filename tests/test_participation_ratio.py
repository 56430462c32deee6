import mlx.core as mx
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vq_kvcache.spectral.participation_ratio import compute_participation_ratio, compute_spectral_gap

HALF = [mx.float16, mx.bfloat16]
spectra = st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=40)


@given(spectra)
@settings(deadline=None)
def test_participation_ratio_equals_the_oracle_and_lies_in_its_range(spectrum):
    ratio = compute_participation_ratio(spectrum)
    assert type(ratio) is float
    assert ratio == pytest.approx(oracle.participation_ratio(spectrum), rel=1e-12)
    assert 1 / len(spectrum) * (1 - 1e-12) <= ratio <= 1 + 1e-12


@given(spectra, st.floats(1e-100, 1e100))
@settings(deadline=None)
def test_participation_ratio_is_unchanged_by_scaling(spectrum, scale):
    scaled = [scale * x for x in spectrum]
    assert compute_participation_ratio(scaled) == pytest.approx(compute_participation_ratio(spectrum), rel=1e-9)


@pytest.mark.parametrize("scale", [1e-200, 1.0, 1e200])
def test_participation_ratio_of_flat_and_of_single_direction_spectra(scale):
    assert compute_participation_ratio([scale] * 8) == 1.0
    assert compute_participation_ratio([scale] + [0.0] * 7) == 1 / 8


def test_participation_ratio_of_a_worked_example():
    assert compute_participation_ratio(mx.array([3.0, 1.0])) == pytest.approx(16 / (2 * 10))


def test_a_spectrum_of_zeros_is_flat():
    assert compute_participation_ratio([0.0, 0.0, 0.0]) == 1.0


@given(spectra)
@settings(deadline=None)
def test_spectral_gap_equals_the_oracle(spectrum):
    falling = sorted(spectrum, reverse=True)
    gap = compute_spectral_gap(falling)
    assert type(gap) is int
    assert gap == oracle.spectral_gap(falling)


@pytest.mark.parametrize(
    ("spectrum", "signal"),
    [([9, 8, 2, 1], 2), ([9, 1, 0.5, 0.25], 1), ([5, 5, 5, 0], 3), ([6, 4, 2, 0], 1), ([3, 3, 3], 1), ([7], 1)],
)
def test_spectral_gap_counts_the_dimensions_before_the_largest_drop_and_the_first_on_ties(spectrum, signal):
    assert compute_spectral_gap(spectrum) == signal


@pytest.mark.parametrize("kind", [list, tuple, np.array, *(lambda x, d=d: mx.array(x, d) for d in HALF)])
def test_spectra_come_as_lists_numpy_or_mlx_arrays(kind):
    spectrum = kind([8.0, 4.0, 1.0, 0.5])
    assert compute_spectral_gap(spectrum) == 1
    assert compute_participation_ratio(spectrum) == pytest.approx(13.5**2 / (4 * 81.25))


@pytest.mark.parametrize("function", [compute_participation_ratio, compute_spectral_gap])
@pytest.mark.parametrize(
    ("bad", "sentence"),
    [
        ([], r"eigenvalues have shape \(0,\); expected a vector"),
        ([[1.0, 2.0]], r"eigenvalues have shape \(1, 2\); expected a vector"),
        ([1.0, -1e-9], "NaN, infinity or a negative number"),
        ([1.0, float("nan")], "NaN, infinity or a negative number"),
        ([float("inf"), 1.0], "NaN, infinity or a negative number"),
    ],
)
def test_what_is_no_spectrum_is_refused(function, bad, sentence):
    with pytest.raises(ValueError, match=sentence):
        function(bad)
