"""A patched mlx-lm: its own generate, chat and server run with the spectral cache, and as before without it."""

import importlib.util
import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from conftest import random_prompt, tiny_tokenizer

from vq_kvcache import cli, patching

SECONDS = 100
SPECTRAL = ["--kv-cache", "spectral", "--kv-avg-bits", "2", "--kv-window", "32"]
WORDS = " ".join(f"w{i}" for i in random_prompt(250))


@pytest.fixture(scope="module")
def patched(tmp_path_factory):
    """A folder with a patched copy of the installed mlx-lm; None where no patch is carried for its version."""
    folder = tmp_path_factory.mktemp("patched")
    source = Path(next(iter(importlib.util.find_spec("mlx_lm").submodule_search_locations)))
    package = folder / "mlx_lm"
    shutil.copytree(source, package, ignore=shutil.ignore_patterns("__pycache__"))
    if patching._read_version(package, installed=False) not in patching.available_patches():
        with pytest.raises(patching.PatchError, match="install an mlx-lm that a patch fits"):
            patching.check(package)
        return None
    patching.revert(package)
    assert len(patching.apply(package)) == 3
    return folder


@pytest.fixture(scope="session")
def folder(model_folder, tmp_path_factory):
    """The tiny model with a chat template that is the messages themselves."""
    copy = tmp_path_factory.mktemp("patched-model") / "tiny-llama"
    shutil.copytree(model_folder, copy)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }} {% endfor %}"
    tokenizer.save_pretrained(copy)
    return str(copy)


def command(patched, *arguments):
    """The patched mlx_lm's command line, and its environment."""
    paths = [str(patched), str(Path(cli.__file__).resolve().parent.parent)]
    return [sys.executable, "-m", "mlx_lm", *map(str, arguments)], {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def run(patched, *arguments, stdin=""):
    """Its finished process."""
    line, environment = command(patched, *arguments)
    return subprocess.run(line, env=environment, input=stdin, capture_output=True, text=True, timeout=SECONDS,
                          check=False)  # fmt: skip


def words_of(text):
    return [w for w in text.split() if w.startswith("w") and w[1:].isdigit()]


def hooked(capsys, monkeypatch, *arguments):
    """Words that the same command says by way of this package's own command line."""
    monkeypatch.setattr(sys, "argv", ["vq_kvcache"])
    assert cli.main(list(map(str, arguments))) == 0
    return words_of(capsys.readouterr().out)


def test_generate(patched, folder, stored_codec, capsys, monkeypatch, tmp_path):
    if patched is None:
        return
    line = ["generate", "--model", folder, "--prompt", WORDS, "--max-tokens", 20]
    said = {}
    for name, options in {
        "spectral": SPECTRAL,
        "full": [],
        "other": ["--kv-cache", "full", "--kv-avg-bits", 3],
    }.items():
        done = run(patched, *line, *options)
        assert done.returncode == 0, done.stderr[-1500:]
        said[name] = words_of(done.stdout)
        assert len(said[name]) == 20
    assert said["spectral"] == hooked(capsys, monkeypatch, *line, *SPECTRAL)
    assert said["full"] == said["other"] == hooked(capsys, monkeypatch, *line, "--kv-cache", "full")
    assert said["spectral"] != said["full"]


def test_generate_from_a_file(patched, folder, stored_codec, capsys, monkeypatch, tmp_path):
    """The file is read before anything of ours would be imported."""
    if patched is None:
        return
    file = tmp_path / "prompt.safetensors"
    hooked(capsys, monkeypatch, "cache_prompt", "--model", folder, "--prompt", WORDS, "--prompt-cache-file", file,
           *SPECTRAL)  # fmt: skip
    line = ["generate", "--prompt", "w5 w6", "--prompt-cache-file", file, "--max-tokens", 10]
    done = run(patched, *line, "--kv-cache", "spectral")
    assert done.returncode == 0, done.stderr[-1500:]
    assert words_of(done.stdout) == hooked(capsys, monkeypatch, *line)


def test_chat(patched, folder, stored_codec, capsys, monkeypatch):
    if patched is None:
        return
    turns = f"{WORDS}\n{WORDS[:60]}\nq\n"
    line = ["chat", "--model", folder, "--max-tokens", 9]
    spectral, full = (run(patched, *line, *options, stdin=turns) for options in (SPECTRAL, []))
    assert (spectral.returncode, full.returncode) == (0, 0), spectral.stderr[-1500:]
    assert len(words_of(full.stdout)) >= 18
    assert words_of(spectral.stdout) != words_of(full.stdout)


def complete(port, body):
    request = urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})  # fmt: skip
    with urllib.request.urlopen(request, timeout=30) as response:
        return json.load(response)["choices"][0]["text"]


def served(patched, folder, *options):
    """What a server says after WORDS."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    line, environment = command(patched, "server", "--model", folder, "--port", port, *options)
    server = subprocess.Popen(line, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        deadline = time.monotonic() + SECONDS
        while time.monotonic() < deadline and server.poll() is None:
            try:
                return complete(port, {"model": folder, "prompt": WORDS, "max_tokens": 20, "temperature": 0.0})
            except OSError:
                time.sleep(0.3)
        raise AssertionError(f"no answer from the server, exit status {server.poll()}")
    finally:
        server.kill()
        server.wait()


def test_server(patched, folder, stored_codec, capsys, monkeypatch):
    if patched is None:
        return
    line = ["generate", "--model", folder, "--prompt", WORDS, "--max-tokens", 20, "--ignore-chat-template"]
    full = served(patched, folder)
    assert words_of(full) == hooked(capsys, monkeypatch, *line, "--kv-cache", "full")
    assert words_of(served(patched, folder, *SPECTRAL)) == hooked(capsys, monkeypatch, *line, *SPECTRAL)


@pytest.mark.parametrize("name", ["generate", "chat", "server"])
def test_two_ways_to_shrink_are_refused(patched, folder, name):
    if patched is None:
        return
    other, sentence = ["--kv-bits", "4"], "--kv-cache spectral takes neither --kv-bits nor --max-kv-size"
    if name == "chat":
        other = ["--max-kv-size", "64"]
    elif name == "server" and "--kv-bits" not in (patched / "mlx_lm/server.py").read_text():
        other, sentence = ["--kv-window", "-1"], "window is -1"  # before 0.32 a server knows no second way
    done = run(patched, name, "--model", folder, "--kv-cache", "spectral", *other)
    assert done.returncode != 0
    assert sentence in done.stderr
