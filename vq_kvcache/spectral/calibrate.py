"""Statistics of a model's keys and values over text -> rotations (the documented API), or a Codec (the cache's own)."""

import contextlib
import functools
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from . import codec as codecs
from .calibration_text import Placed, calibration_sequences, context_of, place
from .codec import Codec, Transforms
from .fisher import LayerFisher, Setting, gather, probe
from .forward_only import Layers, in_nats, run_observed, variance_layers
from .intercept import plain_caches, require_layers, uses
from .memory_budget import default_budget, fit
from .moments import Moments
from .partial import Partial
from .progress import bar
from .rotation_files import RotationFileError, load_cached_rotations, save_rotations
from .shrinkage import Shrinkage, choose, shrunk
from .spectral_quant import SpectralRotation
from .transforms import eigen, fisher_transforms
from .workers import each

__all__ = [
    "RotationFileError",
    "calibrate_codec",
    "calibrate_from_vectors",
    "calibrate_spectral_rotation",
    "codec_for",
    "load_cached_rotations",
    "save_rotations",
]


def calibrate_spectral_rotation(
    model: Any,
    tokenizer: Any,
    num_samples: int = 64,
    sequence_length: int = 1024,
    device: str = "gpu",
    *,
    texts: Sequence[str] | None = None,
    seed: int = 0,
) -> list[SpectralRotation]:
    """One rotation per full-attention layer: the eigenbasis of its keys about their mean, heads pooled.

    Each carries the rotation of the layer's values in `.values`. `num_samples` sequences of `sequence_length` tokens,
    which `seed` chooses, go through the model; its `tokenizer` makes them of text; `texts` replaces the built-in
    calibration text. On a machine without a GPU, device="gpu" falls back to the default device with one warning.
    """
    seen: dict[int, tuple[Moments, Moments]] = {}

    def see(layer: int, queries: mx.array, keys: mx.array, values: mx.array) -> None:
        for moments, x in zip(seen.setdefault(layer, (Moments(), Moments())), (keys, values), strict=True):
            moments.update(x)

    with _on_device(device):
        sequences = calibration_sequences(model, tokenizer, num_samples, sequence_length, texts, seed)
        run_observed(model, [Placed(s, 0) for s in sequences], see)
    require_layers(seen)
    return [
        _pooled_rotation(keys, f"layers.{i}", _pooled_rotation(values, f"layers.{i}", None))
        for i, (keys, values) in sorted(seen.items())
    ]


def calibrate_from_vectors(key_vectors: list[mx.array]) -> list[SpectralRotation]:
    """One rotation per array [..., D] of `key_vectors`, by SVD of the centred vectors, named "layers.<position>".

    Eigenvalues are squared singular values over the number of vectors. ValueError for fewer than two vectors or NaN.
    """
    rotations = []
    for i, array in enumerate(key_vectors):
        x = np.array(array.astype(mx.float32), dtype=np.float64).reshape(-1, array.shape[-1])
        if len(x) < 2 or not np.isfinite(x).all():
            raise ValueError(f"array {i} holds {len(x)} vectors or NaN; expected at least 2 finite ones [..., D].")
        mean = x.mean(axis=0)
        _, singular, basis = np.linalg.svd(x - mean, full_matrices=len(x) < x.shape[1])
        eigenvalues = np.zeros(x.shape[1])
        eigenvalues[: len(singular)] = singular**2 / len(x)
        rotations.append(_rotation(basis.T, eigenvalues, mean, f"layers.{i}", None))
    return rotations


