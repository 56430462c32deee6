"""One kernel text for CUDA and the host, Metal to come: read it, choose the back-end, build once, launch.

header = a prelude (cuda.h; host.h in tests) + helpers + body; source = the back-end's prologue + one call.
Numbers that change from step to step come in `params`, widths and words in `table`, so one variant for each dtype and
head_dim serves every layer of every model.
"""

import dataclasses
import functools
import hashlib
import os
import pathlib
from collections.abc import Sequence
from typing import Any, Literal

import mlx.core as mx

from ..chunks import MAX_CHUNKS

Backend = Literal["cuda", "ops"]
VARIABLE = "VQ_KVCACHE_BACKEND"
FOLDER = pathlib.Path(__file__).resolve().parent
TEXTS = ("helpers.h", "products.h", "attend.h", "merge.h", "encode.h", "decode.h")

# Where a thread group is, as every call of a body wants it.
PROLOGUES = {
    "cuda": (
        "const int vq_x = blockIdx.x, vq_y = blockIdx.y, vq_z = blockIdx.z, vq_thread = threadIdx.x;\n"
        "extern __shared__ float4 vq_space[];\n"
        "float* vq_shared = reinterpret_cast<float*>(vq_space);\n"
    ),
}
CHUNK_NAMES = tuple(f"w{i}" for i in range(MAX_CHUNKS))


@dataclasses.dataclass(frozen=True)
class Body:
    """A kernel's signature and its one call; template names are MLX's template arguments."""

    name: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    call: str


ATTEND = Body(
    "attend",
    ("q", "keys", "values", *CHUNK_NAMES, "rows", "fold", "mean", "table", "levels", "params", "scale", "hidden",
     "added"),
    ("sums", "outputs"),
    "vq_attend<T, DK, DV, KROWS, VROWS, WARPS, STAGE>(q, keys, values, VQ_CHUNK_NAMES, rows, fold, mean, table, "
    "levels, params, scale, hidden, added, sums, outputs, vq_shared, vq_x, vq_y, vq_z, vq_thread);\n",
)  # fmt: skip
MERGE = Body(
    "merge",
    ("sums", "outputs", "unfold", "mean", "sink_logits", "table", "params"),
    ("result",),
    "vq_merge<T, DV>(sums, outputs, unfold, mean, sink_logits, table, params, result, vq_shared, vq_x, vq_y, "
    "vq_thread, THREADS);\n",
)
ENCODE = Body(
    "encode",
    ("z", "table", "levels", "params"),
    ("words",),
    "(void)vq_shared, (void)vq_z;\nvq_encode(z, table, levels, params, words, vq_x * THREADS + vq_thread, vq_y);\n",
)
DECODE = Body(
    "decode",
    (*CHUNK_NAMES, "table", "levels", "params"),
    ("result",),
    "vq_decode<E>(VQ_CHUNK_NAMES, table, levels, params, result, vq_shared, vq_x, vq_y, vq_z, vq_thread);\n",
)


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch: `groups` thread groups of `threads` threads with `shared` bytes each."""

    body: Body
    inputs: Sequence[mx.array]
    output_shapes: Sequence[tuple[int, ...]]
    output_dtypes: Sequence[mx.Dtype]
    groups: tuple[int, int, int]
    threads: int
    shared: int
    template: tuple[tuple[str, Any], ...]


@functools.cache
def text(*names: str) -> str:
    """The kernel text of these files, one after another."""
    return "\n".join((FOLDER / name).read_text("utf-8") for name in names)


def backend() -> Backend:
    """The back-end of kernels here and now: that of the default device, or what VQ_KVCACHE_BACKEND says.

    RuntimeError when it names one that this MLX or the default device does not have.
    """
    wanted = os.environ.get(VARIABLE, "")
    gpu = mx.default_device().type == mx.DeviceType.gpu
    here: Backend = "cuda" if gpu and mx.cuda.is_available() else "ops"  # there is no prelude for Metal yet
    if wanted in ("", here):
        return here
    if wanted == "ops":
        return "ops"
    raise RuntimeError(
        f"{VARIABLE}={wanted!r}, but the default device is {mx.default_device()} with {here!r}; expected one of "
        f"{sorted({here, 'ops'})}; unset it or choose the device it names."
    )


@functools.cache
def _kernel(body: Body, place: str, shared: int) -> Any:
    header = text(f"{place}.h", *TEXTS)
    source = PROLOGUES[place] + body.call
    name = f"vq_{body.name}_{hashlib.sha256((header + source).encode()).hexdigest()[:12]}"
    names: dict[str, Any] = {"input_names": list(body.inputs), "output_names": list(body.outputs)}
    # The name tells variants apart, and so must their shared memory.
    return mx.fast.cuda_kernel(name=f"{name}_{shared}", **names, source=source, header=header, shared_memory=shared)


def run(launch: Launch, place: str) -> list[mx.array]:
    """Launch at `place`; the outputs, lazy."""
    x, y, z = launch.groups
    result: list[mx.array] = _kernel(launch.body, place, launch.shared)(
        inputs=list(launch.inputs),
        output_shapes=list(launch.output_shapes),
        output_dtypes=list(launch.output_dtypes),
        grid=(x * launch.threads, y, z),
        threadgroup=(launch.threads, 1, 1),
        template=list(launch.template),
    )
    return result
