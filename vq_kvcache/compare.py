"""`vq_kvcache compare`: full precision, mlx-lm's own quantized cache and ours, on your model and your text.

Writes one HTML page that loads nothing from anywhere, and prints a table. Without a codec of the model one is made
first, which takes minutes on a CPU. Without --text a passage of a novel is read that calibration never saw.
"""

import argparse
import dataclasses
import difflib
import importlib.metadata
import importlib.resources
import itertools
import json
import pathlib
import platform
import re
import sys
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx

from . import measuring
from .drift import UNLIKE
from .inspection import loaded
from .kernels import backend
from .measuring import Method, Row
from .spectral.calibrate import codec_for, fast_arithmetic
from .spectral.calibration_text import encode, longest_sequence
from .spectral.codec import Codec, as_pair
from .spectral.files import require_writable, write_atomically
from .spectral.progress import bar

CONTEXTS = (512, 1024, 2048)
SEQUENCE = 1024
LEAST_TEXT = measuring.PREFILL + 64
LEAST_CONTEXT = 256  # from which something is packed
PROMPT_TOKENS = 320
READ_TOKENS = 256  # of the prompt whose reading is timed


@dataclasses.dataclass(frozen=True)
class Request:
    """What is to be compared, checked: `opening` is what the model's texts begin with, `ids` those of the text without
    it, `prompt` as text and as ids."""

    source: str
    opening: list[int]
    ids: list[int]
    prompt: str
    prompt_ids: list[int]
    bits: list[float]
    contexts: list[int]
    tokens: int
    max_tokens: int
    sequence: int = SEQUENCE  # tokens of text that are read as one, at most


def compare(name: str, model: Any, tokenizer: Any, codec: Codec, request: Request) -> Row:
    """Measure everything; returns the report as plain JSON, which `report_page.page` shows."""
    active = measuring.active_bytes()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=UNLIKE)  # drift is in the report
        methods, missing = measuring.methods(model, codec, request.bits)
        held, reading = _bytes_and_speed(model, methods, request)
        with fast_arithmetic(model):
            rows = _quality(model, methods, request)
            texts = _continuations(model, tokenizer, methods, request)
    memory, whose = measuring.machine_memory()
    for method, row in zip(methods, rows, strict=True):
        sizes = {c: (held[method.name, c]["nbytes"], held[method.name, c]["decode_peak"]) for c in request.contexts}
        row |= {
            "held": {str(c): held[method.name, c] for c in request.contexts},
            "read_tokens_per_second": reading[method.name],
            "largest": measuring.largest_context(
                memory, active, measuring.codec_bytes(method), sizes, bounded=method.kind == "spectral"
            ),
            "continuation": texts[method.name],
        }
    on_gpu = mx.default_device() == mx.gpu
    return {
        "kind": "comparison", "model": name, "fingerprint": codec.fingerprint,
        "context_of_model": longest_sequence(model) or 0,
        "machine": {
            "system": platform.platform(), "mlx": importlib.metadata.version("mlx"),
            "mlx_lm": importlib.metadata.version("mlx-lm"),
            "device": str(mx.device_info().get("device_name", "GPU")) if on_gpu else "CPU",
            "memory_bytes": memory, "memory": whose, "active_bytes": active,
        },
        "text": {"source": request.source, "tokens": len(request.ids)},
        "prompt": {"text": request.prompt, "tokens": len(request.prompt_ids)},
        "codec": {"identity": codec.identity, **codec.provenance},
        "bytes_per_number": methods[0].bits / 8, "quality_in_float32": not on_gpu, "missing": missing,
        "group_size": next((m.group_size for m in methods if m.group_size), None),
        "contexts": request.contexts, "methods": rows, "spectra": measuring.spectra(codec),
        **measuring.predicted(codec, request.bits, len(request.opening) + _scored(request)[1]),
        "widths": {f"{b:g}": measuring.widths(codec, b) for b in request.bits},
    }  # fmt: skip


def _bytes_and_speed(
    model: Any, methods: Sequence[Method], request: Request
) -> tuple[dict[tuple[str, int], Row], dict[str, float]]:
    total = len(methods) * (READ_TOKENS + len(request.contexts) * measuring.JUDGED)
    ids = [*request.opening, *itertools.islice(itertools.cycle(request.ids), max(request.contexts))]
    with bar(total=total, desc="bytes and speed", unit="token") as progress:
        reading = {}
        for method in methods:
            if method is methods[0] or backend() != "ops":  # kernels take seconds to compile
                measuring.warm(model, method, (ids + ids)[: READ_TOKENS + measuring.PIECE + 1])
            reading[method.name] = measuring.reading_speed(model, method, ids[:READ_TOKENS])
            progress.update(READ_TOKENS)
        rows = measuring.held(model, methods, ids, request.contexts, progress.update)
        return {(name, context): row for name, context, row in rows}, reading


def _scored(request: Request) -> tuple[int, int]:
    """(texts that are scored, tokens of each), their openings not counted."""
    return _sequences(min(request.tokens, len(request.ids)), request.sequence)


