"""Which tokens are packed when, and how much errors in them weigh.

An error in a token d tokens back is taken to move a prediction by 1/d^2 of what it would next door: with the exponent
1.5 or 2.5 in place of 2, predicted over measured KL spreads wider (benchmarks/prediction.py). Sums of 1/d^2 over
distances a..b are taken as 1/(a - 1/2) - 1/(b + 1/2), which is exact for 1/(d^2 - 1/4).
"""

import math
from collections.abc import Sequence
from itertools import pairwise

BLOCK = 64  # tokens that are packed together
LAG = 16  # tokens that a seal stays behind the window, so that a speculative rollback never lands in codes


def tokens_to_seal(newest: int, window: int) -> int:
    """How many of the oldest of `newest` exact tokens (sinks not counted) are packed now: whole blocks, such that
    `window` + LAG tokens stay exact.

    Hence after n tokens without a trim, the packed ones are max(0, n - sinks - window - LAG) // BLOCK * BLOCK.
    """
    return max(0, newest - window - LAG) // BLOCK * BLOCK


def packed_of(tokens: int, window: int, sinks: int) -> int:
    """How many of `tokens` are packed, when none was trimmed."""
    return tokens_to_seal(tokens - sinks, window)


def far_mass(position: int, packed: int, sinks: int) -> float:
    """Sum of 1/d^2 over the distances d from the token at `position` (the first is 0) to the `packed` ones, which
    follow the sinks."""
    if packed <= 0:
        return 0.0
    farthest = position - sinks
    return 1 / (farthest - packed + 0.5) - 1 / (farthest + 0.5)


def newest_mass(context: int, window: int, sinks: int) -> float:
    """`far_mass` of the newest of `context` tokens that come one by one; the mean over the last BLOCK lengths, because
    packing goes by blocks."""
    lengths = range(max(context - BLOCK, 0) + 1, context + 1)
    return sum(far_mass(n - 1, packed_of(n, window, sinks), sinks) for n in lengths) / max(len(lengths), 1)


def scored_mass(edges: Sequence[int], window: int, sinks: int) -> float:
    """Mean `far_mass` of a text that is read in pieces from edge to edge, the first piece (a prompt) not counted.

    A piece of at most LAG tokens reads codes of all that its end leaves behind the window; a longer one only what was
    packed before it came.
    """
    masses = [
        far_mass(position, packed_of(end if end - start <= LAG else start, window, sinks), sinks)
        for start, end in list(pairwise(edges))[1:]
        for position in range(start, end)
    ]
    return sum(masses) / max(len(masses), 1)


def calibration_mass(length: int, window: int, sinks: int) -> float:
    """Mean over all positions of a calibration sequence of the sum of 1/d^2 over what it perturbs there: all at least
    `window` behind, sinks excepted (far_attention.py). 0 where that is nothing."""
    nearest, positions = max(window, 1), length - sinks
    if positions <= nearest:
        return 0.0
    # The sum over positions of 1 / (farthest + 1/2), by the midpoint rule, is a logarithm.
    return ((positions - nearest) / (nearest - 0.5) - math.log1p((positions - nearest) / nearest)) / length
