"""What a cache costs and what it saves, measured on one model and one text: full precision, mlx-lm's own, and ours."""

import copy
import dataclasses
import gc
import itertools
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import mlx.core as mx
import numpy as np
from mlx_lm.generate import maybe_quantize_kv_cache
from mlx_lm.models.cache import QuantizedKVCache
from numpy.typing import NDArray

from .cache import SpectralKVCache
from .hooks import make_prompt_cache, own_caches
from .options import CacheOptions
from .spectral.codec import Codec, Plan
from .spectral.intercept import members_of, replace_kv, require_layers, uses
from .spectral.participation_ratio import compute_participation_ratio
from .spectral.sealing import LAG, scored_mass

PREFILL = 256  # tokens of a text that are read in one piece, and not scored
READ_AT_ONCE = 256  # tokens, as mlx-lm's cache grows
PIECE, STEPS = 128, 8  # tokens read in one piece and then one by one, at each context, against the clock
JUDGED = PIECE + STEPS
MLX_BITS = 4
FULL, MLX = "full precision", f"mlx-lm --kv-bits {MLX_BITS}"

Progress = Callable[[int], Any]
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Method:
    """One kind of cache.

    empty: the caches of a prompt nobody has read yet.  bits: stored per number, with whatever goes with it.
    group_size: of mlx-lm's quantizer, which turns these caches into its own after each pass, as --kv-bits does.
    """

    name: str
    kind: Literal["full", "mlx", "spectral"]
    bits: float
    empty: list[Any]
    group_size: int = 0

    def make(self) -> list[Any]:
        """Fresh caches."""
        return copy.deepcopy(self.empty)

    def forward(self, model: Any, ids: mx.array, caches: list[Any]) -> mx.array:
        """Logits [B, L, V] of ids [B, L], evaluated with the caches; these may be replaced in the list."""
        logits: mx.array = model(ids, cache=caches)
        self.quantize(caches)
        mx.eval(logits, [c.state for c in caches])
        return logits

    def quantize(self, caches: list[Any]) -> None:
        """What mlx-lm does after every pass with --kv-bits."""
        if self.group_size:
            maybe_quantize_kv_cache(caches, 0, self.group_size, MLX_BITS)

    def take(self, read: Sequence[Any]) -> list[Any]:
        """Caches of this kind with the tokens of mlx-lm's own caches `read`, which stay as they are."""
        caches = copy.deepcopy(list(read))
        self.quantize(caches)
        if self.kind == "spectral":
            like = [member for cache in self.empty for member in members_of(cache)]

            def packed(index: int, own: Any, nested: bool) -> Any:
                spectral = isinstance(like[index], SpectralKVCache)
                return SpectralKVCache.from_cache(own, like[index]) if spectral else own

            caches = replace_kv(caches, packed)
        mx.eval([c.state for c in caches])
        return caches


def methods(model: Any, codec: Codec, bits: Sequence[float]) -> tuple[list[Method], str]:
    """Full precision, mlx-lm's QuantizedKVCache and ours at each budget; and why mlx-lm's is missing, or "".

    The model must be in the arithmetic that its codec was made for. ValueError for a budget out of range.
    """
    require_layers(uses(model))
    found = [Method(FULL, "full", 8.0 * _itemsize(model), own_caches(model))]
    theirs = _mlx_method(model)
    if isinstance(theirs, Method):
        found.append(theirs)
    for b in bits:
        caches = make_prompt_cache(model, cache=CacheOptions(b, codec=codec))
        found.append(Method(f"spectral {b:g}", "spectral", stored_bits(codec.plan(b)), caches))
    return found, "" if isinstance(theirs, Method) else theirs


def stored_bits(plan: Plan) -> float:
    """Bits per number of all that is packed, padding included."""
    packed = [q for pair in plan.layers.values() for q in (pair.keys, pair.values) if q is not None]
    return 32 * sum(q.words for q in packed) / sum(q.layout.widths.size for q in packed)


def _itemsize(model: Any) -> int:
    """Bytes of a cached number: what the model's attention is computed in."""
    caches = own_caches(model)
    model(mx.array([[0]]), cache=caches)
    kv = next(m for c in caches for m in members_of(c) if type(m).__name__ == "KVCache")
    return int(kv.keys.dtype.size)


