"""Is a fact that stood once, far back, still found?

    python benchmarks/recall.py vq_kvcache/data/tiny-llama

A sentence with an invented name and a number is planted in evaluation prose; 500 to 3,500 tokens later it begins again,
and the model is to finish it (teacher-forced, greedy choice at each token of the answer). Counted only where full
precision itself finds the token, and where without the planted sentence it would not: share still right, by method.
"""

import argparse
import itertools
import json
import pathlib
from collections.abc import Callable
from typing import Any

import measure
import mlx.core as mx
import numpy as np
from quality import Makers, methods
from tqdm import tqdm

from vq_kvcache.hooks import own_caches
from vq_kvcache.measuring import PREFILL
from vq_kvcache.spectral.calibration_text import encode

DISTANCES = (500, 1000, 2000, 3500)  # tokens from the planted answer to where it is asked for
LEAD = 64  # tokens of prose before the planted sentence: it is no sink
SYLLABLES = ("bar", "dul", "fen", "gor", "hal", "kim", "lor", "mun", "nev", "pol", "quin", "rath", "sel", "tov", "wex")
SENTENCE = "\n\nThe hidden treasure of Captain {name} lies in the castle of {place}, under {number} stones.\n\n"
METHODS = "full precision,spectral,random rotation,mlx affine,mlx as shipped"


def facts(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """(whole sentence, the part that the model is given again) of invented facts."""
    generator = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        name, place = ("".join(generator.choice(SYLLABLES, 3)).capitalize() for _ in range(2))
        sentence = SENTENCE.format(name=name, place=place, number=generator.integers(100, 1000))
        made.append((sentence, sentence[: sentence.index(place)]))
    return made


def rows_of(tokenizer: Any, distance: int, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Token ids [count, T] with the fact, the same with prose in its place, and which tokens are answers [count, T].

    Rows end alike: prose is cut so that each is as long as the longest.
    """
    prose = encode(tokenizer, (measure.HERE / "text" / "prose.txt").read_text("utf-8"))
    parts = [(encode(tokenizer, s), encode(tokenizer, q)) for s, q in facts(count)]
    longest = max(len(s) for s, _ in parts)
    total = LEAD + distance + 2 * longest
    planted, without, answers = (np.zeros((count, total), dtype=np.int64) for _ in range(3))
    for i, (sentence, question) in enumerate(parts):
        start = (i * 1009) % (len(prose) - 2 * total)
        given = next((n for n in range(len(question), 0, -1) if sentence[:n] == question[:n]), 0)
        filler = prose[start : start + total - 2 * len(sentence)]
        planted[i] = [*filler[:LEAD], *sentence, *filler[LEAD:], *sentence]
        without[i] = [*filler[:LEAD], *prose[start + total : start + total + len(sentence)], *filler[LEAD:], *sentence]
        answers[i, total - len(sentence) + given : total - 2] = 1
    return planted, without, answers


def choices(
    model: Any, makers: dict[str, Callable[[], list[Any]]], ids: np.ndarray, tail: int
) -> dict[str, np.ndarray]:
    """name -> the token chosen for each of the last `tail` places, [B, tail]; 16 tokens at a time near the end."""
    end = ids.shape[1]
    first = (end - tail - 1) // PREFILL * PREFILL
    edges = [*range(0, first + 1, PREFILL), *range(first + measure.STEP, end, measure.STEP), end]
    chosen: dict[str, np.ndarray] = {}
    for name, make in makers.items():
        caches, found = make(), []
        for start, stop in itertools.pairwise(edges):
            logits = model(mx.array(ids[:, start:stop]), cache=caches)
            best = logits.argmax(axis=-1)
            mx.eval(best, [c.state for c in caches])
            if start >= first:
                found.append(np.array(best))
        chosen[name] = np.concatenate(found, axis=1)[:, -tail - 1 : -1]
    return chosen


def measure_distance(
    model: Any, tokenizer: Any, table: Makers, distance: int, count: int, batch: int
) -> dict[str, Any]:
    """Shares still right at one distance, over the answer tokens that only the planted fact gives away."""
    planted, without, answers = rows_of(tokenizer, distance, count)
    tail = int(answers.shape[1] - np.flatnonzero(answers.any(axis=0))[0])
    right: dict[str, list[np.ndarray]] = {name: [] for name in table}
    asked = []
    for start in range(0, count, batch):
        rows = slice(start, start + batch)
        truth, wanted = planted[rows, -tail:], answers[rows, -tail:].astype(bool)
        found = choices(model, {n: make for n, (make, _) in table.items()}, planted[rows], tail)
        guessed = choices(model, {"": lambda: own_caches(model)}, without[rows], tail)[""]
        asked.append(wanted & (found["full precision"] == truth) & (guessed != truth))
        for name, chosen in found.items():
            right[name].append(chosen == truth)
    which = np.concatenate(asked)
    return {
        "asked": int(np.concatenate([answers[:, -tail:]]).sum()),
        "found_at_full_precision": int(which.sum()),
        "still_right": {name: float(np.concatenate(r)[which].mean()) if which.any() else None
                        for name, r in right.items()},
    }  # fmt: skip


def main() -> None:
    """Measure each distance that is not in the result file yet."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--facts", type=int, default=64, help="sentences at each distance")
    parser.add_argument("--distances", default=",".join(map(str, DISTANCES)))
    parser.add_argument("--bits", default="1,1.5,2,2.5,3,4")
    parser.add_argument("--only", default=METHODS)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--codec", help="codec file; default: the stored or shipped one of the model")
    parser.add_argument("--out", type=pathlib.Path, help="default: results/recall-MODEL.json")
    args = parser.parse_args()
    model, tokenizer, head_dim, codec, identity = measure.load_with_codec(args.model, args.codec)
    file = args.out or measure.RESULTS / f"recall-{pathlib.Path(args.model).name}.json"
    old = json.loads(file.read_text()) if file.exists() else {}
    distances = old.get("distances", {}) if old.get("codec_identity") == identity else {}
    bits = [float(b) for b in args.bits.split(",")]
    table = methods(model, tokenizer, head_dim, codec, bits, {"full precision", *args.only.split(",")})
    for distance in tqdm([d for d in args.distances.split(",") if d not in distances], desc="distances"):
        distances[distance] = measure_distance(model, tokenizer, table, int(distance), args.facts, args.batch)
        measure.save(file, {"model": pathlib.Path(args.model).name, "codec": codec.provenance, "facts": args.facts,
                            "codec_identity": identity, "distances": distances})  # fmt: skip
    print(
        json.dumps({"written": file.name, "distances": {d: r["found_at_full_precision"] for d, r in distances.items()}})
    )


if __name__ == "__main__":
    main()
