"""Writes the tables of README.md between their markers, from benchmarks/results/*.json: nobody types a number.

python benchmarks/report.py [--check]
"""

import argparse
import json
import pathlib
import re
from typing import Any

import quality_tables
import speed_tables

HERE = pathlib.Path(__file__).resolve().parent
README = HERE.parent / "README.md"
RESULTS = HERE / "results"


def memory(result: dict[str, Any]) -> str:
    """Bytes of each cache by context, and the context from which it pays with its codec."""
    contexts = [str(n) for n in result["contexts"]]
    full = {n: result["held"]["full precision"][n]["nbytes"] for n in contexts}
    lines = [
        "tiny-llama, fp16, bytes of the cache's arrays (window, sinks, reserved room; share of full precision):",
        "",
        "| cache | " + " | ".join(f"{int(n):,} tokens" for n in contexts) + " | pays from | decode peak above active |",
        "|---|" + "---|" * (len(contexts) + 2),
    ]
    for name, rows in result["held"].items():
        shown = [f"{rows[n]['nbytes']:,} ({rows[n]['nbytes'] / full[n]:.3f})" for n in contexts]
        codec = rows[contexts[-1]].get("codec_bytes", 0)
        pays = "" if name == "full precision" else f"{break_even(rows, full, contexts, codec):,} tokens"
        peak = result["decode"][name]["peak_minus_active"]
        lines.append(f"| {name} | " + " | ".join(shown) + f" | {pays} | {peak:,} |")
    codecs = {n: r[contexts[-1]]["codec_bytes"] for n, r in result["held"].items() if n != "full precision"}
    shown = [f"{codecs[n]:,} ({n})" for n in codecs]
    worst = max(abs(r["active_bytes"] / r["nbytes"] - 1) for rows in result["held"].values() for r in rows.values())
    lines += [
        "",
        f'The codec itself, once per model whatever the context: {", ".join(shown)} bytes; "pays from" counts it. '
        f"Active memory grew by the same bytes within {worst:.1%}.",
    ]
    return "\n".join(lines)


def kernel(result: dict[str, Any]) -> str:
    """Times of attention on codes, beside those of MLX's own."""
    lines = [
        f"{result['machine']['device']}, shape of Llama-3.1-8B, microseconds of a layer's attention for one new token "
        "(without the time in which Python builds its graph), medians of runs by turns, and of their ratios. They wait "
        "for nothing, and begin while those before them end; in turn, each waits for the result of the one before, as "
        "the layers of a model do:",
        "",
        "| context, batch | bits | MLX's attention, bfloat16 | on codes | times as fast | in turn, bfloat16 | "
        "in turn, on codes | times as fast | the splits alone | share of the copy rate |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        lines.append(
            f"| {row['tokens']:,}, {row['batch']} | {row['bits']:g} | {row['full_us']:.0f} | {row['whole_us']:.0f} | "
            f"{row['times_as_fast']:.2f} | {row['in_turn_full_us']:.0f} | {row['in_turn_whole_us']:.0f} | "
            f"{row['in_turn_times_as_fast']:.2f} | {row['attend_us']:.0f} | {row['share_of_copy_rate']:.1%} |"
        )
    lines += [
        "",
        f"First use, compiling included: {result['first_use_s']:.1f} s; in processes after it, which find the kernels "
        f"compiled, {result['next_process_s']:.1f} s.",
    ]
    return "\n".join(lines)


