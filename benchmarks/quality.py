"""How far does each cache move the model's next-token distribution, at how many true bits?

    python benchmarks/quality.py vq_kvcache/data/tiny-llama --context 1024

Teacher-forced over real text through the real cache, in lockstep with full precision. --mode decode feeds 16 tokens at
a time, so that every position has its exact window of 128 behind it, as in decoding; --mode prefill feeds chunks of
256, each of which sees itself exact. Quantizers run behind the same cache (window, sinks), so that only the method
differs, but for "mlx as shipped": mlx-lm's --kv-bits, which has no window. "bound" is the rate-distortion bound
(bound.py). Bytes are those of real caches only, in float32.
Cells already in the result file are not measured again, unless the codec is another. With --predict-only nothing is
measured: the predicted KL in the files of the model is worked out again, after a change to how it is predicted.
"""

import argparse
import json
import pathlib
from collections.abc import Callable
from typing import Any

import bound
import measure
import mlx.core as mx
import numpy as np
from tqdm import tqdm

from vq_kvcache import Codec, SpectralKVCache, make_prompt_cache
from vq_kvcache.hooks import attach, detach, own_caches
from vq_kvcache.measuring import PREFILL, mass_of, stored_bits
from vq_kvcache.spectral.calibration_text import encode
from vq_kvcache.spectral.files import write_atomically

STEPS = {"decode": 16, "prefill": 256}
DOMAINS = ("drama", "encyclopaedia", "factbook", "prose", "python")
DOCUMENTED = {"documented 4/1": (4, 1, False), "documented filled": (4, 3, True)}
AT_ONCE = 4  # methods that share one run of full precision
Makers = dict[str, tuple[Callable[[], list[Any]], float]]


def methods(
    model: Any,
    tokenizer: Any,
    head_dim: int,
    codec: Codec,
    bits: list[float],
    only: set[str],
    scalar: Codec | None = None,
) -> Makers:
    """name -> (function that makes the caches, true bits of the codes)."""
    table: Makers = {"full precision": ((lambda: own_caches(model)), 16.0)}
    for b in bits:
        options = SpectralKVCache.with_options(bits_per_value=b, codec=codec)
        table[f"spectral {b:g}"] = (lambda o=options: make_prompt_cache(model, cache=o)), 0.0
    for b in (4, 3, 2):
        change = measure.random_rotation(head_dim, b)
        table[f"random rotation {b}"] = (lambda c=change: measure.baseline_caches(model, c)), b + 16 / head_dim
        change = measure.affine(b)
        table[f"mlx affine {b}"] = (lambda c=change: measure.baseline_caches(model, c)), b + 32 / 64
        table[f"mlx as shipped {b}"] = (lambda c=change: _stock(model, c)), b + 32 / 64
    for b in bits if scalar else []:
        table[f"scalar {b:g}"] = (lambda b=b: measure.scalar_caches(model, scalar, b)), 0.0
    for b in bound.BITS:
        table[f"bound {b:g}"] = bound.caches_of(model, codec, b), b
    if not only or any(name.startswith("documented") for name in only):
        rotations = measure.documented_rotations(model, tokenizer)
        for name, settings in DOCUMENTED.items():
            table[name] = (lambda s=settings: _documented(model, rotations, *s)), 0.0
    return {
        name: row for name, row in table.items()
        if not only or only & {name, name.split()[0], name.rsplit(" ", 1)[0]}
    }  # fmt: skip


def _stock(model: Any, change: Callable[[mx.array], mx.array]) -> list[Any]:
    return [measure.StockKVCache(change) if type(c).__name__ == "KVCache" else c for c in own_caches(model)]


def _documented(model: Any, rotations: Any, signal: int, noise: int, fill: bool) -> list[Any]:
    attach(model, rotations=rotations, signal_bits=signal, noise_bits=noise, use_water_filling=fill)
    made = make_prompt_cache(model)
    detach(model)
    return made


def true_bits(caches: list[Any], told: float) -> float:
    """Stored bits per number of spectral caches, from their layouts; what was told of the others."""
    plan = getattr(caches[0], "_plan", None)
    return stored_bits(plan) if plan is not None and plan.layers else told


