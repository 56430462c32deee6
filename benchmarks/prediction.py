"""Is the KL that a codec predicts the one measured, on text of its calibration's kind that calibration did not see?

    python benchmarks/prediction.py vq_kvcache/data/tiny-llama

Texts are what the codec's calibration left of the built-in ones; 16 tokens at a time go through the real cache, in
lockstep with full precision. A shorter context is the beginning of a longer one; the first 256 positions are not
scored. "spread" says why sealing.far_mass weighs errors by 1/d^2: it is the standard deviation of log(predicted /
measured) over all rows, with other exponents in place of 2.
"""

import argparse
import itertools
import json
import pathlib
from typing import Any

import measure
import mlx.core as mx
import numpy as np
from tqdm import tqdm

from vq_kvcache import Codec, SpectralKVCache, make_prompt_cache
from vq_kvcache.measuring import PREFILL, edges_of
from vq_kvcache.spectral.sealing import calibration_mass, packed_of, scored_mass

CONTEXTS = (512, 1024, 2048)
BITS = (1.0, 2.0, 3.0, 4.0)
WINDOWS = (64, 128, 256)
SINKS = 4
EXPONENTS = (1.0, 1.5, 2.0, 2.5, 3.0)
EACH = 2  # texts of each kind


def measured(model: Any, codec: Codec, texts: list[list[int]]) -> dict[tuple[int, float], np.ndarray]:
    """(window, bits) -> KL of every text and scored position, [texts, positions]."""
    makers = {}
    for window in WINDOWS:
        for bits in BITS:
            options = SpectralKVCache.with_options(bits_per_value=bits, codec=codec, window=window, sinks=SINKS)
            makers[f"{window} {bits}"] = lambda o=options: make_prompt_cache(model, cache=o)
    with tqdm(total=len(texts[0]), desc="reading", unit="token") as progress:
        found, _ = measure.scores(model, makers, mx.array(texts), PREFILL, measure.STEP, progress)
    return {(w, b): found[f"{w} {b}"].kl for w in WINDOWS for b in BITS}


def rows_of(codec: Codec, kl: dict[tuple[int, float], np.ndarray]) -> list[dict[str, Any]]:
    """A row for each window, budget and context: what was predicted and measured, and how sure the latter is."""
    rows = []
    for (window, bits), found in kl.items():
        for context in CONTEXTS:
            by_text = found[:, : context - PREFILL].mean(axis=1, dtype=np.float64)
            mass = scored_mass(edges_of(context, measure.STEP), window, SINKS)
            rows.append({
                "window": window, "bits": bits, "context": context, "predicted": codec.kl_of_mass(bits, mass),
                "measured": float(by_text.mean()), "standard_error": float(by_text.std(ddof=1) / len(by_text) ** 0.5),
            })  # fmt: skip
    return rows


def spread(codec: Codec, rows: list[dict[str, Any]], exponent: float) -> float:
    """Standard deviation of log(predicted / measured) when an error d tokens back weighs 1/d^exponent."""
    told = codec.provenance
    sums = np.concatenate([[0.0], np.cumsum(np.arange(1.0, max(*CONTEXTS, told["sequence_length"]) + 1) ** -exponent)])
    positions = np.arange(told["sequence_length"])
    far = np.maximum(positions - told["sinks"], told["window"] - 1)
    calibrated = (sums[far] - sums[told["window"] - 1]).mean()
    own = calibration_mass(told["sequence_length"], told["window"], told["sinks"])
    logs = []
    for row in rows:
        edges = edges_of(row["context"], measure.STEP)
        masses = []
        for start, end in itertools.pairwise(edges[1:]):
            farthest = np.arange(start, end) - SINKS
            masses += (sums[farthest] - sums[farthest - packed_of(end, row["window"], SINKS)]).tolist()
        cost = codec.kl_of_mass(row["bits"], own)  # of a mean token of the calibration
        logs.append(np.log(cost * np.mean(masses) / calibrated / row["measured"]))
    return float(np.std(logs))


def main() -> None:
    """Write results/prediction-MODEL.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--codec", help="codec file; default: the stored or shipped one of the model")
    parser.add_argument("--out", type=pathlib.Path, help="default: results/prediction-MODEL.json")
    args = parser.parse_args()
    model, tokenizer, _, codec, identity = measure.load_with_codec(args.model, args.codec)
    texts = measure.held_out(tokenizer, codec, max(CONTEXTS), EACH)
    rows = rows_of(codec, measured(model, codec, texts))
    name = pathlib.Path(args.model).name
    spreads = {f"{e:g}": spread(codec, rows, e) for e in EXPONENTS}
    result = {"model": name, "codec_identity": identity, "texts": len(texts), "spread": spreads, "rows": rows}
    measure.save(args.out or measure.RESULTS / f"prediction-{name}.json", result)
    print(json.dumps({"spread": spreads, "rows": len(rows)}))


if __name__ == "__main__":
    main()
