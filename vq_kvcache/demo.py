"""`vq_kvcache demo`: the shipped model, a long prompt, both caches; what they hold and how far they differ."""

import argparse
import dataclasses
import importlib.resources
import importlib.util
import json
import pathlib
import sys
import time
import warnings
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models.cache import KVCache

from .cache import SpectralKVCache
from .hooks import generate, load, make_prompt_cache
from .options import CacheOptions
from .spectral.files import require_writable
from .spectral.sealing import LAG

PROMPT_TOKENS = 2000
JUDGED_TOKENS = 128
PLOTTED_CONTEXTS = range(256, 4097, 256)


def model_folder() -> pathlib.Path:
    """The shipped demonstration model, tiny-llama: 6.5 M parameters, 6 layers, 2 KV heads of 64, fp16."""
    return pathlib.Path(str(importlib.resources.files("vq_kvcache") / "data" / "tiny-llama"))


@dataclasses.dataclass
class Run:
    """One cache after the same prompt."""

    text: str
    log_probabilities: np.ndarray
    nbytes: int
    seconds: float


def main(argv: list[str]) -> int:
    """Run the demonstration; returns the exit status."""
    parser = argparse.ArgumentParser(prog="vq_kvcache demo", description=__doc__)
    parser.add_argument("--bits", type=float, default=2.0, help="stored bits per cached number (default: 2.0)")
    parser.add_argument("--tokens", type=int, default=48, help="tokens to generate with each cache (default: 48)")
    parser.add_argument("--plot", type=pathlib.Path, default=pathlib.Path("vq_kvcache_demo.png"), help="PNG to write")
    parser.add_argument("--json", action="store_true", help="print the figures as one JSON document, last line")
    arguments = parser.parse_args(argv)
    try:
        spectral = CacheOptions(bits_per_value=arguments.bits)
        if arguments.tokens < 1:
            raise ValueError(f"--tokens is {arguments.tokens}; expected at least 1.")
        require_writable(arguments.plot)
    except ValueError as error:
        print(f"vq_kvcache demo: {error}", file=sys.stderr)
        return 1

    model, tokenizer = load(str(model_folder()))[:2]
    text = (importlib.resources.files("vq_kvcache") / "data" / "demo.txt").read_text("utf-8")
    ids = tokenizer.encode(text)[: PROMPT_TOKENS + JUDGED_TOKENS]
    prompt, following = ids[:PROMPT_TOKENS], ids[PROMPT_TOKENS:]
    print(f"Prompt: {len(prompt)} tokens of The Wonderful Wizard of Oz. On a CPU each cache takes half a minute.")
    runs = {}
    for name, choice in (("full precision", KVCache), (f"spectral, {arguments.bits:g} bits", spectral)):
        runs[name] = _run(model, tokenizer, prompt, following, choice, arguments.tokens)
        print(
            f"\n--- {name} ({runs[name].seconds:.0f} s)\n...{_tail(text, ids, tokenizer)}|{runs[name].text}", flush=True
        )
    full, packed = runs.values()
    figures = compare(full, packed) | {"prompt_tokens": len(prompt), "bits_per_value": arguments.bits}
    codec = sum(c.stats()["codec_bytes"] for c in make_prompt_cache(model, cache=spectral))
    figures["codec_bytes"] = codec
    _report(figures)
    _plot(model, spectral, codec, arguments.plot)
    if arguments.json:
        print(json.dumps(figures))
    return 0


def _run(model: Any, tokenizer: Any, prompt: list[int], following: list[int], choice: Any, tokens: int) -> Run:
    start = time.perf_counter()
    caches = make_prompt_cache(model, cache=choice)
    text = generate(model, tokenizer, prompt, cache=caches, max_tokens=tokens)
    for cache in caches:  # back to the end of the prompt; its last token is fed again below
        cache.trim(cache.offset - len(prompt) + 1)
    nbytes = sum(c.nbytes for c in caches)
    rows = []
    fed = [prompt[-1], *following]
    for first in range(0, len(following), LAG):
        logits = model(mx.array(fed[first : first + LAG])[None], cache=caches)[0].astype(mx.float32)
        rows.append(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
        mx.eval(rows[-1])
    return Run(text, np.array(mx.concatenate(rows)), nbytes, time.perf_counter() - start)


def compare(full: Run, packed: Run) -> dict[str, float]:
    """Bytes of both caches, mean KL (nats) and top-1 agreement over the judged positions."""
    reference, other = full.log_probabilities, packed.log_probabilities
    return {
        "full_bytes": full.nbytes,
        "packed_bytes": packed.nbytes,
        "share": packed.nbytes / full.nbytes,
        "kl_nats": float((np.exp(reference) * (reference - other)).sum(-1).mean()),
        "top1_agreement": float((reference.argmax(-1) == other.argmax(-1)).mean()),
        "judged_positions": len(reference),
        "same_text": full.text == packed.text,
    }


def _tail(text: str, ids: list[int], tokenizer: Any) -> str:
    return str(tokenizer.decode(ids[PROMPT_TOKENS - 12 : PROMPT_TOKENS]))


def _report(figures: dict[str, float]) -> None:
    print(f"""
cache after {figures["prompt_tokens"]} tokens, measured (array bytes, window and sinks included)
  full precision   {figures["full_bytes"]:>12,} bytes
  spectral         {figures["packed_bytes"]:>12,} bytes   {figures["share"]:.3f} of full precision
  its codec        {figures["codec_bytes"]:>12,} bytes   once per model, whatever the context
agreement on the next {figures["judged_positions"]} tokens of the book
  KL(full || spectral)  {figures["kl_nats"]:.5f} nats, mean
  same top token        {figures["top1_agreement"]:.1%}""")


def held_bytes(model: Any, spectral: CacheOptions) -> tuple[list[int], list[int], list[int]]:
    """(contexts, bytes of KVCache, bytes of SpectralKVCache), from caches that were really filled."""
    args = model.args
    shape = (1, args.num_key_value_heads, PLOTTED_CONTEXTS.step, args.head_dim)
    columns = []
    for choice in (KVCache, spectral):
        caches, column = make_prompt_cache(model, cache=choice), []
        for _ in PLOTTED_CONTEXTS:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # random numbers are unlike any text
                for cache in caches:
                    cache.update_and_fetch(mx.random.normal(shape, mx.float16), mx.random.normal(shape, mx.float16))
            mx.eval([c.state for c in caches])
            column.append(sum(c.nbytes for c in caches))
        columns.append(column)
    return list(PLOTTED_CONTEXTS), columns[0], columns[1]


def _plot(model: Any, spectral: CacheOptions, codec_bytes: int, path: pathlib.Path) -> None:
    if importlib.util.find_spec("matplotlib") is None:
        print('\nno plot: matplotlib is not installed; pip install "vq-kvcache[plot]" brings it.')
        return
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    contexts, full, packed = held_bytes(model, spectral)
    figure, axes = plt.subplots(figsize=(7, 4.2), dpi=140)
    axes.plot(contexts, np.array(full) / 1e6, label="KVCache (fp16)", color="#888888", lw=2)
    axes.plot(contexts, np.array(packed) / 1e6, label=f"SpectralKVCache, {spectral.bits_per_value:g} bits", lw=2)
    axes.plot(contexts, (np.array(packed) + codec_bytes) / 1e6, "--", color="C0", lw=1, label="with its codec")
    axes.set(xlabel="context (tokens)", ylabel="MB held", title="tiny-llama: bytes of the cache, measured")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path)
    print(f"\nplot of bytes against context: {path}")


__all__ = ["Run", "SpectralKVCache", "compare", "held_bytes", "main", "model_folder"]
