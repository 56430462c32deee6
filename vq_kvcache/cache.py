"""SpectralKVCache: mlx-lm's cache protocol over a Storage."""

import json
import os
import re
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.cache import KVCache, create_attention_mask

from .attention import Mask, attend, keep_pace
from .chunks import Chunk, Chunks
from .drift import Drift, warn_once
from .options import CacheOptions
from .shards import Share
from .spectral.codec import Bits, Codec, CodecError, Plan, budget_of, find_codec
from .spectral.files import parse_json
from .spectral.intercept import AnyHandle, array_of, handles_on, is_dispatching, is_pair
from .spectral.sealing import BLOCK, LAG
from .spectral.spectral_quant import Quantizer, RawQuantizer
from .storage import Snapshot, Storage

LOSSLESS = Plan("lossless", "", {})
# mlx-lm before 0.32 saves the arrays of a state only, and has `meta_state`; later ones save scalars and strings too.
ARRAYS_ONLY = hasattr(KVCache, "meta_state")

_NAMES = re.compile(r"[\w@.,#/+-]{1,300} [\w-]{0,200}", re.ASCII)
MOST_TOKENS = 1 << 20  # that a file may ask to keep exact

_plans: dict[str, Plan] = {LOSSLESS.name: LOSSLESS}


def register_plan(plan: Plan) -> Plan:
    """Make a plan findable by the prompt caches that name it."""
    return _plans.setdefault(plan.name, plan)


def find_plan(name: str, fingerprint: str) -> Plan:
    """The plan a saved cache names: one in use in this process, or that of the stored codec of its model."""
    if name in _plans:
        return _plans[name]
    whole, share = Share.named(name)
    identity, _, bits = whole.partition("@")
    codec = find_codec(fingerprint) if fingerprint else None
    if codec is None or codec.identity != identity:
        raise CodecError(
            f"the saved prompt cache was packed by codec {identity} of model {fingerprint or 'unknown'}, which is not "
            "here; expected it in the codec folder or attached to the model; load that codec first."
        )
    plan = codec.plan(budget_of(bits))
    return register_plan(plan if share is None else share.of_plan(plan))


class View:
    """Source of the handles of one append."""

    def __init__(self, snapshot: Snapshot) -> None:
        self.snapshot = snapshot

    def decoded(self) -> tuple[mx.array, mx.array]:
        """The arrays that the handles stand for, lazy."""
        return self.snapshot.decoded()

    def array(self, part: str) -> mx.array:
        keys, values = self.decoded()
        return keys if part == "keys" else values

    def handles(self, bare: bool = False) -> tuple[Any, Any]:
        """Handles on keys and values; bare ones only while they are understood."""
        return handles_on(self, None if bare and is_dispatching() else self.decoded())

    def attention(
        self, queries: mx.array, keys: AnyHandle, values: Any, original: Callable[..., mx.array], **options: Any
    ) -> mx.array:
        if is_pair(keys, values):
            snapshot = self.snapshot
        elif values is keys and keys.part == "keys":
            snapshot = self.snapshot.of_keys()
        else:  # a model that attends to something else with these keys: the handle is the decoded array
            return original(queries, array_of(keys), array_of(values), **options)
        return attend(snapshot, queries, options["scale"], self.of_rows(options.get("mask")), options.get("sinks"))

    def of_rows(self, mask: Mask) -> Mask:
        """A mask over the columns of the handles, as one over the positions of the tokens: the same here."""
        return mask


