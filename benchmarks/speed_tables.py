"""Tables of whole steps, of long runs and of what Macs are predicted to do, from their JSON files (report.py puts them
into README)."""

import hashlib
import pathlib
import statistics
from collections.abc import Iterable
from typing import Any

KERNELS = pathlib.Path(__file__).resolve().parent.parent / "vq_kvcache" / "kernels"
Result = dict[str, Any]


def rows_of(cell: Result) -> dict[str, Result]:
    """The caches that a cell has figures of."""
    return {kind: row for kind, row in cell.items() if kind != "error"}


def _is_spectral(kind: str) -> bool:
    return kind.startswith("spectral")


def _gigabytes(count: float) -> str:
    return f"{count / 1e9:.2f} GB"


def _decode_cells(result: Result) -> dict[str, dict[str, Result]]:
    """What was decoded, "context, rows, weights", and the caches that it was decoded with."""
    found = {}
    for name, cell in result["cells"].items():
        action, weights, shape = name.split(" ", 2)
        if action == "decode":
            tokens, batch = shape.split("x")[:2]
            found[f"{int(tokens):,}, {batch}, {weights}"] = rows_of(cell)
    return found


def _times_as_fast(rows: dict[str, Result], kind: str) -> str:
    """Against the fastest of mlx-lm's own caches that took turns with this one, round by round, and against one that
    ran alone where that was faster; nothing for mlx-lm's, and where none ran."""
    if not _is_spectral(kind):
        return ""
    ours, told = rows[kind], []
    own = {k: row for k, row in rows.items() if not _is_spectral(k)}
    beside = min((own[k] for k in own if k in ours.get("turns_with", [])), key=_median, default=None)
    fastest = min(own.values(), key=_median, default=None)
    if beside:
        ratios = [a / b for a, b in zip(beside["turns_ms"], ours["turns_ms"], strict=True)]
        told.append(f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})")
    if fastest and fastest is not beside:
        told.append(f"{'alone ' if beside else ''}{_median(fastest) / _median(ours):.2f}")
    return "; ".join(told)


def _median(row: Result) -> float:
    return float(row["median_ms"])


