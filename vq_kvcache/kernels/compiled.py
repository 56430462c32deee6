"""CUDA's kernels, compiled side by side and kept for the next process.

MLX compiles a custom kernel when it first evaluates it: one after another, behind headers that ours do not need, and
again in every process. But before it compiles anything it looks among its files (MLX, backend/cuda/jit_module.cpp,
read_cached_ptx), under the kernel's name and a hash of its source. What is put there, MLX 0.32.1 and later take. Where
it looks for something else, or what it compiles with is not to be found, it compiles as ever.
"""

import concurrent.futures
import contextlib
import ctypes
import functools
import os
import pathlib
import re
import tempfile
from collections.abc import Callable
from typing import Any

import mlx.core as mx

from ..spectral.files import write_atomically
from . import Launch, Run, parts

# Of arrays in CUDA, and in the names of MLX's templates (MLX, backend/cuda/utils.cpp, backend/common/compiled.cpp).
TYPES = {
    mx.float32: ("float", "float"), mx.float16: ("__half", "float16_t"), mx.bfloat16: ("__nv_bfloat16", "bfloat16_t"),
    mx.int32: ("int32_t", "int32_t"), mx.uint32: ("uint32_t", "uint32_t"), mx.uint8: ("uint8_t", "uint8_t"),
}  # fmt: skip
# What MLX writes before a kernel (backend/cuda/custom_kernel.cpp), and all that ours need of it.
MLX_HEADER = '\n#include "mlx/backend/cuda/device/utils.cuh"\n\n#include <cooperative_groups.h>\n\n'
MLX_NAMES = "namespace mlx::core::cu {\n\nnamespace cg = cooperative_groups;\n\n"
MLX_END = "\n} // namespace mlx::core::cu\n"
OWN_HEADER = "using int32_t = int;\nusing uint32_t = unsigned int;\nusing uint8_t = unsigned char;\n"
OTHERWISE_NAMED = ("0.32.0",)  # versions of MLX that do not hash the source
NOT_LOADED = re.compile(r"Failed to load compiled (custom_kernel_vq_\w+) kernel")
LIBRARIES = ("libnvrtc.so.13", "libnvrtc.so.12")
WHEELS = ("nvidia/cu13", "nvidia/cuda_runtime")


def prepare(place: str, launch_all: Callable[[Run], object]) -> None:
    """Put the CUDA programs of all launches that `launch_all` makes, through the function it is given, where MLX will
    look for them. Nothing is launched, and nothing told when that fails: MLX compiles what it does not find."""
    if place != "cuda" or mx.__version__ in OTHERWISE_NAMED:  # type: ignore[attr-defined]
        return
    launches: list[Launch] = []

    def note(launch: Launch, _: str) -> list[mx.array]:
        launches.append(launch)
        return [mx.zeros(s, d) for s, d in zip(launch.output_shapes, launch.output_dtypes, strict=True)]

    launch_all(note)
    with contextlib.suppress(OSError, KeyError):
        _keep({module_name(launch): launch for launch in launches}, programs_folder())


