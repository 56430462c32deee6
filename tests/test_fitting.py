"""Memory and closeness as budgets: the bytes promised are those that caches filled to that length take."""

import json
import mmap

import mlx.core as mx
import numpy as np
import pytest
from conftest import random_codec, random_transforms, tiny_model
from hypothesis import given, settings
from hypothesis import strategies as st
from test_kinds_of_models import build

import vq_kvcache
from vq_kvcache import SpectralKVCache, cli, demo, fitting, hooks
from vq_kvcache.batch_cache import BatchSpectralKVCache
from vq_kvcache.chunks import Chunks
from vq_kvcache.fitting import Fit, Room, fit, settled, size
from vq_kvcache.options import CacheOptions, size_in_bytes
from vq_kvcache.spectral.codec import Codec, fingerprint, stored_path
from vq_kvcache.spectral.intercept import members_of, uses

LIMIT = 512  # of the models of test_kinds_of_models, and of the tiny one


def codec_of(model):
    """Random transforms of the right shapes, with costs that pass for nats."""
    generator = np.random.default_rng(0)
    layers = {
        i: (
            random_transforms(generator, use.heads, use.key_dims),
            None if use.kind == "latent" else random_transforms(generator, use.heads, use.value_dims),
        )
        for i, use in uses(model).items()
    }
    return Codec(fingerprint(model), layers, {"objective": "fisher"})


def held_bytes(caches, plan):
    members = [member for cache in caches for member in members_of(cache)]
    arrays = [c.nbytes if isinstance(c, SpectralKVCache) else sum(a.nbytes for a in own(c)) for c in members]
    return sum(arrays) + sum(layer.nbytes for layer in plan.layers.values())


def own(cache):
    """The arrays of one of mlx-lm's caches."""
    if hasattr(cache, "keys"):
        return [cache.keys, cache.values]
    return [a for a in cache.cache if a is not None]


