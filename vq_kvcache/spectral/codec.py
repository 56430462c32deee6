"""The transforms of every layer of one model, and widths for any budget: calibrated once, saved as one file."""

import dataclasses
import functools
import json
import os
import pathlib
import struct
from collections.abc import Iterable
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from .bit_allocator import allocate, gaussian_costs
from .codebook import MAX_BITS
from .files import cache_folder, sha256, write_atomically
from .packing import WORD_BITS, allocate_words
from .spectral_quant import SpectralQuantizer, SpectralRotation

FORMAT = "vq_kvcache.codec"
VERSION = 1
SAMPLED_BYTES = 1 << 20
SAMPLES_PER_PARAMETER = 256


class CodecError(ValueError):
    """A codec that cannot be used; the message says what was found, what was expected and what to do."""


@dataclasses.dataclass(frozen=True)
class Transforms:
    """Of the keys or the values of one layer's H heads, float32: z = analysisT (x - mean) has variances `eigenvalues`.

    mean [H, D], analysis [H, D, D] (a coordinate per column), eigenvalues [H, D] descending, in units of the metric.
    """

    mean: NDArray[np.float32]
    analysis: NDArray[np.float32]
    eigenvalues: NDArray[np.float32]

    def __post_init__(self) -> None:
        heads, dims = self.mean.shape
        if self.analysis.shape != (heads, dims, dims) or self.eigenvalues.shape != (heads, dims):
            raise CodecError(
                f"transforms of shapes {self.mean.shape}, {self.analysis.shape}, {self.eigenvalues.shape}; "
                "expected [H, D], [H, D, D], [H, D]; calibrate again."
            )
        if not all(np.isfinite(a).all() for a in (self.mean, self.analysis, self.eigenvalues)):
            raise CodecError("transforms hold NaN or infinity; expected finite numbers; calibrate again.")

    def widths(self, bits_per_value: float) -> list[NDArray[np.int64]]:
        """Bits of each dimension of each head; the stored words of all heads together keep within the budget."""
        heads, dims = self.mean.shape
        words = int(bits_per_value * heads * dims // WORD_BITS)
        costs = [gaussian_costs(np.maximum(e, 0)) for e in self.eigenvalues]
        bits = allocate(np.concatenate(costs), min(WORD_BITS * words, MAX_BITS * heads * dims)).reshape(heads, dims)
        shares = bits.sum(axis=1) / WORD_BITS
        whole = np.floor(shares).astype(int)
        for h in np.argsort(whole - shares, kind="stable")[: words - int(whole.sum())]:
            whole[h] += 1
        return [allocate_words(c, w) for c, w in zip(costs, whole.tolist(), strict=True)]

    def quantizer(self, bits_per_value: float) -> SpectralQuantizer:
        """One SpectralQuantizer per head, stacked."""
        parts = zip(self.mean, self.analysis, self.eigenvalues, self.widths(bits_per_value), strict=True)
        return SpectralQuantizer.stack([SpectralQuantizer.from_transform(*part) for part in parts])


@dataclasses.dataclass(frozen=True)
class LayerQuantizers:
    """How one layer's keys and values are packed; None keeps them as they are."""

    keys: SpectralQuantizer | None
    values: SpectralQuantizer | None

    @property
    def nbytes(self) -> int:
        """Bytes of the transforms."""
        return sum(q.nbytes for q in (self.keys, self.values) if q is not None)


@dataclasses.dataclass(frozen=True)
class Plan:
    """Quantizers of the layers of one model at one setting, and a name by which saved caches find them again."""

    name: str
    fingerprint: str
    layers: dict[int, LayerQuantizers]


class Codec:
    """What a spectral cache needs to know of one model.

    layers: index of the layer's cache -> (Transforms of keys, Transforms of values).
    fingerprint: of the model it was calibrated on.  provenance: how, as plain JSON.
    """

    def __init__(
        self, fingerprint: str, layers: dict[int, tuple[Transforms, Transforms]], provenance: dict[str, Any]
    ) -> None:
        if not layers:
            raise CodecError("no layer has a KV cache to pack; expected at least one full-attention layer.")
        self.fingerprint, self.layers, self.provenance = fingerprint, dict(sorted(layers.items())), provenance
        self._plans: dict[float, Plan] = {}

    @functools.cached_property
    def identity(self) -> str:
        """Hash of the content, by which saved prompt caches name their codec."""
        return sha256(self._serialised())[:16]

    def plan(self, bits_per_value: float) -> Plan:
        """Quantizers of every layer with at most `bits_per_value` stored bits per number, padding included."""
        if not 0.25 <= bits_per_value <= MAX_BITS:
            raise ValueError(f"bits_per_value is {bits_per_value}; expected 0.25 to {MAX_BITS}.")
        if bits_per_value not in self._plans:
            layers = {
                i: LayerQuantizers(k.quantizer(bits_per_value), v.quantizer(bits_per_value))
                for i, (k, v) in self.layers.items()
            }
            self._plans[bits_per_value] = Plan(f"{self.identity}@{bits_per_value}", self.fingerprint, layers)
        return self._plans[bits_per_value]

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, atomically."""
        write_atomically(pathlib.Path(path), self._serialised())

    def _serialised(self) -> bytes:
        arrays = {
            f"layers.{i}.{part}.{name}": np.ascontiguousarray(getattr(transforms, name))
            for i, pair in self.layers.items()
            for part, transforms in zip(("keys", "values"), pair, strict=True)
            for name in ("mean", "analysis", "eigenvalues")
        }
        description = {"version": VERSION, "fingerprint": self.fingerprint, "provenance": self.provenance}
        # One entry only: safetensors writes several in no fixed order, and equal codecs must be equal files.
        return save_safetensors(arrays, {FORMAT: json.dumps(description, sort_keys=True)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Codec":
        """Read a saved codec; CodecError, in one sentence, for anything that is not a whole one."""
        try:
            content = pathlib.Path(path).read_bytes()
            description = _description(content)
            arrays = load_safetensors(content)
            if description.get("version") != VERSION:
                raise CodecError(f"codec version {description.get('version')}, expected {VERSION}; calibrate again.")
            return cls(str(description["fingerprint"]), _layers(arrays), dict(description["provenance"]))
        except OSError as error:
            raise CodecError(f"{path} cannot be read ({error.strerror}); expected a saved codec.") from None
        except CodecError as error:
            raise CodecError(f"{path}: {error}") from None
        except (SafetensorError, KeyError, ValueError, TypeError, AttributeError, struct.error) as error:
            raise CodecError(f"{path} is truncated or no codec file ({error}); calibrate again.") from None


def _description(content: bytes) -> dict[str, Any]:
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + min(length, len(content))])
    return dict(json.loads(header["__metadata__"][FORMAT]))


def _layers(arrays: dict[str, NDArray[Any]]) -> dict[int, tuple[Transforms, Transforms]]:
    indices = sorted({int(name.split(".")[1]) for name in arrays})
    return {i: (_transforms(arrays, f"layers.{i}.keys"), _transforms(arrays, f"layers.{i}.values")) for i in indices}


def _transforms(arrays: dict[str, NDArray[Any]], prefix: str) -> Transforms:
    parts = [arrays[f"{prefix}.{name}"] for name in ("mean", "analysis", "eigenvalues")]
    if any(p.dtype != np.float32 for p in parts) or parts[0].ndim != 2:
        raise CodecError(f"{prefix} is not float32 [H, D]; expected a codec of this version; calibrate again.")
    return Transforms(*parts)


def plan_of_rotations(
    rotations: Iterable[SpectralRotation],
    heads: dict[int, int],
    signal_bits: int,
    noise_bits: int,
    use_water_filling: bool,
) -> Plan:
    """The documented path: one rotation per layer, the same for each of the `heads[layer]` KV heads."""
    layers, digest = {}, []
    for position, rotation in enumerate(rotations):
        suffix = rotation.layer_name.rsplit(".", 1)[-1]
        index = int(suffix) if suffix.isdigit() else position
        if index not in heads:
            raise CodecError(
                f"rotation {rotation.layer_name!r} names layer {index}; the model's KV caches are {sorted(heads)}; "
                "calibrate on this model."
            )
        keys, values = (
            None if r is None else SpectralQuantizer(r, signal_bits, noise_bits, use_water_filling)
            for r in (rotation, rotation.values)
        )
        layers[index] = LayerQuantizers(*(q and SpectralQuantizer.stack([q] * heads[index]) for q in (keys, values)))
        digest += [np.array(q.analysis).tobytes() for q in (keys, values) if q is not None]
    return Plan(f"rotations-{sha256(b''.join(digest))[:16]}", "", layers)


def fingerprint(model: Any) -> str:
    """Names a model by its configuration, its parameters' names, shapes and dtypes, and a strided sample of their
    values (at most 1 MB): the same weights give the same name, other weights or adapters another."""
    parameters = sorted(tree_flatten(model.parameters()))
    budget = SAMPLED_BYTES // max(4 * len(parameters), 1)
    samples = [_sample(array, max(1, min(SAMPLES_PER_PARAMETER, budget))) for _, array in parameters]
    mx.eval(samples)
    description = [repr(getattr(model, "args", None)), *(f"{n} {a.shape} {a.dtype}" for n, a in parameters)]
    content = "\n".join(description).encode() + b"".join(np.array(s).tobytes() for s in samples)
    name = str(getattr(model, "model_type", type(model).__name__))
    return f"{''.join(c if c.isalnum() else '_' for c in name)}-{sha256(content)[:16]}"


def _sample(array: mx.array, count: int) -> mx.array:
    flat = array.reshape(-1)
    sample = flat[:: max(1, flat.size // count)][:count]
    return sample.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else sample


def stored_path(model_fingerprint: str) -> pathlib.Path:
    """Where the codec of a model is looked for and stored."""
    return cache_folder() / "codecs" / f"{model_fingerprint}.safetensors"


def shipped_path(model_fingerprint: str) -> pathlib.Path:
    """Where the package ships the codec of its demonstration model."""
    return pathlib.Path(__file__).resolve().parent.parent / "data" / "codecs" / f"{model_fingerprint}.safetensors"


def find_codec(model_fingerprint: str) -> Codec | None:
    """The codec of a model from the cache folder or the package, or None."""
    for path in (stored_path(model_fingerprint), shipped_path(model_fingerprint)):
        if path.is_file():
            codec = Codec.load(path)
            if codec.fingerprint != model_fingerprint:
                raise CodecError(f"{path} belongs to model {codec.fingerprint}, not {model_fingerprint}; remove it.")
            return codec
    return None