def _quality(model: Any, methods: Sequence[Method], request: Request) -> list[Row]:
    count, length = _scored(request)
    texts = mx.array([[*request.opening, *request.ids[i * length : (i + 1) * length]] for i in range(count)])
    with bar(total=texts.shape[1] * len(methods), desc="next tokens", unit="token") as progress:
        found, caches = measuring.scores(model, methods, texts, progress.update)
    return [
        {"name": m.name, "kind": m.kind, "bits": m.bits, **measuring.summary(found[m.name]),
         "drift": measuring.drift_of(caches[m.name])}
        for m in methods
    ]  # fmt: skip


def _sequences(tokens: int, longest: int) -> tuple[int, int]:
    """(how many texts, tokens of each): at most `longest`, and of equal length, so that next to none are left over."""
    count = max(1, min(-(-tokens // longest), tokens // LEAST_TEXT))
    return count, min(tokens // count, longest)


def _continuations(model: Any, tokenizer: Any, methods: Sequence[Method], request: Request) -> dict[str, Row]:
    ends = tuple(getattr(tokenizer, "eos_token_ids", ()))
    written = {}
    with bar(total=request.max_tokens * len(methods), desc="continuations", unit="token") as progress:
        for method in methods:
            written[method.name] = measuring.continuation(
                model, method, request.prompt_ids, request.max_tokens, ends, progress.update
            )
    reference = written[methods[0].name]
    result = {}
    for name, ids in written.items():
        alike = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(reference, ids, strict=False))
        same = sum(1 for _ in alike)
        result[name] = {
            "text": tokenizer.decode(ids), "tokens": len(ids), "same_tokens": same,
            "pieces": differences(tokenizer.decode(reference), tokenizer.decode(ids)),
        }  # fmt: skip
    return result


def differences(reference: str, other: str) -> list[tuple[str, str]]:
    """`other` in pieces: ("same", words), ("other", words that stand in place of the reference's, or are more), and
    ("missing", words of the reference's that it lacks). The first two kinds joined are `other`."""
    theirs, own = (re.findall(r"\s*\S+|\s+$", text) for text in (reference, other))
    pieces: list[tuple[str, str]] = []
    for what, a, b, c, d in difflib.SequenceMatcher(None, theirs, own, autojunk=False).get_opcodes():
        kind = {"equal": "same", "delete": "missing"}.get(what, "other")
        pieces.append((kind, "".join(theirs[a:b] if kind == "missing" else own[c:d])))
    return pieces


# -- the command


def main(argv: list[str]) -> int:
    """Run `vq_kvcache compare` and return its exit status."""
    args = _parser().parse_args(argv)
    try:
        bits = _numbers("bits", args.bits, float)
        for b in bits:
            as_pair(b)
        for path in filter(None, (args.output, args.json)):
            require_writable(path)  # measuring takes minutes
        source, text = _text(args.text)
        prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
        model, tokenizer = loaded(args.model)
        request = _request(args, model, tokenizer, source, text, prompt, bits)
        codec = Codec.load(args.codec) if args.codec else codec_for(model, tokenizer)
        name = pathlib.Path(args.model).resolve().name if pathlib.Path(args.model).is_dir() else args.model
        report = compare(name, model, tokenizer, codec, request)
        from .report_page import page

        write_atomically(args.output, page(report).encode())
        if args.json:
            write_atomically(args.json, (json.dumps(report) + "\n").encode())
    except (OSError, ValueError) as error:
        print(f"vq_kvcache compare: {error}", file=sys.stderr)
        return 1
    print("\n".join(table(report)))
    print(f"\nreport: {args.output}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="vq_kvcache compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", help="folder or repository")
    parser.add_argument("--text", type=pathlib.Path, help="text file to compare on (default: a passage of a novel)")
    parser.add_argument("--prompt", help="prompt to continue, - for standard input (default: the text's beginning)")
    parser.add_argument("--bits", default="1,2,3,4", help="budgets of the spectral cache (default: 1,2,3,4)")
    parser.add_argument("--context", help="tokens at which bytes and speed are measured (default: 512,1024,2048)")
    parser.add_argument("--tokens", type=int, default=768, help="tokens of text to read (default: 768)")
    parser.add_argument("--max-tokens", type=int, default=40, help="tokens to continue the prompt by (default: 40)")
    parser.add_argument("--codec", type=pathlib.Path, help="codec file (default: the model's, or made once)")
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("vq_kvcache_compare.html"),
                        help="page to write (default: vq_kvcache_compare.html)")  # fmt: skip
    parser.add_argument("--json", type=pathlib.Path, help="file to write the figures to as well")
    return parser


def _numbers(name: str, given: str, kind: type[float] | type[int]) -> list[Any]:
    try:
        return sorted({round(kind(part), 4) for part in given.split(",")})  # budgets are named by as many digits
    except ValueError:
        raise ValueError(
            f"--{name} is {given!r}; expected {'whole numbers' if kind is int else 'numbers'} separated by commas, as "
            f"in {'512,2048' if kind is int else '1,2.5,4'}."
        ) from None


def _text(path: pathlib.Path | None) -> tuple[str, str]:
    if path is None:
        passage = importlib.resources.files("vq_kvcache") / "data" / "demo.txt"
        return "a passage of The Wonderful Wizard of Oz (built in)", passage.read_text("utf-8")
    try:
        return path.name, path.read_text("utf-8")
    except OSError as error:
        raise ValueError(f"--text {path} cannot be read ({error.strerror}); expected a text file.") from None
    except UnicodeDecodeError:
        raise ValueError(f"--text {path} is not UTF-8; expected plain text; convert it first.") from None


def _request(
    args: argparse.Namespace, model: Any, tokenizer: Any, source: str, text: str, prompt: str | None, bits: list[float]
) -> Request:
    ids = encode(tokenizer, text)
    if len(ids) < LEAST_TEXT:
        raise ValueError(f"the text has {len(ids)} tokens; expected at least {LEAST_TEXT}; give a longer --text.")
    for name, least in (("tokens", LEAST_TEXT), ("max_tokens", 1)):
        if (value := getattr(args, name)) < least:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; expected at least {least}.")
    opening = _opening(tokenizer)
    most = longest_sequence(model) or 1 << 62
    if (left := most - len(opening)) < LEAST_TEXT:
        raise ValueError(f"the model is made for {most} tokens; expected at least {LEAST_TEXT + len(opening)}.")
    contexts = [c for c in CONTEXTS if c <= most] or [most]
    if args.context is not None:
        contexts = _numbers("context", args.context, int)
    if wrong := [c for c in contexts if not LEAST_CONTEXT <= c <= most]:
        end = f"to {most:,}, the model's own" if most < 1 << 62 else "or more"
        raise ValueError(f"--context has {wrong[0]:,}; expected {LEAST_CONTEXT} {end}.")
    if prompt is None:
        beginning = ids[: max(1, min(PROMPT_TOKENS, left - args.max_tokens))]
        prompt, prompt_ids = str(tokenizer.decode(beginning)), opening + beginning
    else:
        prompt_ids = _prompt_ids(tokenizer, prompt)
    if len(prompt_ids) + args.max_tokens > most:
        raise ValueError(
            f"the prompt has {len(prompt_ids):,} tokens and --max-tokens is {args.max_tokens:,}; expected at most "
            f"{most:,} together, the model's own limit."
        )
    return Request(source, opening, ids[: max(args.tokens, *contexts)], prompt, prompt_ids, bits, contexts, args.tokens,
                   args.max_tokens, min(SEQUENCE, left))  # fmt: skip


def _opening(tokenizer: Any) -> list[int]:
    """The token that this model's tokenizer puts before every text, if it does; many attend to it as a sink."""
    first = getattr(tokenizer, "bos_token_id", None)
    return [int(first)] if first is not None and list(tokenizer.encode("a")[:1]) == [first] else []


def _prompt_ids(tokenizer: Any, prompt: str) -> list[int]:
    """As mlx_lm's own generate reads a prompt: through the chat template, where the model has one."""
    if getattr(tokenizer, "chat_template", None):
        message = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
    else:
        ids = tokenizer.encode(prompt)
    if not ids:
        raise ValueError("the prompt is empty; expected some text.")
    return [int(i) for i in ids]


def table(report: Row) -> Iterator[str]:
    """The report's main figures as lines of text."""
    longest = str(max(report["contexts"]))
    yield f"\n{report['model']} on {report['machine']['device']}, {report['text']['source']}"
    rows = [("cache", "bits", "KL mean", "KL 99.9 %", "top-1", "perplexity", f"bytes at {int(longest):,}", "share",
             "tokens/s", "fits")]  # fmt: skip
    full = report["methods"][0]["held"][longest]["nbytes"]
    for m in report["methods"]:
        at = m["held"][longest]
        rows.append((
            m["name"], f"{m['bits']:.2f}", f"{m['kl']:.5f}", f"{m['kl_999']:.4f}", f"{m['top1']:.1%}",
            f"{m['perplexity']:.2f}", f"{at['nbytes']:,}", f"{at['nbytes'] / full:.3f}",
            f"{at['decode_tokens_per_second']:.1f}", f"{m['largest']['tokens']:,}",
        ))  # fmt: skip
    sizes = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [cell.rjust(size) for cell, size in zip(row, sizes, strict=True)]
        yield "  ".join([row[0].ljust(sizes[0]), *cells[1:]])
    if report["missing"]:
        yield f"mlx-lm's own quantized cache was left out: {report['missing']}"
    memory = report["machine"]["memory_bytes"] / 1e9
    yield f"fits: tokens of one context in {memory:.1f} GB beside the model; tokens/s: decoding at {int(longest):,}."
    if len(report["contexts"]) == 1:
        yield "At one context the window counts as if it grew, so more fit; --context 512,1024 tells how many."
