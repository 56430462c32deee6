"""How close to the rate-distortion bound do codes come that stand alone, in rings, and in longer trellises?

    python benchmarks/trellis.py

Gaussian numbers, 1 to 5 bits. Rings are what the cache stores (vq_kvcache/spectral/trellis.py): 4 states, closed in
one word. `--fit` derives its polynomial coefficients again, by Lloyd's iteration: each update is a least-squares fit of
an odd polynomial to the numbers that chose each level.
"""

import argparse
import json
import math

import measure
import mlx.core as mx
import numpy as np
from tqdm import trange

from vq_kvcache.spectral import trellis
from vq_kvcache.spectral.codebook import distortion

SLOTS = (5, 6, 8, 10, 16, 32)


def rings(width: int, slots: int, count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Gaussian numbers [slots, count], and the j of their levels when each column is a ring."""
    z = np.random.default_rng(seed).normal(size=(slots, count)).astype(np.float32)
    codes = np.array(trellis.quantize_rings(mx.array(z)[:, None], width)[:, 0]).astype(np.int64)
    low = codes & 1
    return z.astype(np.float64), 2 * (codes ^ np.roll(low, 2, axis=0)) + np.roll(low, 1, axis=0)


def error(width: int, slots: int, count: int = 20000) -> float:
    """Mean squared error of rings of that many codes."""
    z, j = rings(width, slots, count, seed=1)
    return float(((trellis.ring_levels(width)[j] - z) ** 2).mean())


def fit(width: int, rounds: int = 40) -> list[float]:
    """Coefficients at the fixed point, a mean over the second half of the rounds."""
    history = []
    for seed in trange(rounds, desc=f"{width} bits"):
        z, j = rings(width, trellis.ring_length(width), 12000, seed)
        t = (2 * j.ravel() + 1) / 2 ** (width + 1) - 1
        powers = t[:, None] ** (2 * np.arange(len(trellis.COEFFICIENTS[width])) + 1)
        fitted = np.linalg.lstsq(powers, z.ravel(), rcond=None)[0]
        history.append(fitted)
        trellis.COEFFICIENTS[width] = tuple(fitted.tolist())
        trellis.ring_levels.cache_clear()
        trellis._nearest_member.cache_clear()
    return [round(c, 6) for c in np.mean(history[rounds // 2 :], axis=0).tolist()]


def main() -> None:
    """Measure every width and ring; with --fit, the coefficients too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fit", action="store_true")
    args = parser.parse_args()
    if args.fit:
        print(json.dumps({width: fit(width) for width in trellis.COEFFICIENTS}))
        return
    rows = {}
    for width in trellis.COEFFICIENTS:
        found = {n: error(width, n) for n in SLOTS if n * width <= 32}
        rows[width] = {
            "bits_above_bound_alone": 0.5 * math.log2(distortion(width) * 4**width),
            "bits_above_bound_longest_ring": 0.5 * math.log2(found[max(found)] * 4**width),
            "bits_saved_by_slots": {n: 0.5 * math.log2(distortion(width) / e) for n, e in found.items()},
        }
    measure.save(measure.RESULTS / "trellis.json", {"widths": rows})
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
