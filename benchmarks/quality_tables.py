"""Tables and plot of quality, recall and calibration, from their JSON files (report.py puts them into README)."""

import itertools
import math
import pathlib
from collections.abc import Iterable
from typing import Any

import bound
import numpy as np

SHOWN = (
    "spectral 1", "spectral 2", "spectral 3", "spectral 4", "random rotation 2", "random rotation 3",
    "random rotation 4", "mlx affine 3", "mlx affine 4", "mlx as shipped 4", "documented 4/1", "documented filled",
)  # fmt: skip
SUMMED = ("spectral 1", "spectral 2", "spectral 3", "random rotation 2", "random rotation 3", "mlx affine 3",
          "mlx affine 4", "mlx as shipped 4")  # fmt: skip
FEWEST_FOUND = 20  # tokens of planted facts for a share to mean something
LIKE_CALIBRATION = ("encyclopaedia", "factbook", "prose", "python")
# Method, what it is held against, the largest ratio of KL, geometric mean over domains.
TARGETS = (
    ("spectral 3", "mlx affine 4", 0.8), ("spectral 2", "mlx affine 3", 1.0), ("spectral 2", "random rotation 3", 0.7),
    ("spectral 1", "random rotation 2", 0.8), ("spectral 2", "mlx as shipped 4", 0.3),
)  # fmt: skip
Result = dict[str, Any]


def domains_of(result: Result) -> list[str]:
    """Names of the domains, in order."""
    return sorted({name.split("/", 1)[0] for name in result["cells"]})


def cells_of(result: Result, method: str) -> list[Result] | None:
    """The method's cells of every domain, or None where one is missing."""
    cells = [result["cells"].get(f"{domain}/{method}") for domain in domains_of(result)]
    return None if None in cells else cells


def mean_kl(result: Result, method: str) -> float | None:
    """Geometric mean over domains."""
    cells = cells_of(result, method)
    return cells and math.exp(sum(math.log(c["kl"]) for c in cells) / len(cells))


def by_domain(result: Result) -> str:
    """KL of every method on every domain, at one model, context and mode."""
    domains = domains_of(result)
    positions = [result["cells"][f"{d}/full precision"]["positions"] for d in domains]
    shown = {method: cells for method in SHOWN if (cells := cells_of(result, method)) is not None}
    errors = [(c["kl_standard_error"] or 0) / c["kl"] for cells in shown.values() for c in cells]
    lines = [
        f"**{result['model']}**, context {result['context']:,}, {result['mode']}, {result['machine']['device']}, at "
        f"least {min(positions):,} positions a domain: mean KL (top-1 agreement). Standard errors are "
        f"{np.median(errors):.0%} in the median and {max(errors):.0%} at most.",
        "",
        "| cache | true bits | " + " | ".join(domains) + " |",
        "|---|---|" + "---|" * len(domains),
    ]
    for method, cells in shown.items():
        bold = "**" if method.startswith("spectral") else ""
        row = [f"{c['kl']:.5f} ({c['top1']:.1%})" for c in cells]
        lines.append(f"| {bold}{method}{bold} | {cells[0]['true_bits']:.2f} | " + " | ".join(row) + " |")
    return "\n".join(lines)


def _name(result: Result) -> str:
    return f"{result['model']} {result['context']:,} {result['mode']}"


def summary(results: list[Result]) -> str:
    """Geometric means over domains, a row for each model, context and mode."""
    lines = [
        "KL, geometric mean over the domains, by model, context and mode:",
        "",
        "| | " + " | ".join(SUMMED) + " |",
        "|---|" + "---|" * len(SUMMED),
    ]
    for result in results:
        found = [mean_kl(result, method) for method in SUMMED]
        lines.append(f"| {_name(result)} | " + " | ".join("" if kl is None else f"{kl:.5f}" for kl in found) + " |")
    return "\n".join(lines)


