"""Vectors to packed codes and back: an affine pair (analysis, synthesis) around the quantizer.

    z = analysisT (x - mean)      codes = nearest levels of z      x^ = mean + synthesisT levels(codes)

`analysis` brings every coordinate to unit variance over the calibration text, so that one set of levels serves all and
no scale is stored with a vector.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import ArrayLike, NDArray

from .bit_allocator import allocate, gaussian_costs
from .codebook import MAX_BITS, quantize
from .packing import Layout
from .participation_ratio import compute_spectral_gap
from .trellis import quantize_rings

DROPPED_WATCHED = 8  # of each head's dimensions without bits, those of most variance: nearly all that is dropped
# Dimensions of no variance in calibration still need a finite scale: this share of the largest standard deviation.
SMALLEST_RELATIVE_DEVIATION = 1e-6
LARGEST = 1e15  # of what decoding multiplies and adds, so that it stays finite in float32


@dataclasses.dataclass
class SpectralRotation:
    """The eigenbasis of one layer's keys.

    rotation_matrix: [head_dim, head_dim], eigenvectors as columns.  eigenvalues: [head_dim], descending.
    layer_name: which layer of the model, as "layers.<i>".  mean: [head_dim] or None (zero), subtracted before and
    added after.  values: the rotation of the same layer's values, or None; `attach` packs values only with one.
    """

    rotation_matrix: mx.array
    eigenvalues: mx.array
    head_dim: int
    layer_name: str
    mean: mx.array | None = None
    values: "SpectralRotation | None" = None

    def __post_init__(self) -> None:
        shapes = self.rotation_matrix.shape, self.eigenvalues.shape
        if shapes != ((self.head_dim, self.head_dim), (self.head_dim,)):
            raise ValueError(
                f"rotation of {self.layer_name!r} has shapes {shapes}; expected [D, D] and [D] for head_dim "
                f"{self.head_dim}; recalibrate."
            )
        if self.mean is not None and self.mean.shape != (self.head_dim,):
            raise ValueError(f"mean of {self.layer_name!r} has shape {self.mean.shape}; expected [{self.head_dim}].")
        arrays = [self.rotation_matrix, self.eigenvalues, *([] if self.mean is None else [self.mean])]
        if not all(bool(mx.isfinite(a).all().item()) for a in arrays):
            raise ValueError(f"rotation of {self.layer_name!r} holds NaN or infinity; recalibrate.")


@dataclasses.dataclass(frozen=True)
class EncodedVector:
    """Packed codes of an array of vectors.

    codes: uint32 [..., W, T], word-major (see packing.py).  shape, dtype: those of the vectors that were encoded.
    """

    codes: mx.array
    shape: tuple[int, ...]
    dtype: mx.Dtype

    @property
    def nbytes(self) -> int:
        """Bytes of the stored words, padding included."""
        return self.codes.nbytes


class SpectralQuantizer:
    """Quantizes vectors [..., D] in the eigenbasis of `rotation`.

    use_water_filling=False: `signal_bits` for the dimensions before the spectral gap, `noise_bits` after it, each with
    its own codebook. True: widths 0..8 for each dimension, greedy on the distortion of the levels really used, spending
    as many bits in all. Source: SpectralQuant (Dynamis-Labs); allocation by Cover & Thomas, ch. 10.
    """

    def __init__(
        self, rotation: SpectralRotation, signal_bits: int = 4, noise_bits: int = 1, use_water_filling: bool = False
    ) -> None:
        for name, bits in (("signal_bits", signal_bits), ("noise_bits", noise_bits)):
            if not 0 <= bits <= MAX_BITS or bits != int(bits):
                raise ValueError(f"{name} is {bits}; expected an integer in 0..{MAX_BITS}.")
        eigenvalues = _float64(rotation.eigenvalues)
        signal = compute_spectral_gap(eigenvalues)
        widths = np.where(np.arange(rotation.head_dim) < signal, signal_bits, noise_bits).astype(np.int64)
        if use_water_filling:
            widths = allocate(gaussian_costs(eigenvalues), int(widths.sum()))
        matrix = _float64(rotation.rotation_matrix)
        mean = np.zeros(rotation.head_dim) if rotation.mean is None else _float64(rotation.mean)
        self._set_up([mean], [matrix], [matrix.T], [eigenvalues], [widths], [np.ones(len(mean))], trellis=False)
        self._one_head = True

    @classmethod
    def from_transform(
        cls,
        mean: ArrayLike,
        analysis: ArrayLike,
        eigenvalues: ArrayLike,
        widths: ArrayLike,
        trellis: bool = True,
        stretch: ArrayLike | None = None,
    ) -> "SpectralQuantizer":
        """A quantizer for any invertible basis: z = analysisT (x - mean) has variances `eigenvalues`.

        mean [D], analysis [D, D] (a coordinate per column), eigenvalues [D], widths [D] in 0..8.  trellis: code
        neighbours together (trellis.py).  stretch [D]: how much wider than over calibration text `eigenvalues` take
        the coordinates to be, to give levels room (default: 1).
        """
        matrix = np.array(analysis, dtype=np.float64)
        if not np.isfinite(matrix).all() or not np.linalg.cond(matrix) <= 1e12:  # NaN where it overflows
            raise ValueError("analysis is singular or not finite; expected an invertible matrix [D, D]; recalibrate.")
        quantizer = cls.__new__(cls)
        quantizer._set_up(
            [np.array(mean, dtype=np.float64)],
            [matrix],
            [np.asarray(np.linalg.inv(matrix), dtype=np.float64)],
            [np.array(eigenvalues, dtype=np.float64)],
            [np.array(widths, dtype=np.int64)],
            [np.ones(len(matrix)) if stretch is None else np.array(stretch, dtype=np.float64)],
            trellis,
        )
        quantizer._one_head = True
        return quantizer

    @classmethod
    def stack(cls, quantizers: Sequence["SpectralQuantizer"]) -> "SpectralQuantizer":
        """One quantizer for vectors [..., H, T, D] from the quantizers of H heads; their words lie one head after
        the other along W."""
        return cls._of_heads([p for q in quantizers for p in q._parameters], quantizers[0].layout.trellis)

    def heads(self, start: int, stop: int) -> "SpectralQuantizer":
        """The quantizer of heads start..stop of a stacked one; its words are theirs of the whole."""
        return self._of_heads(self._parameters[start:stop], self.layout.trellis)

    @classmethod
    def _of_heads(cls, heads: list[tuple[Any, ...]], trellis: bool) -> "SpectralQuantizer":
        quantizer = cls.__new__(cls)
        means, analyses, syntheses, spectra, widths, stretches = map(list, zip(*heads, strict=True))
        quantizer._set_up(means, analyses, syntheses, spectra, widths, stretches, trellis)
        quantizer._one_head = False
        return quantizer

    def _set_up(
        self,
        means: list[NDArray[np.float64]],
        analyses: list[NDArray[np.float64]],
        syntheses: list[NDArray[np.float64]],
        spectra: list[NDArray[np.float64]],
        widths: list[NDArray[np.int64]],
        stretches: list[NDArray[np.float64]],
        trellis: bool,
    ) -> None:
        self._parameters = list(zip(means, analyses, syntheses, spectra, widths, stretches, strict=True))
        self.layout = Layout(np.stack(widths), trellis)
        heads, dims, stored = len(means), len(means[0]), self.layout.stored
        analysis, synthesis = np.zeros((heads, dims, stored)), np.zeros((heads, stored, dims))
        for h, order in enumerate(self.layout.order):
            deviation = np.sqrt(np.maximum(spectra[h], 0))
            deviation = np.maximum(deviation, max(deviation.max() * SMALLEST_RELATIVE_DEVIATION, 1e-30))[order]
            analysis[h, :, : len(order)] = analyses[h][:, order] / deviation
            synthesis[h, : len(order)] = syntheses[h][order] * deviation[:, None]
        if not all(np.abs(a).max(initial=0) < LARGEST for a in (*means, synthesis)):
            raise ValueError(f"a transform reaches {LARGEST:g}; expected smaller numbers; recalibrate.")
        self.mean = mx.array(np.stack(means)[:, None, :].astype(np.float32))
        self.analysis = mx.array(analysis.astype(np.float32))
        self.synthesis = mx.array(synthesis.astype(np.float32))
        mx.eval(self.mean, self.analysis, self.synthesis)
        self._watch(analyses, spectra, widths, stretches)

    def _watch(
        self,
        analyses: list[NDArray[np.float64]],
        spectra: list[NDArray[np.float64]],
        widths: list[NDArray[np.int64]],
        stretches: list[NDArray[np.float64]],
    ) -> None:
        """What `drift` looks at: every stored coordinate, by weights, and the dropped ones of most variance."""
        heads, dims = len(analyses), len(widths[0])
        weights, dropped, watched = (
            np.zeros((heads, 1, self.layout.stored)),
            np.zeros((heads, dims, DROPPED_WATCHED)),
            0,
        )
        for h, (analysis, spectrum, bits, stretch) in enumerate(zip(analyses, spectra, widths, stretches, strict=True)):
            # What hardly ever varied has no unit to measure in.
            varies = spectrum > max(spectrum.max() * SMALLEST_RELATIVE_DEVIATION**2, 1e-60)
            order = self.layout.order[h]
            weights[h, 0, : len(order)] = stretch[order] ** 2 * varies[order]
            worst = np.flatnonzero((bits == 0) & varies)
            worst = worst[np.argsort(-spectrum[worst], kind="stable")][:DROPPED_WATCHED]
            dropped[h, :, : len(worst)] = analysis[:, worst] * stretch[worst] / np.sqrt(spectrum[worst])
            watched += int(varies[order].sum()) + len(worst)
        self._weights = mx.array((weights / max(watched, 1)).astype(np.float32))
        self._dropped = mx.array((dropped / math.sqrt(max(watched, 1))).astype(np.float32))
        mx.eval(self._weights, self._dropped)

    def drift(self, x: mx.array) -> mx.array:
        """Vectors [B, H, T, D] -> a float32, about B * T for text like the calibration's, more for other text: their
        squared coordinates, each in units of its variance over calibration text; the mean over coordinates and heads,
        summed over vectors."""
        centred = x.astype(mx.float32) - self.mean
        energy = ((centred @ self.analysis) ** 2 * self._weights).sum(-1) + ((centred @ self._dropped) ** 2).sum(-1)
        # One NaN would stay in the sums for good.
        return mx.where(mx.isfinite(energy), energy, 0).sum()

    @property
    def widths(self) -> list[int] | list[list[int]]:
        """Bits of each dimension, in the order of the eigenvalues; one list per head when stacked."""
        table: list[list[int]] = self.layout.widths.tolist()
        return table[0] if self._one_head else table

    @property
    def head_dim(self) -> int:
        """D."""
        return int(self.mean.shape[-1])

    @property
    def words(self) -> int:
        """W, for all heads."""
        return self.layout.words

    @property
    def bits_per_value(self) -> float:
        """Stored bits per number, padding included."""
        return 32 * self.layout.words / (self.layout.heads * self.head_dim)

    @property
    def nbytes(self) -> int:
        """Bytes of the transform's own arrays, index tables included."""
        arrays = self.mean, self.analysis, self.synthesis, self._weights, self._dropped
        return sum(a.nbytes for a in arrays) + self.layout.nbytes

    def encode(self, keys: mx.array) -> EncodedVector:
        """Vectors [..., D] of any float type -> packed codes. A stacked quantizer takes [..., H, T, D]."""
        if keys.ndim < 1 or keys.shape[-1] != self.head_dim:
            raise ValueError(f"vectors of shape {keys.shape}; expected [..., {self.head_dim}]; wrong codec or model.")
        if not mx.issubdtype(keys.dtype, mx.floating):
            raise ValueError(f"vectors of {keys.dtype}; expected float16, bfloat16 or float32; convert them first.")
        if not bool(mx.isfinite(keys).all().item()):
            raise ValueError("vectors hold NaN or infinity; expected finite numbers; check the model's activations.")
        x = keys[None] if keys.ndim == 1 else keys
        if self._one_head:
            x = mx.expand_dims(x, -3)
        elif x.ndim < 3 or x.shape[-3] != self.layout.heads:
            raise ValueError(f"vectors of shape {keys.shape}; expected [..., {self.layout.heads}, T, {self.head_dim}].")
        return EncodedVector(self.encode_words(x), tuple(keys.shape), keys.dtype)

    def decode(self, encoded: EncodedVector) -> mx.array:
        """The vectors again, in the shape and dtype that `encode` was given."""
        x = self.decode_words(encoded.codes)
        return x.reshape(encoded.shape).astype(encoded.dtype)

    def encode_words(self, x: mx.array) -> mx.array:
        """[..., H, T, D] -> words uint32 [..., W, T]; unlike `encode` it checks nothing and stays lazy."""
        if not self.layout.words:
            return mx.zeros((*x.shape[:-3], 0, x.shape[-2]), mx.uint32)
        z = ((x.astype(mx.float32) - self.mean) @ self.analysis).swapaxes(-1, -2)
        codes = []
        for group, rows in zip(self.layout.groups, self.layout.split(z), strict=True):
            if group.slots:
                rings = mx.unflatten(rows, -2, (group.slots, -1))
                codes.append(quantize_rings(rings, group.width).flatten(-3, -2))
            else:
                codes.append(quantize(rows, group.width))
        return self.layout.pack(codes)

    def decode_levels(self, words: mx.array) -> mx.array:
        """Words [..., W, T] -> coordinates in storage order, unit variance, float32 [..., H, N, T]."""
        return self.layout.unpack_levels(words)

    def decode_head(self, words: mx.array, head: int) -> mx.array:
        """Words [B, W, T] of all heads -> levels of one, float32 [B, n, T], in the order of `sorted_queries`."""
        return self.layout.head_levels(words, head)

    def head_scores(self, queries: mx.array, words: mx.array, head: int) -> mx.array:
        """`sorted_queries` [B, R, n] times the levels of a head's words -> [B, R, T]."""
        return self.layout.head_scores(queries, words, head)

    def head_sums(self, weights: mx.array, words: mx.array, head: int) -> mx.array:
        """The levels of a head's words, weighted by [B, R, T] and summed -> [B, R, n], for `stored_outputs`."""
        return self.layout.head_sums(weights, words, head)

    def sorted_queries(self, folded: mx.array, head: int) -> mx.array:
        """Folded queries [B, H, R, N] -> those of one head, [B, R, n], coordinates as `decode_head` orders them."""
        own = mx.pad(folded[:, head, :, : len(self.layout.order[head])], [(0, 0), (0, 0), (0, 1)])
        return mx.take(own, self.layout.coordinates(head), axis=-1)

    def stored_outputs(self, outputs: mx.array, head: int) -> mx.array:
        """Sums [B, R, n] over what `decode_head` gives -> [B, R, N] in storage order."""
        own = mx.take(outputs, self.layout.places(head), axis=-1) if self.layout.order[head] else outputs
        return mx.pad(own, [(0, 0), (0, 0), (0, self.layout.stored - own.shape[-1])])

    def decode_words(self, words: mx.array, dtype: mx.Dtype = mx.float32) -> mx.array:
        """Words [..., W, T] -> vectors [..., H, T, D] of `dtype`."""
        return (self.decode_levels(words).swapaxes(-1, -2) @ self.synthesis + self.mean).astype(dtype)

    def fold_queries(self, queries: mx.array) -> tuple[mx.array, mx.array]:
        """Queries [B, H, R, D] float32 -> (q' [B, H, R, N], c [B, H, R, 1]) with q . x^ = q' . z + c."""
        return queries @ self.synthesis.swapaxes(-1, -2), (queries * self.mean).sum(axis=-1, keepdims=True)

    def unfold_outputs(self, outputs: mx.array, weights: mx.array) -> mx.array:
        """sum of p z [B, H, R, N] and sum of p [B, H, R, 1] -> sum of p x^, [B, H, R, D]."""
        return outputs @ self.synthesis + weights * self.mean


