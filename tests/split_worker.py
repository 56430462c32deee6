"""One process of a model that mlx-lm spreads over several; run by test_split_models.py under mlx.launch.

python split_worker.py FOLDER HOW OUTPUT: HOW is "whole", "tensor" or "pipeline". Rank 0 writes its logits, every rank
what its caches hold.
"""

import json
import sys

import mlx.core as mx
import numpy as np
from mlx_lm.utils import load, sharded_load

import vq_kvcache
from vq_kvcache import SpectralKVCache, hooks

PIECES = (130, 60, 3, 1, 1)  # a prompt, one more, a draft's check, two tokens
BITS = 3.0


def run(folder, how, group):
    """(logits [T, V] by cache, what the packed caches hold)."""
    options = SpectralKVCache.with_options(BITS, window=32)
    with vq_kvcache.install(options):
        groups = {"tensor": (None, group), "pipeline": (group, None)}
        model = load(folder)[0] if how == "whole" else sharded_load(folder, *groups[how])[0]
        lossless = SpectralKVCache.with_options(lossless=True, window=32)
        made = {
            "own": hooks.own_caches(model),
            "lossless": vq_kvcache.make_prompt_cache(model, cache=lossless),
            "codec": model.make_cache(),
        }
        model.set_dtype(mx.float32)  # so that only the order of sums differs
        logits = {name: forward(model, caches) for name, caches in made.items()}
    caches = made["codec"]
    return logits, {
        "packed": [c.stats()["packed_tokens"] for c in caches], "heads": [c.keys.shape[1] for c in caches],
        "nbytes": sum(c.nbytes for c in caches), "plan": caches[0]._plan.name,
    }  # fmt: skip


def forward(model, caches):
    tokens = mx.array(np.random.default_rng(5).integers(2, 90, sum(PIECES)))
    logits, start = [], 0
    for size in PIECES:
        logits.append(model(tokens[None, start : start + size], cache=caches)[0])
        mx.eval(logits[-1], [c.state for c in caches])
        start += size
    return np.array(mx.concatenate(logits))


def main():
    folder, how, output = sys.argv[1:]
    mx.set_default_device(mx.cpu)
    group = mx.distributed.init(strict=True, backend="ring")
    logits, held = run(folder, how, group)
    if group.rank() == 0:
        np.savez(f"{output}.npz", **logits)
    with open(f"{output}.{group.rank()}.json", "w") as file:
        json.dump({"size": group.size(), **held}, file)


if __name__ == "__main__":
    main()
