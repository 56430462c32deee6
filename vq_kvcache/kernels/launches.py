"""What each kernel is launched with: the tables of a layer, the numbers of a step, and how work is split."""

import functools
import threading
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import mlx.core as mx
import numpy as np

from ..chunks import MAX_CHUNKS, nothing
from ..spectral import codebook, trellis
from ..spectral.packing import Layout
from ..spectral.sealing import BLOCK
from ..spectral.spectral_quant import Quantizer, SpectralQuantizer
from . import DECODE, ENCODE, RESTORE, Launch, Run, run

if TYPE_CHECKING:
    from ..storage import Snapshot

T = TypeVar("T")

TOKENS = 64  # of a tile, VQ_TOKENS
QUERIES = (4, 8, 16)  # of a thread group
HEAD_DIMS = (64, 80, 96, 112, 128, 192, 256)
MASK_KINDS = {"none": 0, "causal": 1, "bool": 2, "added": 3}
MOST_QUERIES = 16  # tokens at once that `attend` takes; prompts go another way
ENCODE_THREADS = 128
MOST_TRACED = 2 * BLOCK  # tokens: a batch packs two blocks at once
RESTORE_TOKENS = 8  # of a thread group
_COEFFICIENTS = 8
HEAD_INTS = 6
MOST_PIECES = 32  # of a head
BOOK_BYTES = 4 * (2 * 9 * _COEFFICIENTS + 8 * MOST_PIECES)
MOST_SPLITS = 1024
GROUP_BYTES = 231_000  # of one thread group on CUDA
STAGES = (24, 48, 96)  # words of a head that a warp fetches ahead


def kept_with_keys(function: Callable[..., T]) -> Callable[..., T]:
    """Decorates functions of a layer's quantizers, the keys' first: what they give is kept as long as that lives."""
    kept: dict[int, dict[Any, tuple[Any, T]]] = {}  # by id, which is found sooner than a weak reference

    @functools.wraps(function)
    def call(keys: SpectralQuantizer, values: SpectralQuantizer | None = None, *rest: Any) -> T:
        own = kept.get(id(keys))
        if own is None:
            own = kept[id(keys)] = {}
            weakref.finalize(keys, kept.pop, id(keys), None).atexit = False
        named = id(values), *rest
        if named not in own:
            of_both = (keys,) if values is None else (keys, values)
            own[named] = values, function(*of_both, *rest)  # values are held, so that their id stays their own
        return own[named][1]

    return call


def kept_by_thread(size: int) -> Callable[[Callable[..., T]], Callable[..., T]]:
    """functools.lru_cache with results of each thread's own: MLX keeps what a thread traced by the function's address,
    and forgets it when that thread drops the function; another may get the address then."""

    def decorate(function: Callable[..., T]) -> Callable[..., T]:
        own = threading.local()

        @functools.wraps(function)
        def call(*key: Any) -> T:
            if not hasattr(own, "kept"):
                own.kept = functools.lru_cache(size)(function)
            return own.kept(*key)  # type: ignore[no-any-return]

        return call

    return decorate


@functools.cache
def levels() -> mx.array:
    """Polynomial coefficients, float32 [2, 9, 8]: of codes alone, then in rings; by width."""
    table = np.zeros((2, codebook.MAX_BITS + 1, _COEFFICIENTS), np.float32)
    for ring, source in enumerate((codebook.COEFFICIENTS, trellis.COEFFICIENTS)):
        for width, coefficients in source.items():
            table[ring, width, : len(coefficients)] = coefficients
    return evaluated(mx.array(table))


def evaluated(array: mx.array) -> mx.array:
    """The array, computed: other threads, with streams of their own, must find it so."""
    mx.eval(array)
    return array


def _pieces(layout: Layout, head: int) -> list[tuple[int, int, int, int, int, int, int]]:
    """(width, ring, shift, slots, words, first word, first coordinate) of each segment of a head."""
    return [
        (s.width, int(layout.in_rings(s)), s.shift, s.slots, s.words,
         layout.first_words[head] + s.first_word, s.first)
        for s in layout.segments[head]
    ]  # fmt: skip


