"""Do tokens that are coded worst pay for being kept exact?

    python benchmarks/outliers.py vq_kvcache/data/tiny-llama

On calibration text alone: a codec from the first halves of every kind but facts; measured on the second halves, and on
facts as text unlike the calibration's. In each layer, keys and values apart, a token stays exact beyond a threshold of
its normalised energy (mean square of its coordinates, each over its variance), or of its own error in nats. Thresholds
are quantiles over calibration text. An exact token costs 16 bits a number in place of its codes, and every token one
bit that tells; the KL is compared with what the codec reaches at that many bits (log-linear between budgets).
"""

import argparse
import json
import pathlib
from collections.abc import Callable
from typing import Any

import bound
import measure
import mlx.core as mx
import numpy as np
from tqdm import tqdm

from vq_kvcache.hooks import own_caches
from vq_kvcache.measuring import PREFILL
from vq_kvcache.spectral.calibrate import calibrate_codec
from vq_kvcache.spectral.calibration_text import Placed, built_in_texts, cut, encode
from vq_kvcache.spectral.codec import Codec
from vq_kvcache.spectral.forward_only import run_observed

SHARES = (0.001, 0.003, 0.01)
STEPS_UP = (0.0, 0.125, 0.25, 0.5)  # bits: what the same memory would buy
Change = Callable[[mx.array], mx.array]


class Part:
    """Keys or values of one layer through their quantizer, and what judges a token."""

    def __init__(self, transforms: Any, widths: list[np.ndarray], criterion: str) -> None:
        self.quantizer, self.criterion = transforms.quantizer(widths), criterion
        self.mean, self.analysis = mx.array(transforms.mean)[:, None], mx.array(transforms.analysis)
        self.variances = mx.array(transforms.eigenvalues)[:, None]
        self.threshold, self.exact, self.tokens = float("inf"), 0, 0

    def decoded(self, x: mx.array) -> mx.array:
        """What the codes say."""
        return self.quantizer.decode_words(self.quantizer.encode_words(x)).astype(x.dtype)

    def scores(self, x: mx.array, decoded: mx.array) -> mx.array:
        """[B, T]: how badly each token fits, all heads together."""
        if self.criterion == "energy":
            return (((x - self.mean) @ self.analysis) ** 2 / self.variances).mean(axis=(1, 3))
        return (((x - decoded) @ self.analysis) ** 2).sum(axis=(1, 3))

    def change(self, x: mx.array) -> mx.array:
        """The vectors as a cache would give them back."""
        decoded = self.decoded(x)
        exact = self.scores(x, decoded) > self.threshold
        self.exact += int(exact.sum().item())
        self.tokens += exact.size
        return mx.where(exact[:, None, :, None], x, decoded)


def halves(tokenizer: Any, length: int, count: int) -> tuple[list[str], dict[str, list[mx.array]]]:
    """Texts to calibrate on; sequences to measure, of text alike and unlike."""
    texts = built_in_texts()
    facts = next(t for t in texts if "Country name" in t or "GDP" in t)
    others = [t for t in texts if t is not facts]
    alike = [s for t in others for s in cut(encode(tokenizer, t[len(t) // 2 :]), count // len(others), length)]
    return [t[: len(t) // 2] for t in others], {"alike": alike, "unlike": cut(encode(tokenizer, facts), count, length)}


def parts_of(codec: Codec, bits: float, criterion: str) -> dict[tuple[int, str], Part]:
    """(layer, "keys" or "values") -> Part."""
    widths = codec._widths(bits)
    return {
        (i, name): Part(transforms, widths[i, name], criterion)
        for i, pair in codec.layers.items()
        for name, transforms in zip(("keys", "values"), pair, strict=True)
    }


def set_thresholds(model: Any, parts: dict[tuple[int, str], Part], sequences: list[mx.array], share: float) -> None:
    """So that this share of the tokens of `sequences` would stay exact."""
    found: dict[tuple[int, str], list[np.ndarray]] = {name: [] for name in parts}

    def see(layer: int, queries: mx.array, keys: mx.array, values: mx.array) -> None:
        for name, x in (("keys", keys), ("values", values)):
            part = parts[layer, name]
            found[layer, name].append(np.array(part.scores(x, part.decoded(x))).ravel()[4:])

    run_observed(model, [Placed(s, 0) for s in sequences], see)
    for name, part in parts.items():
        part.threshold = float(np.quantile(np.concatenate(found[name]), 1 - share))


def caches_of(model: Any, parts: dict[tuple[int, str], Part]) -> list[Any]:
    """Caches of `model` whose far tokens went through `parts`."""
    return [
        measure.NoisyKVCache(parts[i, "keys"].change, parts[i, "values"].change) if (i, "keys") in parts else own
        for i, own in enumerate(own_caches(model))
    ]


def main() -> None:
    """Write results/outliers-MODEL.json."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--sequences", type=int, default=12, help="to calibrate on, and to measure of each kind")
    parser.add_argument("--bits", default="2,3")
    args = parser.parse_args()
    model, tokenizer, _ = measure.load_model(args.model)
    texts, kinds = halves(tokenizer, 1024, args.sequences)
    codec = calibrate_codec(model, tokenizer, args.sequences, 1024, texts=texts)
    seen = [s for t in texts for s in cut(encode(tokenizer, t), 2, 1024)]
    numbers = sum(t.mean.size for pair in codec.layers.values() for t in pair) / (2 * len(codec.layers))
    rows = []
    for bits in map(float, args.bits.split(",")):
        table = {f"{bits + up:g} bits": (bits + up, parts_of(codec, bits + up, "energy")) for up in STEPS_UP}
        for criterion in ("energy", "error"):
            for share in SHARES:
                parts = parts_of(codec, bits, criterion)
                set_thresholds(model, parts, seen, share)
                table[f"{criterion} {share:g}"] = (bits, parts)
        for kind, sequences in kinds.items():
            rows += measure_kind(model, table, kind, mx.stack(sequences), bits, numbers)
        told = {"model": pathlib.Path(args.model).name, "codec": codec.provenance, "rows": rows}
        measure.save(measure.RESULTS / f"outliers-{told['model']}.json", told)
    print(json.dumps(rows))


def measure_kind(
    model: Any, table: dict[str, tuple[float, Any]], kind: str, ids: mx.array, bits: float, numbers: float
) -> list[dict[str, Any]]:
    """KL of each way to spend bits on one kind of text, against more bits for every token."""
    for _, parts in table.values():
        for part in parts.values():
            part.exact = part.tokens = 0
    makers = {name: (lambda p=parts: caches_of(model, p)) for name, (_, parts) in table.items()}
    with tqdm(total=ids.shape[1], desc=f"{kind} at {bits:g} bits", unit="token") as progress:
        found, _ = measure.scores(model, makers, ids, PREFILL, measure.STEP, progress)
    kl = {name: float(score.kl.mean(dtype=np.float64)) for name, score in found.items()}
    curve = {spent: kl[name] for name, (spent, _) in table.items() if name.endswith("bits")}
    rows = []
    for name, (spent, parts) in table.items():
        share = sum(p.exact for p in parts.values()) / max(sum(p.tokens for p in parts.values()), 1)
        cost = spent + (share * (16 - spent) + 1 / numbers if not name.endswith("bits") else 0.0)
        rows.append({"kind": kind, "bits": bits, "way": name, "kl": kl[name], "exact_share": share, "true_bits": cost,
                     "bits_for_this_kl": bound.bits_at(kl[name], curve),
                     "positions": int(found[name].kl.size)})  # fmt: skip
    return rows


if __name__ == "__main__":
    main()
