import mlx.core as mx
import numpy as np
import oracle
import pytest

from vq_kvcache.spectral import shrinkage
from vq_kvcache.spectral.fisher import LayerFisher
from vq_kvcache.spectral.shrinkage import Shrinkage, choose, shrunk

DIMS = 24


def layer(sequences, tokens, spread, slope, seed=0, mean=0.0):
    """Statistics of vectors of standard deviations `spread` [D] about `mean`, with gradients of scale `slope` [D]."""
    generator, made = np.random.default_rng(seed), LayerFisher()
    for i in range(sequences):
        x, g = (mx.array((generator.normal(size=(1, 2, tokens, DIMS)) * s).astype(np.float32)) for s in (spread, slope))
        made.update(x + mean, g, i, True)
    return made


def test_matrices_are_pulled_towards_their_mean_eigenvalue():
    matrix = np.array([np.diag([4.0, 2.0, 0.0]), np.diag([1.0, 1.0, 7.0])])
    assert (shrunk(matrix, 0.0, 5) == matrix).all()
    found = shrunk(matrix, 2.0, 6)
    assert found[0] == pytest.approx(np.diag([3.5, 2.0, 0.5]))
    assert found[1] == pytest.approx(np.diag([1.5, 1.5, 6.0]))


def test_few_sequences_of_round_vectors_are_shrunk_and_many_of_steep_ones_are_not():
    """Where all dimensions are alike, structure is chance; where they truly differ, pulling them together costs."""
    round_ones = choose([layer(4, 6, np.ones(DIMS), np.ones(DIMS))], 4)
    assert round_ones == Shrinkage(3.0, 3.0)
    steep = 4.0 ** -np.arange(DIMS)
    assert choose([layer(32, 64, np.ones(DIMS), steep)], 32).metric < 1
    assert choose([layer(32, 64, steep, np.ones(DIMS))], 32).covariance < 1


def test_the_cost_on_held_out_text_is_that_of_two_bits_a_number():
    made = layer(8, 256, np.ones(DIMS), np.ones(DIMS), mean=3.0)
    (moments, _), _ = made.halves
    held, identity = mx.concatenate([x for x, _ in made.kept[1::2]], axis=1), np.tile(np.eye(DIMS), (2, 1, 1))
    found = shrinkage._cost(moments, identity, identity, held, identity)
    assert found == pytest.approx(2 * DIMS * oracle.distortion(oracle.levels(2)) / 2, rel=0.03)


def test_each_half_is_judged_by_the_other(monkeypatch):
    seen = []

    def cost(moments, covariance, metric, held, judge):
        seen.append((float(moments.mean.mean()), float(mx.mean(held)), float(np.trace(judge[0]))))
        return 1.0

    monkeypatch.setattr(shrinkage, "_cost", cost)
    made = LayerFisher()
    for i in range(4):
        x = mx.full((1, 1, 8, DIMS), 1.0 if i % 2 else -1.0)
        made.update(x, 2 * x if i % 2 else x, i, True)
    choose([made], 4)
    assert set(seen) == {(-1.0, 1.0, 4.0 * DIMS), (1.0, -1.0, 1.0 * DIMS)}


def test_fewer_than_four_sequences_are_taken_as_they_are():
    assert choose([layer(3, 6, np.ones(DIMS), np.ones(DIMS))], 3) == Shrinkage()


def test_the_parts_that_judge_are_spread_over_the_model(monkeypatch):
    judges = []
    monkeypatch.setattr(shrinkage, "_held_out_cost", lambda parts, strength, n: judges.append(parts) or 1.0)
    parts = [layer(4, 2, np.ones(DIMS), np.ones(DIMS), seed) for seed in range(20)]
    choose(parts, 4)
    assert [parts.index(p) for p in judges[0]] == [0, 3, 6, 9, 12, 15, 18]


def test_the_cheapest_strengths_are_taken_and_none_is_tried_twice(monkeypatch):
    tried = []

    def cost(parts, strength, sequences):
        tried.append(strength)
        return abs(strength.metric - 1.0) + abs(strength.covariance - 0.3)

    monkeypatch.setattr(shrinkage, "_held_out_cost", cost)
    assert choose([layer(4, 2, np.ones(DIMS), np.ones(DIMS))], 4) == Shrinkage(0.3, 1.0)
    assert len(tried) == len(set(tried)) == 2 * len(shrinkage.STRENGTHS) - 1
