"""What the benchmarks of whole steps and long runs count must be what they say; shapes as small as a CPU likes."""

import itertools
import json
import os
import subprocess
import sys

import measure
import memory
import mlx.core as mx
import numpy as np
import pytest
import report
import speed
import speed_tables
from calibration import random_model
from mlx_lm.models.cache import BatchKVCache, KVCache

from vq_kvcache.batch_cache import BatchSpectralKVCache
from vq_kvcache.cache import SpectralKVCache
from vq_kvcache.spectral import intercept
from vq_kvcache.spectral.sealing import BLOCK, LAG

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
    caches = speed.empty(kind, plan, random_model(CONFIG)[0], batch)
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
    assert drift.energy == pytest.approx(1.0, abs=0.15)
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
    assert [getattr(c, "bare_handles", None) for c in caches] == [coded or None] * 2
    with intercept.dispatching():
        loop = itertools.islice(speed.decoding(small, caches, batch), 6)
        seen = [np.array(caches[0].offset).max() for _ in loop]
    assert seen == [TOKENS + n for n in range(2, 8)]


def turn(*spans, sealed=()):
    """Of these intervals, in milliseconds, those in which codes of another block appear."""
    codes = itertools.accumulate((BLOCK * (i in sealed) for i in range(len(spans))), initial=BLOCK)
    return list(zip(np.cumsum([0, *spans]) / 1e3, codes, strict=True))


def test_a_seal_is_felt_where_it_appears_and_in_the_two_intervals_behind():
    told = speed.by_sealing([turn(1, 1, 9, 5, 3, 1, 1, 1, sealed=[2])])
    assert told["seals"] == 1
    assert told["plain_median_ms"] == pytest.approx(1.0)
    assert told["packing_ms"] == pytest.approx((8 + 4 + 2) / 8)
    assert told["mean_ms"] == pytest.approx(22 / 8)


def test_a_turns_first_intervals_are_in_no_median_and_no_seal_is_lost():
    """One at a turn's end is felt in the next turn's first intervals."""
    turns = turn(8, 8, 2, 2, 2, 7, sealed=[5]), turn(8, 8, 3, 3, 4, 5), turn(9, 9, 6, 6, 6, sealed=[0])
    told = speed.by_sealing(list(turns))
    assert told["seals"] == 2
    assert told["turns_ms"] == pytest.approx([2.0, 3.5, 6.0])
    assert told["median_ms"] == pytest.approx(4.0)  # of 2, 2, 2, 7, 3, 3, 4, 5, 6, 6, 6
    assert told["plain_median_ms"] == pytest.approx(3.0)  # without the 7 and a 6
    assert told["packing_ms"] == pytest.approx((4 + 5 + 5 + 6 + 6 + 3) / 17)
    assert told["mean_ms"] == pytest.approx(96 / 17)


def test_kinds_take_turns(small, plan, monkeypatch):
    def turn(player, count):
        calls.append((type(player.caches[0]), count))
        took_turn(player, count)

    def building(model, caches, batch):
        calls.append((type(caches[0]), "by hand"))
        return len(calls), 1.0

    calls, took_turn = [], speed.Player.turn
    monkeypatch.setattr(speed, "WARM", 3)
    monkeypatch.setattr(speed.Player, "turn", turn)
    monkeypatch.setattr(speed, "building", building)
    with intercept.dispatching():
        rows = speed.decode_kinds(small, CONFIG, {"KVCache": None, "spectral 2": plan}, 64, 1, 2)
    assert calls == [(c, n) for n in (3, BLOCK, BLOCK, *["by hand"] * 8) for c in (KVCache, SpectralKVCache)]
    own, row = rows.values()
    assert (own["turns_with"], row["turns_with"]) == (["spectral 2"], ["KVCache"])
    assert (own["build_ms"], row["build_ms"]) == (14, 15)  # medians of 7, 9, ... and of 8, 10, ...
    assert (len(row["turns_ms"]), row["steps"]) == (2, 2 * BLOCK)


