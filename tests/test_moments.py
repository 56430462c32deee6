import mlx.core as mx
import numpy as np
import oracle
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vq_kvcache.spectral.moments import Moments, SecondMoments


def vectors(shape, seed=0, mean=0.0):
    """Correlated vectors [B, H, T, D], another covariance for each head."""
    generator = np.random.default_rng(seed)
    mixing = generator.normal(size=(shape[1], shape[3], shape[3]))
    return (generator.normal(size=shape) @ mixing + mean).astype(np.float32)


def moments_of(*batches):
    moments = Moments()
    for x in batches:
        moments.update(mx.array(x))
    return moments


def of_head(batches, head):
    return np.concatenate([x[:, head].reshape(-1, x.shape[-1]) for x in batches])


@given(st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 3), st.integers(1, 2))
@settings(deadline=None, max_examples=30)
def test_mean_and_covariance_of_every_head_are_the_oracles_however_the_vectors_arrive(tokens, heads, rows):
    batches = [vectors((rows, heads, t, 5), seed=i) for i, t in enumerate(tokens)]
    moments = moments_of(*batches)
    assert moments.count == rows * sum(tokens)
    for h in range(heads):
        mean, basis, eigenvalues = oracle.pca(of_head(batches, h))
        assert moments.mean[h] == pytest.approx(mean, abs=1e-4)
        assert moments.covariance[h] == pytest.approx((basis * eigenvalues) @ basis.T, abs=1e-3)


def test_a_mean_far_larger_than_the_spread_does_not_cancel():
    batches = [vectors((1, 2, 500, 6), seed=i, mean=300.0 + i) for i in range(3)]
    moments = moments_of(*batches)
    for h in range(2):
        x = of_head(batches, h).astype(np.float64)
        expected = np.cov(x, rowvar=False, bias=True)
        assert moments.covariance[h] == pytest.approx(expected, abs=2e-4 * np.trace(expected))


def test_pooled_moments_are_those_of_all_heads_together():
    batches = [vectors((1, 3, 40, 4), seed=i) + np.arange(3)[None, :, None, None] for i in range(2)]
    pooled = moments_of(*batches).pooled()
    x = np.concatenate([of_head(batches, h) for h in range(3)])
    assert pooled.count == 240
    assert pooled.mean == pytest.approx(x.mean(axis=0)[None], abs=1e-5)
    assert pooled.covariance == pytest.approx(np.cov(x, rowvar=False, bias=True)[None], abs=1e-4)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_half_precision_is_summed_in_float32(dtype):
    x = mx.array(vectors((1, 1, 3000, 4), mean=5.0)).astype(dtype)
    moments = Moments()
    moments.update(x)
    exact = np.array(x.astype(mx.float32), dtype=np.float64)[0, 0]
    assert moments.mean[0] == pytest.approx(exact.mean(axis=0), rel=1e-4)
    assert moments.covariance[0] == pytest.approx(np.cov(exact, rowvar=False, bias=True), abs=1e-3)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("late", [False, True])
def test_vectors_that_are_not_finite_are_refused(bad, late):
    moments = moments_of(*([vectors((1, 2, 5, 4))] if late else []))
    x = vectors((1, 2, 5, 4), seed=1)
    x[0, 1, 3, 2] = bad
    with pytest.raises(ValueError, match="activations hold NaN or infinity; expected finite keys and values"):
        moments.update(mx.array(x))


def test_second_moments_pool_the_query_heads_of_a_group():
    batches = [vectors((2, 6, t, 4), seed=t, mean=1.0) for t in (3, 8)]
    second = SecondMoments()
    for x in batches:
        second.update(mx.array(x), 3)
    for h in range(3):
        x = np.concatenate([of_head(batches, 2 * h), of_head(batches, 2 * h + 1)]).astype(np.float64)
        assert second.value[h] == pytest.approx(x.T @ x / len(x), rel=1e-4, abs=1e-4)
