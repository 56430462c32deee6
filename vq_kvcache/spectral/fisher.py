"""What an error in a cached vector costs, in nats: gradients of the model's own predictions.

Perturbing far keys and values by small errors e changes the output distribution by KL ~ 1/2 sum eT F e, F = E[g gT], g
the gradient of -log p(y) with respect to the cached vector, y drawn from the model (Amari 1998). Far means outside the
exact window and the sinks: near positions read the unperturbed tensors. See README, "How it works".
"""

from collections.abc import Iterable
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from .calibration_text import Placed
from .intercept import Attention, Use, dispatching, is_pair, recorders, uses
from .moments import Moments, SecondMoments

KEPT_BYTES = 1 << 30  # of vectors and gradients, on which costs are measured


class LayerFisher:
    """Statistics of the keys or the values of one layer: moments of the vectors, F of the gradients, and some of both.

    kept: (vectors [H, T, D], gradients [H, T, D]) of whole sequences.
    """

    def __init__(self) -> None:
        self.vectors, self.gradients = Moments(), SecondMoments()
        self.kept: list[tuple[mx.array, mx.array]] = []

    @property
    def metric(self) -> NDArray[np.float64]:
        """F, [H, D, D], in nats per squared unit."""
        return self.gradients.value

    def update(self, vectors: mx.array, gradients: mx.array, keep: bool) -> None:
        """Add a sequence: both [1, H, T, D]."""
        self.vectors.update(vectors)
        self.gradients.update(gradients, gradients.shape[1])
        if keep:
            self.kept.append((vectors[0].astype(mx.float32), gradients[0].astype(mx.float32)))
            mx.eval(self.kept[-1])


Statistics = dict[int, tuple[LayerFisher, LayerFisher]]


def gather(model: Any, sequences: Iterable[Placed], window: int, sinks: int, seed: int) -> Statistics:
    """Statistics of every full-attention layer: one forward and one backward pass a sequence, one label a position."""
    statistics: Statistics = {}
    used = uses(model)
    key = mx.random.key(seed)
    kept_bytes = 0
    for placed in sequences:
        key, now = mx.random.split(key)
        found = _gradients(model, used, placed, window, sinks, now)
        mx.eval(found)
        keep = kept_bytes < KEPT_BYTES
        for layer, arrays in found.items():
            keys, values = statistics.setdefault(layer, (LayerFisher(), LayerFisher()))
            keys.update(arrays[0], arrays[1], keep)
            values.update(arrays[2], arrays[3], keep)
            kept_bytes += 4 * sum(a.size for a in arrays) if keep else 0
    return statistics


def _gradients(
    model: Any, used: dict[int, Use], placed: Placed, window: int, sinks: int, key: mx.array
) -> dict[int, tuple[mx.array, ...]]:
    """layer -> (keys, their gradients, values, their gradients), each [1, H, T, D]."""
    layers, length = list(used), len(placed.ids)
    zeros = [mx.zeros((1, u.heads, length, dims)) for u in used.values() for dims in (u.key_dims, u.value_dims)]

    def loss(errors: list[mx.array]) -> tuple[mx.array, dict[int, tuple[mx.array, mx.array]]]:
        by_layer = dict(zip(layers, _pairs(errors), strict=True))
        return _loss(model, used, placed, by_layer, window, sinks, key)

    with dispatching():
        (_, vectors), gradients = mx.value_and_grad(loss)(zeros)
    return {
        layer: (*vectors[layer][:1], g[0], *vectors[layer][1:], g[1])
        for layer, g in zip(layers, _pairs(gradients), strict=True)
    }


def _pairs(arrays: list[mx.array]) -> list[tuple[mx.array, mx.array]]:
    return list(zip(arrays[::2], arrays[1::2], strict=True))


def _loss(
    model: Any,
    used: dict[int, Use],
    placed: Placed,
    errors: dict[int, tuple[mx.array, mx.array]],
    window: int,
    sinks: int,
    key: mx.array,
) -> tuple[mx.array, dict[int, tuple[mx.array, mx.array]]]:
    """Sum of -log p of labels drawn from the model, and the vectors of each layer."""
    vectors: dict[int, tuple[mx.array, mx.array]] = {}

    def append(layer: int, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        vectors[layer] = mx.stop_gradient(k), mx.stop_gradient(v)
        if used[layer].kind == "paired":
            return k, v
        # Not this module's attention: every position's reader sees the error, near ones too.
        ek, ev = errors[layer]
        return k + ek.astype(k.dtype), v + ev.astype(v.dtype)

    def attend(layer: int, q: mx.array, k: mx.array, v: mx.array, original: Attention, **options: Any) -> mx.array:
        if used[layer].kind != "paired" or not is_pair(k, v):
            return original(q, k, v, **options)
        return far_attention(q, k, v, *errors[layer], window=window, exact=sinks, **options)

    caches = recorders(model, attend, placed.offset, append=append, only=used)
    logits = model(placed.ids[None], cache=caches)[0].astype(mx.float32)
    labels = mx.random.categorical(mx.stop_gradient(logits), key=key)
    chosen = mx.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
    return (mx.logsumexp(logits, axis=-1) - chosen).sum(), vectors


def far_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    key_errors: mx.array,
    value_errors: mx.array,
    *,
    window: int,
    exact: int,
    scale: float,
    mask: Any = None,
    sinks: mx.array | None = None,
) -> mx.array:
    """Attention [B, Hq, L, Dv] in which positions at least `window` behind a query, and not among the first `exact`,
    read keys + key_errors and values + value_errors. Scores are computed again in the backward pass, not kept."""
    batch, query_heads, length, dims = queries.shape
    heads = keys.shape[1]
    behind = mx.arange(length)[:, None] - mx.arange(length)[None]
    far = (behind >= window) & (mx.arange(length)[None] >= exact)
    visible = behind >= 0 if isinstance(mask, str) else mask

    def attend(q: mx.array, k: mx.array, v: mx.array, ek: mx.array, ev: mx.array) -> mx.array:
        q = q.astype(mx.float32).reshape(batch, heads, -1, length, dims) * scale
        k, v = (x.astype(mx.float32)[:, :, None] for x in (k, v))
        ek, ev = ek[:, :, None], ev[:, :, None]
        scores = q @ k.swapaxes(-1, -2) + mx.where(far, q @ ek.swapaxes(-1, -2), 0)
        scores = scores.reshape(batch, query_heads, length, length)
        if visible is not None:
            scores = mx.where(visible, scores, -1e30) if visible.dtype == mx.bool_ else scores + visible
        if sinks is not None:
            logit = mx.broadcast_to(sinks.astype(mx.float32)[:, None, None], (batch, query_heads, length, 1))
            scores = mx.concatenate([scores, logit], axis=-1)
        weights = mx.softmax(scores, axis=-1)[..., :length].reshape(batch, heads, -1, length, length)
        return (weights @ v + mx.where(far, weights, 0) @ ev).reshape(batch, query_heads, length, -1)

    return mx.checkpoint(attend)(queries, keys, values, key_errors, value_errors).astype(queries.dtype)
