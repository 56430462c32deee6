"""How long does a whole decode step take, and reading a prompt, beside mlx-lm's own cache?

    python benchmarks/speed.py                                        # about four minutes on an H100
    python benchmarks/speed.py --decode 32768x8 --four-bit "" --prefill ""
    python benchmarks/speed.py --small --layers 2 --decode 512x1,512x2 --four-bit 512x1 --prefill 512  # on a CPU

Shape of Llama-3.1-8B with random weights, and a codec that nobody calibrated: time and bytes depend on neither. Caches
are filled through their own update_and_fetch, encoding included, and not by the model. One row is decoded by mlx-lm's
generate_step, several by the GenerationBatch of its server, both of which build a step while the last one runs. All
caches of a shape are timed one after another in one process, so that their ratio is of one run. What is finished is
saved, and not run again.
"""

import argparse
import copy
import dataclasses
import itertools
import json
import pathlib
import statistics
import time
from collections.abc import Iterator
from typing import Any

import measure
import mlx.core as mx
import numpy as np
from calibration import LLAMA_8B, random_model
from mlx import nn
from mlx_lm.generate import GenerationBatch, StopSequences, generate_step, generation_stream
from mlx_lm.models.cache import BatchKVCache, KVCache
from tqdm import tqdm

from vq_kvcache import SpectralKVCache, doctor, kernels
from vq_kvcache.batch_cache import BatchSpectralKVCache
from vq_kvcache.measuring import active_bytes
from vq_kvcache.spectral import intercept
from vq_kvcache.spectral.bit_allocator import gaussian_costs
from vq_kvcache.spectral.codec import Codec, LayerQuantizers, Plan, Transforms
from vq_kvcache.spectral.sealing import BLOCK
from vq_kvcache.trust import trusted, trusted_codes

SMALL = LLAMA_8B | {
    "hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64,
    "vocab_size": 500,
}  # fmt: skip
PIECE = 2048  # tokens of a prompt that mlx-lm reads at once
WARM = 8 + 4 * BLOCK  # steps before the first that counts: what packs a process's first blocks is compiled in them
STEPS = 4 * BLOCK  # that count: whole blocks, of one row and of a batch, which packs two at a time
STEADY = 200  # of these, before mlx-lm's cache grows again, which it does every 256 tokens
Rows = dict[str, Any]


def random_plan(config: dict[str, Any], bits: float) -> Plan:
    """Quantizers for keys and values of unit variance, of falling importance: widths as various as a codec's."""
    heads, dims = config["num_key_value_heads"], config["head_dim"]
    generator, pair = np.random.default_rng(0), []
    for _ in range(2):
        spectra = [doctor.falling(dims, h, heads) for h in range(heads)]
        bases = [np.linalg.qr(generator.normal(size=(dims, dims)))[0] * np.sqrt(v) for v in spectra]
        costs = np.stack([gaussian_costs(v) for v in spectra])
        parts = np.zeros((heads, dims)), np.stack(bases), np.stack(spectra), costs, np.ones_like(costs)
        pair.append(Transforms(*(part.astype(np.float32) for part in parts)))
    plan = Codec("random", {0: (pair[0], pair[1])}, {"objective": "none"}).plan(bits)
    layers = [plan.layers[0]] + [_copied(plan.layers[0]) for _ in range(1, config["num_hidden_layers"])]
    return dataclasses.replace(plan, layers=dict(enumerate(layers)))


def _copied(layer: LayerQuantizers) -> LayerQuantizers:
    """The same with arrays of its own, as every layer of a codec has them."""
    twins = []
    for quantizer in (layer.keys, layer.values):
        twin = copy.copy(quantizer)
        own = {name: mx.array(np.array(a)) for name, a in vars(twin).items() if isinstance(a, mx.array)}
        vars(twin).update(own)
        twins.append(twin)
    return LayerQuantizers(*twins)


