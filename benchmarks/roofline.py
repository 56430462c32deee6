"""What should attention on codes take on Apple's chips? A PREDICTION from counts and public figures: nothing here was
ever timed on a Mac.

    python benchmarks/roofline.py

Bytes are those of the shipped codec's layouts. Instructions are counted by hand in the kernel text that Metal gets
(kernels/helpers.h, metal.h, attend.h), constants folded as a compiler does, a half2 operation as two; `COUNTED` cites
the lines. What lies outside the loop over the tokens is left out. "Full" takes every pipe to be full, which no kernel
beats; "latency" is with as few SIMD groups on a core as fit its memory, each waiting for its own results. MLX's
attention in bfloat16 gets the time of its bytes, no more. "Mended" is a kernel that does not exist: it decodes values
in one pass, multiplies them with the queries that there are, and fills every pipe.
"""

import argparse
import json
import math
import pathlib
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import measure
from speed_tables import KERNELS, kernel_text

from vq_kvcache import load
from vq_kvcache.demo import model_folder
from vq_kvcache.kernels import launches
from vq_kvcache.spectral.codec import Plan, find_codec, fingerprint
from vq_kvcache.spectral.files import write_atomically
from vq_kvcache.spectral.packing import WORD_BITS, Layout

BITS = (1.0, 2.0, 3.0, 4.0)
TOKENS, HEADS, GROUP, DIMS = 131072, 8, 4, 128  # of Llama-3.1-8B
# Cores, GHz, GB/s of the largest of each. Cores and GB/s: Apple's technical specifications of the MacBook Pro (2021 to
# 2024). GHz of M1 and M2: github.com/philipturner/metal-benchmarks; of M3 and M4: listings at hmc-tech.com, which for
# M4 range from 1.47 to 1.68.
CHIPS = {
    "M1 Pro": (16, 1.296, 200), "M1 Max": (32, 1.296, 400), "M2 Pro": (19, 1.398, 200), "M2 Max": (38, 1.398, 400),
    "M3 Pro": (18, 1.398, 150), "M3 Max": (40, 1.398, 400), "M4 Pro": (20, 1.578, 273), "M4 Max": (40, 1.578, 546),
}  # fmt: skip
# A core and cycle, of M1 and M2, taken for M3 and M4 too: github.com/philipturner/metal-benchmarks, "Operations per
# Second" (bitwise, add and FMA 128; shift, extract and exp2 32; FMA inside matrix products 102).
LANES, SHIFT_LANES, MATRIX_LANES = 128, 32, 102
# There, "ALU Bottlenecks", cycles of an FMA in half precision by SIMD groups on a core, four instructions of each group
# independent.
CYCLES = {4: 1.79, 8: 1.29, 88: 1.02}
COUNTED = {
    "helpers.h": (
        "const uint f = x & (0xffffffffu >> (32 - whole));",
        "const uint one = f << W | f >> (whole - W), two = f << 2 * W | f >> (whole - 2 * W);",
        "const uint turned = f ^ (two & VqFields<W>::low);",
        "even = (turned << 1 & even_low * VqFields<W>::mask << 1) | (one & even_low);",
        "odd = (turned & odd_low * VqFields<W>::mask) | (one & odd_low) >> 1;",
        "const vq_half2 h = vq_as_half2((x & (mask | mask << 16)) | 0x64006400u);",
        "ea = ea >> 2 * W, eb = eb >> 2 * W, oa = oa >> 2 * W, ob = ob >> 2 * W;",
        "const VqPiece p = vq_piece(book.pieces + i * VQ_PIECE_INTS);",
        "if (To::passes > 1 && (p.first >= to.first + to.rows || p.first + p.slots * p.words <= to.first)) continue;",
        "vq_word<W, RING, FULL>(a >> p.shift, b >> p.shift, p.slots, c, h, to, p.first + w, p.words);",
    ),
    "metal.h": (
        "VQ_FN uint vq_pair(uint a, uint b, int byte) { return (a >> 8 * byte & 0xffffu) | b >> 8 * byte << 16; }",
        "to[0] = x.x, to[1] = x.y, to[2] = x.z, to[3] = x.w;",
        "simdgroup_multiply_accumulate(sums[b], weights[b][k], values, sums[b]);",
    ),
    "attend.h": (
        "to.s[r][0] = vq_fma(q[r], levels.a, to.s[r][0]);",
        "to.s[r][1] = vq_fma(q[r], levels.b, to.s[r][1]);",
        "s[n][i] = vq_weight(s[n][i], top);",
    ),
}  # fmt: skip


class Work(NamedTuple):
    """Instructions of one lane: all that are issued, and those among them that only a quarter of the lanes can do."""

    issued: float = 0.0
    shifts: float = 0.0

    def plus(self, other: "Work", times: float = 1.0) -> "Work":
        """The two together, the other so many times."""
        return Work(self.issued + times * other.issued, self.shifts + times * other.shifts)


