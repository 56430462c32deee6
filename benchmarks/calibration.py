"""How long does calibration take, and how much memory?

    python benchmarks/calibration.py vq_kvcache/data/tiny-llama
    python benchmarks/calibration.py llama-8b

A path calibrates that model, as the first use of a cache would. "llama-8b" builds the shape of Llama-3.1-8B with random
bfloat16 weights through mlx-lm's own model class: they do for time and memory. Peak memory includes the weights.
"""

import argparse
import json
import pathlib
import time
from typing import Any

import measure
import mlx.core as mx
import mlx_lm
from mlx.utils import tree_map
from mlx_lm.models import llama

from vq_kvcache.spectral import transforms
from vq_kvcache.spectral.calibrate import calibrate_codec
from vq_kvcache.spectral.codec import Codec, fingerprint

LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "num_hidden_layers": 32, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0, "max_position_embeddings": 131072, "tie_word_embeddings": False,
}  # fmt: skip


class Words:
    """A tokenizer for random weights: any text to any tokens."""

    eos_token_id = 1

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """A token for every third byte."""
        return [2 + b * 499 for b in text.encode()[::3]]


def random_model(config: dict[str, Any]) -> tuple[Any, Words]:
    """That shape with random bfloat16 weights."""
    model = llama.Model(llama.ModelArgs.from_dict(config))

    def weights(a: mx.array) -> mx.array:
        scale = a.shape[-1] ** -0.5
        made = mx.random.normal(a.shape, mx.bfloat16) * scale if a.ndim > 1 else mx.ones(a.shape, mx.bfloat16)
        mx.eval(made)
        return made

    model.update(tree_map(weights, model.parameters()))
    return model, Words()


def timed(model: Any, tokenizer: Any, sequences: int, budget: int | None) -> tuple[Codec, dict[str, Any]]:
    """The codec, and what it cost."""
    mx.eval(model.parameters())
    weights = mx.get_active_memory()
    mx.reset_peak_memory()
    start = time.perf_counter()
    codec = calibrate_codec(model, tokenizer, sequences, memory_budget=budget)
    seconds = time.perf_counter() - start
    told = {"seconds": seconds, "peak_bytes": mx.get_peak_memory(), "weights_bytes": weights}
    return codec, told | {"provenance": codec.provenance}


def main() -> None:
    """Calibrate and write results/calibration-MODEL.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--memory-budget", type=int, help="bytes above the weights; default: what the device can spare")
    parser.add_argument("--float32", action="store_true", help="compute in float32, also on a GPU")
    parser.add_argument("--scalar", action="store_true", help="costs of codes that stand alone, for quality.py")
    parser.add_argument("--save", type=pathlib.Path, help="codec file to write")
    parser.add_argument("--out", type=pathlib.Path, help="default: results/calibration-MODEL.json")
    args = parser.parse_args()
    known = args.model == "llama-8b"
    model, tokenizer = random_model(LLAMA_8B) if known else mlx_lm.load(args.model)[:2]
    name = fingerprint(model)
    if args.float32:
        model.set_dtype(mx.float32)
    if args.scalar:
        transforms.RING_BITS = 0
    codec, told = timed(model, tokenizer, args.sequences, args.memory_budget)
    codec.fingerprint = name
    if args.save:
        codec.save(args.save)
    told |= {"model": pathlib.Path(args.model).name, "codec_identity": codec.identity}
    file = args.out or measure.RESULTS / f"calibration-{told['model']}.json"
    measure.save(file, told)
    print(json.dumps(told))


if __name__ == "__main__":
    main()