def _mlx_method(model: Any) -> Method | str:
    """mlx-lm's method, tried on a few tokens; or the reason why it is not to be had."""
    used = uses(model).values()
    sizes = [n for n in (64, 32) if all(u.key_dims % n == 0 and u.value_dims % n == 0 for u in used)]
    if not sizes:
        return f"mx.quantize takes groups of 32 or 64; heads have {sorted({u.key_dims for u in used})} numbers"
    bits = MLX_BITS + 8 * 2 * _itemsize(model) / sizes[0]
    method = Method(MLX, "mlx", bits, own_caches(model), sizes[0])
    caches = method.make()
    try:
        for ids in ([[0, 0]], [[0]]):
            method.forward(model, mx.array(ids), caches)
    except (ValueError, NotImplementedError, RuntimeError, AttributeError, TypeError) as error:
        return f"mlx-lm's own quantized cache fails with this model: {error}"
    has = any(isinstance(member, QuantizedKVCache) for cache in caches for member in members_of(cache))
    return method if has else "mlx-lm quantizes none of this model's caches"


# -- how close the text stays


@dataclasses.dataclass(frozen=True)
class Scores:
    """Of every text and scored position, float32 [texts, positions]; losses lack the last position."""

    kl: NDArray[np.float32]
    agrees: NDArray[np.bool_]
    losses: NDArray[np.float32]


def scores(
    model: Any, compared: Sequence[Method], ids: mx.array, progress: Progress
) -> tuple[dict[str, Scores], dict[str, list[Any]]]:
    """Teacher-forced scores against the first method, all in lockstep over texts ids [B, T], and the caches at the end.

    After PREFILL tokens LAG are fed at a time, so that every position has its exact window behind it, as in decoding.
    """
    held = {method.name: method.make() for method in compared}
    rows: dict[str, list[list[Any]]] = {method.name: [] for method in compared}
    for start, end in itertools.pairwise(edges_of(ids.shape[1])):
        chunk, following = ids[:, start:end], ids[:, start + 1 : end + 1]
        expected = None
        for method in compared:
            found = log_softmax(method.forward(model, chunk, held[method.name]))
            expected = found if expected is None else expected
            if start:
                rows[method.name].append([np.array(a) for a in judged(expected, found, following)])
            progress(end - start)
    return {name: joined(parts) for name, parts in rows.items()}, held


def edges_of(tokens: int, step: int = LAG, first: int = PREFILL) -> list[int]:
    """Where the pieces begin and end in which a text of so many tokens is read; all after the first are scored."""
    return [0, *range(first, tokens, step), tokens]


def mass_of(tokens: int, step: int = LAG) -> float:
    """What errors weigh in the mean scored position, behind caches with the default window and sinks."""
    exact = CacheOptions()
    return scored_mass(edges_of(tokens, step), exact.window, exact.sinks)


def predicted(codec: Codec, bits: Sequence[float], tokens: int) -> Row:
    """Mean KL that the codec predicts for the positions that `scores` scores, by budget ({} where it has none), and
    what errors weigh in them."""
    mass = mass_of(tokens)
    kl = {f"{b:g}": codec.kl_of_mass(b, mass) for b in bits} if codec.in_nats else {}
    return {"predicted_kl": kl, "far_mass": mass}


