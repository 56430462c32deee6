"""How many dimensions of a spectrum matter: participation ratio and spectral gap."""

import mlx.core as mx
import numpy as np
from numpy.typing import ArrayLike, NDArray


def as_spectrum(eigenvalues: ArrayLike | mx.array) -> NDArray[np.float64]:
    """Eigenvalues as a float64 vector [D]; ValueError unless one-dimensional, finite and not negative."""
    if isinstance(eigenvalues, mx.array):
        eigenvalues = eigenvalues.astype(mx.float32)  # NumPy cannot read bfloat16
    spectrum = np.array(eigenvalues, dtype=np.float64)
    if spectrum.ndim != 1 or spectrum.size == 0:
        raise ValueError(f"eigenvalues have shape {spectrum.shape}; expected a vector [head_dim]; pass one spectrum.")
    if not np.isfinite(spectrum).all() or (spectrum < 0).any():
        raise ValueError("eigenvalues hold NaN, infinity or a negative number; expected variances; recalibrate.")
    return spectrum


def compute_participation_ratio(eigenvalues: ArrayLike | mx.array) -> float:
    """(sum l)^2 / (d sum l^2) of `eigenvalues` [D], in [1/d, 1]: 1 is flat, 1/d is a single direction.

    Unchanged by scaling. A spectrum of zeros is flat by convention. Source: the inverse participation ratio of
    localisation theory (Bell & Dean 1970), divided by d.
    """
    spectrum = as_spectrum(eigenvalues)
    largest = spectrum.max()
    if largest == 0:
        return 1.0
    scaled = spectrum / largest  # so that squares neither overflow nor vanish
    return float(scaled.sum() ** 2 / (scaled.size * (scaled**2).sum()))


def compute_spectral_gap(eigenvalues: ArrayLike | mx.array) -> int:
    """Number of signal dimensions: i + 1 for the largest absolute drop l[i] - l[i + 1], the first on ties.

    `eigenvalues` [D] descending. A spectrum of one number has one signal dimension.
    """
    spectrum = as_spectrum(eigenvalues)
    if spectrum.size == 1:
        return 1
    return int(np.argmax(spectrum[:-1] - spectrum[1:])) + 1