def empty(kind: str, plan: Plan | None, layers: int, batch: int) -> list[Any]:
    """Caches of a kind: spectral ones where there is a plan; of mlx-lm's own for a batch, those of its server, which
    mask padding, or "KVCache without padding"."""
    if plan is not None and batch == 1:
        return [SpectralKVCache(plan, i) for i in range(layers)]
    if plan is not None:
        return [BatchSpectralKVCache([0] * batch, plan, i) for i in range(layers)]
    return [BatchKVCache([0] * batch) if kind == "BatchKVCache" else KVCache() for _ in range(layers)]


def fill(caches: list[Any], config: dict[str, Any], tokens: int, batch: int, piece: int) -> None:
    """Append random keys and values of unit variance, `piece` tokens at a time, a layer after the other."""
    shape = (batch, config["num_key_value_heads"], min(piece, tokens), config["head_dim"])
    keys, values = (mx.random.normal(shape, mx.bfloat16) for _ in range(2))
    mx.eval(keys, values)
    for cache in tqdm(caches, desc="filling", unit="layer", disable=None):
        for start in range(0, tokens, piece):
            count = min(piece, tokens - start)
            cache.update_and_fetch(keys[:, :, :count], values[:, :, :count])
            mx.eval(cache.state)
        mx.clear_cache()


def decoding(model: Any, caches: list[Any], batch: int, count: int) -> Iterator[None]:
    """`count` steps of mlx-lm's own loop."""
    if batch == 1:
        for _ in generate_step(mx.array([5]), model, max_tokens=count, prompt_cache=caches):
            yield
        return
    with mx.stream(generation_stream):
        rows = GenerationBatch(
            model, list(range(batch)), mx.array([5] * batch), caches, [[] for _ in range(batch)], [None] * batch,
            lambda logits: mx.argmax(logits, axis=-1), [], [StopSequences() for _ in range(batch)],
            [count + 2] * batch,
        )  # fmt: skip
    for _ in range(count):
        with mx.stream(generation_stream):
            rows.next()
        yield


def packed_tokens(cache: Any) -> int:
    """Columns of codes that a cache holds; 0 for mlx-lm's."""
    storage = getattr(cache, "_storage", None)
    return 0 if storage is None else int(storage.codes.tokens)


def by_sealing(times: list[float], packed: list[int]) -> Rows:
    """Milliseconds from each moment to the next: of all, and of those in which nothing was packed; and how much packing
    adds, in the mean of all, to the median of the latter.

    packed: codes held at each moment. A step is built while the one before runs, so that packing is felt in the
    interval in which it appears and in the two that follow.
    """
    spans = (np.diff(times) * 1e3).tolist()
    new = [b > a for a, b in itertools.pairwise(packed)]
    felt = [any(new[max(i - 2, 0) : i + 1]) for i in range(len(spans))]
    plain = statistics.median([s for s, f in zip(spans, felt, strict=True) if not f] or spans)
    more = sum(s - plain for s, f in zip(spans, felt, strict=True) if f) / len(spans)
    told = {"median_ms": statistics.median(spans), "mean_ms": statistics.fmean(spans), "seals": sum(new)}
    return told | {"plain_median_ms": plain, "packing_ms": more}


def decode(model: Any, caches: list[Any], batch: int, count: int, before: int) -> Rows:
    """Times of `count` decode steps after some to warm up; and the peak of the first of them, and of all, beyond the
    caches' nbytes and the bytes that were held `before` the caches."""
    times, packed, above = [], [], {}
    for i, _ in enumerate(decoding(model, caches, batch, WARM + count + 1)):
        if i >= WARM:
            times.append(time.perf_counter())
            packed.append(packed_tokens(caches[0]))
        if i == WARM:
            mx.reset_peak_memory()
        for name, end in (("steady_peak_above_nbytes", min(STEADY, count)), ("peak_above_nbytes", count)):
            if i == WARM + end:
                above[name] = mx.get_peak_memory() - before - sum(cache.nbytes for cache in caches)
    return by_sealing(times, packed) | {"steps": count, "steady_steps": min(STEADY, count)} | above