def _keep(launches: dict[str, Launch], folder: pathlib.Path) -> None:
    """Compile those of which no program is there."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = {name: launch for name, launch in launches.items() if not (folder / f"{name}.ptx").exists()}
    if not missing or not os.access(folder, os.W_OK):
        return
    with concurrent.futures.ThreadPoolExecutor() as pool:
        programs = pool.map(_compiled_or_none, missing.values())
        for (name, launch), program in zip(missing.items(), programs, strict=True):
            if program is not None:
                # MLX reads the program and then its functions' names, so those must be there first.
                names = f"mlx::core::cu::{kernel_name(launch)}\t{kernel_name(launch)}\n"
                write_atomically(folder / f"{name}.txt", names.encode())
                write_atomically(folder / f"{name}.ptx", program)


def forget(error: str) -> None:
    """Remove the program that MLX could not load, by its own words, if it is one of these: the next process compiles it
    anew, for the compiler and the driver that are here now."""
    if found := NOT_LOADED.search(error):
        with contextlib.suppress(OSError):
            (programs_folder() / f"{found[1]}.ptx").unlink()


def programs_folder() -> pathlib.Path:
    """Where MLX looks for compiled programs."""
    if folder := os.environ.get("MLX_PTX_CACHE_DIR"):
        return pathlib.Path(folder)
    return pathlib.Path(tempfile.gettempdir(), "mlx", mx.__version__, "ptx")  # type: ignore[attr-defined]


def kernel_name(launch: Launch) -> str:
    """The name that MLX gives to the function of this launch."""
    own = [TYPES[value][1] if isinstance(value, mx.Dtype) else str(value) for _, value in launch.template]
    name, _, _ = parts(launch.body, "cuda", launch.shared, launch.threads)
    return "_".join([f"custom_kernel_{name}", *own])


def module_name(launch: Launch) -> str:
    """The name under which MLX keeps what it compiles for this launch."""
    _, top, _ = parts(launch.body, "cuda", launch.shared, launch.threads)
    text = MLX_HEADER + top + MLX_NAMES + _function(launch) + MLX_END
    return f"{kernel_name(launch)}_{string_hash(text.encode()):x}"


def _function(launch: Launch) -> str:
    """The kernel as MLX writes it."""
    _, _, source = parts(launch.body, "cuda", launch.shared, launch.threads)
    arguments = [f"    const {TYPES[a.dtype][0]}* {n}" for n, a in zip(launch.body.inputs, launch.inputs, strict=True)]
    arguments += [f"    {TYPES[d][0]}* {n}" for n, d in zip(launch.body.outputs, launch.output_dtypes, strict=True)]
    constants = [
        f"  using {n} = {TYPES[value][0]};\n" if isinstance(value, mx.Dtype) else f"  constexpr int {n} = {value};\n"
        for n, value in launch.template
    ]
    before = "".join([*constants, "\n" * bool(constants)])
    listed = ",\n".join(arguments)
    return f"__global__ void {kernel_name(launch)}(\n{listed}) {{\n{before}{source}\n}}\n"


def string_hash(text: bytes) -> int:
    """std::hash<std::string> of libstdc++: MurmurHash64A (Appleby 2008)."""
    factor, mask = 0xC6A4A7935BD1E995, (1 << 64) - 1

    def mixed(x: int) -> int:
        return (x ^ x >> 47) * factor & mask

    found = 0xC70F6907 ^ len(text) * factor & mask
    whole = len(text) // 8 * 8
    for i in range(0, whole, 8):
        found = (found ^ mixed(int.from_bytes(text[i : i + 8], "little") * factor & mask)) * factor & mask
    if whole < len(text):
        found = (found ^ int.from_bytes(text[whole:], "little")) * factor & mask
    found = mixed(found)
    return found ^ found >> 47


@functools.cache
def _library() -> Any:
    """The compiler that MLX has loaded. OSError where there is none."""
    for name in LIBRARIES:
        with contextlib.suppress(OSError):
            return ctypes.CDLL(name, mode=os.RTLD_LAZY | os.RTLD_NOLOAD)
    raise OSError(f"none of {LIBRARIES} is loaded")


@functools.cache
def _options() -> tuple[bytes, ...]:
    """What MLX compiles with: for this very GPU, and with the headers that came with it."""
    info = mx.device_info()
    major, minor = info["compute_capability_major"], info["compute_capability_minor"]
    wheels = [pathlib.Path(mx.__file__).resolve().parents[1] / wheel for wheel in WHEELS]
    homes = [pathlib.Path(os.environ[name]) for name in ("CUDA_HOME", "CUDA_PATH") if name in os.environ]
    folders = [home / "include" for home in (*wheels, *homes, pathlib.Path("/usr/local/cuda"))]
    found = next((folder for folder in folders if (folder / "cuda_fp16.h").exists()), folders[-1])
    architecture = f"--gpu-architecture=sm_{major}{minor}{'a' if int(major) >= 9 else ''}"
    return architecture.encode(), b"--device-as-default-execution-space", f"--include-path={found}".encode()


def _compiled_or_none(launch: Launch) -> bytes | None:
    with contextlib.suppress(OSError, AttributeError, RuntimeError, KeyError):
        return _compiled(launch)
    return None


def _compiled(launch: Launch) -> bytes:
    """The machine code of a launch's program. RuntimeError or OSError when it cannot be made."""
    library, options, program = _library(), _options(), ctypes.c_void_p()
    _, top, _ = parts(launch.body, "cuda", launch.shared, launch.threads)
    text = f'{OWN_HEADER}{top}extern "C" {{\n{_function(launch)}}}\n'.encode()
    _check(library.nvrtcCreateProgram(ctypes.byref(program), text, b"vq.cu", 0, None, None))
    try:
        _check(library.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * len(options))(*options)))
        size = ctypes.c_size_t()
        _check(library.nvrtcGetCUBINSize(program, ctypes.byref(size)))
        machine_code = ctypes.create_string_buffer(size.value)
        _check(library.nvrtcGetCUBIN(program, machine_code))
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))
    return machine_code.raw


def _check(result: int) -> None:
    if result:
        raise RuntimeError(f"NVRTC: error {result}")
