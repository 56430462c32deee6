"""The codecs of a machine: listed, exported, imported and removed."""

import pytest
from conftest import random_codec

from vq_kvcache import cli, library
from vq_kvcache.spectral.codec import Codec, find_codec, stored_path


@pytest.fixture(autouse=True)
def _no_shipped_codecs(tmp_path, monkeypatch):
    monkeypatch.setattr(library, "shipped_path", lambda name: tmp_path / "shipped" / f"{name}.safetensors")


def run(capsys, *arguments):
    status = cli.main(["codecs", *map(str, arguments)])
    told = capsys.readouterr()
    return status, told.out + told.err


def stored(name, seed=0):
    codec = random_codec(layers=2, name=name, seed=seed)
    codec.save(stored_path(name))
    return codec


def test_list(capsys, tmp_path):
    assert run(capsys, "list") == (0, f"no codecs in {stored_path('any').parent}.\n")
    codec = stored("llama-1")
    shipped = random_codec(layers=3, name="qwen-2")
    shipped.save(tmp_path / "shipped/qwen-2.safetensors")
    stored_path("bad").write_bytes(b"nothing")
    status, text = run(capsys, "list")
    lines = text.splitlines()
    assert status == 0
    assert lines[0].startswith(f"damaged: {stored_path('bad')} is truncated or no codec file")
    assert lines[1].startswith(f"llama-1  {codec.identity}  2 layers  none  {stored_path('llama-1').stat().st_size:,} ")
    assert lines[2].startswith(f"qwen-2  {shipped.identity}  3 layers")


def test_a_codec_moves_to_another_machine(capsys, tmp_path, monkeypatch):
    codec, _ = stored("llama-1"), stored("llama-2")
    file = tmp_path / "moved.safetensors"
    assert run(capsys, "export", "llama-1", file) == (0, f"{file}: codec {codec.identity} of model llama-1\n")
    monkeypatch.setenv("VQ_KVCACHE_HOME", str(tmp_path / "elsewhere"))
    assert find_codec("llama-1") is None
    assert run(capsys, "import", file)[0] == 0
    assert find_codec("llama-1").identity == codec.identity
    assert run(capsys, "import", file)[0] == 0  # the same again


def test_another_codec_of_the_model_is_not_replaced_unawares(capsys, tmp_path):
    held, other = stored("llama-1"), random_codec(layers=2, name="llama-1", seed=1)
    other.save(tmp_path / "other.safetensors")
    status, text = run(capsys, "import", tmp_path / "other.safetensors")
    assert status == 1
    assert f"codec {held.identity} of model llama-1 is here already" in text
    assert Codec.load(stored_path("llama-1")).identity == held.identity
    assert run(capsys, "import", tmp_path / "other.safetensors", "--force")[0] == 0
    assert Codec.load(stored_path("llama-1")).identity == other.identity


def test_remove(capsys, tmp_path):
    stored("llama-1")
    kept = stored("llama-2")
    status, text = run(capsys, "remove", "llama-")
    assert (status, "2 codecs are of a model that begins with 'llama-'; expected one of llama-1, llama-2." in text) == (
        1, True,
    )  # fmt: skip
    assert run(capsys, "remove", "llama-1")[0] == 0
    assert [c.identity for _, c in library.codecs()] == [kept.identity]
    random_codec(name="qwen-2").save(tmp_path / "shipped/qwen-2.safetensors")
    assert "belongs to the package; expected a codec of" in run(capsys, "remove", "qwen")[1]
    assert (tmp_path / "shipped/qwen-2.safetensors").exists()


@pytest.mark.parametrize("arguments", [("export", "gpt", "file"), ("remove", "gpt"), ("import", "nowhere.safetensors")])
def test_what_is_not_there_is_one_sentence(capsys, arguments):
    status, text = run(capsys, *arguments)
    assert status == 1
    assert text.startswith("vq_kvcache codecs: ")
    assert "expected" in text
