"""How long does attention on the codes take on this GPU, beside mx.fast.scaled_dot_product_attention in bfloat16?

    python benchmarks/kernel.py

Shape of Llama-3.1-8B (32 query heads, 8 KV heads of 128), random codes, one query a row. Times are medians of seven
runs of 240 evaluations, by turns, and `times_as_fast` that of their ratios; without Python's building of their graphs:
while a model decodes, the graph of a step is built when the one before runs (speed.py tells how long that takes). That
many, because the GPU waits until the first graph of a run is sent, about 0.6 ms. Bytes are those of the codes (or of
bfloat16 keys and values), also as a share of what a copy of 2 GB moves. `attend` is the kernel on the codes alone,
`whole` with the merging of its splits. These wait for nothing, and begin while the ones before them end; `in_turn` has
each take the result of the one before as its queries, as the layers of a model do, and so counts every launch from its
beginning to its end.
"""

import argparse
import functools
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import measure
import mlx.core as mx
from tqdm import tqdm

from vq_kvcache import doctor, kernels
from vq_kvcache.chunks import Packed
from vq_kvcache.kernels import steps
from vq_kvcache.rows import rows_of
from vq_kvcache.storage import Snapshot

HEADS, GROUP, DIMS = 8, 4, 128
SHAPES = ((131072, 1), (32768, 8), (32768, 1), (8192, 1))  # tokens, batch
EXACT = 208
ROTATED_BYTES = 2e8  # inputs are rotated until they no longer fit a cache


Calls = Sequence[Callable[[mx.array], Any]]  # of queries


def microseconds(
    every: Sequence[Calls], queries: mx.array, in_turn: bool = False, count: int = 240, rounds: int = 7
) -> list[list[float]]:
    """Times of one call, in turn from `calls`, of each of `every`, which take turns: a GPU's clock is not the same from
    one second to the next. in_turn: whether a call takes the result of the one before."""
    mx.eval([call(queries) for calls in every for call in calls])
    times: list[list[float]] = [[] for _ in every]
    for _ in range(rounds):
        for own, calls in zip(times, every, strict=True):
            called = itertools.islice(itertools.cycle(calls), count)
            if in_turn:
                lazy = functools.reduce(lambda x, call: call(x), called, queries)
            else:
                lazy = [call(queries) for call in called]
            start = time.perf_counter()
            mx.eval(lazy)
            mx.synchronize()
            own.append((time.perf_counter() - start) / count * 1e6)
    return times


def copy_rate() -> float:
    """Bytes read and written per second by an elementwise operation on 2 GB."""
    x = mx.zeros((1 << 29,), mx.uint32)
    mx.eval(x)
    return 2 * x.nbytes / statistics.median(microseconds([[lambda y: y + 1]], x, count=6)[0]) * 1e6


