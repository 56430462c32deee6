"""Does speculative decoding change what a packed cache says?

    python benchmarks/speculative.py vq_kvcache/data/tiny-llama

Texts: greedy continuations with a draft model (the target itself, and the target with noise in its weights, which is
wrong more often), with the cache of each codec; share of tokens equal to the same cache's without a draft, and to full
precision's, place by place, so that everything after a first difference counts as it falls.

Distributions: one fixed text per domain goes through two caches of each kind. The plain one is fed a token at a time;
the other as speculation does it, a true token and GUESSES guesses of which some are right, the wrong ones trimmed off.
In the pattern "codes" a run of wrong tokens longer than window and lag is appended and trimmed off every so often, too,
which packs the newest true tokens and ends the trim within the codes. KL of each next-token distribution.
"""

import argparse
import json
import pathlib
from typing import Any

import measure
import mlx.core as mx
import numpy as np
from mlx.utils import tree_map
from mlx_lm.models.cache import KVCache
from quality import DOMAINS
from tqdm import tqdm

from vq_kvcache import Codec, SpectralKVCache, make_prompt_cache, stream_generate
from vq_kvcache.hooks import own_caches, spectral_caches
from vq_kvcache.spectral.calibration_text import encode
from vq_kvcache.spectral.sealing import LAG

GUESSES = 4
NOISE = 0.2  # of each weight matrix' standard deviation, in the draft that is wrong more often
PROMPT, CONTEXT, PREFILL = 320, 512, 320
WINDOW = 128
LONG = WINDOW + LAG + 20  # wrong tokens in a run that is trimmed off into the codes
EVERY = 12  # rounds between two such runs


def noisy(model: Any, again: Any, seed: int = 0) -> Any:
    """`again`, a second load of `model`, with noise in its matrices."""
    keys = iter(mx.random.split(mx.random.key(seed), 1000))

    def change(w: mx.array) -> mx.array:
        noise = mx.random.normal(w.shape, key=next(keys))
        return w + NOISE * mx.sqrt(mx.var(w)) * noise if w.ndim == 2 else w

    again.update(tree_map(change, model.parameters()))
    mx.eval(again.parameters())
    return again


def caches_of(bits: list[float], codec: Codec) -> dict[str, Any]:
    """name -> what `cache=` takes."""
    packed = {
        f"spectral {b:g}": SpectralKVCache.with_options(bits_per_value=b, window=WINDOW, codec=codec) for b in bits
    }
    return {"full precision": KVCache, "lossless": SpectralKVCache.with_options(lossless=True, window=WINDOW), **packed}


def greedy(
    model: Any, tokenizer: Any, ids: list[int], tokens: int, cache: Any, draft: Any = None
) -> tuple[list[int], int]:
    """(the most likely `tokens` tokens after `ids`, how many of them were guesses of the draft)."""
    options = {} if draft is None else {"draft_model": draft, "num_draft_tokens": GUESSES}
    found = list(stream_generate(model, tokenizer, ids, cache=cache, max_tokens=tokens, **options))
    return [r.token for r in found], sum(r.from_draft for r in found)


def texts(
    model: Any, tokenizer: Any, drafts: dict[str, Any], caches: dict[str, Any], prompts: list[list[int]], tokens: int
) -> list[dict[str, Any]]:
    """Rows of agreement, one for each cache and draft."""
    plain = {
        name: [greedy(model, tokenizer, ids, tokens, cache)[0] for ids in tqdm(prompts, desc=f"{name}, no draft")]
        for name, cache in caches.items()
    }

    def share(found: list[list[int]], wanted: list[list[int]]) -> float:
        return float(np.mean(np.array(found) == np.array(wanted)))

    rows = []
    for draft, guesser in drafts.items():
        for name, cache in caches.items():
            done = [
                greedy(model, tokenizer, ids, tokens, cache, guesser)
                for ids in tqdm(prompts, desc=f"{name}, draft {draft}")
            ]
            found = [text for text, _ in done]
            rows.append({
                "cache": name, "draft": draft, "tokens": len(prompts) * tokens,
                "from_draft": sum(accepted for _, accepted in done) / (len(prompts) * tokens),
                "equal_to_same_cache": share(found, plain[name]),
                "texts_equal_to_same_cache": sum(a == b for a, b in zip(found, plain[name], strict=True)),
                "equal_to_full_precision": share(found, plain["full precision"]),
                "equal_to_full_precision_without_draft": share(plain[name], plain["full precision"]),
            })  # fmt: skip
    return rows


def make(model: Any, cache: Any) -> list[Any]:
    """Caches of the target for one run."""
    return own_caches(model) if cache is KVCache else make_prompt_cache(model, cache=cache)


def log_probabilities(model: Any, caches: list[Any], ids: mx.array) -> mx.array:
    """Of the token after each of ids [B, L]: float32 [B, L, V]."""
    logits = model(ids, cache=caches).astype(mx.float32)
    found = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    mx.eval(found, [c.state for c in caches])
    return found


