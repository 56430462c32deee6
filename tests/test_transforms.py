import mlx.core as mx
import numpy as np
import oracle
import pytest

from vq_kvcache.spectral.fisher import LayerFisher
from vq_kvcache.spectral.transforms import STRETCHES, fisher_transforms, transforms_of

DIMS = 16


def seen(vectors, gradients):
    """Statistics of sequences [S, H, T, D]."""
    made = LayerFisher()
    for i, (x, g) in enumerate(zip(vectors, gradients, strict=True)):
        made.update(mx.array(x[None].astype(np.float32)), mx.array(g[None].astype(np.float32)), i, True)
    return made


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape)


def test_errors_in_the_basis_cost_what_they_cost_in_the_metric():
    made = seen(normal(4, 2, 200, DIMS) @ normal(DIMS, DIMS, seed=1) + 3.0, normal(4, 2, 200, DIMS, seed=2))
    found = fisher_transforms(made.vectors, made.metric, made.kept)
    for h in range(2):
        error = normal(5, DIMS, seed=3)
        in_basis = ((error @ found.analysis[h].astype(np.float64)) ** 2).sum(axis=1)
        assert in_basis == pytest.approx(np.einsum("ni,ij,nj->n", error, made.metric[h], error), rel=1e-4)
        z = (np.array(mx.concatenate([x for x, _ in made.kept], axis=1))[h] - found.mean[h]) @ found.analysis[h]
        assert (z**2).mean(axis=0) == pytest.approx(found.eigenvalues[h], rel=1e-3)


@pytest.mark.parametrize(("kind", "ratio"), [("apart", 1.0), ("alike", 8.0), ("all alike", 20.0)])
def test_errors_that_a_sequence_shares_add_up(kind, ratio):
    """Vectors and gradients that stay the same over 8 tokens, or over 64, cost as many times more, 20 at most."""
    same = {"apart": 1, "alike": 8, "all alike": 64}[kind]
    x, g = (np.repeat(normal(64, 1, 64 // same, DIMS, seed=s), same, axis=2) for s in (0, 1))
    made = seen(x, g)
    costs = fisher_transforms(made.vectors, made.metric, made.kept).costs.sum(axis=1)
    alone = transforms_of(made.vectors, made.metric, [v for v, _ in made.kept]).costs.sum(axis=1) / 2
    assert costs[0, [0, 2]] / alone[0, [0, 2]] == pytest.approx(ratio, rel=0.25)


def test_costs_are_measured_and_rings_cost_less():
    made = seen(normal(4, 1, 1024, DIMS), normal(4, 1, 1024, DIMS, seed=1))
    found = transforms_of(made.vectors, np.eye(DIMS)[None], [x for x, _ in made.kept])
    assert found.costs[0, :, 0] == pytest.approx(found.eigenvalues[0], rel=0.02)
    for bits in range(1, 9):
        alone = oracle.distortion(oracle.levels(bits))
        share = found.costs[0, :, bits].mean() / found.eigenvalues[0].mean() / alone
        assert share == pytest.approx(1.0, abs=0.05) if bits > 5 else 0.6 < share < 0.95


def test_heavy_tails_get_room():
    x = normal(4, 1, 1024, DIMS)
    x[..., 1] *= np.where(np.random.default_rng(5).random(x.shape[:-1]) < 0.03, 8.0, 0.3)
    made = seen(x, normal(4, 1, 1024, DIMS, seed=1))
    found = transforms_of(made.vectors, np.eye(DIMS)[None], [v for v, _ in made.kept])
    heavy = int(np.abs(found.analysis[0, 1]).argmax())
    assert found.stretch[0, heavy, 3] > 1.0
    assert np.median(found.stretch[0, :, 3]) == 1.0
    assert set(np.unique(found.stretch)) <= {np.float32(s) for s in STRETCHES}
