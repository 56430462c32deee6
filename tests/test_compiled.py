"""CUDA's programs, where MLX looks for them. Nothing is compiled here: NVRTC comes with MLX's CUDA build."""

import dataclasses
import subprocess

import host_kernels
import mlx.core as mx
import pytest

from vq_kvcache import doctor, kernels, trust
from vq_kvcache.kernels import compiled, launches, steps

BODY = kernels.Body("toy", ("words", "x"), ("sums",), "vq_toy<T, N>(words, x, sums, vq_shared);\n")
LAUNCH = kernels.Launch(
    BODY,
    [mx.zeros(8, mx.uint32), mx.zeros(8, mx.bfloat16)],
    [(8,)],
    [mx.float32],
    (1, 1, 1),
    64,
    128,
    (("T", mx.bfloat16), ("N", 3)),
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("MLX_PTX_CACHE_DIR", str(tmp_path / "ptx"))
    return tmp_path / "ptx"


def test_the_hash_of_a_source_is_that_of_libstdcxx(tmp_path):
    texts = [b"", b"a", b"1234567", b"12345678", b"123456789", b"\xe9" * 3001]
    calls = "".join(f'one(std::string("{t.decode("latin1")}"));' for t in texts[:-1])
    program = "#include <cstdio>\n#include <functional>\n#include <string>\n"
    program += 'static void one(const std::string& s) { std::printf("%zx\\n", std::hash<std::string>{}(s)); }\n'
    program += f"int main() {{ {calls} one(std::string(3001, '\\xe9')); }}\n"
    (tmp_path / "hash.cpp").write_text(program)
    subprocess.run(["g++", tmp_path / "hash.cpp", "-o", tmp_path / "hash"], check=True)
    told = subprocess.run([tmp_path / "hash"], capture_output=True, text=True, check=True).stdout.split()
    assert [f"{compiled.string_hash(text):x}" for text in texts] == told


def test_the_name_is_made_of_the_source_that_mlx_would_write(monkeypatch):
    hashed = []
    monkeypatch.setattr(compiled, "string_hash", lambda text: hashed.append(text.decode()) or 0xABC)
    name, top, source = kernels.parts(BODY, "cuda", 128, 64)
    assert compiled.module_name(LAUNCH) == f"custom_kernel_{name}_bfloat16_t_3_abc"
    assert hashed == [
        f"""
#include "mlx/backend/cuda/device/utils.cuh"

#include <cooperative_groups.h>

{top}namespace mlx::core::cu {{

namespace cg = cooperative_groups;

__global__ void custom_kernel_{name}_bfloat16_t_3(
    const uint32_t* words,
    const __nv_bfloat16* x,
    float* sums) {{
  using T = __nv_bfloat16;
  constexpr int N = 3;

{source}
}}

}} // namespace mlx::core::cu
"""
    ]


def test_programs_are_compiled_once_and_put_where_mlx_looks(folder, monkeypatch):
    made, written, write = [], [], compiled.write_atomically
    monkeypatch.setattr(compiled, "_compiled", lambda launch: made.append(launch) or b"machine code")
    monkeypatch.setattr(compiled, "write_atomically", lambda *file: written.append(file[0].suffix) or write(*file))
    for _ in range(2):
        compiled.prepare("cuda", lambda run: run(LAUNCH, "cuda"))
    assert made == [LAUNCH]
    assert written == [".txt", ".ptx"]  # MLX may look in between
    name = compiled.module_name(LAUNCH)
    assert (folder / f"{name}.ptx").read_bytes() == b"machine code"
    own = compiled.kernel_name(LAUNCH)
    assert (folder / f"{name}.txt").read_text() == f"mlx::core::cu::{own}\t{own}\n"


OTHER = dataclasses.replace(LAUNCH, threads=32)


@pytest.mark.parametrize("error", [OSError("nvrtc"), RuntimeError("6"), AttributeError("nvrtc"), KeyError("major")])
def test_what_does_not_compile_is_left_to_mlx(error, folder, monkeypatch):
    def failing(launch):
        if launch is LAUNCH:
            raise error
        return b"machine code"

    monkeypatch.setattr(compiled, "_compiled", failing)
    compiled.prepare("cuda", lambda run: [run(launch, "cuda") for launch in (LAUNCH, OTHER)])
    assert [f.name for f in folder.glob("*.ptx")] == [f"{compiled.module_name(OTHER)}.ptx"]


def test_without_a_compiler_at_hand_nothing_happens(folder, monkeypatch):
    monkeypatch.setattr(compiled, "LIBRARIES", ("libvq_none.so",))
    compiled._library.cache_clear()
    compiled.prepare("cuda", lambda run: run(LAUNCH, "cuda"))
    assert not list(folder.iterdir())


def test_nothing_is_compiled_that_cannot_be_kept(folder, monkeypatch):
    made = []
    monkeypatch.setattr(compiled, "_compiled", lambda launch: made.append(launch) or b"machine code")
    folder.write_bytes(b"in the way of a folder")
    compiled.prepare("cuda", lambda run: run(LAUNCH, "cuda"))
    folder.unlink()
    monkeypatch.setattr(compiled.os, "access", lambda path, mode: False)
    compiled.prepare("cuda", lambda run: run(LAUNCH, "cuda"))
    monkeypatch.delenv("MLX_PTX_CACHE_DIR")

    def nowhere():
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(compiled.tempfile, "gettempdir", nowhere)
    compiled.prepare("cuda", lambda run: run(LAUNCH, "cuda"))
    assert not made


def test_nothing_is_compiled_for_an_mlx_that_looks_for_other_names(folder, monkeypatch):
    monkeypatch.setattr(compiled, "OTHERWISE_NAMED", (mx.__version__,))
    monkeypatch.setattr(compiled, "_compiled", lambda launch: b"machine code")
    compiled.prepare("cuda", lambda run: run(LAUNCH, "cuda"))
    assert not folder.exists()


def test_a_program_that_cannot_be_loaded_is_forgotten(folder, monkeypatch):
    """Or no process would use the kernels any more: MLX does not compile what it finds."""
    monkeypatch.setattr(compiled, "_compiled", lambda launch: b"machine code")
    compiled.prepare("cuda", lambda run: [run(launch, "cuda") for launch in (LAUNCH, OTHER)])
    (folder / "copy_v.ptx").touch()

    def failing(name):
        raise RuntimeError(f"Failed to load compiled {name} kernel: device kernel image is invalid.")

    for name in (compiled.module_name(LAUNCH), "copy_v"):
        assert "image is invalid" in trust.what_fails(lambda name=name: failing(name))
    assert {f.name for f in folder.glob("*.ptx")} == {f"{compiled.module_name(OTHER)}.ptx", "copy_v.ptx"}


def test_only_cuda_has_programs_to_keep(folder, monkeypatch):
    monkeypatch.setattr(compiled, "_compiled", lambda launch: b"machine code")
    compiled.prepare("metal", lambda run: run(LAUNCH, "metal"))
    assert not folder.exists()


def test_whatever_is_run_before_first_use_was_compiled_side_by_side(folder, monkeypatch):
    monkeypatch.setattr(compiled, "_compiled", lambda launch: b"machine code")
    prepare, reached = compiled.prepare, []
    monkeypatch.setattr(compiled, "prepare", lambda place, launch_all: prepare("cuda", launch_all))

    def run(launch, place):
        assert (folder / f"{compiled.module_name(launch)}.ptx").exists()
        reached.append(launch.body.name)
        return host_kernels.run(launch)

    monkeypatch.setattr(kernels, "run", run)
    monkeypatch.setattr(launches, "run", run)
    monkeypatch.setattr(steps, "attend", lambda plan, operands: steps.attend_by(run, plan, operands))
    assert doctor.wrong_codes("host") == ""
    assert doctor.wrong_arrays("host", 64, 64, mx.bfloat16) == ""
    assert doctor.first_wrong("host", 64, 64, mx.bfloat16) == ""
    assert set(reached) == {"encode", "decode", "restore", "columns", "merge"}