def paired(a: list[Result], b: list[Result]) -> tuple[float, float]:
    """Geometric mean over domains of the ratio of mean KLs, and its standard error, texts paired."""
    logs, variance = [], 0.0
    for mine, theirs in zip(a, b, strict=True):
        ratio = mine["kl"] / theirs["kl"]
        residuals = [x - ratio * y for x, y in zip(mine["kl_by_text"], theirs["kl_by_text"], strict=True)]
        n = len(residuals)
        logs.append(math.log(ratio))
        variance += sum(r * r for r in residuals) / max(n * (n - 1), 1) / mine["kl"] ** 2
    ratio = math.exp(sum(logs) / len(logs))
    return ratio, ratio * math.sqrt(variance) / len(logs)


def targets(results: list[Result]) -> str:
    """Ratios of KL that must hold."""
    head = [f"{mine} : {theirs}" for mine, theirs, _ in TARGETS]
    lines = [
        "Ratio of KL, geometric mean over domains ± paired standard error (largest domain), and code's KL over prose's "
        "at 2 bits, against the same of random rotation 3:",
        "",
        "| | " + " | ".join([*head, "code : prose"]) + " |",
        "|---|" + "---|" * (len(head) + 1),
        "| aimed at | " + " | ".join([*(f"{limit:g}" for _, _, limit in TARGETS), "1.2"]) + " |",
    ]
    for result in results:
        shown = [_ratio(result, mine, theirs) for mine, theirs, _ in TARGETS]
        lines.append(f"| {_name(result)} | " + " | ".join([*shown, _code_ratio(result)]) + " |")
    return "\n".join(lines)


def _ratio(result: Result, mine: str, theirs: str) -> str:
    a, b = cells_of(result, mine), cells_of(result, theirs)
    if a is None or b is None:
        return ""
    ratio, error = paired(a, b)
    worst, domain = max((x["kl"] / y["kl"], d) for x, y, d in zip(a, b, domains_of(result), strict=True))
    return f"{ratio:.2f} ± {error:.2f} ({domain} {worst:.2f})"


def _code_ratio(result: Result) -> str:
    cells = result["cells"]
    names = [f"{d}/{m}" for m in ("spectral 2", "random rotation 3") for d in ("python", "prose")]
    if any(n not in cells for n in names):
        return ""
    ours, ours_prose, theirs, theirs_prose = (cells[n]["kl"] for n in names)
    return f"{ours / ours_prose / (theirs / theirs_prose):.2f}"