@kept_with_keys
def layer_table(keys: SpectralQuantizer, values: SpectralQuantizer) -> mx.array:
    """int32: header, entries of the heads of keys and then of values, their pieces (helpers.h)."""
    layouts = keys.layout, values.layout
    heads = layouts[0].heads
    header = [heads, keys.words + values.words, layouts[0].stored, layouts[1].stored, values.synthesis.shape[-1]]
    header += [0] * (16 - len(header))
    entries: list[int] = []
    pieces: list[int] = []
    start = len(header) + 2 * heads * HEAD_INTS
    for part, layout in enumerate(layouts):
        for h in range(heads):
            rows = _pieces(layout, h)
            base = layout.first_words[h]
            held = layout.first_words[h + 1] - base
            entries += [start + len(pieces), len(rows), len(layout.order[h]), base + part * keys.words, held, 0]
            for *piece, first_word, first in rows:
                pieces += [*piece, first_word - base, first, 0]
    return evaluated(mx.array([*header, *entries, *pieces], mx.int32))


@kept_with_keys
def word_table(quantizer: SpectralQuantizer) -> mx.array:
    """int32 [W, ...]: for each word its head, its pieces, and of each (width, ring, shift, slots, first coordinate,
    step) (encode.h)."""
    layout = quantizer.layout
    words: list[list[int]] = [[] for _ in range(layout.words)]
    head_of = [0] * layout.words
    for h in range(layout.heads):
        for width, ring, shift, slots, count, first_word, first in _pieces(layout, h):
            for w in range(count):
                words[first_word + w] += [width, ring, shift, slots, first + w, count]
                head_of[first_word + w] = h
    longest = max(map(len, words))
    rows = [[h, len(w) // 6, *w, *([0] * (longest - len(w)))] for h, w in zip(head_of, words, strict=True)]
    return evaluated(mx.array([i for row in rows for i in row], mx.int32).reshape(len(rows), -1))


@functools.lru_cache(maxsize=64)
def ints(numbers: tuple[int, ...]) -> mx.array:
    """int32 of these numbers, kept for the layers of a step."""
    return mx.array(numbers, mx.int32)


@functools.lru_cache(maxsize=64)
def scale(scale: float) -> mx.array:
    """What scores are multiplied with, in bits."""
    return mx.array([scale * 1.4426950408889634] * 8, mx.float32)


ChunkSizes = tuple[tuple[int, int], ...]


def tiles_of(chunks: ChunkSizes, tokens: int) -> int:
    """Tiles of so many tokens: none reaches from one chunk into the next."""
    return sum(-(-held // tokens) for held, _ in chunks)


def mask_inputs(mask: Any) -> tuple[int, tuple[int, int, int, int], mx.array, mx.array]:
    """(kind, strides, bool mask, additive mask)."""
    if not isinstance(mask, mx.array):
        return _without_array("none" if mask is None else mask)
    hidden, added = nothing(mx.uint8), nothing(mx.float32)
    wide = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
    steps, step = [], 1
    for size in reversed(wide.shape):
        steps.append(step if size > 1 else 0)
        step *= size
    strides = (steps[3], steps[2], steps[1], steps[0])
    flat = wide.reshape(-1)
    if mask.dtype == mx.bool_:
        return MASK_KINDS["bool"], strides, flat.view(mx.uint8), added
    return MASK_KINDS["added"], strides, hidden, flat.astype(mx.float32)


@functools.cache
def _without_array(kind: str) -> tuple[int, tuple[int, int, int, int], mx.array, mx.array]:
    return MASK_KINDS[kind], (0, 0, 0, 0), nothing(mx.uint8), nothing(mx.float32)


def queries_of(rows: int, place: str) -> int:
    """Of so many of a KV head, those that a thread group takes. The matrix units of CUDA take sixteen."""
    return next((n for n in QUERIES if rows <= n), QUERIES[-1]) if place == "metal" else QUERIES[-1]


def shared_bytes(
    key_dims: int, value_dims: int, rows: int, element: int, warps: int, stage: int, queries: int, place: str
) -> int:
    """What a thread group of `attend` needs, see VqSpace in attend.h."""
    blocks = -(-queries // 8)
    scratch = 4096 if place == "host" or (place == "cuda" and element == 4) else 0
    head = 128 + 2 * BOOK_BYTES
    folded = queries * (key_dims + (0 if place == "metal" else 8)) * element
    tile = max(rows * 72 * element, 4 * 72 * queries if place == "metal" else 0)
    packed = head + folded + warps * (256 * stage + scratch + tile)
    folding = head + folded + 4 * queries * key_dims
    gathering = head + 4 * warps * 8 * blocks * (value_dims + 2)
    exact = 4 * queries * (key_dims + TOKENS)
    return max(packed, folding, gathering, exact)


@functools.cache
def group_of(
    key_dims: int, value_dims: int, element: int, stage: int, queries: int, place: str
) -> tuple[int, int, int]:
    """(rows of a tile of keys, of values, warps) of a thread group that fits in shared memory."""

    def need(rows: int, warps: int) -> int:
        return shared_bytes(key_dims, value_dims, rows, element, warps, stage, queries, place)

    if place == "metal":  # as many warps of a core as find room for tiles, of values alone, that are not much too low
        divisors = [n for n in range(16, value_dims + 1, 16) if value_dims % n == 0] or [16]
        found = [(n, w) for n in divisors for w in (1, 2, 4) if need(n, w) <= METAL_BYTES] or [(16, 1)]
        rows, warps = max(found, key=lambda own: (own[0] >= 32, METAL_CORE_BYTES // need(*own) * own[1], *own))
        return rows, rows, warps
    most = max(key_dims, value_dims)
    fitting = [w for w in range(4, 7) if need(most, w) <= 115_600]  # beside a second group
    alone = [w for w in range(1, 7) if need(most, w) <= GROUP_BYTES]
    return key_dims, value_dims, 1 if place == "host" else max(fitting or alone)


@kept_with_keys
def head_words(keys: SpectralQuantizer, values: SpectralQuantizer) -> int:
    """The most words that keys and values of one head have together."""
    starts = keys.layout.first_words, values.layout.first_words
    return max(sum(s[h + 1] - s[h] for s in starts) for h in range(keys.layout.heads))


# Of a thread group, and for all that a core works on at once: "On-Chip Memory" in
# github.com/philipturner/metal-benchmarks.
METAL_BYTES, METAL_CORE_BYTES = 32_768, 60_000


def encode(quantizer: SpectralQuantizer, x: mx.array) -> Launch:
    """The launch of encode.h for vectors [B, H, T, D]; the transform itself is a product of matrices."""
    return _encode(_centred(quantizer, x) @ quantizer.analysis, word_table(quantizer))


def encoded(quantizer: SpectralQuantizer, x: mx.array, place: str) -> mx.array:
    """Words uint32 [B, W, T] of vectors [B, H, T, D]. Of those that decoding packs this is traced once for layers
    alike: MLX would otherwise put the kernel's text together for keys and values of each."""
    if x.shape[2] > MOST_TRACED:
        return run(encode(quantizer, x), place)[0]
    return _encoding(place)(_centred(quantizer, x), quantizer.analysis, word_table(quantizer))


@kept_by_thread(4)
def _encoding(place: str) -> Callable[[mx.array, mx.array, mx.array], mx.array]:
    def words_of(centred: mx.array, analysis: mx.array, table: mx.array) -> mx.array:
        return run(_encode(centred @ analysis, table), place)[0]

    traced: Callable[[mx.array, mx.array, mx.array], mx.array] = mx.compile(words_of)
    return traced


def _centred(quantizer: SpectralQuantizer, x: mx.array) -> mx.array:
    """Not in the trace, for which MLX would make one kernel of its two operations, and on CUDA compile it."""
    return x.astype(mx.float32) - quantizer.mean


def _encode(z: mx.array, table: mx.array) -> Launch:
    """z: [B, H, T, stored]; table: `word_table`."""
    batch, heads, tokens, stored = z.shape
    words, row = table.shape
    return Launch(
        ENCODE,
        [z, table, levels(), ints((tokens, words, heads, stored, row, 0, 0, 0))],
        [(batch, words, tokens)],
        [mx.uint32],
        (-(-tokens * words // ENCODE_THREADS), batch, 1),
        ENCODE_THREADS,
        0,
        (("THREADS", ENCODE_THREADS),),
    )


class Codes(NamedTuple):
    """The packed tokens of a snapshot and what turns them back, of keys and of values: arrays, so that MLX can trace
    what is done with them. words: of eight chunks. table: `layer_table`."""

    words: list[mx.array]
    table: mx.array
    bases: tuple[mx.array, mx.array]
    means: tuple[mx.array, mx.array]


def codes(snapshot: "Snapshot") -> tuple[Codes, ChunkSizes]:
    """The codes, and (tokens, capacity) of each chunk."""
    keys, values = spectral(snapshot)
    words, chunks = snapshot.packed.inputs
    bases, means = (keys.synthesis, values.synthesis), (keys.mean, values.mean)
    return Codes(words, layer_table(keys, values), bases, means), chunks


def chunk_inputs(words: list[mx.array]) -> list[mx.array]:
    """MAX_CHUNKS buffers, those of no chunk empty. Not before a kernel is asked for: each array that a trace is given
    takes time in every layer. No large buffer is named twice: MLX sends work to a GPU after so many bytes of inputs."""
    return [*words, *[nothing(mx.uint32)] * (MAX_CHUNKS - len(words))]


def decode(snapshot: "Snapshot", part: int, first_head: int, heads: int, dtype: mx.Dtype) -> Launch:
    """The launch of decode.h: levels [B, heads, dims, tokens, to an even number] of keys (0) or values (1)."""
    return _decode(*codes(snapshot), part, first_head, heads, dtype)


def _decode(codes: Codes, chunks: ChunkSizes, part: int, first_head: int, heads: int, dtype: mx.Dtype) -> Launch:
    """`decode`; twice the heads of keys are those of keys and then those of values."""
    all_heads = codes.bases[0].shape[0]
    dims = max(basis.shape[1] for basis in codes.bases[part : part + 1 + heads // (2 * all_heads)])
    tokens, batch = sum(held for held, _ in chunks), codes.words[0].shape[0]
    stride = tokens + tokens % 2
    params = ints(
        (heads, first_head, 16 + part * all_heads * HEAD_INTS, tokens, stride, len(chunks), dims, 0, *sum(chunks, ()))
    )
    return Launch(
        DECODE,
        [*chunk_inputs(codes.words), codes.table, levels(), params],
        [(batch, heads, dims, stride)],
        [dtype],
        (tiles_of(chunks, TOKENS), heads, batch),
        32,
        64 + BOOK_BYTES,
        (("E", dtype),),
    )


def spectral(snapshot: "Snapshot") -> tuple[SpectralQuantizer, SpectralQuantizer]:
    """The quantizers, which must be spectral."""
    keys, values = snapshot.key_quantizer, snapshot.value_quantizer
    if not (isinstance(keys, SpectralQuantizer) and isinstance(values, SpectralQuantizer)):
        raise ValueError("the kernels read spectral codes; expected SpectralQuantizers; use plain operations.")
    return keys, values


def decode_heads(snapshot: "Snapshot", part: int, first_head: int, heads: int, place: str) -> mx.array:
    """Packed keys (0) or values (1) of some heads, [B, heads, P, D] in the model's dtype."""
    dtype = (snapshot.exact_keys, snapshot.exact_values)[part].dtype
    own, chunks = snapshot.codes
    product, factor = _turned(own, chunks, part, first_head, heads, dtype == mx.float32, place, run)
    return (product.astype(mx.float32) * factor + own.means[part][first_head : first_head + heads]).astype(dtype)


def _turned(
    codes: Codes, chunks: ChunkSizes, part: int, first_head: int, heads: int, wide: bool, place: str, by: Run
) -> tuple[mx.array, mx.array]:
    """Packed keys or values less their mean and divided by a factor [heads, 1, 1], [B, heads, P, D]; float32 if `wide`.

    Half precision holds levels better than bfloat16 does; the factor keeps the basis within its range.
    """
    kind = mx.float32 if wide else mx.float16
    found = by(_decode(codes, chunks, part, first_head, heads, kind), place)[0]
    z = found[..., : sum(held for held, _ in chunks)].swapaxes(-1, -2)
    basis = codes.bases[part][first_head : first_head + heads]
    factor = mx.maximum(mx.abs(basis).max(axis=(1, 2), keepdims=True), 1e-30)
    return z @ (basis / factor).astype(kind), factor


def restore(
    codes: Codes, chunks: ChunkSizes, held: mx.array, keys: mx.array, values: mx.array, start: mx.array, columns: int,
    place: str, prompt: bool = False, by: Run | None = None,
) -> tuple[mx.array, mx.array]:  # fmt: skip
    """All keys and values, [B, H, columns, D], of the exact ones [B, H, C, D] and the codes, token j of row b in column
    start[b] + j; zeros in columns of no token. held: `flat` of the layout; start: int32 [B]. For handles, which every
    layer makes in every step and hardly anybody reads, two launches and no more; for a `prompt`, which reads them,
    products of matrices besides. `by` launches them, in place of `run`."""
    by = by or run
    batch, heads, capacity, key_dims = keys.shape
    wide = keys.dtype == mx.float32
    if prompt:
        packed, bases = zip(*(_turned(codes, chunks, part, 0, heads, wide, place, by) for part in (0, 1)), strict=True)
        stride = coordinates = 0
    else:
        levels = by(_decode(codes, chunks, 0, 0, 2 * heads, mx.float32 if wide else mx.float16), place)[0]
        packed, bases, (_, _, coordinates, stride) = (levels, nothing(levels.dtype)), codes.bases, levels.shape
    dims = key_dims, values.shape[3]
    tokens = sum(held for held, _ in chunks)
    ranks = (basis.shape[1] for basis in codes.bases)
    launch = Launch(
        RESTORE,
        [*packed, keys, values, held, start, *bases, *codes.means,
         ints((heads, columns, capacity, stride, *ranks, int(prompt), tokens, coordinates))],
        [(batch, heads, columns, d) for d in dims],
        [keys.dtype, keys.dtype],
        (-(-columns // RESTORE_TOKENS), batch * heads, 2),
        -(-max(dims) // 32) * 32,
        0,
        (("T", keys.dtype), ("E", packed[0].dtype), ("DK", dims[0]), ("DV", dims[1])),
    )  # fmt: skip
    restored = by(launch, place)
    return restored[0], restored[1]


def decodes(keys: Quantizer, values: Quantizer) -> bool:
    """Whether the kernels read these codes."""
    if not (isinstance(keys, SpectralQuantizer) and isinstance(values, SpectralQuantizer)):
        return False
    return _readable(keys, values)


@kept_with_keys
def _readable(keys: SpectralQuantizer, values: SpectralQuantizer) -> bool:
    most = max(len(segments) for layout in (keys.layout, values.layout) for segments in layout.segments)
    return bool(keys.words and values.words) and most <= MOST_PIECES


def has_room(key_dims: int, value_dims: int, dtype: mx.Dtype, place: str) -> bool:
    """Whether a thread group of `attend` finds the shared memory that it needs."""
    if place != "metal":
        return True
    element = 4 if dtype == mx.float32 else 2
    key_rows, value_rows, warps = group_of(key_dims, value_dims, element, 0, QUERIES[-1], place)
    rows = max(key_rows, value_rows)
    return shared_bytes(key_dims, value_dims, rows, element, warps, 0, QUERIES[-1], place) <= METAL_BYTES


def fits(snapshot: "Snapshot", dtype: mx.Dtype, place: str) -> bool:
    """Whether the attention kernels of this back-end take these codes, and queries of this kind of numbers."""
    keys, values = snapshot.key_quantizer, snapshot.value_quantizer
    if not decodes(keys, values):
        return False
    if snapshot.exact_keys.dtype != dtype or snapshot.exact_values.dtype != dtype:
        return False
    return _fit(keys, values, snapshot.exact_keys.shape[3], snapshot.exact_values.shape[3], dtype, place)


@kept_with_keys
def _fit(
    keys: SpectralQuantizer, values: SpectralQuantizer, key_dims: int, value_dims: int, dtype: mx.Dtype, place: str
) -> bool:
    fetched, dims = head_words(keys, values) <= STAGES[-1], {key_dims, value_dims}
    return fetched and dims <= set(HEAD_DIMS) and has_room(key_dims, value_dims, dtype, place)