def judged(expected: mx.array, found: mx.array, following: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """What `Scores` holds, of log-probabilities [B, L, V] and the tokens that follow: [B, L], at the end one fewer."""
    kl = (mx.exp(expected) * (expected - found)).sum(axis=-1)
    agrees = expected.argmax(axis=-1) == found.argmax(axis=-1)
    loss = -mx.take_along_axis(found[:, : following.shape[1]], following[..., None], axis=-1)[..., 0]
    return kl, agrees, loss


def joined(parts: Sequence[Sequence[Any]]) -> Scores:
    """The scores of one piece of the texts after another."""
    return Scores(*(np.concatenate(part, axis=1) for part in zip(*parts, strict=True)))


def log_softmax(logits: mx.array) -> mx.array:
    """Log-probabilities, float32, of logits [..., V]."""
    logits = logits.astype(mx.float32)
    result: mx.array = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    return result


def summary(score: Scores) -> Row:
    """Mean, its standard error over positions, and 99.9 % of the KL in nats; top-1 agreement; perplexity."""
    kl = score.kl.astype(np.float64)
    return {
        "kl": float(kl.mean()),
        "kl_standard_error": float(kl.std(ddof=1) / kl.size**0.5),
        "kl_999": float(np.quantile(kl, 0.999)),
        "top1": float(score.agrees.mean()),
        "perplexity": float(np.exp(score.losses.mean(dtype=np.float64))),
        "positions": int(kl.size),
    }


def drift_of(caches: Sequence[Any]) -> Row | None:
    """The largest `cache.drift` over the layers; None where nothing is packed."""
    spectral = [m for c in caches for m in members_of(c) if isinstance(m, SpectralKVCache)]
    found = [d for c in spectral if (d := c.drift) is not None]
    if not found:
        return None
    return {"energy": max(d.energy for d in found), "is_large": any(d.is_large for d in found)}


def continuation(
    model: Any, method: Method, prompt: Sequence[int], tokens: int, ends: Sequence[int], progress: Progress
) -> list[int]:
    """At most `tokens` greedy tokens after `prompt`, without the one of `ends` that closes it."""
    caches, fed = method.make(), list(prompt)
    for start in range(0, len(fed) - 1, READ_AT_ONCE):
        method.forward(model, mx.array(fed[start:-1][:READ_AT_ONCE])[None], caches)
    written: list[int] = []
    last = fed[-1]
    for _ in range(tokens):
        last = int(np.array(method.forward(model, mx.array([[last]]), caches)[0, -1].argmax()))
        progress(1)
        if last in ends:
            break
        written.append(last)
    return written


# -- bytes and seconds


def active_bytes() -> int:
    """Bytes MLX holds now, free buffers given back."""
    gc.collect()
    mx.synchronize()
    mx.clear_cache()
    return int(mx.get_active_memory())


def machine_memory() -> tuple[int, str]:
    """Bytes that models and caches can have here, and whose they are."""
    if mx.default_device() == mx.gpu:
        info = mx.device_info()
        names = ("max_recommended_working_set_size", "memory_size", "total_memory")
        sizes = [int(info[name]) for name in names if name in info]
        if sizes:
            return min(sizes), str(info.get("device_name", "GPU"))
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), "RAM of this machine"


def held(
    model: Any, compared: Sequence[Method], ids: list[int], contexts: Sequence[int], progress: Progress
) -> Iterator[tuple[str, int, Row]]:
    """(method, context, bytes and speeds): the text is read once, into mlx-lm's own caches, and at each context handed
    to every kind of cache; what follows is read in one piece of PIECE tokens and then one by one.

    A row has "nbytes" (of the caches' arrays), "active_bytes" (by which MLX's active memory grew), "read_peak" and
    "decode_peak" (above what was active before there was a cache), "read_tokens_per_second" and
    "decode_tokens_per_second" (median of STEPS - 1); those of reading are None where mlx-lm's cache takes minutes.
    """
    full = compared[0]
    read = full.make()
    position = 0
    slow = mx.default_device() != mx.gpu and _itemsize(model) < 4  # MLX's CPU has no fast products of 16-bit codes
    for context in sorted(contexts):
        until = context - JUDGED
        while position + READ_AT_ONCE <= until:  # whole pieces only: after others mlx-lm's cache grows by odd steps
            full.forward(model, mx.array(ids[position : position + READ_AT_ONCE])[None], read)
            position += READ_AT_ONCE
        base = copy.deepcopy(read)
        if position < until:
            full.forward(model, mx.array(ids[position:until])[None], base)
        for method in compared:
            reads = not (slow and method.kind == "mlx")
            yield method.name, context, _at_context(model, method, base, ids[until:context], reads)
            progress(JUDGED)


def _at_context(model: Any, method: Method, read: Sequence[Any], following: list[int], reads: bool) -> Row:
    before = active_bytes()
    piece, steps = mx.array(following[:PIECE])[None], following[PIECE:]
    row: Row = {"read_peak": None, "read_tokens_per_second": None}
    if reads:
        caches = method.take(read)
        row["read_peak"], seconds = _peak(lambda: method.forward(model, piece, caches), before)
        row["read_tokens_per_second"] = PIECE / seconds
    else:  # as mlx-lm reads a prompt of one piece: at full precision, quantized at its end
        plain = copy.deepcopy(list(read))
        mx.eval(model(piece, cache=plain), [c.state for c in plain])
        caches = method.take(plain)
        del plain
    times, peaks = [], []
    active_bytes()
    for token in steps:
        peak, seconds = _peak(lambda t=token: method.forward(model, mx.array([[t]]), caches), before)  # type: ignore[misc]
        times.append(seconds)
        peaks.append(peak)
    row |= {"decode_peak": max(peaks[1:]), "decode_tokens_per_second": 1 / statistics.median(times[1:])}
    row["nbytes"] = sum(c.nbytes for c in caches)
    row["active_bytes"] = active_bytes() - before
    return row