def sets_of(nbytes: float) -> int:
    """How many inputs of so many bytes are rotated."""
    return int(ROTATED_BYTES // nbytes) + 1


def full_precision(tokens: int, batch: int) -> Calls:
    """MLX's own attention."""
    sets = sets_of(4 * batch * tokens * HEADS * DIMS)
    shape = (batch, HEADS, tokens, DIMS)
    held = [tuple(mx.random.normal(shape).astype(mx.bfloat16) for _ in range(2)) for _ in range(sets)]
    mx.eval(held)
    return [lambda q, k=k, v=v: mx.fast.scaled_dot_product_attention(q, k, v, scale=DIMS**-0.5) for k, v in held]


def snapshots(tokens: int, batch: int, bits: float, sets: int) -> list[Snapshot]:
    """Caches of random codes."""
    keys, values = (doctor.quantizer(DIMS, HEADS, bits, seed) for seed in (0, 1))
    packed = (tokens - EXACT) // 4 * 4
    shape = batch, keys.words + values.words, packed
    words = [mx.random.randint(0, 2**31, shape).astype(mx.uint32) for _ in range(sets)]
    exact = [mx.random.normal((batch, HEADS, 256, DIMS)).astype(mx.bfloat16) for _ in range(2)]
    mx.eval(words, exact)
    rows = rows_of((4,) * batch, (4,) * batch, EXACT, (packed,) * batch)
    return [Snapshot(exact[0], exact[1], Packed([(w, packed)]), rows, keys, values) for w in words]


def first_use(place: str) -> dict[str, Any]:
    """Seconds until a process knows that its kernels are right, and what is wrong with them."""
    mx.eval(mx.zeros(1) + 1)  # MLX's own start
    start = time.perf_counter()
    variant = place, DIMS, DIMS, mx.bfloat16
    program = steps.program_of(*(doctor.quantizer(DIMS, HEADS, 2.0, seed) for seed in (0, 1)), False, place)
    wrong = doctor.wrong_codes(place) or doctor.wrong_arrays(*variant) or doctor.first_wrong(*variant, program)
    return {"wrong": wrong, "seconds": time.perf_counter() - start}


def uses_by_processes() -> dict[str, Any]:
    """`first_use` in a process that finds nothing compiled, neither our kernels nor MLX's, and in one after it."""
    with tempfile.TemporaryDirectory() as folder:
        own = {"MLX_PTX_CACHE_DIR": folder, "CUDA_CACHE_PATH": folder}
        command = [sys.executable, __file__, "--first-use"]
        told = [
            json.loads(subprocess.run(command, env=os.environ | own, check=True, capture_output=True).stdout)
            for _ in range(2)
        ]
    wrong = told[0]["wrong"] or told[1]["wrong"]
    return {"wrong": wrong, "first_use_s": told[0]["seconds"], "next_process_s": told[1]["seconds"]}


def main() -> None:
    """Measure every shape and width, and write results/kernel.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bits", default="1,2,3,4")
    parser.add_argument("--first-use", action="store_true", help="only tell how long first use takes in this process")
    args = parser.parse_args()
    place, scale = kernels.backend(), DIMS**-0.5
    if place == "ops":
        raise SystemExit(f"no kernels on {mx.default_device()}; expected a GPU that has them; run this on one.")
    if args.first_use:
        print(json.dumps(first_use(place)))
        return
    uses, rate, rows = uses_by_processes(), copy_rate(), []
    bits = [float(b) for b in args.bits.split(",")]
    for tokens, batch in tqdm(SHAPES, unit="shape"):
        queries = mx.random.normal((batch, HEADS * GROUP, 1, DIMS)).astype(mx.bfloat16)
        full = full_precision(tokens, batch)
        for b in bits:
            held = snapshots(tokens, batch, b, sets_of(batch * tokens * HEADS * 2 * DIMS * b / 8))
            whole = [lambda q, h=h: doctor.attend_codes(h, q, scale, None, None, place) for h in held]
            launches = [steps.parts_launch(*steps.step(h, queries, scale, None, None, place)) for h in held]
            mx.eval([list(launch.inputs) for launch in launches])
            attend = [lambda _, x=launch: kernels.run(x, place) for launch in launches]
            apart = microseconds([full, whole, attend], queries)
            in_turn = microseconds([full, whole], queries, in_turn=True)
            row = {"tokens": tokens, "batch": batch, "bits": b}
            for way, times in (("", apart), ("in_turn_", in_turn)):
                names = ("full_us", "whole_us", "attend_us")[: len(times)]
                row |= {way + name: statistics.median(own) for name, own in zip(names, times, strict=True)}
                row[way + "times_as_fast"] = statistics.median(a / b for a, b in zip(*times[:2], strict=True))
            row["share_of_copy_rate"] = held[0].packed[0][0].nbytes / (row["attend_us"] * 1e-6) / rate
            rows.append(row)
    result = {**uses, "copy_bytes_per_s": rate, "rows": rows}
    measure.save(measure.RESULTS / "kernel.json", result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
