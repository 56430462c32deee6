"""Statistics of vectors, and what their errors cost -> the basis in which they are cheapest to store, and what each
coordinate costs at each width."""

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from .codebook import MAX_BITS, dequantize, quantize
from .codec import Transforms
from .moments import Moments
from .spectral_quant import SMALLEST_RELATIVE_DEVIATION
from .trellis import RING_BITS, dequantize_rings, quantize_rings, ring_length

# Eigenvalues of a metric below this share of the largest are raised to it: its inverse root must stay bounded.
METRIC_FLOOR = 1e-5
SMALLEST_METRIC = 1e-12
STRETCHES = (1.0, 1.2, 1.5, 2.0)
KEPT_VECTORS = 4096  # of each head, on which costs are measured
RING_VECTORS = 1024  # of each head, on which costs in rings are: a search is a hundred times the work of a rounding
RATIO_LIMITS = (0.5, 20.0)


def transforms_of(moments: Moments, metric: NDArray[np.float64], kept: list[mx.array]) -> Transforms:
    """With metric F and covariance C, A = F^(1/2) and A C A = U diag(l) UT; analysis is A U. Costs are measured on
    `kept`, vectors [H, T, D], as errors in the metric."""
    return _measured(moments, metric, kept)[0]


def fisher_transforms(
    moments: Moments,
    metric: NDArray[np.float64],
    kept: list[tuple[mx.array, mx.array]],
    covariance: NDArray[np.float64] | None = None,
) -> Transforms:
    """The same for a metric in nats: costs are what errors add to the KL of the model's predictions, per token.

    kept: (vectors, gradients), [H, T, D] each, of whole sequences.  covariance: in place of the moments' own.
    """
    transforms, alone = _measured(moments, metric, [x for x, _ in kept], covariance)
    # Half the squared error in the metric is KL, and errors add up along the sequence.
    costs = transforms.costs / 2 * _sequence_ratio(transforms, alone, kept)
    arrays = transforms.mean, transforms.analysis, transforms.eigenvalues, costs.astype(np.float32)
    return Transforms(*arrays, transforms.stretch)


