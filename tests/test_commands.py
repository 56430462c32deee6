"""mlx_lm's own commands with the cache on: chat, prompt-cache files, evaluate, benchmark, and the budgets they take."""

import importlib.metadata
import io
import json
import shutil
import sys
import types

import mlx.core as mx
import pytest
from conftest import module, random_codec, random_prompt, tiny_tokenizer
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.cache import KVCache, RotatingKVCache

from vq_kvcache import SpectralKVCache, cli, hooks
from vq_kvcache.spectral.codec import stored_path

TEMPLATE = "{% for message in messages %}{{ message['content'] }} {% endfor %}"


def words(count, seed):
    return " ".join(f"w{i}" for i in random_prompt(count, seed))


@pytest.fixture(autouse=True)
def _restored(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["vq_kvcache"])
    for name in ("chat", "cache_prompt", "benchmark", "evaluate"):  # so that each command binds its names anew
        monkeypatch.delitem(sys.modules, f"mlx_lm.{name}", raising=False)


@pytest.fixture(scope="session")
def folder(model_folder, tmp_path_factory):
    """The tiny model with a chat template that is the messages themselves."""
    copy = tmp_path_factory.mktemp("chat") / "tiny-llama"
    shutil.copytree(model_folder, copy)
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(copy)
    return str(copy)


@pytest.fixture
def lossless(monkeypatch):
    """Commands make lossless caches of window 32, whatever budget they are given."""
    options = SpectralKVCache.with_options(lossless=True, window=32)
    monkeypatch.setattr(cli, "cache_options", lambda parser, given: options)


@pytest.fixture
def made(monkeypatch):
    """Every list of caches that a command's own make_prompt_cache made."""
    seen = []
    original = hooks.make_prompt_cache

    def make(*args, **kwargs):
        seen.append(original(*args, **kwargs))
        return seen[-1]

    monkeypatch.setattr(hooks, "make_prompt_cache", make)
    return seen


def run(capsys, *arguments):
    """Output of a command that succeeds."""
    assert cli.main([str(a) for a in arguments]) == 0
    return capsys.readouterr().out


def chat(capsys, monkeypatch, folder, *options):
    turns = [words(60, seed) for seed in range(5)]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join([*turns[:3], "h", *turns[3:], "q"]) + "\n"))
    text = run(capsys, "chat", "--model", folder, "--max-tokens", 6, *options)
    return [w for w in text.split() if w.startswith("w") and w[1:].isdigit()]


def test_chat_over_many_turns_says_what_it_said(capsys, monkeypatch, folder, lossless, made):
    expected = chat(capsys, monkeypatch, folder, "--kv-cache", "full")
    assert len(expected) >= 30
    assert made == []
    assert chat(capsys, monkeypatch, folder) == expected
    (caches,) = made
    assert [type(c) for c in caches] == [SpectralKVCache] * 2
    assert caches[0].offset >= 5 * 66 - 1  # one cache over all turns
    assert caches[0].stats()["packed_tokens"] >= 256


def test_reset_starts_over(capsys, monkeypatch, folder, lossless, made):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{words(200, 1)}\nr\n{words(9, 1)}\nq\n"))
    run(capsys, "chat", "--model", folder, "--max-tokens", 2)
    assert len(made) == 2
    assert 200 <= made[0][0].offset < 204
    assert 9 <= made[1][0].offset < 13


@pytest.mark.parametrize("command", ["chat", "cache_prompt"])
def test_max_kv_size_turns_the_cache_off_and_says_so(capsys, monkeypatch, folder, lossless, made, tmp_path, command):
    monkeypatch.setattr(sys, "stdin", io.StringIO("q\n"))
    rest = {"chat": [], "cache_prompt": ["--prompt", "w5", "--prompt-cache-file", tmp_path / "c.safetensors"]}[command]
    assert cli.main([str(a) for a in (command, "--model", folder, "--max-kv-size", 64, *rest)]) == 0
    sentence = "warning: max_kv_size=64 drops old tokens instead of packing them: the spectral cache is off."
    assert sentence in capsys.readouterr().err
    assert [type(c) for c in made[0]] == [RotatingKVCache] * 2
    assert made[0][0].max_size == 64


