"""`vq_kvcache codecs`: the codecs this machine has, and their way to other machines."""

import argparse
import pathlib
import sys
from collections.abc import Iterator

from .spectral.codec import Codec, CodecError, shipped_path, stored_path


def codecs() -> Iterator[tuple[pathlib.Path, Codec | CodecError]]:
    """Every codec file of the cache folder and the package, with what is in it or why that cannot be read."""
    for folder in (stored_path("any").parent, shipped_path("any").parent):
        for path in sorted(folder.glob("*.safetensors")):
            try:
                yield path, Codec.load(path)
            except CodecError as error:
                yield path, error


def show() -> None:
    """Print a line per codec."""
    found = list(codecs())
    for path, codec in found:
        if isinstance(codec, CodecError):
            print(f"damaged: {codec}")
            continue
        how = codec.provenance.get("objective", "unknown")
        print(f"{codec.fingerprint}  {codec.identity}  {len(codec.layers)} layers  {how}  {path.stat().st_size:,} bytes"
              f"  {path}")  # fmt: skip
    if not found:
        print(f"no codecs in {stored_path('any').parent}.")


def find(model: str) -> tuple[pathlib.Path, Codec]:
    """The codec of the one model whose fingerprint begins so; CodecError when there is none, or several."""
    matching = {p: c for p, c in codecs() if isinstance(c, Codec) and c.fingerprint.startswith(model)}
    if len({c.fingerprint for c in matching.values()}) != 1:
        names = ", ".join(sorted({c.fingerprint for _, c in codecs() if isinstance(c, Codec)})) or "none"
        raise CodecError(f"{len(matching)} codecs are of a model that begins with {model!r}; expected one of {names}.")
    return next(iter(matching.items()))  # the cache folder's own comes before the package's


def export(model: str, file: pathlib.Path) -> None:
    """Write a codec to a file, to be imported elsewhere."""
    _, codec = find(model)
    codec.save(file)
    print(f"{file}: codec {codec.identity} of model {codec.fingerprint}")


def take(file: pathlib.Path, force: bool) -> None:
    """Put a codec file where its model finds it; CodecError where another one is, unless told."""
    codec = Codec.load(file)
    path = stored_path(codec.fingerprint)
    if path.exists() and not force:
        held = Codec.load(path).identity
        if held != codec.identity:
            raise CodecError(
                f"codec {held} of model {codec.fingerprint} is here already, and saved prompt caches may need it; "
                f"expected none or {codec.identity}; replace it with --force."
            )
    codec.save(path)
    print(f"{path}: codec {codec.identity} of model {codec.fingerprint}")


def remove(model: str) -> None:
    """Delete a codec from the cache folder; CodecError for the package's own."""
    path, codec = find(model)
    if path.parent != stored_path("any").parent:
        raise CodecError(f"{path} belongs to the package; expected a codec of {stored_path('any').parent}.")
    path.unlink()
    print(f"removed {path}: codec {codec.identity}; caches saved with it can no longer be read here.")


def main(argv: list[str]) -> int:
    """Run `vq_kvcache codecs` and return its exit status."""
    parser = argparse.ArgumentParser(prog="vq_kvcache codecs", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    actions.add_parser("list", help="a line per codec")
    for name, text in (("export", "write one to a file"), ("remove", "delete one")):
        action = actions.add_parser(name, help=text)
        action.add_argument("model", help="the model's fingerprint, or its beginning")
        if name == "export":
            action.add_argument("file", type=pathlib.Path)
    action = actions.add_parser("import", help="put a file where its model finds it")
    action.add_argument("file", type=pathlib.Path)
    action.add_argument("--force", action="store_true", help="replace another codec of the model")
    args = parser.parse_args(argv)
    try:
        if args.action == "list":
            show()
        elif args.action == "export":
            export(args.model, args.file)
        elif args.action == "import":
            take(args.file, args.force)
        else:
            remove(args.model)
    except (CodecError, OSError) as error:
        print(f"vq_kvcache codecs: {error}", file=sys.stderr)
        return 1
    return 0
