"""Where things go wrong around the cache: folders that cannot be written, numbers that are none, several writers."""

import concurrent.futures
import errno
import os
import pathlib
import subprocess
import sys
import threading
import warnings

import mlx.core as mx
import numpy as np
import pytest
from conftest import (
    PRISTINE,
    PROMPT,
    numpy,
    pair,
    random_codec,
    random_prompt,
    symbols,
    tiny_model,
    tiny_tokenizer,
)

import vq_kvcache
from vq_kvcache import SpectralKVCache, attachment, hooks
from vq_kvcache.batch_cache import BatchSpectralKVCache
from vq_kvcache.spectral import calibrate, intercept
from vq_kvcache.spectral.codec import Codec, fingerprint, stored_path
from vq_kvcache.spectral.files import cache_folder

HERE = pathlib.Path(__file__).resolve().parent
TEXT = " ".join(f"w{i}" for i in random_prompt(96))


def quick(monkeypatch):
    """Calibration on a few words, whoever asks."""
    original = calibrate.calibrate_codec
    monkeypatch.setattr(
        calibrate, "calibrate_codec", lambda model, tokenizer: original(model, tokenizer, 2, 48, texts=[TEXT], window=8)
    )


# Folders.


CALIBRATE = """
import sys
from conftest import tiny_model, tiny_tokenizer
from vq_kvcache.spectral import calibrate, partial
partial.SECONDS_BETWEEN_SAVES = 0.0
original = calibrate.calibrate_codec
calibrate.calibrate_codec = lambda m, t: original(m, t, 6, 48, texts=[sys.argv[1]], window=8)
print("ready", flush=True)
sys.stdin.readline()
print(calibrate.codec_for(tiny_model(), tiny_tokenizer()).identity)
"""


def test_two_processes_calibrate_the_same_model_at_once(tmp_path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", CALIBRATE, " ".join([TEXT] * 4)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, env=environment, text=True,
        )
        for _ in range(2)
    ]  # fmt: skip
    for child in children:
        assert child.stdout.readline() == "ready\n"
    for child in children:
        child.stdin.write("\n")
        child.stdin.flush()
    said = [child.communicate(timeout=120) for child in children]
    assert [child.returncode for child in children] == [0, 0], said
    name = fingerprint(tiny_model())
    assert [p.name for p in stored_path(name).parent.iterdir()] == [stored_path(name).name]
    assert {out.strip() for out, _ in said} == {Codec.load(stored_path(name)).identity}
    assert not (cache_folder() / "partial").exists()


@pytest.mark.parametrize(
    ("call", "number"),
    [("open", errno.EROFS), ("mkdir", errno.EACCES), ("fsync", errno.ENOSPC), ("replace", errno.EIO)],
)
def test_a_folder_that_takes_nothing_costs_a_warning_and_no_more(monkeypatch, call, number):
    quick(monkeypatch)

    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    original = open
    if call == "open":
        monkeypatch.setattr("builtins.open", lambda *a, **k: fail() if "xb" in a else original(*a, **k))
    elif call == "mkdir":
        monkeypatch.setattr(pathlib.Path, "mkdir", fail)
    else:
        monkeypatch.setattr(os, call, fail)
    with pytest.warns(UserWarning, match=rf"the codec could not be stored in .*\({os.strerror(number)}\)"):
        made = calibrate.codec_for(tiny_model(), tiny_tokenizer())
    assert sorted(made.layers) == [0, 1]
    folder = stored_path(made.fingerprint).parent
    assert not folder.exists() or not list(folder.iterdir())


FULL = """
import resource, signal, sys
from conftest import random_codec
from vq_kvcache.spectral.codec import stored_path
codec = random_codec(2, 2, 32, name="llama-1")
codec.save(stored_path("llama-1"))
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    random_codec(2, 2, 32, name="llama-1", seed=1).save(stored_path("llama-1"))
except OSError as error:
    print(codec.identity, error.strerror)
"""


def test_a_disk_that_fills_up_keeps_the_old_codec():
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(HERE.parent), str(HERE)])}
    said = subprocess.run(
        [sys.executable, "-c", FULL], env=environment, capture_output=True, text=True, check=True, timeout=60
    ).stdout
    identity, _, why = said.strip().partition(" ")
    assert why == "File too large"
    assert Codec.load(stored_path("llama-1")).identity == identity
    assert [p.name for p in stored_path("llama-1").parent.iterdir()] == ["llama-1.safetensors"]


