"""How far measured matrices are pulled towards a round one, judged by text that they were not measured on.

A covariance or a Fisher matrix of few sequences takes chance for structure: its smallest eigenvalues are too small, and
what falls there in other text is coded badly. With n sequences, M becomes (n M + a tr(M)/D I) / (n + a) (Ledoit & Wolf
2004); a, in sequences, is what makes the codec of one half of the calibration text cost least on the other half.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from .bit_allocator import allocate, gaussian_costs
from .fisher import LayerFisher
from .moments import Moments
from .transforms import basis_of, deviations, rounded

STRENGTHS = (0.0, 0.1, 0.3, 1.0, 3.0)
JUDGED_BITS = 2
JUDGED_PARTS = 8  # keys or values of a layer, evenly spread over the model
JUDGED_VECTORS = 512  # of each head
LEAST_SEQUENCES = 4


class Shrinkage(NamedTuple):
    """a of the covariances and of the Fisher matrices, in sequences."""

    covariance: float = 0.0
    metric: float = 0.0


def shrunk(matrix: NDArray[np.float64], strength: float, sequences: float) -> NDArray[np.float64]:
    """Matrices [H, D, D] of `sequences` sequences, pulled towards multiples of the identity."""
    dims = matrix.shape[-1]
    size = np.trace(matrix, axis1=1, axis2=2)[:, None, None] / dims
    return np.asarray((sequences * matrix + strength * size * np.eye(dims)) / (sequences + strength))


def choose(statistics: Iterable[LayerFisher], sequences: int) -> Shrinkage:
    """What costs least on held-out halves; none when there are fewer than 4 sequences to judge by."""
    parts = list(statistics)
    parts = parts[:: -(-len(parts) // JUDGED_PARTS)]
    if min(len(p.kept) for p in parts) < LEAST_SEQUENCES:
        return Shrinkage()
    by_metric = {a: _held_out_cost(parts, Shrinkage(0.0, a), sequences) for a in STRENGTHS}
    metric = min(STRENGTHS, key=by_metric.__getitem__)
    by_covariance = {0.0: by_metric[metric]}  # tried above
    by_covariance |= {a: _held_out_cost(parts, Shrinkage(a, metric), sequences) for a in STRENGTHS if a > 0}
    return Shrinkage(min(STRENGTHS, key=by_covariance.__getitem__), metric)


def _held_out_cost(parts: Sequence[LayerFisher], strength: Shrinkage, sequences: int) -> float:
    """Nats per token of codes at 2 bits: transforms from one half of the sequences, all else from the other."""
    total = 0.0
    for part in parts:
        for mine, other in ((0, 1), (1, 0)):
            (vectors, gradients), (_, judge) = part.halves[mine], part.halves[other]
            held = mx.concatenate([x for x, _ in part.kept[other::2]], axis=1)
            held = held[:, :: max(1, held.shape[1] // JUDGED_VECTORS)]
            metric = shrunk(gradients.value, strength.metric, sequences / 2)
            covariance = shrunk(vectors.covariance, strength.covariance, sequences / 2)
            total += _cost(vectors, covariance, metric, held, judge.value)
    return total


def _cost(
    moments: Moments,
    covariance: NDArray[np.float64],
    metric: NDArray[np.float64],
    held: mx.array,
    judge: NDArray[np.float64],
) -> float:
    analysis, eigenvalues = basis_of(covariance, metric)
    scale = deviations(eigenvalues)
    widths = allocate(gaussian_costs(eigenvalues.ravel()), JUDGED_BITS * eigenvalues.size).reshape(eigenvalues.shape)
    unit = (held - mx.array(moments.mean.astype(np.float32))[:, None]) @ mx.array(
        (analysis / scale[:, None]).astype(np.float32)
    )
    errors = np.array(unit, dtype=np.float64)
    for bits in np.unique(widths):
        found = np.array(rounded(unit, int(bits)) - unit, dtype=np.float64)
        errors = np.where((widths == bits)[:, None], found, errors)
    errors = errors @ (np.linalg.inv(analysis) * scale[..., None])
    return float(((errors @ judge) * errors).sum() / errors.shape[1] / 2)
