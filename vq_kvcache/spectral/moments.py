"""Running mean and covariance of vectors, head by head, in float64."""

from collections.abc import Iterable

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray


class Moments:
    """Mean [H, D] and scatter [H, D, D] about it of all vectors seen so far.

    Each batch is centred on its own mean in float32 on the device and merged in float64 (Chan, Golub & LeVeque 1979),
    because raw keys are dominated by their mean and would cancel.
    """

    def __init__(self) -> None:
        self.count = 0
        self.mean: NDArray[np.float64] = np.zeros(0)
        self.scatter: NDArray[np.float64] = np.zeros(0)

    def update(self, x: mx.array) -> None:
        """Add vectors [B, H, T, D]. ValueError when one is not finite."""
        heads, dims = x.shape[1], x.shape[3]
        x = x.astype(mx.float32).swapaxes(0, 1).reshape(heads, -1, dims)
        mean = x.mean(axis=1, keepdims=True)
        centred = x - mean
        scatter = centred.swapaxes(1, 2) @ centred
        self._merge(x.shape[1], np.array(mean[:, 0], dtype=np.float64), np.array(scatter, dtype=np.float64))

    def _merge(self, count: int, mean: NDArray[np.float64], scatter: NDArray[np.float64]) -> None:
        if not (np.isfinite(mean).all() and np.isfinite(scatter).all()):
            raise ValueError("activations hold NaN or infinity; expected finite keys and values; check the model.")
        if self.count == 0:
            self.count, self.mean, self.scatter = count, mean, scatter
            return
        total = self.count + count
        delta = mean - self.mean
        self.scatter = self.scatter + scatter + delta[:, :, None] * delta[:, None, :] * (self.count * count / total)
        self.mean = self.mean + delta * (count / total)
        self.count = total

    @property
    def covariance(self) -> NDArray[np.float64]:
        """[H, D, D], about the mean."""
        return self.scatter / max(self.count, 1)

    @classmethod
    def merged(cls, parts: Iterable["Moments"]) -> "Moments":
        """The moments of the vectors of several."""
        result = cls()
        for part in parts:
            if part.count:
                result._merge(part.count, part.mean, part.scatter)
        return result

    def pooled(self) -> "Moments":
        """The moments of all heads' vectors taken together, H = 1."""
        result = Moments()
        for mean, scatter in zip(self.mean, self.scatter, strict=True):
            result._merge(self.count, mean[None], scatter[None])
        return result


class SecondMoments:
    """E[x xT], [H, D, D], of vectors whose zero means something (queries)."""

    def __init__(self) -> None:
        self.count = 0
        self.total: NDArray[np.float64] = np.zeros(0)

    def update(self, x: mx.array, heads: int) -> None:
        """Add vectors [B, heads * G, T, D]; the G of a group count for the same head."""
        x = x.astype(mx.float32).swapaxes(0, 1).reshape(heads, -1, x.shape[-1])
        total = np.array(x.swapaxes(1, 2) @ x, dtype=np.float64)
        self.total = total if self.count == 0 else self.total + total
        self.count += x.shape[1]

    @property
    def value(self) -> NDArray[np.float64]:
        """[H, D, D]."""
        return self.total / max(self.count, 1)
