"""Sees, and can replace, the attention of every layer: the one place that touches mx.fast.scaled_dot_product_attention.

mlx-lm's models hand what a cache returned to that one function. A *handle* is an mx.array that also says where it came
from, so the patched function asks the handle's source to attend and passes everything else to the original.
"""

import contextlib
import dataclasses
import functools
import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, Literal, Protocol, TypeVar, cast

import mlx.core as mx

See = Callable[[int, mx.array | None, mx.array, mx.array], None]
Attention = Callable[..., mx.array]
Append = Callable[[int, mx.array, mx.array], tuple[mx.array, mx.array]]


class Source(Protocol):
    """What a handle points to."""

    def attention(
        self, queries: mx.array, keys: "AnyHandle", values: Any, original: Callable[..., mx.array], **options: Any
    ) -> mx.array:
        """The result of scaled_dot_product_attention for this handle; `original` is MLX's own function."""

    def array(self, part: str) -> mx.array:
        """What a handle on the keys or the values stands for."""


F = TypeVar("F", bound=Callable[..., Any])


def one_at_a_time(lock: contextlib.AbstractContextManager[Any]) -> Callable[[F], F]:
    """Decorates functions that one thread after the other may enter."""

    def decorate(function: F) -> F:
        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            with lock:
                return function(*args, **kwargs)

        return cast(F, call)

    return decorate


class Handle(mx.array):
    """An array that knows its source, and which part of it ("keys" or "values") it is. Every op takes it for the array
    it wraps and returns plain arrays."""

    __slots__ = ("part", "source")  # every layer makes two in every step
    source: Source
    part: str

    def __init__(self, array: mx.array, source: Source, part: str) -> None:
        super().__init__(array)
        self.source, self.part = source, part


class BareHandle:
    """A handle without an array: all that attention needs. The graph of an array that hardly any model reads takes as
    long to build as the rest of a layer's step. For caches that are `attended_only`: were it read all the same, its
    attributes and operators are the array's, but what takes nothing but arrays, as most of MLX's functions, raises."""

    __slots__ = ("part", "source")

    def __init__(self, source: Source, part: str) -> None:
        self.source, self.part = source, part

    def __mlx_array__(self) -> mx.array:  # asked for by MLX's operators
        return self.source.array(self.part)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__mlx_array__(), name)


def _of_the_array(name: str) -> Callable[..., Any]:
    def operator(self: BareHandle, *args: Any, **options: Any) -> Any:
        return getattr(self.__mlx_array__(), name)(*args, **options)

    return operator


_COMPARISONS = {"__eq__", "__ne__", "__lt__", "__le__", "__gt__", "__ge__"}
_OWN = {*dir(object), "__module__", "__setstate__"} - _COMPARISONS
for _operator in {name for name in dir(mx.array) if name.startswith("__")} - _OWN:
    setattr(BareHandle, _operator, _of_the_array(_operator))


AnyHandle = Handle | BareHandle


def handles_on(source: Source, arrays: tuple[mx.array, mx.array] | None) -> tuple[AnyHandle, AnyHandle]:
    """Handles on the keys and the values of a source, which these arrays are; bare ones without any."""
    if arrays is None:
        return BareHandle(source, "keys"), BareHandle(source, "values")
    keys, values = arrays
    return Handle(keys, source, "keys"), Handle(values, source, "values")


def array_of(x: Any) -> Any:
    """What MLX's functions take for a handle, bare or not, or for an array."""
    return x.__mlx_array__() if isinstance(x, BareHandle) else x


_NAME = "scaled_dot_product_attention"
_lock = threading.Lock()
_tracing = threading.RLock()  # one thread traces, or it would put back what another's trace left for a moment
_users = 0
_original: Callable[..., mx.array] = mx.fast.scaled_dot_product_attention


def original_attention() -> Callable[..., mx.array]:
    """MLX's own scaled_dot_product_attention, whether or not it is replaced at present."""
    return _original


def _attention(queries: mx.array, keys: mx.array, values: mx.array, **options: Any) -> mx.array:
    if isinstance(keys, AnyHandle):
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


def is_dispatching() -> bool:
    """Whether MLX's attention is ours at present, so that bare handles are understood."""
    return _users > 0 and getattr(mx.fast, _NAME) is _attention


@contextlib.contextmanager
def dispatching() -> Iterator[None]:
    """Handles are attended by their sources inside this block."""
    enable()
    try:
        yield
    finally:
        disable()


