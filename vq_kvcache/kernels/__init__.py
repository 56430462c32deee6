"""One kernel text for Metal, CUDA and the host: read it, choose the back-end, build once, launch.

header = a prelude (metal.h, cuda.h; host.h in tests) + helpers + body; source = the back-end's prologue + one call.
CUDA's compiler is told to include the files: MLX hashes a kernel's whole source whenever it evaluates one.
Numbers that change from step to step come in `params`, widths and words in `table`, so few variants for each dtype and
head_dim serve the layers of a model: those with more columns or words have others, of more shared memory; so have
more queries at once.
"""

import dataclasses
import functools
import hashlib
import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, Literal

import mlx.core as mx

from ..chunks import LEAST_INPUT, MAX_CHUNKS

Backend = Literal["metal", "cuda", "ops"]
VARIABLE = "VQ_KVCACHE_BACKEND"
FOLDER = pathlib.Path(__file__).resolve().parent
TEXTS = ("helpers.h", "products.h", "attend.h", "lookup.h", "columns.h", "merge.h", "encode.h", "decode.h", "restore.h")
NOT_METAL = ("products.h", "lookup.h", "columns.h")  # it has products of its own, and no byte permutation
MULTIPROCESSORS = 132  # of the GPU that these numbers are of
# Of a multiprocessor on CUDA: shared memory, of which a group takes GROUP_BYTES more than it asks for, and threads and
# groups that have 96 registers each.
SHARED_BYTES, GROUP_BYTES, MOST_THREADS, MOST_GROUPS = 233_472, 1024, 640, 4

# Where a thread group is, as every call of a body wants it; {floats} of shared memory, in fours.
PROLOGUES = {
    "metal": (
        "const int vq_x = threadgroup_position_in_grid.x, vq_y = threadgroup_position_in_grid.y,\n"
        "          vq_z = threadgroup_position_in_grid.z, vq_thread = thread_index_in_threadgroup;\n"
        "threadgroup float4 vq_space[{floats}];\n"
        "threadgroup float* vq_shared = (threadgroup float*)vq_space;\n"
    ),
    "cuda": (
        "const int vq_x = blockIdx.x, vq_y = blockIdx.y, vq_z = blockIdx.z, vq_thread = threadIdx.x;\n"
        "extern __shared__ float4 vq_space[];\n"
        "float* vq_shared = vq_held(vq_space);\n"
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
    "vq_attend<T, DK, DV, KROWS, VROWS, WARPS, STAGE, QUERIES>(q, keys, values, VQ_CHUNK_NAMES, rows, fold, mean, "
    "table, levels, params, scale, hidden, added, sums, outputs, vq_shared, vq_x, vq_y, vq_z, vq_thread);\n",
)  # fmt: skip
COLUMNS = Body(
    "columns",
    ("q", "keys", "values", *CHUNK_NAMES, "rows", "fold", "mean", "table", "lookup", "params", "scale", "hidden",
     "added"),
    ("sums", "outputs"),
    "vq_attend_columns<T, DK, DV, MC, ROW, WARPS>(q, keys, values, VQ_CHUNK_NAMES, rows, fold, mean, table, lookup, "
    "params, scale, hidden, added, sums, outputs, vq_shared, vq_y, vq_x, vq_z, vq_thread);\n",
)  # fmt: skip
MERGE = Body(
    "merge",
    ("sums", "outputs", "unfold", "mean", "sink_logits", "table", "params"),
    ("result",),
    "vq_merge<T, DV, PARTS>(sums, outputs, unfold, mean, sink_logits, table, params, result, vq_shared, vq_x, vq_y, "
    "vq_thread);\n",
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

RESTORE = Body(
    "restore",
    ("packed_keys", "packed_values", "keys", "values", "rows", "start", "key_basis", "value_basis", "key_mean",
     "value_mean", "params"),
    ("all_keys", "all_values"),
    "(void)vq_shared;\nvq_restore<T, E, DK, DV>(packed_keys, packed_values, keys, values, rows, start, key_basis, "
    "value_basis, key_mean, value_mean, params, all_keys, all_values, vq_x, vq_y, vq_z, vq_thread);\n",
)  # fmt: skip


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


Run = Callable[[Launch, str], list[mx.array]]


def header(place: str) -> str:
    """The kernel text for a compiler, without any kernel."""
    return text(*_files(place))


def _files(place: str) -> tuple[str, ...]:
    return f"{place}.h", *(name for name in TEXTS if place != "metal" or name not in NOT_METAL)


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
    here: Backend = "ops"
    if gpu:
        here = "metal" if mx.metal.is_available() else "cuda"
    if wanted in ("", here):
        return here
    if wanted == "ops":
        return "ops"
    raise RuntimeError(
        f"{VARIABLE}={wanted!r}, but the default device is {mx.default_device()} with {here!r}; expected one of "
        f"{sorted({here, 'ops'})}; unset it or choose the device it names."
    )


@functools.cache
def parts(body: Body, place: str, shared: int, threads: int) -> tuple[str, str, str]:
    """What MLX makes a kernel of: its name, what stands before it, and its body."""
    top = header(place)
    digest = hashlib.sha256(top.encode())
    if place == "cuda":
        top = "".join(f'#include "{FOLDER / name}"\n' for name in _files(place))
        # MLX writes the signature; registers are to leave room for as many groups as shared memory does.
        groups = min(max(SHARED_BYTES // (shared + GROUP_BYTES), 1), max(MOST_THREADS // threads, 1), MOST_GROUPS)
        top += f"\n#define __global__ __attribute__((global)) __launch_bounds__({threads}, {groups})\n"
        digest.update(_architecture())  # programs are kept by name
    source = PROLOGUES[place].replace("{floats}", str(max(-(-shared // 16), 1))) + body.call
    # The name tells variants apart, and so must their shared memory and threads.
    digest.update((top + source).encode())
    return f"vq_{body.name}_{digest.hexdigest()[:12]}_{shared}_{threads}", top, source


def _architecture() -> bytes:
    return str(mx.device_info().get("architecture", "")).encode()


@functools.cache
def _kernel(body: Body, place: str, shared: int, threads: int) -> Any:
    name, top, source = parts(body, place, shared, threads)
    names: dict[str, Any] = {"input_names": list(body.inputs), "output_names": list(body.outputs)}
    if place == "metal":
        return mx.fast.metal_kernel(name=name, **names, source=source, header=top)
    return mx.fast.cuda_kernel(name=name, **names, source=source, header=top, shared_memory=shared)


def _padded(array: mx.array) -> mx.array:
    return array if array.size >= LEAST_INPUT else mx.pad(array.reshape(-1), (0, LEAST_INPUT - array.size))


def run(launch: Launch, place: str, **options: Any) -> list[mx.array]:
    """Launch at `place`; the outputs, lazy. `options` go to MLX's kernel."""
    x, y, z = launch.groups
    result: list[mx.array] = _kernel(launch.body, place, launch.shared, launch.threads)(
        inputs=[_padded(a) for a in launch.inputs] if place == "metal" else list(launch.inputs),
        output_shapes=list(launch.output_shapes),
        output_dtypes=list(launch.output_dtypes),
        grid=(x * launch.threads, y, z),
        threadgroup=(launch.threads, 1, 1),
        template=list(launch.template),
        **options,
    )
    return result
