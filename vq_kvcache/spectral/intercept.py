"""Sees, and can replace, the attention of every layer: the one place that touches mx.fast.scaled_dot_product_attention.

mlx-lm's models hand what a cache returned to that one function. A *handle* is an mx.array that also says where it came
from, so the patched function asks the handle's source to attend and passes everything else to the original.
"""

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import mlx.core as mx

See = Callable[[int, mx.array, mx.array, mx.array], None]
Attention = Callable[..., mx.array]


class Source(Protocol):
    """What a handle points to."""

    def attention(
        self, queries: mx.array, keys: "Handle", values: mx.array, original: Callable[..., mx.array], **options: Any
    ) -> mx.array:
        """The result of scaled_dot_product_attention for this handle; `original` is MLX's own function."""


class Handle(mx.array):
    """An array that knows its source, and which part of it ("keys" or "values") it is. Every op takes it for the array
    it wraps and returns plain arrays."""

    source: Source
    part: str

    def __init__(self, array: mx.array, source: Source, part: str) -> None:
        super().__init__(array)
        self.source, self.part = source, part


_NAME = "scaled_dot_product_attention"
_lock = threading.Lock()
_users = 0
_original: Callable[..., mx.array] = mx.fast.scaled_dot_product_attention


def original_attention() -> Callable[..., mx.array]:
    """MLX's own scaled_dot_product_attention, whether or not it is replaced at present."""
    return _original


def _attention(queries: mx.array, keys: mx.array, values: mx.array, **options: Any) -> mx.array:
    if isinstance(keys, Handle):
        return keys.source.attention(queries, keys, values, _original, **options)
    return _original(queries, keys, values, **options)


def enable() -> None:
    """Put the dispatching attention in place of MLX's. Counted: each call needs one `disable`."""
    global _users, _original
    with _lock:
        _users += 1
        if _users == 1:
            _original = mx.fast.scaled_dot_product_attention
            setattr(mx.fast, _NAME, _attention)


def disable() -> None:
    """Undo one `enable`; the last one restores MLX's function."""
    global _users
    with _lock:
        if _users == 0:
            return
        _users -= 1
        # Somebody may have wrapped ours meanwhile: theirs stays, and ours passes everything on.
        if _users == 0 and getattr(mx.fast, _NAME) is _attention:
            setattr(mx.fast, _NAME, _original)


@contextlib.contextmanager
def dispatching() -> Iterator[None]:
    """Handles are attended by their sources inside this block."""
    enable()
    try:
        yield
    finally:
        disable()


class Recorder:
    """Takes the place of a KV cache for one forward pass over a whole sequence: shows what passes and keeps nothing."""

    def __init__(self, index: int, attend: Attention, offset: int) -> None:
        self.index, self.attend, self.offset = index, attend, offset
        self._fetched: tuple[Handle, Handle] | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Handle, Handle]:
        self._fetched = Handle(keys, self, "keys"), Handle(values, self, "values")
        return self._fetched

    def keys_and_values(self) -> tuple[Handle, Handle]:
        assert self._fetched is not None  # a model asks only after its own update
        return self._fetched

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array | str | None:
        if window_size is None and not return_array:
            return None if N == 1 else "causal"
        rows, columns = mx.arange(N)[:, None], mx.arange(N)[None]
        mask = rows >= columns
        return mask if window_size is None else mask & (rows < columns + window_size)

    def attention(
        self, queries: mx.array, keys: Handle, values: mx.array, original: Callable[..., mx.array], **options: Any
    ) -> mx.array:
        return self.attend(self.index, queries, keys, values, original, **options)


def recorders(model: Any, attend: Attention, offset: int = 0) -> list[Any]:
    """Caches to pass as `cache=` for one forward pass over a whole sequence.

    Every full-attention layer attends by `attend(index, queries, keys, values, original, scale=, mask=, ...)`, index
    that of the layer's cache, queries [B, Hq, L, D], keys and values [B, H, L, D]. Layers with another kind of state
    (sliding windows, recurrent state) get the model's own cache and are not seen. `offset` is the position of the
    sequence's first token.
    """
    make_cache = getattr(type(model), "make_cache", None)  # the class's own: an instance may carry a hook
    if make_cache is None:
        return [Recorder(i, attend, offset) for i in range(len(model.layers))]
    return [
        Recorder(i, attend, offset) if type(c).__name__ == "KVCache" else c for i, c in enumerate(make_cache(model))
    ]


def observers(model: Any, see: See, offset: int = 0) -> list[Any]:
    """`recorders` that call `see(index, queries, keys, values)` and attend as MLX does."""

    def attend(
        index: int, queries: mx.array, keys: mx.array, values: mx.array, original: Attention, **options: Any
    ) -> mx.array:
        see(index, queries, keys, values)
        return original(queries, keys, values, **options)

    return recorders(model, attend, offset)


def require_layers(seen: dict[int, Any]) -> None:
    """ValueError unless some layer was seen."""
    if not seen:
        raise ValueError(
            "no layer of this model passed keys to mx.fast.scaled_dot_product_attention; expected full-attention "
            "layers; use a full-precision cache with it."
        )