def building(model: Any, caches: list[Any], batch: int, count: int = 8) -> Rows:
    """Milliseconds of Python for the graph of one step, and of MLX for sending it to the GPU: where the two together
    are as long as a step, the CPU is what is timed."""
    built, sent, token = [], [], mx.array([[5]] * batch)
    for _ in range(count):
        start = time.perf_counter()
        logits = model(token, cache=caches)
        built.append((time.perf_counter() - start) * 1e3)
        mx.async_eval(logits)  # type: ignore[no-untyped-call]
        sent.append((time.perf_counter() - start) * 1e3 - built[-1])
        mx.eval(logits, [c.state for c in caches])
    return {"build_ms": statistics.median(built), "send_ms": statistics.median(sent)}


def appending(caches: list[Any], config: dict[str, Any], batch: int, count: int) -> Rows:
    """Times of appending, and packing, a token to every layer without a model: Python and one wait a step included."""
    shape = (batch, config["num_key_value_heads"], 1, config["head_dim"])
    keys, values = (mx.random.normal(shape, mx.bfloat16) for _ in range(2))
    times, packed = [], []
    for i in range(WARM + count + 1):
        for cache in caches:
            cache.update_and_fetch(keys, values)
        mx.eval([cache.state for cache in caches])
        if i >= WARM:
            times.append(time.perf_counter())
            packed.append(packed_tokens(caches[0]))
    return by_sealing(times, packed)


def decode_kind(
    model: Any, config: dict[str, Any], kind: str, plan: Plan | None, tokens: int, batch: int, count: int
) -> Rows:
    """One row: caches of a kind filled to `tokens`, decode steps with the model, then appends without it."""
    before = active_bytes()
    caches = empty(kind, plan, config["num_hidden_layers"], batch)
    start = time.perf_counter()
    # mlx-lm's cache grows by copies of itself, so it gets all at once.
    fill(caches, config, tokens, batch, tokens if plan is None else PIECE)
    filling = time.perf_counter() - start
    row = decode(model, caches, batch, count, before)
    row |= {"fill_s": filling, "nbytes": sum(c.nbytes for c in caches), "active_bytes": active_bytes() - before}
    row |= building(model, caches, batch)
    packing = appending(caches, config, batch, count)
    return row | {"append_ms": packing["plain_median_ms"], "pack_alone_ms": packing["packing_ms"]}


