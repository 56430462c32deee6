"""Writes the tables of README.md between their markers, from benchmarks/results/*.json: nobody types a number.

python benchmarks/report.py [--check]
"""

import argparse
import json
import pathlib
import re
from typing import Any

HERE = pathlib.Path(__file__).resolve().parent
README = HERE.parent / "README.md"
RESULTS = HERE / "results"


def quality(result: dict[str, Any]) -> str:
    """KL by method and domain, of one model and context."""
    cells = result["cells"]
    domains = sorted({name.split("/", 1)[0] for name in cells})
    names = list(dict.fromkeys(name.split("/", 1)[1] for name in cells))
    positions = min(c["positions"] for c in cells.values())
    model = result["model"].removeprefix("quality-").rsplit("-", 1)[0]
    lines = [
        f"**{model}**, context {result['context']:,}, {positions:,} "
        "positions a domain; mean KL in nats (top-1 agreement), same exact window of 128 for all:",
        "",
        "| cache | true bits | " + " | ".join(domains) + " |",
        "|---|---|" + "---|" * len(domains),
    ]
    for name in names:
        if name == "full precision":
            continue
        row = [cells.get(f"{d}/{name}") for d in domains]
        if None in row:
            continue
        bold = "**" if name.startswith("spectral") else ""
        bits = row[0]["true_bits"]
        shown = [f"{c['kl']:.5f} ({c['top1']:.1%})" for c in row]
        lines.append(f"| {bold}{name}{bold} | {bits:.2f} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


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


def break_even(rows: dict[str, Any], full: dict[str, int], contexts: list[str], codec: int) -> int:
    """The context at which cache and codec are as large as KVCache, on the line through the two longest contexts."""
    a, b = (int(n) for n in contexts[-2:])
    slope = (rows[contexts[-1]]["nbytes"] - rows[contexts[-2]]["nbytes"]) / (b - a)
    start = rows[contexts[-1]]["nbytes"] - slope * b + codec
    return round(start / (full[contexts[-1]] / b - slope))


def tables() -> dict[str, str]:
    """Marker -> table."""
    files = sorted(RESULTS.glob("quality-*.json"), key=lambda f: "tiny" not in f.name)
    return {
        "quality": "\n\n".join(quality(json.loads(f.read_text())) for f in files),
        "memory": memory(json.loads((RESULTS / "memory.json").read_text())),
    }


def main() -> None:
    """Write the tables; with --check, fail when README.md is not what they would make."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    args = parser.parse_args()
    old = new = README.read_text("utf-8")
    for marker, table in tables().items():
        pattern = rf"(<!-- {marker} -->\n).*?(<!-- /{marker} -->)"
        new = re.sub(pattern, lambda m, t=table: f"{m[1]}{t}\n{m[2]}", new, flags=re.DOTALL)
    if args.check and new != old:
        raise SystemExit("README.md differs from benchmarks/results; expected its tables; run benchmarks/report.py.")
    README.write_text(new, "utf-8")


if __name__ == "__main__":
    main()
