"""The Gaussian rate-distortion bound of a codec's own statistics, as caches to measure: the least KL at a rate.

Reverse water-filling over all coordinates of the model (Cover & Thomas, ch. 10.3): at water level t a coordinate of
variance l gets 1/2 log2(l / t) bits and the distortion D = min(t, l), in nats through the codec's Fisher metric. The
ideal test channel, z^ = (1 - D / l) z + sqrt(D (1 - D / l)) n with n a unit Gaussian, then runs behind the real cache.
"""

import itertools
import math
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np
from measure import NoisyKVCache

from vq_kvcache.hooks import own_caches
from vq_kvcache.spectral.codec import Codec, Transforms

BITS = (0.5, 0.75, 1, 1.5, 2, 2.5, 3)


def water_level(variances: np.ndarray, bits: float) -> float:
    """The level at which all coordinates together get `bits` bits each on average."""
    logs = np.sort(np.log2(np.maximum(variances, 1e-38)))[::-1]
    total = bits * len(logs)
    # With the n largest above water: sum of 1/2 (log l - log t) = total.
    for n in range(1, len(logs) + 1):
        level = (logs[:n].sum() - 2 * total) / n
        if n == len(logs) or level >= logs[n]:
            return float(2.0**level)
    raise AssertionError


def caches_of(model: Any, codec: Codec, bits: float) -> Callable[[], list[Any]]:
    """Makes caches of `model` whose packed tokens went through the ideal channel at this rate."""
    level = water_level(np.concatenate([t.eigenvalues.ravel() for pair in codec.layers.values() for t in pair]), bits)

    def make() -> list[Any]:
        return [
            NoisyKVCache(*(_channel(t, level, 2 * i + part) for part, t in enumerate(codec.layers[i])))
            if i in codec.layers
            else own
            for i, own in enumerate(own_caches(model))
        ]

    return make


def _channel(transforms: Transforms, level: float, seed: int) -> Callable[[mx.array], mx.array]:
    variances = np.maximum(transforms.eigenvalues.astype(np.float64), 1e-38)
    kept = 1 - np.minimum(level, variances) / variances  # [H, D]
    noise = np.sqrt(np.minimum(level, variances) * kept)
    synthesis = np.linalg.inv(transforms.analysis.astype(np.float64))
    mean, analysis = mx.array(transforms.mean)[:, None], mx.array(transforms.analysis)
    keep, spread, back = (mx.array(a.astype(np.float32)) for a in (kept[:, None], noise[:, None], synthesis))
    key = [mx.random.key(seed)]

    def change(x: mx.array) -> mx.array:
        key[0], now = mx.random.split(key[0])
        z = (x - mean) @ analysis
        return (z * keep + spread * mx.random.normal(z.shape, key=now)) @ back + mean

    return change


def bits_at(kl: float, curve: dict[float, float]) -> float:
    """The rate at which the bound's KL, log-linear between the measured rates, is `kl`."""
    points = sorted(curve.items())
    for (low, high_kl), (high, low_kl) in itertools.pairwise(points):
        if kl >= low_kl or high == points[-1][0]:
            share = math.log(high_kl / kl) / math.log(high_kl / low_kl)
            return low + share * (high - low)
    raise AssertionError