def test_commands_imported_before_are_hooked_too(capsys, monkeypatch, folder, lossless, made):
    bound = module("mlx_lm.chat")
    theirs = bound.make_prompt_cache
    chat(capsys, monkeypatch, folder, "--max-kv-size", 64)
    assert [type(c) for c in made[0]] == [RotatingKVCache] * 2
    assert bound.make_prompt_cache is theirs


def cache_prompt(capsys, folder, file, *options):
    run(capsys, "cache_prompt", "--model", folder, "--prompt", words(300, 3), "--prompt-cache-file", file, *options)


def generate(capsys, folder, *options):
    return run(capsys, "generate", "--model", folder, "--prompt", words(5, 4), "--max-tokens", 12, *options)


def body(text):
    return text.split("==========")[1]


def test_a_prompt_cache_file_goes_on_where_it_stopped(capsys, folder, lossless, tmp_path):
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    cache_prompt(capsys, folder, ours)
    cache_prompt(capsys, folder, theirs, "--kv-cache", "full")
    assert [type(c) for c in mlx_lm_cache.load_prompt_cache(str(theirs))] == [KVCache] * 2
    with hooks.install():
        (cache, _) = mlx_lm_cache.load_prompt_cache(str(ours))
        assert cache.stats()["packed_tokens"] >= 192
    expected = body(generate(capsys, folder, "--prompt-cache-file", theirs, "--kv-cache", "full"))
    assert body(generate(capsys, folder, "--prompt-cache-file", ours)) == expected
    assert body(generate(capsys, folder)) != expected


def test_a_packed_prompt_cache_is_smaller_and_needs_its_codec(capsys, folder, stored_codec, tmp_path):
    """The file is read before the model is loaded: its codec is found by the names in it."""
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    options = ["--kv-avg-bits", 2, "--kv-window", 32]
    cache_prompt(capsys, folder, ours, *options)
    cache_prompt(capsys, folder, theirs, "--kv-cache", "full")
    assert ours.stat().st_size < 0.7 * theirs.stat().st_size
    assert "Generation: 12 tokens" in generate(capsys, folder, "--prompt-cache-file", ours)
    hooks.uninstall()
    cache_module = sys.modules["vq_kvcache.cache"]
    cache_module._plans = {name: p for name, p in cache_module._plans.items() if name == "lossless"}
    random_codec(layers=2, name=stored_codec.fingerprint, seed=9).save(stored_path(stored_codec.fingerprint))
    line = ["generate", "--model", folder, "--prompt", "w5", "--prompt-cache-file", str(ours)]
    assert cli.main(line) == 1
    assert f"was packed by codec {stored_codec.identity} of model {stored_codec.fingerprint}" in capsys.readouterr().err


def test_a_prompt_cache_of_another_model_is_refused(capsys, folder, codec, tmp_path, monkeypatch):
    other = random_codec(layers=2, name="llama-0123456789abcdef")
    other.save(stored_path(other.fingerprint))
    plan = other.plan(2.0)
    caches = [SpectralKVCache(plan, i) for i in range(2)]
    for cache in caches:
        cache.update_and_fetch(*(mx.random.normal((1, 2, 300, 32)) for _ in range(2)))
    file = str(tmp_path / "other.safetensors")
    with hooks.install():
        mlx_lm_cache.save_prompt_cache(file, caches, {"model": folder, "tokenizer_config": "{}"})
    line = ["generate", "--model", folder, "--prompt", "w5", "--prompt-cache-file", file]
    assert cli.main(line) == 1
    assert "the prompt cache was packed for model llama-0123456789abcdef; this model is" in capsys.readouterr().err