def calibrate_codec(
    model: Any,
    tokenizer: Any,
    num_samples: int = 16,
    sequence_length: int = 1024,
    *,
    texts: Sequence[str] | None = None,
    seed: int = 0,
    objective: Literal["fisher", "variance"] = "fisher",
    window: int = 128,
    sinks: int = 4,
    memory_budget: int | None = None,
) -> Codec:
    """The codec of a model: for each layer, KV head, and keys or values, the basis in which errors cost least.

    With metric F and covariance C, A = F^(1/2) and A C A = U diag(l) UT; analysis is A U. objective="fisher": F is the
    Fisher information of the vectors (fisher.py). "variance" needs no gradients: metrics of what reads the vectors, and
    the measured sensitivity of each layer (forward_only.py). Either way costs are in nats and bits go wherever in the
    model they save most. A model that cannot be differentiated is calibrated by "variance", with a warning.

    memory_budget: bytes that gradients may take above what is active, by default what the device or host can spare;
    where sequences of `sequence_length` need more, layers are computed twice, then sequences are shorter. Interrupted,
    it goes on where it was when it is called again for the same model, text and settings. The same seed gives the
    same codec, byte for byte, on one machine.
    """
    if objective not in ("fisher", "variance"):
        raise ValueError(f'objective is {objective!r}; expected "fisher" or "variance".')
    require_layers(uses(model))
    name = codecs.fingerprint(model)
    made: tuple[Layers, dict[str, Any]] | None = None
    with fast_arithmetic(model):
        text = functools.partial(calibration_sequences, model, tokenizer, num_samples, texts=texts, seed=seed)
        if objective == "fisher":
            try:
                made = _fisher(model, text, sequence_length, Setting(window, sinks, seed), name, memory_budget)
            except (ValueError, RuntimeError) as error:
                if any(
                    known in str(error)
                    for known in ("activations hold", "memory_budget", "calibration texts hold", "samples of")
                ):
                    raise
                warnings.warn(f"no gradients through this model ({error}): calibrating by variance.", stacklevel=2)
        if made is None:
            made = _variance(model, text(sequence_length=sequence_length), window, sinks)
    provenance = {
        "seed": seed, "text": "built-in" if texts is None else "user", "context": context_of(model), "window": window,
        "sinks": sinks, "costs": "nats",
    }  # fmt: skip
    return Codec(name, made[0], provenance | made[1])


def _fisher(
    model: Any, text: Callable[..., list[mx.array]], length: int, setting: Setting, name: str, budget: int | None
) -> tuple[Layers, dict[str, Any]]:
    """Layers, and what to say of how they came about."""
    budget = default_budget() if budget is None else budget
    room = fit(lambda n, again: probe(model, n, setting._replace(checkpoint=again)), length,
               setting.window + setting.sinks, budget)  # fmt: skip
    used, caches = uses(model), plain_caches(model)
    # Gradients of gemma3n taken on two threads crash MLX 0.32.4, so only the plainest models get several.
    plain = len(used) == len(caches) and all(u.kind == "paired" and u.readers == 1 for u in used.values())
    setting = setting._replace(checkpoint=room.checkpoint, at_once=room.at_once if plain else 1)
    sequences = place(text(sequence_length=room.sequence_length), context_of(model))
    partial = Partial(name, sequences, setting)
    statistics, done = partial.load()
    with bar(total=len(sequences), initial=done, desc="calibrating", unit="sequence") as progress:

        def report(count: int) -> None:
            progress.update()
            partial.save(statistics, count)

        gather(model, sequences, setting, statistics, done, report)
    require_layers(statistics)
    # Positions cached beside latents stay exact.
    latent = {i for i, use in used.items() if use.kind == "latent"}
    packed = {(i, part): seen for i, pair in statistics.items() for part, seen in enumerate(pair)
              if part == 0 or i not in latent}  # fmt: skip
    strength = choose(packed.values(), len(sequences))
    layers = _measured(packed, strength, len(sequences), room.at_once)
    partial.remove()
    return layers, _told("fisher", sequences, room.sequence_length) | {"shrinkage": strength._asdict()}


