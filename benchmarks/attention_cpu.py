"""How long does attention on the codes take on a CPU, beside mx.fast.scaled_dot_product_attention in bfloat16?

    python benchmarks/attention_cpu.py

Shape of Llama-3.1-8B (32 query heads, 8 KV heads of 128), random codes, one query. Every round times full precision and
the codes, on one core and on all, one after the other: only ratios within a round are compared, and medians over
rounds told. Besides, what the parts of the work take, and a decode step of tiny-llama. Needs a machine that does
nothing else, and MLX's own BLAS.
"""

import argparse
import statistics
import time
import warnings
from collections.abc import Callable
from typing import Any

import measure
import mlx.core as mx
import mlx_lm
from kernel import DIMS, EXACT, GROUP, HEADS, snapshots
from memory import fill
from mlx_lm.models.cache import trim_prompt_cache
from tqdm import tqdm

from vq_kvcache import SpectralKVCache, attention, make_prompt_cache
from vq_kvcache.demo import model_folder
from vq_kvcache.hooks import own_caches
from vq_kvcache.spectral.intercept import dispatching
from vq_kvcache.storage import Snapshot

CONTEXTS = (2048, 8192, 32768)
STEP_CONTEXT = 4080  # tokens of tiny-llama, which was trained on 4,096
CHAIN = 8  # times that a part is run for one measurement, each waiting for the one before


def milliseconds(call: Callable[[], Any]) -> float:
    """Time of one evaluation."""
    start = time.perf_counter()
    mx.eval(call())
    return (time.perf_counter() - start) * 1e3


def in_rounds(calls: dict[str, Callable[[], Any]], rounds: int, progress: Any) -> dict[str, list[float]]:
    """Milliseconds of each call in each round; one round before them is not counted."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for i in range(rounds + 1):
        for name, call in calls.items():
            taken = milliseconds(call)
            if i:
                times[name].append(taken)
        progress.update()
    return times


def ratio(times: dict[str, list[float]], name: str) -> float:
    """How many times as fast as full precision, the median over rounds."""
    return statistics.median(full / own for full, own in zip(times["full"], times[name], strict=True))


def cores_busy(call: Callable[[], Any]) -> float:
    """Cores that it kept busy on the average: fewer than there are where other processes ran, too."""
    wall, processor = time.perf_counter(), time.process_time()
    for _ in range(3):
        mx.eval(call())
    return (time.process_time() - processor) / (time.perf_counter() - wall)


def on_cores(cores: int, call: Callable[[], mx.array]) -> Callable[[], mx.array]:
    """`call` with heads on at most so many cores."""

    def limited() -> mx.array:
        held, attention.CORES = attention.CORES, cores
        try:
            return call()
        finally:
            attention.CORES = held

    return limited


def attention_rows(bits: list[float], rounds: int, progress: Any) -> list[dict[str, Any]]:
    """One layer's attention for one new token, at every context and budget."""
    rows, scale = [], DIMS**-0.5
    queries = mx.random.normal((1, HEADS * GROUP, 1, DIMS)).astype(mx.bfloat16)
    for tokens in CONTEXTS:
        shape = (1, HEADS, tokens, DIMS)
        keys, values = (mx.random.normal(shape).astype(mx.bfloat16) for _ in range(2))
        mx.eval(queries, keys, values)
        for b in bits:
            (held,) = snapshots(tokens, 1, b, 1)
            mx.clear_cache()

            def codes(held: Snapshot = held) -> mx.array:
                return attention.attend(held, queries, scale)

            calls = {
                "full": lambda k=keys, v=values: mx.fast.scaled_dot_product_attention(queries, k, v, scale=scale),
                "one core": on_cores(1, codes),
                "all cores": on_cores(attention.CORES, codes),
            }
            times = in_rounds(calls, rounds, progress)
            rows.append(
                {"tokens": tokens, "bits": b, "full_ms": statistics.median(times["full"])}
                | {"all_cores_busy": cores_busy(calls["all cores"])}
                | {f"{n.replace(' ', '_')}_ms": statistics.median(times[n]) for n in ("one core", "all cores")}
                | {f"{n.replace(' ', '_')}_ratio": ratio(times, n) for n in ("one core", "all cores")}
            )
    return rows


