"""Levels of a b-bit quantizer of the unit Gaussian, as an odd polynomial of the centred code.

The mean-squared-error optimal levels (Max 1960, Lloyd 1982) lie on a smooth odd curve, so a polynomial replaces the
look-up table that is slow on every back-end. With t = (2 code + 1 - 2^b) / 2^b in (-1, 1), level = sum_k c_k t^(2k+1).
The coefficients are the fixed point of Lloyd's iteration in which the update is a least-squares polynomial fit,
weighted by the Gaussian mass of each cell; tests/oracle.py derives them again in float64.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

MAX_BITS = 8

COEFFICIENTS: dict[int, tuple[float, ...]] = {
    1: (1.5957691216057306,),
    2: (1.7857738877808103, 0.4055400122391176),
    3: (1.885820916693707, 0.7414300194289128),
    4: (2.101240001649792, 0.06613310692223695, 0.9693569640957511),
    5: (2.066273923746937, 1.1245864333006432, -1.7403314102369116, 2.135073305931678),
    6: (2.18484478579491, -0.3432121110956249, 4.997922281691047, -8.874926919079686, 6.020843719747564),
    7: (2.1150440296843063, 1.801653975174024, -9.257733329798661, 29.575529865021892, -38.825090532317,
        18.934636273726124),
    8: (2.115435088741087, 2.2358858416399054, -12.487976550253318, 39.4791599954084, -51.78993848609954,
        25.06517963292898),
}  # fmt: skip


@functools.cache
def levels(bits: int) -> NDArray[np.float64]:
    """The 2^bits levels, ascending, float64 [2^bits]; one level, 0, at 0 bits."""
    if bits == 0:
        return np.zeros(1)
    t = (2 * np.arange(2**bits) + 1 - 2**bits) / 2**bits
    return odd_polynomial(COEFFICIENTS[bits], t)


def odd_polynomial(coefficients: Sequence[float], t: NDArray[np.float64]) -> NDArray[np.float64]:
    """sum_k c_k t^(2k+1), by products alone: `**` may round t and -t apart."""
    result, square = np.zeros_like(t), t * t
    for c in reversed(coefficients):
        result = result * square + c
    return result * t


@functools.cache
def distortion(bits: int) -> float:
    """Mean squared error of the unit Gaussian under `levels(bits)` with nearest-level coding; 1 at 0 bits."""
    x = levels(bits)
    edges = [-math.inf, *((x[1:] + x[:-1]) / 2), math.inf]
    cdf = np.array([0.5 * math.erfc(-e / math.sqrt(2)) for e in edges])
    pdf = np.array([math.exp(-e * e / 2) / math.sqrt(2 * math.pi) for e in edges])
    mass, moment = np.diff(cdf), -np.diff(pdf)
    return float(1 - 2 * (moment * x).sum() + (mass * x * x).sum())


def dequantize(codes: mx.array, bits: int) -> mx.array:
    """Levels of integer codes, float32, same shape: a polynomial, no table, so that it fuses into one kernel."""
    return odd_level(codes, bits, COEFFICIENTS[bits])


def odd_level(codes: mx.array, bits: int, coefficients: Sequence[float]) -> mx.array:
    """sum_k c_k t^(2k+1) of t = (2 code + 1 - 2^bits) / 2^bits, float32.

    MLX fuses chains of eleven operations, and counts two for each that takes two numbers where it traces for any shape:
    so the fewest of those, by completing the square where that serves.
    """
    u: mx.array = codes.astype(mx.float32) - (2**bits - 1) / 2  # t = u 2^(1-bits)
    c = [value * 2.0 ** ((1 - bits) * (2 * k + 1)) for k, value in enumerate(coefficients)]
    factor: mx.array
    if len(c) == 1:
        factor = mx.array(1.0)
    elif len(c) == 2:
        factor = mx.square(u) + c[0] / c[1]
    elif len(c) == 3:
        half = c[1] / (2 * c[2])
        factor = mx.square(mx.square(u) + half) + (c[0] / c[2] - half**2)
    else:
        square = mx.square(u)
        factor = square + c[-2] / c[-1]
        for value in reversed(c[:-2]):
            factor = factor * square + value / c[-1]
    level: mx.array = factor * (u * c[-1])
    return level


def quantize(z: mx.array, bits: int) -> mx.array:
    """Code of the nearest level, uint32, same shape; values beyond the outermost level take it."""
    last = 2**bits - 1
    z = z.astype(mx.float32)
    if bits == 1:
        return (z > 0).astype(mx.uint32)
    # The optimal point density is a Gaussian of variance 3 (Panter & Dite 1951), so its CDF is a first guess
    # that is never more than two codes off; the walk to the nearest level makes it exact.
    guess = mx.round((2**bits) * 0.5 * (1 + mx.erf(z * (1 / math.sqrt(6)))) - 0.5)
    guess = mx.clip(guess, 0, last)
    for _ in range(2):
        down, up = mx.maximum(guess - 1, 0), mx.minimum(guess + 1, last)
        error = mx.abs(z - dequantize(guess, bits))
        error_down, error_up = mx.abs(z - dequantize(down, bits)), mx.abs(z - dequantize(up, bits))
        step = mx.where(error_up < error, up, guess)
        guess = mx.where(error_down < mx.minimum(error, error_up), down, step)
    return guess.astype(mx.uint32)


def fused(function: Callable[..., Any], shapeless: bool = True) -> Callable[..., Any]:
    """`function` of arrays of any shape as one kernel on a CPU. It may take shapes from its arguments alone.

    shapeless=False traces it for every shape anew, and keeps what it traced: twice as many operations make one kernel
    then, but shapes must be few, and those of one function fewer, which MLX looks through at every call.

    On a GPU its operations stay apart: CUDA would compile every fused kernel anew in each process, for one to three
    seconds apiece, and a calibration or a prompt needs dozens; what must be fast there is in kernels/.
    """
    compiled = mx.compile(function, shapeless=shapeless)

    @functools.wraps(function)
    def call(*arrays: mx.array) -> Any:
        return (function if mx.default_device() == mx.gpu else compiled)(*arrays)

    return call
