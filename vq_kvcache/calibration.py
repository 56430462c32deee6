"""`vq_kvcache calibrate`: make the codec of a model now, for this machine or for others."""

import argparse
import pathlib
import sys

from .inspection import loaded, predicted, told
from .spectral.calibrate import calibrate_codec
from .spectral.codec import stored_path
from .spectral.files import require_writable


def main(argv: list[str]) -> int:
    """Run `vq_kvcache calibrate` and return its exit status."""
    parser = argparse.ArgumentParser(prog="vq_kvcache calibrate", description=__doc__)
    parser.add_argument("model", help="folder or repository")
    parser.add_argument("--text", nargs="+", type=pathlib.Path, help="text files to calibrate on (default: built in)")
    parser.add_argument("--samples", type=int, default=16, help="sequences (default: 16)")
    parser.add_argument("--length", type=int, default=1024, help="tokens of each (default: 1024)")
    parser.add_argument("--output", type=pathlib.Path, help="file to write (default: where the cache looks for it)")
    args = parser.parse_args(argv)
    try:
        if args.output is not None:
            require_writable(args.output)  # calibrating takes minutes
        texts = None if args.text is None else [path.read_text("utf-8") for path in args.text]
        model, tokenizer = loaded(args.model)
        codec = calibrate_codec(model, tokenizer, args.samples, args.length, texts=texts)
        path = args.output or stored_path(codec.fingerprint)
        codec.save(path)
    except (OSError, ValueError) as error:
        print(f"vq_kvcache calibrate: {error}", file=sys.stderr)
        return 1
    print(f"{path}: codec {codec.identity} of model {codec.fingerprint}, {len(codec.layers)} layers")
    if codec.in_nats:
        print(told(predicted(codec)))
    return 0
