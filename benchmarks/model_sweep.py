"""Does the cache fit every kind of model? Small instances of mlx-lm's model classes, taken from mlx-lm's own tests.

    python benchmarks/model_sweep.py [--only NAME ...] [--tests FOLDER]

Random float32 weights. For each model: logits of prefill in pieces and of decoding with the lossless codec against
mlx-lm's own caches; then with a codec calibrated on that model, at 4 bits and at half a bit. The tests come from the
source distribution of the installed mlx-lm, fetched by pip into a temporary folder unless --tests says where they are.
"""

import argparse
import contextlib
import dataclasses
import importlib
import io
import json
import pathlib
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import unittest
import warnings
from collections.abc import Iterator
from typing import Any

import measure
import mlx.core as mx
import mlx_lm
import numpy as np
from mlx.utils import tree_flatten, tree_map

from vq_kvcache import SpectralKVCache, hooks, uninstall
from vq_kvcache.spectral.calibrate import calibrate_codec
from vq_kvcache.spectral.intercept import members_of, plain_caches, uses

LARGEST_BYTES = 200_000_000  # some of mlx-lm's test models are full size and never evaluated
SECONDS = 400  # for one model
PIECES = (150, 50, 3, 1, 1, 1, 1)  # tokens of each call: prefill, a later prompt, a draft's check, decoding
WINDOW, SINKS = 16, 4
BITS = (4.0, 0.5)
# Left out by name: their import ends the process, or their tests build no model of this kind.
UNIMPORTABLE = {"test_olmo"}


class _Words:
    """A tokenizer for calibration: characters are token ids."""

    def __init__(self, vocabulary: int) -> None:
        self._vocabulary = vocabulary

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        return [ord(c) % self._vocabulary for c in text]


class _TooSlowError(Exception):
    """A model took more than SECONDS."""


def class_of(model: Any) -> str:
    """The kind of a model, by what its caches are and how it uses them."""
    names = [type(m).__name__ for c in plain_caches(model) for m in members_of(c)]
    used = uses(model) if "KVCache" in names else {}
    kinds = {u.kind for u in used.values()}
    others = set(names) - {"KVCache"}
    return next(
        kind
        for kind, applies in {
            "no KV cache": not used,
            "latent": "latent" in kinds,
            "own attention": "own" in kinds,
            "hybrid": others & {"ArraysCache", "MambaCache"},
            "window mix": others,
            "indexer": len(used) != len(names),
            "shared": len(used) < len(model.layers),
            "plain": True,
        }.items()
        if applies
    )


def logits(model: Any, tokens: mx.array, caches: list[Any]) -> mx.array:
    """Logits [T, V] of the tokens, passed in PIECES; -inf, of words that a model rules out, as a low number."""
    found, start = [], 0
    for size in PIECES:
        found.append(model(tokens[None, start : start + size], cache=caches)[0].astype(mx.float32))
        found[-1] = mx.where(found[-1] == -mx.inf, -30.0, found[-1])
        mx.eval(found[-1], [c.state for c in caches])
        start += size
    return mx.concatenate(found)


def compare(full: mx.array, other: mx.array) -> dict[str, float]:
    """Largest difference against the spread of the logits, mean KL in nats and top-1 agreement."""
    p, q = (x - mx.logsumexp(x, axis=-1, keepdims=True) for x in (full, other))
    spread = mx.sqrt(((full - full.mean(axis=-1, keepdims=True)) ** 2).mean())
    return {
        "difference": float((mx.abs(full - other).max() / mx.maximum(spread, 1e-30)).item()),
        "kl": float((mx.exp(p) * (p - q)).sum(axis=-1).mean().item()),
        "agreement": float((full.argmax(axis=-1) == other.argmax(axis=-1)).mean().item()),
        "finite": bool(mx.isfinite(other).all().item()),
    }


def with_weights(model: Any) -> Any:
    """The model in float32, with random numbers where mlx-lm's tests leave whole matrices zero."""

    def weights(array: mx.array) -> mx.array:
        if not mx.issubdtype(array.dtype, mx.floating):
            return array
        array = array.astype(mx.float32)
        if array.ndim > 1 and not array.any().item():
            array = mx.random.normal(array.shape) / array.shape[-1] ** 0.5
        return array

    model.update(tree_map(weights, model.parameters()))
    return model


