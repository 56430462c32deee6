"""Runs a kernel launch on this machine: the very text that GPUs get, compiled by g++ with kernels/host.h."""

import contextlib
import ctypes
import functools
import hashlib
import mmap
import os
import pathlib
import shutil
import subprocess
import tempfile

import mlx.core as mx
import numpy as np

from vq_kvcache import kernels

TYPES = {
    mx.float32: "float", mx.float16: "vq_half", mx.bfloat16: "vq_bfloat16", mx.int32: "int", mx.uint32: "uint",
    mx.uint8: "unsigned char",
}  # fmt: skip
NUMPY = {mx.float32: np.float32, mx.float16: np.float16, mx.int32: np.int32, mx.uint32: np.uint32, mx.uint8: np.uint8}
HERE = pathlib.Path(__file__).resolve().parent
PROLOGUE = "float* vq_shared = vq_space.data();\n"


def source_of(launch):
    """A C++ program with one function, `run(inputs, outputs)`."""
    lines = ['#include "lanes.h"', kernels.header("host"), 'extern "C" void run(void** in, void** out) {']
    for i, (name, array) in enumerate(zip(launch.body.inputs, launch.inputs, strict=True)):
        lines.append(f"  const {TYPES[array.dtype]}* {name} = (const {TYPES[array.dtype]}*)in[{i}];")
    for i, (name, dtype) in enumerate(zip(launch.body.outputs, launch.output_dtypes, strict=True)):
        lines.append(f"  {TYPES[dtype]}* {name} = ({TYPES[dtype]}*)out[{i}];")
    for name, value in launch.template:
        lines.append(
            f"  using {name} = {TYPES[value]};" if isinstance(value, mx.Dtype) else f"  constexpr int {name} = {value};"
        )
    lines += [
        f"  const int* groups = (const int*)in[{len(launch.inputs)}];",
        f"  VqGuarded vq_space({-(-launch.shared // 16) * 16});",
        "  for (int vq_z = 0; vq_z < groups[2]; ++vq_z)",
        "    for (int vq_y = 0; vq_y < groups[1]; ++vq_y)",
        "      for (int vq_x = 0; vq_x < groups[0]; ++vq_x) {",
        "        vq_space.fill(0x7fc07fc0u);",
        f"        VqFibers({launch.threads}, [&](int vq_thread) {{ {PROLOGUE} {launch.body.call} }});",
        "      }",
        "}",
    ]
    return "\n".join(lines)


# -Og: a library runs for less time than -O2 takes to make it.
COMPILER = ["g++", "-std=c++17", "-Og", "-U_FORTIFY_SOURCE", "-w", "-fPIC"]


def _compile(*arguments):
    done = subprocess.run([*COMPILER, *map(str, arguments)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@functools.cache
def _folder():
    """A copy of what programs include, compiled in advance; their libraries stay there for other processes and runs."""
    files = [HERE / "lanes.h", *sorted((HERE / "metal_shim").iterdir())]
    told = hashlib.sha256(repr([COMPILER, *((f.name, f.read_bytes()) for f in files)]).encode()).hexdigest()
    top = pathlib.Path(tempfile.gettempdir(), f"vq_kvcache_host_{os.getuid()}")
    top.mkdir(0o700, exist_ok=True)
    assert top.stat().st_uid == os.getuid()
    if not (top / told).exists():
        made = pathlib.Path(tempfile.mkdtemp(dir=top))
        shutil.copy(HERE / "lanes.h", made)
        shutil.copytree(HERE / "metal_shim", made / "metal_shim")
        for path in (made / "lanes.h", made / "metal_shim" / "metal_stdlib"):
            _compile("-x", "c++-header", path, "-o", f"{path}.gch")
        with contextlib.suppress(OSError):  # another process was first
            made.rename(top / told)
    return top / told


@functools.cache
def compiled(source):
    """The function `run` of a program."""
    library = _folder() / f"{hashlib.sha256(source.encode()).hexdigest()}.so"
    if not library.exists():
        path = library.with_suffix(f".{os.getpid()}.cpp")
        path.write_text(source)
        own = path.with_suffix(".so")
        _compile(f"-I{_folder()}", f"-I{_folder() / 'metal_shim'}", "-shared", "-o", own, path)
        own.rename(library)
        path.unlink()
    return ctypes.CDLL(str(library)).run


def _guarded(array):
    """A copy with nothing behind it: a kernel that reads there is stopped, and the process with it."""
    page = mmap.PAGESIZE
    size = -(-array.nbytes // page) * page
    memory = mmap.mmap(-1, size + page)
    end = ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(memory)) + size)
    assert ctypes.CDLL(None).mprotect(end, ctypes.c_size_t(page), 0) == 0
    copy = np.frombuffer(memory, array.dtype, array.size, offset=size - array.nbytes)
    copy[...] = array.ravel()
    return copy.reshape(array.shape)


def run(launch, source=source_of):
    """The outputs as MLX arrays; `source` makes the program."""
    mx.eval(list(launch.inputs))
    held = [_guarded(np.array(a.view(mx.uint16) if a.dtype == mx.bfloat16 else a)) for a in launch.inputs]
    held.append(np.array(launch.groups, np.int32))
    outputs = []
    for shape, dtype in zip(launch.output_shapes, launch.output_dtypes, strict=True):
        kind = np.dtype(NUMPY.get(dtype, np.uint16))
        outputs.append(np.frombuffer(b"\xfe" * (int(np.prod(shape)) * kind.itemsize), kind).reshape(shape).copy())
    pointers = [(ctypes.c_void_p * len(a))(*(x.ctypes.data for x in a)) for a in (held, outputs)]
    compiled(source(launch))(*pointers)
    arrays = [mx.array(a) for a in outputs]
    return [a.view(mx.bfloat16) if d == mx.bfloat16 else a for a, d in zip(arrays, launch.output_dtypes, strict=True)]
