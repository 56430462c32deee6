"""`vq_kvcache inspect`: what is packed, why the rest is not, what it costs, of a model, a codec or a prompt cache."""

import argparse
import dataclasses
import json
import pathlib
import struct
import sys
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.utils import load

from .fitting import fit
from .options import CacheOptions
from .prompt_files import read_prompt_file
from .spectral.calibration_text import longest_sequence
from .spectral.codec import CONTEXT, FORMAT, Codec, CodecError, find_codec, fingerprint_of_files
from .spectral.files import parse_json
from .spectral.intercept import Use, members_of, plain_caches, read_by_state, uses

BITS = (1.0, 2.0, 3.0, 4.0)
PACKED = {
    "paired": "keys and values",
    "latent": "latents; positions beside them stay exact",
    "own": "keys and values; decoded at each step for the model's own attention",
}

Report = dict[str, Any]


def inspect(target: str, asked: CacheOptions | None = None) -> Report:
    """The report on a model (folder or repository name), a codec file or a prompt-cache file, as plain JSON.

    asked: what a model's cache is to take or to cost, of which "fit" then says what it comes to.
    "kind" is "model", "codec" or "prompt cache". "layers" has a row per cache. Bytes are of arrays; bytes_per_token of
    what a token adds once it leaves the exact window. CodecError for a file that is neither.
    """
    path = pathlib.Path(target)
    if not path.is_file():
        named = path.suffix == ".safetensors" and not path.is_dir()
        if named or path.is_symlink() or (path.exists() and not path.is_dir()):
            raise CodecError(f"{path} is no file; expected a model, a codec or a prompt cache; check the name.")
        return inspect_model(target, asked)
    if asked is not None:
        raise CodecError(f"{target} is a file; expected a model, whose cache is to fit; leave --kv-memory out.")
    if FORMAT in (metadata := _metadata(path)):
        return inspect_codec(path)
    return inspect_prompt_cache(path, metadata)


def loaded(path_or_hf_repo: str, lazy: bool = False) -> tuple[Any, Any]:
    """Model and tokenizer, by mlx_lm.load; ValueError, of one line, for what it does not take."""
    try:
        model, tokenizer = load(path_or_hf_repo, lazy=lazy)[:2]
    except (OSError, ValueError, RuntimeError, KeyError, TypeError) as error:
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(
            f"{path_or_hf_repo} cannot be loaded ({reason[0]}); expected a model that mlx_lm.load takes."
        ) from None
    return model, tokenizer


def inspect_model(path_or_hf_repo: str, asked: CacheOptions | None = None) -> Report:
    """Reads no weights but for the fingerprint, one parameter at a time, and calibrates nothing."""
    model, _ = loaded(path_or_hf_repo, lazy=True)
    name = fingerprint_of_files(lambda: load(path_or_hf_repo, lazy=True)[0])
    codec = find_codec(name)
    used = uses(model)
    rows = [_row(i, cache, used.get(i), codec) for i, cache in enumerate(_flat(plain_caches(model)))]
    for i in read_by_state(model):
        rows[i]["why"] = "layers that share it read it as only mlx-lm's own cache has it; mlx-lm 0.32 asks otherwise"
    itemsize = next(p.dtype.size for _, p in tree_flatten(model.parameters()) if mx.issubdtype(p.dtype, mx.floating))
    for i, use in used.items():
        rows[i] |= {"heads": use.heads, "key_dims": use.key_dims, "value_dims": use.value_dims}
        rows[i]["bytes_per_token"] = use.heads * (use.key_dims + use.value_dims) * itemsize
    report: Report = {
        "kind": "model", "model": path_or_hf_repo, "fingerprint": name, "layers": rows,
        "codec": None if codec is None else codec.identity,
        "bytes_per_token": {"full precision": sum(r.get("bytes_per_token", 0) for r in rows)},
    }  # fmt: skip
    if codec is not None:
        window = None if asked is None else asked.window
        report |= predicted(codec, (asked and asked.context) or longest_sequence(model), window)
        report["bytes_per_token"] |= {f"{b:g} bits": _packed_bytes(codec, used, b, itemsize) for b in BITS}
    if asked is not None:
        if codec is None:
            raise CodecError(f"{path_or_hf_repo} has no codec, so nothing is fitted; run `vq_kvcache calibrate` first.")
        found = fit(model, codec, asked)
        report["fit"] = dataclasses.asdict(found) | {"line": str(found)}
    return report


def _flat(caches: list[Any]) -> list[Any]:
    return [member for cache in caches for member in members_of(cache)]


