"""What an error in a cached vector costs, in nats: gradients of the model's own predictions.

Perturbing far keys and values by small errors e changes the output distribution by KL ~ 1/2 sum eT F e, F = E[g gT], g
the gradient of -log p(y) with respect to the cached vector, y drawn from the model (Amari 1998). Far means outside the
exact window and the sinks: near positions read the unperturbed tensors. See README, "How it works".
"""

import contextlib
import gc
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from .calibration_text import Placed
from .far_attention import far_attention
from .intercept import Attention, Recorder, Use, dispatching, is_pair, recorders, uses
from .moments import Moments, SecondMoments
from .workers import each

KEPT_BYTES = 1 << 30  # of vectors and gradients, on which costs are measured


class LayerFisher:
    """Statistics of the keys or the values of one layer: moments of the vectors, F of the gradients, and some of both.

    halves: of the even and of the odd sequences, so that each can judge what the other says.
    kept: (vectors [H, T, D], gradients [H, T, D]), float32, of whole sequences.
    """

    def __init__(self) -> None:
        self.halves = (Moments(), SecondMoments()), (Moments(), SecondMoments())
        self.kept: list[tuple[mx.array, mx.array]] = []

    @property
    def vectors(self) -> Moments:
        """Moments of all vectors."""
        return Moments.merged(vectors for vectors, _ in self.halves)

    @property
    def metric(self) -> NDArray[np.float64]:
        """F, [H, D, D], in nats per squared unit."""
        count = sum(gradients.count for _, gradients in self.halves)
        return np.asarray(sum(g.total for _, g in self.halves if g.count) / max(count, 1))

    def update(self, vectors: mx.array, gradients: mx.array, sequence: int, keep: bool) -> None:
        """Add a sequence: both [1, H, T, D]."""
        half = self.halves[sequence % 2]
        half[0].update(vectors)
        half[1].update(gradients, gradients.shape[1])
        if keep:
            self.kept.append((vectors[0].astype(mx.float32), gradients[0].astype(mx.float32)))
            mx.eval(self.kept[-1])


Statistics = dict[int, tuple[LayerFisher, LayerFisher]]


class Setting(NamedTuple):
    """What the gradients depend on besides model and text. checkpoint: layers are computed again in the backward pass,
    not kept. at_once: sequences, each on a CPU core of its own; it changes no number."""

    window: int
    sinks: int
    seed: int
    checkpoint: bool = False
    at_once: int = 1


def gather(
    model: Any,
    sequences: Sequence[Placed],
    setting: Setting,
    statistics: Statistics,
    done: int,
    report: Callable[[int], None],
) -> None:
    """Add sequences done.. to `statistics`, of every full-attention layer: one forward and one backward pass each, one
    label a position. `report` is called with the number of sequences added so far."""
    # One key a sequence, so that it draws the same labels whatever was done before it.
    keys = mx.random.split(mx.random.key(setting.seed), len(sequences))
    # Hidden arrays too (frequencies, factors): evaluated by two threads at once, MLX crashes.
    hidden = [a for m in model.modules() for a in m.values() if isinstance(a, mx.array)]
    mx.eval(model.parameters(), hidden, keys, [s.ids for s in sequences])
    kept_bytes = sum(4 * a.size for pair in statistics.values() for part in pair for kept in part.kept for a in kept)

    def make(i: int) -> Gradients:
        with _tracing:
            made = _gradients(model, sequences[i], setting, keys[i])
        mx.eval(made)
        return made

    for i, arrays_of in enumerate(each(make, range(done, len(sequences)), setting.at_once), done):
        keep = kept_bytes < KEPT_BYTES
        for layer, arrays in arrays_of.items():
            pair = statistics.setdefault(layer, (LayerFisher(), LayerFisher()))
            pair[0].update(arrays[0], arrays[1], i, keep)
            pair[1].update(arrays[2], arrays[3], i, keep)
            kept_bytes += 4 * sum(a.size for a in arrays) if keep else 0
        del arrays_of
        gc.collect()  # gradients leave cycles of closures, which hold arrays
        report(i + 1)


Gradients = dict[int, tuple[mx.array, ...]]
_tracing = threading.Lock()  # MLX counts traces globally


def probe(model: Any, tokens: int, setting: Setting) -> Any:
    """Gradients over a sequence of so many tokens, to be evaluated and forgotten."""
    return _gradients(model, Placed(mx.zeros(tokens, mx.int32), 0), setting, mx.random.key(0))