TURN = Work(17, 6)  # vq_turn, of one word
# Of a piece, of two tokens: in every pass its seven numbers, whether it has rows there, and the switch; in one that
# has, coefficients, also in half precision, and the loop's beginning.
VISIT, OPENED = Work(12), Work(15)
FETCHED = Work(9, 2)  # of a pair: load, a >> shift and b >> shift, and the loop over words with its addresses
STEP = Work(1)  # of a slot: its address
SEVERAL = Work(5)  # and besides, where a tile has not room for all rows: whether this one is in it
TWO = Work(7, 4)  # of the loop that is not unrolled, for each two slots


def uncounted() -> list[str]:
    """Cited lines that the kernel text does not have (any more)."""
    texts = {name: (KERNELS / name).read_text("utf-8") for name in COUNTED}
    return [line for name, lines in COUNTED.items() for line in lines if line not in texts[name]]


def level_pair(width: int, ring: bool, position: int) -> Work:
    """vq_level_pair and vq_put: a code of each of two tokens, at bit `position` of their words."""
    bits = width + ring
    byte = min(position // 8, 2)
    offset = position - 8 * byte
    moved = offset + bits > 10
    pair = Work(5, 3) if byte == 1 else Work(3, 1)  # of byte 0 and 2, one shift and one mask fall away
    terms = {True: (0, 2, 2, 3, 3, 3), False: (0, 1, 2, 2, 3, 4, 5, 6, 6)}[ring][width]
    numbers = 4 if moved or not offset else 2  # sub and fma, or fma alone, of a half2
    numbers += 2 * (terms + 1) + (2 if width >= 5 and not ring else 0)  # polynomial; packing what was float32
    return pair.plus(Work(2 + moved + numbers + 1, moved))  # mask, mantissa; store


def word_pair(width: int, ring: bool, slots: int, passes: int, several: bool) -> Work:
    """vq_word and what fetches it: one word of each of two tokens; 2 * slots numbers. passes: those that decode it;
    several: whether there are more than one."""
    odd = width - 1 if ring else 0
    fetched = FETCHED.plus(TURN if ring else Work(1, 1), 2)  # alone: oa = a >> W
    around = fetched.plus(STEP, slots).plus(SEVERAL, slots * several)
    if ring and slots == WORD_BITS // width:
        levels = [level_pair(width, ring, s // 2 * 2 * width + (odd if s % 2 else 0)) for s in range(slots)]
    else:
        levels = [level_pair(width, ring, odd if s % 2 else 0) for s in range(slots)]
        around = around.plus(TWO, -(-slots // 2))
    result = Work().plus(around, passes)
    for level in levels:
        result = result.plus(level)
    return result


def segments(layout: Layout, rows: int) -> Iterator[tuple[int, bool, int, int, int]]:
    """(width, ring, slots, words, passes) of every segment of every head, where a tile has so many rows."""
    for head in layout.segments:
        for s in head:
            passes = (s.first + s.slots * s.words - 1) // rows - s.first // rows + 1
            yield s.width, layout.in_rings(s), s.slots, s.words, passes


def on_metal() -> tuple[int, int]:
    """(passes, SIMD groups): in how many passes a tile of values is decoded, because so few of its rows fit into the
    memory of a thread group, and how many SIMD groups fit into that of a core."""
    queries = launches.queries_of(GROUP, "metal")
    rows, _, warps = launches.group_of(DIMS, DIMS, 2, 0, queries, "metal")
    needed = launches.shared_bytes(DIMS, DIMS, rows, 2, warps, 0, queries, "metal")
    return DIMS // rows, launches.METAL_CORE_BYTES // needed * warps


def by_width(plan: Plan, passes: int) -> tuple[Work, float, dict[str, int]]:
    """Instructions of decoding a cached number, stored or not, those of values with as many rows in a tile as so many
    passes leave; its bits; and how many numbers have each width."""
    total, words, numbers, widths = Work(), 0, 0, Counter[str]()
    for layer in plan.layers.values():
        for quantizer, own in ((layer.keys, 1), (layer.values, passes)):
            assert quantizer is not None  # the shipped codec packs both
            layout = quantizer.layout
            numbers += layout.heads * quantizer.head_dim
            words += layout.words
            for width, ring, slots, count, decoded in segments(layout, quantizer.head_dim // own):
                total = total.plus(VISIT, own / 2).plus(OPENED, decoded / 2)
                total = total.plus(word_pair(width, ring, slots, decoded, own > 1), count / 2)  # of one token
                widths[f"{width}{' in rings' if ring else ''}"] += slots * count
    widths["0"] = numbers - sum(widths.values())
    each = Work(total.issued / numbers, total.shifts / numbers)
    return each, WORD_BITS * words / numbers, dict(sorted(widths.items()))


def products(rows: int) -> float:
    """Lane instructions of a number, keys and values in the mean, for scores of GROUP queries and weighted sums with
    `rows` queries, 8 in a block of the kernel's.

    A pair of levels of keys is not stored; the queries' numbers are one load for each four, and they and the levels
    come from half precision. An 8 x 8 block of levels of values takes part in one product of 512 FMA for each block of
    queries, and is loaded by two instructions of each of 32 lanes.
    """
    keys = (2 * GROUP + math.ceil(GROUP / 4) + GROUP + 2 - 1) / 2
    spread = (2 * 2 * GROUP + 2 * rows) / (2 * DIMS)  # scores written, read as fragments, and their place zeroed
    values = rows * LANES / MATRIX_LANES + 1
    softmax = 7 * rows / (2 * DIMS)  # maximum, difference, exp2, comparison, choice, sum, rounding of each score
    return (keys + spread + values) / 2 + softmax


def predict(decoding: Work, bits: float, rows: int, simd_groups: int) -> dict[str, dict[str, float]]:
    """Microseconds of one layer's attention for a new token, by chip."""
    numbers = 2 * HEADS * DIMS * TOKENS
    wait = CYCLES[max(n for n in CYCLES if n <= max(simd_groups, min(CYCLES)))]
    result = {}
    for name, (cores, ghz, gigabytes) in CHIPS.items():
        cycles = cores * ghz * 1e3  # a microsecond, of all cores
        memory = numbers * bits / 8 / (gigabytes * 1e3)
        issued = numbers * (decoding.issued + products(rows)) / (cycles * LANES)
        shifts = numbers * decoding.shifts / (cycles * SHIFT_LANES)
        full = numbers * 2 / (gigabytes * 1e3)
        result[name] = {
            "bf16_bytes_us": full, "bytes_us": memory, "issued_us": issued, "shifts_us": shifts,
            "full_us": max(memory, issued, shifts), "latency_us": max(memory, issued * wait),
        }  # fmt: skip
    return result


def predictions() -> dict[str, Any]:
    """All of it: counts and times by budget."""
    model = load(str(model_folder()))[0]
    codec = find_codec(fingerprint(model))
    assert codec is not None  # it is in the package
    (passes, simd_groups), budgets = on_metal(), {}
    rows = math.ceil(launches.queries_of(GROUP, "metal") / 8) * 8
    for bits in BITS:
        plan = codec.plan(bits)
        decoding, true_bits, widths = by_width(plan, passes)
        budgets[f"{bits:g}"] = {
            "true_bits": true_bits, "numbers_by_width": widths, "decoding": decoding._asdict(),
            "products": products(rows), "chips": predict(decoding, true_bits, rows, simd_groups),
            "chips_if_mended": predict(by_width(plan, 1)[0], true_bits, GROUP, simd_groups),
        }  # fmt: skip
    full_words = {}
    for ring, most in ((True, 5), (False, 8)):
        for w in range(1, most + 1):
            numbers = 2 * (WORD_BITS // w)
            work = word_pair(w, ring, WORD_BITS // w, passes, passes > 1)
            full_words[f"{w}{' in rings' if ring else ''}"] = [work.issued / numbers, work.shifts / numbers]
    shape = {"tokens": TOKENS, "heads": HEADS, "group": GROUP, "dims": DIMS, "passes": passes}
    shape["simd_groups"] = simd_groups
    return {"text": kernel_text(COUNTED), "shape": shape, "full_words": full_words, "budgets": budgets}


def draw(result: dict[str, Any], file: pathlib.Path) -> None:
    """Predicted times by chip at 2 bits, beside those of bfloat16's bytes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(9, 4))
    chips, budget = list(CHIPS), result["budgets"]["2"]
    bars = {
        "bfloat16, bytes": [budget["chips"][c]["bf16_bytes_us"] for c in chips],
        "2 bits, latency": [budget["chips"][c]["latency_us"] for c in chips],
        "2 bits, full": [budget["chips"][c]["full_us"] for c in chips],
        "2 bits, mended": [budget["chips_if_mended"][c]["full_us"] for c in chips],
        "2 bits, bytes": [budget["chips"][c]["bytes_us"] for c in chips],
    }
    for i, (label, heights) in enumerate(bars.items()):
        panel.bar([x + 0.17 * (i - 2) for x in range(len(chips))], heights, 0.17, label=label)
    panel.set(title="PREDICTION, never measured on a Mac: a layer's attention at 131,072 tokens", ylabel="microseconds")
    panel.set_xticks(range(len(chips)), chips)
    panel.grid(alpha=0.3, axis="y")
    panel.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=110, metadata={"Software": None})


def main() -> None:
    """Predict, and write results/roofline.json and roofline.png."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if lines := uncounted():
        raise SystemExit(f"the kernel text has no {lines[0]!r}; expected the lines that were counted; count again.")
    result = predictions()
    write_atomically(measure.RESULTS / "roofline.json", (json.dumps(result, indent=1) + "\n").encode())
    draw(result, measure.RESULTS / "roofline.png")
    for bits, budget in result["budgets"].items():
        times = {c: (round(r["full_us"]), round(r["latency_us"])) for c, r in budget["chips"].items()}
        print(bits, budget["decoding"], times)


if __name__ == "__main__":
    main()
