"""Kernels are used where they were seen to be right: a few small cases before a process first uses a variant."""

import functools
import os
import warnings
from collections.abc import Callable

import mlx.core as mx

from . import kernels
from .kernels import columns, compiled, launches
from .spectral.spectral_quant import Quantizer, SpectralQuantizer


@functools.cache
def trusted(
    place: str, key_dims: int, value_dims: int, dtype: mx.Dtype, program: columns.Program | None = None
) -> bool:
    """Whether the kernels of this back-end agree with attention in float64 here: three small shapes of few bits, of
    these dimensions, this kind of numbers and this program, once a process.

    False, with a warning, when they do not or fail to build; RuntimeError when VQ_KVCACHE_BACKEND asks for them.
    """
    from .doctor import first_wrong

    return _right(place, lambda: first_wrong(place, key_dims, value_dims, dtype, program))


@functools.cache
def trusted_arrays(place: str, key_dims: int, value_dims: int, dtype: mx.Dtype) -> bool:
    """The same of turning codes back into keys and values."""
    from .doctor import wrong_arrays

    return _right(place, lambda: wrong_arrays(place, key_dims, value_dims, dtype))


@functools.cache
def trusted_codes(place: str) -> bool:
    """The same of encoding and decoding."""
    from .doctor import wrong_codes

    return _right(place, lambda: wrong_codes(place))


def encode_words(quantizer: Quantizer, x: mx.array) -> mx.array:
    """Vectors [B, H, T, D] -> words uint32 [B, W, T], by the kernel where there is one."""
    place = kernels.backend()
    if place == "ops" or not isinstance(quantizer, SpectralQuantizer) or not quantizer.words:
        return quantizer.encode_words(x)
    if not trusted_codes(place):
        return quantizer.encode_words(x)
    return launches.encoded(quantizer, x, place)


def what_fails(check: Callable[[], str]) -> str:
    """What a check finds wrong, or why it could not be made; nothing when all is right."""
    try:
        return check()
    except RuntimeError as error:
        compiled.forget(str(error))
        return str(error).strip().splitlines()[0]


def _right(place: str, first_wrong: Callable[[], str]) -> bool:
    wrong = what_fails(first_wrong)
    if not wrong:
        return True
    if os.environ.get(kernels.VARIABLE) == place:
        raise RuntimeError(
            f"the {place} kernels do not work here ({wrong}), but {kernels.VARIABLE} asks for them; unset it to use "
            "plain operations, which are slower."
        )
    warnings.warn(
        f"the {place} kernels do not work here ({wrong}): plain operations are used, which are slower; "
        "`vq_kvcache doctor` tells more.",
        stacklevel=3,
    )
    return False