def test_a_folder_that_is_not_there_is_made(monkeypatch, tmp_path):
    quick(monkeypatch)
    monkeypatch.setenv("VQ_KVCACHE_HOME", str(tmp_path / "not" / "there" / "yet"))
    made = calibrate.codec_for(tiny_model(), tiny_tokenizer())
    assert Codec.load(stored_path(made.fingerprint)).identity == made.identity


# Numbers that are none.


BAD = [float("nan"), float("inf"), float("-inf")]


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("part", [0, 1])
def test_a_token_of_nan_spoils_no_other_token(packed, bad, part):
    clean, spoilt = packed(), packed()
    vectors = [np.array(x) for x in pair(300)]
    with_nan = [x.copy() for x in vectors]
    with_nan[part][:, :, 52] = bad
    for start in range(0, 300, 10):
        for cache, arrays in ((clean, vectors), (spoilt, with_nan)):
            cache.update_and_fetch(*(mx.array(x[:, :, start : start + 10]) for x in arrays))
    assert spoilt.stats()["packed_tokens"] == 192
    np.testing.assert_array_equal(
        *(np.delete(np.array(c._storage.codes.words(0, 192)), 48, axis=2) for c in (clean, spoilt))
    )
    for fetched in zip(*(c.keys_and_values() for c in (clean, spoilt)), strict=True):
        expected, found = (numpy(x) for x in fetched)
        assert np.isfinite(found).all()  # what is packed is a number
        np.testing.assert_array_equal(*(np.delete(x, 52, axis=2) for x in (expected, found)))
    assert np.isfinite(spoilt.drift.energy)


@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("part", [0, 1])
def test_a_row_of_nan_spoils_no_other_row_and_itself_no_longer_than_the_token_is_exact(packed, bad, part):
    rows = [packed() for _ in range(3)]
    for row, count in zip(rows, (300, 120, 20), strict=True):
        row.update_and_fetch(*pair(count))
    batch, fine = BatchSpectralKVCache.merge(rows), []
    with intercept.dispatching():
        for step in range(200):
            vectors = [np.array(x) for x in pair(1, 3, seed=step)]
            if step == 3:
                vectors[part][1] = bad
            mask = batch.make_mask(1)
            fetched = batch.update_and_fetch(*(mx.array(x) for x in vectors))
            out = mx.fast.scaled_dot_product_attention(mx.ones((3, 4, 1, 32)), *fetched, scale=0.2, mask=mask)
            fine.append(np.isfinite(np.array(out)).all(axis=(1, 2, 3)))
            if batch._storage.packed_tokens[1] == 64:
                seen = step
    assert np.array(fine)[:, [0, 2]].all()
    assert np.array(fine)[seen + 1 :, 1].all()  # from the step on that packs it
    if (bad, part) != (-np.inf, 0):  # such a key takes no weight
        assert not np.array(fine)[3 : seen + 1, 1].any()


@pytest.mark.parametrize("objective", ["fisher", "variance"])
@pytest.mark.parametrize("layer", [0, 1])
def test_calibration_on_nan_stops_with_a_sentence_and_stores_nothing(objective, layer):
    model = tiny_model()
    model.layers[layer].self_attn.v_proj.weight = model.layers[layer].self_attn.v_proj.weight * mx.nan
    with pytest.raises(ValueError, match="activations hold NaN or infinity; expected finite keys and values; check"):
        calibrate.calibrate_codec(model, tiny_tokenizer(), 2, 48, texts=[TEXT], objective=objective, window=8)
    assert not stored_path(fingerprint(model)).exists()
    assert not (cache_folder() / "partial").exists()


# Appends that fail.


@pytest.mark.parametrize(
    "shapes", [((1, 2, 3, 32), (1, 2, 3, 31)), ((1, 3, 3, 32), (1, 2, 3, 32)), ((1, 2, 3, 32), (2, 2, 3, 32))]
)
def test_an_append_that_fails_leaves_what_was_held(packed, shapes):
    cache = packed()
    cache.update_and_fetch(*pair(200))
    before, stats = [numpy(x) for x in cache.keys_and_values()], cache.stats()
    with pytest.raises((ValueError, RuntimeError)):
        mx.eval(cache.update_and_fetch(*(mx.ones(shape, mx.float16) for shape in shapes)))
    assert cache.offset == 200
    assert cache.stats() == stats
    for x, y in zip(cache.keys_and_values(), before, strict=True):
        np.testing.assert_array_equal(numpy(x), y)


