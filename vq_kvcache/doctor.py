"""Do the kernels work on this machine? They are compared with attend_reference: three cases before a process first uses
them, the whole table by `vq_kvcache doctor`."""

import dataclasses
import functools
import itertools
from collections.abc import Iterator

import mlx.core as mx
import numpy as np

from . import kernels
from .attention import Mask, Run, attend_codes, attend_reference
from .kernels import launches
from .spectral.bit_allocator import gaussian_costs
from .spectral.packing import allocate_words
from .spectral.spectral_quant import SpectralQuantizer
from .storage import Snapshot, Storage


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

    def __str__(self) -> str:
        dims = f"{self.key_dims}" if self.key_dims == self.value_dims else f"{self.key_dims}/{self.value_dims}"
        extra = " sinks" if self.sinks else ""
        dtype = str(self.dtype).rsplit(".", maxsplit=1)[-1]
        return (
            f"{dtype} head_dim {dims} heads {self.heads * self.group}/{self.heads} "
            f"queries {self.length} batch {self.batch} tokens {self.tokens} bits {self.bits:g} mask {self.mask}{extra}"
        )


FIRST = (
    Case(),
    Case(key_dims=128, value_dims=128, bits=3.25, dtype=mx.bfloat16, length=2, mask="causal"),
    Case(bits=6.5, dtype=mx.float32, batch=2, mask="bool"),
)


def table() -> Iterator[Case]:
    """Every dtype, head_dim, width, mask, group and length that the kernels take, a few of them together."""
    types = mx.float16, mx.bfloat16, mx.float32
    for dims, dtype in itertools.product(launches.HEAD_DIMS, types):
        yield Case(dims, dims, dtype=dtype, bits=2.25)
    yield Case(192, 128)
    yield Case(64, 128, bits=3.0)
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


@functools.cache
def quantizer(dims: int, heads: int, bits: float, seed: int) -> SpectralQuantizer:
    """A random basis with a falling spectrum and a large mean for each head."""
    generator = np.random.default_rng(seed)
    made = []
    for h in range(heads):
        basis = np.linalg.qr(generator.normal(size=(dims, dims)))[0]
        spectrum = 4.0 * (0.85 + 0.1 * h / heads) ** np.arange(dims) + 0.05
        widths = allocate_words(gaussian_costs(spectrum), max(int(bits * dims) // 32, 1))
        made.append(SpectralQuantizer.from_transform(generator.normal(size=dims), basis, spectrum, widths))
    return SpectralQuantizer.stack(made)


def snapshot(case: Case) -> Snapshot:
    """A cache of random vectors, appended in two prompts, the newest 40 and first 4 tokens exact."""
    keys, values = (quantizer(d, case.heads, case.bits, i) for i, d in enumerate((case.key_dims, case.value_dims)))
    storage = Storage(keys, values, 40, 4)
    generator = np.random.default_rng(case.tokens)
    made = []
    for q in (keys, values):
        z = generator.normal(size=(case.batch, case.heads, case.tokens, q.layout.stored)).astype(np.float32)
        made.append((mx.array(z) @ q.synthesis + q.mean).astype(case.dtype))
    first = case.tokens // 3
    for part in (slice(0, first), slice(first, case.tokens)):
        storage.append(*(x[:, :, part] for x in made))
        # By plain operations, so that only attention is compared.
        storage.seal(lambda q, x: q.encode_words(x))
    return storage.snapshot()


def mask_of(case: Case, length: int) -> Mask:
    """A mask of this kind; random ones leave the newest token visible."""
    if case.mask in ("none", "causal"):
        return None if case.mask == "none" else "causal"
    heads = case.heads * case.group if case.mask == "heads" else 1
    shape = (case.batch, heads, case.length, length)
    generator = np.random.default_rng(length)
    if case.mask == "added":
        return mx.array(generator.normal(size=shape).astype(np.float32)).astype(case.dtype)
    seen = generator.random(size=shape) < 0.7
    seen[..., -1] = True
    return mx.array(seen)


def compare(case: Case, place: str, run: Run = kernels.run) -> tuple[float, float]:
    """(largest error of the kernels, largest error of MLX's attention on the decoded arrays), both against float32."""
    held = snapshot(case)
    shape = (case.batch, case.heads * case.group, case.length, case.key_dims)
    queries = mx.random.normal(shape, key=mx.random.key(case.length)).astype(case.dtype)
    scale, mask = case.key_dims**-0.5, mask_of(case, held.length)
    logits = mx.random.normal((shape[1],), key=mx.random.key(1)).astype(case.dtype) if case.sinks else None
    exact = [x.astype(mx.float32) for x in (held.exact_keys, held.exact_values)]
    wide = dataclasses.replace(held, exact_keys=exact[0], exact_values=exact[1])
    rounded = mask.astype(mx.float32) if case.mask == "added" and isinstance(mask, mx.array) else mask
    sinks = None if logits is None else logits.astype(mx.float32)
    with mx.stream(mx.cpu):  # float32 on a GPU may mean less than that
        expected = attend_reference(wide, queries.astype(mx.float32), scale, rounded, sinks)
        mx.eval(expected)
    found = attend_codes(held, queries, scale, mask, logits, place, run)
    stock = attend_reference(held, queries, scale, mask, logits)
    errors = [float(np.abs(np.array(x.astype(mx.float32) - expected)).max()) for x in (found, stock)]
    return errors[0] if np.isfinite(errors[0]) else float("inf"), errors[1]


def allowed(case: Case, stock: float) -> float:
    """The largest error that counts as agreement: twice that of MLX's own attention, and a rounding."""
    unit = {mx.float16: 2.0**-10, mx.bfloat16: 2.0**-7}.get(case.dtype, 2.0**-18)
    return 2 * stock + unit


def first_wrong(place: str) -> str:
    """The first of three small cases that is wrong, or nothing."""
    for case in FIRST:
        found, stock = compare(case, place)
        if found > allowed(case, stock):
            return f"{case}: error {found:.2g}, MLX's own {stock:.2g}"
    return ""
