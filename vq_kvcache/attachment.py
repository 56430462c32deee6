"""What a model is given by `attach`: how its caches are to be made, and the codec they are packed by."""

import os
import threading
from collections.abc import Callable
from typing import Any

from .cache import LOSSLESS, register_plan
from .fitting import settled
from .options import CacheOptions
from .shards import Share
from .spectral.calibrate import codec_for
from .spectral.codec import (
    Codec,
    CodecError,
    Plan,
    codec_of_file,
    find_codec,
    fingerprint,
    fingerprint_of_files,
    stored_path,
)
from .spectral.intercept import attended_only

_calibrating = threading.RLock()  # one thread makes the codec, the others wait for it
codecs_in_use: dict[str, Codec] = {}  # of the models used in this process, by fingerprint


class Attachment:
    """How to find the plan of a model, and the options its caches are made with.

    source: loads the whole model again with weights not read yet, for the name of one that was split since.
    """

    def __init__(
        self, tokenizer: Any, options: CacheOptions, plan: Plan | None, source: Callable[[], Any] | None = None
    ) -> None:
        self.tokenizer, self.options, self._fixed, self._source = tokenizer, options, plan, source
        self._codec: Codec | None = None
        self._whole: str | None = None  # the fingerprint, where this process holds a share
        self._attended_only: dict[frozenset[int], set[int]] = {}

    def fingerprint(self, model: Any, share: Share | None) -> str:
        """The whole model's."""
        if share is None:
            return fingerprint(model)
        if self._whole is None and self._source is None:
            raise CodecError(
                "the model was split over several processes before it was attached, so its fingerprint is unknown; "
                "expected install() first and mlx_lm's sharded_load() then."
            )
        if self._whole is None:
            assert self._source is not None
            self._whole = fingerprint_of_files(self._source)
        return self._whole

    def attended_only(self, model: Any, packed: frozenset[int]) -> set[int]:
        """`intercept.attended_only`, found once."""
        if packed not in self._attended_only:
            self._attended_only[packed] = attended_only(model, packed)
        return self._attended_only[packed]

    def plan(self, model: Any, options: CacheOptions) -> tuple[Plan, CacheOptions]:
        """The plan for these options, and what they come to; finds or calibrates the codec on first use."""
        if options.lossless:
            return LOSSLESS, options
        if self._fixed is not None and options.codec is None:
            return self._fixed, options
        share = Share.of(model)
        codec = options.codec
        if isinstance(codec, str | os.PathLike):
            codec = codec_of_file(codec)
        if codec is not None:
            if codec.fingerprint != (name := self.fingerprint(model, share)):
                raise CodecError(f"the codec is of model {codec.fingerprint}; this model is {name}; use its own codec.")
        else:
            codec = self._codec = self._codec or self._codec_in_use(model, share)
        options = settled(model, codec, options, share is not None)
        plan = codec.plan(options.bits_per_value)
        return register_plan(plan if share is None else share.of_plan(plan)), options

    def _codec_in_use(self, model: Any, share: Share | None) -> Codec:
        name = self.fingerprint(model, share)
        with _calibrating:
            if (known := codecs_in_use.get(name)) is not None:  # `uninstall` may forget it meanwhile
                return known
            found = codec_for(model, self.tokenizer) if share is None else find_codec(name)
            if found is None:
                raise CodecError(
                    f"no codec of model {name} in {stored_path(name).parent}, and a model split over several processes "
                    "cannot be calibrated; run `vq_kvcache calibrate MODEL` once and copy the file to every machine."
                )
            return codecs_in_use.setdefault(name, found)


def attachment_of(model: Any) -> Attachment | None:
    found = getattr(model, "_vq_kvcache", None)
    return found if isinstance(found, Attachment) else None
