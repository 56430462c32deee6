"""The command `vq_kvcache`: its own subcommands, and every mlx_lm command with the spectral cache on."""

import argparse
import importlib
import logging
import sys
import warnings
from collections.abc import Sequence
from typing import Any

OWN = {
    "demo": "generate with the shipped model from both caches and compare them",
    "inspect": "what is packed of a model, a codec or a prompt cache, and what it costs",
    "calibrate": "make the codec of a model now",
    "compare": "a report on your model and text: full precision, mlx-lm's own quantized cache, and ours",
    "codecs": "list, export, import or remove the codecs of this machine",
    "doctor": "compare the kernels of this machine with attention in float64",
    "patch": "give the installed mlx_lm commands the option --kv-cache spectral, or take it back",
}
MODULES = {"inspect": "inspection", "calibrate": "calibration", "codecs": "library", "patch": "patching"}
MLX_LM = ("generate", "chat", "server", "cache_prompt", "evaluate", "benchmark")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    warnings.showwarning = _show_warning
    _show_notes()
    if arguments and arguments[0] == "--version":
        from . import __version__

        print(__version__)
        return 0
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_usage())
        return 0 if arguments else 2
    command, *rest = arguments
    if command in OWN:
        module = importlib.import_module(f".{MODULES.get(command, command)}", __package__)
        try:
            return int(module.main(rest))
        except KeyboardInterrupt:
            print(f"\nvq_kvcache {command}: interrupted", file=sys.stderr)
            return 130  # as shells number it
    if command in MLX_LM:
        return _run_mlx_lm(command, rest)
    print(f"vq_kvcache: unknown command {command!r}; expected one of {', '.join([*OWN, *MLX_LM])}.", file=sys.stderr)
    return 2


def _usage() -> str:
    lines = ["usage: vq_kvcache COMMAND ...", "", "commands:"]
    lines += [f"  {name:13s} {text}" for name, text in OWN.items()]
    lines += [f"  {name:13s} mlx_lm's own command with the spectral cache on" for name in MLX_LM]
    return "\n".join([*lines, "", "`vq_kvcache COMMAND --help` shows the options of each."])


def cache_parser(command: str) -> argparse.ArgumentParser:
    """The options that are added to an mlx_lm command."""
    parser = argparse.ArgumentParser(
        prog=f"vq_kvcache {command}", add_help=False, allow_abbrev=False,
        usage=f"vq_kvcache {command} [cache options] [options of mlx_lm {command}]",
    )  # fmt: skip
    group = parser.add_argument_group("cache options")
    group.add_argument("--kv-cache", choices=("spectral", "full"), default="spectral", help="default: spectral")
    group.add_argument("--kv-avg-bits", type=float, help="stored bits per cached number (default: 2.0)")
    group.add_argument("--kv-key-bits", type=float, help="instead, of keys; with --kv-value-bits")
    group.add_argument("--kv-value-bits", type=float, help="instead, of values; with --kv-key-bits")
    group.add_argument("--kv-max-kl", type=float, help="instead, the fewest bits predicted to cost this KL, in nats")
    group.add_argument("--kv-memory", metavar="SIZE", help="instead, what fits 2GB, 500MB, ...; with --kv-max-kl, too")
    group.add_argument("--kv-context", type=int, help="tokens to fit it for (default: the model's limit, or what fits)")
    group.add_argument("--kv-window", type=int, default=128, help="newest tokens kept exact (default: 128)")
    group.add_argument("--kv-sinks", type=int, default=4, help="first tokens kept exact (default: 4)")
    group.add_argument("--kv-codec", default=None, help="codec file (default: found by model, or made once)")
    return parser


def cache_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Any:
    """The CacheOptions that the command line asks for; ends the process, as argparse does, where it contradicts itself
    or one is out of range."""
    from .options import CacheOptions

    bits, kl, memory = options.kv_avg_bits, options.kv_max_kl, options.kv_memory
    pair = options.kv_key_bits, options.kv_value_bits
    if (pair[0] is None) != (pair[1] is None):
        parser.error("one of --kv-key-bits and --kv-value-bits was given; expected both, or --kv-avg-bits.")
    if sum(given is not None for given in (bits, pair[0], kl)) > 1:
        parser.error("several budgets were given; expected one of --kv-avg-bits, --kv-key-bits and --kv-max-kl.")
    if memory is not None and (bits is not None or pair[0] is not None):
        parser.error("--kv-memory chooses the budget; expected no other one but --kv-max-kl with it.")
    budget = pair if pair[0] is not None else 2.0 if bits is None else bits
    return CacheOptions(
        budget, options.kv_window, options.kv_sinks, options.kv_codec,
        max_kl=kl, memory=memory, context=options.kv_context,
    )  # fmt: skip


def _run_mlx_lm(command: str, arguments: list[str]) -> int:
    parser = cache_parser(command)
    options, rest = parser.parse_known_args(arguments)
    if {"-h", "--help"} & set(rest):
        parser.print_help()
        print(f"\noptions of mlx_lm {command}:\n", flush=True)
    if options.kv_cache == "spectral" and any(a.split("=")[0] == "--kv-bits" for a in rest):
        parser.error("--kv-bits asks for mlx-lm's own quantized cache; use --kv-avg-bits, or add --kv-cache full.")

    from mlx_lm import cli as mlx_lm_cli

    from .hooks import install
    from .spectral.codec import CodecError

    sys.argv = [f"vq_kvcache {command}", command, *rest]
    try:
        if options.kv_cache == "full":
            mlx_lm_cli.main()
            return 0
        with install(cache_options(parser, options)):
            mlx_lm_cli.main()
    except CodecError as error:
        print(f"vq_kvcache: {error}", file=sys.stderr)
        return 1
    except ValueError as error:
        if "expected" not in str(error):  # not one of ours
            raise
        print(f"vq_kvcache: {error}", file=sys.stderr)
        return 1
    return 0


class _Notes(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        print(record.getMessage(), file=sys.stderr, flush=True)


def _show_notes() -> None:
    """What the package tells by its logger goes to the terminal, as it is."""
    logger = logging.getLogger(__package__)
    logger.handlers, logger.propagate = [_Notes()], False
    logger.setLevel(logging.INFO)


def _show_warning(message: Warning | str, category: type[Warning], *_: object, **__: object) -> None:
    print(f"warning: {message}", file=sys.stderr)
