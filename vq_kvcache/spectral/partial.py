"""Statistics of a calibration that is still running, on disk, so that an interrupted one goes on where it was."""

import contextlib
import json
import pathlib
import shutil
import time
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from .calibration_text import Placed
from .files import cache_folder, read_file, sha256, write_atomically
from .fisher import LayerFisher, Setting, Statistics
from .moments import Moments, SecondMoments

VERSION = 2
SECONDS_BETWEEN_SAVES = 10.0
PARTS = ("keys", "values")


class Partial:
    """The folder of one unfinished calibration, named by model, text and setting: other ones never meet.

    `sums` holds moments (float64) and how many sequences they cover; `kept-N` the vectors and gradients of sequence N,
    written before the sums that count it. Each is a SHA-256 and a safetensors file that has it: a codec made of damaged
    sums would look like any other.
    """

    def __init__(self, fingerprint: str, sequences: Sequence[Placed], setting: Setting) -> None:
        described = [VERSION, fingerprint, setting._replace(at_once=1), [(s.offset, s.ids.tolist()) for s in sequences]]
        name = f"{fingerprint}-{sha256(json.dumps(described).encode())[:16]}"
        self.folder = cache_folder() / "partial" / name
        self._kept = 0
        self._saved_at = time.monotonic()

    def load(self) -> tuple[Statistics, int]:
        """Statistics so far, and how many sequences they are of; nothing and 0 when there are none, or damaged ones."""
        try:
            arrays = _read(self.folder / "sums")
            done, self._kept = (int(n) for n in arrays.pop("done"))
            statistics = _statistics(arrays)
            for n in range(self._kept):
                held = _read(self.folder / f"kept-{n}")
                for layer, pair in statistics.items():
                    for part, seen in zip(PARTS, pair, strict=True):
                        found = tuple(mx.array(held[f"{layer}.{part}.{name}"]) for name in ("vectors", "gradients"))
                        seen.kept.append((found[0], found[1]))
        except (OSError, SafetensorError, KeyError, ValueError):
            self._kept = 0
            return {}, 0
        return statistics, done

    def save(self, statistics: Statistics, done: int) -> None:
        """Store statistics of `done` sequences, unless the last time was seconds ago. A folder that cannot be written
        costs a warning and the chance to resume."""
        if time.monotonic() - self._saved_at < SECONDS_BETWEEN_SAVES:
            return
        try:
            held = len(next(iter(statistics.values()))[0].kept)
            for n in range(self._kept, held):
                kept = {
                    f"{layer}.{part}.{name}": np.array(array)
                    for layer, pair in statistics.items()
                    for part, seen in zip(PARTS, pair, strict=True)
                    for name, array in zip(("vectors", "gradients"), seen.kept[n], strict=True)
                }
                _write(self.folder / f"kept-{n}", kept)
            sums = _sums(statistics) | {"done": np.array([done, held])}
            _write(self.folder / "sums", sums)
            self._kept = held
        except OSError as error:
            warnings.warn(
                f"{self.folder} cannot be written ({error.strerror}); an interruption loses all.", stacklevel=2
            )
        self._saved_at = time.monotonic()

    def remove(self) -> None:
        """Forget it: the calibration is finished."""
        shutil.rmtree(self.folder, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.folder.parent.rmdir()  # when no other is left


def _write(path: pathlib.Path, arrays: dict[str, NDArray[Any]]) -> None:
    content = save_safetensors(arrays)
    write_atomically(path, sha256(content).encode() + content)


def _read(path: pathlib.Path) -> dict[str, NDArray[Any]]:
    """ValueError unless it is what was written."""
    content = read_file(path)
    if sha256(content[64:]).encode() != content[:64]:
        raise ValueError("damaged")
    return load_safetensors(content[64:])


def _named(layer: int, seen: tuple[LayerFisher, LayerFisher]) -> Iterator[tuple[str, Moments, SecondMoments]]:
    for part, statistics in zip(PARTS, seen, strict=True):
        for half, (vectors, gradients) in enumerate(statistics.halves):
            yield f"{layer}.{part}.{half}", vectors, gradients


def _sums(statistics: Statistics) -> dict[str, NDArray[Any]]:
    sums: dict[str, NDArray[Any]] = {}
    for layer, pair in statistics.items():
        for name, vectors, gradients in _named(layer, pair):
            counts = np.array([vectors.count, gradients.count])
            arrays = {"counts": counts, "mean": vectors.mean, "scatter": vectors.scatter, "total": gradients.total}
            sums |= {f"{name}.{key}": np.ascontiguousarray(a) for key, a in arrays.items()}
    return sums


def _statistics(sums: dict[str, NDArray[Any]]) -> Statistics:
    statistics: Statistics = {}
    for layer in sorted({int(name.split(".")[0]) for name in sums}):
        statistics[layer] = LayerFisher(), LayerFisher()
        for name, vectors, gradients in _named(layer, statistics[layer]):
            vectors.count, gradients.count = (int(n) for n in sums[f"{name}.counts"])
            vectors.mean, vectors.scatter = sums[f"{name}.mean"], sums[f"{name}.scatter"]
            gradients.total = sums[f"{name}.total"]
    return statistics
