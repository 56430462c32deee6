"""Attention over a snapshot: exact tokens and packed codes, merged by their running maximum and sum.

The packed part is never turned back: queries go into the basis of the codes, results come out of it. Source of the
merge: online softmax (Milakov & Gimelshein, arXiv 1805.02867), as in FlashAttention.
"""

import collections
import contextlib
import functools
import itertools
import os
import threading
from collections.abc import Callable
from typing import Literal

import mlx.core as mx

from . import kernels
from .kernels import columns, launches, steps
from .rows import Rows
from .spectral.intercept import original_attention
from .storage import Snapshot
from .trust import trusted

Mask = mx.array | Literal["causal"] | None
Part = Literal["sinks", "packed", "window"]
Stream = mx.Stream | mx.ThreadLocalStream

# Of all temporaries together: beyond a few MB they leave the cache of a CPU, beyond 32 MB MLX keeps their buffers no
# longer and they cost page faults (7-13 times slower). Smaller tiles cost launches, so a large layer takes more.
TILE_BYTES, LARGE_TILE_BYTES = 4 << 20, 12 << 20
TILE_SHARE = 4  # the part of a layer, decoded, that may be held at once where that is more than TILE_BYTES
GPU_TILE_BYTES = 128 << 20  # there, launches cost more
# Those that this process may use, where the system tells.
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
MOST_STREAMS = 8
COPIES = 6  # of a tile's levels that are held at once: MLX keeps a hundred operations in flight,
COPIES_OF_A_STREAM = 3  # and every stream works on some
DECODED_BYTES = 512 << 20  # of one layer's keys and values, for the time of a prompt chunk's attention
LARGE_CHUNK = 4 << 20  # bytes of new keys and values: a layer's share of a prompt is then worth waiting for
# By so much may a prompt's layers raise active memory, above the least of so many calls, before they wait for all that
# is under way. Models have fewer layers than that.
AHEAD_BYTES, CALLS_WATCHED = 3 << 29, 256
LOWEST = -1e30  # stands for minus infinity: finite, so that rows without any visible key stay free of NaN


def attend_reference(
    snapshot: Snapshot, queries: mx.array, scale: float, mask: Mask = None, sinks: mx.array | None = None
) -> mx.array:
    """The definition of correct: decode everything, then one scaled_dot_product_attention. Shapes as in `attend`."""
    keys, values = snapshot.decoded()
    if not snapshot.layout.alike:
        mask = _within_rows(snapshot.layout, mask, queries.shape[2])
    return original_attention()(queries, keys, values, scale=scale, mask=mask, sinks=sinks)


def attend(
    snapshot: Snapshot, queries: mx.array, scale: float, mask: Mask = None, sinks: mx.array | None = None
) -> mx.array:
    """Attention of queries [B, Hq, L, D] over the snapshot -> [B, Hq, L, Dv] in the queries' dtype.

    mask: None (every token), "causal" (aligned at the last token of each row), or an array that broadcasts to
    [B, Hq, L, T]: bool (True is visible) or additive; position j is token j of a row, and positions beyond a row's
    length are invisible whatever it says. sinks: a logit [Hq] of every query that takes weight and gives nothing
    (attention sinks).
    """
    if not snapshot.packed:
        return attend_reference(snapshot, queries, scale, mask, sinks)
    place = snapshot.place
    if place != "ops" and _kernels_attend(snapshot, queries.dtype, place):
        if queries.shape[2] <= launches.MOST_QUERIES:
            return attend_codes(snapshot, queries, scale, mask, sinks, place)
        if _decoded_bytes(snapshot, 1) <= DECODED_BYTES and snapshot.restores:
            return _attend_decoded(snapshot, queries, scale, mask, sinks, place)
    return attend_ops(snapshot, queries, scale, mask, sinks)