def eigen(matrix: NDArray[np.float64]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Eigenvalues [D] descending, not negative, and eigenvectors as columns [D, D]."""
    values, vectors = np.linalg.eigh(matrix)
    return np.maximum(values[::-1], 0), vectors[:, ::-1]


def basis_of(
    covariance: NDArray[np.float64], metric: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Analysis [H, D, D] and eigenvalues [H, D] of covariances and metrics [H, D, D]."""
    heads, dims, _ = covariance.shape
    analysis, eigenvalues = np.zeros((heads, dims, dims)), np.zeros((heads, dims))
    for h in range(heads):
        weights, basis = eigen(metric[h])
        # A head that nothing depends on has a metric of zeros: any basis serves it, and its bits cost nothing.
        least = METRIC_FLOOR * weights[0] if weights[0] > 0 else SMALLEST_METRIC
        root = (basis * np.sqrt(np.maximum(weights, least))) @ basis.T
        eigenvalues[h], vectors = eigen(root @ covariance[h] @ root)
        analysis[h] = root @ vectors
    return analysis, eigenvalues


def _measured(
    moments: Moments,
    metric: NDArray[np.float64],
    kept: list[mx.array],
    covariance: NDArray[np.float64] | None = None,
) -> tuple[Transforms, NDArray[np.float64]]:
    """The transforms, and the costs [H, D, 9] of codes that stand alone."""
    analysis, eigenvalues = basis_of(moments.covariance if covariance is None else covariance, metric)
    centred = mx.concatenate(kept, axis=1).astype(mx.float32) - mx.array(moments.mean.astype(np.float32))[:, None]
    scale = deviations(eigenvalues)
    unit = centred @ mx.array((analysis / scale[:, None]).astype(np.float32))
    alone, costs, stretch = _measure_costs(unit)
    arrays = moments.mean, analysis, eigenvalues, costs * scale[..., None] ** 2, stretch
    transforms = Transforms(*(np.ascontiguousarray(a, dtype=np.float32) for a in arrays))
    return transforms, alone * scale[..., None] ** 2


def _measure_costs(unit: mx.array) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Mean squared error of coordinates of unit variance [H, T, D] at 0..8 bits, [H, D, 9]: of codes that stand alone,
    and in rings where there are such; and the stretch that gives the latter."""
    unit = _thinned(unit, KEPT_VECTORS)
    heads, _, dims = unit.shape
    alone = np.zeros((heads, dims, MAX_BITS + 1))
    costs, stretch = alone.copy(), np.ones_like(alone)
    alone[..., 0] = costs[..., 0] = np.array((unit**2).mean(axis=1))
    for bits in range(1, MAX_BITS + 1):
        table = np.array(mx.stack([_error(rounded(unit / s, bits), unit / s) * s**2 for s in STRETCHES]))
        best = table.argmin(axis=0)
        alone[..., bits] = np.take_along_axis(table, best[None], axis=0)[0]
        if bits <= RING_BITS:
            few = _thinned(unit, RING_VECTORS)
            # Rings have levels further out, so they need as much room as codes that stand alone, or one step less.
            tried = np.array(STRETCHES)[np.stack([best, np.maximum(best - 1, 0)])]
            spread = [mx.array(s.astype(np.float32))[:, None] for s in tried]
            table = np.array(mx.stack([_error(_rounded_in_rings(few / s, bits) * s, few) for s in spread]))
            at = table.argmin(axis=0)[None]
        else:
            tried, at = np.broadcast_to(np.array(STRETCHES)[:, None, None], table.shape), best[None]
        costs[..., bits] = np.take_along_axis(table, at, axis=0)[0]
        stretch[..., bits] = np.take_along_axis(tried, at, axis=0)[0]
    return alone, costs, stretch


def rounded(unit: mx.array, bits: int) -> mx.array:
    """Numbers to their nearest levels."""
    return dequantize(quantize(unit, bits), bits) if bits else mx.zeros_like(unit)


def coarsened(transforms: Transforms, x: mx.array, bits: int) -> mx.array:
    """Vectors [B, H, T, D] with every coordinate at `bits` bits, alone."""
    deviation = deviations(transforms.eigenvalues.astype(np.float64)) * transforms.stretch[..., bits]
    analysis = mx.array((transforms.analysis / deviation[:, None]).astype(np.float32))
    synthesis = np.linalg.inv(transforms.analysis.astype(np.float64)) * deviation[..., None]
    mean = mx.array(transforms.mean)[:, None]
    unit = rounded((x.astype(mx.float32) - mean) @ analysis, bits)
    return unit @ mx.array(synthesis.astype(np.float32)) + mean


def _rounded_in_rings(unit: mx.array, bits: int) -> mx.array:
    """[H, T, D] to levels, in rings of coordinates that a segment of this width would put in one word."""
    slots, dims = ring_length(bits), unit.shape[-1]
    rings = -(-dims // slots)
    # Coordinates that do not fill a ring share it with the first ones, whose error is then not counted twice.
    order = (mx.arange(slots * rings) % dims).reshape(slots, rings)
    z = mx.take(unit, order, axis=-1).transpose(0, 2, 3, 1)  # [H, slots, rings, T]
    codes = quantize_rings(z, bits)
    lows = codes & 1
    turned = codes ^ mx.roll(lows, 2, 1)
    levels = dequantize_rings(2 * turned + mx.roll(lows, 1, 1), bits)
    mx.eval(levels)
    return levels.transpose(0, 3, 1, 2).reshape(*unit.shape[:2], -1)[..., :dims]


def _error(a: mx.array, b: mx.array) -> mx.array:
    return ((a - b) ** 2).mean(axis=1)


def _thinned(x: mx.array, count: int) -> mx.array:
    return x[:, :: max(1, -(-x.shape[1] // count))]


def _sequence_ratio(
    transforms: Transforms, alone: NDArray[np.float64], kept: list[tuple[mx.array, mx.array]]
) -> NDArray[np.float64]:
    """[H, 1, 9]: how much more errors of a head cost than if those of different tokens were independent.

    The square of the sum over a sequence of gradient times error, over the mean cost in the metric; pooled over the
    coordinates of a head, because one coordinate alone is too noisy.
    """
    heads = len(transforms.mean)
    deviation = deviations(transforms.eigenvalues.astype(np.float64))
    analysis = mx.array((transforms.analysis / deviation[:, None]).astype(np.float32))
    synthesis = np.linalg.inv(transforms.analysis.astype(np.float64)) * deviation[..., None]
    back = mx.array(synthesis.astype(np.float32))
    mean, stretch = mx.array(transforms.mean)[:, None], mx.array(transforms.stretch)[:, None]
    total, tokens = np.zeros((heads, MAX_BITS + 1)), 0
    for x, g in kept:
        unit, slope = (x - mean) @ analysis, g @ back.swapaxes(1, 2)
        tokens += x.shape[1]
        for bits in range(MAX_BITS + 1):
            s = stretch[..., bits]
            errors = rounded(unit / s, bits) * s - unit
            total[:, bits] += np.array(((slope * errors).sum(axis=1) ** 2).sum(axis=-1))
    ratio = total / tokens / np.maximum(alone.sum(axis=1), 1e-30)
    return np.asarray(np.clip(ratio, *RATIO_LIMITS)[:, None])


def deviations(eigenvalues: NDArray[np.float64]) -> NDArray[np.float64]:
    """Standard deviations [H, D], none of them zero."""
    root = np.sqrt(np.maximum(eigenvalues, 0))
    smallest = np.maximum(root.max(axis=-1, keepdims=True) * SMALLEST_RELATIVE_DEVIATION, 1e-30)
    return np.asarray(np.maximum(root, smallest))
