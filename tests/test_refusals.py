"""What generation with a spectral cache refuses, or turns off, and the sentence that says so."""

import functools

import pytest
from conftest import PROMPT, REPLACED, kinds, module, random_codec, symbols, tiny_model
from mlx_lm import generate as early_bound
from mlx_lm.models.cache import KVCache, RotatingKVCache

import vq_kvcache
from vq_kvcache import SpectralKVCache
from vq_kvcache.spectral.codec import CodecError

LOSSLESS = SpectralKVCache.with_options(lossless=True, window=32)


def both_ways(model, tokenizer):
    """generate of this package without install, and mlx-lm's with it."""

    def installed(*args, **kwargs):
        with vq_kvcache.install():
            return early_bound(*args, **kwargs)

    return [functools.partial(f, model, tokenizer, PROMPT, max_tokens=3) for f in (vq_kvcache.generate, installed)]


def test_cache_and_prompt_cache_together_are_refused(model, tokenizer):
    caches = vq_kvcache.make_prompt_cache(model, cache=LOSSLESS)
    for way in both_ways(model, tokenizer):
        with pytest.raises(ValueError, match="both cache= and prompt_cache= were given; expected one; pass the caches"):
            way(cache=LOSSLESS, prompt_cache=caches)


def test_kv_bits_are_refused(model, tokenizer):
    sentence = r"kv_bits=4 asks for mlx-lm's own quantized cache; a SpectralKVCache is packed already; drop kv_bits and"
    for way in both_ways(model, tokenizer):
        with pytest.raises(ValueError, match=sentence):
            way(cache=LOSSLESS, kv_bits=4)
        with pytest.raises(ValueError, match=sentence):
            way(prompt_cache=vq_kvcache.make_prompt_cache(model, cache=LOSSLESS), kv_bits=4)
    vq_kvcache.attach(model, cache=LOSSLESS)
    with pytest.raises(ValueError, match=sentence):
        early_bound(model, tokenizer, PROMPT, kv_bits=4)
    with pytest.raises(ValueError, match=sentence):
        early_bound(model, tokenizer, PROMPT, kv_bits=4, draft_model=tiny_model(1))
    assert (
        len(early_bound(model, tokenizer, PROMPT, cache=KVCache, kv_bits=4, kv_group_size=32, max_tokens=3).split())
        == 3
    )


def test_max_kv_size_turns_packing_off_and_says_so(model, tokenizer):
    sentence = "max_kv_size=64 drops old tokens instead of packing them: the spectral cache is off"
    with pytest.warns(UserWarning, match=sentence):
        caches = vq_kvcache.make_prompt_cache(model, max_kv_size=64)
    assert kinds(caches) == [RotatingKVCache] * 2
    assert [(c.max_size, c.keep) for c in caches] == [(64, 4)] * 2
    expected = early_bound(model, tokenizer, PROMPT, max_tokens=3, prompt_cache=caches)
    for way in both_ways(model, tokenizer):
        with pytest.warns(UserWarning, match=sentence):
            assert way(cache=LOSSLESS, max_kv_size=64) == expected
    vq_kvcache.attach(model, cache=LOSSLESS)
    with pytest.warns(UserWarning, match=sentence):
        assert early_bound(model, tokenizer, PROMPT, max_tokens=3, max_kv_size=64) == expected


def test_a_codec_of_another_model_is_refused(model, tokenizer, tmp_path):
    other = random_codec(layers=2, name="other-model")
    other.save(tmp_path / "other.safetensors")
    for codec in (other, tmp_path / "other.safetensors", str(tmp_path / "other.safetensors")):
        for way in both_ways(model, tokenizer):
            with pytest.raises(
                CodecError, match=r"the codec is of model other-model; this model is llama-\w+; use its"
            ):
                way(cache=SpectralKVCache.with_options(codec=codec))


def test_a_codec_file_is_found_or_missed(model, codec, tmp_path):
    codec.save(tmp_path / "mine.safetensors")
    caches = vq_kvcache.make_prompt_cache(
        model, cache=SpectralKVCache.with_options(codec=tmp_path / "mine.safetensors")
    )
    assert caches[0]._plan.name == f"{codec.identity}@2.0"
    with pytest.raises(CodecError, match=r"none\.safetensors cannot be read \(No such file or directory\); expected a"):
        vq_kvcache.make_prompt_cache(model, cache=SpectralKVCache.with_options(codec=tmp_path / "none.safetensors"))


def test_a_prompt_cache_of_another_model_is_refused(model, tokenizer, codec):
    other = tiny_model(seed=3)
    caches = vq_kvcache.make_prompt_cache(model, cache=SpectralKVCache.with_options(codec=codec))
    for way in both_ways(other, tokenizer):
        with pytest.raises(
            CodecError, match=r"the prompt cache was packed for model llama-\w+; this model is llama-\w+"
        ):
            way(prompt_cache=caches)
    assert len(both_ways(model, tokenizer)[0](prompt_cache=caches).split()) == 3


def test_no_codec_and_no_way_to_make_one(model, tokenizer):
    with (
        vq_kvcache.install(),
        pytest.raises(CodecError, match=r"no codec of model llama-\w+ in .* and no tokenizer to"),
    ):
        early_bound(model, tokenizer, PROMPT, cache=SpectralKVCache)


@pytest.mark.parametrize("cache", [3, dict, "spectral", KVCache()])
def test_another_kind_of_cache_is_refused(model, cache):
    with pytest.raises(
        ValueError, match=r"cache is .*; expected SpectralKVCache, its with_options\(\.\.\.\), or a list"
    ):
        vq_kvcache.make_prompt_cache(model, cache=cache)


@pytest.mark.parametrize(("home", "name"), REPLACED[:3])
@pytest.mark.parametrize("change", ["missing", "other parameters"])
def test_an_mlx_lm_of_unknown_shape_is_refused(model, tokenizer, monkeypatch, home, name, change):
    if change == "missing":
        monkeypatch.delattr(module(home), name)
    else:
        monkeypatch.setattr(module(home), name, lambda tokens: tokens)
    changed = symbols()
    for use in (
        vq_kvcache.install,
        lambda: vq_kvcache.attach(tiny_model(), cache=LOSSLESS),
        lambda: vq_kvcache.generate(model, tokenizer, PROMPT, cache=LOSSLESS),
        lambda: vq_kvcache.make_prompt_cache(model, cache=LOSSLESS),
    ):
        with pytest.raises(
            RuntimeError, match=rf"mlx-lm 0\.\d+\.\d+ has no {home}\.{name} with .*; expected mlx-lm 0\.31"
        ):
            use()
        assert symbols() == changed


def test_a_draft_for_a_model_with_other_caches_than_layers_is_refused(model, tokenizer, monkeypatch):
    monkeypatch.setattr(type(model), "make_cache", lambda self: [KVCache()] * 3)
    for way in both_ways(model, tokenizer):
        with pytest.raises(ValueError, match="the model has 3 caches for 2 layers, and mlx-lm splits those of a draft"):
            way(cache=LOSSLESS, draft_model=tiny_model(1))
