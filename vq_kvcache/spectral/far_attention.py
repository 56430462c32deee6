"""Attention that can be differentiated by errors in its far keys and values alone: those outside window and sinks."""

from typing import Any

import mlx.core as mx

TILE = 128  # queries at a time: a tile sees no key after its last query, so nearly half of all scores are never made
MASKED = -1e30


def far_attention(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    key_errors: mx.array,
    value_errors: mx.array,
    *,
    window: int,
    exact: int,
    scale: float,
    mask: Any = None,
    sinks: mx.array | None = None,
) -> mx.array:
    """Attention [B, Hq, L, Dv] whose gradients by the errors are those of `far_attention_reference` where errors are 0.

    key_errors [B, H, L, D] and value_errors [B, H, L, Dv], float32, must be zero: their values are not read. Scores are
    made again in the backward pass, not kept, and no product of errors is ever made.
    """
    visible = None if isinstance(mask, str) else mask

    @mx.custom_function
    def attend(q: mx.array, k: mx.array, v: mx.array, ek: mx.array, ev: mx.array) -> mx.array:
        tiles = _Tiles(q, k, v, scale, isinstance(mask, str), visible, sinks)
        results = [tiles.weights(start) @ tiles.values[..., : tiles.seen(start), :] for start in tiles.starts]
        return tiles.joined(results).astype(q.dtype)

    @attend.vjp
    def vjp(primals: Any, cotangent: mx.array, output: mx.array) -> tuple[mx.array, ...]:
        q, k, v, _, _ = primals
        tiles = _Tiles(q, k, v, scale, isinstance(mask, str), visible, sinks)
        dq, dk, dv, dek, dev = tiles.gradients(tiles.grouped(cotangent), window, exact)
        return dq.astype(q.dtype), (dk + dek).astype(k.dtype), (dv + dev).astype(v.dtype), dek, dev

    result = attend(queries, keys, values, key_errors, value_errors)
    assert isinstance(result, mx.array)  # MLX's stubs say object
    return result


def far_attention_reference(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    key_errors: mx.array,
    value_errors: mx.array,
    *,
    window: int,
    exact: int,
    scale: float,
    mask: Any = None,
    sinks: mx.array | None = None,
) -> mx.array:
    """Attention [B, Hq, L, Dv] in which positions at least `window` behind a query, and not among the first `exact`,
    read keys + key_errors and values + value_errors."""
    batch, query_heads, length, dims = queries.shape
    heads = keys.shape[1]
    far = _far(0, length, 0, length, window, exact)
    visible = _behind(0, length, 0, length) >= 0 if isinstance(mask, str) else mask
    q = queries.astype(mx.float32).reshape(batch, heads, -1, length, dims) * scale
    k, v, ek, ev = (x.astype(mx.float32)[:, :, None] for x in (keys, values, key_errors, value_errors))
    scores = q @ k.swapaxes(-1, -2) + mx.where(far, q @ ek.swapaxes(-1, -2), 0)
    scores = scores.reshape(batch, query_heads, length, length)
    if visible is not None:
        scores = mx.where(visible, scores, MASKED) if visible.dtype == mx.bool_ else scores + visible
    if sinks is not None:
        logit = mx.broadcast_to(sinks.astype(mx.float32)[:, None, None], (batch, query_heads, length, 1))
        scores = mx.concatenate([scores, logit], axis=-1)
    weights = mx.softmax(scores, axis=-1)[..., :length].reshape(batch, heads, -1, length, length)
    result = (weights @ v + mx.where(far, weights, 0) @ ev).reshape(batch, query_heads, length, -1)
    return result.astype(queries.dtype)


def _behind(start: int, end: int, first: int, last: int) -> mx.array:
    """How far keys first..last lie behind queries start..end, int32 [end - start, last - first]."""
    return mx.arange(start, end)[:, None] - mx.arange(first, last)[None]


def _far(start: int, end: int, first: int, last: int, window: int, exact: int) -> mx.array:
    return (_behind(start, end, first, last) >= window) & (mx.arange(first, last)[None] >= exact)