def texts_of(tokenizer: Any, context: int, positions: int) -> dict[str, list[list[int]]]:
    """Disjoint windows of each domain: enough for `positions` scored positions, or all there are."""
    found = {}
    for domain in DOMAINS:
        ids = encode(tokenizer, (measure.HERE / "text" / f"{domain}.txt").read_text("utf-8"))
        count = min(-(-positions // (context - PREFILL)), len(ids) // context)
        found[domain] = [ids[i * context : (i + 1) * context] for i in range(count)]
    return found


def cell(found: measure.Scores, bits: float, nbytes: float | None) -> dict[str, Any]:
    """One method on one domain; kl_by_text is for paired comparisons."""
    by_text = found.kl.mean(axis=1, dtype=np.float64)
    spread = by_text.std(ddof=1) / len(by_text) ** 0.5 if len(by_text) > 1 else None
    return {
        "kl": float(by_text.mean()),
        "kl_standard_error": spread,
        "kl_by_text": by_text.tolist(),
        "kl_999": float(np.quantile(found.kl, 0.999)),
        "top1": float(found.agrees.mean()),
        "perplexity": float(np.exp(found.losses.mean(dtype=np.float64))),
        "positions": int(found.kl.size),
        "bytes_per_token": nbytes,
        "true_bits": bits,
    }


def measure_methods(
    model: Any, makers: Makers, texts: dict[str, list[list[int]]], batch: int, step: int, label: str
) -> dict[str, dict[str, Any]]:
    """Cells "domain/method" of a few methods, over all texts, `batch` of them at a time."""
    owners = [domain for domain, rows in texts.items() for _ in rows]
    rows = mx.array([row for domain in texts.values() for row in domain])
    parts: dict[str, list[measure.Scores]] = {name: [] for name in makers}
    starts = range(0, len(owners), batch)
    with tqdm(total=len(starts) * rows.shape[1], desc=label, unit="token") as progress:
        for start in starts:
            chosen = rows[start : start + batch]
            found, sizes = measure.scores(
                model, {n: make for n, (make, _) in makers.items()}, chosen, PREFILL, step, progress
            )
            for name, score in found.items():
                parts[name].append(score)
    cells = {}
    for name, (make, told) in makers.items():
        whole = measure.Scores(*(np.concatenate([getattr(p, f) for p in parts[name]])
                                 for f in ("kl", "agrees", "losses")))  # fmt: skip
        for domain in texts:
            at = [i for i, owner in enumerate(owners) if owner == domain]
            score = measure.Scores(whole.kl[at], whole.agrees[at], whole.losses[at])
            real = isinstance(make()[0], SpectralKVCache) and not isinstance(make()[0], measure.RoundTripKVCache)
            nbytes = sizes[name] / rows.shape[1] if real or name == "full precision" else None
            cells[f"{domain}/{name}"] = cell(score, true_bits(make(), told), nbytes)
    return cells


def main() -> None:
    """Measure every cell that is not in the result file yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--mode", choices=STEPS, default="decode")
    parser.add_argument(
        "--positions", type=int, default=16384, help="scored positions per domain, if the text has them"
    )
    parser.add_argument("--bits", default="1,1.5,2,2.5,3,4")
    parser.add_argument("--only", default="", help="methods, or their first words, separated by commas; default: all")
    parser.add_argument("--batch", type=int, help="texts at once; default: 8 on a CPU, 128 on a GPU")
    parser.add_argument("--codec", help="codec file; default: the stored or shipped one of the model")
    parser.add_argument("--scalar-codec", help="codec of codes that stand alone (calibration.py --scalar), to compare")
    parser.add_argument("--out", type=pathlib.Path, help="default: results/quality-MODEL-CONTEXT-MODE.json")
    parser.add_argument("--predict-only", action="store_true", help="only predict again, in all files of the model")
    args = parser.parse_args()
    if args.predict_only:
        for written in sorted(measure.RESULTS.glob(f"quality-{pathlib.Path(args.model).name}-*.json")):
            result = json.loads(written.read_text())
            again = measure.predict_again(result, mass_of(result["context"], STEPS[result["mode"]]))
            write_atomically(written, (json.dumps(again, indent=1) + "\n").encode())
        return
    model, tokenizer, head_dim, codec, identity = measure.load_with_codec(args.model, args.codec)
    name = f"quality-{pathlib.Path(args.model).name}-{args.context}-{args.mode}"
    file = args.out or measure.RESULTS / f"{name}.json"
    old = json.loads(file.read_text()) if file.exists() else {}
    cells = old.get("cells", {})
    if old.get("codec_identity") != identity:
        cells = {n: c for n, c in cells.items() if n.split("/")[1].split()[0] not in ("spectral", "bound", "scalar")}
    bits = [float(b) for b in args.bits.split(",")]
    only = {m for m in args.only.split(",") if m}
    scalar = Codec.load(args.scalar_codec) if args.scalar_codec else None
    table = methods(model, tokenizer, head_dim, codec, bits, only, scalar)
    texts = texts_of(tokenizer, args.context, args.positions)
    wanted = [m for m in table if any(f"{d}/{m}" not in cells for d in texts)]
    on_gpu = mx.default_device() == mx.gpu
    batch = args.batch or (128 if on_gpu else 8)
    mass = mass_of(args.context, STEPS[args.mode])
    predicted = {f"{b:g}": codec.kl_of_mass(b, mass) for b in bits} if codec.in_nats else {}
    at_once = AT_ONCE * (2 if on_gpu else 1)
    for i in range(0, len(wanted), at_once):
        now = {m: table[m] for m in wanted[i : i + at_once]}
        cells |= measure_methods(model, now, texts, batch, STEPS[args.mode], f"{i + len(now)} of {len(wanted)} methods")
        measure.save(file, {"model": pathlib.Path(args.model).name, "context": args.context, "mode": args.mode,
                            "prefill": PREFILL, "codec": codec.provenance, "codec_identity": identity,
                            "predicted_kl": predicted, "far_mass": mass, "cells": cells})  # fmt: skip
    print(json.dumps({"written": file.name, "cells": len(cells)}))


if __name__ == "__main__":
    main()
