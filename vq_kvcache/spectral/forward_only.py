"""A codec without gradients: metrics of what reads keys and values, and the model's measured sensitivity to errors.

Keys are measured by the second moment of the queries (OSCAR, arXiv 2605.17757), values by WoT Wo of the output
projection. These metrics know nothing of what the later layers make of an error, so one forward pass with the keys, or
the values, of one layer coarsened gives the KL that a unit of its metric costs.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from .calibration_text import Placed
from .codec import Transforms
from .far_attention import far_attention_reference
from .intercept import Attention, Use, dispatching, is_list, observers, plain_caches, recorders, uses
from .moments import Moments, SecondMoments
from .progress import bar
from .transforms import KEPT_VECTORS, coarsened, transforms_of

OUTPUT_PROJECTIONS = ("o_proj", "out_proj", "dense", "c_proj", "wo", "o")
SENSITIVITY_BITS = 2
SENSITIVITY_SEQUENCES = 2

Layers = dict[int, tuple[Transforms, Transforms | None]]


def variance_layers(model: Any, sequences: Sequence[Placed]) -> Layers:
    """layer -> (Transforms of keys, of values, None to keep those exact), costs in units of each one's own metric."""
    seen: dict[int, _Seen] = {}
    stride = max(1, -(-sum(s.ids.size for s in sequences) // KEPT_VECTORS))

    def see(layer: int, queries: mx.array | None, keys: mx.array, values: mx.array) -> None:
        seen.setdefault(layer, _Seen(stride)).update(queries, keys, values)

    run_observed(model, sequences, see)
    layers: Layers = {}
    caches, used = plain_caches(model), uses(model)
    by_layer = len(caches) == len(model.layers) and not any(map(is_list, caches))  # the i-th cache is the i-th layer's
    for i, layer in bar(seen.items(), desc="measuring", unit="layer"):
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


def in_nats(model: Any, sequences: Sequence[Placed], layers: Layers, window: int, sinks: int) -> Layers | None:
    """The same layers with costs in nats per token; None when no sequence reaches beyond window and sinks."""
    chosen = [s for s in sequences if s.ids.size > window + sinks][:: max(1, len(sequences) // SENSITIVITY_SEQUENCES)]
    chosen = chosen[:SENSITIVITY_SEQUENCES]
    if not chosen:
        return None
    used = uses(model)
    expected = [_log_probabilities(model, used, s, None, window, sinks) for s in chosen]
    scaled: Layers = {}
    for i, pair in bar(layers.items(), desc="sensitivities", unit="layer"):
        parts: list[Transforms | None] = []
        for part, transforms in enumerate(pair):
            if transforms is None:
                parts.append(None)
                continue
            kl = 0.0
            for placed, full in zip(chosen, expected, strict=True):
                found = _log_probabilities(model, used, placed, (i, part, transforms), window, sinks)
                kl += float(np.array((mx.exp(full) * (full - found)).sum(axis=-1).mean())) / len(chosen)
            unit = float(transforms.costs[..., SENSITIVITY_BITS].sum(dtype=np.float64))
            costs = transforms.costs * np.float32(max(kl, 1e-9) / max(unit, 1e-30))
            parts.append(dataclasses.replace(transforms, costs=costs))
        assert parts[0] is not None  # keys are always packed
        scaled[i] = parts[0], parts[1]
    return scaled


def _log_probabilities(
    model: Any,
    used: dict[int, Use],
    placed: Placed,
    change: tuple[int, int, Transforms] | None,
    window: int,
    sinks: int,
) -> mx.array:
    """Of every next token, float32 [T, V], with the far keys (part 0) or values (1) of one layer coarsened."""

    def append(layer: int, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        if change is None or layer != change[0] or used[layer].kind == "paired":
            return k, v
        # Near readers see these errors too: what reads them is not this module's attention.
        worse = [k, v]
        worse[change[1]] = coarsened(change[2], worse[change[1]], SENSITIVITY_BITS).astype(k.dtype)
        return worse[0], worse[1]

    def attend(layer: int, q: mx.array, k: mx.array, v: mx.array, original: Attention, **options: Any) -> mx.array:
        if change is None or layer != change[0] or used[layer].kind != "paired":
            return original(q, k, v, **options)
        errors = [mx.zeros(k.shape), mx.zeros(v.shape)]
        errors[change[1]] = coarsened(change[2], (k, v)[change[1]], SENSITIVITY_BITS) - (k, v)[change[1]]
        return far_attention_reference(q, k, v, *errors, window=window, exact=sinks, **options)

    with dispatching():
        caches = recorders(model, attend, placed.offset, append=append, only=used)
        logits = model(placed.ids[None], cache=caches)[0].astype(mx.float32)
    result: mx.array = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    mx.eval(result)
    return result


def run_observed(model: Any, sequences: Sequence[Placed], see: Callable[..., None]) -> None:
    """One forward pass over each sequence, showing `see` what every full-attention layer attends to."""
    used = uses(model)
    with dispatching():
        for ids, offset in bar(sequences, desc="calibrating", unit="sequence"):
            mx.eval(model(ids[None], cache=observers(model, see, offset, used)))


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