def _row(index: int, cache: Any, use: Use | None, codec: Codec | None) -> Report:
    row = {"cache": index, "class": type(cache).__name__, "packed": use is not None, "why": _why(cache, use)}
    if use is not None and codec is not None and index not in codec.layers:
        row |= {"packed": False, "why": "not in the model's codec"}
    return row


def _why(cache: Any, use: Use | None) -> str:
    """What of a cache is packed, or why nothing is."""
    name = type(cache).__name__
    if use is not None:
        return PACKED[use.kind]
    return {
        "KVCache": "keys of an indexer, which no attention reads",
        "RotatingKVCache": f"sliding window: holds at most {getattr(cache, 'max_size', '?')} tokens",
        "ChunkedKVCache": f"chunked attention: holds at most {getattr(cache, 'chunk_size', '?')} tokens",
        "ArraysCache": "recurrent state: does not grow",
        "MambaCache": "recurrent state: does not grow",
    }.get(name, f"a {name}, which is not a KV cache that grows")


def _packed_bytes(codec: Codec, used: dict[int, Use], bits: float, itemsize: int) -> int:
    layers, total = codec.plan(bits).layers, 0
    for i, use in used.items():
        for part, dims in (("keys", use.key_dims), ("values", use.value_dims)):
            quantizer = getattr(layers[i], part) if i in layers else None
            total += use.heads * dims * itemsize if quantizer is None else 4 * quantizer.words
    return total


def predicted(codec: Codec, context: int | None = None, window: int | None = None) -> Report:
    """Predicted KL in nats by budget, of the newest of `context` tokens (None: of the context that the codec was made
    for), and that context; None for a codec whose costs are not in nats."""
    tokens = context or int(codec.provenance.get("context", 0)) or CONTEXT
    kl = {f"{b:g} bits": codec.predicted_kl(b, tokens, window) for b in BITS} if codec.in_nats else None
    return {"predicted_kl": kl, "predicted_kl_tokens": tokens}


def told(report: Report) -> str:
    """What was predicted, as one line."""
    shown = ", ".join(f"{kl:.2g} ({bits})" for bits, kl in report["predicted_kl"].items())
    return f"predicted KL, nats, of the newest of {report['predicted_kl_tokens']:,} tokens: {shown}"


def inspect_codec(path: pathlib.Path) -> Report:
    """Of each layer its shapes, and its bits at the default budget."""
    codec = Codec.load(path)
    plan = codec.plan(2.0)
    rows = []
    for i, (keys, values) in codec.layers.items():
        row: Report = {"cache": i, "heads": keys.mean.shape[0], "key_dims": keys.mean.shape[1]}
        row["value_dims"] = None if values is None else values.mean.shape[1]
        for part in ("keys", "values"):
            quantizer = getattr(plan.layers[i], part)
            row[f"{part}_bits_at_2"] = None if quantizer is None else round(quantizer.bits_per_value, 2)
        rows.append(row)
    return {
        "kind": "codec", "file": str(path), "bytes": path.stat().st_size, "identity": codec.identity,
        "fingerprint": codec.fingerprint, "provenance": codec.provenance, "layers": rows,
        **predicted(codec),
    }  # fmt: skip


def inspect_prompt_cache(path: pathlib.Path, metadata: dict[str, str]) -> Report:
    """Needs no codec: reads the descriptions that spectral caches write into the file."""
    arrays, metadata = read_prompt_file(path)
    tree = tree_unflatten(list(metadata.items()))
    classes = next((part for part in tree if _is_classes(part)), None) if isinstance(tree, list) else None
    if classes is None:
        raise CodecError(f"{path} is neither a codec nor a prompt cache of mlx-lm; expected a file of one of them.")
    described = {key[: -len(".0")]: text for key, a in arrays.items() if (text := _description(key, a)) is not None}
    rows = []
    for i, name in enumerate(classes):
        inside = [prefix for prefix in described if prefix == str(i) or prefix.startswith(f"{i}.")]
        rows += [_spectral_row(i, prefix, described[prefix], arrays) for prefix in inside]
        mine = {k: a for k, a in arrays.items() if k == str(i) or k.startswith(f"{i}.")}
        rest = sum(a.nbytes for k, a in mine.items() if not any(k.startswith(f"{p}.") for p in inside))
        if name != "SpectralKVCache":
            rows.append({"cache": i, "class": name, "packed": False, "bytes": rest})
    user = next((part for part in tree if isinstance(part, dict) and "model" in part), {})
    return {
        "kind": "prompt cache", "file": str(path), "bytes": path.stat().st_size, "model": user.get("model"),
        "codecs": sorted({f"{d['plan']} of {d['fingerprint']}" for d in described.values()}), "layers": rows,
    }  # fmt: skip


