"""Ask several questions about one long document, which is read once and held packed.

python examples/long_document.py MODEL FILE QUESTION...
"""

import argparse
import copy
import pathlib

import vq_kvcache
from vq_kvcache import SpectralKVCache


def main() -> None:
    """Read the document into one cache, and answer each question from a copy of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="folder or repository")
    parser.add_argument("file", type=pathlib.Path, help="text to ask about")
    parser.add_argument("questions", nargs="+")
    parser.add_argument("--memory", default="2GB", help="what the cache may take (default: 2GB)")
    parser.add_argument("--max-tokens", type=int, default=200)
    args = parser.parse_args()

    model, tokenizer = vq_kvcache.load(args.model, cache=SpectralKVCache.with_options(memory=args.memory))
    document = tokenizer.encode(args.file.read_text("utf-8"))
    read = vq_kvcache.make_prompt_cache(model)
    vq_kvcache.generate(model, tokenizer, document, prompt_cache=read, max_tokens=1)
    for cache in read:
        cache.trim(cache.offset - len(document))  # the token that was generated, if it was kept
    print(f"{len(document):,} tokens in {sum(cache.nbytes for cache in read):,} bytes")
    for question in args.questions:
        caches = copy.deepcopy(read)  # shares the arrays until either is written to
        prompt = tokenizer.encode(f"\n\nQuestion: {question}\nAnswer:", add_special_tokens=False)
        answer = vq_kvcache.generate(model, tokenizer, prompt, prompt_cache=caches, max_tokens=args.max_tokens)
        print(f"\n{question}\n{answer.strip()}")


if __name__ == "__main__":
    main()