@pytest.mark.parametrize("kind", ["llama", "gemma3_text", "falcon_h1", "deepseek_v3", "llama4", "deepseek_v32"])
@pytest.mark.parametrize("piece", [200, 31])
def test_the_bytes_promised_are_those_of_a_cache_of_that_length(kind, piece):
    model = tiny_model() if kind == "llama" else build(kind)
    codec, tokens = codec_of(model), 1500
    room = Room(model, 32, 4)
    memory = (room.nbytes(codec.plan(2.0), tokens) + room.nbytes(codec.plan(2.5), tokens)) // 2
    options = SpectralKVCache.with_options(memory=memory, context=tokens, window=32, codec=codec)
    found = fit(model, codec, options)
    assert 2.0 <= found.bits < 2.5
    assert found.tokens == tokens
    assert found.nbytes <= memory < room.nbytes(codec.plan(found.bits + 1 / 16), tokens)
    caches, plan = vq_kvcache.make_prompt_cache(model, cache=options), codec.plan(found.bits)
    while (done := hooks.spectral_caches(caches)[0].offset) < tokens:
        left = tokens - 40 - done  # the last ones by themselves, as they are generated
        x = mx.array(np.random.default_rng(done).integers(0, 96, min(piece, left) if left > 0 else 1))[None]
        model(x, cache=caches)
        mx.eval([c.state for c in caches])
        if x.size == 1:
            assert held_bytes(caches, plan) <= found.nbytes
    # What is promised and not held: a page or two a layer, and what mlx-lm's own caches reserve 256 tokens at a time.
    members = [c for cache in caches for c in members_of(cache)]
    rest = [c for c in members if not isinstance(c, SpectralKVCache) and hasattr(c, "keys")]
    reserved = sum(256 * a.nbytes // a.shape[2] for c in rest for a in own(c))
    slack = 2 * mmap.PAGESIZE * len(plan.layers) + reserved
    assert found.nbytes - slack <= held_bytes(caches, plan) <= found.nbytes


@given(pieces=st.lists(st.integers(1, 900), min_size=1, max_size=30), expected=st.integers(1, 4000))
@settings(max_examples=50, deadline=None)
def test_no_more_is_reserved_than_what_is_expected(pieces, expected):
    chunks, width, total = Chunks(expected=expected), 3, 0
    for piece in pieces:
        count = 64 * -(-piece // 64)
        chunks.append(mx.zeros((1, width, count), mx.uint32))
        total += count
        capacity = sum(chunk.capacity for chunk in chunks.held)
        if total <= expected:
            assert capacity * 4 * width <= expected * 4 * width + mmap.PAGESIZE
        assert total <= capacity <= max(total + 512, 1.25 * total) + mmap.PAGESIZE / (4 * width) + 4


def test_copies_batches_and_files_keep_the_context(codec):
    plan = codec.plan(2.0)
    cache = SpectralKVCache(plan, 0, 32, 4, context=2000)
    cache.update_and_fetch(*(mx.random.normal((1, 2, 300, 32)) for _ in range(2)))
    expected = (2000 - 4 - 32 - 16) // 64 * 64
    vq_kvcache.cache.register_plan(plan)
    batch = BatchSpectralKVCache.merge([cache, cache])
    for twin in (cache, SpectralKVCache.from_state(cache.state), batch, batch.extract(1)):
        assert twin._storage.codes.expected == expected
    assert SpectralKVCache(plan, 0)._storage is None


# What is asked, and what comes of it.


@pytest.fixture(scope="module")
def shipped():
    model = hooks.load(str(demo.model_folder()))[0]
    return model, vq_kvcache.spectral.codec.find_codec(fingerprint(model))


def test_the_largest_budget_for_the_models_own_limit(shipped):
    found = fit(*shipped, CacheOptions(memory="2.5MB"))
    assert found.tokens == shipped[0].args.max_position_embeddings == 4096
    room = Room(shipped[0], 128, 4)
    assert found.nbytes == room.nbytes(shipped[1].plan(found.bits), 4096) <= 2_500_000
    assert room.nbytes(shipped[1].plan(found.bits + 1 / 16), 4096) > 2_500_000
    assert found.predicted_kl == shipped[1].predicted_kl(found.bits, 4096, 128)
    assert fit(*shipped, CacheOptions(memory="1GB")).bits == 8.0


def test_no_budget_below_one_bit_is_chosen_unasked(shipped):
    found = fit(*shipped, CacheOptions(memory="1.8MB"))
    assert found.bits == 1.0
    assert 1000 < found.tokens < 4096
    room = Room(shipped[0], 128, 4)
    assert room.nbytes(shipped[1].plan(1.0), found.tokens) <= 1_800_000
    assert room.nbytes(shipped[1].plan(1.0), found.tokens + 64) > 1_800_000
    asked = fit(*shipped, CacheOptions(memory="1.8MB", context=4096))
    assert asked.bits < 1.0
    assert asked.tokens == 4096


def test_a_closeness_and_a_memory_give_the_tokens(shipped):
    found = fit(*shipped, CacheOptions(memory="2MB", max_kl=0.001))
    assert found.bits == shipped[1].bits_for(0.001)
    assert 500 < found.tokens < 4096
    assert fit(*shipped, CacheOptions(memory="1GB", max_kl=0.001)).tokens == 4096
    assert found.predicted_kl == shipped[1].predicted_kl(found.bits, found.tokens, 128) <= 0.001


@pytest.mark.parametrize("split", [False, True])
def test_a_closeness_is_that_at_the_end_of_the_context_behind_the_window(shipped, split):
    def bits(**options):
        return settled(*shipped, CacheOptions(max_kl=0.001, **options), split).bits_per_value

    assert bits() == shipped[1].bits_for(0.001, 4096, 128)  # the model's own limit
    assert bits(context=400) == shipped[1].bits_for(0.001, 400, 128) < bits() < bits(context=4096, window=32)
    alone = fit(*shipped, CacheOptions(max_kl=0.001, context=9000))
    assert (alone.bits, alone.tokens) == (shipped[1].bits_for(0.001, 9000, 128), 9000)
    assert alone.predicted_kl == shipped[1].predicted_kl(alone.bits, 9000, 128)


def test_without_a_limit_as_many_tokens_as_the_default_budget_leaves(shipped, monkeypatch):
    monkeypatch.setattr(shipped[0].args, "max_position_embeddings", None)
    found = fit(*shipped, CacheOptions(memory="10MB"))
    assert found.bits == CacheOptions().bits_per_value
    assert found.tokens > 10_000
    assert found.nbytes <= 10_000_000


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            {"memory": "500kB"},
            r"memory is 500 kB; expected at least 1.3 MB, which window, sinks and codec take before",
        ),
        (
            {"memory": "1.3MB", "context": 20000},
            r"memory is 1.3 MB; expected 1.9 MB, which 20,000 tokens take at 0.25 bits; allow that much, or a context "
            r"of 8,\d\d\d, which would fit.",
        ),
        (
            {"memory": "2MB", "context": 4096, "max_kl": 0.0001},
            "which 4,096 tokens take at 4.\\d* bits; allow that much",
        ),
        ({}, "neither memory nor max_kl was given; expected one of them"),
    ],
)
def test_what_does_not_fit_is_one_sentence(shipped, options, sentence):
    with pytest.raises(ValueError, match=sentence):
        fit(*shipped, CacheOptions(**options))


def test_the_tokens_said_to_fit_do(shipped):
    room, plan = Room(shipped[0], 128, 4), shipped[1].plan(0.25)
    most = room.tokens(plan, 1_300_000, 20000)
    assert room.nbytes(plan, most) <= 1_300_000 < room.nbytes(plan, most + 1)


def test_a_split_model_keeps_to_budgets(shipped):
    with pytest.raises(ValueError, match="for a model split over several processes, whose parts take different bytes"):
        settled(*shipped, CacheOptions(memory="2MB"), split=True)
    kl = settled(*shipped, CacheOptions(max_kl=0.01), split=True)
    assert (kl.bits_per_value, kl.max_kl) == (shipped[1].bits_for(0.01), None)


def test_costs_without_a_unit_give_no_prediction():
    model = tiny_model()
    codec = random_codec(layers=2, name=fingerprint(model))
    found = fit(model, codec, CacheOptions(memory="1MB"))
    assert found.predicted_kl is None
    assert str(found).endswith("; no prediction of KL, as this codec's costs are in no unit of it")


