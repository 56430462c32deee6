import inspect

import mlx.core as mx
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vq_kvcache.spectral.bit_allocator import allocate, gaussian_costs, water_fill_bits

spectra = st.lists(st.floats(1e-4, 1e4), min_size=1, max_size=24)


def test_the_documented_signature():
    assert str(inspect.signature(water_fill_bits)).endswith(
        "target_avg_bits: float, min_bits: int = 1, max_bits: int = 8) -> list[int]"
    )
    assert next(iter(inspect.signature(water_fill_bits).parameters)) == "eigenvalues"


@given(spectra, st.floats(1, 8))
@settings(deadline=None)
def test_widths_sum_to_the_rounded_target_as_builtin_integers_in_range(spectrum, target):
    widths = water_fill_bits(spectrum, target)
    assert type(widths) is list
    assert {type(b) for b in widths} == {int}
    assert sum(widths) == round(target * len(spectrum))
    assert 1 <= min(widths) <= max(widths) <= 8


@given(spectra, st.floats(0, 8), st.integers(0, 8), st.integers(0, 8))
@settings(deadline=None)
def test_every_limit_is_kept(spectrum, target, low, high):
    low, high = min(low, high), max(low, high)
    target = min(max(target, low), high)
    widths = water_fill_bits(spectrum, target, low, high)
    assert sum(widths) == round(target * len(spectrum))
    assert low <= min(widths) <= max(widths) <= high


@given(spectra, st.floats(1, 8))
@settings(deadline=None)
def test_widths_equal_the_oracles_greedy_allocation(spectrum, target):
    total = round(target * len(spectrum))
    assert water_fill_bits(spectrum, target) == oracle.water_fill(gaussian_costs(spectrum).tolist(), total, 1)


def test_gaussian_costs_are_variance_times_distortion():
    assert gaussian_costs([4.0, 0.5]) == pytest.approx(oracle.costs([4.0, 0.5]), rel=1e-6)


@given(st.permutations([64.0, 16.0, 4.0, 1.0, 0.25]))
@settings(deadline=None)
def test_widths_come_in_the_order_of_the_input(spectrum):
    by_variance = dict(zip([64.0, 16.0, 4.0, 1.0, 0.25], water_fill_bits([64.0, 16.0, 4.0, 1.0, 0.25], 3), strict=True))
    assert water_fill_bits(spectrum, 3) == [by_variance[x] for x in spectrum]


@pytest.mark.parametrize(("target", "widths"), [(1.25, [2, 1, 1, 1]), (1.5, [2, 2, 1, 1]), (2.75, [3, 3, 3, 2])])
def test_ties_go_to_the_lowest_index(target, widths):
    assert water_fill_bits([1.0] * 4, target) == widths


def test_a_larger_variance_never_gets_fewer_bits():
    widths = water_fill_bits([0.7**i for i in range(64)], 2.3)
    assert widths == sorted(widths, reverse=True)
    assert len(set(widths)) > 3


@pytest.mark.parametrize("spectrum", [[1, 1, 1], [100, 1, 0.01], [5, 4, 3], [1, 0, 0], [2, 1000, 7]])
@pytest.mark.parametrize("total", [3, 4, 7, 10, 15])
def test_no_other_widths_of_the_same_total_cost_less(spectrum, total):
    table = oracle.costs(spectrum)
    widths = water_fill_bits(spectrum, total / 3, 1, 5)
    cost = sum(row[b] for row, b in zip(table, widths, strict=True))
    assert cost <= oracle.best_allocation(table, total, 1, 5) * (1 + 1e-6)


def test_eigenvalues_come_as_an_mlx_array_too():
    assert water_fill_bits(mx.array([4.0, 1.0, 0.25, 0.1]), 2) == water_fill_bits([4.0, 1.0, 0.25, 0.1], 2)


def test_allocate_follows_costs_that_are_no_gaussian():
    costs = np.tile(np.linspace(8, 0, 9), (3, 1)) * np.array([[1.0], [3.0], [2.0]])
    assert allocate(costs, 12).tolist() == [0, 8, 4]


@pytest.mark.parametrize("target", [0.99, 8.01, -1, float("nan"), float("inf")])
def test_a_target_outside_the_limits_is_refused(target):
    with pytest.raises(ValueError, match=r"target_avg_bits is \S+; expected 1 to 8; change it or the limits"):
        water_fill_bits([1.0, 0.5], target)


@pytest.mark.parametrize(("low", "high", "target"), [(-1, 4, 2), (2, 9, 4)])
def test_limits_that_no_width_has_are_refused(low, high, target):
    with pytest.raises(ValueError, match=rf"widths {low}\.\.{high} asked for; expected 0 <= min <= max <= 8"):
        water_fill_bits([1.0, 0.5], target, low, high)


@pytest.mark.parametrize("total", [-1, 17])
def test_a_total_that_cannot_be_spent_is_refused(total):
    with pytest.raises(ValueError, match=rf"{total} bits for 2 dimensions; expected 0 to 16"):
        allocate(gaussian_costs([1.0, 0.5]), total)


@pytest.mark.parametrize("bad", [[], [1.0, -1.0], [1.0, float("nan")], [[1.0]]])
def test_what_is_no_spectrum_is_refused(bad):
    with pytest.raises(ValueError, match=r"eigenvalues (have shape|hold NaN)"):
        water_fill_bits(bad, 2)
