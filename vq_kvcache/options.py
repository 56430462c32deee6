"""What a user may choose about a spectral cache."""

import dataclasses
import os
import re
from typing import Any

from .spectral.codec import Bits, Codec, as_pair

DEFAULT_BITS = 2.0
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B?", re.IGNORECASE)


def size_in_bytes(size: Any) -> int:
    """Bytes of a number of them, or of text such as "2GB" (2,000,000,000), "2GiB", "500 MB" or "1.5g"."""
    match = _SIZE.fullmatch(str(size).strip()) if isinstance(size, int | str) else None
    if match is None or (match[3] and not match[2]) or not (count := float(match[1])):
        raise ValueError(f"memory is {size!r}; expected bytes above 0, as a number or as 2GB, 2GiB or 500MB.")
    return int(count * (1024 if match[3] else 1000) ** " KMGT".index(match[2].upper() or " "))


@dataclasses.dataclass(frozen=True)
class CacheOptions:
    """How a spectral cache is to be made; ValueError names the option that is out of range.

    bits_per_value: stored bits per cached number, 0.25 to 8, padding included; a pair holds keys and values to budgets
    of their own.  max_kl: instead, the smallest budget whose predicted KL (Codec.predicted_kl) at the end of the
    context is at most this, in nats.  window: newest tokens kept exact.  sinks: first tokens kept exact.  codec: a
    Codec, a file, or None to find or make the model's own.  lossless: store raw bits instead (a test of everything but
    the quantizer).
    memory: instead of bits, bytes that the cache of one sequence and its codec may take, a number or "2GB", "2GiB",
    "500MB": the largest budget that fits is used, with max_kl the one it asks for (fitting.py).  context: tokens of
    the longest sequence (None: those that the model is made for).
    """

    bits_per_value: Bits = DEFAULT_BITS
    window: int = 128
    sinks: int = 4
    codec: Codec | str | os.PathLike[str] | None = None
    lossless: bool = False
    max_kl: float | None = None
    memory: int | str | None = None
    context: int | None = None

    @property
    def memory_bytes(self) -> int | None:
        """`memory` as a number; ValueError for a size that is none."""
        return None if self.memory is None else size_in_bytes(self.memory)

    def __post_init__(self) -> None:
        if self.memory_bytes is not None and self.lossless:
            raise ValueError("lossless=True takes what it takes; expected no memory with it; leave one of them out.")
        if not (self.context is None or (type(self.context) is int and self.context > 0)):
            raise ValueError(f"context is {self.context!r}; expected a whole number of tokens, 1 or more.")
        as_pair(self.bits_per_value)
        if self.bits_per_value != DEFAULT_BITS and not (self.memory is None and self.max_kl is None):
            raise ValueError(
                f"bits_per_value={self.bits_per_value!r} was given with memory or max_kl, which choose it; expected "
                "one of them; leave bits_per_value out."
            )
        if self.max_kl is not None and not (isinstance(self.max_kl, int | float) and self.max_kl > 0):
            raise ValueError(f"max_kl is {self.max_kl!r}; expected a number of nats above 0.")
        for name in ("window", "sinks"):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"{name} is {value!r}; expected a whole number of tokens, 0 or more.")
        if not isinstance(self.codec, Codec | str | os.PathLike | None):
            raise ValueError(f"codec is a {type(self.codec).__name__}; expected a Codec, a file name or None.")