@pytest.mark.parametrize(
    ("found", "line"),
    [
        (
            Fit(2.125, 131072, 2_012_000_000, 0.00123),
            "2.12 bits: 131,072 tokens in 2.0 GB; predicted KL 0.0012 on text",
        ),
        (Fit(2.0, 100, 999, 0.5), "2.0 bits: 100 tokens in 999 bytes; predicted KL 0.5 on text like the calibration's"),
    ],
)
def test_the_answer_is_one_line(found, line):
    assert str(found).startswith(line)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2GB", 2 * 10**9),
        ("2GiB", 2**31),
        ("500 MB", 5 * 10**8),
        ("1.5g", 15 * 10**8),
        ("64kib", 2**16),
        (77, 77),
        ("77", 77),
    ],
)
def test_sizes(text, expected):
    assert size_in_bytes(text) == expected
    assert size_in_bytes(size(10**9 * 2)) == 2 * 10**9


@pytest.mark.parametrize("text", ["2XB", "GB", "-1GB", "", "2iB", 0, "0GB", True, 1.5, -3])
def test_what_is_no_size(text):
    with pytest.raises(ValueError, match="expected bytes above 0, as a number or as 2GB, 2GiB or 500MB"):
        CacheOptions(memory=text)


@pytest.mark.parametrize("context", [0, -1, 1.0, True])
def test_what_is_no_context(context):
    with pytest.raises(ValueError, match="expected a whole number of tokens, 1 or more"):
        CacheOptions(context=context)


def test_lossless_caches_take_no_memory_option():
    with pytest.raises(ValueError, match="lossless=True takes what it takes; expected no memory with it"):
        CacheOptions(memory=1000, lossless=True)


# On the command line.

MODEL = str(demo.model_folder())
GENERATE = ["generate", "--model", MODEL, "--prompt", "It was", "--max-tokens", "2"]


def test_commands_say_what_they_use_once(capsys, monkeypatch, shipped):
    made = []
    original = hooks.make_prompt_cache
    monkeypatch.setattr(hooks, "make_prompt_cache", lambda *a, **k: made.append(original(*a, **k)) or made[-1])
    monkeypatch.setattr("sys.argv", ["vq_kvcache"])
    assert cli.main([*GENERATE, "--kv-memory", "2.5MB", "--kv-context", "3000"]) == 0
    found = fit(*shipped, CacheOptions(memory="2.5MB", context=3000))
    told = capsys.readouterr().err.splitlines()
    assert told.count(str(found)) == 1
    (caches,) = made
    assert {c._plan_name for c in caches} == {f"{shipped[1].identity}@{found.bits}"}
    assert {c._context for c in caches} == {3000}
    assert cli.main([*GENERATE, "--kv-max-kl", "0.01"]) == 0
    assert str(fit(*shipped, CacheOptions(max_kl=0.01))) in capsys.readouterr().err
    assert cli.main(GENERATE) == 0
    assert "tokens in" not in capsys.readouterr().err


def test_the_answer_is_worked_out_once(shipped, monkeypatch):
    asked = []
    monkeypatch.setattr(fitting, "fit", lambda *a: asked.append(a) or Fit(1.5, 600, 1, None))
    for memory in ("2MB", "2MB", "3MB"):
        options = settled(*shipped, CacheOptions(memory=memory))
        assert (options.bits_per_value, options.context, options.memory) == (1.5, 600, None)
    assert len(asked) == 2


def test_a_codec_file_is_read_and_planned_once(shipped, tmp_path, monkeypatch):
    shipped[1].save(tmp_path / "codec")
    read = []
    original = Codec.load.__func__
    monkeypatch.setattr(Codec, "load", classmethod(lambda cls, path: read.append(path) or original(cls, path)))
    options = SpectralKVCache.with_options(codec=tmp_path / "codec", memory="3MB")
    plans = {id(vq_kvcache.make_prompt_cache(shipped[0], cache=options)[0]._plan) for _ in range(3)}
    assert len(plans) == len(read) == 1


def test_inspect_answers_without_generating(capsys, shipped, model_folder, stored_codec, tmp_path):
    found = fit(*shipped, CacheOptions(memory="2MB", context=3000))
    assert cli.main(["inspect", MODEL, "--kv-memory", "2MB", "--kv-context", "3000"]) == 0
    assert str(found) in capsys.readouterr().out.splitlines()
    assert cli.main(["inspect", MODEL, "--kv-memory", "2MB", "--kv-context", "3000", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fit"] == vars(found) | {"line": str(found)}
    stored_codec.save(tmp_path / "codec")
    assert cli.main(["inspect", str(tmp_path / "codec"), "--kv-memory", "2MB"]) == 1
    assert "is a file; expected a model, whose cache is to fit" in capsys.readouterr().err
    stored_path(stored_codec.fingerprint).unlink()
    assert cli.main(["inspect", str(model_folder), "--kv-max-kl", "0.1"]) == 1
    assert "has no codec, so nothing is fitted; run `vq_kvcache calibrate` first." in capsys.readouterr().err
