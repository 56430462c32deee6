"""Statistics of a model's keys and values over text -> rotations (the documented API), or a Codec (the cache's own)."""

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from . import codec as codecs
from .calibration_text import Placed, calibration_sequences, context_of, place
from .codec import Codec, Transforms
from .fisher import LayerFisher, gather
from .intercept import Use, dispatching, is_list, observers, plain_caches, uses
from .moments import Moments, SecondMoments
from .rotation_files import RotationFileError, load_cached_rotations, save_rotations
from .spectral_quant import SpectralRotation
from .transforms import KEPT_VECTORS, eigen, fisher_transforms, transforms_of

__all__ = [
    "RotationFileError",
    "calibrate_codec",
    "calibrate_from_vectors",
    "calibrate_spectral_rotation",
    "codec_for",
    "load_cached_rotations",
    "save_rotations",
]

OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "dense", "c_proj", "wo", "o")


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

    Each carries the rotation of the layer's values in `.values`. `texts` replaces the built-in calibration text. On a
    machine without a GPU, device="gpu" falls back to the default device with one warning.
    """
    seen: dict[int, tuple[Moments, Moments]] = {}

    def see(layer: int, queries: mx.array | None, keys: mx.array, values: mx.array) -> None:
        for moments, x in zip(seen.setdefault(layer, (Moments(), Moments())), (keys, values), strict=True):
            moments.update(x)

    with _on_device(device):
        sequences = calibration_sequences(model, tokenizer, num_samples, sequence_length, texts, seed)
        _run(model, uses(model), [Placed(s, 0) for s in sequences], see)
    _require_layers(seen)
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
) -> Codec:
    """The codec of a model: for each layer, KV head, and keys or values, the basis in which errors cost least.

    With metric F and covariance C, A = F^(1/2) and A C A = U diag(l) UT; analysis is A U. objective="fisher": F is the
    Fisher information of the vectors (fisher.py), costs are in nats and bits go wherever in the model they save most.
    "variance" needs no gradients: F is the second moment of the queries for keys (OSCAR, arXiv 2605.17757) and WoT Wo
    of the output projection for values, and every layer gets the same bits. A model that cannot be differentiated is
    calibrated by "variance", with a warning.
    """
    if objective not in ("fisher", "variance"):
        raise ValueError(f'objective is {objective!r}; expected "fisher" or "variance".')
    sequences = calibration_sequences(model, tokenizer, num_samples, sequence_length, texts, seed)
    placed = place(sequences, context_of(model))
    layers, used = None, uses(model)
    if objective == "fisher":
        try:
            layers = _fisher_layers(model, used, placed, window, sinks, seed)
        except (ValueError, RuntimeError) as error:
            if "activations hold" in str(error):
                raise
            warnings.warn(f"no gradients through this model ({error}): calibrating by variance.", stacklevel=2)
            objective = "variance"
    if layers is None:
        layers = _variance_layers(model, used, placed)
    provenance = {
        "objective": objective, "sequences": len(sequences), "sequence_length": sequence_length, "seed": seed,
        "text": "built-in" if texts is None else "user", "tokens": sum(s.size for s in sequences),
        "context": context_of(model), "window": window, "sinks": sinks,
    }  # fmt: skip
    return Codec(codecs.fingerprint(model), layers, provenance)


Layers = dict[int, tuple[Transforms, Transforms | None]]


def _fisher_layers(
    model: Any, used: dict[int, Use], sequences: Sequence[Placed], window: int, sinks: int, seed: int
) -> Layers:
    progress = tqdm(sequences, desc="calibrating", unit="sequence")
    statistics = gather(model, progress, window, sinks, seed)
    _require_layers(statistics)
    return {
        i: (_of_fisher(keys), None if used[i].kind == "latent" else _of_fisher(values))
        for i, (keys, values) in tqdm(statistics.items(), desc="measuring", unit="layer")
    }


def _of_fisher(seen: LayerFisher) -> Transforms:
    return fisher_transforms(seen.vectors, seen.metric, seen.kept)


def _variance_layers(model: Any, used: dict[int, Use], sequences: Sequence[Placed]) -> Layers:
    seen: dict[int, _Seen] = {}
    stride = max(1, -(-sum(s.ids.size for s in sequences) // KEPT_VECTORS))

    def see(layer: int, queries: mx.array | None, keys: mx.array, values: mx.array) -> None:
        seen.setdefault(layer, _Seen(stride)).update(queries, keys, values)

    _run(model, used, sequences, see)
    _require_layers(seen)
    layers: Layers = {}
    caches = plain_caches(model)
    by_layer = len(caches) == len(model.layers) and not any(map(is_list, caches))  # the i-th cache is the i-th layer's
    for i, layer in tqdm(seen.items(), desc="measuring", unit="layer"):
        # Queries that are not those of a plain attention say nothing about these keys.
        queries = layer.queries.value if layer.queries.count else np.stack([np.eye(used[i].key_dims)] * used[i].heads)
        keys = transforms_of(layer.keys, queries, layer.kept_keys)
        if used[i].kind == "latent":
            layers[i] = keys, None
            continue
        output = _output_metric(model, i if by_layer else None, *layer.values.mean.shape)
        layers[i] = keys, transforms_of(layer.values, output, layer.kept_values)
    return layers


class _Seen:
    """What one layer showed: moments, and every `stride`-th vector."""

    def __init__(self, stride: int) -> None:
        self.keys, self.values, self.queries = Moments(), Moments(), SecondMoments()
        self.kept_keys: list[mx.array] = []
        self.kept_values: list[mx.array] = []
        self._stride = stride

    def update(self, queries: mx.array | None, keys: mx.array, values: mx.array) -> None:
        self.keys.update(keys)
        self.values.update(values)
        if queries is not None:
            self.queries.update(queries, keys.shape[1])
        for kept, x in ((self.kept_keys, keys), (self.kept_values, values)):
            kept.append(mx.contiguous(x[0, :, :: self._stride]))
            mx.eval(kept[-1])  # or the whole forward pass would be held


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


def _run(model: Any, used: dict[int, Use], sequences: Sequence[Placed], see: Callable[..., None]) -> None:
    with dispatching():
        for ids, offset in tqdm(sequences, desc="calibrating", unit="sequence"):
            mx.eval(model(ids[None], cache=observers(model, see, offset, used)))


def _require_layers(seen: dict[int, Any]) -> None:
    if not seen:
        raise ValueError(
            "no layer of this model passed keys to mx.fast.scaled_dot_product_attention; expected full-attention "
            "layers; use a full-precision cache with it."
        )


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


def _output_metric(model: Any, layer: int | None, heads: int, dims: int) -> NDArray[np.float64]:
    """WoT Wo [H, D, D] of the projection that reads the attention output, summed over the query heads of a group.

    The identity where no such projection is found: squared error of the values themselves.
    """
    projection = None if layer is None else _output_projection(model, layer)
    rows = None if projection is None else _rows(projection, dims)
    if rows is None or len(rows) % (heads * dims):
        return np.tile(np.eye(dims), (heads, 1, 1))
    per_head = rows.reshape(heads, -1, dims, rows.shape[-1])  # query heads of a group lie side by side
    return np.asarray(np.einsum("hgio,hgjo->hij", per_head, per_head))


def _output_projection(model: Any, layer: int) -> Any | None:
    layers = getattr(model, "layers", [])
    if layer >= len(layers):
        return None
    named = {n.rsplit(".", 1)[-1]: m for n, m in layers[layer].named_modules() if "attn" in n or "attention" in n}
    return next((named[n] for n in OUTPUT_PROJECTIONS if n in named), None)


def _rows(projection: Any, dims: int) -> NDArray[np.float64] | None:
    """The projection as a matrix [in, out], whatever its weights' format: it is applied to the unit vectors."""
    inner = getattr(projection, "linear", projection)  # what an adapter wraps
    size = inner.weight.shape[-1]
    if hasattr(inner, "scales"):
        size = inner.scales.shape[-1] * inner.group_size
    try:
        unit, zero = mx.eye(size), mx.zeros((1, size))
        return np.array((projection(unit) - projection(zero)).astype(mx.float32), dtype=np.float64)
    except (ValueError, RuntimeError):
        return None
