"""Do the kernels work on this machine? They are compared with attention in float64: three cases before a
process first uses a variant, the whole table by `vq_kvcache doctor`."""

import argparse
import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from . import kernels
from .attention import Mask, attend_codes
from .chunks import Packed
from .kernels import columns, compiled, launches
from .rows import rows_of
from .spectral.bit_allocator import gaussian_costs
from .spectral.codebook import distortion
from .spectral.intercept import original_attention
from .spectral.packing import allocate_words, unpack_reference
from .spectral.progress import bar
from .spectral.spectral_quant import SpectralQuantizer
from .storage import Snapshot
from .trust import what_fails


@dataclasses.dataclass(frozen=True)
class Case:
    """One row of the table: a cache of `tokens` tokens and `length` queries of it."""

    key_dims: int = 64
    value_dims: int = 64
    heads: int = 2
    group: int = 4
    length: int = 1
    bits: float = 2.0
    dtype: mx.Dtype = mx.float16
    mask: str = "none"
    sinks: bool = False
    batch: int = 1
    tokens: int = 400
    window: int = 56
    sharpness: float = 1.0

    def __str__(self) -> str:
        dims = f"{self.key_dims}" if self.key_dims == self.value_dims else f"{self.key_dims}/{self.value_dims}"
        odd = {"window": (self.window, 56), "sharpness": (self.sharpness, 1)}
        extra = "".join([" sinks" * self.sinks, *(f" {name} {n:g}" for name, (n, usual) in odd.items() if n != usual)])
        dtype = str(self.dtype).rsplit(".", maxsplit=1)[-1]
        return (
            f"{dtype} head_dim {dims} heads {self.heads * self.group}/{self.heads} "
            f"queries {self.length} batch {self.batch} tokens {self.tokens} bits {self.bits:g} mask {self.mask}{extra}"
        )


FEWER = 2.0, 1.5, 1.0, 0.75, 0.5
# Of so many bits, or as many of FEWER as the program that is to be used takes.
FIRST: tuple[dict[str, Any], ...] = (
    {"bits": 2.25, "tokens": 200},
    {"bits": 3.0, "length": 2, "mask": "causal", "tokens": 160},
    {"bits": 1.0, "batch": 2, "length": 3, "mask": "bool", "tokens": 160},
)


def table(place: str) -> Iterator[Case]:
    """Every dtype, head_dim, width, mask, group and length that the kernels take there, a few of them together."""
    types = mx.float16, mx.bfloat16, mx.float32
    for dims, dtype in itertools.product(launches.HEAD_DIMS, types):
        if launches.has_room(dims, dims, dtype, place):
            yield Case(dims, dims, dtype=dtype, bits=2.25)
    yield Case(192, 128)
    yield Case(64, 128, bits=3.0)
    for dims, bits in ((192, 5.5), (256, 5.25)):  # of so many columns that columns.h takes them just so, or not
        if launches.has_room(dims, dims, mx.float16, place):
            yield Case(dims, dims, bits=bits)
    for bits, dtype in itertools.product((0.5, 1.0, 1.5, 3.0, 4.0, 5.0, 6.0, 7.0, 7.75), (mx.float16, mx.float32)):
        yield Case(bits=bits, dtype=dtype)
    for mask, length, batch in itertools.product(("none", "causal", "bool", "added", "heads"), (1, 5, 16), (1, 3)):
        yield Case(mask=mask, length=length, batch=batch)
    for group, heads in ((1, 3), (2, 1), (8, 2), (16, 1), (20, 1)):
        yield Case(group=group, heads=heads, length=3, mask="causal")
    for dtype, length in itertools.product(types, (1, 4)):
        yield Case(sinks=True, dtype=dtype, length=length, mask="causal")
    for tokens in (131, 260, 1200):
        yield Case(tokens=tokens, length=2, mask="causal")
    for window, batch in ((200, 1), (200, 3), (300, 2)):
        yield Case(tokens=700, window=window, batch=batch, mask="bool")
    # Each warp takes several tiles, whose maxima differ by many bits.
    for dtype, mask in itertools.product(types, ("none", "added")):
        yield Case(dtype=dtype, mask=mask, batch=12, tokens=8000 if place == "cuda" else 700, sharpness=8.0)