# Sizes that mlx-lm's tests leave at the real model's, and what they are in the small one. What a class needs besides is
# in SMALLER.
SMALL = {
    **dict.fromkeys(("vocab_size", "num_vocab", "vocab_size_per_layer_input"), 512),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "n_layers", "n_layer"), 4),
    **dict.fromkeys(("intermediate_size", "ffn_hidden_size", "n_inner", "shared_expert_intermediate_size"), 256),
    **dict.fromkeys(("moe_intermediate_size", "intermediate_size_mlp"), 128),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 8),
}
SMALLER: dict[str, dict[str, Any]] = {
    "cohere": {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2},
    "cohere2": {"hidden_size": 256, "head_dim": 64, "num_attention_heads": 4, "num_key_value_heads": 2,
                "sliding_window": 64},
    "dbrx": {"d_model": 256, "ffn_config": {"ffn_hidden_size": 256, "moe_num_experts": 4, "moe_top_k": 2}},
    "gemma3_text": {"num_hidden_layers": 6},
    "gpt_neox": {"hidden_size": 256, "num_attention_heads": 4},
    "gptj": {"n_embd": 256, "n_head": 4, "rotary_dim": 32},
    "jamba": {"hidden_size": 64, "mamba_dt_rank": 8, "mamba_d_state": 16, "mamba_expand": 2},
    "openelm": {"num_transformer_layers": 2, "num_kv_heads": [3, 4], "num_query_heads": [12, 16],
                "ffn_multipliers": [0.5, 0.73]},
    "phi": {"hidden_size": 320, "num_attention_heads": 4, "num_key_value_heads": 4},
    "phi3": {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 2},
    "plamo2": {"hidden_size": 256, "num_attention_heads": 4, "intermediate_size": 256},
    "qwen": {"hidden_size": 256, "num_attention_heads": 4, "kv_channels": 64, "intermediate_size": 512},
}  # fmt: skip


def smaller(model: Any) -> tuple[Any, int]:
    """A small model of the same class, and its vocabulary."""
    args = model.args if hasattr(model, "args") else model.config
    module = type(model).__module__
    changes = {n: min(v, getattr(args, n)) for n, v in SMALL.items() if isinstance(getattr(args, n, None), int)}
    depth = changes.get("num_hidden_layers")
    if depth is not None and isinstance(getattr(args, "layer_types", None), list):
        changes["num_hidden_layers"] = len(args.layer_types)
    args = dataclasses.replace(args, **{**changes, **SMALLER.get(module.rsplit(".", 1)[-1], {})})
    vocabulary = next(getattr(args, n) for n in ("vocab_size", "num_vocab") if hasattr(args, n))
    return type(model)(args), vocabulary


def nbytes(model: Any) -> int:
    """Of the parameters in float32, whether evaluated or not."""
    return sum(4 * p.size for _, p in tree_flatten(model.parameters()))


def measure_model(model: Any, vocabulary: int) -> dict[str, Any]:
    """One row of the report."""
    model = with_weights(model)
    tokens = mx.array(np.random.default_rng(0).integers(0, vocabulary, sum(PIECES)))
    row: dict[str, Any] = {"class": class_of(model)}
    full = logits(model, tokens, plain_caches(model))
    if row["class"] == "no KV cache":
        return row
    lossless = SpectralKVCache.with_options(lossless=True, window=WINDOW, sinks=SINKS)
    caches = hooks.make_prompt_cache(model, cache=lossless)
    row["lossless"] = compare(full, logits(model, tokens, caches))
    spectral = hooks.spectral_caches(caches)
    row["caches"] = sum(len(members_of(c)) for c in caches)
    row["packed"] = sum(c.stats()["packed_tokens"] > 0 for c in spectral)
    if not spectral:
        return row
    texts = ["".join(chr(c) for c in np.random.default_rng(s).integers(32, 32 + vocabulary, 160)) for s in (1, 2)]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        codec = calibrate_codec(model, _Words(vocabulary), 2, 160, texts=texts, window=WINDOW, sinks=SINKS)
    row["objective"] = codec.provenance["objective"]
    row["warnings"] = [str(w.message)[:200] for w in caught if "calibrating by variance" in str(w.message)]
    for bits in BITS:
        options = SpectralKVCache.with_options(bits, window=WINDOW, sinks=SINKS, codec=codec)
        row[f"{bits:g} bits"] = compare(full, logits(model, tokens, hooks.make_prompt_cache(model, cache=options)))
    return row


@contextlib.contextmanager
def time_limit() -> Iterator[None]:
    """_TooSlowError after SECONDS."""

    def stop(*_: Any) -> None:
        raise _TooSlowError

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)