def _measured(packed: dict[tuple[int, int], LayerFisher], strength: Shrinkage, sequences: int, at_once: int) -> Layers:
    """Transforms and costs of each layer, keys and values beside each other where there are cores."""

    def measured(seen: LayerFisher) -> Transforms:
        metric = shrunk(seen.metric, strength.metric, sequences)
        covariance = shrunk(seen.vectors.covariance, strength.covariance, sequences)
        return fisher_transforms(seen.vectors, metric, seen.kept, covariance)

    progress = bar(each(measured, list(packed.values()), at_once), total=len(packed), desc="measuring", unit="part")
    found = dict(zip(packed, progress, strict=True))
    return {i: (found[i, 0], found.get((i, 1))) for i, part in packed if part == 0}


def _variance(model: Any, sequences: list[mx.array], window: int, sinks: int) -> tuple[Layers, dict[str, Any]]:
    placed = place(sequences, context_of(model))
    layers = variance_layers(model, placed)
    told = _told("variance", placed, max(s.size for s in sequences))
    if (scaled := in_nats(model, placed, layers, window, sinks)) is None:
        return layers, told | {"costs": "units of each layer"}
    print("no gradients were used: costs are layer sensitivities measured forward", file=sys.stderr)
    return scaled, told | {"sensitivities": "measured forward"}


def _told(objective: str, sequences: Sequence[Placed], length: int) -> dict[str, Any]:
    tokens = sum(s.ids.size for s in sequences)
    return {"objective": objective, "sequences": len(sequences), "sequence_length": length, "tokens": tokens}


@contextlib.contextmanager
def fast_arithmetic(model: Any) -> Iterator[None]:
    """16-bit weights as float32 inside, on a CPU: MLX's has no vectors of 16-bit numbers."""
    if mx.default_device() == mx.gpu:
        yield
        return
    own = model.parameters()
    model.set_dtype(mx.float32)
    mx.eval(model.parameters())
    try:
        yield
    finally:
        model.update(own)


def codec_for(model: Any, tokenizer: Any | Callable[[], Any] | None) -> Codec:
    """The codec of this model: from the cache folder or the package, else calibrated now and stored.

    `tokenizer` may be a function that loads one. A cache folder that cannot be written costs a warning, no more.
    """
    name = codecs.fingerprint(model)
    if (found := codecs.find_codec(name)) is not None:
        return found
    if tokenizer is None:
        raise codecs.CodecError(
            f"no codec of model {name} in {codecs.stored_path(name).parent} and no tokenizer to make one with; "
            "expected either; pass the tokenizer: attach(model, tokenizer)."
        )
    is_loader = callable(tokenizer) and not hasattr(tokenizer, "encode")
    made = calibrate_codec(model, tokenizer() if is_loader else tokenizer)
    try:
        made.save(codecs.stored_path(name))
    except OSError as error:
        warnings.warn(f"the codec could not be stored in {codecs.stored_path(name)} ({error.strerror}).", stacklevel=2)
    return made


@contextlib.contextmanager
def _on_device(device: str) -> Iterator[None]:
    if device not in ("gpu", "cpu"):
        raise ValueError(f'device is {device!r}; expected "gpu" or "cpu".')
    if device == "gpu" and not (mx.metal.is_available() or mx.cuda.is_available()):
        warnings.warn(f"no GPU on this machine; calibrating on {mx.default_device()}.", stacklevel=4)
        yield
        return
    with mx.stream(mx.gpu if device == "gpu" else mx.cpu):
        yield


def _pooled_rotation(moments: Moments, name: str, values: SpectralRotation | None) -> SpectralRotation:
    pooled = moments.pooled()
    eigenvalues, vectors = eigen(pooled.covariance[0])
    return _rotation(vectors, eigenvalues, pooled.mean[0], name, values)


def _rotation(
    vectors: NDArray[np.float64],
    eigenvalues: NDArray[np.float64],
    mean: NDArray[np.float64],
    name: str,
    values: SpectralRotation | None,
) -> SpectralRotation:
    arrays = [mx.array(np.ascontiguousarray(a, dtype=np.float32)) for a in (vectors, eigenvalues, mean)]
    return SpectralRotation(arrays[0], arrays[1], len(mean), name, arrays[2], values)