def attention_cpu(result: dict[str, Any]) -> str:
    """Attention on codes on a CPU beside MLX's own, what its parts take, and a whole step."""
    cores = result["cores"]
    lines = [
        f"CPU of {cores} cores, MLX {result['machine']['mlx']} with the BLAS of its wheel, shape of Llama-3.1-8B, a "
        "layer's attention for one new token, and how many times as fast as MLX's attention in bfloat16 (on one core):",
        "",
        f"| context | bits | MLX's, bfloat16 | on codes, one core | on codes, {cores} cores | cores busy then |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        own = [f"{row[f'{n}_ms']:.0f} ms ({row[f'{n}_ratio']:.2f} x)" for n in ("one_core", "all_cores")]
        lines.append(
            f"| {row['tokens']:,} | {row['bits']:g} | {row['full_ms']:.0f} ms | {own[0]} | {own[1]} | "
            f"{row['all_cores_busy']:.1f} |"
        )
    parts = ", ".join(f"{name} {ns:.1f}" for name, ns in result["parts_ns"].items())
    steps = ", ".join(
        f"{r['spectral_ms']:.1f} ms at {r['bits']:g} ({r['full_ms']:.1f} in full precision)" for r in result["steps"]
    )
    lines += [
        "",
        f"Nanoseconds per cached number on one core, at 2 bits: {parts}. A whole decode step of tiny-llama at "
        f"{result['step_context']:,} tokens: {steps}.",
    ]
    return "\n".join(lines)


def models(result: dict[str, Any]) -> str:
    """The sweep over model modules, by class."""
    rows = result["models"]
    measured = {name.split(" ")[0] for name, r in rows.items() if "4 bits" in r}
    lines = [
        f"Small random models of {len(measured)} of mlx-lm {result['mlx_lm']}'s modules, {sum(result['pieces'])} "
        f"tokens in pieces, window {result['window']}; differences in units of the logits' spread, KL in nats:",
        "",
        "| kind | models | lossless: largest difference | 4 bits: median KL | largest | 0.5 bits: median KL |",
        "|---|---|---|---|---|---|",
    ]
    for kind, c in result["classes"].items():
        if "median KL at 4 bits" not in c:
            lines.append(f"| {kind} | {c['models']} | nothing to pack | | | |")
            continue
        names = "median KL at 4 bits", "largest KL at 4 bits", "median KL at 0.5 bits"
        shown = [f"{c[n]:.5f}" for n in names]
        lines.append(f"| {kind} | {c['models']} | {c['largest lossless difference']:.1e} | " + " | ".join(shown) + " |")
    failed = [f"{name} ({r['error'].removesuffix('.')})" for name, r in rows.items() if "error" in r]
    return "\n".join(lines) + (f"\n\nNot run here: {', '.join(failed)}." if failed else "")


def speculative(result: dict[str, Any]) -> str:
    """Texts with a draft model, and distributions under the appends and trims of speculation."""
    drafts = list(dict.fromkeys(r["draft"] for r in result["texts"]))
    guessed = [
        f'the draft "{d}" gave {min(s):.1%} to {max(s):.1%} of the tokens'
        for d in drafts
        if (s := [r["from_draft"] for r in result["texts"] if r["draft"] == d])
    ]
    lines = [
        f"{result['model']}, temperature 0, {result['guesses']} guesses a round, window {result['window']}; "
        f"{' and '.join(guessed)}. Equal tokens place by place, mean KL in nats:",
        "",
        "| cache | "
        + " | ".join(f'draft "{d}": equal to the same cache without a draft' for d in drafts)
        + " | equal to full precision, with each draft; without | KL to full precision, a token at a time "
        "| with rounds of guesses trimmed off | with long runs trimmed off, too |",
        "|---|" + "---|" * (len(drafts) + 4),
    ]
    for name in dict.fromkeys(r["cache"] for r in result["distributions"]):
        rows = [r for r in result["texts"] if r["cache"] == name]
        shares = [r["equal_to_full_precision"] for r in rows]
        alone = rows[0]["equal_to_full_precision_without_draft"]
        kl = {r["pattern"]: r for r in result["distributions"] if r["cache"] == name}
        values = [kl["window"]["kl_to_full_precision_without_trims"]]
        values += [kl[pattern]["kl_to_full_precision"] for pattern in ("window", "codes")]
        cells = [f"{r['equal_to_same_cache']:.1%}" for r in rows]
        cells += [", ".join(f"{s:.1%}" for s in shares) + f"; without {alone:.1%}"]
        lines.append(f"| {name} | " + " | ".join([*cells, *(f"{max(v, 0.0):.5f}" for v in values)]) + " |")
    between = [r for r in result["distributions"] if r["pattern"] == "window" and r["cache"] != "lossless"]
    shares = [r["kl_to_same_cache"] / r["kl_to_full_precision_without_trims"] for r in between]
    return "\n".join(lines) + (
        f"\n\nBetween a cache with rounds and the same one without, KL is at most {max(shares):.1%} of the codec's. "
        f"A long run is {result['long_run']} tokens, more than window and lag ({result['window']} + {result['lag']}): "
        "once it is gone, the newest tokens are read from codes, which nothing but such a cut asks of a codec."
    )


def hardening(fuzz: dict[str, Any], operations: dict[str, Any], kills: dict[str, Any]) -> str:
    """What was tried to break, how often, and what is left."""
    rows = [
        (
            f"{fuzz['cases']:,} damaged files",
            f"{fuzz['crashes']} crashes, {fuzz['hangs']} hangs, a peak of memory raised by "
            f"{fuzz['largest_growth_bytes'] / 2**20:.0f} MB at most",
            fuzz,
        ),
        (
            f"{operations['sequences']:,} random sequences of cache operations",
            f"{operations['operations']:,} operations, each compared with mlx-lm's class",
            operations,
        ),
        (
            f"{kills['kills']:,} writers killed",
            f"{kills['kills_that_left_a_temporary']:,} of them half-way through a file",
            kills,
        ),
    ]
    lines = ["| tried | seen | seed | findings left |", "|---|---|---|---|"]
    lines += [f"| {tried} | {seen} | {r['seed']} | {r['number_of_findings']} |" for tried, seen, r in rows]
    return "\n".join(lines)


def break_even(rows: dict[str, Any], full: dict[str, int], contexts: list[str], codec: int) -> int:
    """The context at which cache and codec are as large as KVCache, on the line through the two longest contexts."""
    a, b = (int(n) for n in contexts[-2:])
    slope = (rows[contexts[-1]]["nbytes"] - rows[contexts[-2]]["nbytes"]) / (b - a)
    start = rows[contexts[-1]]["nbytes"] - slope * b + codec
    return round(start / (full[contexts[-1]] / b - slope))


def _results(pattern: str) -> list[dict[str, Any]]:
    """Results by model, the smallest first, then by name."""
    read = [json.loads(f.read_text()) for f in sorted(RESULTS.glob(pattern))]
    return sorted(read, key=lambda r: ("tiny" not in r["model"], r["model"], r.get("mode", ""), r.get("context", 0)))


def _result(name: str) -> dict[str, Any] | None:
    """One result; None where it was not measured yet."""
    file = RESULTS / f"{name}.json"
    return json.loads(file.read_text()) if file.exists() else None


def _shortest(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [r for r in results if r["context"] == min(s["context"] for s in results)]


def tables() -> dict[str, str]:
    """Marker -> table."""
    quality = _results("quality-*.json")
    decode = [r for r in quality if r["mode"] == "decode"]
    broken = [json.loads((RESULTS / f"{n}.json").read_text()) for n in ("fuzz", "random-operations", "kill")]
    held = json.loads((RESULTS / "memory.json").read_text())
    return {
        "hardening": hardening(*broken),
        "gains": quality_tables.gains(decode, held),
        "default": quality_tables.default_budget(decode),
        "quality": "\n\n".join(
            [quality_tables.by_domain(r) for r in _shortest(decode)]
            + [f(quality) for f in (quality_tables.summary, quality_tables.targets)]
            + [quality_tables.predictions(quality)]
            + [quality_tables.held_out(found) for found in _results("prediction-*.json")]
            + [quality_tables.rings(found) for found in [_results("rings-*.json")] if found]
        ),
        "recall": quality_tables.recall(_results("recall-*.json")),
        "drift": quality_tables.drift(_results("drift-*.json")),
        "outliers": quality_tables.outliers(_results("outliers-*.json")),
        "calibration": quality_tables.calibrations(_results("calibration-*.json")),
        "models": models(json.loads((RESULTS / "models.json").read_text())),
        "kernel": "\n\n".join(
            kernel(json.loads((RESULTS / f"{n}.json").read_text())) for n in ("kernel", "kernel-h100")
        ),
        "attention-cpu": attention_cpu(json.loads((RESULTS / "attention-cpu.json").read_text())),
        "speculative": speculative(json.loads((RESULTS / "speculative.json").read_text())),
        "memory": memory(held),
        "roofline": speed_tables.roofline(json.loads((RESULTS / "roofline.json").read_text())),
        "speed": speed_tables.speed(_result("speed"), _result("speed-h100")),
        "long-run": speed_tables.long_run(_result("long-run")),
    }


def main() -> None:
    """Write the tables; with --check, fail when README.md is not what they would make."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    if not args.check:
        decode = [r for r in _results("quality-*.json") if r["mode"] == "decode"]
        quality_tables.plot(_shortest(decode), RESULTS / "quality.png")
    old = new = README.read_text("utf-8")
    for marker, table in tables().items():
        pattern = rf"(<!-- {marker} -->\n).*?(<!-- /{marker} -->)"
        new = re.sub(pattern, lambda m, t=table: f"{m[1]}{t}\n{m[2]}", new, flags=re.DOTALL)
    if args.check and new != old:
        raise SystemExit("README.md differs from benchmarks/results; expected its tables; run benchmarks/report.py.")
    README.write_text(new, "utf-8")


if __name__ == "__main__":
    main()
