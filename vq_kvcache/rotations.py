"""How a model is packed by rotations of the documented path, in place of a codec."""

import warnings
from typing import Any

from .spectral import intercept
from .spectral.codec import CodecError, Plan, fingerprint, plan_of_rotations
from .spectral.rotation_files import load_cached_rotations


def plan_for_model(model: Any, rotations: Any, signal_bits: int, noise_bits: int, use_water_filling: bool) -> Plan:
    """The plan of SpectralQuantizer(rotation, signal_bits, noise_bits, use_water_filling) in every layer; `rotations`
    is a folder of `save_rotations`, or a list. CodecError where they do not fit the model."""
    if not isinstance(rotations, list):
        rotations = load_cached_rotations(rotations)
    shapes = {i: (u.heads, u.key_dims, u.value_dims) for i, u in intercept.uses(model).items()}
    plan = plan_of_rotations(
        rotations, {i: s[0] for i, s in shapes.items()}, signal_bits, noise_bits, use_water_filling
    )
    for i, layer in plan.layers.items():
        for quantizer, expected in zip((layer.keys, layer.values), shapes[i][1:], strict=True):
            if quantizer is not None and quantizer.head_dim != expected:
                raise CodecError(
                    f"the rotation of layer {i} has head_dim {quantizer.head_dim}; this model has {expected}; "
                    "calibrate on this model."
                )
    if missing := sorted(set(shapes) - set(plan.layers)):
        warnings.warn(f"no rotation for layers {missing}: their caches stay full precision.", stacklevel=3)
    if unpacked := [i for i, layer in plan.layers.items() if layer.values is None]:
        warnings.warn(f"the rotations of layers {unpacked} are of keys alone: values stay exact.", stacklevel=3)
    own = fingerprint(model)
    return Plan(f"{plan.name}-{own}", own, plan.layers)
