"""Trellis-coded quantization: the codes of one width in one word, taken together, choose levels better than alone.

Codes of b bits select among 2^(b+1) levels. Which half a code may use follows from its neighbours, so the encoder,
free to choose whole sequences, comes 0.1 to 0.2 bit closer to the rate-distortion bound, while each code still
decodes alone from two neighbouring bits (Marcellin & Fischer 1990; the 4-state code of Ungerboeck 1982):

    j[k] = 2 (c[k] ^ low(c[k-2])) + low(c[k-1])        low(c) = c & 1, k counted modulo n
    level = P(t), t = (2 j + 1 - 2^(b+1)) / 2^(b+1)

The n codes form a *ring* (tail-biting), so a word needs nothing from another. Encoding is exact: Viterbi's algorithm
(1967) from each of the four states that may precede slot 0.
"""

import functools
from collections.abc import Callable, Sequence

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from .codebook import fused, odd_level, odd_polynomial

# c of level = sum_k c_k t^(2k+1): the fixed point of Lloyd's iteration with rings of 32 // b codes of Gaussian
# numbers (benchmarks/trellis.py).
COEFFICIENTS: dict[int, tuple[float, ...]] = {
    1: (1.512381, 0.142488),
    2: (1.394475, 0.940785),
    3: (1.639324, -0.048831, 1.341178),
    4: (1.897671, -0.225948, 1.720533),
    5: (2.118741, -0.415552, 2.027044),
}
RING_BITS = max(COEFFICIENTS)
SHORTEST_RING = {1: 8, 2: 5, 3: 5, 4: 5, 5: 5}  # shorter ones do no better than codes that stand alone
STATES = 4
TILE_NUMBERS = 1 << 17  # encoded at once: what their candidates take stays in tens of MB


def is_ring(width: int, slots: int) -> bool:
    """Whether `slots` codes of one width in a word are coded together."""
    return width in SHORTEST_RING and slots >= SHORTEST_RING[width]


def ring_length(width: int) -> int:
    """Codes of this width that fill a word: the longest ring."""
    return 32 // width


@functools.cache
def ring_levels(width: int) -> NDArray[np.float64]:
    """The 2^(width + 1) levels of j, ascending."""
    t = (2 * np.arange(2 ** (width + 1)) + 1) / 2 ** (width + 1) - 1
    return odd_polynomial(COEFFICIENTS[width], t)


def dequantize_rings(j: mx.array, width: int) -> mx.array:
    """Levels, float32, of j: a polynomial, no table."""
    return odd_level(j, width + 1, COEFFICIENTS[width])


def ring_constants(rings: Sequence[tuple[int, int, int]]) -> list[mx.array]:
    """What `turn_rings` wants to know of R rings (first bit, width, slots), uint32 [R, 1] each."""
    rows = [
        (shift, width, (1 << width * slots) - 1, (slots - 2) * width, _every(width, 1), _every(2 * width, width))
        for shift, width, slots in rings
    ]
    return [mx.array(list(column), mx.uint32)[:, None] for column in zip(*rows, strict=True)]


def _every(step: int, bits: int) -> int:
    """A word whose lowest `bits` of every `step` are set."""
    return sum(((1 << bits) - 1) << k for k in range(0, 32, step)) & (2**32 - 1)


@functools.cache
def turn_rings(tokens: int) -> Callable[..., mx.array]:
    """A function of words [R, tokens] with one ring each, and their `ring_constants`, that gives the j of their even
    and of their odd slots, uint32 [2, 1, R, tokens].

    j has a bit more than a code, so the j of slot k begins at bit 2 (k // 2) width. Beyond a ring's slots lie any bits.
    """

    def turn(
        words: mx.array, shift: mx.array, width: mx.array, mask: mx.array, back: mx.array, low: mx.array, even: mx.array
    ) -> mx.array:
        fields = mx.right_shift(words, shift) & mask
        last = mx.right_shift(fields, back)  # two slots, which come before the first
        lows = (mx.left_shift(fields, width) | mx.right_shift(last, width)) & low
        turned = fields ^ ((mx.left_shift(fields, width + width) | last) & low)
        return mx.stack([
            mx.left_shift(turned & even, 1) | (lows & even),
            mx.left_shift(mx.right_shift(turned, width) & even, 1) | (mx.right_shift(lows, width) & even),
        ])[:, None]  # fmt: skip

    return fused(turn, shapeless=False)


