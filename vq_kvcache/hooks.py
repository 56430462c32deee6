"""How a spectral cache gets into mlx-lm: with spectral/intercept.py, the only file that alters mlx-lm or MLX.

Functions of mlx-lm are replaced through their modules. By `attach`: `generate_step` and `speculative_generate_step`,
which take `cache=`. By `install` besides: `load_model`, which attaches what it loads; the server's
`ModelProvider.load`, which detaches its draft, and its search for stored prompts; `make_prompt_cache` and
`load_prompt_cache` wherever they are bound. `uninstall` puts all of them back.
"""

import contextlib
import functools
import importlib
import inspect
import os
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import mlx.core as mx
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.cache import KVCache

from .attachment import Attachment, attachment_of, codecs_in_use
from .batch_cache import BatchSpectralKVCache
from .cache import ARRAYS_ONLY, LOSSLESS, SpectralKVCache, register_plan, window_to_repeat
from .options import CacheOptions
from .prompt_files import checked_load
from .rotations import plan_for_model
from .shards import Share
from .spectral import intercept
from .spectral.codec import CodecError, Plan
from .spectral.spectral_quant import SpectralRotation

CacheChoice = type[KVCache] | CacheOptions | Sequence[Any]
CLASSES = (SpectralKVCache, BatchSpectralKVCache)  # that prompt-cache files name
SUPPORTED = "mlx-lm 0.31.3 to 0.32"
_hooking = threading.RLock()  # held by whoever replaces a function or puts one back, on a model too


def own_caches(model: Any, max_kv_size: int | None = None) -> list[Any]:
    """The caches that mlx-lm itself gives this model; with `max_kv_size`, rotating ones for full-attention layers."""
    caches = intercept.plain_caches(model)
    if max_kv_size is None:
        return caches
    return intercept.replace_kv(
        caches, lambda _, own, nested: own if nested else mlx_lm_cache.RotatingKVCache(max_kv_size, keep=4)
    )


def make_prompt_cache(
    model: Any, max_kv_size: int | None = None, cache: CacheChoice = SpectralKVCache, *, tokenizer: Any = None
) -> list[Any]:
    """Caches for one prompt: spectral ones for full-attention layers, the model's own for the others.

    model: as mlx_lm.load gives it.  cache: SpectralKVCache, `SpectralKVCache.with_options(...)`, mlx-lm's KVCache, or a
    list of caches (returned as it is).  tokenizer: for calibration, where the model has no codec yet, unless it was
    attached with one. With `max_kv_size` old tokens are dropped by mlx-lm's RotatingKVCache and nothing is packed; a
    warning says so.
    """
    if isinstance(cache, Sequence) and not isinstance(cache, str):
        return list(cache)
    if max_kv_size is not None:
        warnings.warn(
            f"max_kv_size={max_kv_size} drops old tokens instead of packing them: the spectral cache is off.",
            stacklevel=2,
        )
        return own_caches(model, max_kv_size)
    if isinstance(cache, type) and issubclass(cache, SpectralKVCache):
        attached = attachment_of(model)
        cache = attached.options if attached else CacheOptions()
    elif isinstance(cache, type) and issubclass(cache, KVCache):
        return own_caches(model)
    if not isinstance(cache, CacheOptions):
        raise ValueError(f"cache is {cache!r}; expected SpectralKVCache, its with_options(...), or a list of caches.")
    _require_dispatch()
    attachment = attachment_of(model) or Attachment(tokenizer, cache, None)
    if attachment.tokenizer is None:
        attachment.tokenizer = tokenizer
    caches = _spectral_caches(model, *attachment.plan(model, cache))
    _choose_handles(caches, model, attachment)
    return caches


def _choose_handles(caches: Sequence[Any], model: Any, attachment: Attachment) -> None:
    """Tell the model's own caches which handles are enough for it; those that were told before stay as they are, and a
    subclass may do with them what it likes."""
    untold = [c for c in spectral_caches(caches) if type(c) is SpectralKVCache and c.bare_handles is None]
    if not untold:
        return
    bare = attachment.attended_only(model, frozenset(cache._layer for cache in untold))
    for cache in untold:
        cache.bare_handles = cache._layer in bare