class Recorder:
    """Takes the place of a KV cache for one forward pass over a whole sequence: shows what passes and keeps nothing.

    bare: it hands out bare handles, and notes whether they are read.
    """

    def __init__(self, index: int, attend: Attention, offset: int, append: Append | None, bare: bool = False) -> None:
        self.index, self.attend, self._append, self.offset = index, attend, append, offset
        self._fetched: tuple[AnyHandle, AnyHandle] | None = None
        self._bare, self.was_read = bare, False
        self.state_was_read = False
        self.keys: mx.array | None = None  # pipelines hang dependencies on these
        self.values: mx.array | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[AnyHandle, AnyHandle]:
        if self._append is not None:
            keys, values = self._append(self.index, keys, values)
        self.keys, self.values = keys, values
        self._fetched = handles_on(self, None if self._bare else (keys, values))
        return self._fetched

    def array(self, part: str) -> mx.array:
        self.was_read = True
        array: mx.array = getattr(self, part)
        return array

    def forget(self) -> None:
        """Drop what passed: handles and their source hold each other, and with them the model's graph."""
        self._fetched = self.keys = self.values = None

    def keys_and_values(self) -> tuple[AnyHandle, AnyHandle]:
        assert self._fetched is not None  # a model asks only after its own update
        return self._fetched

    @property
    def state(self) -> tuple[AnyHandle, AnyHandle]:  # models that share layers asked so before mlx-lm 0.32
        self.state_was_read = True
        return self.keys_and_values()

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> mx.array | str | None:
        if window_size is None and not return_array:
            return None if N == 1 else "causal"
        rows, columns = mx.arange(N)[:, None], mx.arange(N)[None]
        mask = rows >= columns
        return mask if window_size is None else mask & (rows < columns + window_size)

    def attention(
        self, queries: mx.array, keys: AnyHandle, values: Any, original: Callable[..., mx.array], **options: Any
    ) -> mx.array:
        return self.attend(self.index, queries, keys, values, original, **options)


def plain_caches(model: Any) -> list[Any]:
    """The caches that a model makes by itself, whatever hook its instance carries."""
    from mlx_lm.models.cache import KVCache

    make_cache = getattr(type(model), "make_cache", None)  # the class's own: an instance may carry a hook
    return [KVCache() for _ in model.layers] if make_cache is None else list(make_cache(model))


def replace_kv(caches: Sequence[Any], replacement: Callable[[int, Any, bool], Any]) -> list[Any]:
    """The caches with each KVCache replaced by `replacement(index, cache, nested)`, those in a CacheList (nested) too.

    index: its place among all caches, members of a CacheList counted one by one. Where there is no CacheList it is
    the place in `caches`.
    """
    index = 0
    result = []
    for cache in caches:
        nested = is_list(cache)
        changed = []
        for member in members_of(cache):
            is_kv = type(member).__name__ == "KVCache"
            changed.append(replacement(index, member, nested) if is_kv else member)
            index += 1
        result.append(type(cache)(*changed) if nested else changed[0])
    return result


def is_list(cache: Any) -> bool:
    """Whether this is an mlx-lm CacheList: several caches of one layer."""
    return type(cache).__name__ == "CacheList"


def members_of(cache: Any) -> list[Any]:
    """The caches in a CacheList, or the cache itself."""
    return list(cache.caches) if is_list(cache) else [cache]


def recorders(
    model: Any,
    attend: Attention,
    offset: int = 0,
    *,
    append: Append | None = None,
    only: Collection[int] | None = None,
    bare: bool = False,
) -> list[Any]:
    """Caches to pass as `cache=` for one forward pass over a whole sequence.

    Every KV cache's layer attends by `attend(index, queries, keys, values, original, scale=, mask=, ...)`, index that
    of the cache (`replace_kv`), queries [B, Hq, L, D], keys and values [B, H, L, D]; before that, `append(index, keys,
    values)` gives what the model is to get in place of what it appends. `offset` is the position of the first token.
    Other state (sliding windows, recurrent state), and caches not in `only`, stay the model's own and are not seen.
    bare: what the model fetches are bare handles.
    """
    return replace_kv(
        plain_caches(model),
        lambda i, own, nested: Recorder(i, attend, offset, append, bare) if only is None or i in only else own,
    )


@dataclasses.dataclass(frozen=True)
class Use:
    """How a model uses one of its KV caches: H heads of `key_dims` and `value_dims` numbers, and how they are read.

    kind: "paired" (keys and values of one attention), "latent" (the keys are attended to as keys and as values, what
    is cached as values are positions: multi-head latent attention), or "own" (by the model's own arithmetic).
    readers: attentions that read it; more than one where layers share keys and values.
    """

    heads: int
    key_dims: int
    value_dims: int
    kind: Literal["paired", "latent", "own"]
    readers: int = 1


def uses(model: Any) -> dict[int, Use]:
    """How the model uses each KV cache worth packing, by index (`replace_kv`); one token is traced, nothing computed.

    In a CacheList, caches that no attention reads are keys of an indexer, and are left out. So are those that
    `read_by_state` names.
    """
    return _trace(model)[0]


