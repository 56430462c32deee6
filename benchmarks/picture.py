"""Draws benchmarks/results/method.svg, README's picture of the method, with the shipped model's own codec at 2 bits.

python benchmarks/picture.py. Colours follow the reader's light or dark page.
"""

import itertools
import pathlib
from collections.abc import Iterator

import numpy as np

from vq_kvcache.demo import model_folder
from vq_kvcache.spectral.codec import Codec
from vq_kvcache.spectral.spectral_quant import SpectralQuantizer

FILE = pathlib.Path(__file__).resolve().parent / "results" / "method.svg"
BITS, LAYER = 2.0, 1
WIDTH, HEIGHT, LEFT = 880, 490, 24
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #1f2328 } .small { font-size: 11px; fill: #59636e }
.line { stroke: #59636e; fill: none } .exact { fill: #d1d9e0 } .arrow { fill: #59636e }
.w0 { fill: #eceff2 } .w1 { fill: #c6dbef } .w2 { fill: #9ecae1 } .w3 { fill: #6baed6 } .w4 { fill: #4292c6 }
.w5 { fill: #2171b5 } .w6 { fill: #08519c } .w7 { fill: #08306b } .w8 { fill: #041c40 }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 } .small { fill: #9198a1 } .line { stroke: #9198a1 } .exact { fill: #3d444d }
.arrow { fill: #9198a1 }
.w0 { fill: #1c2128 } .w1 { fill: #12324f } .w2 { fill: #164a77 } .w3 { fill: #1f669f } .w4 { fill: #2f83c5 }
.w5 { fill: #58a0da } .w6 { fill: #8abde8 } .w7 { fill: #bbd9f3 } .w8 { fill: #e6f1fb }
}"""


def text(x: float, y: float, words: str, kind: str = "") -> str:
    """One line of text, its baseline at y."""
    return f'<text x="{x:g}" y="{y:g}"{f" class={chr(34)}{kind}{chr(34)}" if kind else ""}>{words}</text>'


def box(x: float, y: float, width: float, height: float, kind: str) -> str:
    """A filled rectangle."""
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" class="{kind}"/>'


def arrow(x: float, y: float, length: float) -> str:
    """A short arrow downwards."""
    end = y + length
    head = f'<path class="arrow" d="M{x - 4:g} {end - 6:g}h8l-4 6z"/>'
    return f'<path class="line" d="M{x:g} {y:g}V{end - 6:g}"/>{head}'


def tokens() -> Iterator[str]:
    """The cache of a layer along the sequence."""
    y = 42
    yield text(LEFT, 24, "A layer's cache, oldest token first")
    yield box(LEFT, y, 26, 24, "exact") + text(LEFT, y + 40, "4 sinks, exact", "small")
    for i in range(60):
        yield box(LEFT + 30 + 9 * i, y, 8, 24, "w3")
    yield text(LEFT + 190, y + 40, "packed: codes of every head, in 32-bit words, token beside token", "small")
    yield box(LEFT + 574, y, 258, 24, "exact")
    yield text(LEFT + 574, y + 40, "newest tokens, exact: a window of 128", "small")


def coordinates(quantizer: SpectralQuantizer, variances: np.ndarray) -> Iterator[str]:
    """Variances and widths of one head's coordinates, and the words that hold its codes."""
    widths, bottom = quantizer.layout.widths[0], 232
    yield text(LEFT, 116, "One key, turned: a coordinate per bar, its deviation, its bits")
    heights = np.sqrt(variances / variances.max()) * 90
    for d, (height, bits) in enumerate(zip(heights, widths, strict=True)):
        yield box(LEFT + 6 * d, bottom - max(height, 1.5), 5, max(height, 1.5), f"w{bits}")
    yield arrow(LEFT + 192, bottom + 8, 26)
    yield text(LEFT + 204, bottom + 25, "codes: nearest levels", "small")
    for word in range(quantizer.words):
        y = bottom + 44 + 20 * word
        for s in quantizer.layout.segments[0]:
            if s.first_word <= word < s.first_word + s.words:
                for slot in range(s.slots):
                    yield box(LEFT + 12 * (s.shift + slot * s.width) + 1, y, 12 * s.width - 2, 16, f"w{s.width}")
    bits = int(widths.sum())
    told = f"{widths.sum()} bits of {len(widths)} coordinates in {quantizer.words} words; no code straddles two"
    yield text(LEFT, bottom + 58 + 20 * quantizer.words, told, "small")


def attention() -> Iterator[str]:
    """The steps of attention on codes."""
    lines = (
        "Attention, without decoding the cache",
        "q' = S q, once a token, S the synthesis A^-1 U",
        "scores: q' . z + q . m on codes, q . k on exact tokens",
        "both parts merged by their running maximum and sum",
        "output: S (sum of p z) + m sum of p, and sum of p v",
    )
    for i, line in enumerate(lines):
        yield text(LEFT, 398 + 19 * i, line, "small" if i else "")


def map_of_bits(rows: list[tuple[str, np.ndarray]]) -> Iterator[str]:
    """A row per head of keys or values: its coordinates' widths."""
    x, y, cell = 484, 116, 4.8
    yield text(x, 116, "Where the bits go: tiny-llama, 2 bits a number")
    for r, (name, widths) in enumerate(rows):
        yield text(x, y + 14 + 11 * r, name, "small").replace('class="small"', 'class="small" style="font-size:9px"')
        start = 0
        for bits, run in itertools.groupby(widths.tolist()):
            count = len(list(run))
            yield box(x + 66 + cell * start, y + 6 + 11 * r, cell * count, 9, f"w{bits}")
            start += count
    y += 11 * len(rows) + 18
    for bits in range(9):
        yield box(x + 66 + 33 * bits, y, 33, 9, f"w{bits}") + text(x + 79 + 33 * bits, y + 22, str(bits), "small")
    yield text(x, y + 22, "bits", "small")


def draw() -> str:
    """The picture, as SVG text."""
    (file,) = (model_folder().parent / "codecs").glob("*.safetensors")
    codec = Codec.load(file)
    plan = codec.plan(BITS)
    rows = [
        (f"{i} {part} {h}", widths)
        for i, layer in plan.layers.items()
        for part in ("keys", "values")
        for h, widths in enumerate(getattr(layer, part).layout.widths)
    ]
    keys = plan.layers[LAYER].keys
    assert keys is not None
    parts = [*tokens(), *coordinates(keys.heads(0, 1), codec.layers[LAYER][0].eigenvalues[0]), *attention()]
    parts += map_of_bits(rows)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">'
    title = "<title>How a key is turned, coded and attended to, and where the bits of a model go</title>"
    return "\n".join([head, title, f"<style>{STYLE}\n</style>", *parts, "</svg>", ""])


if __name__ == "__main__":
    FILE.write_text(draw(), "utf-8")
