"""Spectral caches in files: they come back as they were, and what cannot be used is refused in one sentence."""

import json

import mlx.core as mx
import numpy as np
import pytest
from conftest import Feed, numpy, random_codec
from mlx_lm.models.cache import load_prompt_cache, save_prompt_cache

import vq_kvcache
from vq_kvcache import cache as cache_module
from vq_kvcache.cache import SpectralKVCache
from vq_kvcache.spectral.codec import CodecError, Plan, stored_path


@pytest.fixture
def loadable():
    """mlx-lm looks cache classes up by name in its own module, where the hooks put ours."""
    with vq_kvcache.install():
        yield


@pytest.mark.parametrize("make", ["lossless", "packed"])
@pytest.mark.parametrize("count", [1, 100, 400])
def test_prompt_caches_are_saved_and_loaded(tmp_path, request, loadable, make, count):
    feed = Feed(1, (32, 32))
    caches = [request.getfixturevalue(make)() for _ in range(2)]
    for cache in caches:
        feed(cache, count)
    save_prompt_cache(str(tmp_path / "saved.safetensors"), caches, {"model": "tiny"})
    loaded, metadata = load_prompt_cache(str(tmp_path / "saved.safetensors"), return_metadata=True)
    assert metadata == {"model": "tiny"}
    for cache, again in zip(caches, loaded, strict=True):
        assert type(again) is SpectralKVCache
        assert again.stats() == cache.stats()
        assert again.nbytes == cache.nbytes
        for n in (70, 1):
            for x, y in zip(feed(cache, n), feed(again, n), strict=True):
                np.testing.assert_array_equal(x, y)


def test_an_empty_prompt_cache_is_saved_and_loaded(tmp_path, loadable, packed):
    save_prompt_cache(str(tmp_path / "saved.safetensors"), [packed()])
    (again,) = load_prompt_cache(str(tmp_path / "saved.safetensors"))
    assert again.empty()
    assert again.offset == 0
    assert len(Feed(1, (32, 32))(again, 150)[0][0, 0]) == 150


def test_a_saved_cache_may_be_changed_without_changing_the_file(tmp_path, loadable, lossless):
    cache, feed = lossless(), Feed(1)
    before = feed(cache, 200)
    state = cache.state
    feed(cache, 100)
    cache.trim(250)
    feed(cache, 10)
    again = SpectralKVCache.from_state(state)
    for x, y in zip(again.keys_and_values(), before, strict=True):
        np.testing.assert_array_equal(numpy(x), y)


# What cannot be used.


def test_a_saved_cache_finds_its_codec_in_the_cache_folder(codec, packed, monkeypatch):
    cache = packed(bits=3.0)
    before = Feed(1, (32, 32))(cache, 300)
    monkeypatch.setattr(cache_module, "_plans", {})
    with pytest.raises(CodecError, match=rf"packed by codec {codec.identity} of model llama-\w+, which is not here"):
        SpectralKVCache.from_state(cache.state)
    codec.save(stored_path(codec.fingerprint))
    again = SpectralKVCache.from_state(cache.state)
    assert again.stats() == cache.stats()
    for x, y in zip(again.keys_and_values(), cache.keys_and_values(), strict=True):
        np.testing.assert_array_equal(numpy(x), numpy(y))
    assert (numpy(again.keys_and_values()[0]) != before[0]).any()


def test_a_saved_cache_of_another_codec_of_the_model_is_refused(codec, packed, monkeypatch):
    cache = packed()
    Feed(1, (32, 32))(cache, 300)
    random_codec(layers=2, name=codec.fingerprint, seed=5).save(stored_path(codec.fingerprint))
    monkeypatch.setattr(cache_module, "_plans", {})
    with pytest.raises(CodecError, match=rf"packed by codec {codec.identity} of model llama-\w+, which is not here"):
        SpectralKVCache.from_state(cache.state)


