"""Draws benchmarks/results/method.svg, README's picture of the method, with the shipped model's own codec at 2 bits.

python benchmarks/picture.py. Colours follow the reader's light or dark page.
"""

import itertools
import pathlib
from collections.abc import Iterator

import numpy as np

from vq_kvcache.demo import model_folder
from vq_kvcache.options import CacheOptions
from vq_kvcache.spectral.codec import Codec
from vq_kvcache.spectral.sealing import BLOCK, LAG
from vq_kvcache.spectral.spectral_quant import SpectralQuantizer

FILE = pathlib.Path(__file__).resolve().parent / "results" / "method.svg"
BITS, LAYER = 2.0, 1
WIDTH, LEFT, ACROSS = 560, 16, 528  # one narrow column, so that its letters are still read on a phone
STYLE = """
text { font: 15px system-ui, sans-serif; fill: #1f2328 } .small { font-size: 12.5px; fill: #59636e }
.name { font-size: 11px; fill: #59636e } .page { fill: #ffffff }
.line { stroke: #59636e; fill: none } .exact { fill: #d1d9e0 } .arrow { fill: #59636e }
.w0 { fill: #e6e9ed } .w1 { fill: #b9d3ea } .w2 { fill: #8fbfe0 } .w3 { fill: #63a8d8 } .w4 { fill: #4292c6 }
.w5 { fill: #2171b5 } .w6 { fill: #08519c } .w7 { fill: #08306b } .w8 { fill: #041c40 }
@media (prefers-color-scheme: dark) {
text { fill: #e6edf3 } .small, .name { fill: #9ea7b3 } .line { stroke: #9ea7b3 } .exact { fill: #4d5561 }
.arrow { fill: #9ea7b3 } .page { fill: #0d1117 }
.w0 { fill: #262c34 } .w1 { fill: #1d4f7c } .w2 { fill: #2468a2 } .w3 { fill: #2f80c0 } .w4 { fill: #4b9ad8 }
.w5 { fill: #76b3e3 } .w6 { fill: #9fcbee } .w7 { fill: #c8e1f7 } .w8 { fill: #f0f7fd }
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


def tokens(y: float) -> Iterator[str]:
    """The cache of a layer along the sequence."""
    options = CacheOptions()
    least = options.window + LAG
    yield text(LEFT, y, "A layer's cache, oldest token first")
    yield box(LEFT, y + 12, 24, 26, "exact")
    for i in range(40):
        yield box(LEFT + 28 + 9 * i, y + 12, 8, 26, "w3")
    yield box(LEFT + 391, y + 12, ACROSS - 391, 26, "exact")
    told = (
        (0, f"first {options.sinks},", "exact"),
        (60, "packed: codes of every head, in 32-bit", "words, token beside token"),
        (391, f"newest {least} to {least + BLOCK - 1},", "exact"),
    )
    for x, *lines in told:
        for i, line in enumerate(lines):
            yield text(LEFT + x, y + 56 + 16 * i, line, "small")


def coordinates(y: float, quantizer: SpectralQuantizer, variances: np.ndarray) -> Iterator[str]:
    """Variances and widths of one head's coordinates, and the words that hold its codes."""
    widths, bottom, unit = quantizer.layout.widths[0], y + 108, ACROSS / 32
    yield text(LEFT, y, "One key, turned: a bar per coordinate, as high as it varies")
    heights, step = np.sqrt(variances / variances.max()) * 94, ACROSS / len(widths)
    for d, (height, bits) in enumerate(zip(heights, widths, strict=True)):
        yield box(LEFT + step * d, bottom - max(height, 1.5), step - 1, max(height, 1.5), f"w{bits}")
    yield arrow(LEFT + ACROSS / 2, bottom + 8, 26)
    yield text(LEFT + ACROSS / 2 + 12, bottom + 26, "codes of the nearest levels, by bits", "small")
    for word in range(quantizer.words):
        for s in quantizer.layout.segments[0]:
            if s.first_word <= word < s.first_word + s.words:
                for slot in range(s.slots):
                    x = LEFT + unit * (s.shift + slot * s.width)
                    yield box(x, bottom + 44 + 20 * word, unit * s.width - 1.5, 16, f"w{s.width}")
    told = f"{widths.sum()} bits of {len(widths)} coordinates in {quantizer.words} words; no code straddles two"
    yield text(LEFT, bottom + 60 + 20 * quantizer.words, told, "small")


def attention(y: float) -> Iterator[str]:
    """The steps of attention on codes."""
    lines = (
        "Attention, without decoding the cache",
        "a key or value is m + S \u1e91, \u1e91 its levels, S = A\u207b\u00b9U; so, once a token, q\u2032 = S\u1d40q",
        "scores: q\u2032 \u00b7 \u1e91 + q \u00b7 m on codes, q \u00b7 k on exact tokens",
        "both parts merged by their running maximum and sum",
        "output: S \u03a3 p \u1e91 + m \u03a3 p of codes, \u03a3 p v of exact tokens",
    )
    for i, line in enumerate(lines):
        yield text(LEFT, y + 20 * i, line, "small" if i else "")


def map_of_bits(y: float, rows: list[tuple[str, np.ndarray]]) -> Iterator[str]:
    """A row per head of keys or values: its coordinates' widths."""
    x, pitch = LEFT + 84, 14
    yield text(LEFT, y, f"Where the bits go: tiny-llama, {BITS:g} bits a number")
    yield text(LEFT, y + 19, "a row per layer, keys or values, and head; a column per coordinate", "small")
    y += 18
    for r, (name, widths) in enumerate(rows):
        yield text(LEFT, y + 21 + pitch * r, name, "name")
        start, cell = 0, (ACROSS - 84) / len(widths)
        for bits, run in itertools.groupby(widths.tolist()):
            count = len(list(run))
            yield box(x + cell * start, y + 12 + pitch * r, cell * count, 11, f"w{bits}")
            start += count
    y += pitch * len(rows) + 24
    for bits in range(9):
        yield box(x + 49 * bits, y, 49, 11, f"w{bits}") + text(x + 21 + 49 * bits, y + 27, str(bits), "small")
    yield text(LEFT, y + 10, "bits", "small")


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
    parts = [*tokens(26), *coordinates(136, keys.heads(0, 1), codec.layers[LAYER][0].eigenvalues[0])]
    parts += [*attention(404), *map_of_bits(526, rows)]
    height = 526 + 14 * len(rows) + 82
    # A fixed width, so that a wide page does not blow it up; a ground of its own, as the page around may be of the
    # other scheme.
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" viewBox="0 0 {WIDTH} {height}" role="img">'
    title = "<title>How a key is turned, coded and attended to, and where the bits of a model go</title>"
    ground = f'<rect class="page" width="{WIDTH}" height="{height}" rx="6"/>'
    return "\n".join([head, title, f"<style>{STYLE}\n</style>", ground, *parts, "</svg>", ""])


if __name__ == "__main__":
    FILE.write_text(draw(), "utf-8")
