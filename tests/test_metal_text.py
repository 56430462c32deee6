"""The Metal text that MLX would compile holds to what Metal's compiler asks for: it is read by Clang's front end."""

import dataclasses
import re

import metal_check
import metal_kernels
import mlx.core as mx
import pytest

from vq_kvcache import doctor
from vq_kvcache.kernels import launches, steps

SMALL = doctor.Case(64, 64, heads=1, group=1, tokens=131)  # inputs of fewer than eight elements
CASES = [
    *(doctor.Case(d, d, bits=2.25) for d in launches.HEAD_DIMS),
    doctor.Case(192, 128),
    *(doctor.Case(d, d, dtype=t, bits=2.25, sinks=True) for d in (64, 128) for t in (mx.bfloat16, mx.float32)),
    doctor.Case(256, 256, dtype=mx.bfloat16),
    *(doctor.Case(d, d, length=16, dtype=t) for d, t in ((64, mx.float16), (128, mx.float32), (256, mx.float16))),
    doctor.Case(64, 64, length=2),
    SMALL,
]
TEXT = """
#define VQ_SHARED(T) threadgroup T*
inline float first(VQ_SHARED(const float) x) { return x[0]; }
// here
[[kernel]] void k(
  const device float* x [[buffer(0)]],
  device float* y [[buffer(1)]]) {
  threadgroup float4 space[16];
  y[0] = first((threadgroup float*)space) + x[0];
}
"""


def launches_of(case):
    """The launches of `attend` and `merge`."""
    p = doctor.problem(case)
    plan, operands = steps.step(p.held, p.queries, p.scale, p.mask, p.sinks, "metal")
    launch = steps.parts_launch(plan, operands)
    parts = [mx.zeros(s, t) for s, t in zip(launch.output_shapes, launch.output_dtypes, strict=True)]
    return launch, steps.merge_launch(plan, operands, parts)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention_is_as_metal_asks(case):
    attend, merge = launches_of(case)
    assert attend.shared <= metal_check.MOST_GROUP_MEMORY
    assert metal_check.complaints(metal_kernels.text_of(attend)) == []
    if case.key_dims == 64:  # `merge` hardly depends on it
        assert metal_check.complaints(metal_kernels.text_of(merge)) == []


def test_encoding_is_as_metal_asks():
    x = mx.zeros((1, 1, 1, 64))
    assert metal_check.complaints(metal_kernels.text_of(launches.encode(doctor.quantizer(64, 1, 0.5, 0), x))) == []


@pytest.mark.parametrize("dtype", [mx.float16, mx.float32], ids=["float16", "float32"])
def test_decoding_is_as_metal_asks(dtype):
    held = doctor.snapshot(dataclasses.replace(SMALL, bits=7.75))
    assert metal_check.complaints(metal_kernels.text_of(launches.decode(held, 0, 0, 1, dtype))) == []


def test_queries_that_find_no_room_in_a_thread_group_are_left_to_plain_operations():
    wide = doctor.problem(doctor.Case(256, 256, dtype=mx.float32))
    assert not launches.fits(wide.held, wide.queries.dtype, "metal")
    assert launches.fits(wide.held, wide.queries.dtype, "cuda")
    narrow = doctor.problem(doctor.Case(256, 256))
    assert launches.fits(narrow.held, narrow.queries.dtype, "metal")


def test_a_text_without_faults_is_taken():
    assert metal_check.complaints(TEXT) == []


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ("// here", "inline float twice(float half) { return 2 * half; }", "expected"),
        ("// here", "inline void set(float& x) { x = 1; }", r"no address space: .*float & x"),
        ("// here", "inline void set(float* x) { *x = 1; }", r"no address space: .*float \* x"),
        ("// here", "inline float wide(float x) { return x * 0.5; }", "Metal has no double"),
        ("// here", "inline float call(float x) { return [&] { return x; }(); }", "Metal has no a lambda"),
        ("// here", "inline float run(int n) { float x[n]; return x[0]; }", "an array without a constant size"),
        ("// here", "inline float own() { threadgroup float x[4]; return x[0]; }", "memory outside of a kernel"),
        ("// here", "static float kept = 1.0f;", "outside of functions that is not constant"),
        ("first((threadgroup float*)space)", "first(x)", "no matching function"),
        ("first((threadgroup float*)space)", "first((threadgroup const float*)x)", "a cast to another address space"),
        ("+ x[0]", "+ first(x)", "no matching function"),
        ("+ x[0]", "+ std::exp(x[0])", "undeclared identifier 'std'"),
        ("space[16]", "space[2049]", "32784 bytes of threadgroup memory"),
        ("[[buffer(1)]]", "[[buffer(1)]]" * 31, "32 buffers"),
    ],
)
def test_faults_are_found(old, new, told):
    assert old in TEXT
    found = metal_check.complaints(TEXT.replace(old, new))
    assert any(re.search(told, line) for line in found), found
