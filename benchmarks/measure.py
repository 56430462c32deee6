"""What several benchmarks share: the models and texts they run on, other quantizers behind our cache, and KL."""

import itertools
import json
import math
import pathlib
import platform
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
from mlx_lm.models.cache import KVCache, QuantizedKVCache

from vq_kvcache import Codec, SpectralKVCache
from vq_kvcache.cache import LOSSLESS
from vq_kvcache.hooks import own_caches
from vq_kvcache.measuring import Scores, edges_of, joined, judged, log_softmax
from vq_kvcache.spectral.calibrate import (
    calibrate_spectral_rotation,
    codec_for,
    load_cached_rotations,
    save_rotations,
)
from vq_kvcache.spectral.calibration_text import SELF_WRITTEN_SHARE, built_in_texts, cut, encode, shares_of
from vq_kvcache.spectral.codebook import dequantize, quantize
from vq_kvcache.spectral.codec import LayerQuantizers, Plan, Transforms, fingerprint
from vq_kvcache.spectral.files import cache_folder, write_atomically
from vq_kvcache.spectral.sealing import calibration_mass
from vq_kvcache.spectral.spectral_quant import RawQuantizer, SpectralQuantizer, SpectralRotation

HERE = pathlib.Path(__file__).resolve().parent
RESULTS = HERE / "results"
STEP = 16  # tokens fed at once: small enough that every position keeps its exact window, see sealing.LAG


class RoundTrip(RawQuantizer):
    """Any quantizer behind our cache: stores what `change` makes of the vectors, exactly. Its nbytes mean nothing."""

    def __init__(self, change: Callable[[mx.array], mx.array], like: mx.array) -> None:
        super().__init__(like.shape[1], like.shape[3], like.dtype)
        self._change = change

    def encode_words(self, x: mx.array) -> mx.array:
        """Words of the changed vectors."""
        return super().encode_words(self._change(x.astype(mx.float32)).astype(x.dtype))


class RoundTripKVCache(SpectralKVCache):
    """SpectralKVCache with another quantizer: the same exact window and sinks, so that only the method differs."""

    def __init__(self, change: Callable[[mx.array], mx.array], window: int = 128, sinks: int = 4) -> None:
        super().__init__(LOSSLESS, 0, window, sinks)
        self._change = change

    def _quantizers(self, keys: mx.array, values: mx.array) -> Any:
        return RoundTrip(self._change, keys), RoundTrip(self._change, values)


def random_rotation(head_dim: int, bits: int, seed: int = 0) -> Callable[[mx.array], mx.array]:
    """TurboQuant (arXiv 2504.19874), MSE variant: norm, rotation, Lloyd-Max levels; bits + 16 / head_dim true."""
    q, _ = np.linalg.qr(np.random.default_rng(seed).normal(size=(head_dim, head_dim)))
    rotation = mx.array(q.astype(np.float32))

    def change(x: mx.array) -> mx.array:
        size = mx.maximum(mx.linalg.norm(x, axis=-1, keepdims=True), 1e-12) / math.sqrt(head_dim)
        z = x / size @ rotation
        return dequantize(quantize(z, bits), bits) @ rotation.T * size

    return change


def affine(bits: int, group_size: int = 64) -> Callable[[mx.array], mx.array]:
    """mlx-lm's own quantizer: mx.quantize, then mx.dequantize; bits + 32 / group_size true."""

    def change(x: mx.array) -> mx.array:
        return mx.dequantize(*mx.quantize(x, group_size=group_size, bits=bits), group_size=group_size, bits=bits)

    return change


def baseline_caches(model: Any, change: Callable[[mx.array], mx.array]) -> list[Any]:
    """Caches of `model` in which every full-attention layer goes through `change`."""
    return [RoundTripKVCache(change) if type(c).__name__ == "KVCache" else c for c in own_caches(model)]


def scalar_caches(model: Any, codec: Codec, bits: float) -> list[Any]:
    """Spectral caches whose codes stand alone, none in rings; the codec's costs should be of such codes, too."""

    def quantizer(transforms: Transforms, widths: list[Any]) -> SpectralQuantizer:
        dims, heads = np.arange(transforms.mean.shape[1]), []
        for h, b in enumerate(widths):
            variances = transforms.eigenvalues[h] * transforms.stretch[h, dims, b] ** 2
            parts = transforms.mean[h], transforms.analysis[h], variances, b
            heads.append(SpectralQuantizer.from_transform(*parts, trellis=False))
        return SpectralQuantizer.stack(heads)

    widths = codec._widths(bits)
    layers = {
        i: LayerQuantizers(quantizer(k, widths[i, "keys"]), quantizer(v, widths[i, "values"]))
        for i, (k, v) in codec.layers.items()
    }
    plan = Plan(f"{codec.identity}-scalar@{bits}", codec.fingerprint, layers)
    return [SpectralKVCache(plan, i) if i in layers else own for i, own in enumerate(own_caches(model))]


