"""How long does a whole decode step take, and reading a prompt, beside mlx-lm's own cache?

    python benchmarks/speed.py                                        # about four minutes on an H100
    python benchmarks/speed.py --decode 32768x8 --four-bit "" --prefill ""
    python benchmarks/speed.py --small --layers 2 --decode 512x1,512x2 --four-bit 512x1 --prefill 512  # on a CPU

Shape of Llama-3.1-8B with random weights, and a codec that nobody calibrated: time and bytes depend on neither. Caches
are filled through their own update_and_fetch, encoding included, and not by the model. One row is decoded by mlx-lm's
generate_step, several by the GenerationBatch of its server, both of which build a step while the last one runs. Hosts
change their speed within seconds, so kinds of caches that fit into memory together take turns of a block of steps, and
are compared within a round. mlx-lm's are timed alone as well, since nobody holds others beside them (BatchKVCache only
so: it does not fit beside others). A shape that is finished is saved, and not run again.
"""

import argparse
import copy
import dataclasses
import itertools
import json
import pathlib
import sys
import time
from collections.abc import Generator
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
WARM = 8 + 4 * BLOCK  # steps before the turns: what packs is compiled; the 8 keep packing away from a turn's ends
ROUNDS = 4  # turns of BLOCK steps that count: an even number, for a batch packs two blocks at a time
STEADY = 3  # of these, before mlx-lm's cache grows again, which it does every 256 tokens
IDLE = 2  # a turn's first intervals: the step built ahead of them has run in the meantime, so that the GPU waits
ALONE = ", alone"  # what took no turns, in names
Rows = dict[str, Any]
Turn = list[tuple[float, int]]  # a moment, and the codes held at it: before the first step, and behind each


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


def empty(kind: str, plan: Plan | None, model: Any, batch: int) -> list[Any]:
    """Caches of a kind for the model: spectral ones where there is a plan; of mlx-lm's own for a batch, those of its
    server, which mask padding, or "KVCache without padding"."""
    layers = range(len(model.layers))
    if plan is None:
        return [BatchKVCache([0] * batch) if kind.startswith("BatchKVCache") else KVCache() for _ in layers]
    caches = [SpectralKVCache(plan, i) if batch == 1 else BatchSpectralKVCache([0] * batch, plan, i) for i in layers]
    bare = intercept.attended_only(model, layers)  # as make_prompt_cache finds out
    for i, cache in enumerate(caches):
        cache.bare_handles = i in bare
    return caches


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


def decoding(model: Any, caches: list[Any], batch: int) -> Generator[None, None, None]:
    """Steps of mlx-lm's own loop, without end."""
    if batch == 1:
        for _ in generate_step(mx.array([5]), model, max_tokens=-1, prompt_cache=caches):
            yield
        return
    with mx.stream(generation_stream):
        rows = GenerationBatch(
            model, list(range(batch)), mx.array([5] * batch), caches, [[] for _ in range(batch)], [None] * batch,
            lambda logits: mx.argmax(logits, axis=-1), [], [StopSequences() for _ in range(batch)],
            [sys.maxsize] * batch,
        )  # fmt: skip
    while True:
        with mx.stream(generation_stream):
            rows.next()
        yield


def packed_tokens(cache: Any) -> int:
    """Columns of codes that a cache holds; 0 for mlx-lm's."""
    storage = getattr(cache, "_storage", None)
    return 0 if storage is None else int(storage.codes.tokens)


def by_sealing(turns: list[Turn]) -> Rows:
    """Milliseconds of a step: the median, the mean, the medians of each turn and of steps in which nothing was packed,
    and what packing adds to the last, in the mean.

    A step is built while the one before runs: packing is felt in the interval in which it appears and in two more, of
    the next turn, too; and a turn's first IDLE intervals are in no median. The mean and packing are of all intervals,
    so that no seal is lost; what the GPU ends between two turns, a step at most, is in neither.
    """
    spans = [np.diff([moment for moment, _ in turn]) * 1e3 for turn in turns]
    new = np.concatenate([np.diff([codes for _, codes in turn]) > 0 for turn in turns])
    felt = np.convolve(new, np.ones(3))[: len(new)] > 0
    steps, kept = np.concatenate(spans), np.concatenate([np.arange(len(s)) >= IDLE for s in spans])
    plain = float(np.median(steps[kept & ~felt]))
    return {
        "median_ms": float(np.median(steps[kept])), "mean_ms": float(steps.mean()), "seals": int(new.sum()),
        "plain_median_ms": plain, "packing_ms": float((steps - plain)[felt].sum() / len(steps)),
        "turns_ms": [float(np.median(s[IDLE:])) for s in spans],
    }  # fmt: skip