def decoding(result: Result) -> str:
    """Whole decode steps: time, against the fastest of mlx-lm's own caches of the same run, and what packing takes."""
    cells = _decode_cells(result)
    by_turns = any(row.get("turns_with") for rows in cells.values() for row in rows.values())
    told = " by turns, times as fast: median of the rounds, least and most" if by_turns else ""
    lines = [
        f"Whole decode steps on {result['machine']['device']}, shape of {result['shape']} ({result['layers']} layers), "
        f"mlx-lm's own loop, {result['steps']} steps{told}:",
        "",
        "| context, rows, weights | cache | holds | median step | times mlx-lm's speed | Python, for its graph | "
        "packing, mean of a step | appending alone | peak above what it holds |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for shape, rows in cells.items():
        for kind, row in rows.items():
            packing = f"{row['packing_ms']:.2f} ms ({row['packing_ms'] / row['mean_ms']:.1%})"
            lines.append(
                f"| {shape} | {kind} | {_gigabytes(row['nbytes'])} | "
                f"{row['median_ms']:.2f} ms | {_times_as_fast(rows, kind)} | {row['build_ms']:.1f} ms | "
                f"{packing if _is_spectral(kind) else ''} | {row['append_ms']:.2f} ms | "
                f"{_gigabytes(row['steady_peak_above_nbytes'])} |"
            )
    return "\n".join(lines)


def prefill(result: Result) -> str:
    """Prompts: speed, peak and what is held afterwards."""
    lines = [
        "Prompts, read in mlx-lm's pieces of 2,048 tokens:",
        "",
        "| tokens | cache | tokens a second | peak above the weights | active at the end | nbytes and codec |",
        "|---|---|---|---|---|---|",
    ]
    for name, cell in result["cells"].items():
        if not name.startswith("prefill"):
            continue
        for kind, row in rows_of(cell).items():
            told = [row["peak_above_weights"], row["active_above_weights"], row["nbytes"] + row["codec_bytes"]]
            shown = " | ".join(map(_gigabytes, told))
            lines.append(f"| {int(name.split()[-1]):,} | {kind} | {row['tokens_per_s']:,.0f} | {shown} |")
    return "\n".join(lines)


def speed(*results: Result | None) -> str:
    """All of speed.json, and of others like it; says so where there is none."""
    found = [result for result in results if result]
    if not found:
        return "Whole decode steps and prompts are not measured yet: `python benchmarks/speed.py` does, on an H100."
    parts = []
    for result in found:
        parts.append(decoding(result))
        if any(name.startswith("prefill") for name in result["cells"]):
            parts.append(prefill(result))
        failed = [f"{name}: {cell['error']}" for name, cell in result["cells"].items() if "error" in cell]
        parts += [f"Not run: {'; '.join(failed)}."] if failed else []
    return "\n\n".join(parts)


def long_run(result: Result | None) -> str:
    """What grows over many decode steps; says so where it was not measured."""
    if result is None:
        return "A long run is not measured yet: `python benchmarks/memory.py --long` does."
    block = result["block"]
    lines = [
        f"{result['steps']:,} decode steps of tiny-llama on {result['machine']['device']}, by {block:,}:",
        "",
        f"| cache | nbytes after the first {block:,}; all | active above nbytes, then | least and most on the way | "
        f"median step of the first {block:,}; of the last |",
        "|---|---|---|---|---|",
    ]
    for name, cell in result["cells"].items():
        if "blocks" not in cell:
            continue
        rows = cell["blocks"]
        above = [r["active_above_nbytes"] for r in rows]
        first, last = rows[0], rows[-1]
        lines.append(
            f"| {name} | {first['nbytes']:,}; {last['nbytes']:,} | {above[0]:,}; {above[-1]:,} | {min(above):,}; "
            f"{max(above):,} | {first['median_ms']:.2f} ms; {last['median_ms']:.2f} ms |"
        )
    return "\n".join(lines)


def kernel_text(files: Iterable[str]) -> dict[str, str]:
    """A hash of each of these files of the kernels: whether counts in them are of the text that is there."""
    return {name: hashlib.sha256((KERNELS / name).read_bytes()).hexdigest()[:12] for name in files}


def roofline(result: Result) -> str:
    """What Apple's chips are predicted to do, at 2 bits, and why."""
    shape, budgets = result["shape"], result["budgets"]
    chosen = budgets["2"]
    lines = [
        "**A prediction: nothing in this table was ever measured on a Mac.** A layer's attention for one new token, "
        f"shape of Llama-3.1-8B at {shape['tokens']:,} tokens, microseconds, from bytes, instructions counted in the "
        "kernel text and public figures of the chips (sources in `benchmarks/roofline.py`):",
        "",
        "| chip | bfloat16, its bytes alone | 2 bits, their bytes | instructions, every pipe full | with the "
        f"{shape['simd_groups']} SIMD groups that fit a core | a mended kernel, full |",
        "|---|---|---|---|---|---|",
    ]
    for chip, row in chosen["chips"].items():
        shown = [row[n] for n in ("bf16_bytes_us", "bytes_us", "full_us", "latency_us")]
        shown.append(chosen["chips_if_mended"][chip]["full_us"])
        lines.append(f"| {chip} | " + " | ".join(f"{x:,.0f}" for x in shown) + " |")
    counts = ", ".join(f"{b['decoding']['issued']:.1f} instructions at {bits}" for bits, b in budgets.items())
    now = [r["bf16_bytes_us"] / r[n] for n in ("latency_us", "full_us") for r in chosen["chips"].values()]
    mended = [r["bf16_bytes_us"] / r["full_us"] for r in chosen["chips_if_mended"].values()]
    stale = result["text"] != kernel_text(result["text"])
    lines += [
        "",
        f"So attention on codes of 2 bits should run at {min(now):.2f} to {max(now):.2f} times the speed of bfloat16. "
        f"Decoding a number takes {counts} bits, with those of values in {shape['passes']} passes for want of memory, "
        f"and the products {chosen['products']:.1f}, of values half of them for rows that {shape['group']} query heads "
        "leave empty. A kernel that decodes values in one pass, and without empty rows, could reach "
        f"{min(mended):.2f} to {max(mended):.2f} times that speed."
        + (" The kernel text has changed since it was counted." if stale else ""),
    ]
    return "\n".join(lines)