def documented_rotations(model: Any, tokenizer: Any) -> list[SpectralRotation]:
    """Rotations of the documented path, 16 sequences of 1,024 tokens; kept in the cache folder."""
    folder = cache_folder() / "rotations" / fingerprint(model)
    if not folder.exists():
        save_rotations(calibrate_spectral_rotation(model, tokenizer, 16, 1024, "gpu"), folder)
    return load_cached_rotations(folder)


class StockKVCache(KVCache):  # type: ignore[misc]  # mlx-lm is untyped
    """mlx-lm's `--kv-bits` with quantized_kv_start=0, in the arithmetic of mx.quantize and mx.dequantize: the first
    prompt chunk attends to itself exact, everything later to quantized keys and values, the newest token included."""

    def __init__(self, change: Callable[[mx.array], mx.array]) -> None:
        super().__init__()
        self._change = change

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Store what the quantizer makes of them."""
        first = self.offset == 0
        held = super().update_and_fetch(self._change(keys), self._change(values))
        return (keys, values) if first else held


class NoisyKVCache(RoundTripKVCache):
    """Keys and values through different changes."""

    def __init__(
        self, key_change: Callable[[mx.array], mx.array], value_change: Callable[[mx.array], mx.array]
    ) -> None:
        super().__init__(key_change)
        self._value_change = value_change

    def _quantizers(self, keys: mx.array, values: mx.array) -> Any:
        return RoundTrip(self._change, keys), RoundTrip(self._value_change, values)


def stock_difference(tokens: int = 64, bits: int = 4, seed: int = 0) -> float:
    """Largest difference between StockKVCache and what mlx-lm's QuantizedKVCache holds, after `tokens` tokens."""
    keys, values = mx.random.normal((2, 1, 2, tokens, 64), key=mx.random.key(seed))
    ours, theirs = StockKVCache(affine(bits)), QuantizedKVCache(group_size=64, bits=bits)
    worst = 0.0
    for start, end in ((0, tokens // 2), (tokens // 2, tokens - 1), (tokens - 1, tokens)):
        held = ours.update_and_fetch(keys[:, :, start:end], values[:, :, start:end])
        packed = theirs.update_and_fetch(keys[:, :, start:end], values[:, :, start:end])
        if start:
            real = [mx.dequantize(*p, group_size=64, bits=bits) for p in packed]
            worst = max(worst, *(mx.abs(a - b).max().item() for a, b in zip(held, real, strict=True)))
    return worst


def scores(
    model: Any, makers: dict[str, Callable[[], list[Any]]], ids: mx.array, prefill: int, step: int, progress: Any
) -> tuple[dict[str, Scores], dict[str, int]]:
    """Teacher-forced scores of each kind of cache against full precision, all in lockstep over texts ids [B, T]; and
    the bytes that each holds at the end."""
    reference = own_caches(model)
    held = {name: make() for name, make in makers.items()}
    rows: dict[str, list[list[np.ndarray]]] = {name: [] for name in makers}
    for start, end in itertools.pairwise(edges_of(ids.shape[1], step, prefill)):
        chunk, following = ids[:, start:end], ids[:, start + 1 : end + 1]
        expected = log_softmax(model(chunk, cache=reference))
        mx.eval(expected, [c.state for c in reference])
        for name, caches in held.items():
            score = judged(expected, log_softmax(model(chunk, cache=caches)), following)
            mx.eval(score, [c.state for c in caches])
            if start:
                rows[name].append([np.array(a) for a in score])
        progress.update(end - start)
    sizes = {name: sum(c.nbytes for c in caches) // len(ids) for name, caches in held.items()}
    return {name: joined(parts) for name, parts in rows.items()}, sizes


def held_out(tokenizer: Any, codec: Codec, length: int, each: int) -> list[list[int]]:
    """`each` sequences [length] of every built-in calibration text, from the stretches that this codec's calibration
    left between its own; where one is too short, the next is joined on."""
    told = codec.provenance
    texts = [encode(tokenizer, text) for text in built_in_texts()]
    shares = shares_of(told["sequences"] - int(told["sequences"] * SELF_WRITTEN_SHARE), len(texts))
    rows = []
    for ids, share in zip(texts, shares, strict=True):
        seen = {i for part in cut(list(range(len(ids))), share, told["sequence_length"]) for i in part.tolist()}
        rows += cut([token for i, token in enumerate(ids) if i not in seen], each, length)
    return [row.tolist() for row in rows]


def predict_again(result: dict[str, Any], mass: float) -> dict[str, Any]:
    """The result with predictions of KL for this mass (sealing.far_mass), from those it has: a codec's predictions are
    multiples of the mass (Codec.kl_of_mass), so the codec itself is not needed."""
    told = result["codec"]
    if (old := result.get("far_mass")) is None:
        # Before there was a mass, predictions were of the mean calibration token that saw anything perturbed.
        length, exact = told["sequence_length"], told["window"] + told["sinks"]
        old = calibration_mass(length, told["window"], told["sinks"]) * length / (length - exact)
    return result | {
        "predicted_kl": {bits: kl * mass / old for bits, kl in result["predicted_kl"].items()},
        "far_mass": mass,
    }


def log_probabilities(model: Any, caches: list[Any], ids: list[int], prefill: int) -> np.ndarray:
    """Teacher-forced next-token log-probabilities, float32 [positions, V], of the positions after `prefill`."""
    mx.eval(model(mx.array(ids[:prefill])[None], cache=caches))
    rows = []
    for start in range(prefill, len(ids), STEP):
        rows.append(log_softmax(model(mx.array(ids[start : start + STEP])[None], cache=caches)[0]))
        mx.eval(rows[-1], [c.state for c in caches])
    return np.array(mx.concatenate(rows))


def divergence(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """KL(reference || other) of each position, in nats."""
    return (np.exp(reference) * (reference - other)).sum(-1)


def load_model(path: str, keep: bool = False) -> tuple[Any, Any, int]:
    """(model, tokenizer, head_dim); in float32 unless `keep`."""
    model, tokenizer = mlx_lm.load(path)[:2]
    if not keep:
        model.set_dtype(mx.float32)
    args = model.args
    return model, tokenizer, getattr(args, "head_dim", None) or args.hidden_size // args.num_attention_heads


def load_with_codec(path: str, codec_file: str | None) -> tuple[Any, Any, int, Codec, str]:
    """(model in float32, tokenizer, head_dim, codec, its identity): in float32, only the cache differs.

    The codec is found, or made, by the weights as they are stored.
    """
    model, tokenizer, head_dim = load_model(path, keep=True)
    codec = Codec.load(codec_file) if codec_file else codec_for(model, tokenizer)
    identity = codec.identity
    model.set_dtype(mx.float32)
    codec.fingerprint = fingerprint(model)
    return model, tokenizer, head_dim, codec, identity


def machine() -> dict[str, str]:
    """The machine and the versions that a result was measured with."""
    device = mx.device_info().get("device_name", "") if mx.default_device() == mx.gpu else "CPU"
    versions = {"mlx": mx.__version__, "mlx_lm": mlx_lm.__version__}
    return {"system": platform.platform(), **versions, "device": str(device)}


def save(file: pathlib.Path, result: dict[str, Any]) -> None:
    """Write a result with the machine it ran on."""
    write_atomically(file, (json.dumps({"machine": machine(), **result}, indent=1) + "\n").encode())


def first_line(error: Exception) -> str:
    """The first line of what an error says, for a result."""
    return str(error).strip().split("\n", 1)[0][:300]


class Results:
    """Cells of one benchmark by name, saved after every one: what is there already, measured on this machine with these
    settings, is not measured again."""

    def __init__(self, file: pathlib.Path, settings: dict[str, Any]) -> None:
        self.file, self.settings = file, settings
        old = json.loads(file.read_text("utf-8")) if file.exists() else {}
        same = all(old.get(name) == value for name, value in {**settings, "machine": machine()}.items())
        self.cells: dict[str, Any] = old.get("cells", {}) if same else {}

    def cell(self, name: str, parts: dict[str, Any], run: Callable[[str, Any], dict[str, Any]]) -> None:
        """What `run(part, parts[part])` gives for all parts, unless it is there; errors are kept, and tried again."""
        if "error" not in self.cells.get(name, {"error": ""}):
            print(f"{name}: measured before", flush=True)
            return
        start, made = time.perf_counter(), {}
        for part, value in parts.items():
            try:
                told = run(part, value)
            except (RuntimeError, ValueError, MemoryError) as error:  # no such kernel there, or too little memory
                told = {"error": f"{part}: {first_line(error)}"}
            made |= told
            print(f"{name}: {json.dumps(told)}", flush=True)
        self.cells[name] = made
        self.save()
        print(f"{name}: {time.perf_counter() - start:.0f} s", flush=True)

    def save(self) -> None:
        """Write the file anew."""
        save(self.file, {**self.settings, "cells": self.cells})