# Threads.


def test_threads_with_their_own_caches_write_their_own_texts(model, tokenizer, stored_codec):
    prompts = [PROMPT[i * 7 : i * 7 + 150] for i in range(3)]
    cache = SpectralKVCache.with_options(3.0, window=32)
    mx.eval(model.parameters())

    def write(prompt):
        with mx.stream(mx.new_stream(mx.cpu)):
            return vq_kvcache.generate(model, tokenizer, prompt, cache=cache, max_tokens=8)

    expected = [vq_kvcache.generate(model, tokenizer, p, cache=cache, max_tokens=8) for p in prompts]
    with concurrent.futures.ThreadPoolExecutor(3) as pool:
        assert list(pool.map(write, prompts)) == expected


def test_install_and_uninstall_from_two_threads_leave_mlx_lm_as_it_was():
    barrier = threading.Barrier(2)

    def toggle(_):
        barrier.wait()
        for _ in range(20):
            vq_kvcache.install()
            vq_kvcache.uninstall()

    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        list(pool.map(toggle, range(2)))
    vq_kvcache.uninstall()
    assert symbols() == PRISTINE


class Meanwhile:
    """Another thread that runs `other` when this is first called: to its end, or until it waits for the caller."""

    def __init__(self, other):
        self.thread, self.started = threading.Thread(target=other), False

    def __call__(self):
        if not self.started:
            self.started = True
            self.thread.start()
            self.thread.join(0.3)


@pytest.mark.parametrize(("place", "name"), [(hooks, "_owner"), (intercept, "enable")])
def test_who_attaches_while_another_attaches_replaces_nothing_twice(monkeypatch, place, name):
    models, original = [tiny_model(), tiny_model()], getattr(place, name)
    meanwhile = Meanwhile(lambda: vq_kvcache.attach(models[1]))

    def slow(*args):
        meanwhile()
        return original(*args)

    monkeypatch.setattr(place, name, slow)
    vq_kvcache.attach(models[0])
    meanwhile.thread.join()
    assert all({"_vq_kvcache", "make_cache"} <= set(vars(model)) for model in models)
    vq_kvcache.uninstall()
    assert symbols() == PRISTINE
    assert not any({"_vq_kvcache", "make_cache"} & set(vars(model)) for model in models)


def test_who_detaches_while_another_attaches_leaves_no_half_of_it():
    class Model:
        def __setattr__(self, name, value):
            super().__setattr__(name, value)
            meanwhile()

    model = Model()
    meanwhile = Meanwhile(lambda: hooks.detach(model))
    vq_kvcache.attach(model)
    meanwhile.thread.join()
    assert vars(model) == {}


def test_a_model_that_is_attached_again_is_kept_once():
    model = tiny_model()
    for _ in range(3):
        vq_kvcache.attach(model)
    assert [ref() for ref in hooks._attached if ref() is model] == [model]


def test_the_first_codec_is_made_once_for_two_threads(monkeypatch):
    model, tokenizer, made = tiny_model(), tiny_tokenizer(), []

    def codec_for(*_):
        made.append(threading.get_ident())
        threading.Event().wait(0.2)
        return random_codec(2, name=fingerprint(model))

    monkeypatch.setattr(attachment, "codec_for", codec_for)
    mx.eval(model.parameters())
    with vq_kvcache.install():
        vq_kvcache.attach(model, tokenizer)
        with concurrent.futures.ThreadPoolExecutor(2) as pool:
            caches = list(pool.map(lambda _: vq_kvcache.make_prompt_cache(model), range(2)))
    assert len(made) == 1
    assert caches[0][0]._plan is caches[1][0]._plan


# Random sequences of operations, the first few of tests/random_operations.py.


def test_random_operations_show_what_mlx_lm_shows(tmp_path):
    from random_operations import run_case

    with vq_kvcache.install(), warnings.catch_warnings():
        warnings.simplefilter("error")
        for index in range(60):
            assert run_case(7, index, tmp_path)[1] is None
