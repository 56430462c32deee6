"""Spectral quantization of key and value vectors: the method, apart from any cache."""

from .bit_allocator import water_fill_bits
from .calibrate import (
    calibrate_from_vectors,
    calibrate_spectral_rotation,
    load_cached_rotations,
    save_rotations,
)
from .codec import Codec
from .participation_ratio import compute_participation_ratio, compute_spectral_gap
from .spectral_quant import EncodedVector, SpectralQuantizer, SpectralRotation

__all__ = [
    "Codec",
    "EncodedVector",
    "SpectralQuantizer",
    "SpectralRotation",
    "calibrate_from_vectors",
    "calibrate_spectral_rotation",
    "compute_participation_ratio",
    "compute_spectral_gap",
    "load_cached_rotations",
    "save_rotations",
    "water_fill_bits",
]
