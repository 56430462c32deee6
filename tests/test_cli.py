"""The command line: what it offers, what it refuses, and that mlx_lm's own command runs with the cache on."""

import json
import sys

import mlx.core as mx
import numpy as np
import pytest

from vq_kvcache import SpectralKVCache, __version__, demo, hooks
from vq_kvcache.cli import MLX_LM, OWN, main
from vq_kvcache.spectral.codec import find_codec, fingerprint

MODEL = str(demo.model_folder())
GENERATE = ["generate", "--model", MODEL, "--prompt", "It was a dark night, and", "--max-tokens", "4"]


@pytest.fixture(autouse=True)
def _arguments(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["vq_kvcache"])


def seen_caches(monkeypatch):
    """The classes of the caches that generations use from now on."""
    seen = []
    original = hooks._choose_cache

    def choose(*args, **kwargs):
        caches = original(*args, **kwargs)
        seen.append({type(c) for c in caches or []})
        return caches

    monkeypatch.setattr(hooks, "_choose_cache", choose)
    return seen


def test_version_and_help_name_everything(capsys):
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == __version__
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text for name in (*OWN, *MLX_LM))
    assert main([]) == 2


def test_an_unknown_command_is_refused(capsys):
    assert main(["compress"]) == 2
    assert (
        "unknown command 'compress'; expected one of demo, inspect, calibrate, compare, codecs, doctor, patch, generate"
        in capsys.readouterr().err
    )


def test_generate_runs_mlx_lms_command_with_spectral_caches(capsys, monkeypatch):
    seen = seen_caches(monkeypatch)
    assert main([*GENERATE, "--kv-avg-bits", "3", "--kv-window", "64"]) == 0
    assert "Generation: 4 tokens" in capsys.readouterr().out
    assert seen == [{SpectralKVCache}]


def test_the_full_cache_is_mlx_lms_own(capsys, monkeypatch):
    seen = seen_caches(monkeypatch)
    assert main([*GENERATE, "--kv-cache", "full"]) == 0
    assert "Generation: 4 tokens" in capsys.readouterr().out
    assert seen == []


def test_help_shows_both_kinds_of_options(capsys):
    with pytest.raises(SystemExit):
        main(["generate", "--help"])
    text = capsys.readouterr().out
    assert "--kv-avg-bits" in text
    assert "--prompt-cache-file" in text


@pytest.mark.parametrize("form", [["--kv-bits", "4"], ["--kv-bits=4"]])
def test_kv_bits_are_refused(capsys, form):
    with pytest.raises(SystemExit):
        main([*GENERATE, *form])
    assert "--kv-bits asks for mlx-lm's own quantized cache; use --kv-avg-bits" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--kv-avg-bits", "9"], "bits_per_value is 9.0; expected a number from 0.25 to 8, or one for keys"),
        (["--kv-window", "-1"], "window is -1; expected a whole number of tokens, 0 or more."),
        (["--kv-codec", "nowhere.safetensors"], "nowhere.safetensors cannot be read"),
    ],
)
def test_bad_options_are_one_sentence(capsys, options, sentence):
    assert main([*GENERATE, *options]) == 1
    assert f"vq_kvcache: {sentence}" in capsys.readouterr().err


def test_the_shipped_model_has_its_codec_shipped():
    model, _ = hooks.load(MODEL)[:2]
    codec = find_codec(fingerprint(model))
    assert codec is not None
    assert codec.provenance["objective"] == "fisher"
    assert sorted(codec.layers) == list(range(6))


def test_the_demonstration_compares_both_caches(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "PROMPT_TOKENS", 300)
    monkeypatch.setattr(demo, "JUDGED_TOKENS", 32)
    monkeypatch.setattr(demo, "PLOTTED_CONTEXTS", range(256, 769, 256))
    assert main(["demo", "--tokens", "3", "--plot", str(tmp_path / "plot.png"), "--json"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert figures["prompt_tokens"] == 300
    assert figures["judged_positions"] == 32
    assert 0 < figures["kl_nats"] < 0.02
    assert figures["top1_agreement"] > 0.9
    assert 0.2 < figures["share"] < 0.8
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")


def test_the_figures_of_the_demonstration_are_those_of_their_definition():
    def run(logits, nbytes, text):
        logits = np.array(logits)
        return demo.Run(text, logits - np.log(np.exp(logits).sum(-1, keepdims=True)), nbytes, 1.0)

    full, packed = run([[0.0, 0.0], [1.0, 0.0]], 100, "a"), run([[np.log(3.0), 0.0], [2.0, 0.0]], 25, "b")
    figures = demo.compare(full, packed)
    p = np.array([[0.5, 0.5], [np.e / (np.e + 1), 1 / (np.e + 1)]])
    q = np.array([[0.75, 0.25], [np.e**2 / (np.e**2 + 1), 1 / (np.e**2 + 1)]])
    assert figures["kl_nats"] == pytest.approx((p * np.log(p / q)).sum(-1).mean())
    assert figures["share"] == 0.25
    assert figures["top1_agreement"] == 1.0
    assert figures["same_text"] is False


def test_the_plot_shows_caches_that_were_filled(monkeypatch):
    monkeypatch.setattr(demo, "PLOTTED_CONTEXTS", range(256, 769, 256))
    model, _ = hooks.load(MODEL)[:2]
    contexts, full, packed = demo.held_bytes(model, SpectralKVCache.with_options(bits_per_value=2.0))
    assert contexts == [256, 512, 768]
    assert full == [n * 6 * 2 * 2 * 64 * mx.float16.size for n in contexts]
    assert packed == sorted(packed)
    assert 0 < packed[-1] < full[-1] / 2