class Planned:
    """What a cache of one layer is packed by (plan, layer, window and sinks), and what both kinds of caches do alike
    with what they hold."""

    _storage: Any

    _plan: Plan | None
    _plan_name: str
    _fingerprint: str
    _layer: int
    _window: int
    _sinks: int
    # Whether single tokens are answered with bare handles, of a cache that is `attended_only`; None where nobody asked.
    bare_handles: bool | None = None

    def _set_plan(self, plan: Plan | None, layer: int, window: int, sinks: int) -> None:
        if plan is None:
            raise ValueError(
                f"{type(self).__name__} was made without a plan; expected a codec's; use "
                "vq_kvcache.make_prompt_cache(model)."
            )
        if plan is not LOSSLESS and layer not in plan.layers:
            raise CodecError(f"the codec has no layer {layer}; it has {sorted(plan.layers)}; use this model's codec.")
        self._plan = plan
        self._plan_name, self._fingerprint, self._layer = plan.name, plan.fingerprint, layer
        self._window, self._sinks = window, sinks

    def _take_plan(self, other: "Planned") -> None:
        self._plan, self._plan_name, self._fingerprint = other._plan, other._plan_name, other._fingerprint
        self._layer, self._window, self._sinks = other._layer, other._window, other._sinks
        self.bare_handles = other.bare_handles

    @property
    def _settings(self) -> dict[str, Any]:
        return {
            "plan": self._plan_name, "fingerprint": self._fingerprint, "layer": self._layer,
            "window": self._window, "sinks": self._sinks,
        }  # fmt: skip

    def _require_same(self, other: "Planned") -> None:
        """CodecError unless the tokens of both are packed alike: those of one batch have to be."""
        for name, own in self._settings.items():
            if own != (theirs := other._settings[name]):
                raise CodecError(
                    f"caches of {name} {own!r} and {theirs!r} were put into one batch; expected one {name}; make all "
                    "of them with the same options."
                )

    def _require_plan(self) -> Plan:
        if self._plan is None:
            self._plan = find_plan(self._plan_name, self._fingerprint)
        return self._plan

    def _quantizers(self, keys: mx.array, values: mx.array) -> tuple[Quantizer, Quantizer]:
        layer = self._require_plan().layers.get(self._layer)
        pair = []
        for name, x in (("keys", keys), ("values", values)):
            quantizer = None if layer is None else getattr(layer, name)
            heads, dims = x.shape[1], x.shape[3]
            if quantizer is None:
                pair.append(RawQuantizer(heads, dims, x.dtype))
                continue
            if (quantizer.layout.heads, quantizer.head_dim) != (heads, dims):
                raise CodecError(
                    f"{name} have {heads} heads of {dims}; the codec is for {quantizer.layout.heads} of "
                    f"{quantizer.head_dim}; use this model's codec."
                )
            pair.append(quantizer)
        return pair[0], pair[1]

    @staticmethod
    def _as_state(text: str, arrays: list[mx.array]) -> list[Any]:
        """A description, then the arrays. mlx-lm < 0.32 saves nothing but arrays, so there the description is one, of
        its bytes."""
        return [mx.array(list(text.encode()), mx.uint8) if ARRAYS_ONLY else text, *arrays]

    @staticmethod
    def _of_state(value: Any) -> tuple[Any, list[mx.array]]:
        items = list(value)
        first = items.pop(0) if items else None
        if isinstance(first, mx.array) and first.dtype == mx.uint8:
            first = np.array(first).tobytes()
        return first, items

    def _read_description(self, text: Any) -> dict[str, Any]:
        """Take the settings from the description; returns what else it says of what is held, if anything is."""
        try:
            fields = parse_json(text)
            if fields["format"] != 1:
                raise ValueError(f"format {fields['format']!r:.40}")
            self._plan = None
            self._plan_name, self._fingerprint = str(fields["plan"]), str(fields["fingerprint"])
            if not _NAMES.fullmatch(f"{self._plan_name} {self._fingerprint}"):
                raise ValueError("the plan or the fingerprint is no plain name")
            self._layer, self._window, self._sinks = (int(fields[n]) for n in ("layer", "window", "sinks"))
            if not all(0 <= n <= MOST_TOKENS for n in (self._layer, self._window, self._sinks)):
                raise ValueError(f"a layer, a window or sinks beyond {MOST_TOKENS:,}")
            return self._read_held(fields)
        except (TypeError, ValueError, KeyError, AttributeError, OverflowError) as error:
            raise ValueError(
                f"the saved state is not a {type(self).__name__}'s ({error!s:.300}); expected one of this version; "
                "make it again."
            ) from None

    def _describe(self) -> str:
        raise NotImplementedError

    def _restore(self, held: dict[str, Any], arrays: list[mx.array]) -> None:
        raise NotImplementedError

    def _buffers(self) -> Any:
        """The storage; ValueError before the first append."""
        if self._storage is None:
            raise ValueError("the cache is empty; expected keys and values; append some first.")
        return self._storage

    def _read_held(self, fields: dict[str, Any]) -> dict[str, Any]:
        raise NotImplementedError

    @staticmethod
    def _require_arrays(arrays: list[mx.array], count: int) -> None:
        if len(arrays) != count or any(not isinstance(a, mx.array) for a in arrays):
            raise ValueError(f"the saved state holds {len(arrays)} arrays; expected {count}; the file is damaged.")
        if any(a.ndim != 4 or not a.size for a in arrays[:2]) or any(a.ndim != 3 for a in arrays[2:]):
            shapes = [a.shape for a in arrays]
            raise ValueError(f"the saved state holds {shapes!s:.200} arrays; expected others; the file is damaged.")

    # -- what pipelines touch

    @property
    def keys(self) -> mx.array | None:
        """The exact keys' buffer [B, H, capacity, Dk]: pipelines hang dependencies on it. Not all
        keys: see `SpectralKVCache.to_kvcache`."""
        return None if self._storage is None else self._storage.exact_keys

    @keys.setter
    def keys(self, value: mx.array) -> None:
        self._buffers().exact_keys = value

    @property
    def values(self) -> mx.array | None:
        """The exact values' buffer [B, H, capacity, Dv]."""
        return None if self._storage is None else self._storage.exact_values

    @values.setter
    def values(self, value: mx.array) -> None:
        self._buffers().exact_values = value

    # -- copies and files

    @property
    def state(self) -> Any:
        """Everything held: a description, then the arrays."""
        return self._as_state(self._describe(), [] if self._storage is None else self._storage.arrays)

    @state.setter
    def state(self, value: Any) -> None:
        text, arrays = self._of_state(value)
        self._restore(self._read_description(text), arrays)
        if self._storage is not None:  # a file may be written over, and arrays that were not read yet with it
            mx.eval(self._storage.arrays)

    @property
    def meta_state(self) -> Any:
        """Empty: `state` says it all. For mlx-lm < 0.32."""
        return ""

    @meta_state.setter
    def meta_state(self, value: Any) -> None:
        if value:
            raise ValueError(f"a {type(self).__name__} has no meta_state; expected an empty one; make the file again.")

    @classmethod
    def from_state(cls, state: Any, meta_state: Any = None) -> Any:
        """A cache from what `state` gave; its codec is found by the name in it."""
        cache = cls.__new__(cls)
        cache.state, cache.meta_state = state, meta_state
        return cache

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = type(self).__new__(type(self))
        twin.__dict__.update(self.__dict__)
        twin._storage = None if self._storage is None else self._storage.copy()
        return twin

    @property
    def drift(self) -> Drift | None:
        """How unlike the calibration text the packed tokens are; None before any, and of exact caches. One warning is
        given when it is large."""
        return None if self._storage is None else self._storage.drift.read()