def read_by_state(model: Any) -> set[int]:
    """The KV caches whose `state` the model takes for their keys and values, by index: packed, they would have others.
    afm7 and gemma3n do so in mlx-lm before 0.32."""
    return _trace(model)[1]


def _trace(model: Any) -> tuple[dict[int, Use], set[int]]:
    shapes: dict[int, tuple[int, int, int]] = {}
    kinds: dict[int, Literal["paired", "latent"]] = {}
    readers: dict[int, int] = {}

    def append(index: int, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        shapes[index] = keys.shape[1], keys.shape[3], values.shape[3]
        return keys, values

    def attend(
        index: int, queries: mx.array, keys: mx.array, values: mx.array, original: Attention, **options: Any
    ) -> mx.array:
        readers[index] = readers.get(index, 0) + 1
        if is_pair(keys, values):
            kinds[index] = "paired"
        elif values is keys:
            kinds[index] = "latent"
        return original(queries, keys, values, **options)

    caches = recorders(model, attend, append=append)
    nested_ones = {r.index for r in _recorders_in(filter(is_list, caches))}
    by_state = {r.index for r in _given_a_token(model, caches) if r.state_was_read}
    left_out = nested_ones - set(kinds) | by_state
    found = {i: Use(*s, kinds.get(i, "own"), readers.get(i, 0)) for i, s in sorted(shapes.items()) if i not in left_out}
    return found, by_state


def attended_only(model: Any, packed: Collection[int]) -> set[int]:
    """Those of the KV caches `packed`, by index, with which the model, given one token, does nothing but hand what they
    return to its attention, keys and values of one: bare handles are enough for it. None where it cannot be told. One
    token is traced, nothing computed, as long as the model does not ask for numbers itself."""

    def attend(index: int, queries: mx.array, keys: Any, values: Any, original: Attention, **options: Any) -> mx.array:
        source = keys.source
        source.was_read |= not is_pair(keys, values)
        return mx.zeros((*queries.shape[:3], source.values.shape[3]), queries.dtype)

    try:
        traced = _given_a_token(model, recorders(model, attend, only=packed, bare=True))
    except Exception:  # what MLX raises of an argument that is no array, or the model
        return set()
    return {r.index for r in traced if not r.was_read and not r.state_was_read}


def _recorders_in(caches: Iterable[Any]) -> list[Recorder]:
    return [member for cache in caches for member in members_of(cache) if isinstance(member, Recorder)]


def _given_a_token(model: Any, caches: list[Any]) -> list[Recorder]:
    """The recorders among these caches, after the model was given them and one token, and left as it was."""
    made = _recorders_in(caches)
    try:
        with _tracing, dispatching(), unchanged(model):
            model(mx.array([[0]]), cache=caches)
    finally:
        for recorder in made:
            recorder.forget()
    return made


@contextlib.contextmanager
def unchanged(model: Any) -> Iterator[None]:
    """What attributes of the model's modules are set to in this block is put back behind it: some keep what they
    computed, which was not computed."""
    modules: list[Any] = getattr(model, "modules", list)()
    before = [(held, dict(held)) for module in modules for held in (module, vars(module))]
    try:
        yield
    finally:
        # Item by item, and none away before it is back: another thread may be at work with the model.
        for held, items in before:
            for name, value in items.items():
                if name not in held or held[name] is not value:
                    held[name] = value
        for held, items in before:
            for name in set(held) - set(items):
                held.pop(name, None)


def is_pair(keys: Any, values: Any) -> bool:
    """Whether these are the handles on keys and values of one source."""
    both = isinstance(keys, AnyHandle) and isinstance(values, AnyHandle) and keys.source is values.source
    return both and (keys.part, values.part) == ("keys", "values")


def observers(model: Any, see: See, offset: int = 0, used: dict[int, Use] | None = None) -> list[Any]:
    """`recorders` of the caches in `used` (`uses(model)` unless given) that call `see(index, queries, keys, values)`
    and change nothing.

    queries: of the attention over these keys and values; None for caches of another kind than "paired".
    """
    used = uses(model) if used is None else used

    def attend(
        index: int, queries: mx.array, keys: mx.array, values: mx.array, original: Attention, **options: Any
    ) -> mx.array:
        if used[index].kind == "paired":
            see(index, queries, keys, values)
        return original(queries, keys, values, **options)

    def append(index: int, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        if used[index].kind != "paired":
            see(index, None, keys, values)
        return keys, values

    return recorders(model, attend, offset, append=append, only=used)


def require_layers(seen: dict[int, Any]) -> None:
    """ValueError unless some layer was seen."""
    if not seen:
        raise ValueError(
            "no layer of this model has a KV cache to pack; expected full-attention layers; use mlx-lm's own cache "
            "(--kv-cache full) with it."
        )