def falling(dims: int, head: int, heads: int) -> NDArray[np.float64]:
    """Variances [dims] of a head: such that every head has widths of its own."""
    return np.asarray(4.0 * (0.85 + 0.1 * head / heads) ** np.arange(dims) + 0.05)


@functools.cache
def quantizer(dims: int, heads: int, bits: float, seed: int) -> SpectralQuantizer:
    """A random basis with a falling spectrum and a large mean for each head."""
    generator = np.random.default_rng(seed)
    made = []
    for h in range(heads):
        basis = np.linalg.qr(generator.normal(size=(dims, dims)))[0]
        spectrum = falling(dims, h, heads)
        widths = allocate_words(gaussian_costs(spectrum), max(int(bits * dims) // 32, 1))
        made.append(SpectralQuantizer.from_transform(generator.normal(size=dims), basis, spectrum, widths))
    return SpectralQuantizer.stack(made)


def snapshot(case: Case) -> Snapshot:
    """A cache of random codes and random exact tokens, the packed ones in three chunks; rows of a batch differ in
    length.

    No quantizer runs: on a GPU, plain operations would be compiled for that, one by one.
    """
    keys, values = (quantizer(d, case.heads, case.bits, i) for i, d in enumerate((case.key_dims, case.value_dims)))
    generator = np.random.default_rng(case.tokens)
    sinks = 4
    packed = case.tokens - case.window - sinks
    first = packed // 3 // 4 * 4
    sizes = [n for n in (first, first, packed - 2 * first) if n]
    width = keys.words + values.words
    chunks = [generator.integers(0, 2**32, (case.batch, width, -(-n // 4) * 4), dtype=np.uint32) for n in sizes]
    shapes = [(case.batch, case.heads, case.window + 14, d) for d in (case.key_dims, case.value_dims)]
    exact = [mx.array(generator.normal(size=shape).astype(np.float32)).astype(case.dtype) for shape in shapes]
    rows = rows_of(
        (sinks,) * case.batch,
        tuple(sinks + 3 * b for b in range(case.batch)),
        sinks + case.window,
        tuple(packed - 7 * b for b in range(case.batch)),
    )
    return Snapshot(
        exact[0], exact[1], Packed((mx.array(c), n) for c, n in zip(chunks, sizes, strict=True)), rows, keys, values
    )


def decoded(held: Snapshot) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    """Keys and values [H, T, D] of each row, float64, in the order of the sequence."""
    rows, layout = [], held.layout
    words = np.concatenate([np.array(w)[..., :n] for w, n in held.packed], axis=-1)
    exact = [np.array(x.astype(mx.float32), dtype=np.float64) for x in (held.exact_keys, held.exact_values)]
    for b, packed in enumerate(layout.packed_tokens):
        pair, start = [], 0
        for x, q in zip(exact, (held.key_quantizer, held.value_quantizer), strict=True):
            assert isinstance(q, SpectralQuantizer)
            levels = unpack_reference(words[b, start : start + q.words, :packed], q.layout)
            basis, mean = (np.array(a, dtype=np.float64) for a in (q.synthesis, q.mean))
            codes = levels.swapaxes(1, 2) @ basis + mean
            window = x[b, :, layout.window_start[b] : layout.window_end]
            pair.append(np.concatenate([x[b, :, : layout.held_sinks[b]], codes, window], axis=1))
            start += q.words
        rows.append((pair[0], pair[1]))
    return rows


def mask_of(case: Case, held: Snapshot) -> Mask:
    """A mask of this kind; random ones leave the first token visible."""
    if case.mask in ("none", "causal"):
        return None if case.mask == "none" else "causal"
    heads = case.heads * case.group if case.mask == "heads" else 1
    shape = (case.batch, heads, case.length, held.length)
    generator = np.random.default_rng(held.length)
    if case.mask == "added":
        return mx.array(generator.normal(size=shape).astype(np.float32)).astype(case.dtype)
    seen = generator.random(size=shape) < 0.7
    seen[..., 0] = True
    return mx.array(seen)


def _added(case: Case, mask: Mask, row: int, tokens: int) -> NDArray[np.float64]:
    """What the mask adds to the scores of a row, [1 or Hq, L, tokens]."""
    if mask is None:
        return np.zeros((1, case.length, tokens))
    if isinstance(mask, str):
        visible = np.arange(tokens)[None] <= np.arange(case.length)[:, None] + tokens - case.length
        return np.where(visible, 0.0, -np.inf)[None]
    own = np.array(mask.astype(mx.float32), dtype=np.float64)[row, ..., :tokens]
    return np.where(own > 0, 0.0, -np.inf) if mask.dtype == mx.bool_ else own


@dataclasses.dataclass
class Problem:
    """One case, ready to run: its operands, and by row what float64 and what MLX's own attention give, [Hq, L, Dv]."""

    held: Snapshot
    queries: mx.array
    scale: float
    mask: Mask
    sinks: mx.array | None
    expected: NDArray[np.float64]
    stock: NDArray[np.float64]


def problem(case: Case) -> Problem:
    """The operands of a case and what they should give."""
    held = snapshot(case)
    generator = np.random.default_rng(case.length)
    shape = (case.batch, case.heads * case.group, case.length, case.key_dims)
    queries = mx.array(generator.normal(size=shape).astype(np.float32)).astype(case.dtype)
    logits = mx.array(generator.normal(size=shape[1]).astype(np.float32)).astype(case.dtype) if case.sinks else None
    scale, mask = case.sharpness * case.key_dims**-0.5, mask_of(case, held)
    expected, stock, exact_queries = [], [], np.array(queries.astype(mx.float32), dtype=np.float64)
    for b, (keys, values) in enumerate(decoded(held)):
        added = _added(case, mask, b, keys.shape[1])
        scores = exact_queries[b] @ np.repeat(keys, case.group, axis=0).swapaxes(1, 2) * scale + added
        top = scores.max(axis=-1, keepdims=True)
        weights = np.exp(scores - top)
        total = weights.sum(axis=-1, keepdims=True)
        if logits is not None:
            total += np.exp(np.array(logits.astype(mx.float32), dtype=np.float64)[:, None, None] - top)
        expected.append(weights @ np.repeat(values, case.group, axis=0) / total)
        k, v = (mx.array(x[None].astype(np.float32)).astype(case.dtype) for x in (keys, values))
        own = mx.array(np.maximum(added, -1e4)[None].astype(np.float32)).astype(case.dtype)
        attention = original_attention()(queries[b : b + 1], k, v, scale=scale, mask=own, sinks=logits)
        stock.append(np.array(attention.astype(mx.float32), dtype=np.float64)[0])
    return Problem(held, queries, scale, mask, logits, np.stack(expected), np.stack(stock))


def compare(
    case: Case, place: str, run: kernels.Run | None = None, program: columns.Program | None = None
) -> tuple[float, float]:
    """(largest error of the kernels, largest error of MLX's attention on the decoded arrays), against float64."""
    p = problem(case)

    def attend(run: kernels.Run | None) -> mx.array:
        return attend_codes(p.held, p.queries, p.scale, p.mask, p.sinks, place, run, program)

    if run is None:
        compiled.prepare(place, attend)
    found = attend(run)
    errors = [np.abs(x - p.expected).max() for x in (np.array(found.astype(mx.float32)), p.stock)]
    return float(errors[0]) if np.isfinite(errors[0]) else float("inf"), float(errors[1])


def allowed(case: Case, stock: float) -> float:
    """The largest error that counts as agreement: twice that of MLX's own attention, and a rounding."""
    unit = {mx.float16: 2.0**-10, mx.bfloat16: 2.0**-7}.get(case.dtype, 2.0**-18)
    return 2 * stock + unit


def _taken(case: Case, program: columns.Program) -> Case:
    """The same case of as many bits as this program takes."""
    for bits in case.bits, *FEWER:
        keys, values = (quantizer(d, case.heads, bits, i) for i, d in enumerate((case.key_dims, case.value_dims)))
        if bits <= case.bits and columns.chosen(keys, values, program) is not None:
            return dataclasses.replace(case, bits=bits)
    raise RuntimeError(f"{program} takes no codes of {FEWER[-1]} bits")


def first_wrong(
    place: str, key_dims: int, value_dims: int, dtype: mx.Dtype, program: columns.Program | None = None
) -> str:
    """The first of three small cases of the variant that is to be used that is wrong, or nothing."""
    for changes in FIRST:
        case = Case(key_dims, value_dims, dtype=dtype, **changes)
        if program is not None:
            case = _taken(case, program)
        found, stock = compare(case, place, program=program)
        if found > allowed(case, stock):
            return f"{case}: error {found:.2g}, MLX's own {stock:.2g}"
    return ""


def wrong_arrays(place: str, key_dims: int, value_dims: int, dtype: mx.Dtype) -> str:
    """What is wrong with the keys and values that prompts, and readers of handles, get."""
    case = Case(key_dims, value_dims, bits=3.0, dtype=dtype, batch=2, tokens=200)
    held = snapshot(case)
    exact, unit = (held.exact_keys, held.exact_values), allowed(case, 0.0)
    rows, first = held.layout.flat, (0, 7)
    asked = *held.codes, rows, *exact, launches.ints(first), held.length + 56, place
    compiled.prepare(place, lambda run: launches.restore(*asked, by=run))
    for prompt in (True, False):
        found = launches.restore(*asked, prompt)
        for b, pair in enumerate(decoded(held)):
            for own, tokens in zip(found, pair, strict=True):
                behind = own.shape[2] - first[b] - tokens.shape[1]
                expected = np.pad(tokens, [(0, 0), (first[b], behind), (0, 0)])  # columns of no token are zero
                off = np.abs(np.array(own.astype(mx.float32))[b] - expected).max()
                # MLX's own products of float32 have TF32's ten bits, where there is TF32.
                if not off <= (max(unit, 2.0**-9) if prompt else unit) * np.abs(expected).max():
                    return f"{case}: {'prompts' if prompt else 'handles'} off by {off:.2g}"
    return ""


def wrong_codes(place: str) -> str:
    """What is wrong with the words that the encoding kernel writes, or the levels that the decoding one reads."""
    own = quantizer(64, 2, 3.5, 0)
    synthesis, mean, analysis = (np.array(a, dtype=np.float64) for a in (own.synthesis, own.mean, own.analysis))
    x = np.random.default_rng(0).normal(size=(2, 40, own.layout.stored)) @ synthesis + mean
    encoding = launches.encode(own, mx.array(x[None].astype(np.float32)))
    held = snapshot(Case(bits=3.5, tokens=200))
    decoding = [launches.decode(held, part, 0, 2, mx.float16) for part in (0, 1)]
    compiled.prepare(place, lambda run: [run(launch, place) for launch in (encoding, *decoding)])
    (words,) = kernels.run(encoding, place)
    found = unpack_reference(np.array(words)[0], own.layout).swapaxes(1, 2)
    expected = sum(s.count * distortion(s.width) for head in own.layout.segments for s in head)
    error = float(((found - (x - mean) @ analysis) ** 2).sum(axis=(0, 2)).mean())
    if not error <= 1.5 * expected:
        return f"encoding: error {error:.2g}, expected {expected:.2g}"
    for part, q in enumerate((held.key_quantizer, held.value_quantizer)):
        assert isinstance(q, SpectralQuantizer)
        (levels,) = kernels.run(decoding[part], place)
        plain = unpack_reference(np.array(held.words(0, held.packed_tokens)[part])[0], q.layout)
        off = float(np.abs(np.array(levels)[0, ..., : held.packed_tokens] - plain).max())
        if not off <= 4e-3:
            return f"decoding: levels off by {off:.2g}"
    return ""


def main(argv: list[str]) -> int:
    """`vq_kvcache doctor`: the whole table on this machine's back-end; 1 when a case is wrong."""
    parser = argparse.ArgumentParser(prog="vq_kvcache doctor", description=__doc__)
    parser.add_argument("--only", default="", help="cases whose description holds this, such as bfloat16")
    only = parser.parse_args(argv).only
    place = kernels.backend()
    print(f"device {mx.default_device()}, back-end {place}")
    if place == "ops":
        print("no kernels here: attention on codes runs in plain operations")
        return 0
    codes = what_fails(lambda: wrong_codes(place) or wrong_arrays(place, 128, 64, mx.bfloat16))
    print(f"codes: {codes or 'right'}")
    cases, wrong = [c for c in table(place) if only in str(c)], 0
    for case in bar(cases, unit="case"):
        try:
            found, stock = compare(case, place)
            told = f"error {found:.2g}, MLX's own {stock:.2g}"
        except RuntimeError as error:
            found, stock, told = float("inf"), 0.0, str(error).strip().splitlines()[0]
        if not found <= allowed(case, stock):
            wrong += 1
            tqdm.write(f"wrong: {case}: {told}")
    print(f"{len(cases) - wrong} of {len(cases)} cases right")
    return int(wrong > 0 or codes != "")
