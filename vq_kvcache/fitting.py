"""What a user gets for the memory or the closeness asked for: a budget, and the tokens and bytes that come of it."""

import dataclasses
import logging
import weakref
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from .cache import ARRAYS_ONLY
from .options import DEFAULT_BITS, CacheOptions
from .spectral.calibration_text import longest_sequence
from .spectral.codebook import MAX_BITS
from .spectral.codec import CONTEXT, Codec, Plan
from .spectral.intercept import members_of, plain_caches, read_by_state
from .storage import most_bytes

STEPS_PER_BIT = 16
LEAST_BITS = 0.25
# Where the context is ours to choose, none is bought with fewer bits: README's tables begin here.
LEAST_BITS_UNASKED = 1.0

logger = logging.getLogger("vq_kvcache")


@dataclasses.dataclass(frozen=True)
class Fit:
    """bits: the budget.  tokens: of the longest sequence.  nbytes: the most that its caches, those of the model that
    are not packed included, and the codec take.  predicted_kl: of its newest token (`Codec.predicted_kl`); None if it
    has no unit.
    """

    bits: float
    tokens: int
    nbytes: int
    predicted_kl: float | None

    def __str__(self) -> str:
        kl = "no prediction of KL, as this codec's costs are in no unit of it"
        if self.predicted_kl is not None:
            kl = f"predicted KL {self.predicted_kl:.2g} on text like the calibration's"
        bits = f"{self.bits:.2f}".removesuffix("0")
        # Without a limit of the model's there is no longest sequence to speak of.
        held = f"{self.tokens:,} tokens in" if self.tokens > 1 else "a token takes"
        return f"{bits} bits: {held} {size(self.nbytes)}; {kl}"


def size(nbytes: int) -> str:
    """Bytes as people write them: "2.0 GB", "512 MB"."""
    for unit, power in (("GB", 9), ("MB", 6), ("kB", 3)):
        if nbytes >= 10**power:
            shown = nbytes / 10**power
            return f"{shown:.1f} {unit}" if shown < 100 else f"{shown:.0f} {unit}"
    return f"{nbytes} bytes"