def predictions(results: list[Result]) -> str:
    """Predicted KL against the measured one, and the distance to the bound, at one model, context and mode each."""
    lines = [
        "Predicted KL over the one measured on domains like the calibration text "
        f"({', '.join(LIKE_CALIBRATION)}, mean), and in brackets the distance to the rate-distortion bound in bits "
        "(all domains), where it was measured:",
        "",
        "| | " + " | ".join(f"{bits} bits" for bits in results[0]["predicted_kl"]) + " |",
        "|---|" + "---|" * len(results[0]["predicted_kl"]),
    ]
    for result in results:
        curve = {float(b): kl for b in bound.BITS if (kl := mean_kl(result, f"bound {b:g}"))}
        shown = []
        for bits, predicted in result["predicted_kl"].items():
            cells = cells_of(result, f"spectral {bits}") or []
            found = [c["kl"] for c, d in zip(cells, domains_of(result), strict=False) if d in LIKE_CALIBRATION]
            above = _above(result, bits, curve)
            shown.append(f"{predicted * len(found) / sum(found):.2f}{above and f' ({above})'}" if found else "")
        lines.append(f"| {_name(result)} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def held_out(result: Result) -> str:
    """Predicted KL against the measured one on text that calibration left out, by window, budget and context."""
    rows = result["rows"]
    windows, bits, contexts = (sorted({r[name] for r in rows}) for name in ("window", "bits", "context"))
    errors = [r["standard_error"] / r["measured"] for r in rows]
    lines = [
        f"Predicted KL over the one measured on held-out text of the calibration's kind, {result['model']}, "
        f"{result['texts']} texts, at contexts of {', '.join(f'{c:,}' for c in contexts)} tokens; standard errors of "
        f"the measured one are {np.median(errors):.0%} in the median:",
        "",
        "| | " + " | ".join(f"{b:g} bits" for b in bits) + " |",
        "|---|" + "---|" * len(bits),
    ]
    ratio = {(r["window"], r["bits"], r["context"]): r["predicted"] / r["measured"] for r in rows}
    for window in windows:
        cells = [", ".join(f"{ratio[window, b, c]:.2f}" for c in contexts) for b in bits]
        lines.append(f"| window {window} | " + " | ".join(cells) + " |")
    spreads = {float(e): s for e, s in result["spread"].items()}
    told = ", ".join(f"{s:.2f} with {e:g}" for e, s in spreads.items())
    if min(spreads, key=lambda e: spreads[e]) != 2:
        raise ValueError(f"spreads are {told}; expected the least with 2, which sealing.far_mass takes; change it.")
    lines += ["", f"Standard deviation of the logarithm of these ratios by the exponent of the distance: {told}."]
    return "\n".join(lines)


def drift(results: list[Result]) -> str:
    """What the drift monitor reads on text like the calibration's and on other text, in one sentence a model."""
    told = []
    for result in results:
        found = {name: [x for row in rows for x in row] for name, rows in result["readings"].items()}
        held, limit = max(found.pop("held out")), result["limit"]
        if not held < limit:
            raise ValueError(
                f"held-out calibration text reads {held}; expected less than {limit}, the limit; raise it."
            )
        domains = {name: max(found[name]) for name in (*LIKE_CALIBRATION, "drama")}
        unlike = [f"{name} {min(x):.2f}" for name, x in found.items() if name not in domains]
        bits = result["bits"]
        told.append(
            f"It reads at most {held:.2f} on {result['model']}'s calibration texts where calibration left them out, at "
            f"most {max(domains.values()):.2f} on the domains above ({max(domains, key=lambda n: domains[n])}), and at "
            f"least on {', '.join(unlike)} ({result['tokens']:,} tokens, {min(bits):g} to {max(bits):g} bits)."
        )
    return "\n".join(told)


def _above(result: Result, bits: str, curve: dict[float, float]) -> str:
    kl = mean_kl(result, f"spectral {bits}")
    known = kl and len(curve) > 1 and float(bits) <= max(curve)
    return f"{float(bits) - bound.bits_at(kl, curve):.2f}" if known else ""


def rings(results: list[Result]) -> str:
    """Bits that rings save at equal KL, against codes that stand alone, on the same texts."""
    told = []
    for result in results:
        both = [{float(n.split()[-1]): kl for n in names if (kl := mean_kl(result, n))} for names in (
            [f"{kind} {b}" for b in result["predicted_kl"]] for kind in ("spectral", "scalar"))]  # fmt: skip
        saved = [f"{bound.bits_at(kl, both[1]) - b:.2f} at {b:g}" for b, kl in both[0].items()]
        told.append(f"{result['model']}: {', '.join(saved)}")
    return f"Bits that rings save at equal KL, against a codec of codes that stand alone: {'; '.join(told)} bits."


def recall(results: list[Result]) -> str:
    """Share of planted facts' tokens still right, by distance; not where full precision finds next to none."""
    lines = []
    for result in results:
        columns = {d: r for d, r in result["distances"].items() if r["found_at_full_precision"] >= FEWEST_FOUND}
        if not columns:
            continue
        head = [f"{int(d):,} back ({r['found_at_full_precision']} tokens)" for d, r in columns.items()]
        lines += ["", f"| {result['model']} | " + " | ".join(head) + " |", "|---|" + "---|" * len(head)]
        for method in next(iter(columns.values()))["still_right"]:
            if method == "full precision":
                continue
            shown = [f"{r['still_right'][method]:.1%}" for r in columns.values()]
            lines.append(f"| {method} | " + " | ".join(shown) + " |")
    return "\n".join(lines[1:])


def calibrations(results: list[Result]) -> str:
    """Time and peak memory of calibration."""
    lines = ["| model | device | sequences | seconds | peak, weights included |", "|---|---|---|---|---|"]
    for r in results:
        device, told = r["machine"]["device"], r["provenance"]
        shown = (
            f"{told['sequences']} of {told['sequence_length']:,} | {r['seconds']:.0f} | {r['peak_bytes'] / 1e9:.1f} GB"
        )
        lines.append(f"| {r['model']} | {device} | {shown} |")
    return "\n".join(lines)


def outliers(results: list[Result]) -> str:
    """What exact tokens save at their cost, in one sentence a model and budget."""
    lines = []
    for result in results:
        rows = result["rows"]
        for bits in sorted({r["bits"] for r in rows}):
            told = []
            for kind in ("alike", "unlike"):
                ways = [r for r in rows if (r["kind"], r["bits"]) == (kind, bits) and not r["way"].endswith("bits")]
                best = max(ways, key=lambda r: r["bits_for_this_kl"] - r["true_bits"])
                told.append(
                    f"{best['bits_for_this_kl'] - best['true_bits']:+.3f} bit on text {kind} the calibration's "
                    f"({best['way'].split()[0]}, {best['exact_share']:.2%} of the tokens)"
                )
            lines.append(f"{result['model']} at {bits:g} bits: {'; '.join(told)}.")
    return "Keeping the tokens that are coded worst exact saves, at its cost and at best, " + " ".join(lines)


def plot(results: Iterable[Result], file: pathlib.Path) -> None:
    """KL by true bits, geometric mean over domains, one panel for each result."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    chosen = list(results)
    figure, panels = pyplot.subplots(1, len(chosen), figsize=(5.5 * len(chosen), 4.5), squeeze=False)
    for panel, result in zip(panels[0], chosen, strict=True):
        names = dict.fromkeys(name.split("/", 1)[1] for name in result["cells"])
        for kind, group in itertools.groupby(sorted(names), key=lambda n: n.rsplit(" ", 1)[0]):
            if kind in ("full", "scalar"):
                continue
            points = sorted((c[0]["true_bits"], mean_kl(result, n)) for n in group if (c := cells_of(result, n)))
            panel.semilogy(*zip(*points, strict=True), "--" if kind == "bound" else "o-", label=kind)
        panel.set(title=f"{result['model']}, context {result['context']:,}", xlabel="true bits per number")
        panel.set_ylabel("mean KL to full precision, nats")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=110, metadata={"Software": None})


def gains(decode: list[Result], memory: dict[str, Any]) -> str:
    """What a newcomer wants to know first, of the default budget."""
    longest = str(max(memory["contexts"]))
    held = {name: rows[longest]["nbytes"] for name, rows in memory["held"].items()}
    lines = [
        f"At 2 bits the cache of tiny-llama takes {held['spectral 2.0'] / held['full precision']:.1%} of full "
        f"precision at {int(longest):,} tokens, exact window and reserved room included. KL to full precision, nats, "
        "geometric mean over five domains:",
        "",
        "| | this, 2 bits | mlx-lm's `--kv-bits 4` as shipped (4.5 true bits) | random rotation, 2 bits and a scale |",
        "|---|---|---|---|",
    ]
    for result in decode:
        cells = [mean_kl(result, m) for m in ("spectral 2", "mlx as shipped 4", "random rotation 2")]
        shown = " | ".join("" if kl is None else f"{kl:.4f}" for kl in cells)
        lines.append(f"| {result['model']}, {result['context']:,} tokens | {shown} |")
    return "\n".join(lines)


def default_budget(decode: list[Result]) -> str:
    """Why 2 bits: the fewest whole ones of which the sentence is true; ValueError where the figures say otherwise."""
    ratios: dict[int, list[float]] = {1: [], 2: []}
    for bits, found in ratios.items():
        for result in decode:
            mine, theirs = (mean_kl(result, m) for m in (f"spectral {bits}", "mlx affine 3"))
            assert mine is not None
            assert theirs is not None
            found.append(mine / theirs)
    if not max(ratios[2]) < 1 < max(ratios[1]):
        raise ValueError(f"ratios of KL are {ratios}; expected 2 bits to be the fewest below 1; give another reason.")
    top1 = [min(c["top1"] for r in decode for c in cells_of(r, f"spectral {bits}") or []) for bits in (1, 2)]
    return (
        "2 bits are the default because they are the fewest whole ones with which KL is below that of mlx-lm's affine "
        f"quantization to 3 bits, which stores 3.5, on both models at both contexts: {min(ratios[2]):.2f} to "
        f"{max(ratios[2]):.2f} of it (1 bit: {min(ratios[1]):.2f} to {max(ratios[1]):.2f}). The model's first choice "
        f"is then the same at {top1[1]:.1%} of the positions or more in every domain (1 bit: {top1[0]:.1%})."
    )