def test_benchmark_runs_with_the_cache(capsys, folder, stored_codec, made):
    text = run(capsys, "benchmark", "--model", folder, "-p", 200, "-g", 5, "-n", 2)
    assert text.count("generation_tps=") == 3
    assert [type(c) for caches in made for c in caches] == [SpectralKVCache] * 6
    assert all(caches[0].offset >= 204 for caches in made)


@pytest.fixture
def lm_eval(monkeypatch):
    """What mlx_lm.evaluate asks of lm_eval, and a task of two questions of this test's own."""
    package, api = types.ModuleType("lm_eval"), types.ModuleType("lm_eval.api")
    model, registry = types.ModuleType("lm_eval.api.model"), types.ModuleType("lm_eval.api.registry")
    model.LM = type("LM", (), {"__init__": lambda self: None})
    registry.register_model = lambda name: lambda cls: cls
    questions = [(words(200, 1), f" {w}") for w in ("w5", "w9", "w11")] + [(words(9, 2), " w5")]

    def simple_evaluate(model, tasks, **options):
        found = model.loglikelihood([types.SimpleNamespace(args=q) for q in questions])
        rolling = model.loglikelihood_rolling([types.SimpleNamespace(args=(words(60, s),)) for s in range(3)])
        return {"results": {tasks[0]: {"scores": [s for s, _ in found], "rolling": rolling}}}

    package.simple_evaluate = simple_evaluate
    for name, m in {"": package, ".api": api, ".api.model": model, ".api.registry": registry}.items():
        monkeypatch.setitem(sys.modules, f"lm_eval{name}", m)
    original = importlib.metadata.version
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0" if name == "lm_eval" else original(name))


def test_evaluate_scores_a_local_task(capsys, folder, lm_eval, lossless, made, tmp_path):
    def scores(*options):
        run(capsys, "evaluate", "--model", folder, "--tasks", "mine", "--output-dir", tmp_path, *options)
        (file,) = tmp_path.glob("eval_*")
        return json.loads(file.read_text())["mine"]

    expected = scores("--kv-cache", "full")
    assert made == []
    found = scores()
    assert made
    assert all(type(c) is SpectralKVCache for caches in made for c in caches)
    assert found["scores"] == pytest.approx(expected["scores"], abs=1e-4)
    assert found["rolling"] == pytest.approx(expected["rolling"], abs=1e-4)
    assert len(set(expected["scores"])) == 4


# Budgets.


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("", (2.0, 128, 4, None, None)),
        ("--kv-avg-bits 3.5 --kv-window 9 --kv-sinks 0 --kv-codec a", (3.5, 9, 0, "a", None)),
        ("--kv-key-bits 3 --kv-value-bits 2", ((3.0, 2.0), 128, 4, None, None)),
        ("--kv-max-kl 0.01", (2.0, 128, 4, None, 0.01)),
    ],
)
def test_options_become_a_cache(line, expected):
    parser = cli.cache_parser("generate")
    options = cli.cache_options(parser, parser.parse_args(line.split()))
    assert (options.bits_per_value, options.window, options.sinks, options.codec, options.max_kl) == expected


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("--kv-key-bits 3", "one of --kv-key-bits and --kv-value-bits was given; expected both"),
        ("--kv-value-bits 3 --kv-avg-bits 2", "one of --kv-key-bits and --kv-value-bits was given; expected both"),
        ("--kv-key-bits 3 --kv-value-bits 2 --kv-avg-bits 2", "several budgets were given; expected one of"),
        ("--kv-max-kl 0.1 --kv-avg-bits 2", "several budgets were given; expected one of"),
    ],
)
def test_contradicting_budgets_are_refused(capsys, line, sentence):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["generate", *line.split()])
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize("command", cli.MLX_LM)
def test_help_shows_both_kinds_of_options(capsys, lm_eval, command):
    with pytest.raises(SystemExit, match="0"):
        cli.main([command, "--help"])
    text = capsys.readouterr().out
    ours = [a.option_strings[0] for a in cli.cache_parser(command)._actions]
    assert len(ours) == 10
    assert all(name in text for name in [*ours, "--model"])