class Room:
    """What the caches of one sequence take: from one token that is traced through the model's own, nothing computed."""

    def __init__(self, model: Any, window: int, sinks: int) -> None:
        self.window, self._sinks = window, sinks
        caches = plain_caches(model)
        model(mx.array([[0]]), cache=caches)
        self._caches = [member for cache in caches for member in members_of(cache)]
        self._plain = read_by_state(model) if ARRAYS_ONLY else set()

    def nbytes(self, plan: Plan, tokens: int) -> int:
        """The most bytes up to `tokens` tokens, packed by `plan`, its transforms included."""
        total = sum(layer.nbytes for layer in plan.layers.values())
        for i, cache in enumerate(self._caches):
            packed = i in plan.layers and i not in self._plain
            total += self._packed(plan, i, tokens) if packed else _unpacked(cache, tokens)
        return total

    def _packed(self, plan: Plan, index: int, tokens: int) -> int:
        keys, values = self._caches[index].keys, self._caches[index].values
        layer, words = plan.layers[index], 0
        for x, quantizer in ((keys, layer.keys), (values, layer.values)):
            raw = x.shape[1] * -(-x.shape[3] * x.dtype.size // 4)
            words += raw if quantizer is None else quantizer.words
        dims = keys.shape[3], values.shape[3]
        return most_bytes(tokens, self.window, self._sinks, keys.shape[1], dims, keys.dtype.size, words)

    def tokens(self, plan: Plan, nbytes: int, most: int) -> int:
        """The longest sequence of at most `most` tokens that `nbytes` hold; 0 for none."""
        low, high = 0, most
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if self.nbytes(plan, middle) <= nbytes else (low, middle - 1)
        return low


def _unpacked(cache: Any, tokens: int) -> int:
    """Bytes of one of mlx-lm's caches that holds `tokens` tokens, from one that holds a token."""
    keys, step = getattr(cache, "keys", None), getattr(cache, "step", 256)
    if keys is None:  # recurrent state, which does not grow
        return sum(a.nbytes for _, a in tree_flatten(cache.state) if isinstance(a, mx.array))
    held = tokens + step  # that many at a time are reserved
    if (window := getattr(cache, "max_size", None)) is not None:
        held = min(held, window)
    elif (chunk := getattr(cache, "chunk_size", None)) is not None:
        held = min(held, chunk + step)
    return held * sum(int(x.nbytes) // int(x.shape[2]) for x in (keys, cache.values))


_known: weakref.WeakKeyDictionary[Codec, dict[Any, Fit]] = weakref.WeakKeyDictionary()


def settled(model: Any, codec: Codec, options: CacheOptions, split: bool = False) -> CacheOptions:
    """`options` with the budget and the context that they come to, so that neither `max_kl` nor `memory` is left. Says
    which, once, by one line of the logger "vq_kvcache". ValueError, which says what would fit, where nothing does.

    split: whether `model` is a part of one that is spread over several processes.
    """
    if options.memory is None and options.max_kl is None:
        return options
    if split and options.memory is not None:
        raise ValueError(
            f"memory={options.memory!r} was given for a model split over several processes, whose parts take different "
            "bytes; expected a budget; use bits_per_value (--kv-avg-bits)."
        )
    if split and options.max_kl is not None:
        bits = codec.bits_for(options.max_kl, options.context or longest_sequence(model) or CONTEXT, options.window)
        return dataclasses.replace(options, bits_per_value=bits, max_kl=None)
    asked = options.window, options.sinks, options.max_kl, options.memory, options.context
    found = _known.setdefault(codec, {}).get(asked)
    if found is None:
        found = _known[codec][asked] = fit(model, codec, options)
        logger.info("%s", found)
    context = options.context if options.memory is None else found.tokens
    return dataclasses.replace(options, bits_per_value=found.bits, context=context, max_kl=None, memory=None)


def fit(model: Any, codec: Codec, options: CacheOptions) -> Fit:
    """What `options` come to on this model with its codec.

    With memory, the largest budget whose cache for the context fits. Without a context, it is the model's own limit,
    or what 1 bit holds where that holds less; with max_kl besides, what the budget of it holds.
    """
    room = Room(model, options.window, options.sinks)
    limit = options.context or longest_sequence(model)
    memory = options.memory_bytes
    if memory is None:
        if options.max_kl is None:
            raise ValueError('neither memory nor max_kl was given; expected one of them; set memory="2GB", for one.')
        tokens = limit or CONTEXT
        return _fit(room, codec, codec.bits_for(options.max_kl, tokens, options.window), tokens)
    if options.max_kl is not None:
        bits = codec.bits_for(options.max_kl, limit or CONTEXT, options.window)
        return _longest(room, codec, bits, memory, limit, options.context)
    if limit is None:
        return _longest(room, codec, DEFAULT_BITS, memory, None, None)
    bits = _largest_budget(room, codec, memory, limit)
    if options.context is None and bits < LEAST_BITS_UNASKED:
        return _longest(room, codec, LEAST_BITS_UNASKED, memory, limit, None)
    return _longest(room, codec, max(bits, LEAST_BITS), memory, limit, options.context)


def _fit(room: Room, codec: Codec, bits: float, tokens: int) -> Fit:
    kl = codec.predicted_kl(bits, tokens, room.window) if codec.in_nats else None
    return Fit(bits, tokens, room.nbytes(codec.plan(bits), tokens), kl)


def _largest_budget(room: Room, codec: Codec, memory: int, tokens: int) -> float:
    """In steps of 1/16 bit; 0 where the smallest budget takes more than `memory`."""
    pairs = [t for pair in codec.layers.values() for t in pair if t is not None]
    numbers = sum(t.mean.size for t in pairs) * tokens
    step_bytes = numbers / 8 / STEPS_PER_BIT
    least, most = int(LEAST_BITS * STEPS_PER_BIT), MAX_BITS * STEPS_PER_BIT

    def excess(step: int) -> int:
        return room.nbytes(codec.plan(step / STEPS_PER_BIT, keep=False), tokens) - memory

    step = min(max(least, int(memory / step_bytes)), most)
    while (over := excess(step)) > 0:
        if step == least:
            return 0.0
        step = max(least, step - max(1, int(over / step_bytes)))
    while step < most and excess(step + 1) <= 0:  # transforms shrink with the budget, too, so that may be too few
        step += 1
    return step / STEPS_PER_BIT


def _longest(room: Room, codec: Codec, bits: float, memory: int, limit: int | None, asked: int | None) -> Fit:
    """The longest sequence, up to the limit, that fits at this budget; ValueError where that is not what was asked."""
    plan = codec.plan(bits)
    tokens = room.tokens(plan, memory, limit or memory)
    least = room.nbytes(plan, 1)
    if tokens == 0:
        raise ValueError(
            f"memory is {size(memory)}; expected at least {size(least)}, which window, sinks and codec take before "
            "anything is packed; allow more or set a smaller window."
        )
    if asked is not None and tokens < asked:
        raise ValueError(
            f"memory is {size(memory)}; expected {size(room.nbytes(plan, asked))}, which {asked:,} tokens take at "
            f"{bits:g} bits; allow that much, or a context of {tokens:,}, which would fit."
        )
    return _fit(room, codec, bits, tokens)
