"""What does the cache really hold? Its nbytes against MLX's active memory, and the peak of decoding.

    python benchmarks/memory.py
    python benchmarks/memory.py --long    # 10,000 decode steps with each cache: two minutes on a GPU

Layers of tiny-llama (6 layers, 2 KV heads of 64, fp16), filled through update_and_fetch; then 50 decode steps of
the model itself at 4,096 tokens. --long: does anything grow in a long run but what the cache says it holds? Steps of
mlx-lm's generate_step, far beyond the positions that the model was trained on, which only its text would show.
"""

import argparse
import itertools
import pathlib
import statistics
import time
from typing import Any

import measure
import mlx.core as mx
from mlx_lm.generate import generate_step
from mlx_lm.models.cache import KVCache

from vq_kvcache import SpectralKVCache, load, make_prompt_cache
from vq_kvcache.demo import model_folder
from vq_kvcache.measuring import active_bytes
from vq_kvcache.spectral import intercept

CONTEXTS = (512, 1024, 2048, 4096)
DECODE_STEPS = 50
WARM_STEPS = 256  # of a long run, before it: codes are read and written in them


def fill(model: Any, caches: list[Any], tokens: int) -> None:
    """Append random keys and values up to `tokens`, in prompt-sized pieces and, at the end, one by one."""
    args = model.args
    for cache in caches:
        while cache.offset < tokens:
            length = min(256, tokens - cache.offset - 8) if tokens - cache.offset > 8 else 1
            shape = (1, args.num_key_value_heads, length, args.head_dim)
            cache.update_and_fetch(mx.random.normal(shape, mx.float16), mx.random.normal(shape, mx.float16))
            mx.eval(cache.state)


def held(model: Any, choice: Any, tokens: int) -> dict[str, float]:
    """nbytes of the caches at `tokens`, and by how much active memory grew when they were filled."""
    start = active_bytes()
    caches = make_prompt_cache(model, cache=choice)
    before = active_bytes()
    fill(model, caches, tokens)
    row = {"nbytes": sum(c.nbytes for c in caches), "active_bytes": active_bytes() - before}
    row["codec_active_bytes"] = before - start  # of the first row: later ones share the codec
    if isinstance(caches[0], SpectralKVCache):
        stats = [c.stats() for c in caches]
        row |= {name: sum(s[name] for s in stats) for name in stats[0]}
    return row


def decode_peak(model: Any, choice: Any) -> dict[str, float]:
    """Peak minus active memory over decode steps at the longest context."""
    caches = make_prompt_cache(model, cache=choice)
    fill(model, caches, CONTEXTS[-1] - DECODE_STEPS)
    token = mx.array([[5]])
    mx.eval(model(token, cache=caches))
    active = active_bytes()
    mx.reset_peak_memory()
    for _ in range(DECODE_STEPS - 1):
        mx.eval(model(token, cache=caches), [c.state for c in caches])
    return {"peak_minus_active": mx.get_peak_memory() - active}


def long_run(model: Any, choice: Any, steps: int, block: int) -> list[dict[str, float]]:
    """Of each `block` of decode steps: tokens held at its end, their nbytes, by how much more active memory is above
    what it was before the caches, and the mean and median time of a step."""
    caches = make_prompt_cache(model, cache=choice)
    before, rows, times = active_bytes(), [], [time.perf_counter()]
    with intercept.dispatching():
        for _ in generate_step(mx.array([5]), model, max_tokens=steps, prompt_cache=caches):
            times.append(time.perf_counter())
            if len(times) <= block:
                continue
            above, nbytes = active_bytes() - before, sum(c.nbytes for c in caches)
            spans = [(b - a) * 1e3 for a, b in itertools.pairwise(times)]
            rows.append({"tokens": int(caches[0].offset), "nbytes": nbytes, "active_above_nbytes": above - nbytes,
                         "mean_ms": statistics.fmean(spans), "median_ms": statistics.median(spans)})  # fmt: skip
            print(rows[-1], flush=True)
            times = [time.perf_counter()]
    return rows


def measure_long_runs(model: Any, choices: dict[str, Any], steps: int, block: int, file: pathlib.Path) -> None:
    """A cell for each cache that is not in the file yet, after a short run that builds its kernels."""
    results = measure.Results(file, {"steps": steps, "block": block})

    def run(name: str, choice: Any) -> dict[str, list[dict[str, float]]]:
        long_run(model, choice, min(steps, WARM_STEPS), WARM_STEPS)
        return {name: long_run(model, choice, steps, block)}

    for name, choice in choices.items():
        results.cell(name, {"blocks": choice}, run)


def main() -> None:
    """Measure and write results/memory.json, or results/long-run.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--long", action="store_true", help="many decode steps of the model, in place of all else")
    parser.add_argument("--steps", type=int, default=10_000, help="of --long")
    parser.add_argument("--block", type=int, default=1_000, help="steps of --long that are one row")
    parser.add_argument("--out", type=pathlib.Path, help="of --long; default: results/long-run.json")
    args = parser.parse_args()
    if mx.default_device() == mx.cpu:  # on a GPU every buffer would be asked of the driver
        # MLX hands out freed buffers up to twice as large as asked for and counts them whole: without them, what is
        # counted is what is held.
        mx.set_cache_limit(0)
    model, _ = load(str(model_folder()))[:2]
    choices = {"full precision": KVCache}
    choices |= {f"spectral {b}": SpectralKVCache.with_options(bits_per_value=b) for b in (1.0, 2.0, 3.0, 4.0)}
    if args.long:
        chosen = {name: choices[name] for name in ("full precision", "spectral 2.0")}
        measure_long_runs(model, chosen, args.steps, args.block, args.out or measure.RESULTS / "long-run.json")
        return
    rows = {name: {str(n): held(model, choice, n) for n in CONTEXTS} for name, choice in choices.items()}
    peaks = {name: decode_peak(model, choice) for name, choice in choices.items()}
    measure.save(measure.RESULTS / "memory.json", {"contexts": CONTEXTS, "held": rows, "decode": peaks})
    for name, row in rows.items():
        print(name, {n: (r["nbytes"], round(r["active_bytes"] / r["nbytes"], 4)) for n, r in row.items()}, peaks[name])


if __name__ == "__main__":
    main()