def _peak(run: Callable[[], Any], before: int) -> tuple[int, float]:
    """Peak memory above `before` while this runs, and its seconds."""
    mx.synchronize()
    mx.reset_peak_memory()
    start = time.perf_counter()
    run()
    mx.synchronize()
    return int(mx.get_peak_memory()) - before, time.perf_counter() - start


def warm(model: Any, method: Method, ids: list[int]) -> None:
    """Do once what is timed later, so that what is compiled, checked or loaded on first use is in no figure.

    ids: as many as are read in one piece, and PIECE + 1 that follow.
    """
    caches = method.make()
    for start, end in itertools.pairwise((0, len(ids) - PIECE - 1, len(ids) - 1, len(ids))):
        method.forward(model, mx.array(ids[start:end])[None], caches)


def reading_speed(model: Any, method: Method, ids: list[int]) -> float:
    """Tokens a second of reading a prompt in one piece into an empty cache."""
    caches = method.make()
    return len(ids) / _peak(lambda: method.forward(model, mx.array(ids)[None], caches), 0)[1]


def codec_bytes(method: Method) -> int:
    """Bytes of the codec's transforms, which all caches of a model share."""
    caches = [m for c in method.empty for m in members_of(c) if isinstance(m, SpectralKVCache)]
    return sum(c.stats()["codec_bytes"] for c in caches)


def largest_context(
    memory: int, active: int, codec: int, held: dict[int, tuple[int, int]], bounded: bool
) -> dict[str, float | int]:
    """Tokens that fit: (memory - active - codec - fixed - working) / (per_token + working_per_token).

    held: context -> (nbytes, decode peak).  per_token: growth of nbytes between the shortest and the longest context;
    all of nbytes, where there is one context, or room reserved at the shortest does for the longest.  fixed: nbytes at
    the longest beyond per_token times it.  working, working_per_token: the same of the decode peak beyond nbytes, whose
    growth is 0 where it is `bounded` (attention on codes works in tiles).
    """
    shortest, longest = min(held), max(held)
    nbytes, beyond = held[longest][0], {c: max(peak - size, 0) for c, (size, peak) in held.items()}
    grown = nbytes - held[shortest][0]
    per_token = grown / (longest - shortest) if grown > 0 else nbytes / longest
    rises = 0.0
    if not bounded and longest > shortest:
        rises = max(beyond[longest] - beyond[shortest], 0) / (longest - shortest)
    fixed, working = nbytes - per_token * longest, beyond[longest] - rises * longest
    tokens = (memory - active - codec - fixed - working) / (per_token + rises)
    return {
        "tokens": max(int(tokens), 0), "per_token": per_token, "fixed": fixed, "working": working,
        "working_per_token": rises, "codec": codec,
    }  # fmt: skip


# -- what the codec looks like


def spectra(codec: Codec) -> list[Row]:
    """Of each layer and part: eigenvalues [D], mean of the heads, and how many dimensions carry the variance."""
    rows = []
    for layer, pair in codec.layers.items():
        for part, transforms in zip(("keys", "values"), pair, strict=True):
            if transforms is None:
                continue
            heads = transforms.eigenvalues.astype(np.float64)
            effective = [len(head) * compute_participation_ratio(head) for head in heads]
            mean = heads.mean(axis=0)
            rows.append({
                "layer": layer, "part": part, "dims": heads.shape[1], "heads": heads.shape[0],
                "effective_dims": float(np.mean(effective)), "eigenvalues": [float(f"{v:.4g}") for v in mean],
            })  # fmt: skip
    return rows


def widths(codec: Codec, bits: float) -> list[Row]:
    """Of each layer, part and head: the bits of every dimension as a string of digits, largest variance first."""
    return [
        {"layer": layer, "part": part, "head": h, "bits": "".join(map(str, row))}
        for layer, quantizers in codec.plan(bits).layers.items()
        for part in ("keys", "values")
        if (quantizer := getattr(quantizers, part)) is not None
        for h, row in enumerate(quantizer.layout.widths.tolist())
    ]