def _float64(array: mx.array) -> NDArray[np.float64]:
    return np.array(array.astype(mx.float32), dtype=np.float64)


class RawQuantizer:
    """Stores the bits of every number as they are: the lossless twin of a stacked SpectralQuantizer.

    For `heads` heads of `head_dim` numbers of `dtype`; rows are padded to whole words.
    """

    nbytes = 0

    def __init__(self, heads: int, head_dim: int, dtype: mx.Dtype) -> None:
        self.heads, self.head_dim, self._dtype = heads, head_dim, dtype
        self._per_word = max(4 // dtype.size, 1)
        self._words_per_head = -(-head_dim // self._per_word) * max(dtype.size // 4, 1)

    @property
    def words(self) -> int:
        """W, for all heads."""
        return self.heads * self._words_per_head

    def encode_words(self, x: mx.array) -> mx.array:
        """[..., H, T, D] -> words uint32 [..., W, T]."""
        if pad := -self.head_dim % self._per_word:
            x = mx.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, pad)])
        words = mx.contiguous(x).view(mx.uint32).swapaxes(-1, -2)
        return words.reshape(*x.shape[:-3], self.words, x.shape[-2])

    def decode_words(self, words: mx.array, dtype: mx.Dtype | None = None) -> mx.array:
        """Words [..., W, T] -> the same numbers [..., H, T, D]."""
        rows = words.reshape(*words.shape[:-2], self.heads, self._words_per_head, words.shape[-1]).swapaxes(-1, -2)
        return mx.contiguous(rows).view(self._dtype)[..., : self.head_dim].astype(dtype or self._dtype)

    def decode_levels(self, words: mx.array) -> mx.array:
        """Words [..., W, T] -> numbers, float32 [..., H, D, T]."""
        return self.decode_words(words).astype(mx.float32).swapaxes(-1, -2)

    def decode_head(self, words: mx.array, head: int) -> mx.array:
        """Words [B, W, T] of all heads -> numbers of one, float32 [B, D, T]."""
        n = self._words_per_head
        numbers = mx.contiguous(words[:, head * n : (head + 1) * n].swapaxes(-1, -2)).view(self._dtype)
        return numbers[..., : self.head_dim].astype(mx.float32).swapaxes(-1, -2)

    def head_scores(self, queries: mx.array, words: mx.array, head: int) -> mx.array:
        """Queries [B, R, D] times the numbers of one head -> [B, R, T]."""
        return queries @ self.decode_head(words, head)

    def head_sums(self, weights: mx.array, words: mx.array, head: int) -> mx.array:
        """The numbers of one head, weighted by [B, R, T] and summed -> [B, R, D]."""
        return weights @ self.decode_head(words, head).swapaxes(-1, -2)

    def sorted_queries(self, folded: mx.array, head: int) -> mx.array:
        """Those of one head."""
        return folded[:, head]

    def stored_outputs(self, outputs: mx.array, head: int) -> mx.array:
        """The outputs themselves."""
        return outputs

    def fold_queries(self, queries: mx.array) -> tuple[mx.array, mx.array]:
        """The queries themselves, and zero."""
        return queries, mx.zeros((*queries.shape[:-1], 1), mx.float32)

    def unfold_outputs(self, outputs: mx.array, weights: mx.array) -> mx.array:
        """The outputs themselves."""
        return outputs


Quantizer = SpectralQuantizer | RawQuantizer
