"""Where calibration tokens come from when the user brings none.

Shipped prose, reference and fact lists (data/calibration, provenance beside it) and code, read from the running
interpreter's standard library, in equal shares; and text that the model itself writes at temperature 1, which brings
the languages and formats it knows.
"""

import importlib
import importlib.resources
import itertools
import pathlib
from collections.abc import Sequence
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np

from .intercept import plain_caches

CODE_MODULES = ("argparse", "json.decoder", "textwrap", "statistics", "heapq", "csv", "shlex", "configparser")
# The share of sequences that the model writes itself; each of its tokens costs a whole decode step.
SELF_WRITTEN_SHARE = 1 / 8
PIECE_CHARACTERS = 2000
LIMITS = "max_position_embeddings", "n_positions", "max_seq_len"  # of a configuration
LONGEST_CONTEXT = 32768


class Placed(NamedTuple):
    """Tokens, and the position of the first of them."""

    ids: mx.array
    offset: int


def place(sequences: Sequence[mx.array], context: int) -> list[Placed]:
    """Give sequences first positions from 0 to the end of `context`, denser near 0.

    A cached key is turned by its absolute position, so keys far into a long context look unlike those of a short
    sequence; attention sees differences of positions only, so a shifted sequence costs no more than any other.
    """
    golden = (5**0.5 - 1) / 2  # multiples of it, modulo 1, fill the interval evenly at every length
    free = [max(context - s.size, 0) for s in sequences]
    return [
        Placed(s, int(room * (i * golden % 1) ** 2)) for i, (s, room) in enumerate(zip(sequences, free, strict=True))
    ]


def longest_sequence(model: Any) -> int | None:
    """Tokens of the longest sequence that the model's configuration names, if it names one."""
    args = getattr(model, "args", None)
    for home in (args, getattr(args, "text_config", None)):
        stated = [home.get(n) if isinstance(home, dict) else getattr(home, n, None) for n in LIMITS]
        if whole := [n for n in stated if isinstance(n, int) and n > 0]:
            return min(whole)
    return None


def context_of(model: Any) -> int:
    """The tokens over which calibration spreads positions: the model's longest sequence, at most LONGEST_CONTEXT; 0
    when its configuration does not say."""
    return min(longest_sequence(model) or 0, LONGEST_CONTEXT)


def built_in_texts() -> list[str]:
    """The shipped texts and the standard library's code, one string per kind."""
    folder = importlib.resources.files("vq_kvcache") / "data" / "calibration"
    texts = [f.read_text("utf-8") for f in sorted(folder.iterdir(), key=lambda f: f.name) if f.name.endswith(".txt")]
    sources = [importlib.import_module(name).__file__ for name in CODE_MODULES]
    texts.append("\n\n".join(pathlib.Path(s).read_text("utf-8") for s in sources if s is not None))
    return texts


def encode(tokenizer: Any, text: str) -> list[int]:
    """Token ids of plain text; takes a bare transformers tokenizer or mlx-lm's wrapper around one."""
    # In pieces, because tokenizers warn about texts longer than the model's context.
    pieces = [text[i : i + PIECE_CHARACTERS] for i in range(0, len(text), PIECE_CHARACTERS)]
    return [int(i) for piece in pieces for i in tokenizer.encode(piece, add_special_tokens=False)]


def cut(ids: list[int], count: int, length: int) -> list[mx.array]:
    """At most `count` sequences [length] evenly spread over `ids`; one shorter sequence when there is no full one."""
    whole = len(ids) // length
    if whole == 0:
        return [mx.array(ids)] if len(ids) > 1 and count > 0 else []
    starts = np.unique(np.linspace(0, len(ids) - length, min(count, whole)).astype(int))
    return [mx.array(ids[s : s + length]) for s in starts]


def shares_of(count: int, kinds: int) -> list[int]:
    """How many of `count` sequences each of `kinds` texts gives."""
    return [(count + i) // kinds for i in range(kinds)][::-1]


def calibration_sequences(
    model: Any, tokenizer: Any, num_samples: int, sequence_length: int, texts: Sequence[str] | None, seed: int
) -> list[mx.array]:
    """`num_samples` token sequences [sequence_length]: from `texts` alone when given, else the built-in mix."""
    if num_samples < 1 or sequence_length < 2:
        raise ValueError(f"{num_samples} samples of {sequence_length} tokens; expected at least 1 of at least 2.")
    own = 0 if texts is not None else int(num_samples * SELF_WRITTEN_SHARE)
    sources = built_in_texts() if texts is None else list(texts)
    encoded = [encode(tokenizer, text) for text in sources]
    shares = shares_of(num_samples - own, len(sources))
    kinds = [cut(ids, share, sequence_length) for ids, share in zip(encoded, shares, strict=True)]
    # In turn, so that any few of them are mixed text.
    sequences = [s for row in itertools.zip_longest(*kinds) for s in row if s is not None]
    if own:
        sequences += write_sequences(model, tokenizer, own, sequence_length, seed)
    if not sequences:
        raise ValueError("the calibration texts hold fewer than two tokens; expected some text; pass more.")
    return sequences


def write_sequences(model: Any, tokenizer: Any, count: int, length: int, seed: int) -> list[mx.array]:
    """`count` sequences [length] sampled from the model at temperature 1, in one batch, from its own opening."""
    opening = _opening(tokenizer)
    tokens = mx.broadcast_to(mx.array(opening)[None], (count, len(opening)))
    cache = plain_caches(model)
    key = mx.random.key(seed)
    written = [tokens]
    for _ in range(length - len(opening)):
        key, now = mx.random.split(key)
        logits = model(tokens, cache=cache)[:, -1]
        tokens = mx.random.categorical(logits.astype(mx.float32), key=now)[:, None]
        mx.eval(tokens)
        written.append(tokens)
    return list(mx.concatenate(written, axis=1)[:, :length])


def _opening(tokenizer: Any) -> list[int]:
    """What a text of this model starts with: an empty turn of its chat template, or its first special token."""
    if getattr(tokenizer, "chat_template", None):
        message = [{"role": "user", "content": "Write about anything you like."}]
        return [int(i) for i in tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)]
    for name in ("bos_token_id", "eos_token_id"):
        if (token := getattr(tokenizer, name, None)) is not None:
            return [int(token)]
    return encode(tokenizer, "The")[:1]