class _Perturbed:
    """Attention with errors in the far keys and values of each layer; remembers the vectors that it saw.

    What another arithmetic than this attention reads is perturbed where it is appended, for near readers too.
    """

    def __init__(self, used: dict[int, Use], errors: dict[int, tuple[mx.array, mx.array]], setting: Setting) -> None:
        self.used, self.errors, self._setting = used, errors, setting
        self.vectors: dict[int, tuple[mx.array, mx.array]] = {}

    def __call__(
        self, layer: int, q: mx.array, k: mx.array, v: mx.array, original: Attention, **options: Any
    ) -> mx.array:
        if self.used[layer].kind != "paired" or not is_pair(k, v):
            return original(q, k, v, **options)
        window, exact = self._setting.window, self._setting.sinks
        return far_attention(q, k, v, *self.errors[layer], window=window, exact=exact, **options)

    def append(self, layer: int, k: mx.array, v: mx.array) -> tuple[mx.array, mx.array]:
        """What the model gets for what it appends."""
        self.vectors[layer] = mx.stop_gradient(k), mx.stop_gradient(v)
        if self.used[layer].kind == "paired":
            return k, v
        ek, ev = self.errors[layer]
        return k + ek.astype(k.dtype), v + ev.astype(v.dtype)


def _gradients(model: Any, placed: Placed, setting: Setting, key: mx.array) -> Gradients:
    """layer -> (keys, their gradients, values, their gradients), each [1, H, T, D]."""
    used, length = uses(model), len(placed.ids)
    layers = list(used)
    zeros = [mx.zeros((1, u.heads, length, dims)) for u in used.values() for dims in (u.key_dims, u.value_dims)]
    # What several layers read would leave the layer that is computed again.
    checkpoint = setting.checkpoint and all(u.readers <= 1 for u in used.values())
    with dispatching(), checkpointed(model) if checkpoint else contextlib.nullcontext():

        def loss(errors: list[mx.array]) -> tuple[mx.array, dict[int, tuple[mx.array, mx.array]]]:
            return _loss(model, placed, _Perturbed(used, dict(zip(layers, _pairs(errors), strict=True)), setting), key)

        (_, vectors), gradients = mx.value_and_grad(loss)(zeros)
    return {
        layer: (*vectors[layer][:1], g[0], *vectors[layer][1:], g[1])
        for layer, g in zip(layers, _pairs(gradients), strict=True)
    }


def _pairs(arrays: list[mx.array]) -> list[tuple[mx.array, mx.array]]:
    return list(zip(arrays[::2], arrays[1::2], strict=True))


def _loss(
    model: Any, placed: Placed, attend: _Perturbed, key: mx.array
) -> tuple[mx.array, dict[int, tuple[mx.array, mx.array]]]:
    """Sum of -log p of labels drawn from the model, and the vectors of each layer."""
    caches = recorders(model, attend, placed.offset, append=attend.append, only=attend.used)
    logits = model(placed.ids[None], cache=caches)[0].astype(mx.float32)
    labels = mx.random.categorical(mx.stop_gradient(logits), key=key)
    chosen = mx.take_along_axis(logits, labels[:, None], axis=-1)[:, 0]
    return (mx.logsumexp(logits, axis=-1) - chosen).sum(), attend.vectors


@contextlib.contextmanager
def checkpointed(model: Any) -> Iterator[None]:
    """Inside, what a layer with perturbed attention computes is not kept for the backward pass but computed again."""
    originals = {kind: kind.__call__ for kind in {type(layer) for layer in model.layers}}

    def again(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(layer: Any, x: mx.array, *args: Any, **options: Any) -> Any:
            given = [a for a in (*args, *options.values()) if isinstance(a, Recorder)]
            attend = given[0].attend if given else None
            if not isinstance(attend, _Perturbed) or given[0].index not in attend.errors:
                return original(layer, x, *args, **options)
            # Gradients flow through arguments only, so whatever may carry one must be an argument.
            names = [n for n, a in enumerate(args) if _is_float(a)], [n for n, a in options.items() if _is_float(a)]

            def block(x: mx.array, errors: tuple[mx.array, mx.array], arrays: list[mx.array]) -> Any:
                attend.errors[given[0].index] = errors
                mine = iter(arrays)
                positional = [next(mine) if n in names[0] else a for n, a in enumerate(args)]
                return original(layer, x, *positional, **options | {n: next(mine) for n in names[1]})

            arrays = [args[n] for n in names[0]] + [options[n] for n in names[1]]
            return mx.checkpoint(block)(x, attend.errors[given[0].index], arrays)

        return call

    try:
        for kind, original in originals.items():
            kind.__call__ = again(original)
        yield
    finally:
        for kind, original in originals.items():
            kind.__call__ = original


def _is_float(x: Any) -> bool:
    return isinstance(x, mx.array) and mx.issubdtype(x.dtype, mx.floating)
