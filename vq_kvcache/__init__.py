"""Spectral KV-cache compression for mlx-lm.

`generate(model, tokenizer, prompt, cache=SpectralKVCache)` in one call, `attach(model)` or `load(path)` for one model,
`install()` for all of the process; what a cache is to take, `SpectralKVCache.with_options(...)` says.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .cache import SpectralKVCache as SpectralKVCache
    from .hooks import attach as attach
    from .hooks import generate as generate
    from .hooks import install as install
    from .hooks import load as load
    from .hooks import make_prompt_cache as make_prompt_cache
    from .hooks import stream_generate as stream_generate
    from .hooks import uninstall as uninstall
    from .spectral.codec import Codec as Codec

__version__ = "0.1.0"

_HOMES = {
    "SpectralKVCache": "cache",
    "Codec": "spectral.codec",
    **dict.fromkeys(
        ("attach", "generate", "install", "load", "make_prompt_cache", "stream_generate", "uninstall"), "hooks"
    ),
}
__all__ = ["Codec", "SpectralKVCache", "attach", "generate", "install", "load", "make_prompt_cache",
           "stream_generate", "uninstall"]  # fmt: skip


def __getattr__(name: str) -> Any:
    # On first use, so that importing the package does not import the model stack.
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})  # so that help() and completion show them