class Player:
    """Filled caches of a kind, and mlx-lm's loop with them, which is kept open while others have their turns."""

    def __init__(self, model: Any, config: Rows, kind: str, plan: Plan | None, tokens: int, batch: int) -> None:
        before, start = active_bytes(), time.perf_counter()
        self.caches = empty(kind, plan, model, batch)
        # mlx-lm's cache grows by copies of itself, so it gets all at once.
        fill(self.caches, config, tokens, batch, tokens if plan is None else PIECE)
        self.seconds, self.held = time.perf_counter() - start, active_bytes() - before
        self.loop = decoding(model, self.caches, batch)
        self.turns: list[Turn] = []
        self.above: list[int] = []

    def turn(self, count: int) -> None:
        """`count` steps, and their peak beyond its caches' nbytes and what others hold: only its own bytes change."""
        others = mx.get_active_memory() - self.held
        mx.reset_peak_memory()
        self.turns.append([(time.perf_counter(), packed_tokens(self.caches[0]))])
        for _ in itertools.islice(self.loop, count):
            self.turns[-1].append((time.perf_counter(), packed_tokens(self.caches[0])))
        mx.synchronize(generation_stream)  # the step that was built ahead must not run in another's turn
        self.held = mx.get_active_memory() - others
        self.above.append(mx.get_peak_memory() - others - sum(cache.nbytes for cache in self.caches))

    def row(self) -> Rows:
        """Of all turns behind the first, which warmed up; the loop ends, for a step's arrays are not the caches'."""
        others, above = active_bytes() - self.held, self.above[1:]
        self.loop.close()
        return by_sealing(self.turns[1:]) | {
            "steps": BLOCK * len(above), "steady_steps": BLOCK * len(above[:STEADY]),
            "steady_peak_above_nbytes": max(above[:STEADY]), "peak_above_nbytes": max(above), "fill_s": self.seconds,
            "nbytes": sum(cache.nbytes for cache in self.caches), "active_bytes": active_bytes() - others,
        }  # fmt: skip


def building(model: Any, caches: list[Any], batch: int) -> tuple[float, float]:
    """Milliseconds of Python for the graph of one step, and of MLX for sending it to the GPU: where the two together
    are as long as a step, the CPU is what is timed."""
    token, start = mx.array([[5]] * batch), time.perf_counter()
    logits = model(token, cache=caches)
    built = time.perf_counter()
    mx.async_eval(logits)  # type: ignore[no-untyped-call]
    sent = time.perf_counter()
    mx.eval(logits, [c.state for c in caches])
    return (built - start) * 1e3, (sent - built) * 1e3


def appending(caches: list[Any], config: dict[str, Any], batch: int, count: int) -> Rows:
    """Times of appending, and packing, a token to every layer without a model: Python and one wait a step included."""
    shape = (batch, config["num_key_value_heads"], 1, config["head_dim"])
    keys, values = (mx.random.normal(shape, mx.bfloat16) for _ in range(2))
    turn: Turn = []
    for i in range(WARM + count + 1):
        for cache in caches:
            cache.update_and_fetch(keys, values)
        mx.eval([cache.state for cache in caches])
        if i >= WARM:
            turn.append((time.perf_counter(), packed_tokens(caches[0])))
    return by_sealing([turn])


def decode_kinds(
    model: Any, config: dict[str, Any], kinds: dict[str, Plan | None], tokens: int, batch: int, rounds: int
) -> dict[str, Rows]:
    """A row of each kind: caches filled to `tokens`, decode steps by turns, then appends without the model."""
    players = {kind: Player(model, config, kind, plan, tokens, batch) for kind, plan in kinds.items()}
    for count in [WARM] + [BLOCK] * rounds:
        for player in players.values():
            player.turn(count)
    rows = {kind: player.row() | {"turns_with": [k for k in kinds if k != kind]} for kind, player in players.items()}
    steps_by_hand = [[building(model, player.caches, batch) for player in players.values()] for _ in range(8)]
    for (kind, player), (build, send) in zip(players.items(), np.median(steps_by_hand, axis=0).tolist(), strict=True):
        packing = appending(player.caches, config, batch, rounds * BLOCK)
        rows[kind] |= {"build_ms": build, "send_ms": send}
        rows[kind] |= {"append_ms": packing["plain_median_ms"], "pack_alone_ms": packing["packing_ms"]}
    return rows


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
    prompt(model, empty(kind, plan, model, 1), min(2 * piece, tokens), piece)
    before = active_bytes()
    caches = empty(kind, plan, model, 1)
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
            own = "KVCache" if batch == 1 else "KVCache without padding"
            groups = [{kind + ALONE: None} for kind in ([own] if batch == 1 else ["BatchKVCache", own])]
            groups.append({own: None} | spectral)
            results.cell(
                f"decode {weights} {tokens}x{batch}",
                {"; ".join(kinds): kinds for kinds in groups},
                lambda _, kinds, t=tokens, b=batch: decode_kinds(model, config, kinds, t, b, args.rounds),
            )

    decode_cells("bf16", args.decode)
    for tokens in map(int, filter(None, args.prefill.split(","))):
        results.cell(
            f"prefill bf16 {tokens}",
            {"KVCache": None} | spectral,
            lambda kind, plan, t=tokens: {kind: prefill_kind(model, config, kind, plan, t)},
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
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"turns of each cache, of {BLOCK} decode steps")
    parser.add_argument("--small", action="store_true", help="a small shape, to try this script on a CPU")
    parser.add_argument("--again", action="store_true", help="measure what was measured before, too")
    parser.add_argument("--out", type=pathlib.Path, default=measure.RESULTS / "speed.json")
    args = parser.parse_args()
    args.bits = [float(b) for b in args.bits.split(",")]
    config = (SMALL if args.small else LLAMA_8B) | {"num_hidden_layers": args.layers}
    settings = {"layers": args.layers, "bits": args.bits, "steps": args.rounds * BLOCK}
    results = measure.Results(args.out, {"shape": "small" if args.small else "Llama-3.1-8B"} | settings)
    if args.again:
        results.cells = {}
    with intercept.dispatching():
        measure_all(args, results, config)
    print(json.dumps({"written": args.out.name, "cells": list(results.cells)}))


if __name__ == "__main__":
    main()