def quantize_rings(z: mx.array, width: int) -> mx.array:
    """Codes uint32 [..., n, R, T] of R rings of n coordinates z of the same shape: those of least squared error."""
    tile = max(TILE_NUMBERS // max(z.size // z.shape[-1], 1), 1)
    parts: list[mx.array] = []
    for start in range(0, z.shape[-1], tile):
        part = z[..., start : start + tile].astype(mx.float32)
        if parts:  # one tile after the other, or the candidates of all would be held
            part = mx.depends([part], [parts[-1]])[0]
        parts.append(_viterbi(part, width))
    return parts[0] if len(parts) == 1 else mx.concatenate(parts, axis=-1)


# Branch (u, v, w): from the state (low(c[k-1]), low(c[k-2])) = (v, w), by a code whose lowest bit is u, to (u, v). Its
# levels are those with j mod 4 = 2 (u ^ w) + v.
_SUBSET_OF_BRANCH = [2 * (u ^ w) + v for u in (0, 1) for v in (0, 1) for w in (0, 1)]
_BIT_OF_BRANCH = [u for u in (0, 1) for _ in range(4)]


def _viterbi(z: mx.array, width: int) -> mx.array:
    lead, (slots, rings, tokens) = z.shape[:-3], z.shape[-3:]
    errors, members = zip(*(_nearest_member(width, q)(z) for q in range(4)), strict=True)
    costs = mx.stack([errors[q] for q in _SUBSET_OF_BRANCH], axis=-3)  # [..., n, branch, R, T]
    codes = mx.stack([2 * members[q] + u for q, u in zip(_SUBSET_OF_BRANCH, _BIT_OF_BRANCH, strict=True)], axis=-3)
    branches = (*lead, slots, 1, 2, 2, 2, rings, tokens)  # [..., n, start, u, v, w, R, T]
    costs, codes = costs.reshape(branches), codes.reshape(branches)
    at = [slice(None)] * len(lead)
    held = mx.where(mx.eye(STATES, dtype=mx.bool_).reshape(STATES, 1, 2, 2, 1, 1), 0.0, 1e30)
    path = mx.zeros((1,) * 6, mx.uint32)
    for k in range(slots):
        held, path = _better(held + costs[*at, k], path | codes[*at, k] * 2 ** (k * width))
        # The state just reached, (u, v), is where the next branch starts.
        held, path = mx.expand_dims(held, -5), mx.expand_dims(path, -5)
    shape = (*lead, STATES * STATES, rings, tokens)
    closed = mx.array([s * (STATES + 1) for s in range(STATES)])  # paths that end in the state they began in
    held, path = (mx.take(x.reshape(shape), closed, axis=-3) for x in (held, path))
    best = mx.take_along_axis(path, held.argmin(axis=-3, keepdims=True), axis=-3)
    shifts = (mx.arange(slots) * width).astype(mx.uint32).reshape(slots, 1, 1)
    codes_of_slots: mx.array = mx.right_shift(best, shifts) & (2**width - 1)
    return codes_of_slots


def _better(reached: mx.array, paths: mx.array) -> tuple[mx.array, mx.array]:
    """The better of the two branches into each state [..., start, u, v, R, T]: its cost, and its codes so far."""
    first, second = reached[..., 0, :, :], reached[..., 1, :, :]
    return mx.minimum(first, second), mx.where(second < first, paths[..., 1, :, :], paths[..., 0, :, :])


@functools.cache
def _nearest_member(width: int, subset: int) -> Callable[[mx.array], tuple[mx.array, mx.array]]:
    """z -> (squared error, index m) of the nearest level j = 4 m + subset."""
    levels = ring_levels(width)[subset::4]
    edges = ((levels[1:] + levels[:-1]) / 2).tolist()

    @fused
    def nearest(z: mx.array) -> tuple[mx.array, mx.array]:
        member = (z > edges[0]).astype(mx.float32)
        for edge in edges[1:]:
            member = member + (z > edge)
        t = member * (8.0 / 2 ** (width + 1)) + ((2 * subset + 1) / 2 ** (width + 1) - 1.0)
        *rest, value = COEFFICIENTS[width]
        level = t * value
        for c in reversed(rest):
            level = level * t * t + t * c
        return (z - level) ** 2, member.astype(mx.uint32)

    def only(z: mx.array) -> tuple[mx.array, mx.array]:
        return (z - float(levels[0])) ** 2, mx.zeros(z.shape, mx.uint32)

    return nearest if edges else only
