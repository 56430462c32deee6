"""The transforms of every layer of one model, and widths for any budget: calibrated once, saved as one file."""

import bisect
import dataclasses
import functools
import json
import os
import pathlib
import re
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from .bit_allocator import allocate
from .codebook import MAX_BITS
from .files import cache_folder, parse_json, read_file, sha256, write_atomically
from .packing import WORD_BITS, allocate_words
from .sealing import calibration_mass, newest_mass
from .spectral_quant import LARGEST, SpectralQuantizer, SpectralRotation

FORMAT = "vq_kvcache.codec"
VERSION = 2
SAMPLED_BYTES = 1 << 20
SAMPLES_PER_PARAMETER = 256
CONTEXT = 4096  # tokens of which KL is predicted where nobody names a context
# Costs are those of small errors. A head without any codes of its keys would attend to everything alike, which is no
# small error: on one model a head priced at 0.002 nats cost 0.36.
LEAST_WORDS = {"keys": 1, "values": 0}
_ARRAY = re.compile(r"layers\.(0|[1-9][0-9]{0,8})\.(keys|values)\.\w+", re.ASCII)
_FINGERPRINT = re.compile(r"[\w-]{1,200}", re.ASCII)  # it names a file, so it must not name a folder


ARRAYS = ("mean", "analysis", "eigenvalues", "costs", "stretch")


class CodecError(ValueError):
    """A codec that cannot be used; the message says what was found, what was expected and what to do."""


@dataclasses.dataclass(frozen=True)
class Transforms:
    """Of the keys or the values of one layer's H heads, float32: z = analysisT (x - mean) has variances `eigenvalues`.

    mean [H, D], analysis [H, D, D] (a coordinate per column), eigenvalues [H, D] descending, in units of the metric.
    costs [H, D, 9]: what each coordinate costs at 0..8 bits, measured, in the metric.  stretch [H, D, 9]: the factor on
    its standard deviation that gives this cost, because coordinates are not Gaussian and levels may need room. Both
    are of codes in rings (trellis.py) where there are such.
    """

    mean: NDArray[np.float32]
    analysis: NDArray[np.float32]
    eigenvalues: NDArray[np.float32]
    costs: NDArray[np.float32]
    stretch: NDArray[np.float32]

    def __post_init__(self) -> None:
        heads, dims = self.mean.shape
        expected = (heads, dims), (heads, dims, dims), (heads, dims), *((heads, dims, MAX_BITS + 1),) * 2
        arrays = tuple(getattr(self, f.name) for f in dataclasses.fields(self))
        if tuple(a.shape for a in arrays) != expected:
            shapes = [a.shape for a in arrays]
            raise CodecError(f"transforms have shapes {shapes}; expected {list(expected)}; calibrate again.")
        if not all(np.isfinite(a).all() for a in arrays) or (self.stretch <= 0).any():
            raise CodecError("transforms hold NaN, infinity or a scale of 0; expected finite ones; calibrate again.")
        if not heads or not dims or max(float(np.abs(a).max()) for a in arrays) > LARGEST:
            raise CodecError(
                f"transforms of {heads} heads of {dims} are empty or hold numbers beyond {LARGEST:g}; expected smaller "
                "ones; calibrate again."
            )

    def quantizer(self, widths: list[NDArray[np.int64]]) -> SpectralQuantizer:
        """One SpectralQuantizer per head, stacked, from the widths [D] of each."""
        dims = np.arange(self.mean.shape[1])
        heads = []
        for h, bits in enumerate(widths):
            stretch = self.stretch[h, dims, bits]
            variances = self.eigenvalues[h] * stretch**2
            parts = self.mean[h], self.analysis[h], variances, bits
            heads.append(SpectralQuantizer.from_transform(*parts, stretch=stretch))
        return SpectralQuantizer.stack(heads)


Bits = float | tuple[float, float]


def as_pair(bits_per_value: Any) -> tuple[float, float]:
    """Budgets of keys and of values; ValueError unless each is a number from 0.25 to 8."""
    pair = (
        tuple(bits_per_value) if isinstance(bits_per_value, tuple | list) else (bits_per_value, bits_per_value)
    )  # a bool is an int, and no budget
    numbers = [isinstance(b, int | float) and not isinstance(b, bool) and 0.25 <= b <= MAX_BITS for b in pair]
    if len(pair) != 2 or not all(numbers):
        raise ValueError(
            f"bits_per_value is {bits_per_value!r}; expected a number from 0.25 to {MAX_BITS}, or one for keys and one "
            "for values."
        )
    return float(pair[0]), float(pair[1])


def budget_name(bits_per_value: Bits) -> str:
    """A budget as saved caches write it: "2.0", or "3.0,2.0" for keys and values apart."""
    keys, values = as_pair(bits_per_value)
    return f"{keys}" if isinstance(bits_per_value, int | float) else f"{keys},{values}"


