"""What several benchmarks share: the models and texts they run on, other quantizers behind our cache, and KL."""

import json
import math
import pathlib
import platform
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np

from vq_kvcache import Codec, SpectralKVCache
from vq_kvcache.cache import LOSSLESS
from vq_kvcache.hooks import own_caches
from vq_kvcache.spectral.codebook import dequantize, quantize
from vq_kvcache.spectral.codec import fingerprint
from vq_kvcache.spectral.files import write_atomically
from vq_kvcache.spectral.spectral_quant import RawQuantizer

HERE = pathlib.Path(__file__).resolve().parent
RESULTS = HERE / "results"
STEP = 16  # tokens fed at once: small enough that every position keeps its exact window, see storage.LAG


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


def log_probabilities(model: Any, caches: list[Any], ids: list[int], prefill: int) -> np.ndarray:
    """Teacher-forced next-token log-probabilities, float32 [positions, V], of the positions after `prefill`."""
    mx.eval(model(mx.array(ids[:prefill])[None], cache=caches))
    rows = []
    for start in range(prefill, len(ids), STEP):
        logits = model(mx.array(ids[start : start + STEP])[None], cache=caches)[0].astype(mx.float32)
        rows.append(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
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


def to_float32(model: Any, codec: Codec) -> None:
    """Compute in float32, so that only the cache differs; the codec was found by the weights as they are stored."""
    model.set_dtype(mx.float32)
    codec.fingerprint = fingerprint(model)


def save(file: pathlib.Path, result: dict[str, Any]) -> None:
    """Write a result with the machine it ran on."""
    machine = {"system": platform.platform(), "mlx": mx.__version__, "mlx_lm": mlx_lm.__version__}
    device = mx.device_info().get("device_name", "") if mx.default_device() == mx.gpu else "CPU"
    write_atomically(file, (json.dumps({"machine": machine | {"device": device}, **result}, indent=1) + "\n").encode())
