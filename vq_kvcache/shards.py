"""The part of a model that this process holds, where mlx-lm spreads one over several machines.

Tensor parallel: every layer, an equal run of its KV heads. Pipeline: a run of layers, whole. A codec is made for the
whole model and found by the whole model's fingerprint; each process packs with its part of it.
"""

import dataclasses
import re
from typing import Any

import mlx.core as mx

from .spectral.codec import LayerQuantizers, Plan
from .spectral.intercept import members_of, plain_caches
from .spectral.spectral_quant import SpectralQuantizer

_SUFFIX = re.compile(r"#(\d+)/(\d+)\+(\d+)$")


@dataclasses.dataclass(frozen=True)
class Share:
    """Of `size` equal parts of every layer's KV heads the one numbered `rank`, of the caches from `first` on."""

    rank: int
    size: int
    first: int

    @classmethod
    def of(cls, model: Any) -> "Share | None":
        """What this process holds of a model; None for all of it."""
        groups = (getattr(module, "group", None) for module in model.modules())
        group = next((g for g in groups if isinstance(g, mx.distributed.Group) and g.size() > 1), None)
        rank, size = (0, 1) if group is None else (group.rank(), group.size())
        inner = getattr(model, "model", None)
        if inner is not None and getattr(inner, "pipeline_size", 1) > 1:
            caches = sum(len(members_of(c)) for c in plain_caches(model))
            return cls(rank, size, inner.start_idx * (caches // len(model.layers)))
        return None if size == 1 else cls(rank, size, 0)

    @classmethod
    def named(cls, plan_name: str) -> tuple[str, "Share | None"]:
        """The name of the whole plan, and the share, of a plan's name."""
        match = _SUFFIX.search(plan_name)
        return (plan_name, None) if match is None else (plan_name[: match.start()], cls(*map(int, match.groups())))

    def of_plan(self, plan: Plan) -> Plan:
        """The quantizers of this share, by this process's own indices."""
        layers = {
            i - self.first: LayerQuantizers(*(self._heads(q) for q in (layer.keys, layer.values)))
            for i, layer in plan.layers.items()
            if i >= self.first
        }
        return Plan(f"{plan.name}#{self.rank}/{self.size}+{self.first}", plan.fingerprint, layers)

    def _heads(self, quantizer: SpectralQuantizer | None) -> SpectralQuantizer | None:
        # Latents are one head, and every process has it.
        if quantizer is None or quantizer.layout.heads % self.size:
            return quantizer
        count = quantizer.layout.heads // self.size
        return quantizer.heads(self.rank * count, (self.rank + 1) * count)
