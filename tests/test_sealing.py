"""What is packed when, against the storage itself, and what errors weigh, against plain sums."""

import itertools
import math

import mlx.core as mx
import numpy as np
import pytest
from conftest import random_codec

from vq_kvcache import Codec
from vq_kvcache.cache import LOSSLESS, SpectralKVCache
from vq_kvcache.spectral.intercept import Handle
from vq_kvcache.spectral.sealing import BLOCK, calibration_mass, far_mass, newest_mass, packed_of, scored_mass

CALIBRATED = {"objective": "fisher", "sequence_length": 1024, "window": 128, "sinks": 4}


def plain_sum(distances):
    return float(sum(1.0 / d**2 for d in distances))


def appended(window, sinks, edges):
    """Distances to what each position of each piece reads from codes, of a real cache."""
    cache = SpectralKVCache(LOSSLESS, 0, window, sinks)
    rows = []
    for start, end in itertools.pairwise(edges):
        keys, _ = cache.update_and_fetch(mx.zeros((1, 1, end - start, 4)), mx.zeros((1, 1, end - start, 4)))
        packed = []
        if isinstance(keys, Handle):
            snapshot = keys.source.snapshot
            packed = range(snapshot.layout.held_sinks[0], snapshot.layout.held_sinks[0] + snapshot.packed_tokens)
        rows += [[position - p for p in packed] for position in range(start, end)]
    return rows


@pytest.mark.parametrize(("window", "sinks"), [(0, 0), (16, 4), (100, 1)])
def test_masses_are_those_of_what_a_cache_has_packed(window, sinks):
    one_by_one = appended(window, sinks, range(401))
    for position, distances in enumerate(one_by_one):
        packed = packed_of(position + 1, window, sinks)
        assert len(distances) == packed
        assert far_mass(position, packed, sinks) == pytest.approx(plain_sum(distances), rel=2e-3)
    newest = [plain_sum(d) for d in one_by_one[400 - BLOCK : 400]]
    assert newest_mass(400, window, sinks) == pytest.approx(np.mean(newest), rel=2e-3)


@pytest.mark.parametrize("step", [16, 100])
def test_scored_positions_are_those_after_the_first_piece(step):
    edges = [0, *range(200, 700, step), 700]
    distances = appended(32, 4, edges)[200:]
    assert scored_mass(edges, 32, 4) == pytest.approx(np.mean([plain_sum(d) for d in distances]), rel=2e-3)


@pytest.mark.parametrize(("length", "window", "sinks"), [(1024, 128, 4), (60, 16, 0), (300, 64, 40)])
def test_a_calibration_weighs_all_behind_the_window(length, window, sinks):
    far = [plain_sum(range(window, position - sinks + 1)) for position in range(length)]
    assert calibration_mass(length, window, sinks) == pytest.approx(np.mean(far), rel=2e-3)


def test_what_packs_nothing_weighs_nothing():
    assert newest_mass(128 + 4 + 16 + 63, 128, 4) == 0
    assert newest_mass(128 + 4 + 16 + 64, 128, 4) > 0
    assert newest_mass(0, 128, 4) == 0
    assert calibration_mass(132, 128, 4) == calibration_mass(0, 0, 0) == 0
    assert calibration_mass(2**31 - 1, 2**31 - 6, 4) > 0


@pytest.fixture(scope="module")
def nats():
    made = random_codec(layers=2)
    return Codec(made.fingerprint, made.layers, CALIBRATED)


def test_predictions_are_costs_scaled_by_mass(nats):
    widths = nats._widths(2.0)
    cost = sum(
        float(nats.layers[i][part == "values"].costs[h, np.arange(len(bits)), bits].sum())
        for (i, part), heads in widths.items()
        for h, bits in enumerate(heads)
    )
    mass = calibration_mass(1024, 128, 4)
    assert nats.kl_of_mass(2.0, mass) == pytest.approx(cost, rel=1e-5)
    assert nats.kl_of_mass(2.0, 3 * mass) == pytest.approx(3 * cost, rel=1e-5)
    assert nats.predicted_kl(2.0, 700, 64) == pytest.approx(cost * newest_mass(700, 64, 4) / mass, rel=1e-5)
    assert nats.predicted_kl(2.0, 700) == nats.predicted_kl(2.0, 700, 128)
    silent = Codec(nats.fingerprint, nats.layers, {"objective": "fisher"})
    assert silent.predicted_kl(2.0, 700) == silent.predicted_kl(2.0, 100_000) == pytest.approx(cost, rel=1e-5)


def test_predictions_grow_with_the_context_and_fall_with_bits_and_window(nats):
    contexts = [*range(200, 700, 7), 4096, 131_072]
    by_context = [nats.predicted_kl(2.0, c) for c in contexts]
    assert all(a <= b for a, b in itertools.pairwise(by_context))
    assert by_context[0] == 0 < by_context[10] < by_context[-1]
    by_bits = [nats.predicted_kl(b) for b in (1.0, 2.0, 3.0, 4.0)]
    assert all(a > b for a, b in itertools.pairwise(by_bits))
    by_window = [nats.predicted_kl(2.0, 1000, w) for w in (0, 64, 128, 256, 1000)]
    assert all(a > b for a, b in itertools.pairwise(by_window))
    assert by_window[-1] == 0


@pytest.mark.parametrize(("context", "window"), [(500, None), (4096, None), (4096, 512)])
def test_the_budget_for_a_closeness_is_the_fewest_bits_that_are_predicted_to_keep_it(nats, context, window):
    limit = 1.3 * nats.predicted_kl(2.0, context, window)
    bits = nats.bits_for(limit, context, window)
    assert nats.predicted_kl(bits, context, window) <= limit < nats.predicted_kl(bits - 1 / 16, context, window)
    least = nats.predicted_kl(8.0, context, window)
    with pytest.raises(
        ValueError, match=rf"max_kl is .*; expected at least {least:.2g}, which 8 bits .* {context:,} tok"
    ):
        nats.bits_for(least / 2, context, window)


def test_a_longer_context_takes_more_bits(nats):
    limit = nats.predicted_kl(2.0, 1000)
    assert nats.bits_for(limit, 300) < nats.bits_for(limit, 1000) < nats.bits_for(limit, 100_000)
    assert not math.isclose(nats.bits_for(limit, 1000, 32), nats.bits_for(limit, 1000, 512))
