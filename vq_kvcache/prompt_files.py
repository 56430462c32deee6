"""Prompt-cache files, checked before MLX and mlx-lm read them.

Their names are turned into lists as long as the numbers in them say, so that a few bytes could ask for any memory; and
what is wrong with a file is told in one sentence, whatever reads it.
"""

import os
import pathlib
from collections.abc import Callable, Iterable
from typing import Any

import mlx.core as mx
from mlx.utils import tree_unflatten
from safetensors import SafetensorError, safe_open

from .spectral.codec import CodecError

MOST_PARTS = 16  # of a dotted name: caches within lists of caches have five


def read_prompt_file(path: str | os.PathLike[str]) -> tuple[dict[str, mx.array], dict[str, str]]:
    """Arrays, not read yet, and metadata of a file of mlx_lm's save_prompt_cache; CodecError for another one."""
    name = os.fspath(path)
    if not pathlib.Path(path).is_file():
        raise CodecError(f"{name} is no file; expected a prompt cache's; check the name.")
    try:
        with safe_open(name, "numpy") as file:  # checks every size and offset, and reads no array
            metadata, names = file.metadata() or {}, list(file.keys())
        _check_names(names)
        _check_names(metadata)
        arrays = mx.load(name)
    except (OSError, SafetensorError, ValueError, RuntimeError) as error:
        raise _damaged(name, error) from None
    if not isinstance(arrays, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise _damaged(name, "no safetensors file")
    return arrays, metadata


def checked_load(original: Callable[..., Any], file_name: str, return_metadata: bool = False) -> Any:
    """mlx_lm's `load_prompt_cache`, and ValueError or CodecError, in one sentence, for what it cannot load."""
    arrays, metadata = read_prompt_file(file_name)
    try:
        _check_parts(tree_unflatten(list(metadata.items())), arrays)
        return original(file_name, return_metadata)
    except (KeyError, TypeError, AttributeError, IndexError, OverflowError, RuntimeError) as error:
        raise _damaged(file_name, error) from None
    except ValueError as error:
        if "; " in str(error):  # one of ours
            raise
        raise _damaged(file_name, error) from None


def _damaged(name: str, error: object) -> CodecError:
    said = " ".join(f"{error!r:.300}".split())
    return CodecError(f"{name} is no prompt cache that can be read ({said}); expected a whole one; make it again.")


def _check_names(names: Iterable[str]) -> None:
    """ValueError where a list of them would have more places than there are names, or too many lists lie in lists."""
    names = list(names)
    for name in names:
        parts = name.split(".")
        if len(parts) > MOST_PARTS or any(_place(p) > len(names) for p in parts):
            raise ValueError(f"the name {name[:60]!r}")


def _place(part: str) -> int:
    try:
        return int(part[:20])
    except ValueError:
        return 0


def _check_parts(tree: Any, arrays: dict[str, mx.array]) -> None:
    """ValueError unless the metadata are the user's, the classes, and what is no array, of the arrays there are."""
    from mlx_lm.models import cache as mlx_lm_cache

    if not isinstance(tree, list) or len(tree) != 3:
        raise ValueError("metadata of another kind")
    _, classes, scalars = tree
    if hasattr(mlx_lm_cache.KVCache, "meta_state"):  # mlx-lm < 0.32: each cache's, the user's, the classes
        infos, _, classes = tree
        scalars = infos[:0] if isinstance(infos, list) else None
    if not isinstance(classes, list) or not isinstance(scalars, list):
        raise ValueError("metadata of another kind")
    known = [isinstance(c, str) and hasattr(getattr(mlx_lm_cache, c, None), "from_state") for c in classes]
    if not all(known):
        raise ValueError(f"the classes {classes!r:.100}")
    for entry in scalars[1:]:
        if not isinstance(entry, list) or len(entry) != 2 or not all(isinstance(e, str) for e in entry):
            raise ValueError("a scalar without a place")
        if entry[0] not in arrays:
            raise ValueError(f"no array {entry[0]!r:.60}")
    count = len({name.split(".")[0] for name in arrays})
    if count != len(classes):
        raise ValueError(f"{count} caches of {len(classes)} classes")