def attend_codes(
    snapshot: Snapshot,
    queries: mx.array,
    scale: float,
    mask: Mask,
    sinks: mx.array | None,
    place: str,
    run: kernels.Run | None = None,
    program: columns.Program | None = None,
) -> mx.array:
    """`attend` by the kernels, for at most launches.MOST_QUERIES tokens; `run` launches one, without tracing, and
    `program` is asked for in place of the one for these codes."""
    plan, operands = steps.step(snapshot, queries, scale, mask, sinks, place, program)
    return steps.attend(plan, operands) if run is None else steps.attend_by(run, plan, operands)


def _decoded_bytes(snapshot: Snapshot, heads: int) -> int:
    keys, values = snapshot.exact_keys, snapshot.exact_values
    token = keys.shape[3] * keys.dtype.size + values.shape[3] * values.dtype.size
    return int(keys.shape[0] * heads * snapshot.length * token)


def _attend_decoded(
    snapshot: Snapshot, queries: mx.array, scale: float, mask: Mask, sinks: mx.array | None, place: str
) -> mx.array:
    """For prompts: MLX's own attention over a decoding of as many heads at a time as DECODED_BYTES hold."""
    heads, layout = snapshot.exact_keys.shape[1], snapshot.layout
    if not layout.alike:
        mask = _within_rows(layout, mask, queries.shape[2])
    most = max(DECODED_BYTES // _decoded_bytes(snapshot, 1), 1)
    start, length, attention = (0,) * len(queries), layout.length, original_attention()
    if most >= heads:
        codes, chunks = snapshot.codes
        exact = snapshot.exact_keys, snapshot.exact_values
        held = layout.flat, *exact, launches.ints(start)
        keys, values = launches.restore(codes, chunks, *held, length, place, prompt=True)
        return attention(queries, keys, values, scale=scale, mask=mask, sinks=sinks)
    order = None if layout.alike else layout.order(start, length)
    group, results = queries.shape[1] // heads, []
    for first in range(0, heads, most):
        count = min(most, heads - first)
        rows = slice(first * group, (first + count) * group)
        keys, values = (
            layout.in_order(
                exact[:, first : first + count], launches.decode_heads(snapshot, part, first, count, place), order
            )
            for part, exact in enumerate((snapshot.exact_keys, snapshot.exact_values))
        )
        own = mask
        if isinstance(mask, mx.array) and mask.ndim == 4 and mask.shape[1] == queries.shape[1]:
            own = mask[:, rows]
        logits = None if sinks is None else sinks[rows]
        results.append(attention(queries[:, rows], keys, values, scale=scale, mask=own, sinks=logits))
        del keys, values
        wait_for(results[-1])  # or the decodings of all heads would be held
    return mx.concatenate(results, axis=1)


def wait_for(*arrays: mx.array) -> None:
    """Until what a GPU needed for these arrays is free again."""
    if mx.default_device().type == mx.DeviceType.gpu:
        # While MLX traces a function, nothing can be waited for.
        with contextlib.suppress(ValueError):
            mx.eval(arrays)


class _Sent(threading.local):
    """What keep_pace asked for last, and active memory, in bytes, at its calls before."""

    def __init__(self) -> None:
        self.mark: list[mx.array] = []
        self.held: collections.deque[int] = collections.deque(maxlen=CALLS_WATCHED)


_sent = _Sent()


def keep_pace(*arrays: mx.array) -> None:
    """Send what these arrays of a prompt need to a GPU, if they are a large piece, and wait for those of the last call:
    MLX would send it the work of dozens of layers ahead, each with memory of its own. Waiting for these instead would
    leave it without work whenever Python builds a layer."""
    if mx.default_device().type != mx.DeviceType.gpu or sum(a.nbytes for a in arrays) < LARGE_CHUNK:
        return
    with contextlib.suppress(ValueError):  # as above
        mark = [mx.depends([mx.array(0)], list(arrays))]  # which holds nothing of theirs
        mx.async_eval(mark)  # type: ignore[no-untyped-call]
        mx.eval(_sent.mark)
        _sent.mark = mark
        _sent.held.append(mx.get_active_memory())
        # MLX gives memory back in a thread that comes late where the CPU is busy: a peak was 3.25 GB that is 2.15 else.
        if _sent.held[-1] - min(_sent.held) > AHEAD_BYTES:
            mx.synchronize()


def _kernels_attend(snapshot: Snapshot, dtype: mx.Dtype, place: str) -> bool:
    if snapshot.layout.most_exact > launches.TOKENS * (launches.MOST_SPLITS - 1):
        return False
    return snapshot.once((dtype, place), lambda: launches.fits(snapshot, dtype, place) and _trusts(snapshot, place))


def _trusts(snapshot: Snapshot, place: str) -> bool:
    keys, values = snapshot.exact_keys, snapshot.exact_values
    program = steps.program_of(*launches.spectral(snapshot), keys.dtype == mx.float32, place)
    return trusted(place, keys.shape[3], values.shape[3], keys.dtype, program)


def attend_ops(
    snapshot: Snapshot, queries: mx.array, scale: float, mask: Mask = None, sinks: mx.array | None = None
) -> mx.array:
    """`attend` in plain operations, for any quantizers and on any device."""
    batch, query_heads, length, dims = queries.shape
    heads = snapshot.exact_keys.shape[1]
    rows = (batch, heads, query_heads // heads * length, dims)  # the queries of a group attend to the same codes
    q = queries.astype(mx.float32).reshape(rows) * scale
    visible = _Visible(mask, snapshot.layout, length, query_heads, heads)
    merged = _packed_part(snapshot, q, visible)
    merged = _exact_part(snapshot, q, visible, merged)
    if sinks is not None:
        logit = mx.broadcast_to(sinks.astype(mx.float32)[:, None], (query_heads, length)).reshape(1, heads, -1, 1)
        merged = _merge(merged, logit, mx.ones_like(logit), None)
    _, total, output = merged
    return (output / total).reshape(batch, query_heads, length, -1).astype(queries.dtype)


Running = tuple[mx.array, mx.array, mx.array]


def _packed_part(snapshot: Snapshot, q: mx.array, visible: "_Visible") -> Running:
    folded, constant = snapshot.key_quantizer.fold_queries(q)
    streams, before, results = _streams()[: q.shape[1]], [folded], []
    for first in range(0, q.shape[1], len(streams)):
        heads = range(first, min(first + len(streams), q.shape[1]))
        own = [(snapshot.key_quantizer.sorted_queries(folded, h), constant[:, h]) for h in heads]
        results += _packed_heads(snapshot, heads, own, visible, before, streams)
        before = [output for _, _, output in results[first:]]
    outputs = [snapshot.value_quantizer.stored_outputs(r[2], h) for h, r in enumerate(results)]
    top, total = (mx.stack([r[i] for r in results], axis=1) for i in range(2))
    return top, total, snapshot.value_quantizer.unfold_outputs(mx.stack(outputs, axis=1), total)


def _packed_heads(
    snapshot: Snapshot,
    heads: range,
    queries: list[tuple[mx.array, mx.array]],
    visible: "_Visible",
    before: list[mx.array],
    streams: list[Stream],
) -> list[Running]:
    """Each head's queries [B, R, n] over the packed tokens, a head on each stream, after what is to be done `before`.

    MLX evaluates side by side what does not depend on each other, all tiles of all layers at once, but begins nothing
    while a hundred operations wait. So a step of every head waits for the last step of all, and for nothing more.
    """
    running: list[Running | None] = [None] * len(heads)
    tile = _tile_tokens(snapshot, queries[0][0], len(streams))
    for start in range(0, snapshot.packed_tokens, tile):
        end = min(start + tile, snapshot.packed_tokens)
        key_words, value_words = snapshot.words(start, end)
        key_words = mx.depends([key_words], before)[0]
        scores: list[mx.array] = []
        for head, (query, constant), stream in zip(heads, queries, streams, strict=False):
            with mx.stream(stream):
                product = snapshot.key_quantizer.head_scores(query, key_words, head) + constant
                scores.append(visible.hide(product, "packed", start, end, head))
        value_words = mx.depends([value_words], scores)[0]
        for i, (head, stream) in enumerate(zip(heads, streams, strict=False)):
            with mx.stream(stream):
                sums = functools.partial(snapshot.value_quantizer.head_sums, words=value_words, head=head)
                running[i] = _attend_tile(running[i], scores[i], sums)
        before = [r[2] for r in running if r is not None]
    return [r for r in running if r is not None]


def _exact_part(snapshot: Snapshot, q: mx.array, visible: "_Visible", running: Running) -> Running:
    layout = snapshot.layout
    sinks, start, end = max(layout.held_sinks), min(layout.window_start), layout.window_end
    tile = max(TILE_BYTES // 4 // max(q.shape[0] * q.shape[1] * q.shape[2], 1), 64)
    # Sinks and window are apart in the sequence, so a tile never spans both.
    tiles: list[tuple[Part, int, int]] = [("sinks", 0, sinks)] if sinks else []
    tiles += [("window", a, b) for a, b in itertools.pairwise([*range(start, end, tile), end])]
    for part, a, b in tiles:
        keys = snapshot.exact_keys[:, :, a:b].astype(mx.float32)
        scores = mx.depends([q], [running[2]])[0] @ keys.swapaxes(-1, -2)
        scores = visible.hide(scores, part, a, b)
        values = snapshot.exact_values[:, :, a:b].astype(mx.float32)
        running = _attend_tile(running, scores, functools.partial(_times, values))
    return running


def _streams() -> list[Stream]:
    """Where heads are computed: side by side on a CPU, whose streams keep one core busy each."""
    here = mx.default_stream(mx.default_device())
    return [here] if mx.default_device() == mx.gpu else [here, *_more_streams()[: CORES - 1]]


@functools.cache
def _more_streams() -> list[mx.ThreadLocalStream]:
    return [mx.new_thread_local_stream(mx.cpu) for _ in range(MOST_STREAMS - 1)]


def _tile_bytes(snapshot: Snapshot) -> int:
    if mx.default_device() == mx.gpu:
        return GPU_TILE_BYTES
    batch, heads, _, dims = snapshot.exact_keys.shape
    decoded = 4 * batch * heads * snapshot.packed_tokens * (dims + snapshot.exact_values.shape[3])
    return min(max(decoded // TILE_SHARE, TILE_BYTES), LARGE_TILE_BYTES)


def _tile_tokens(snapshot: Snapshot, queries: mx.array, streams: int) -> int:
    """Tokens of a head whose unpacking, and whose scores, stay within _tile_bytes on all streams together; a multiple
    of 64, at least 64."""
    batch, rows, _ = queries.shape
    dims = max(snapshot.exact_keys.shape[3], snapshot.exact_values.shape[3])
    copies = max(COPIES, COPIES_OF_A_STREAM * streams)
    per_token = 4 * batch * max(copies * dims, streams * rows)
    return int(max(_tile_bytes(snapshot) // per_token // 64 * 64, 64))


def _attend_tile(running: Running | None, scores: mx.array, product: Callable[[mx.array], mx.array]) -> Running:
    """Merge scores [..., R, t] and the product of weights [..., R, t] with values into (maximum, sum of weights, sum of
    weighted values)."""
    top = mx.maximum(scores.max(axis=-1, keepdims=True), LOWEST)
    weights = mx.exp(scores - top)
    total, output = weights.sum(axis=-1, keepdims=True), product(weights)
    return (top, total, output) if running is None else _merge(running, top, total, output)


def _times(values: mx.array, weights: mx.array) -> mx.array:
    return weights @ values


def _merge(running: Running, top: mx.array, total: mx.array, output: mx.array | None) -> Running:
    old_top, old_total, old_output = running
    new_top = mx.maximum(old_top, top)
    old_scale, scale = mx.exp(old_top - new_top), mx.exp(top - new_top)
    merged = old_output * old_scale
    return new_top, old_total * old_scale + total * scale, merged if output is None else merged + output * scale


def _within_rows(layout: Rows, mask: Mask, length: int) -> mx.array:
    """The mask, [B, *, L or 1, T], with positions beyond a row's length hidden."""
    position, tokens = mx.arange(layout.length), layout.tokens[:, None, None, None]
    if isinstance(mask, str):
        return position <= tokens - length + mx.arange(length)[:, None]
    inside = position < tokens
    if mask is None:
        return inside
    return mask & inside if mask.dtype == mx.bool_ else mx.where(inside, mask, mx.array(-mx.inf, mask.dtype))


class _Visible:
    """Which tokens each query may see, a range of columns of one part at a time."""

    def __init__(self, mask: Mask, layout: Rows, length: int, query_heads: int, heads: int) -> None:
        self._layout, self._length, self._heads = layout, length, heads
        self._group = query_heads // heads
        self._mask = mask
        if isinstance(mask, mx.array):
            wide = mask.reshape((1,) * (4 - mask.ndim) + mask.shape)
            shape = (wide.shape[0], heads, self._group) if wide.shape[1] == query_heads else (wide.shape[0], 1, 1)
            self._mask = wide.reshape(*shape, *wide.shape[2:])

    def hide(self, scores: mx.array, part: Part, start: int, end: int, head: int | None = None) -> mx.array:
        """Scores [B, H, G * L, end - start] of columns start..end with those that are not visible lowered; of one head,
        [B, G * L, end - start]."""
        if self._layout.alike:
            mask = self._of_positions(start + self._shift(part), end + self._shift(part))
        else:
            mask = self._of_columns(part, start, end)
        if mask is None:
            return scores
        heads = self._heads if head is None else 1
        if head is not None and mask.ndim == 5 and mask.shape[1] > 1:
            mask = mask[:, head : head + 1]
        grouped = scores.reshape(scores.shape[0], heads, self._group, self._length, end - start)
        if mask.dtype == mx.bool_:
            grouped = mx.where(mask, grouped, LOWEST)
        else:
            grouped = mx.maximum(grouped + mask.astype(mx.float32), LOWEST)
        return grouped.reshape(scores.shape)

    def _shift(self, part: Part) -> int:
        """From a column to the position of its token, in rows that are alike."""
        sinks, window = self._layout.held_sinks[0], self._layout.window_start[0]
        return {"sinks": 0, "packed": sinks, "window": sinks + self._layout.packed_tokens[0] - window}[part]

    def _of_positions(self, start: int, end: int) -> mx.array | None:
        """The mask of positions start..end, the same in all rows; None where everything is visible."""
        if self._mask is None or (self._length == 1 and isinstance(self._mask, str)):
            return None
        if isinstance(self._mask, str):
            first = self._layout.length - self._length  # position of the first query
            if end - 1 <= first:
                return None
            return mx.arange(first, self._layout.length)[:, None] >= mx.arange(start, end)[None]
        return self._mask if self._mask.shape[-1] == 1 else self._mask[..., start:end]

    def _of_columns(self, part: Part, start: int, end: int) -> mx.array | None:
        """The mask of columns start..end, whose tokens are at positions of their own in every row."""
        held, first, _, packed = (self._layout.column(i) for i in range(4))
        column = mx.arange(start, end)[None]
        everywhere = part == "packed" and end <= min(self._layout.packed_tokens)
        if everywhere and self._mask is None:
            return None
        present, position = {
            "sinks": (column < held, column),
            "packed": (column < packed, column + held),
            "window": (column >= first, column - first + held + packed),
        }[part]
        present, position = (x[:, None, None, None] for x in (present, position))
        if isinstance(self._mask, str):
            last = self._layout.tokens[:, None, None, None, None] - self._length + mx.arange(self._length)[:, None]
            return present & (position <= last)
        if self._mask is None or self._mask.shape[-1] == 1:
            return present if self._mask is None else self._where_present(present, self._mask)
        position = mx.broadcast_to(mx.clip(position, 0, self._layout.length - 1), (len(held), 1, 1, 1, end - start))
        rows = mx.broadcast_to(self._mask, (len(held), *self._mask.shape[1:]))
        return self._where_present(present, mx.take_along_axis(rows, position, axis=-1))

    @staticmethod
    def _where_present(present: mx.array, mask: mx.array) -> mx.array:
        return present & mask if mask.dtype == mx.bool_ else mx.where(present, mask, mx.array(LOWEST, mx.float32))