def test_packing_is_far_from_a_turns_ends(small, plan):
    """Where contexts are of whole blocks, as those that are measured."""
    with intercept.dispatching():
        player = speed.Player(small, CONFIG, "spectral 2", plan, 4 * BLOCK, 1)
        player.turn(speed.WARM)
        player.turn(BLOCK)
    assert len(player.turns[1]) == BLOCK + 1
    (sealed,) = np.flatnonzero(np.diff([codes for _, codes in player.turns[1]]))
    assert speed.IDLE <= sealed <= BLOCK - 3


# Of a process of its own: what earlier tests left is given back at any time, and would be missed in the bytes.
APART = """
import json, mlx.core as mx, speed, test_speed_benchmarks as tests
mx.set_cache_limit(0)
speed.WARM = 8
model, plan = tests.random_model(tests.CONFIG)[0], speed.random_plan(tests.CONFIG, 2.0)
kinds = {"spectral 2": plan, "KVCache": None}
with tests.intercept.dispatching():
    print(json.dumps(CALL))
"""


def apart(call):
    """The rows that a call gives of a spectral cache, and of mlx-lm's."""
    environment, code = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}, APART.replace("CALL", call)
    told = subprocess.run(
        [sys.executable, "-c", code], env=environment, check=True, capture_output=True, text=True, timeout=300
    )
    return json.loads(told.stdout).values()


def test_decode_steps_seal_once_a_block_and_hold_what_they_say():
    row, own = apart("speed.decode_kinds(model, tests.CONFIG, kinds, 508, 1, 2)")
    assert row["seals"] == 2
    assert own["seals"] == 0
    for told in (row, own):
        assert told["active_bytes"] == pytest.approx(told["nbytes"], rel=0.01)
        assert 0 < told["plain_median_ms"] <= 2 * told["median_ms"]
        assert min(told["append_ms"], told["build_ms"], told["send_ms"]) > 0
        assert told["peak_above_nbytes"] >= told["steady_peak_above_nbytes"] >= 0
    assert own["peak_above_nbytes"] < 1e5 < row["nbytes"]  # what others hold is not its own
    assert own["nbytes"] == 2 * 2 * 2 * 64 * 2 * 768  # layers, parts, heads, dims, bytes, room for 508 + 138 tokens
    assert row["nbytes"] < own["nbytes"]


def test_a_prompt_is_read_in_pieces_and_held_as_nbytes_and_codec():
    prefill = "speed.prefill_kind(model, tests.CONFIG, kind, own, 300, piece=128)"
    row, own = apart(f"{{kind: {prefill} for kind, own in kinds.items()}}")
    for told in (row, own):
        assert len(told["ends_s"]) == 3
        assert told["seconds"] == told["ends_s"][-1] > told["ends_s"][0] > 0
        assert told["tokens_per_s"] == pytest.approx(300 / told["seconds"])
        assert told["active_above_weights"] == pytest.approx(told["nbytes"] + told["codec_bytes"], rel=0.01)
        assert told["peak_above_weights"] > told["active_above_weights"]
    assert own["codec_bytes"] == 0 < row["codec_bytes"]


def test_finished_cells_are_kept_and_failed_ones_run_again(tmp_path):
    def run(part, kinds):
        calls.append(part)
        if part == "b" and len(calls) == 2:
            raise RuntimeError("no such kernel\nsecond line")
        return {kind: {"median_ms": 1.0} for kind in kinds}

    file, calls = tmp_path / "speed.json", []
    measure.Results(file, {"layers": 2}).cell("x", {"a": ["a"], "b": ["b"], "c, d": ["c", "d"]}, run)
    kept, row = json.loads(file.read_text()), {"median_ms": 1.0}
    assert kept["cells"] == {"x": {"a": row, "error": "b: no such kernel", "c": row, "d": row}}
    measure.Results(file, {"layers": 2}).cell("x", {"b": ["b"]}, run)
    measure.Results(file, {"layers": 2}).cell("x", {"b": ["b"]}, run)
    assert calls == ["a", "b", "c, d", "b"]
    assert measure.Results(file, {"layers": 3}).cells == {}