class _Tiles:
    """One attention in tiles of queries, the G query heads of a group side by side: float32 [B, H, G * tile, seen]."""

    def __init__(
        self,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        scale: float,
        causal: bool,
        visible: mx.array | None,
        sinks: mx.array | None,
    ) -> None:
        self.batch, self.query_heads, self.length, _ = queries.shape
        self.heads = keys.shape[1]
        self.group = self.query_heads // self.heads
        self.scale, self.causal, self.visible, self.sinks = scale, causal, visible, sinks
        self.queries = self.grouped(queries) * scale
        self.keys, self.values = keys.astype(mx.float32), values.astype(mx.float32)
        # Whole rows: products with a transposed right side are several times slower on a CPU.
        self.keys_turned, self.values_turned = (mx.contiguous(x.swapaxes(-1, -2)) for x in (self.keys, self.values))
        self.starts = range(0, self.length, TILE)

    def grouped(self, x: mx.array) -> mx.array:
        """[B, Hq, L, D] -> float32 [B, H, G, L, D]."""
        return x.astype(mx.float32).reshape(self.batch, self.heads, self.group, self.length, x.shape[-1])

    def tile(self, x: mx.array, start: int) -> mx.array:
        """Rows of one tile, [B, H, G * tile, D]."""
        return x[:, :, :, start : self.end(start)].flatten(2, 3)

    def joined(self, tiles: list[mx.array]) -> mx.array:
        """Tiles [B, H, G * tile, D] -> [B, Hq, L, D]."""
        apart = [mx.unflatten(t, 2, (self.group, -1)) for t in tiles]
        return mx.concatenate(apart, axis=3).reshape(self.batch, self.query_heads, self.length, -1)

    def end(self, start: int) -> int:
        return min(start + TILE, self.length)

    def seen(self, start: int) -> int:
        """How many of the first keys a tile sees."""
        return self.end(start) if self.causal else self.length

    def weights(self, start: int) -> mx.array:
        """[B, H, G * tile, seen]."""
        seen = self.seen(start)
        scores = self.tile(self.queries, start) @ self.keys_turned[..., :seen]
        scores = mx.unflatten(scores, 2, (self.group, -1))
        mask = self._mask(start)
        if mask is not None:
            scores = mx.where(mask, scores, MASKED) if mask.dtype == mx.bool_ else scores + mask
        if self.sinks is None:
            return mx.softmax(scores, axis=-1).flatten(2, 3)
        logit = self.sinks.astype(mx.float32).reshape(1, self.heads, self.group, 1, 1)
        logit = mx.broadcast_to(logit, (*scores.shape[:-1], 1))
        return mx.softmax(mx.concatenate([scores, logit], axis=-1), axis=-1)[..., :seen].flatten(2, 3)

    def _mask(self, start: int) -> mx.array | None:
        """What to hide of one tile, for [B, H, G, tile, seen]: booleans, or numbers to add."""
        if self.causal:
            return mx.where(_behind(start, self.end(start), 0, self.seen(start)) >= 0, 0.0, MASKED)
        if self.visible is None:
            return None
        rows = self.visible
        if rows.ndim >= 2 and rows.shape[-2] > 1:
            rows = rows[..., start : self.end(start), :]
        if rows.ndim == 4:
            rows = rows[:, :, None] if rows.shape[1] == 1 else mx.unflatten(rows, 1, (self.heads, self.group))
        return rows

    def gradients(self, cotangent: mx.array, window: int, exact: int) -> tuple[mx.array, ...]:
        """Of the queries; of near keys and values; of far keys and values."""
        dq: list[mx.array] = []
        near = [mx.zeros_like(self.keys), mx.zeros_like(self.values)]
        far = [mx.zeros_like(self.keys), mx.zeros_like(self.values)]
        for start in self.starts:
            q, seen = self.tile(self.queries, start), self.seen(start)
            do, weights = self.tile(cotangent, start), self.weights(start)
            slope = do @ self.values_turned[..., :seen]
            slope = weights * (slope - (weights * slope).sum(axis=-1, keepdims=True))
            dq.append(slope @ self.keys[:, :, :seen] * self.scale)
            is_far = _far(start, self.end(start), 0, seen, window, exact).astype(mx.float32)
            # Nothing before the window is near but the sinks.
            first = min(max(start - window + 1, 0), seen)
            for i, (matrix, rows) in enumerate(((slope, q), (weights, do))):
                parts = mx.unflatten(matrix, 2, (self.group, -1))
                far[i] = _added(far[i], 0, (parts * is_far).flatten(2, 3), rows)
                near_part = parts[..., first:] * (1 - is_far[:, first:])
                near[i] = _added(near[i], first, near_part.flatten(2, 3), rows)
                if (sinks := min(exact, first)) > 0:
                    near[i] = _added(near[i], 0, parts[..., :sinks].flatten(2, 3), rows)
        return self.joined(dq), *near, *far


def _added(total: mx.array, first: int, matrix: mx.array, rows: mx.array) -> mx.array:
    """total [B, H, L, D] with matrixT rows added from `first` on."""
    part = matrix.swapaxes(-1, -2) @ rows
    return total.at[:, :, first : first + part.shape[2]].add(part)
