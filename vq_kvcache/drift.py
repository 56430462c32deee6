"""Is the text like the calibration's? Statistics of the vectors that a cache packs, gathered while it packs them."""

import dataclasses
import warnings
from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from .spectral.sealing import BLOCK
from .spectral.spectral_quant import Quantizer, RawQuantizer

STRIDE = 4  # every fourth token is looked at; of blocks that come one at a time, every fourth block
# A tenth above what text of the calibration's kind, but none of its own, reads at most (benchmarks/drift_limit.py).
LIMIT = 1.3
LEAST_TOKENS = 1024


@dataclasses.dataclass(frozen=True)
class Drift:
    """How unlike the calibration text the packed tokens of one layer are; 1.0 is alike.

    tokens: how many were looked at.  energy: of their coordinates, each over its variance in calibration; the mean, the
    larger of keys' and values'.
    """

    tokens: int
    energy: float

    @property
    def is_large(self) -> bool:
        """Whether the codec serves this text badly."""
        return self.tokens >= LEAST_TOKENS // STRIDE and self.energy > LIMIT


@dataclasses.dataclass
class DriftSums:
    """Running sums of `SpectralQuantizer.drift` of keys and values, [2], over `tokens` vectors; None before any.
    blocks: that came one at a time."""

    sums: mx.array | None = None
    tokens: int = 0
    blocks: int = 0

    def watch(
        self, words: mx.array, keys: mx.array, values: mx.array, key_quantizer: Quantizer, value_quantizer: Quantizer
    ) -> mx.array:
        """Add the vectors that became `words`; returns the words, whose evaluation now brings the sums' with it."""
        if isinstance(key_quantizer, RawQuantizer) and isinstance(value_quantizer, RawQuantizer):
            return words
        stride = STRIDE
        if keys.shape[2] == BLOCK:  # while decoding, where thirty operations in every layer are felt
            self.blocks, stride = self.blocks + 1, 1
            if self.blocks % STRIDE != 1:
                return words
        seen = [
            mx.array(0.0) if isinstance(q, RawQuantizer) else q.drift(x[:, :, ::stride])
            for q, x in ((key_quantizer, keys), (value_quantizer, values))
        ]
        self.tokens += keys.shape[0] * -(-keys.shape[2] // stride)
        self.sums = mx.stack(seen) if self.sums is None else self.sums + mx.stack(seen)
        result: mx.array = mx.depends([words], [self.sums])[0]
        return result

    @classmethod
    def total(cls, parts: Sequence["DriftSums"]) -> "DriftSums":
        """The sums of all parts together."""
        held = [part.sums for part in parts if part.sums is not None]
        return cls(mx.stack(held).sum(axis=0) if held else None, sum(part.tokens for part in parts))

    def read(self) -> Drift | None:
        """The statistics so far; None before any."""
        if self.sums is None:
            return None
        return Drift(self.tokens, float(np.array(self.sums).max()) / self.tokens)


UNLIKE = "this text is unlike the codec's calibration text"
_warned: set[str] = set()


def warn_once(sums: DriftSums, plan_name: str) -> None:
    """One warning per codec setting and process. Reads sums that were evaluated with the words of an earlier seal."""
    if plan_name in _warned or sums.tokens * STRIDE < LEAST_TOKENS:
        return
    drift = sums.read()
    if drift is None or not drift.is_large:
        return
    _warned.add(plan_name)
    warnings.warn(
        f"{UNLIKE} ({drift.energy:.1f} times the energy in its coordinates); "
        "calibrate on text like it (calibrate_codec(texts=...)) or use more bits_per_value.",
        stacklevel=2,
    )