def test_the_command_measures_all_once(tmp_path, monkeypatch, capsys):
    file = tmp_path / "speed.json"
    options = "--small --layers 1 --rounds 1 --decode 300x1,300x2 --four-bit 300x1 --prefill 300"
    monkeypatch.setattr(sys, "argv", ["speed.py", *options.split(), "--out", str(file)])
    speed.main()
    first = file.read_bytes()
    cells = json.loads(first)["cells"]
    assert list(cells) == ["decode bf16 300x1", "decode bf16 300x2", "prefill bf16 300", "decode 4-bit 300x1"]
    assert [list(c) for c in cells.values()] == [
        ["KVCache, alone", "KVCache", "spectral 2"],
        ["BatchKVCache, alone", "KVCache without padding, alone", "KVCache without padding", "spectral 2"],
        ["KVCache", "spectral 2"], ["KVCache, alone", "KVCache", "spectral 2"],
    ]  # fmt: skip
    beside = {kind: row["turns_with"] for kind, row in cells["decode bf16 300x2"].items()}
    assert beside["BatchKVCache, alone"] == beside["KVCache without padding, alone"] == []
    assert beside["spectral 2"] == ["KVCache without padding"]
    capsys.readouterr()
    speed.main()
    assert capsys.readouterr().out.count("measured before") == 4
    assert file.read_bytes() == first


@pytest.mark.parametrize("place", ["ops", "cuda"])
def test_the_large_shape_is_not_timed_in_plain_operations(monkeypatch, place):
    monkeypatch.setattr(speed.kernels, "backend", lambda: place)
    monkeypatch.setattr(speed, "trusted", lambda *_: False)
    with pytest.raises(SystemExit, match=rf"no kernels that are right on .*, {place}; expected"):
        speed.warm_kernels(speed.LLAMA_8B)
    assert not speed.warm_kernels(CONFIG)["right"]


def test_a_long_run_tells_what_is_held_beside_nbytes(model, codec, exact_buffers):
    caches = [SpectralKVCache(codec.plan(2.0), i, window=32) for i in range(2)]
    rows = memory.long_run(model, caches, 4 * BLOCK, BLOCK)
    assert [r["tokens"] for r in rows] == [BLOCK * n + 1 for n in range(1, 5)]
    assert rows[-1]["nbytes"] == sum(c.nbytes for c in caches)
    above = [r["active_above_nbytes"] for r in rows]
    assert max(above) - min(above) <= 16384
    assert all(0 < r["median_ms"] <= 3 * r["mean_ms"] for r in rows)


def test_long_runs_of_every_cache_are_saved_after_a_short_one(tmp_path, monkeypatch, model):
    def seen(*arguments):
        calls.append(arguments[2:])
        return run(*arguments)

    file, run, calls = tmp_path / "long-run.json", memory.long_run, []
    monkeypatch.setattr(memory, "long_run", seen)
    memory.measure_long_runs(model, {"full precision": KVCache, "again": KVCache}, 4, 2, file)
    saved = json.loads(file.read_text())
    assert (saved["steps"], saved["block"]) == (4, 2)
    assert {name: len(cell["blocks"]) for name, cell in saved["cells"].items()} == {"full precision": 2, "again": 2}
    assert calls == [(4, memory.WARM_STEPS), (4, 2)] * 2


def step(median, **more):
    return {
        "median_ms": median, "mean_ms": median, "build_ms": 1.0, "nbytes": 2e9, "append_ms": 0.5,
        "packing_ms": 0.25, "steady_peak_above_nbytes": 1e8, **more,
    }  # fmt: skip


def measured(**cells):
    cells = {name.replace("_", " "): cell for name, cell in cells.items()}
    return {"machine": {"device": "D"}, "shape": "S", "layers": 2, "steps": 256, "cells": cells}


def test_steps_are_held_against_the_fastest_of_mlx_lms_caches():
    own = {"BatchKVCache": step(12.0), "KVCache without padding": step(9.0)}
    table = speed_tables.speed(measured(decode_bf16_512x8=own | {"spectral 2": step(4.5)}))
    row = next(line for line in table.split("\n") if "| spectral 2 |" in line)
    assert (
        row == "| 512, 8, bf16 | spectral 2 | 2.00 GB | 4.50 ms | 2.00 | 1.0 ms | 0.25 ms (5.6%) | 0.50 ms | 0.10 GB |"
    )
    assert "| 512, 8, bf16 | BatchKVCache | 2.00 GB | 12.00 ms |  | 1.0 ms |  | 0.50 ms | 0.10 GB |" in table