def prompt(model: Any, caches: list[Any], tokens: int, piece: int) -> list[float]:
    """Seconds from the start to the end of each piece of a prompt, read by mlx-lm's generate_step."""
    times: list[float] = []
    ids = mx.random.randint(2, model.args.vocab_size, (tokens + 1,))  # the last begins the decoding
    mx.eval(ids)
    with tqdm(total=tokens, desc="prompt", unit="token", disable=None) as bar:

        def told(done: int, _: int) -> None:
            times.append(time.perf_counter())
            bar.update(min(done, tokens) - bar.n)

        for _ in generate_step(
            ids, model, max_tokens=1, prompt_cache=caches, prefill_step_size=piece, prompt_progress_callback=told
        ):
            break
    return [t - times[0] for t in times[1 : 1 + -(-tokens // piece)]]


def prefill_kind(
    model: Any, config: dict[str, Any], kind: str, plan: Plan | None, tokens: int, piece: int = PIECE
) -> Rows:
    """One row: a prompt of `tokens` read after a shorter one; the peak, and what is held at its end."""
    prompt(model, empty(kind, plan, config["num_hidden_layers"], 1), min(2 * piece, tokens), piece)
    before = active_bytes()
    caches = empty(kind, plan, config["num_hidden_layers"], 1)
    mx.reset_peak_memory()
    ends = prompt(model, caches, tokens, piece)
    peak = mx.get_peak_memory()
    codec = 0 if plan is None else sum(layer.nbytes for layer in plan.layers.values())
    held = sum(cache.nbytes for cache in caches)
    return {
        "seconds": ends[-1], "tokens_per_s": tokens / ends[-1], "piece": piece, "ends_s": ends,
        "peak_above_weights": peak - before + codec, "active_above_weights": active_bytes() - before + codec,
        "nbytes": held, "codec_bytes": codec,
    }  # fmt: skip


def warm_kernels(config: dict[str, Any]) -> Rows:
    """The back-end, whether its kernels were right, and the seconds until that was known, compiling included.
    SystemExit where there are none and the shape is not the small one: plain operations would take hours."""
    place, dims, start = kernels.backend(), config["head_dim"], time.perf_counter()
    right = place != "ops" and trusted(place, dims, dims, mx.bfloat16) and trusted_codes(place)
    if not right and config["hidden_size"] > SMALL["hidden_size"]:
        raise SystemExit(f"no kernels that are right on {mx.default_device()}, {place}; expected some; try --small.")
    return {"place": place, "right": right, "seconds": time.perf_counter() - start}


def measure_all(args: argparse.Namespace, results: measure.Results, config: dict[str, Any]) -> None:
    """Every cell that is asked for and not there yet."""
    results.settings["kernels"] = warm_kernels(config)
    print(f"kernels: {results.settings['kernels']}", flush=True)
    model, _ = random_model(config)
    print(f"weights: {mx.get_active_memory() / 1e9:.1f} GB", flush=True)
    spectral: dict[str, Plan | None] = {f"spectral {b:g}": random_plan(config, b) for b in args.bits}
    print("codecs made", flush=True)

    def decode_cells(weights: str, shapes: str) -> None:
        for tokens, batch in (map(int, shape.split("x")) for shape in shapes.split(",") if shape):
            own = ("KVCache",) if batch == 1 else ("BatchKVCache", "KVCache without padding")
            kinds = dict.fromkeys(own) | spectral
            results.cell(
                f"decode {weights} {tokens}x{batch}",
                kinds,
                lambda kind, plan, t=tokens, b=batch: decode_kind(model, config, kind, plan, t, b, args.steps),
            )

    decode_cells("bf16", args.decode)
    for tokens in map(int, filter(None, args.prefill.split(","))):
        results.cell(
            f"prefill bf16 {tokens}",
            {"KVCache": None} | spectral,
            lambda kind, plan, t=tokens: prefill_kind(model, config, kind, plan, t),
        )
    if args.four_bit:
        try:
            nn.quantize(model, group_size=64, bits=4)
            mx.eval(model.parameters())
        except (RuntimeError, ValueError) as error:
            print(f"4-bit weights: {error}", flush=True)
            results.cells[f"decode 4-bit {args.four_bit}"] = {"error": measure.first_line(error)}
            results.save()
            return
        decode_cells("4-bit", args.four_bit)


def main() -> None:
    """Measure, and write results/speed.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--decode", default="131072x1,32768x8,8192x1", help="tokens x rows, bfloat16 weights; empty for none"
    )
    parser.add_argument("--four-bit", default="131072x1", help="the same with weights of 4 bits")
    parser.add_argument("--prefill", default="32768", help="tokens of prompts; empty for none")
    parser.add_argument("--bits", default="2", help="budgets of the spectral caches")
    parser.add_argument("--layers", type=int, default=LLAMA_8B["num_hidden_layers"])
    parser.add_argument("--steps", type=int, default=STEPS, help="decode steps that count")
    parser.add_argument("--small", action="store_true", help="a small shape, to try this script on a CPU")
    parser.add_argument("--again", action="store_true", help="measure what was measured before, too")
    parser.add_argument("--out", type=pathlib.Path, default=measure.RESULTS / "speed.json")
    args = parser.parse_args()
    args.bits = [float(b) for b in args.bits.split(",")]
    config = (SMALL if args.small else LLAMA_8B) | {"num_hidden_layers": args.layers}
    shape = "small" if args.small else "Llama-3.1-8B"
    results = measure.Results(args.out, {"shape": shape, "layers": args.layers, "bits": args.bits, "steps": args.steps})
    if args.again:
        results.cells = {}
    with intercept.dispatching():
        measure_all(args, results, config)
    print(json.dumps({"written": args.out.name, "cells": list(results.cells)}))


if __name__ == "__main__":
    main()