def _spectral_caches(model: Any, plan: Plan, options: CacheOptions) -> list[Any]:
    packed = set(intercept.uses(model) if plan is LOSSLESS else plan.layers)
    if ARRAYS_ONLY and (others := intercept.read_by_state(model)):  # no model of mlx-lm 0.32 does
        warnings.warn(
            f"this mlx-lm reads the keys of layers {sorted(others)} where a packed cache has none: their caches stay "
            "full precision; install mlx-lm 0.32 to pack them.",
            stacklevel=3,
        )
        packed -= others

    def choose(index: int, own: Any, nested: bool) -> Any:
        return SpectralKVCache(plan, index, options.window, options.sinks, options.context) if index in packed else own

    return intercept.replace_kv(own_caches(model), choose)


def spectral_caches(caches: Sequence[Any] | None) -> list[SpectralKVCache]:
    """Those of a prompt cache that are spectral, members of CacheLists included."""
    members = [member for cache in caches or [] for member in intercept.members_of(cache)]
    return [member for member in members if isinstance(member, SpectralKVCache)]


# -- one model


def attach(
    model: Any,
    tokenizer: Any = None,
    *,
    cache: CacheOptions | type[SpectralKVCache] = SpectralKVCache,
    rotations: str | os.PathLike[str] | list[SpectralRotation] | None = None,
    signal_bits: int = 4,
    noise_bits: int = 1,
    use_water_filling: bool = False,
) -> Any:
    """Give `model` spectral caches wherever mlx-lm makes a prompt cache for it; returns the model.

    With `rotations` (a folder of `save_rotations`, or a list) each layer is packed by
    SpectralQuantizer(rotation, signal_bits, noise_bits, use_water_filling); without, by the model's codec, which is
    found or calibrated when the first cache is asked for. `tokenizer` (or a function that loads it) is needed for that.
    """
    options = CacheOptions() if isinstance(cache, type) else cache
    plan = None
    if rotations is not None:
        plan = register_plan(plan_for_model(model, rotations, signal_bits, noise_bits, use_water_filling))
    _give(model, Attachment(tokenizer, options, plan))
    return model


@intercept.one_at_a_time(_hooking)
def _give(model: Any, attachment: Attachment) -> None:
    _require_dispatch()
    _replace_generation()
    model._vq_kvcache = attachment
    model.make_cache = functools.partial(make_prompt_cache, model)
    _attached[:] = [ref for ref in _attached if (other := ref()) is not None and other is not model]
    _attached.append(weakref.ref(model))


@intercept.one_at_a_time(_hooking)
def detach(model: Any) -> None:
    """Undo `attach`: the model makes its own caches again."""
    for name in ("_vq_kvcache", "make_cache"):
        if name in vars(model):
            delattr(model, name)


def load(path_or_hf_repo: str, *args: Any, rotations: Any = None, **kwargs: Any) -> Any:
    """`mlx_lm.load(path_or_hf_repo, ...)`, then `attach`; takes the options of both, as `rotations`, and returns what
    mlx_lm.load returns."""
    from mlx_lm import load as mlx_lm_load

    names = ("cache", "signal_bits", "noise_bits", "use_water_filling")
    ours = {name: kwargs.pop(name) for name in names if name in kwargs}
    loaded = mlx_lm_load(path_or_hf_repo, *args, **kwargs)
    attach(loaded[0], loaded[1], rotations=rotations, **ours)
    return loaded


# -- generation