def budget_of(name: str) -> Bits:
    """The inverse of `budget_name`."""
    keys, _, values = name.partition(",")
    return (float(keys), float(values)) if values else float(keys)


def allocate_heads(
    costs: list[NDArray[np.float64]], bits_per_value: float, floors: Sequence[int] | None = None
) -> list[NDArray[np.int64]]:
    """Widths [D] of heads that share one budget, from their costs [D, 9]; all their words together keep within it.

    floors: words that each head gets at least, as far as the budget goes.
    """
    # A running minimum, because one more bit can measure worse by chance and greedy would stop there.
    falling = [np.minimum.accumulate(c, axis=1) for c in costs]
    sizes = [len(c) for c in costs]
    words = int(bits_per_value * sum(sizes) // WORD_BITS)
    least = np.array(floors if floors is not None and sum(floors) <= words else [0] * len(costs))
    start = [allocate(c, min(WORD_BITS * n, MAX_BITS * len(c))) for c, n in zip(falling, least.tolist(), strict=True)]
    total = min(WORD_BITS * words, MAX_BITS * sum(sizes))
    bits = allocate(np.concatenate(falling), total, start=np.concatenate(start))
    shares = np.array([part.sum() / WORD_BITS for part in np.split(bits, np.cumsum(sizes)[:-1])])
    whole = np.maximum(np.floor(shares).astype(int), least)
    for h in np.argsort(whole - shares, kind="stable")[: words - int(whole.sum())]:
        whole[h] += 1
    return [allocate_words(c, w) for c, w in zip(falling, whole.tolist(), strict=True)]


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

    layers: index of the layer's cache -> (Transforms of keys, Transforms of values, None to keep those exact).
    fingerprint: of the model it was calibrated on.  provenance: how, as plain JSON.
    """

    def __init__(
        self, fingerprint: str, layers: dict[int, tuple[Transforms, Transforms | None]], provenance: dict[str, Any]
    ) -> None:
        if not layers:
            raise CodecError("no layer has a KV cache to pack; expected at least one full-attention layer.")
        self.fingerprint, self.layers, self.provenance = fingerprint, dict(sorted(layers.items())), provenance
        self._plans: dict[str, Plan] = {}

    @functools.cached_property
    def identity(self) -> str:
        """Hash of the content, by which saved prompt caches name their codec."""
        return sha256(self._serialised())[:16]

    def plan(self, bits_per_value: Bits, keep: bool = True) -> Plan:
        """Quantizers of every layer with at most `bits_per_value` stored bits per number, padding included.

        A pair is a budget for keys and one for values. One number is spent where it helps most, keys or values.
        keep: whether the codec holds the plan, for whoever asks for it again.
        """
        name = f"{self.identity}@{budget_name(bits_per_value)}"
        if name not in self._plans:
            widths = self._widths(bits_per_value)
            layers = {
                i: LayerQuantizers(
                    k.quantizer(widths[i, "keys"]), None if v is None else v.quantizer(widths[i, "values"])
                )
                for i, (k, v) in self.layers.items()
            }
            plan = Plan(name, self.fingerprint, layers)
            if not keep:
                return plan
            self._plans[name] = plan
        return self._plans[name]

    @property
    def in_nats(self) -> bool:
        """Whether costs of all layers are in one unit, nats of KL per token."""
        return self.provenance.get("objective") == "fisher" or self.provenance.get("costs") == "nats"

    def predicted_kl(self, bits_per_value: Bits, context: int = CONTEXT, window: int | None = None) -> float:
        """KL of the next-token distribution, in nats, that this budget is expected to cost the newest of `context`
        tokens of text like the calibration's, when they come one by one, as in generating.

        bits_per_value: as in `plan`.  window: newest tokens that are exact (None: as many as in calibration). It grows
        with the context, so the mean over a text is less: `kl_of_mass`. ValueError for a codec whose costs are not in
        nats.
        """
        _, calibrated_window, sinks = self._calibrated
        exact = calibrated_window if window is None else window
        return self.kl_of_mass(bits_per_value, newest_mass(context, exact, sinks))

    def kl_of_mass(self, bits_per_value: Bits, mass: float) -> float:
        """KL, in nats, that this budget is expected to cost a token for which codes weigh `mass` (sealing.far_mass).

        Costs are means over the tokens of calibration sequences, so they are scaled by what perturbed tokens weighed
        there; a codec that does not tell of its sequences predicts what they cost, whatever the mass.
        """
        if not self.in_nats:
            raise ValueError(
                f"costs of a codec of objective {self.provenance.get('objective')!r} are not in nats; expected "
                '"fisher"; calibrate with objective="fisher".'
            )
        cost = sum(
            float(transforms.costs[h, np.arange(len(bits)), bits].sum(dtype=np.float64))
            for (i, part), heads in self._widths(bits_per_value).items()
            if (transforms := self.layers[i][part == "values"]) is not None
            for h, bits in enumerate(heads)
        )
        calibrated = calibration_mass(*self._calibrated)
        return cost * mass / calibrated if calibrated else cost

    @property
    def _calibrated(self) -> tuple[int, int, int]:
        """Length, window and sinks of the calibration sequences."""
        length, window, sinks = (int(self.provenance.get(n, 0)) for n in ("sequence_length", "window", "sinks"))
        return length, window, sinks

    def bits_for(self, max_kl: float, context: int = CONTEXT, window: int | None = None) -> float:
        """The smallest budget, in steps of 1/16 bit, whose `predicted_kl` at this context and window is at most
        `max_kl` nats; ValueError if none."""
        steps = [b / 16 for b in range(4, 16 * MAX_BITS + 1)]
        least = self.predicted_kl(steps[-1], context, window)
        if not max_kl > 0 or least > max_kl:
            raise ValueError(
                f"max_kl is {max_kl}; expected at least {least:.2g}, which {MAX_BITS} bits are predicted to cost at "
                f"{context:,} tokens; allow more or use a full-precision cache."
            )
        return steps[bisect.bisect_left(steps, True, key=lambda b: self.predicted_kl(b, context, window) <= max_kl)]

    def _widths(self, bits_per_value: Bits) -> dict[tuple[int, str], list[NDArray[np.int64]]]:
        """Widths of each head of each (layer, part): one budget for the model where costs are in nats, else equal ones
        for the keys and for the values of each layer."""
        costs = {
            (i, part): [c.astype(np.float64) for c in transforms.costs]
            for i, pair in self.layers.items()
            for part, transforms in zip(("keys", "values"), pair, strict=True)
            if transforms is not None
        }
        budgets = dict(zip(("keys", "values"), as_pair(bits_per_value), strict=True))
        if not self.in_nats:
            return {name: allocate_heads(heads, budgets[name[1]]) for name, heads in costs.items()}
        shared = [("keys", "values")] if isinstance(bits_per_value, int | float) else [("keys",), ("values",)]
        widths: dict[tuple[int, str], list[NDArray[np.int64]]] = {}
        for parts in shared:
            chosen = {name: heads for name, heads in costs.items() if name[1] in parts}
            if not chosen:  # no layer's values are packed
                continue
            floors = [LEAST_WORDS[part] for (_, part), heads in chosen.items() for _ in heads]
            flat = iter(allocate_heads([c for heads in chosen.values() for c in heads], budgets[parts[0]], floors))
            widths |= {name: [next(flat) for _ in heads] for name, heads in chosen.items()}
        return widths

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file at `path`, atomically."""
        write_atomically(pathlib.Path(path), self._serialised())

    def _serialised(self) -> bytes:
        arrays = {
            f"layers.{i}.{part}.{name}": np.ascontiguousarray(getattr(transforms, name))
            for i, pair in self.layers.items()
            for part, transforms in zip(("keys", "values"), pair, strict=True)
            if transforms is not None
            for name in ARRAYS
        }
        description = {"version": VERSION, "fingerprint": self.fingerprint, "provenance": self.provenance}
        # One entry only: safetensors writes several in no fixed order, and equal codecs must be equal files.
        return save_safetensors(arrays, {FORMAT: json.dumps(description, sort_keys=True)})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "Codec":
        """Read the codec saved at `path`; CodecError, in one sentence, for anything that is not a whole one."""
        try:
            content = read_file(pathlib.Path(path))
            description = _description(content)
            arrays = load_safetensors(content)
            if description.get("version") != VERSION:
                found = " ".join(f"{description.get('version')!s:.40}".split())
                raise CodecError(f"codec version {found}, expected {VERSION}; calibrate again.")
            name, provenance = description["fingerprint"], dict(description["provenance"])
            if not isinstance(name, str) or not _FINGERPRINT.fullmatch(name):
                raise CodecError(
                    "the fingerprint is no plain name; expected letters, digits, - and _; calibrate again."
                )
            lengths = [provenance.get(n, 0) for n in ("sequence_length", "window", "sinks")]
            if not all(isinstance(n, int) and 0 <= n < 2**31 for n in lengths):
                raise CodecError(f"it tells of {lengths!s:.100} tokens; expected whole numbers; calibrate again.")
            return cls(name, _layers(arrays), provenance)
        except OSError as error:
            raise CodecError(f"{path} cannot be read ({error.strerror}); expected a saved codec.") from None
        except CodecError as error:
            raise CodecError(f"{path}: {error}") from None
        except (SafetensorError, KeyError, ValueError, TypeError, AttributeError, struct.error) as error:
            said = " ".join(f"{error!s:.200}".split())
            raise CodecError(f"{path} is truncated or no codec file ({said}); calibrate again.") from None


def _description(content: bytes) -> dict[str, Any]:
    (length,) = struct.unpack("<Q", content[:8])
    header = parse_json(content[8 : 8 + min(length, len(content))])
    return dict(parse_json(header["__metadata__"][FORMAT]))


def _layers(arrays: dict[str, NDArray[Any]]) -> dict[int, tuple[Transforms, Transforms | None]]:
    found = [_ARRAY.fullmatch(name) for name in arrays]
    if not all(found):
        raise CodecError(
            f"it holds {', '.join(arrays)[:80]!r}; expected layers.<i>.keys.mean and so on; calibrate again."
        )
    indices = sorted({int(match[1]) for match in found if match})
    with_values = {int(match[1]) for match in found if match and match[2] == "values"}
    return {
        i: (
            _transforms(arrays, f"layers.{i}.keys"),
            _transforms(arrays, f"layers.{i}.values") if i in with_values else None,
        )
        for i in indices
    }


def _transforms(arrays: dict[str, NDArray[Any]], prefix: str) -> Transforms:
    parts = [arrays[f"{prefix}.{name}"] for name in ARRAYS]
    if any(p.dtype != np.float32 for p in parts) or parts[0].ndim != 2:
        raise CodecError(f"{prefix} is not float32 [H, D]; expected a codec of this version; calibrate again.")
    return Transforms(*parts)


@functools.lru_cache(maxsize=4)
def _loaded(path: pathlib.Path, changed_ns: int) -> Codec:
    return Codec.load(path)


def codec_of_file(path: str | os.PathLike[str]) -> Codec:
    """As `Codec.load`, once per file as it is now: plans of one codec are made once."""
    file = pathlib.Path(path).absolute()
    return _loaded(file, file.stat().st_mtime_ns) if file.is_file() else Codec.load(path)


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
        for part, q in (("keys", keys), ("values", values)):
            if q is not None:  # whatever changes the codes, or what they mean, changes the name
                digest.append(f"{index} {part} {q.widths}".encode())
                digest += [np.array(a).tobytes() for a in (q.mean, q.analysis)]
    return Plan(f"rotations-{sha256(b''.join(digest))[:16]}", "", layers)


def fingerprint(model: Any) -> str:
    """Names a model by its configuration, its parameters' names, shapes and dtypes, and a strided sample of their
    values (at most 1 MB): the same weights give the same name, other weights or adapters another. Of floating dtypes
    the most frequent counts for all: gemma3n turns some parameters into float32 when it first runs."""
    name, description, samples = _samples(model)
    mx.eval(samples)
    return _name(name, description, samples)


def fingerprint_of_files(load: Callable[[], Any]) -> str:
    """The fingerprint of the model that `load` makes with weights not read yet; holds one parameter at a time."""
    name, description, samples = _samples(load())
    for sample in samples:  # nothing else holds the weights: each is read, sampled and dropped
        mx.eval(sample)
    return _name(name, description, samples)


def _samples(model: Any) -> tuple[str, str, list[mx.array]]:
    parameters = sorted(tree_flatten(model.parameters()))
    budget = SAMPLED_BYTES // max(4 * len(parameters), 1)
    samples = [_sample(array, max(1, min(SAMPLES_PER_PARAMETER, budget))) for _, array in parameters]
    floating = Counter(a.dtype for _, a in parameters if mx.issubdtype(a.dtype, mx.floating)).most_common(1)
    dtypes = [floating[0][0] if mx.issubdtype(a.dtype, mx.floating) else a.dtype for _, a in parameters]
    named = (f"{n} {a.shape} {dtype}" for (n, a), dtype in zip(parameters, dtypes, strict=True))
    description = [repr(getattr(model, "args", None)), *named]
    return str(getattr(model, "model_type", type(model).__name__)), "\n".join(description), samples


def _name(name: str, description: str, samples: list[mx.array]) -> str:
    content = description.encode() + b"".join(np.array(s).tobytes() for s in samples)
    return f"{''.join(c if c.isalnum() else '_' for c in name)}-{sha256(content)[:16]}"


def _sample(array: mx.array, count: int) -> mx.array:
    flat = array.reshape(-1)
    sample = flat[:: max(1, flat.size // count)][:count]
    return sample.astype(mx.float32) if mx.issubdtype(array.dtype, mx.floating) else sample


def stored_path(model_fingerprint: str) -> pathlib.Path:
    """Where the codec of a model is looked for and stored; CodecError for what is no fingerprint."""
    if not _FINGERPRINT.fullmatch(model_fingerprint):
        raise CodecError(f"{model_fingerprint[:80]!r} is no model's fingerprint; expected a plain name; make it again.")
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