def chained(step: Callable[[mx.array], mx.array], start: mx.array) -> Callable[[], mx.array]:
    """CHAIN runs of `step`, each on `start` once the last one is done."""

    def run() -> mx.array:
        result = step(start)
        for _ in range(CHAIN - 1):
            result = step(mx.depends([start], [result])[0])
        return result

    return run


def parts(bits: float, rounds: int, progress: Any) -> dict[str, float]:
    """Nanoseconds per cached number on one core: a head's codes to levels, and its products with GROUP queries."""
    (held,) = snapshots(CONTEXTS[1], 1, bits, 1)
    quantizer = held.key_quantizer
    tokens = attention._tile_tokens(held, mx.zeros((1, GROUP, DIMS)), 1)
    words = mx.contiguous(held.words(0, tokens)[0])
    levels = mx.contiguous(quantizer.decode_head(words, 0))
    queries, weights = mx.random.normal((1, GROUP, levels.shape[1])), mx.random.uniform(shape=(1, GROUP, tokens))
    mx.eval(words, levels, queries, weights)
    mx.clear_cache()
    calls = {
        "levels": chained(lambda w: quantizer.decode_head(w, 0), words),
        "scores": chained(lambda q: q @ levels, queries),
        "levels and scores": chained(lambda q: quantizer.head_scores(q, words, 0), queries),
        "levels and weighted sum": chained(lambda w: quantizer.head_sums(w, words, 0), weights),
    }
    times = in_rounds(calls, rounds, progress)
    return {name: statistics.median(t) * 1e6 / CHAIN / levels.size for name, t in times.items()}


def decode_step(bits: list[float], rounds: int, progress: Any) -> list[dict[str, Any]]:
    """A whole decode step of tiny-llama, milliseconds."""
    model, tokenizer = mlx_lm.load(str(model_folder()))[:2]
    rows = []
    for b in bits:
        choice = SpectralKVCache.with_options(bits_per_value=b)
        kinds = {"full": own_caches(model), "spectral": make_prompt_cache(model, cache=choice, tokenizer=tokenizer)}

        def step(caches: list[Any]) -> mx.array:
            logits = model(mx.array([[7]]), cache=caches)
            mx.eval(logits)
            trim_prompt_cache(caches, 1)
            return logits

        with dispatching():
            for caches in kinds.values():
                fill(model, caches, STEP_CONTEXT)
            times = in_rounds({n: lambda c=c: step(c) for n, c in kinds.items()}, rounds, progress)
        medians = {f"{n}_ms": statistics.median(t) for n, t in times.items()}
        rows.append({"bits": b, "ratio": ratio(times, "spectral")} | medians)
    return rows


def main() -> None:
    """Measure, and write results/attention-cpu.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", default="1,2,3,4")
    parser.add_argument("--rounds", type=int, default=15)
    args = parser.parse_args()
    if mx.default_device() == mx.gpu:
        mx.set_default_device(mx.cpu)
    bits = [float(b) for b in args.bits.split(",")]
    warnings.simplefilter("ignore")  # random numbers are unlike any text's, and take as long
    rounds = args.rounds + 1
    with tqdm(total=rounds * (len(CONTEXTS) * len(bits) + 1 + len(bits)), unit="round") as progress:
        rows = attention_rows(bits, args.rounds, progress)
        result = {
            "cores": attention.CORES, "exact_tokens": EXACT, "step_context": STEP_CONTEXT, "rows": rows,
            "parts_ns": parts(2.0, args.rounds, progress), "steps": decode_step(bits, args.rounds, progress),
        }  # fmt: skip
    for row in rows:
        print(row)
    print(result["parts_ns"], result["steps"])
    measure.save(measure.RESULTS / "attention-cpu.json", result)


if __name__ == "__main__":
    main()
