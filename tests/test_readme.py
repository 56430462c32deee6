"""README does what it says: its blocks of code run as they stand, on the shipped model, and its picture is drawn."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import mlx.core as mx
import picture
import pytest

from vq_kvcache import demo, hooks
from vq_kvcache.spectral import intercept

ROOT = pathlib.Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")
HUB = "mlx-community/Llama-3.2-3B-Instruct-4bit"
BLOCK = re.compile(r"(?:<!-- ([^>]*) -->\n)?```(\w*)\n(.*?)```", re.DOTALL)
IN_CI, TWO_MACHINES = "run by .ci/run", "not run: it takes two machines"
# What stands in for the machine that README's reader has. A calibration of the shipped model takes minutes.
SHIMS = {
    "vq_kvcache": f"""if [ "$1" = calibrate ]; then set -- "$@" --samples 2 --length 160; fi
exec {sys.executable} -m vq_kvcache "$@" """,
    "python": f'exec {sys.executable} "$@"',
    "scp": 'cp "$1" "copied-to-${2%%:*}"',
}


def blocks(language):
    """(marker before it or "", text) of each fenced block of that language."""
    return [(marker, code) for marker, found, code in BLOCK.findall(README) if found == language]


def on_the_shipped_model(code):
    return code.replace(HUB, str(demo.model_folder()))


@pytest.fixture
def reader(tmp_path):
    """(folder, environment) of somebody who has vq_kvcache installed, and a book."""
    (tmp_path / "bin").mkdir()
    for name, body in SHIMS.items():
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    book = (demo.model_folder().parent / "demo.txt").read_text("utf-8")
    (tmp_path / "book.txt").write_text(book[:3000], "utf-8")
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"
    return tmp_path, {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "VQ_KVCACHE_HOME": str(tmp_path / "home")}


def run(command, reader):
    folder, environment = reader
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done.stdout + done.stderr


def test_every_block_has_a_language_and_a_known_marker():
    assert README.count("```") == 2 * len(BLOCK.findall(README))
    assert {language for _, language, _ in BLOCK.findall(README)} == {"python", "sh"}
    assert {marker for marker, _, _ in BLOCK.findall(README)} == {"", IN_CI, TWO_MACHINES}
    assert not re.search(r"\n    (?:from|import|pip|vq_kvcache \w+ --) ", README)  # code that is not fenced


def test_python_blocks_run_one_after_the_other(reader):
    """In one process, as a reader would paste them."""
    code = [on_the_shipped_model(text) for _, text in blocks("python")]
    assert len(code) >= 4
    (reader[0] / "pasted.py").write_text("\n".join(code), "utf-8")
    text = run([sys.executable, "pasted.py"], reader)
    assert "Traceback" not in text
    assert (reader[0] / "artifacts/spectral/manifest.json").is_file()


LITTLE = "--tokens 320 --context 512 --bits 2 --max-tokens 4"


def test_shell_blocks_run(reader):
    commands = [on_the_shipped_model(text) for marker, text in blocks("sh") if not marker]
    assert len(commands) >= 3
    script = "set -euo pipefail\n" + "\n".join(commands)
    # As printed it takes two minutes of both cores.
    script, found = re.subn(r"^(vq_kvcache compare \S+)$", r"\1 " + LITTLE, script, flags=re.MULTILINE)
    assert found == 1
    text = run(["bash", "-c", script], reader)
    assert (reader[0] / "vq_kvcache_compare.html").is_file()
    assert re.search(
        r"^\d\.\d+ bits: 4,096 tokens in [\d.]+ MB; predicted KL \S+ on text like the cal", text, re.MULTILINE
    )
    assert text.count("Generation: ") >= 3
    assert (reader[0] / "book.safetensors").is_file()
    assert (reader[0] / "copied-to-mac2.local").stat().st_size == (reader[0] / "llama.codec").stat().st_size


def test_what_installs_is_run_in_ci():
    """CI takes these lines from README itself, by words of theirs, in environments of their own."""
    installing = [text.strip() for marker, text in blocks("sh") if marker == IN_CI]
    words = re.findall(r"grep -m1 '([^']+)' README.md", (ROOT / ".ci/run").read_text("utf-8"))
    found = [next(line for line in README.split("\n") if word in line) for word in words]
    assert sorted(found) == sorted(installing)
    assert len(installing) == 2
    assert not any("pip install" in text for marker, text in blocks("sh") if marker != IN_CI)


def test_commands_for_two_machines_name_options_that_exist(reader):
    (text,) = [text for marker, text in blocks("sh") if marker == TWO_MACHINES]
    for line in text.strip().split("\n"):
        command, *words = line.split(" -- ")[0].split()
        offered = run([str(pathlib.Path(sys.executable).with_name(command)), "--help"], reader)
        options = [word for word in words if word.startswith("--")]
        assert options
        assert all(re.search(rf"{option}\b", offered) for option in options)
    ours = text.split("vq_kvcache chat", 1)[1]
    assert "--kv-codec" in run([sys.executable, "-m", "vq_kvcache", "chat", "--help"], reader)
    assert set(re.findall(r"--[\w-]+", ours)) == {"--model", "--kv-codec"}


def test_sections_come_in_the_order_a_newcomer_asks():
    found = re.findall(r"^## (.*)$", README, re.MULTILINE)
    wanted = [
        "Two commands", "In Python", "How small", "How close the text stays", "What it holds", "When not to use it",
        "How it works", "Byte format", "Moving here", "Platforms, and what ran where", "Contributing", "Security",
        "Changes",
    ]  # fmt: skip
    assert [name for name in found if name in wanted] == wanted


def test_what_readme_points_at_exists():
    anchors = {
        re.sub(r"[^\w -]", "", name).lower().replace(" ", "-") for name in re.findall(r"^#+ (.*)$", README, re.M)
    }
    for target in re.findall(r"\]\(([^)]+)\)", README):
        if target.startswith("#"):
            assert target[1:] in anchors, target
        elif not target.startswith("http"):
            assert (ROOT / target).exists(), target
    sections = set(re.findall(r"^## (.*)$", README, re.MULTILINE))
    named = re.findall(r'\("([A-Z][^"\n]+)"\)', README)
    assert named
    assert set(named) <= sections
    for file in re.findall(r"`((?:tests|benchmarks|examples|vq_kvcache|spectral)/[\w./-]+\.\w+)`", README):
        assert (ROOT / file).exists() or (ROOT / "vq_kvcache" / file).exists(), file


def test_the_table_of_what_is_replaced_is_whole():
    table = README.split("What is replaced, until")[1].split("\n\n")[1]
    rows = [set(re.findall(r"`([\w.]+)`", row.split("|")[2])) for row in table.splitlines()[2:]]
    short = [{name.removeprefix("mlx_lm.utils.") for name in row} - {"mlx_lm.models.cache"} for row in rows]
    model, found = type("Model", (), {})(), []
    for replace in (hooks._require_dispatch, lambda: hooks.attach(model), hooks.install):
        replace()
        found.append({name for _, name in hooks._replaced})
    assert mx.fast.scaled_dot_product_attention is not intercept.original_attention()
    assert short[0] == {"mx.fast.scaled_dot_product_attention"}
    assert short[1] - {"mlx_lm.generate", "make_cache"} == found[1] - found[0]
    assert short[2] == found[2] - found[1]


def test_the_picture_is_of_the_shipped_codec():
    assert picture.FILE.read_text("utf-8") == picture.draw()