class Sweep:
    """Rows by model type, filled while mlx-lm's tests build their models."""

    def __init__(self, only: list[str], result: pathlib.Path) -> None:
        # With --only, the rows of other models stay as they are.
        kept = json.loads(result.read_text())["models"] if only and result.exists() else {}
        self.rows: dict[str, dict[str, Any]] = {n: r for n, r in kept.items() if n.split(" ")[0] not in only}
        self._only, self._result = only, result

    def run(self, model: Any, vocabulary: int) -> None:
        """Measure one model, whatever happens."""
        module = type(model).__module__.rsplit(".", 1)[-1]
        name, count = module, 2
        while name in self.rows:
            name, count = f"{module} ({count})", count + 1
        if self._only and module not in self._only:
            return
        start = time.perf_counter()
        try:
            if shrunk := nbytes(model) > LARGEST_BYTES:
                model, vocabulary = smaller(model)
            if nbytes(model) > LARGEST_BYTES:
                raise ValueError(f"{nbytes(model) / 1e6:.0f} MB of parameters; expected at most 200")
            with time_limit():
                row = measure_model(model, vocabulary)
            row |= {"made smaller": True} if shrunk else {}
        except _TooSlowError:
            row = {"error": f"more than {SECONDS} s"}
        except Exception as error:
            row = {"error": f"{type(error).__name__}: {str(error)[:300]}"}
        row["seconds"] = round(time.perf_counter() - start, 1)
        self.rows[name] = row
        uninstall()
        mx.clear_cache()
        print(f"{name:28s} {json.dumps(row)}", file=sys.stderr, flush=True)
        self.write()

    def write(self) -> None:
        """The report so far."""
        rows = dict(sorted(self.rows.items()))
        mine = {"mlx_lm": mlx_lm.__version__, "pieces": PIECES, "window": WINDOW, "sinks": SINKS}
        measure.save(self._result, {**mine, "classes": summary(self.rows), "models": rows})


def summary(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """By class: how many models, the largest lossless difference, and the KL at each budget."""
    classes: dict[str, dict[str, Any]] = {}
    for kind in sorted({r["class"] for r in rows.values() if "class" in r}):
        mine = [r for r in rows.values() if r.get("class") == kind]
        classes[kind] = {"models": len(mine)}
        if with_codec := [r for r in mine if "4 bits" in r]:
            classes[kind] |= {
                "largest lossless difference": max(r["lossless"]["difference"] for r in with_codec),
                "largest KL at 4 bits": max(r["4 bits"]["kl"] for r in with_codec),
                "median KL at 4 bits": float(np.median([r["4 bits"]["kl"] for r in with_codec])),
                "median KL at 0.5 bits": float(np.median([r["0.5 bits"]["kl"] for r in with_codec])),
                "least agreement at 4 bits": min(r["4 bits"]["agreement"] for r in with_codec),
            }
    return classes


def fetched_tests(folder: pathlib.Path) -> pathlib.Path:
    """mlx-lm's tests of the installed version, from its source distribution."""
    version = mlx_lm.__version__
    command = ["pip", "download", "-q", "--no-deps", "--no-binary", "mlx-lm", "-d", str(folder), f"mlx-lm=={version}"]
    subprocess.run([sys.executable, "-m", *command], check=True)
    with tarfile.open(folder / f"mlx_lm-{version}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / f"mlx_lm-{version}" / "tests"


def sweep(tests: pathlib.Path, result: Sweep) -> None:
    """Run mlx-lm's model tests with their checks replaced by ours."""
    sys.path.insert(0, str(tests))
    module = importlib.import_module("test_models")

    class Models(module.TestModels):
        def model_test_runner(self, model: Any, model_type: str, vocab_size: int, num_layers: int) -> None:
            result.run(model, vocab_size)

    for name in unittest.TestLoader().getTestCaseNames(Models):
        if name not in UNIMPORTABLE and "model_test_runner(" in source_of(getattr(module.TestModels, name)):
            unittest.TextTestRunner(stream=io.StringIO()).run(Models(name))


def source_of(function: Any) -> str:
    """Its text."""
    return importlib.import_module("inspect").getsource(function)


def main() -> None:
    """Sweep and write results/models.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=[], help="model modules to measure again (default: all)")
    parser.add_argument("--tests", type=pathlib.Path, help="folder with mlx-lm's test_models.py")
    parser.add_argument("--result", default="models", help="name of the file in results/")
    args = parser.parse_args()
    mx.random.seed(0)
    with tempfile.TemporaryDirectory() as folder:
        result = Sweep(args.only, measure.RESULTS / f"{args.result}.json")
        sweep(args.tests or fetched_tests(pathlib.Path(folder)), result)
    print(json.dumps(summary(result.rows)))


if __name__ == "__main__":
    main()
