"""Who gets the next bit: greedy allocation on measured or modelled distortion."""

import heapq

import mlx.core as mx
import numpy as np
from numpy.typing import ArrayLike, NDArray

from .codebook import MAX_BITS, distortion
from .participation_ratio import as_spectrum


def gaussian_costs(eigenvalues: ArrayLike | mx.array) -> NDArray[np.float64]:
    """Distortion of each coordinate at 0..8 bits, float64 [D, 9]: its variance times that of the levels really used."""
    return np.outer(as_spectrum(eigenvalues), [distortion(b) for b in range(MAX_BITS + 1)])


def allocate(
    costs: NDArray[np.float64],
    total: int,
    min_bits: int = 0,
    max_bits: int = MAX_BITS,
    start: NDArray[np.int64] | None = None,
) -> NDArray[np.int64]:
    """Widths [N] that spend `total` bits, each bit where it removes most of `costs` [N, 9]; ties to the lowest index.

    start: widths [N] that are spent already, counted in `total`; None for `min_bits` each.
    Greedy is optimal where each row is convex (Fox 1966), which D(b) of the Gaussian levels is.
    """
    count = len(costs)
    if not 0 <= min_bits <= max_bits <= MAX_BITS:
        raise ValueError(f"widths {min_bits}..{max_bits} asked for; expected 0 <= min <= max <= {MAX_BITS}.")
    if not min_bits * count <= total <= max_bits * count:
        raise ValueError(
            f"{total} bits for {count} dimensions; expected {min_bits * count} to {max_bits * count}; "
            "change the budget or the limits."
        )
    gains = -np.diff(costs, axis=1)
    rows = gains.tolist()
    widths = [min_bits] * count if start is None else start.tolist()
    heap = [(-row[b], i) for i, (row, b) in enumerate(zip(rows, widths, strict=True)) if b < max_bits]
    heapq.heapify(heap)
    for _ in range(total - sum(widths)):
        _, i = heapq.heappop(heap)
        widths[i] += 1
        if widths[i] < max_bits:
            heapq.heappush(heap, (-rows[i][widths[i]], i))
    return np.array(widths, dtype=np.int64)


def water_fill_bits(
    eigenvalues: ArrayLike | mx.array, target_avg_bits: float, min_bits: int = 1, max_bits: int = 8
) -> list[int]:
    """Bits per dimension of `eigenvalues` [D], summing to round(target_avg_bits x D), in the order of the input.

    Reverse water-filling (Cover & Thomas, ch. 10.3) over whole bits: greedy on l_i D(b), D the distortion of the
    levels really used. ValueError when the target is outside [min_bits, max_bits].
    """
    if not min_bits <= target_avg_bits <= max_bits:
        raise ValueError(
            f"target_avg_bits is {target_avg_bits}; expected {min_bits} to {max_bits}; change it or the limits."
        )
    costs = gaussian_costs(eigenvalues)
    return [int(b) for b in allocate(costs, round(target_avg_bits * len(costs)), min_bits, max_bits)]
