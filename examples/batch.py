"""Several prompts at once: mlx-lm's batch_generate on packed caches.

python examples/batch.py MODEL PROMPT...
"""

import sys

import mlx_lm

import vq_kvcache
from vq_kvcache import SpectralKVCache


def main(name: str, prompts: list[str]) -> None:
    """One text per prompt; rows of a batch are packed as if each were alone."""
    model, tokenizer = vq_kvcache.load(name, cache=SpectralKVCache.with_options(bits_per_value=2.0))
    found = mlx_lm.batch_generate(model, tokenizer, [tokenizer.encode(p) for p in prompts], max_tokens=40)
    for prompt, text in zip(prompts, found.texts, strict=True):
        print(f"{prompt}|{text}\n")


if __name__ == "__main__":
    if len(sys.argv) < 3:
        raise SystemExit(__doc__)
    main(sys.argv[1], sys.argv[2:])