def test_a_saved_cache_without_a_model_is_refused(monkeypatch):
    plan = Plan("rotations-0", "", random_codec().plan(2.0).layers)
    cache = SpectralKVCache(cache_module.register_plan(plan))
    Feed(1, (32, 32))(cache, 3)
    assert SpectralKVCache.from_state(cache.state).offset == 3
    monkeypatch.setattr(cache_module, "_plans", {})
    with pytest.raises(CodecError, match="packed by codec rotations-0 of model unknown, which is not here; expected"):
        SpectralKVCache.from_state(cache.state)


def changed(**fields):
    return lambda text: json.dumps({k: v for k, v in {**json.loads(text), **fields}.items() if v is not ...})


@pytest.mark.parametrize(
    "describe",
    [
        lambda text: "no JSON", lambda text: "7", lambda text: "{}", lambda text: None, lambda text: mx.zeros((2,)),
        lambda text: text[:-2], changed(format=2), changed(layer=...), changed(window="many"), changed(plan=...),
        changed(exact_tokens=...), changed(held_sinks=None), changed(chunks=3), changed(chunks=["a"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("split", [False, True])
def test_a_damaged_description_is_refused(lossless, describe, split, monkeypatch):
    monkeypatch.setattr(cache_module, "ARRAYS_ONLY", split)
    cache = lossless()
    Feed(1)(cache, 300)
    text, arrays = describe(cache._describe()), cache._storage.arrays
    if split and isinstance(text, str):
        text = mx.array(list(text.encode()), mx.uint8)
    with pytest.raises(ValueError, match=r"the saved state is not a SpectralKVCache's \(.*\); expected one of this ve"):
        SpectralKVCache.from_state([text, *arrays])


@pytest.mark.parametrize(
    ("damage", "sentence"),
    [
        (lambda a: a[:-1], r"the saved state holds 2 arrays; expected 3; the file is damaged\."),
        (lambda a: [*a, a[0]], r"the saved state holds 4 arrays; expected 3; the file is damaged\."),
        (lambda a: a[:1], r"the saved state holds 1 arrays; expected 3; the file is damaged\."),
        (lambda a: [a[0][0], *a[1:]], r"the saved state holds .* arrays; .*; the file is damaged\."),
        (lambda a: [a[0][:, :, :9], *a[1:]], r"a stored cache's shapes do not fit its codec; the file is damaged"),
        (lambda a: [*a[:2], a[2][:, 1:]], r"a stored cache's shapes do not fit its codec; the file is damaged"),
    ],
)
def test_damaged_arrays_are_refused(lossless, damage, sentence):
    cache = lossless()
    Feed(1)(cache, 300)
    description, *arrays = cache.state
    assert SpectralKVCache.from_state([description, *arrays]).offset == 300
    with pytest.raises(ValueError, match=sentence):
        SpectralKVCache.from_state([description, *damage(arrays)])


def test_a_state_of_nothing_is_refused():
    with pytest.raises(ValueError, match="the saved state is not a SpectralKVCache's"):
        SpectralKVCache.from_state([])


def test_the_state_of_mlx_lms_cache_is_refused(full):
    theirs = full()
    Feed(1)(theirs, 3)
    with pytest.raises(ValueError, match="the saved state is not a SpectralKVCache's"):
        SpectralKVCache.from_state(theirs.state)


@pytest.mark.parametrize("make", ["lossless", "packed"])
@pytest.mark.parametrize("count", [0, 5, 300])
def test_the_older_contract_saves_nothing_but_arrays(make, count, request, monkeypatch):
    monkeypatch.setattr(cache_module, "ARRAYS_ONLY", True)
    cache, feed = request.getfixturevalue(make)(), Feed(1, (32, 32))
    if count:
        feed(cache, count)
    assert all(isinstance(a, mx.array) for a in cache.state)
    assert cache.meta_state == ""
    again = SpectralKVCache.from_state(cache.state, cache.meta_state)
    assert again.empty() == cache.empty() == (count == 0)
    for x, y in zip(feed(cache, 90), feed(again, 90), strict=True):
        np.testing.assert_array_equal(x, y)
    assert again.stats() == cache.stats()
    with pytest.raises(ValueError, match="a SpectralKVCache has no meta_state; expected an empty one; make the file"):
        SpectralKVCache.from_state(cache.state, "something")
