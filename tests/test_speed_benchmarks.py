"""What the benchmarks of whole steps and long runs count must be what they say; shapes as small as a CPU likes."""

import json
import sys

import mlx.core as mx
import numpy as np
import pytest
import speed
from calibration import random_model
from mlx_lm.models.cache import BatchKVCache, KVCache

from vq_kvcache.batch_cache import BatchSpectralKVCache
from vq_kvcache.cache import SpectralKVCache
from vq_kvcache.spectral import intercept
from vq_kvcache.storage import BLOCK, LAG

CONFIG = speed.SMALL | {"num_hidden_layers": 2}
TOKENS = 4 + 128 + LAG + 2 * BLOCK  # sinks, window, and two packed blocks


@pytest.fixture(scope="module")
def small():
    return random_model(CONFIG)[0]


@pytest.fixture(scope="module")
def plan():
    return speed.random_plan(CONFIG, 2.0)


@pytest.fixture
def exact_buffers():
    before = mx.set_cache_limit(0)
    yield
    mx.set_cache_limit(before)


def filled(kind, plan, batch=1, tokens=TOKENS):
    caches = speed.empty(kind, plan, 2, batch)
    speed.fill(caches, CONFIG, tokens, batch, 100)
    return caches


def test_the_random_codec_keeps_its_budget_and_every_layer_its_own_arrays(plan):
    numbers = 2 * CONFIG["num_key_value_heads"] * CONFIG["head_dim"]
    for layer in plan.layers.values():
        assert 32 * (layer.keys.words + layer.values.words) == 2 * numbers
    widths = {w for head in plan.layers[0].keys.widths for w in head}
    assert len(widths) >= 4
    before = np.array(plan.layers[1].keys.mean)
    plan.layers[0].keys.mean += 1.0
    assert (np.array(plan.layers[1].keys.mean) == before).all()
    plan.layers[0].keys.mean -= 1.0


def test_what_caches_are_filled_with_is_like_the_random_codecs_calibration(plan):
    """Else a warning would end, in the middle of a run, what every seal does otherwise."""
    drift = filled("spectral 2", plan, tokens=1500)[0].drift
    assert drift.overload == pytest.approx(1.0, abs=0.15)
    assert not drift.is_large


@pytest.mark.parametrize(
    ("kind", "coded", "batch", "made"),
    [
        ("KVCache", False, 1, KVCache),
        ("BatchKVCache", False, 2, BatchKVCache),
        ("KVCache without padding", False, 2, KVCache),
        ("spectral 2", True, 1, SpectralKVCache),
        ("spectral 2", True, 2, BatchSpectralKVCache),
    ],
)
def test_a_step_is_a_token_of_every_row(small, plan, kind, coded, batch, made):
    """The loop runs one step ahead, and needs none of them to be read."""
    caches = filled(kind, plan if coded else None, batch)
    assert [type(c) for c in caches] == [made] * 2
    with intercept.dispatching():
        seen = [np.array(caches[0].offset).max() for _ in speed.decoding(small, caches, batch, 6)]
    assert seen == [TOKENS + n for n in range(2, 8)]


def test_a_seal_is_felt_where_it_appears_and_in_the_two_intervals_behind():
    times = np.cumsum([0, 1, 1, 9, 5, 3, 1, 1, 1]) / 1e3
    packed = [64, 64, 64, 128, 128, 128, 128, 128, 128]
    told = speed.by_sealing(times.tolist(), packed)
    assert told["seals"] == 1
    assert [told["plain_median_ms"], told["plain_mean_ms"]] == pytest.approx([1.0, 1.0])
    assert told["mean_ms"] == pytest.approx(22 / 8)


def test_decode_steps_seal_once_a_block_and_hold_what_they_say(small, plan, exact_buffers):
    with intercept.dispatching():
        row = speed.decode_kind(small, CONFIG, "spectral 2", plan, TOKENS, 1, 2 * BLOCK)
        own = speed.decode_kind(small, CONFIG, "KVCache", None, TOKENS, 1, 2 * BLOCK)
    assert row["seals"] == 2
    assert own["seals"] == 0
    for told in (row, own):
        assert told["active_bytes"] == pytest.approx(told["nbytes"], rel=0.01)
        assert 0 < told["plain_median_ms"] <= 2 * told["median_ms"]
        assert min(told["append_ms"], told["build_ms"]) > 0
        assert told["peak_above_nbytes"] >= 0
    assert own["nbytes"] == 2 * 2 * 2 * 64 * 2 * 512  # layers, parts, heads, dims, bytes, room for 276 + 138 tokens
    assert row["nbytes"] < own["nbytes"]


def test_a_prompt_is_read_in_pieces_and_held_as_nbytes_and_codec(small, plan, exact_buffers):
    with intercept.dispatching():
        row = speed.prefill_kind(small, CONFIG, "spectral 2", plan, 300, piece=128)
        own = speed.prefill_kind(small, CONFIG, "KVCache", None, 300, piece=128)
    for told in (row, own):
        assert len(told["ends_s"]) == 3
        assert told["seconds"] == told["ends_s"][-1] > told["ends_s"][0] > 0
        assert told["tokens_per_s"] == pytest.approx(300 / told["seconds"])
        assert told["active_above_weights"] == pytest.approx(told["nbytes"] + told["codec_bytes"], rel=0.01)
        assert told["peak_above_weights"] > told["active_above_weights"]
    assert own["codec_bytes"] == 0 < row["codec_bytes"]


def test_finished_cells_are_kept_and_failed_ones_run_again(tmp_path):
    def run(kind, _):
        calls.append(kind)
        if kind == "b" and len(calls) == 2:
            raise RuntimeError("no such kernel\nsecond line")
        return {"median_ms": 1.0}

    file, calls = tmp_path / "speed.json", []
    speed.Results(file, {"layers": 2}).cell("x", {"a": None, "b": None, "c": None}, run)
    kept = json.loads(file.read_text())
    assert kept["cells"] == {"x": {"a": {"median_ms": 1.0}, "error": "b: no such kernel", "c": {"median_ms": 1.0}}}
    speed.Results(file, {"layers": 2}).cell("x", {"b": None}, run)
    speed.Results(file, {"layers": 2}).cell("x", {"b": None}, run)
    assert calls == ["a", "b", "c", "b"]
    assert speed.Results(file, {"layers": 3}).cells == {}


def test_the_command_measures_all_once(tmp_path, monkeypatch, capsys):
    file = tmp_path / "speed.json"
    options = "--small --layers 1 --steps 64 --decode 300x1,300x2 --four-bit 300x1 --prefill 300"
    monkeypatch.setattr(sys, "argv", ["speed.py", *options.split(), "--out", str(file)])
    speed.main()
    cells = json.loads(file.read_text())["cells"]
    assert list(cells) == ["decode bf16 300x1", "decode bf16 300x2", "prefill bf16 300", "decode 4-bit 300x1"]
    assert [list(c) for c in cells.values()] == [
        ["KVCache", "spectral 2"], ["BatchKVCache", "KVCache without padding", "spectral 2"],
        ["KVCache", "spectral 2"], ["KVCache", "spectral 2"],
    ]  # fmt: skip
    capsys.readouterr()
    speed.main()
    assert capsys.readouterr().out.count("measured before") == 4
