"""The report of `vq_kvcache compare` as one HTML page: no script, nothing loaded, light and dark, narrow and wide."""

import decimal
import html
import importlib.resources
from collections.abc import Iterable, Sequence
from typing import Any

from . import report_figures as figures
from .drift import LIMIT
from .report_figures import Series

Report = dict[str, Any]
SECTIONS = {
    "summary": "Summary", "closeness": "How close the text stays", "texts": "The same prompt, continued",
    "memory": "Bytes and peak memory", "speed": "Speed", "fits": "Largest context", "spectra": "Spectra",
    "bits": "Where the bits go", "method": "How this was measured",
}  # fmt: skip
# The page may style itself and show its own empty icon, and nothing else.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


def page(report: Report) -> str:
    """The whole page, of a report that `compare.compare` made or that was read from its JSON."""
    style = (importlib.resources.files("vq_kvcache") / "data" / "report.css").read_text("utf-8")
    title = f"KV caches of {esc(report['model'])}"
    body = {
        "summary": summary(report), "closeness": closeness(report), "texts": texts(report), "memory": memory(report),
        "speed": speed(report), "fits": fits(report), "spectra": spectra(report), "bits": bits(report),
        "method": method(report),
    }  # fmt: skip
    links = "".join(f'<li><a href="#{name}">{words}</a></li>' for name, words in SECTIONS.items())
    sections = "\n".join(
        f'<section id="{name}" aria-labelledby="h-{name}"><h2 id="h-{name}">{SECTIONS[name]}</h2>{content}</section>'
        for name, content in body.items()
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<link rel="icon" href="data:,">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<header>
<h1>{title}</h1>
{lead(report)}
<nav aria-label="sections"><ul>{links}</ul></nav>
</header>
<main>
{sections}
</main>
<footer>
<p class="dim">Written by <code>vq_kvcache compare</code>. This page loads nothing and sends nothing.</p>
</footer>
</body>
</html>
"""


# -- small parts


def esc(words: Any) -> str:
    """Text for HTML, in elements and attributes."""
    return html.escape(str(words))


def table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table in a box that scrolls by itself; every cell is text, the first of each row its header."""
    head = "".join(f'<th scope="col">{esc(c)}</th>' for c in columns)
    body = "".join(
        f'<tr><th scope="row">{esc(first)}</th>{"".join(f"<td>{esc(cell)}</td>" for cell in rest)}</tr>'
        for first, *rest in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{esc(caption)}"><table><caption><span>'
        f"{esc(caption)}</span></caption><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def figure(image: str, caption: str) -> str:
    """An image with its caption."""
    return f"<figure>{image}<figcaption>{esc(caption)}</figcaption></figure>"


def size(count: float) -> str:
    """Bytes in words."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if abs(count) >= unit:
            return f"{count / unit:,.4g} {name}"
    return f"{count:.0f} bytes"


def number(value: float, digits: int = 3) -> str:
    """Significant digits, written out."""
    return f"{decimal.Decimal(f'{value:.{digits}g}'):f}"


def counted(count: int | str, word: str) -> str:
    """1 bit, 2 bits, spectral 1 bit."""
    return f"{count} {word}{'' if str(count).split()[-1] == '1' else 's'}"


def ratio(part: float, whole: float, digits: int) -> str:
    """1.5×; a dash where the whole is nothing."""
    return f"{part / whole:.{digits}f}×" if whole else "–"


def looks(report: Report) -> list[tuple[str, int]]:
    """Of each method the style and the shape of its line."""
    ours = iter(range(len(report["methods"])))
    styles = []
    for m in report["methods"]:
        i = -1 if m["kind"] != "spectral" else next(ours)
        styles.append((f"s{i % 4}", 2 + i) if i >= 0 else (m["kind"], 0 if m["kind"] == "full" else 1))
    return styles


def longest(report: Report) -> str:
    """The longest context, as a key of "held"."""
    return str(max(report["contexts"]))


def by_context(report: Report, field: str) -> list[Series]:
    """A line of each method over the contexts."""
    return [
        Series(m["name"], *look, [(c, m["held"][str(c)][field]) for c in sorted(report["contexts"])])
        for m, look in zip(report["methods"], looks(report), strict=True)
    ]


def chosen(report: Report) -> Report:
    """The spectral cache that the page speaks of first: the one nearest to 2 bits, the default."""
    ours = [m for m in report["methods"] if m["kind"] == "spectral"]
    found: Report = min(ours, key=lambda m: abs(m["bits"] - 2.0))
    return found


# -- sections


def lead(report: Report) -> str:
    """One sentence and four figures."""
    m, full, at = chosen(report), report["methods"][0], longest(report)
    share = m["held"][at]["nbytes"] / full["held"][at]["nbytes"]
    times = ratio(m["largest"]["tokens"], full["largest"]["tokens"], 1)
    tiles = (
        ("bytes of full precision", f"{share:.0%}", f"at {int(at):,} tokens, {esc(counted(m['name'], 'bit'))}"),
        ("mean KL", f"{number(m['kl'], 2)}", "nats a token, to full precision"),
        ("same top token", f"{m['top1']:.1%}", f"of {m['positions']:,} positions"),
        ("context that fits", times, "as long as with full precision"),
    )
    cells = "".join(f"<div><dt>{a}</dt><dd>{b}<small>{c}</small></dd></div>" for a, b, c in tiles)
    return (
        f'<p class="lead">Full precision, mlx-lm’s own quantized cache and the spectral cache, on '
        f"{esc(report['text']['source'])}. Measured on {device(report)}; what is predicted or "
        f'worked out from that says so.</p><dl class="tiles">{cells}</dl>'
    )


def device(report: Report) -> str:
    """What it ran on, in a sentence."""
    name = report["machine"]["device"]
    return "a CPU" if name == "CPU" else esc(name)


def summary(report: Report) -> str:
    """A row per cache."""
    at = longest(report)
    full = report["methods"][0]["held"][at]["nbytes"]
    rows = [
        (m["name"], f"{m['bits']:.2f}", number(m["kl"]), number(m["kl_999"]), f"{m['top1']:.1%}",
         f"{m['perplexity']:.3f}", size(m["held"][at]["nbytes"]), f"{m['held'][at]['nbytes'] / full:.3f}",
         f"{m['held'][at]['decode_tokens_per_second']:.1f}", f"{m['largest']['tokens']:,}")
        for m in report["methods"]
    ]  # fmt: skip
    columns = ("cache", "bits per number", "KL, mean", "KL, 99.9 %", "same top token", "perplexity",
               f"bytes at {int(at):,}", "share", "tokens/s", "largest context")  # fmt: skip
    missing = f"<p>mlx-lm’s own quantized cache is missing: {esc(report['missing'])}.</p>" if report["missing"] else ""
    return missing + table("All caches, same tokens, one run", columns, rows)


def closeness(report: Report) -> str:
    """KL against bytes, and the tail."""
    at = longest(report)
    shown = [pair for pair in zip(report["methods"], looks(report), strict=True) if pair[0]["kind"] != "full"]
    key, images = "", ""
    for field, words in (("kl", "Mean KL"), ("kl_999", "KL that 99.9 % of the positions stay below")):
        lines = [Series(m["name"], *look, [(m["held"][at]["nbytes"] / int(at), m[field])]) for m, look in shown]
        image = figures.chart(lines, f"{words} against bytes per token.", "bytes per token", "KL, nats", log_y=True)
        key = figures.legend(lines)
        images += figure(image, f"{words}, against bytes per token at {int(at):,} tokens.")
    rows = [
        (m["name"], f"{number(m['kl'])} ± {number(m['kl_standard_error'], 2)}", number(m["kl_999"]),
         f"{m['top1']:.2%}", f"{m['perplexity']:.3f}",
         f"{m['perplexity'] / report['methods'][0]['perplexity'] - 1:+.2%}", predicted(report, m), drift(m))
        for m in report["methods"]
    ]  # fmt: skip
    columns = ("cache", "KL, mean ± standard error", "KL, 99.9 %", "same top token", "perplexity", "against full",
               "KL, predicted by the codec", "unlike calibration")  # fmt: skip
    text = (
        "KL is that of the model’s next-token distribution from full precision’s, in nats: 0 is the same text, "
        "0.01 a difference that sampling hides. Lower and further left is better."
    )
    note = (
        "Predictions are for text like the calibration’s, for the same positions. The last column is cache.drift: the "
        "energy of keys’ and values’ coordinates, as a multiple of the calibration text’s, the largest of all layers; "
        f"above {LIMIT:g}, calibrate on text like yours."
    )
    return (f'<p>{text}</p>{key}<div class="charts">{images}</div>'
            + table("Closeness to full precision", columns, rows) + f'<p class="dim">{note}</p>')  # fmt: skip


def predicted(report: Report, m: Report) -> str:
    """The codec's own prediction for a spectral cache."""
    name = m["name"].removeprefix("spectral ")
    return number(report["predicted_kl"][name]) if name in report["predicted_kl"] else "–"


def drift(m: Report) -> str:
    """How unlike the calibration's the text is."""
    found = m["drift"]
    return "–" if found is None else f"{found['energy']:.2f}"


def texts(report: Report) -> str:
    """Continuations side by side, with differences marked by background, line and, unseen, words."""
    prompt = report["prompt"]
    cards = []
    for m, (style, _) in zip(report["methods"], looks(report), strict=True):
        c = m["continuation"]
        if m["kind"] == "full":
            said = f"{c['tokens']} tokens, the reference"
        elif c["same_tokens"] == report["methods"][0]["continuation"]["tokens"] == c["tokens"]:
            said = "the same text"
        else:
            said = f"the same for {counted(c['same_tokens'], 'token')}"
        cards.append(f'<article class="c-{style}"><h3>{esc(m["name"])}</h3><p class="dim">{said}</p>'
                     f"<p>{''.join(marked(kind, words) for kind, words in c['pieces'])}</p></article>")  # fmt: skip
    return (
        "<p>Greedy continuations. Words that <mark>differ</mark> from full precision’s are underlined and shaded, and "
        "words that are <del>missing</del> are struck out. Texts part for good at the first different token, so an "
        "early difference says little about quality.</p>"
        f'<details><summary>The prompt, {prompt["tokens"]:,} tokens</summary><div class="prompt" tabindex="0" '
        f'role="region" aria-label="prompt">{esc(prompt["text"])}</div></details>'
        f'<div class="texts">{"".join(cards)}</div>'
    )


def marked(kind: str, words: str) -> str:
    """A piece of a continuation as HTML."""
    if kind == "same":
        return esc(words)
    tag, said = ("mark", "differs") if kind == "other" else ("del", "missing")
    return f'<{tag}><span class="sr">[{said}:]</span>{esc(words)}<span class="sr">[end]</span></{tag}>'


def memory(report: Report) -> str:
    """Bytes of the caches, and MLX's peak, by context."""
    contexts = [str(c) for c in sorted(report["contexts"])]
    held, peak = by_context(report, "nbytes"), by_context(report, "decode_peak")
    charts = (
        figure(figures.chart(held, "Bytes of each cache against context.", "context, tokens", "bytes"),
               "Bytes of the caches’ arrays: window, sinks and reserved room included.")
        + figure(figures.chart(peak, "Peak memory of decoding against context.", "context, tokens", "bytes"),
                 "Peak memory of decoding a token, above the model’s own.")
    )  # fmt: skip
    rows = [
        (m["name"], *(f"{m['held'][c]['nbytes']:,}" for c in contexts),
         f"{m['held'][contexts[-1]]['active_bytes']:,}", f"{m['largest']['codec']:,}")
        for m in report["methods"]
    ]  # fmt: skip
    columns = ("cache", *(f"{int(c):,} tokens" for c in contexts), f"active memory at {int(contexts[-1]):,}", "codec")
    peaks = [
        (m["name"], *(size(m["held"][c]["decode_peak"]) for c in contexts),
         *("–" if (p := m["held"][c]["read_peak"]) is None else size(p) for c in contexts))
        for m in report["methods"]
    ]  # fmt: skip
    names = ("cache", *(f"decoding, {int(c):,}" for c in contexts), *(f"reading, {int(c):,}" for c in contexts))
    return (
        f'{figures.legend(held)}<div class="charts">{charts}</div>'
        + table("Bytes held", columns, rows)
        + table("Peak memory above what was active before there was a cache", names, peaks)
        + '<p class="dim">Active memory: by how much MLX’s own count grew. The codec is held once per model, whatever '
        f"the context.{unread(report)}</p>"
    )


def unread(report: Report) -> str:
    """Why figures of reading are missing, where they are."""
    if all(row["read_peak"] is not None for m in report["methods"] for row in m["held"].values()):
        return ""
    return (
        " –: mlx-lm’s quantized attention of 16-bit numbers takes minutes for a prompt on a CPU, so its prompt was "
        "read as mlx-lm reads the first 2,048 tokens of one, at full precision, and quantized then."
    )


def speed(report: Report) -> str:
    """Tokens a second."""
    contexts = [str(c) for c in sorted(report["contexts"])]
    lines = by_context(report, "decode_tokens_per_second")
    image = figures.chart(lines, "Tokens decoded a second against context.", "context, tokens", "tokens/s")
    rows = [
        (m["name"], *(f"{m['held'][c]['decode_tokens_per_second']:.1f}" for c in contexts),
         f"{m['read_tokens_per_second']:,.0f}",
         *("–" if (r := m["held"][c]["read_tokens_per_second"]) is None else f"{r:,.0f}" for c in contexts))
        for m in report["methods"]
    ]  # fmt: skip
    columns = ("cache", *(f"decode at {int(c):,}" for c in contexts), "prefill of an empty cache",
               *(f"prefill at {int(c):,}" for c in contexts))  # fmt: skip
    return figures.legend(lines) + figure(image, "Decoding, one token at a time; medians of seven steps.") + table(
        "Tokens a second", columns, rows
    ) + f'<p class="dim">Whatever else ran on this machine at the time slowed these.{unread(report)}</p>'  # fmt: skip


def fits(report: Report) -> str:
    """The largest context of this machine, and how it was worked out."""
    machine, full = report["machine"], report["methods"][0]["largest"]["tokens"]
    bars = [
        (m["name"], style, m["largest"]["tokens"], f"{m['largest']['tokens']:,} tokens")
        for m, (style, _) in zip(report["methods"], looks(report), strict=True)
    ]
    rows = [
        (m["name"], f"{m['largest']['tokens']:,}", ratio(m["largest"]["tokens"], full, 2),
         f"{m['largest']['per_token']:,.1f}", size(m["largest"]["fixed"]), size(m["largest"]["working"]),
         f"{m['largest']['working_per_token']:,.1f}", size(m["largest"]["codec"]))
        for m in report["methods"]
    ]  # fmt: skip
    columns = ("cache", "tokens", "of full precision", "bytes per token", "fixed bytes", "working memory",
               "working per token", "codec")  # fmt: skip
    own = report["context_of_model"]
    limit = f" The model itself is made for {own:,} tokens; beyond that only the memory would do." if own else ""
    return (
        f"<p>One conversation in {size(machine['memory_bytes'])} ({esc(machine['memory'])}), of which "
        f"{size(machine['active_bytes'])} are the model’s.{limit}</p>"
        + figure(figures.bars(bars, "Largest context with each cache."), "Tokens that fit, nothing else running.")
        + "<p><code>tokens = (memory − active − codec − fixed − working) / (bytes per token + working per token)"
        + "</code></p>"
        + table("What the formula was given", columns, rows)
        + '<p class="dim">Active: what MLX held with the model loaded and no cache. Bytes per token: growth of the '
        "cache’s measured bytes between the shortest and the longest context. Fixed: what it holds beyond that, such "
        "as the exact window. Working memory: measured peak of decoding beyond the cache; what of it grows with the "
        "context is counted per token. Attention on codes works in tiles, whose size is bounded."
        f"{' At one context the window counts as if it grew, so more fit.' if len(report['contexts']) == 1 else ''}</p>"
    )


def spectra(report: Report) -> str:
    """How the variance falls, of each layer."""
    layers: dict[int, dict[str, Report]] = {}
    for row in report["spectra"]:
        layers.setdefault(row["layer"], {})[row["part"]] = row
    values = [v for row in report["spectra"] for v in row["eigenvalues"] if v > 0]
    high = max(values, default=1.0)
    low = max(min(values, default=1.0), high * 1e-7)
    items = "".join(
        f"<li><strong>layer {i}</strong>"
        + figures.spectrum({p: r["eigenvalues"] for p, r in parts.items()}, low / 1.5, high * 1.5,
                           f"layer {i}: " + ", ".join(f"{p} {r['effective_dims']:.1f} effective dimensions"
                                                      for p, r in parts.items())) + "</li>"
        for i, parts in layers.items()
    )  # fmt: skip
    rows = [
        (f"layer {i}", *(cell for p in ("keys", "values")
                         for cell in ((str(parts[p]["dims"]), f"{parts[p]['effective_dims']:.1f}")
                                      if p in parts else ("–", "–"))))
        for i, parts in layers.items()
    ]  # fmt: skip
    key = figures.legend([Series("keys", "s1", 0, []), Series("values", "mlx", 1, [])])
    columns = ("layer", "key dimensions", "effective", "value dimensions", "effective")
    return (
        "<p>Variance of each coordinate of the codec’s basis, largest first, mean of the heads, in units of the "
        "metric in which squared error is KL. A steep fall is what makes a cache cheap to store.</p>"
        f'{key}<ul class="spectra">{items}</ul>'
        + table("Effective dimensions: (Σλ)² / Σλ², mean of the heads", columns, rows)
    )


def bits(report: Report) -> str:
    """Bits of every dimension of every head, for each budget."""
    name = chosen(report)["name"].removeprefix("spectral ")
    parts = []
    for budget, rows in report["widths"].items():
        images = ""
        means: dict[int, dict[str, float]] = {}
        for part in ("keys", "values"):
            mine = [(r["layer"], r["head"], r["bits"]) for r in rows if r["part"] == part]
            if not mine:
                continue
            for layer in dict.fromkeys(r[0] for r in mine):
                digits = "".join(r[2] for r in mine if r[0] == layer)
                means.setdefault(layer, {})[part] = sum(map(int, digits)) / len(digits)
            label = f"Bits of the {part} at {budget} bits: layers and heads downwards, dimensions across."
            images += figure(
                figures.heat_map(mine, label),
                f"{part}: layers and their heads downwards, dimensions of falling variance to the right",
            )
        cells = [(f"layer {i}", *(f"{m[p]:.2f}" if p in m else "–" for p in ("keys", "values")))
                 for i, m in means.items()]  # fmt: skip
        parts.append(
            f"<details{' open' if budget == name else ''}><summary>{esc(counted(budget, 'bit'))} per number</summary>"
            f'<div class="charts">{images}</div>'
            + table(f"Mean bits at {counted(budget, 'bit')} per number", ("layer", "keys", "values"), cells)
            + "</details>"
        )  # fmt: skip
    return (
        "<p>One budget for the whole model: a key dimension of one layer competes with a value dimension of another, "
        "and bits go where they save most KL. Each row is a head. Dimensions of 0 bits, in the shade nearest to the "
        f"background, are not stored.</p>{figures.heat_legend()}{''.join(parts)}"
    )


def method(report: Report) -> str:
    """What was run, so that the figures can be judged and had again."""
    machine, text, codec = report["machine"], report["text"], report["codec"]
    full = report["methods"][0]
    group = report["group_size"]
    theirs = "" if group is None else (
        f"<li>mlx-lm’s cache is its own QuantizedKVCache, as <code>--kv-bits 4 --kv-group-size {group} "
        "--quantized-kv-start 0</code> gives it: caches are quantized after the first piece of a prompt, which "
        "therefore sees itself exact, and it has no exact window. (By default mlx-lm starts to quantize only at 5,000 "
        "tokens.) Its quantized attention was run for every figure of quality, text and decoding.</li>"
    )  # fmt: skip
    arithmetic = "<li>Quality and texts were computed in float32, because MLX’s CPU back-end is slow with 16-bit "
    arithmetic += "numbers; bytes, memory and speed in the model’s own numbers.</li>"
    made = ", ".join(
        f"{k} {esc(v)}" for k, v in codec.items() if k in ("objective", "sequences", "sequence_length", "text")
    )
    return f"""<ul>
<li>Text: {esc(text["source"])}, {text["tokens"]:,} tokens, the same for all. The first 256 of each sequence are read
in one piece; {full["positions"]:,} positions after them are scored, 16 tokens at a time, so that each has its exact
window behind it, as in decoding.</li>
{theirs}
{arithmetic if report["quality_in_float32"] else ""}
<li>The spectral cache keeps the newest 128 and the first 4 tokens exact. Bits per number count the padding of codes,
and the scales of mlx-lm’s.</li>
<li>Bytes, peak memory and speed: the text, repeated where it is too short, is read once and handed to each cache;
then 128 tokens are read in one piece and 8 one by one. Memory is MLX’s own count.</li>
<li>99.9 % of {full["positions"]:,} positions is little more than the worst of them; <code>--tokens</code> reads
more.</li>
<li>Codec {esc(codec["identity"])} of model {esc(report["fingerprint"])}: {made}.</li>
<li>mlx {esc(machine["mlx"])}, mlx-lm {esc(machine["mlx_lm"])}, {esc(machine["system"])},
{esc(machine["device"])}.</li>
</ul>"""
