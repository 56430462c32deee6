"""How far does each cache move the model's next-token distribution, at how many true bits?

    python benchmarks/quality.py vq_kvcache/data/tiny-llama --context 2048

Teacher-forced over real text through the real cache, in steps of 16 tokens, so that every position has its exact window
of 128 behind it as in decoding. Every quantizer runs behind the same cache (window, sinks); only the method differs.
Cells already in the result file are not measured again.
"""

import argparse
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import measure
import numpy as np
from tqdm import tqdm

from vq_kvcache import Codec, SpectralKVCache, make_prompt_cache
from vq_kvcache.hooks import attach, detach, own_caches
from vq_kvcache.spectral.calibrate import calibrate_spectral_rotation, codec_for
from vq_kvcache.spectral.calibration_text import encode

PREFILL = 256
DOCUMENTED = {"documented 4/1": (4, 1, False), "documented 4/3": (4, 3, False), "documented filled": (4, 3, True)}


def methods(
    model: Any, tokenizer: Any, head_dim: int, codec: Codec, bits: list[float], only: str | None
) -> dict[str, Any]:
    """name -> (function that makes the caches, true bits of the codes)."""
    table: dict[str, tuple[Callable[[], list[Any]], float]] = {}
    for b in bits:
        options = SpectralKVCache.with_options(bits_per_value=b, codec=codec)
        layers = codec.plan(b).layers.values()
        stored = np.mean([q.bits_per_value for layer in layers for q in (layer.keys, layer.values) if q is not None])
        table[f"spectral {b:g}"] = (lambda o=options: make_prompt_cache(model, cache=o)), float(stored)
    for b in (4, 3, 2):
        change = measure.random_rotation(head_dim, b)
        table[f"random rotation {b}"] = (lambda c=change: measure.baseline_caches(model, c)), b + 16 / head_dim
        change = measure.affine(b)
        table[f"mlx affine {b}"] = (lambda c=change: measure.baseline_caches(model, c)), b + 32 / 64
    if only and "documented" not in only:
        return table
    rotations = calibrate_spectral_rotation(model, tokenizer, 16, 1024)
    for name, (signal, noise, fill) in DOCUMENTED.items():
        table[name] = _documented(model, rotations, signal, noise, fill)
    return table


def _documented(
    model: Any, rotations: Any, signal: int, noise: int, fill: bool
) -> tuple[Callable[[], list[Any]], float]:
    def caches() -> list[Any]:
        attach(model, rotations=rotations, signal_bits=signal, noise_bits=noise, use_water_filling=fill)
        made = make_prompt_cache(model)
        detach(model)
        return made

    plan = caches()[0]._plan
    quantizers = [q for layer in plan.layers.values() for q in (layer.keys, layer.values)]
    return caches, float(np.mean([q.bits_per_value for q in quantizers]))


def cell(model: Any, caches: Callable[[], list[Any]], texts: list[list[int]], references: list[Any]) -> dict[str, Any]:
    """KL, top-1 and perplexity over all texts; bytes held at the end of one."""
    divergences, agreements, losses, start = [], [], [], time.perf_counter()
    for ids, reference in zip(texts, references, strict=True):
        held = caches()
        other = measure.log_probabilities(model, held, ids, PREFILL)
        divergences.append(measure.divergence(reference, other))
        agreements.append(other.argmax(-1) == reference.argmax(-1))
        losses.append(-other[np.arange(len(other) - 1), ids[PREFILL + 1 :]])
    kl = np.concatenate(divergences)
    per_text = np.array([d.mean() for d in divergences])
    return {
        "kl": float(kl.mean()),
        "kl_standard_error": float(per_text.std(ddof=1) / len(per_text) ** 0.5) if len(per_text) > 1 else None,
        "kl_999": float(np.quantile(kl, 0.999)),
        "top1": float(np.concatenate(agreements).mean()),
        "perplexity": float(np.exp(np.concatenate(losses).mean())),
        "positions": len(kl),
        "bytes_per_token": sum(c.nbytes for c in held) / len(texts[0]),
        "seconds": time.perf_counter() - start,
    }


def main() -> None:
    """Measure every cell that is not in the result file yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--positions", type=int, default=4096, help="scored positions per domain, at least")
    parser.add_argument("--bits", default="1,2,3,4")
    parser.add_argument("--domains", default="drama,encyclopaedia,factbook,prose,python")
    parser.add_argument("--only", help="methods to measure, separated by commas; default: all")
    parser.add_argument("--codec", help="codec file; default: the stored or shipped one of the model")
    parser.add_argument("--out", type=pathlib.Path, help="result file; default: results/quality-MODEL-CONTEXT.json")
    args = parser.parse_args()
    model, tokenizer, head_dim = measure.load_model(args.model, keep=True)
    codec = Codec.load(args.codec) if args.codec else codec_for(model, tokenizer)
    measure.to_float32(model, codec)
    name = f"quality-{pathlib.Path(args.model).name}-{args.context}"
    file = args.out or measure.RESULTS / f"{name}.json"
    cells = json.loads(file.read_text())["cells"] if file.exists() else {}
    table = methods(model, tokenizer, head_dim, codec, [float(b) for b in args.bits.split(",")], args.only)
    for domain in args.domains.split(","):
        ids = encode(tokenizer, (measure.HERE / "text" / f"{domain}.txt").read_text("utf-8"))
        count = min(-(-args.positions // (args.context - PREFILL)), len(ids) // args.context)
        texts = [ids[i * args.context : (i + 1) * args.context] for i in range(count)]
        asked = args.only.split(",") if args.only else ["full precision", *table]
        wanted = [m for m in asked if f"{domain}/{m}" not in cells]
        if not wanted:
            continue
        references = [measure.log_probabilities(model, own_caches(model), t, PREFILL) for t in texts]
        for method in tqdm(wanted, desc=domain):
            make, bits = table.get(method, (lambda: own_caches(model), 16.0))
            cells[f"{domain}/{method}"] = cell(model, make, texts, references) | {"true_bits": bits}
            measure.save(file, {"model": name, "context": args.context, "prefill": PREFILL,
                                "codec": codec.provenance, "cells": cells})  # fmt: skip
    print(json.dumps({"written": file.name, "cells": len(cells)}))


if __name__ == "__main__":
    main()