def test_caches_that_took_turns_are_held_against_each_other_round_by_round():
    own = {"BatchKVCache": step(12.0), "KVCache without padding": step(9.0, turns_ms=[10.0, 8.0, 9.0])}
    ours = step(9.0, turns_ms=[5.0, 16.0, 3.0], turns_with=["KVCache without padding"])
    table = speed_tables.speed(measured(decode_bf16_512x8=own | {"spectral 2": ours}))
    assert "256 steps by turns, times as fast: median of the rounds, least and most:" in table
    assert "| spectral 2 | 2.00 GB | 9.00 ms | 2.00 (0.50 to 3.00) |" in table
    alone = {"BatchKVCache": step(4.5, turns_ms=[1.0, 1.0, 1.0])}
    table = speed_tables.speed(measured(decode_bf16_512x8=alone | {"spectral 2": ours}))
    assert "| spectral 2 | 2.00 GB | 9.00 ms | 0.50 |" in table
    faster = own | {"KVCache without padding, alone": step(4.5)}
    table = speed_tables.speed(measured(decode_bf16_512x8=faster | {"spectral 2": ours}))
    assert "| spectral 2 | 2.00 GB | 9.00 ms | 2.00 (0.50 to 3.00); alone 0.50 |" in table


def test_every_machine_has_a_table():
    own = {"KVCache": step(9.0), "spectral 2": step(4.5)}
    runs = [measured(decode_bf16_512x1=own), measured(decode_bf16_64x1=own)]
    runs[1]["machine"] = {"device": "another GPU"}
    table = speed_tables.speed(runs[0], None, runs[1])
    assert table.index("| 512, 1, bf16 | spectral 2") < table.index("on another GPU") < table.index("| 64, 1, bf16 |")
    assert speed_tables.speed(None, runs[1]) in table


def test_cells_that_failed_are_named():
    cell = {"KVCache": step(1.2), "error": "spectral 2: no memory"}
    table = speed_tables.speed(measured(decode_bf16_512x1=cell, prefill_bf16_64={"error": "x"}))
    assert "Not run: decode bf16 512x1: spectral 2: no memory; prefill bf16 64: x." in table


def test_prompts_tell_speed_peak_and_what_is_held():
    row = {"tokens_per_s": 5000.4, "peak_above_weights": 3e9, "active_above_weights": 1e9}
    cell = {"spectral 2": row | {"nbytes": 8e8, "codec_bytes": 1e8}}
    table = speed_tables.speed(measured(prefill_bf16_32768=cell))
    assert table.endswith("| 32,768 | spectral 2 | 5,000 | 3.00 GB | 1.00 GB | 0.90 GB |")


def long_run(*figures):
    """A result whose blocks have these nbytes, bytes above them, and medians."""
    rows = [{"nbytes": n, "active_above_nbytes": a, "median_ms": m} for n, a, m in figures]
    cells = {"spectral 2.0": {"blocks": rows}, "full precision": {"error": "e"}}
    return {"machine": {"device": "D"}, "steps": 3000, "block": 1000, "cells": cells}


def test_long_runs_tell_the_first_block_and_the_last():
    table = speed_tables.long_run(long_run((10, 5, 1.0), (20, 9, 1.5), (30, 6, 1.25)))
    assert table.endswith("| spectral 2.0 | 10; 30 | 5; 6 | 5; 9 | 1.00 ms; 1.25 ms |")


@pytest.mark.parametrize(
    ("name", "made"),
    [("speed", measured(decode_bf16_512x1={"KVCache": step(2.0)})), ("long-run", long_run((10, 5, 1.0)))],
)
def test_readme_is_checked_before_and_after_a_result_comes(tmp_path, monkeypatch, name, made):
    def run(*options):
        monkeypatch.setattr(sys, "argv", ["report.py", *options])
        report.main()

    for file in report.RESULTS.glob("*.json"):
        if not file.stem.startswith(name):
            (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "README.md").write_bytes(report.README.read_bytes())
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    monkeypatch.setattr(report, "README", tmp_path / "README.md")
    for there in (False, True):
        if there:
            (tmp_path / f"{name}.json").write_text(json.dumps(made))
            with pytest.raises(SystemExit, match=r"README.md differs"):
                run("--check")
        run()
        run("--check")
        assert ("not measured yet" in report.tables()[name]) is not there