def generate(
    model: Any, tokenizer: Any, prompt: str | list[int] | mx.array, *, cache: CacheChoice | None = None, **kwargs: Any
) -> str:
    """`mlx_lm.generate` with a spectral cache; returns the text.

    model, tokenizer: as mlx_lm.load gives them.  prompt: text or token ids.  cache: as in `make_prompt_cache`.  All of
    mlx_lm.generate's options work, but kv_bits, which asks for another cache: ValueError.
    """
    with _prepared(model, tokenizer, cache, kwargs) as options:
        return str(_module("mlx_lm.generate").generate(model, tokenizer, prompt, **options))


def stream_generate(
    model: Any, tokenizer: Any, prompt: str | list[int] | mx.array, *, cache: CacheChoice | None = None, **kwargs: Any
) -> Iterator[Any]:
    """`mlx_lm.stream_generate` with a spectral cache; yields its GenerationResponse objects.

    model, tokenizer, prompt, cache: as in `generate`.
    """
    with _prepared(model, tokenizer, cache, kwargs) as options:
        yield from _module("mlx_lm.generate").stream_generate(model, tokenizer, prompt, **options)


@contextlib.contextmanager
def _prepared(
    model: Any, tokenizer: Any, cache: CacheChoice | None, kwargs: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    options = dict(kwargs)
    if cache is None and options.get("prompt_cache") is None:
        cache = SpectralKVCache
    options["prompt_cache"] = _choose_cache(
        model,
        cache,
        options.get("prompt_cache"),
        options.pop("max_kv_size", None),
        options.get("draft_model"),
        tokenizer,
    )
    _refuse_kv_bits(options.get("kv_bits"), options["prompt_cache"])
    with intercept.dispatching():
        yield options


def _choose_cache(
    model: Any,
    cache: CacheChoice | None,
    prompt_cache: list[Any] | None,
    max_kv_size: int | None,
    draft_model: Any = None,
    tokenizer: Any = None,
) -> list[Any] | None:
    """The prompt cache a generation is to use; None leaves the choice to mlx-lm."""
    if cache is not None and prompt_cache is not None:
        raise ValueError("both cache= and prompt_cache= were given; expected one; pass the caches as prompt_cache=.")
    if prompt_cache is not None:
        attachment = attachment_of(model) or Attachment(None, CacheOptions(), None)
        _check_fingerprints(model, prompt_cache, attachment)
        _choose_handles(prompt_cache[: len(intercept.plain_caches(model))], model, attachment)  # a draft's are behind
        return prompt_cache
    if cache is None:
        if attachment_of(model) is None:
            return None
        cache = SpectralKVCache
    given = isinstance(cache, Sequence)
    caches = make_prompt_cache(model, max_kv_size, cache, tokenizer=tokenizer)
    if draft_model is not None and not given and len(caches) != len(model.layers):
        raise ValueError(
            f"the model has {len(caches)} caches for {len(model.layers)} layers, and mlx-lm splits those of a draft "
            "off by layers; expected as many; use a full-precision cache (--kv-cache full) with --draft-model."
        )
    # Drafts are short-lived guesses of a small model: their caches stay full precision unless passed in a list.
    return caches if draft_model is None or given else caches + own_caches(draft_model)


def _check_fingerprints(model: Any, prompt_cache: list[Any], attachment: Attachment) -> None:
    names = {c._fingerprint for c in spectral_caches(prompt_cache)} - {""}
    if names and names != {own := attachment.fingerprint(model, Share.of(model))}:
        raise CodecError(
            f"the prompt cache was packed for model {', '.join(sorted(names))}; this model is {own}; make it again."
        )


def _refuse_kv_bits(kv_bits: int | None, prompt_cache: list[Any] | None) -> None:
    if kv_bits is not None and spectral_caches(prompt_cache):
        raise ValueError(
            f"kv_bits={kv_bits} asks for mlx-lm's own quantized cache; a SpectralKVCache is packed already; drop "
            "kv_bits and set bits_per_value (--kv-avg-bits)."
        )


# -- mlx-lm as a whole

_attached: list[weakref.ref[Any]] = []
_replaced: dict[tuple[str, str], tuple[Any, Any]] = {}  # (module, name or Class.name) -> (original, ours)
_dispatch_held = False


class Installation(contextlib.AbstractContextManager["Installation"]):
    """What `install` returns: leaving it as a context undoes what that call did."""

    def __init__(self, owns: bool) -> None:
        self._owns = owns

    def __exit__(self, *_: object) -> None:
        if self._owns:
            uninstall()


@intercept.one_at_a_time(_hooking)
def install(cache: CacheOptions | type[SpectralKVCache] = SpectralKVCache) -> Installation:
    """Turn the spectral cache on for every model that mlx-lm loads from now on, in this process.

    cache: SpectralKVCache, or its `with_options(...)`. Idempotent; `uninstall()` or leaving the returned context undoes
    it. RuntimeError for an mlx-lm of unknown shape.
    """
    options = CacheOptions() if isinstance(cache, type) else cache
    _require_dispatch()
    _replace_generation()
    if ("mlx_lm.utils", "load_model") in _replaced:
        return Installation(owns=False)

    def load_model(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        model, config = original(*args, **kwargs)
        path = args[0] if args else kwargs["model_path"]

        def tokenizer() -> Any:
            load_tokenizer = _module("mlx_lm.utils").load_tokenizer
            return load_tokenizer(path, eos_token_ids=config.get("eos_token_id"))

        def whole() -> Any:
            call = inspect.signature(original).bind(*args, **kwargs)
            call.arguments["lazy"] = True
            return original(*call.args, **call.kwargs)[0]

        _give(model, Attachment(tokenizer, options, None, whole))
        return model, config

    _replace("mlx_lm.utils", "load_model", load_model)
    _replace("mlx_lm.models.cache", "LRUPromptCache.fetch_nearest_cache", _fetch_nearest_cache)
    _module("mlx_lm.server")
    # Commands bind this name when they are imported; a model's make_cache cannot see their --max-kv-size.
    bound = {"make_prompt_cache": _make_prompt_cache, "load_prompt_cache": checked_load}
    theirs = {symbol: getattr(mlx_lm_cache, symbol) for symbol in bound}
    for name, module in list(sys.modules.items()):
        for symbol in bound if name.split(".")[0] == "mlx_lm" else ():
            if vars(module).get(symbol) is theirs[symbol]:
                _replace(name, symbol, bound[symbol])
        spec = getattr(module, "__spec__", None)  # with `python -m mlx_lm.server`, __main__ has this one, too
        if getattr(spec, "name", None) == "mlx_lm.server" and hasattr(module, "ModelProvider"):
            _replace(name, "ModelProvider.load", _load_without_draft)
    return Installation(owns=True)


@intercept.one_at_a_time(_hooking)
def uninstall() -> None:
    """Put back everything that `install` and `attach` replaced, in mlx-lm, in MLX and on attached models, and forget
    the codecs in use."""
    global _dispatch_held
    codecs_in_use.clear()
    for (module, name), (original, ours) in list(_replaced.items()):
        owner, attribute = _owner(module, name)
        if getattr(owner, attribute) is ours:
            setattr(owner, attribute, original)
        del _replaced[module, name]
    while _attached:
        if (model := _attached.pop()()) is not None:
            detach(model)
    if _dispatch_held:
        intercept.disable()
        _dispatch_held = False
    for own in CLASSES:
        if getattr(mlx_lm_cache, own.__name__, None) is own:
            delattr(mlx_lm_cache, own.__name__)


def _module(name: str) -> Any:
    return importlib.import_module(name)  # mlx_lm.generate, as an attribute, is the function


@intercept.one_at_a_time(_hooking)
def _require_dispatch() -> None:
    """Handles are attended, and load_prompt_cache, which looks classes up by name, finds ours."""
    global _dispatch_held
    check_mlx_lm()
    for own in CLASSES:
        setattr(mlx_lm_cache, own.__name__, own)
    if not _dispatch_held:
        intercept.enable()
        _dispatch_held = True


def check_mlx_lm() -> None:
    """RuntimeError unless this mlx-lm has the features the hooks rely on."""
    wanted = {
        ("mlx_lm.generate", "generate_step"): {"prompt", "model", "prompt_cache", "max_kv_size", "kv_bits"},
        ("mlx_lm.generate", "speculative_generate_step"): {"prompt", "model", "draft_model", "prompt_cache"},
        ("mlx_lm.utils", "load_model"): {"model_path"},
        ("mlx_lm.models.cache", "make_prompt_cache"): {"model", "max_kv_size"},
        ("mlx_lm.models.cache", "create_attention_mask"): {"N", "offset"},
    }
    for (module, name), parameters in wanted.items():
        function, _ = _replaced.get((module, name), (getattr(_module(module), name, None), None))
        if function is None or not parameters <= set(inspect.signature(function).parameters):
            import mlx_lm

            raise RuntimeError(
                f"mlx-lm {getattr(mlx_lm, '__version__', '?')} has no {module}.{name} with {sorted(parameters)}; "
                f"expected {SUPPORTED}; install one of these."
            )


def _owner(module: str, name: str) -> tuple[Any, str]:
    *classes, attribute = name.split(".")
    return functools.reduce(getattr, classes, _module(module)), attribute


def _replace(module: str, name: str, wrapper: Callable[..., Any]) -> None:
    if (module, name) in _replaced:
        return
    owner, attribute = _owner(module, name)
    original = getattr(owner, attribute)

    @functools.wraps(original)
    def ours(*args: Any, **kwargs: Any) -> Any:
        return wrapper(original, *args, **kwargs)

    _replaced[module, name] = original, ours
    setattr(owner, attribute, ours)


def _fetch_nearest_cache(original: Callable[..., Any], stored: Any, model: Any, tokens: list[int]) -> Any:
    caches, rest = original(stored, model, tokens)
    if rest and (repeated := window_to_repeat(caches, len(tokens) - len(rest))):
        mlx_lm_cache.trim_prompt_cache(caches, repeated)
        rest = tokens[-(len(rest) + repeated) :]
    return caches, rest


def _replace_generation() -> None:
    _replace("mlx_lm.generate", "generate_step", _generate_step)
    _replace("mlx_lm.generate", "speculative_generate_step", _speculative_generate_step)


def _load_without_draft(original: Callable[..., Any], provider: Any, *args: Any, **kwargs: Any) -> Any:
    """What the server's ModelProvider loads, its draft with mlx-lm's own caches: it makes those with the target's."""
    loaded = original(provider, *args, **kwargs)
    if provider.draft_model is not None:
        detach(provider.draft_model)
    return loaded


def _make_prompt_cache(original: Callable[..., Any], model: Any, max_kv_size: int | None = None) -> Any:
    return original(model, max_kv_size) if attachment_of(model) is None else make_prompt_cache(model, max_kv_size)


def _generate_step(
    original: Callable[..., Any],
    prompt: mx.array,
    model: Any,
    *args: Any,
    cache: CacheChoice | None = None,
    **kwargs: Any,
) -> Any:
    kwargs["prompt_cache"] = _choose_cache(model, cache, kwargs.get("prompt_cache"), kwargs.get("max_kv_size"))
    _refuse_kv_bits(kwargs.get("kv_bits"), kwargs["prompt_cache"])
    return original(prompt, model, *args, **kwargs)


def _speculative_generate_step(
    original: Callable[..., Any],
    prompt: mx.array,
    model: Any,
    draft_model: Any,
    *args: Any,
    cache: CacheChoice | None = None,
    **kwargs: Any,
) -> Any:
    chosen = _choose_cache(model, cache, kwargs.get("prompt_cache"), None, draft_model)
    if chosen is None and attachment_of(draft_model) is not None:
        chosen = own_caches(model) + own_caches(draft_model)
    kwargs["prompt_cache"] = chosen
    _refuse_kv_bits(kwargs.get("kv_bits"), kwargs["prompt_cache"])
    return original(prompt, model, draft_model, *args, **kwargs)