class SpectralKVCache(Planned, KVCache):  # type: ignore[misc]  # mlx-lm is untyped
    """Keys and values of one layer: first tokens and newest tokens exact, the rest packed.

    Made by `vq_kvcache.make_prompt_cache`, or per layer from a plan: `SpectralKVCache(codec.plan(2.0), layer=3)`.
    Subclasses mlx-lm's KVCache for its isinstance checks, overrides every public member and inherits none.
    """

    step = BLOCK
    _context = 0

    def __init__(
        self, plan: Plan | None = None, layer: int = 0, window: int = 128, sinks: int = 4, context: int | None = None
    ) -> None:
        """plan: a codec's; ValueError without one.  layer: index of the layer's cache.  window, sinks: newest and first
        tokens that stay exact.  context: tokens to expect, beyond which nothing is reserved."""
        self._set_plan(plan, layer, window, sinks)
        self._storage: Storage | None = None
        self._context = context or 0

    @staticmethod
    def with_options(
        bits_per_value: Bits = 2.0,
        window: int = 128,
        sinks: int = 4,
        codec: Codec | str | os.PathLike[str] | None = None,
        lossless: bool = False,
        max_kl: float | None = None,
        memory: int | str | None = None,
        context: int | None = None,
    ) -> CacheOptions:
        """Options to pass as `cache=` in place of the class.

        bits_per_value: stored bits per cached number, 0.25 to 8; a pair for keys and values apart.  max_kl: instead,
        the fewest bits that are predicted to cost so many nats.  memory: instead, the most bits whose cache takes so
        many bytes (a number, "2GB", "500MB"), for sequences of `context` tokens (default: the model's limit, or what 1
        bit holds of it).  window, sinks: newest and first tokens that stay exact.  codec: a Codec or a file (default:
        found by model, or made once).  lossless: raw bits, for tests. ValueError names what is out of range.
        """
        return CacheOptions(bits_per_value, window, sinks, codec, lossless, max_kl, memory, context)

    # -- what a model calls

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append keys [B, H, L, Dk] and values [B, H, L, Dv]; return handles on all of them."""
        prompt = keys.shape[2] > LAG
        if prompt:
            keep_pace(keys, values)
        storage = self._storage_for(keys, values)
        storage.append(keys, values)
        due = storage.due
        if due:
            warn_once(storage.drift, self._plan_name)
            if not prompt:
                storage.seal()
        snapshot = storage.snapshot()
        if due and prompt:  # within a prompt chunk, queries see the chunk itself exact
            storage.seal()
        return _handles(snapshot, self.bare_handles is True and keys.shape[2] == 1)

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """Handles on everything held, without appending."""
        if self._storage is None:
            raise ValueError("the cache is empty; expected keys and values; append some first.")
        return _handles(self._storage.snapshot())

    def make_mask(self, *args: Any, **kwargs: Any) -> Any:
        """As mlx-lm's KVCache: None, "causal" or a bool array."""
        return create_attention_mask(*args, offset=self.offset, **kwargs)

    @property
    def offset(self) -> int:
        """Tokens held."""
        return 0 if self._storage is None else self._storage.length

    def size(self) -> int:
        """Tokens held."""
        return self.offset

    def empty(self) -> bool:
        """True before the first append."""
        return self._storage is None

    def is_trimmable(self) -> bool:
        """True: codes are cut at any token."""
        return True

    def trim(self, n: int) -> int:
        """Drop the newest n tokens, at most all; return how many went."""
        return 0 if self._storage is None else self._storage.trim(n)

    @property
    def cut_window(self) -> int:
        """The window, when a trim into the codes left fewer exact tokens than that before the next one; else 0. Raw
        bits are exact anywhere."""
        storage = self._storage
        if storage is None or not storage.packed_tokens or self._plan_name == LOSSLESS.name:
            return 0
        return self._window if storage.exact_tokens - storage.held_sinks < self._window else 0

    @property
    def nbytes(self) -> int:
        """Sum of the held arrays' nbytes; the codec, shared by all caches of a model, is in `stats`."""
        return 0 if self._storage is None else self._storage.nbytes

    # -- what mlx-lm finds on a KVCache and must not find here

    @property
    def to_quantized(self) -> Any:
        """Hidden: mlx-lm would turn this cache into its own quantized one."""
        raise AttributeError("a SpectralKVCache is quantized already; expected no --kv-bits; use --kv-avg-bits.")

    # -- batches

    @classmethod
    def merge(cls, caches: Sequence["SpectralKVCache"]) -> Any:
        """A BatchSpectralKVCache of the sequences of these caches; see its `merge`."""
        from .batch_cache import BatchSpectralKVCache  # which makes caches of this class

        return BatchSpectralKVCache.merge(caches)

    # -- mlx-lm's own cache, there and back

    @classmethod
    def from_cache(cls, kv: KVCache, like: "SpectralKVCache") -> "SpectralKVCache":
        """Pack what an mlx-lm KVCache holds, with the plan, window and sinks of `like`, a cache of the same layer."""
        if not isinstance(kv, KVCache) or isinstance(kv, SpectralKVCache):
            raise ValueError(f"a {type(kv).__name__} was given; expected mlx-lm's KVCache.")
        cache = cls(like._require_plan(), like._layer, like._window, like._sinks)
        cache.bare_handles = like.bare_handles
        if kv.keys is not None and kv.offset:
            cache.update_and_fetch(kv.keys[..., : kv.offset, :], kv.values[..., : kv.offset, :])
        return cache

    def to_kvcache(self) -> KVCache:
        """mlx-lm's KVCache with the decoded keys and values."""
        cache = KVCache()
        if self._storage is not None:
            cache.keys, cache.values = self._storage.snapshot().decoded()
            cache.offset = self.offset
        return cache

    def stats(self) -> dict[str, int]:
        """Tokens and bytes: packed_tokens, exact_tokens, code_bytes, sink_bytes, window_bytes (these three make
        nbytes, reserved capacity included) and codec_bytes, this layer's transforms."""
        quantizers = self._plan.layers.get(self._layer) if self._plan is not None else None
        result = {"packed_tokens": 0, "exact_tokens": 0, "code_bytes": 0, "sink_bytes": 0, "window_bytes": 0}
        result["codec_bytes"] = 0 if quantizers is None else quantizers.nbytes
        if (storage := self._storage) is None or storage.exact_keys is None or storage.exact_values is None:
            return result
        exact = int(storage.exact_keys.nbytes + storage.exact_values.nbytes)
        sinks = exact // storage.exact_keys.shape[2] * storage.held_sinks
        result.update(
            packed_tokens=storage.packed_tokens, exact_tokens=storage.exact_tokens,
            code_bytes=storage.nbytes - exact, sink_bytes=sinks, window_bytes=exact - sinks,
        )  # fmt: skip
        return result

    # -- inside

    def _storage_for(self, keys: mx.array, values: mx.array) -> Storage:
        if self._storage is None:
            quantizers = self._quantizers(keys, values)
            self._storage = Storage(*quantizers, self._window, self._sinks, self._context)
        return self._storage

    def _describe(self) -> str:
        storage = self._storage
        held = {} if storage is None else {
            "exact_tokens": storage.exact_tokens, "held_sinks": storage.held_sinks,
            "chunks": [chunk.tokens for chunk in storage.chunks],
        }  # fmt: skip
        return json.dumps({"format": 1, **self._settings, "context": self._context, **held})

    def _read_held(self, fields: dict[str, Any]) -> dict[str, Any]:
        self._context = int(fields.get("context", 0))
        if "chunks" not in fields:
            return {}
        held: dict[str, Any] = {n: int(fields[n]) for n in ("exact_tokens", "held_sinks")}
        return {**held, "chunks": [int(n) for n in fields["chunks"]]}

    def _restore(self, held: dict[str, Any], arrays: list[mx.array]) -> None:
        if not held:
            self._storage = None
            return
        tokens = held["chunks"]
        self._require_arrays(arrays, 2 + len(tokens))
        storage = Storage(*self._quantizers(arrays[0], arrays[1]), self._window, self._sinks, self._context)
        storage.exact_keys, storage.exact_values = arrays[:2]
        storage.exact_tokens, storage.held_sinks = held["exact_tokens"], held["held_sinks"]
        chunks = [Chunk(words, n) for words, n in zip(arrays[2:], tokens, strict=True)]
        storage.codes = Chunks(chunks, storage.codes.expected)
        storage.check()
        self._storage = storage


def _handles(snapshot: Snapshot, bare: bool = False) -> tuple[mx.array, mx.array]:
    return View(snapshot).handles(bare) if snapshot.packed else snapshot.decoded()


def window_to_repeat(caches: Sequence[Any] | None, held: int) -> int:
    """How many of the `held` tokens of a stored prompt to drop and read again: a window of them, at most all, when it
    was cut within its codes. What follows would find its nearest tokens as codes, which no budget allows for."""
    cut = [c.cut_window for c in caches or () if isinstance(c, SpectralKVCache)]
    return min(max(cut, default=0), held) if mlx_lm_cache.can_trim_prompt_cache(caches or []) else 0