def _is_classes(part: Any) -> bool:
    return isinstance(part, list) and all(isinstance(c, str) and c.endswith(("Cache", "CacheList")) for c in part)


def _description(key: str, array: mx.array) -> Report | None:
    """What a spectral cache says of itself: its state's first item, text as numbers."""
    if not key.endswith(".0") or array.ndim != 1 or not mx.issubdtype(array.dtype, mx.integer):
        return None
    try:
        fields = parse_json("".join(map(chr, np.array(array).tolist())))
        chunks = fields.get("chunks", [])
        known = {"plan", "fingerprint", "layer"} <= set(fields) and isinstance(chunks, list)
        return fields if known and all(isinstance(n, int) for n in chunks) else None
    except (ValueError, AttributeError, OverflowError):
        return None


def _spectral_row(index: int, prefix: str, fields: Report, arrays: dict[str, mx.array]) -> Report:
    packed = sum(fields.get("chunks", []))
    held = sum(a.nbytes for k, a in arrays.items() if k.startswith(f"{prefix}.") and k != f"{prefix}.0")
    return {
        "cache": index, "class": "SpectralKVCache", "packed": packed > 0, "layer": fields["layer"],
        "packed_tokens": packed, "exact_tokens": fields.get("exact_tokens", 0), "bytes": held, "plan": fields["plan"],
    }  # fmt: skip


def _metadata(path: pathlib.Path) -> dict[str, str]:
    try:
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > path.stat().st_size:
                raise ValueError("its header is longer than the file")
            return dict(parse_json(file.read(length)).get("__metadata__", {}))
    except OSError as error:
        raise CodecError(
            f"{path} cannot be read ({error.strerror}); expected a codec or a prompt cache; check the name."
        ) from None
    except (ValueError, TypeError, struct.error, AttributeError) as error:
        raise CodecError(
            f"{path} is no safetensors file ({error}); expected a codec or a prompt cache; check the name."
        ) from None


def table(report: Report) -> str:
    """The report as text: what it is, a row per cache, and what each budget costs."""
    skipped = ("layers", "predicted_kl", "predicted_kl_tokens", "bytes_per_token", "fit")
    lines = [f"{name}: {value}" for name, value in report.items() if name not in skipped]
    columns = list(dict.fromkeys(name for row in report["layers"] for name in row))
    cells = [columns, *([_shown(row.get(c)) for c in columns] for row in report["layers"])]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    lines += ["", *("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells), ""]
    if "bytes_per_token" in report:
        shown = ", ".join(f"{v:,} ({k})" for k, v in report["bytes_per_token"].items())
        lines.append(f"bytes per packed token: {shown}")
    if report.get("predicted_kl"):
        lines.append(told(report))
    if "fit" in report:
        lines.append(report["fit"]["line"])
    if report["kind"] == "model" and report["codec"] is None:
        lines.append("no codec yet: it is made with the first cache, or by `vq_kvcache calibrate`.")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return "-" if value is None else str(value)


def main(argv: list[str]) -> int:
    """Run `vq_kvcache inspect` and return its exit status."""
    parser = argparse.ArgumentParser(prog="vq_kvcache inspect", description=__doc__)
    parser.add_argument("target", help="a model (folder or repository), a codec file or a prompt-cache file")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")
    parser.add_argument("--kv-memory", metavar="SIZE", help="of a model, what fits 2GB, 500MB, ...")
    parser.add_argument("--kv-max-kl", type=float, help="of a model, the fewest bits predicted to cost this KL")
    parser.add_argument("--kv-context", type=int, help="tokens to fit it for (default: the model's limit)")
    args = parser.parse_args(argv)
    try:
        asked = None
        if args.kv_context is not None and args.kv_memory is None and args.kv_max_kl is None:
            raise ValueError("--kv-context was given alone; expected --kv-memory or --kv-max-kl with it.")
        if args.kv_memory is not None or args.kv_max_kl is not None:
            asked = CacheOptions(memory=args.kv_memory, max_kl=args.kv_max_kl, context=args.kv_context)
        report = inspect(args.target, asked)
    except ValueError as error:
        print(f"vq_kvcache inspect: {error}", file=sys.stderr)
        return 1
    print(json.dumps(report, indent=1) if args.json else table(report))
    return 0
