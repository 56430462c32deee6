"""The wheel and the source distribution hold what the package needs away from the repository."""

import pathlib
import subprocess
import sys
import tarfile
import tomllib
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]


def files(*folders):
    """Files of the repository in these folders, by path."""
    found = [f for folder in folders for f in (ROOT / folder).rglob("*") if f.is_file()]
    return {str(f.relative_to(ROOT)) for f in found if "__pycache__" not in f.parts}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """{name in the archive: content} of the wheel and of the source distribution, built as they are released."""
    out = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "hatchling", "build", "-d", str(out)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, timeout=120)
    (wheel,), (source,) = out.glob("*.whl"), out.glob("*.tar.gz")
    with zipfile.ZipFile(wheel) as archive:
        in_wheel = {name: archive.read(name) for name in archive.namelist()}
    with tarfile.open(source) as archive:
        members = [m for m in archive.getmembers() if m.isfile()]
        in_source = {m.name.split("/", 1)[1]: archive.extractfile(m).read() for m in members}
    return in_wheel, in_source


def test_the_wheel_holds_the_package_whole(built):
    wheel, _ = built
    for name in files("vq_kvcache"):
        assert wheel[name] == (ROOT / name).read_bytes()
    for name in files("patches"):
        assert wheel[f"vq_kvcache/{name}"] == (ROOT / name).read_bytes()
    for part in (
        "kernels/attend.h", "kernels/cuda.h", "data/tiny-llama/model.safetensors", "data/calibration/prose.txt",
        "data/demo.txt", "patches/mlx-lm-0.32.2-spectral-cache.patch", "py.typed",
    ):  # fmt: skip
        assert f"vq_kvcache/{part}" in wheel


def test_the_wheel_holds_nothing_else(built):
    wheel, _ = built
    expected = files("vq_kvcache") | {f"vq_kvcache/{name}" for name in files("patches")}
    others = {name for name in wheel if ".dist-info/" not in name} - expected
    assert others == set()
    assert sum(map(len, wheel.values())) < 40_000_000


def test_the_wheel_says_what_it_is(built):
    wheel, _ = built
    (metadata,) = [content.decode() for name, content in wheel.items() if name.endswith(".dist-info/METADATA")]
    for dependency in PROJECT["dependencies"]:
        name = dependency.split(">")[0]
        assert f"Requires-Dist: {name}" in metadata
        assert ">=" in dependency  # a bound that tests/oldest_dependencies.py installs
    assert "# vq_kvcache" in metadata
    (entries,) = [content.decode() for name, content in wheel.items() if name.endswith("entry_points.txt")]
    assert "vq_kvcache = vq_kvcache.cli:main" in entries
    assert any(name.endswith("licenses/LICENSE") for name in wheel)


def test_the_source_distribution_can_be_tested(built):
    _, source = built
    folders = "vq_kvcache", "tests", "benchmarks", "patches", "examples"
    for name in files(*folders) | {"README.md", "LICENSE", "pyproject.toml", ".ci/run"}:
        assert source[name] == (ROOT / name).read_bytes()