def trim(caches: list[Any], count: int) -> int:
    """Trim all of them; how many packed tokens of each layer went."""
    packed = [c.stats()["packed_tokens"] for c in spectral_caches(caches)]
    for cache in caches:
        cache.trim(count)
    left = [c.stats()["packed_tokens"] for c in spectral_caches(caches)]
    return max((a - b for a, b in zip(packed, left, strict=True)), default=0)


def rounds(model: Any, caches: list[Any], ids: np.ndarray, long_runs: bool, seed: int = 0) -> tuple[np.ndarray, int]:
    """Next-token log-probabilities [B, T - PREFILL, V] by the pattern of speculation; how many trims ended in codes."""
    generator = np.random.default_rng(seed)
    log_probabilities(model, caches, mx.array(ids[:, :PREFILL]))
    at, found, in_codes, count = PREFILL, [], 0, 0
    vocabulary = model.args.vocab_size
    while at < ids.shape[1]:
        if long_runs and count % EVERY == 0:
            log_probabilities(model, caches, mx.array(generator.integers(0, vocabulary, (len(ids), LONG))))
            in_codes += trim(caches, LONG) > 0
        right = min(int(generator.integers(0, GUESSES + 1)), ids.shape[1] - at - 1)
        wrong = generator.integers(0, vocabulary, (len(ids), GUESSES - right))
        fed = np.concatenate([ids[:, at : at + 1 + right], wrong], axis=1)
        found.append(np.array(log_probabilities(model, caches, mx.array(fed))[:, : right + 1]))
        in_codes += trim(caches, GUESSES - right) > 0
        at, count = at + 1 + right, count + 1
    return np.concatenate(found, axis=1), in_codes


def one_by_one(model: Any, caches: list[Any], ids: np.ndarray) -> np.ndarray:
    """The same of a cache that is fed one token at a time."""
    log_probabilities(model, caches, mx.array(ids[:, :PREFILL]))
    found = [
        np.array(log_probabilities(model, caches, mx.array(ids[:, t : t + 1]))) for t in range(PREFILL, ids.shape[1])
    ]
    return np.concatenate(found, axis=1)


def distributions(model: Any, caches: dict[str, Any], ids: np.ndarray) -> list[dict[str, Any]]:
    """Rows of mean KL, one for each cache and pattern."""
    rows, reference = [], one_by_one(model, own_caches(model), ids)
    for name, cache in tqdm([(n, c) for n, c in caches.items() if c is not KVCache], desc="distributions"):
        plain = one_by_one(model, make(model, cache), ids)
        own = float(measure.divergence(reference, plain).mean())
        for pattern, long_runs in (("window", False), ("codes", True)):
            found, in_codes = rounds(model, make(model, cache), ids, long_runs)
            rows.append({
                "cache": name, "pattern": pattern, "positions": found.shape[0] * found.shape[1],
                "trims_into_codes": in_codes,
                "kl_to_same_cache": float(measure.divergence(plain, found).mean()),
                "kl_to_full_precision": float(measure.divergence(reference, found).mean()),
                "kl_to_full_precision_without_trims": own,
                "largest_difference": float(np.abs(np.exp(plain) - np.exp(found)).max()),
            })  # fmt: skip
    return rows


def main() -> None:
    """Measure and write results/speculative.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--bits", default="3,2")
    parser.add_argument("--tokens", type=int, default=64, help="tokens after each prompt")
    parser.add_argument("--prompts", type=int, default=1, help="prompts of each domain")
    parser.add_argument("--codec", help="codec file; default: the stored or shipped one of the model")
    parser.add_argument("--out", type=pathlib.Path, default=measure.RESULTS / "speculative.json")
    args = parser.parse_args()
    model, tokenizer, _, codec, identity = measure.load_with_codec(args.model, args.codec)
    drafts = {"itself": model, "noisy": noisy(model, measure.load_model(args.model)[0])}
    read = [encode(tokenizer, (measure.HERE / "text" / f"{d}.txt").read_text("utf-8")) for d in DOMAINS]
    prompts = [ids[CONTEXT * i :][:PROMPT] for ids in read for i in range(args.prompts)]
    tokenizer.eos_token_ids = set()
    caches = caches_of([float(b) for b in args.bits.split(",")], codec)
    result = {
        "model": pathlib.Path(args.model).name, "codec_identity": identity, "guesses": GUESSES, "noise": NOISE,
        "window": WINDOW, "lag": LAG, "long_run": LONG, "prompt": PROMPT, "tokens": args.tokens,
        "texts": texts(model, tokenizer, drafts, caches, prompts, args.tokens),
        "distributions": distributions(model, caches, np.array([ids[:CONTEXT] for ids in read])),
    }  # fmt: skip
    measure.save(args.out, result)
    print(json.dumps({"written": args.out.name}))


if __name__ == "__main__":
    main()
