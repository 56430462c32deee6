"""Without the quantizer, does a model write what it writes with mlx-lm's own cache?

    python benchmarks/lossless.py path/to/small-qwen3

Greedy text of 200 tokens after prompts of several lengths, at the model's own dtype with attend_reference and in
float32 with attend: equal or not, and where they first differ. tests/test_lossless_text.py asks the same of the shipped
model.
"""

import argparse
import pathlib
from typing import Any

import measure
import mlx.core as mx
import mlx_lm
from mlx_lm.models.cache import KVCache
from tqdm import tqdm

import vq_kvcache.cache
from vq_kvcache import SpectralKVCache, stream_generate
from vq_kvcache.attention import attend, attend_reference
from vq_kvcache.spectral.calibration_text import encode

LENGTHS = (1, 2, 127, 128, 129, 300, 2000)
TOKENS = 200


def greedy(model: Any, tokenizer: Any, ids: list[int], cache: Any) -> list[int]:
    """The TOKENS most likely tokens after `ids`."""
    return [r.token for r in stream_generate(model, tokenizer, ids, cache=cache, max_tokens=TOKENS + 1)][:TOKENS]


def main() -> None:
    """Compare and write results/lossless-MODEL.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--lengths", default=",".join(map(str, LENGTHS)))
    args = parser.parse_args()
    lengths = [int(n) for n in args.lengths.split(",")]
    rows = []
    for dtype, how in ((None, attend_reference), (mx.float32, attend)):
        model, tokenizer = mlx_lm.load(args.model)[:2]
        tokenizer.eos_token_ids = set()
        if dtype is not None:
            model.set_dtype(dtype)
        vq_kvcache.cache.attend = how
        ids = encode(tokenizer, (measure.HERE / "text" / "prose.txt").read_text("utf-8"))
        for length in tqdm(lengths, desc=how.__name__):
            theirs = greedy(model, tokenizer, ids[:length], KVCache)
            ours = greedy(model, tokenizer, ids[:length], SpectralKVCache.with_options(lossless=True))
            first = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=True)) if a != b), None)
            own = "float32" if dtype is not None else str(model.layers[0].self_attn.q_proj.weight.dtype).split(".")[-1]
            rows.append({"attention": how.__name__, "dtype": own, "prompt": length, "tokens": len(ours),
                         "equal": ours == theirs, "first_difference": first})  # fmt: skip
    name = f"lossless-{pathlib.Path(args.model).name}"
    measure.save(measure.RESULTS / f"{name}.json", {"rows": rows})
    print(*rows, sep="\n")


if __name__ == "__main__":
    main()
