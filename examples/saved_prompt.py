"""Keep a read prompt as a file, packed, and go on from it in another process.

python examples/saved_prompt.py MODEL save PROMPT_FILE CACHE_FILE
python examples/saved_prompt.py MODEL ask CACHE_FILE QUESTION
"""

import sys

from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache

import vq_kvcache


def save(name: str, prompt_file: str, cache_file: str) -> None:
    """Read the prompt and write what the caches hold."""
    model, tokenizer = vq_kvcache.load(name)
    caches = vq_kvcache.make_prompt_cache(model)
    with open(prompt_file, encoding="utf-8") as file:
        prompt = file.read()
    vq_kvcache.generate(model, tokenizer, prompt, prompt_cache=caches, max_tokens=1)
    save_prompt_cache(cache_file, caches, {"model": name})
    print(f"{caches[0].offset:,} tokens in {sum(cache.nbytes for cache in caches):,} bytes: {cache_file}")


def ask(name: str, cache_file: str, question: str) -> None:
    """Go on where the file stopped. It names its codec and its model, and is refused with another."""
    model, tokenizer = vq_kvcache.load(name)
    caches = load_prompt_cache(cache_file)
    for part in vq_kvcache.stream_generate(model, tokenizer, question, prompt_cache=caches, max_tokens=100):
        print(part.text, end="", flush=True)
    print()


if __name__ == "__main__":
    if len(sys.argv) != 5 or sys.argv[2] not in ("save", "ask"):
        raise SystemExit(__doc__)
    {"save": save, "ask": ask}[sys.argv[2]](sys.argv[1], *sys.argv[3:])
