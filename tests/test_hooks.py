"""How the cache gets into mlx-lm, that text is the same by every way, and that all of it can be undone."""

import subprocess
import sys

import mlx.core as mx
import mlx_lm
import pytest
from conftest import PRISTINE, PROMPT, kinds, module, random_codec, random_prompt, symbols, tiny_model
from mlx.utils import tree_flatten
from mlx_lm import generate as early_bound
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.cache import KVCache, RotatingKVCache

import vq_kvcache
from vq_kvcache import SpectralKVCache, attachment, hooks
from vq_kvcache import cache as cache_module
from vq_kvcache.attention import attend
from vq_kvcache.spectral.codec import fingerprint

LOSSLESS = SpectralKVCache.with_options(lossless=True, window=32)
# Putting in and taking out.


IMPORTS = """
import sys
import vq_kvcache
assert not any(name.startswith(("mlx_lm", "mlx.", "transformers")) for name in sys.modules), "imports the model stack"
import importlib, pkgutil
import mlx.core as mx, mlx_lm.generate, mlx_lm.utils, mlx_lm.models.cache, mlx_lm.models.llama
watched = [mx, mx.fast] + [m for name, m in sys.modules.items() if name.split(".")[0] == "mlx_lm"]
before = [dict(vars(m)) for m in watched]
names = [m.name for m in pkgutil.walk_packages(vq_kvcache.__path__, "vq_kvcache.") if not m.name.endswith("__main__")]
for name in names:
    importlib.import_module(name)
assert "vq_kvcache.hooks" in names and len(names) > 15
submodules = {m.__name__ for m in sys.modules.values() if getattr(m, "__name__", "").startswith("mlx_lm.")}
for module, old in zip(watched, before):
    for name, value in vars(module).items():
        assert old.get(name) is value or getattr(value, "__name__", "") in submodules, (module, name)
    assert set(old) <= set(vars(module)), module
"""


def test_importing_replaces_nothing():
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_install_and_uninstall():
    assert symbols() == PRISTINE
    assert PRISTINE[-1] is None
    vq_kvcache.uninstall()  # nothing to undo
    assert symbols() == PRISTINE
    vq_kvcache.install()
    installed = symbols()
    assert all(now is not then for now, then in zip(installed, PRISTINE, strict=True))
    vq_kvcache.install()
    assert symbols() == installed
    vq_kvcache.uninstall()
    assert symbols() == PRISTINE
    vq_kvcache.uninstall()
    assert symbols() == PRISTINE


def test_install_is_a_context_manager():
    with vq_kvcache.install():
        installed = symbols()
        assert installed[0] is not PRISTINE[0]
        with vq_kvcache.install():
            assert symbols() == installed
        assert symbols() == installed  # the inner one changed nothing and undoes nothing
    assert symbols() == PRISTINE
    with pytest.raises(KeyError, match="oops"), vq_kvcache.install():
        raise KeyError("oops")
    assert symbols() == PRISTINE


def test_uninstall_detaches_models(model, full_text, tokenizer):
    own = kinds(mlx_lm_cache.make_prompt_cache(model))
    vq_kvcache.attach(model, cache=LOSSLESS)
    assert kinds(mlx_lm_cache.make_prompt_cache(model)) == [SpectralKVCache] * 2
    assert symbols()[2] is PRISTINE[2]  # one model is none of the loader's business
    vq_kvcache.uninstall()
    assert symbols() == PRISTINE
    assert kinds(mlx_lm_cache.make_prompt_cache(model)) == own == [KVCache] * 2
    assert not {"make_cache", "_vq_kvcache"} & set(vars(model))
    assert early_bound(model, tokenizer, PROMPT, max_tokens=40) == full_text


def test_detach_undoes_one_attach(model):
    vq_kvcache.attach(model, cache=LOSSLESS)
    hooks.detach(model)
    assert kinds(mlx_lm_cache.make_prompt_cache(model)) == [KVCache] * 2
    hooks.detach(model)


def test_uninstall_leaves_what_somebody_else_wrapped_since(monkeypatch):
    vq_kvcache.install()
    generation = module("mlx_lm.generate")
    ours = generation.generate_step

    def theirs(*args, **kwargs):
        return ours(*args, **kwargs)

    generation.generate_step = theirs
    try:
        vq_kvcache.uninstall()
        assert generation.generate_step is theirs
        assert symbols()[1:] == PRISTINE[1:]
    finally:
        generation.generate_step = PRISTINE[0]


def test_attaching_changes_no_parameter(model):
    before = dict(tree_flatten(model.parameters()))
    name = fingerprint(model)
    assert vq_kvcache.attach(model, cache=LOSSLESS) is model
    after = dict(tree_flatten(model.parameters()))
    assert before.keys() == after.keys()
    assert all(before[n] is after[n] for n in before)
    assert fingerprint(model) == name


# The same text by every way.


@pytest.mark.parametrize("length", [1, 2, 127, 128, 129, 300])
@pytest.mark.parametrize("window", [32, 128])
def test_lossless_text_is_that_of_full_precision(model, tokenizer, length, window):
    prompt = random_prompt(length, seed=length)
    options = SpectralKVCache.with_options(lossless=True, window=window)
    expected = early_bound(model, tokenizer, prompt, max_tokens=60)
    assert vq_kvcache.generate(model, tokenizer, prompt, cache=options, max_tokens=60) == expected


@pytest.mark.parametrize("prefill_step_size", [5, 64, 100])
def test_prompts_in_several_chunks(model, tokenizer, full_text, prefill_step_size):
    text = vq_kvcache.generate(
        model, tokenizer, PROMPT, cache=LOSSLESS, max_tokens=40, prefill_step_size=prefill_step_size
    )
    assert text == full_text


def test_every_way_gives_the_same_text(model, tokenizer, stored_codec, full_text):
    def ways():
        options = SpectralKVCache.with_options()
        yield vq_kvcache.generate(model, tokenizer, PROMPT, max_tokens=40)
        for cache in (SpectralKVCache, options, vq_kvcache.make_prompt_cache(model)):
            yield vq_kvcache.generate(model, tokenizer, PROMPT, cache=cache, max_tokens=40)
        yield "".join(r.text for r in vq_kvcache.stream_generate(model, tokenizer, PROMPT, max_tokens=40))
        with vq_kvcache.install():
            for cache in (SpectralKVCache, options, vq_kvcache.make_prompt_cache(model)):
                yield mlx_lm.generate(model, tokenizer, PROMPT, cache=cache, max_tokens=40)
                if not isinstance(cache, list):
                    yield early_bound(model, tokenizer, PROMPT, cache=cache, max_tokens=40)
            yield early_bound(model, tokenizer, PROMPT, prompt_cache=vq_kvcache.make_prompt_cache(model), max_tokens=40)
            responses = mlx_lm.stream_generate(model, tokenizer, PROMPT, cache=options, max_tokens=40)
            yield "".join(r.text for r in responses)
        vq_kvcache.attach(model, tokenizer)
        yield mlx_lm.generate(model, tokenizer, PROMPT, max_tokens=40)
        yield early_bound(model, tokenizer, PROMPT, max_tokens=40)
        yield vq_kvcache.generate(model, tokenizer, PROMPT, max_tokens=40)

    texts = list(ways())
    assert len(texts) == 15
    assert len(set(texts)) == 1
    assert texts[0] != full_text  # 2 bits of a random basis: the codes are what it was read from


def test_options_reach_the_caches(model, codec, stored_codec):
    options = SpectralKVCache.with_options(bits_per_value=3.0, window=16, sinks=2)
    for caches in (
        vq_kvcache.make_prompt_cache(model, cache=options),
        vq_kvcache.attach(model, cache=options).make_cache(),
        vq_kvcache.make_prompt_cache(model),  # an attached model's own options
    ):
        assert [(c._plan.name, c._layer, c._window, c._sinks) for c in caches] == [
            (f"{codec.identity}@3.0", i, 16, 2) for i in (0, 1)
        ]
    default = vq_kvcache.make_prompt_cache(model, cache=SpectralKVCache.with_options())
    assert [(c._plan.name, c._window, c._sinks) for c in default] == [(f"{codec.identity}@2.0", 128, 4)] * 2


def test_a_codec_is_read_once(model, tokenizer, codec, monkeypatch):
    asked = []
    monkeypatch.setattr(attachment, "codec_for", lambda model, tokenizer: asked.append(tokenizer) or codec)
    for _ in range(2):
        vq_kvcache.generate(model, tokenizer, PROMPT[:3], max_tokens=1)
        vq_kvcache.make_prompt_cache(model)
    assert asked == [tokenizer]
    vq_kvcache.uninstall()
    vq_kvcache.make_prompt_cache(model, tokenizer=tokenizer)
    assert asked == [tokenizer] * 2


def test_a_full_precision_cache_can_be_asked_for(model, tokenizer, full_text):
    vq_kvcache.attach(model, cache=SpectralKVCache.with_options(codec=random_codec()))  # would be refused
    assert vq_kvcache.generate(model, tokenizer, PROMPT, cache=KVCache, max_tokens=40) == full_text
    assert early_bound(model, tokenizer, PROMPT, cache=KVCache, max_tokens=40) == full_text


def test_a_list_of_caches_is_used_as_it_is(model, tokenizer, full_text):
    caches = vq_kvcache.make_prompt_cache(model, cache=LOSSLESS)
    assert vq_kvcache.generate(model, tokenizer, PROMPT[:200], cache=caches, max_tokens=1) is not None
    assert [c.offset for c in caches] == [201] * 2
    for cache in caches:
        cache.trim(1)
    assert vq_kvcache.generate(model, tokenizer, PROMPT[200:], cache=caches, max_tokens=40) == full_text
    assert caches[0].stats()["packed_tokens"] > 192


def test_generate_attends_from_the_codes_with_nothing_installed(model, tokenizer, full_text, monkeypatch):
    caches = vq_kvcache.make_prompt_cache(model, cache=LOSSLESS)
    vq_kvcache.uninstall()
    attended = []
    monkeypatch.setattr(cache_module, "attend", lambda *args: attended.append(args) or attend(*args))
    assert vq_kvcache.generate(model, tokenizer, PROMPT, prompt_cache=caches, max_tokens=40) == full_text
    assert len(attended) > 40
    assert symbols() == PRISTINE


def test_input_embeddings(model, tokenizer, full_text):
    embeddings = model.model.embed_tokens(mx.array(PROMPT))
    options = {"input_embeddings": embeddings, "max_tokens": 40}
    assert early_bound(model, tokenizer, PROMPT, **options) == full_text
    assert vq_kvcache.generate(model, tokenizer, PROMPT, cache=LOSSLESS, **options) == full_text
    with vq_kvcache.install():
        assert early_bound(model, tokenizer, PROMPT, cache=LOSSLESS, **options) == full_text
    shuffled = {**options, "input_embeddings": embeddings[::-1]}
    assert vq_kvcache.generate(model, tokenizer, PROMPT, cache=LOSSLESS, **shuffled) != full_text


def test_sliding_layers_keep_their_own_caches(tokenizer):
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    mixed = tiny_model(num_hidden_layers=3, layer_types=types, sliding_window=16)
    expected = early_bound(mixed, tokenizer, PROMPT, max_tokens=40)
    caches = vq_kvcache.make_prompt_cache(mixed, cache=LOSSLESS)
    assert kinds(caches) == [RotatingKVCache, SpectralKVCache, RotatingKVCache]
    assert vq_kvcache.generate(mixed, tokenizer, PROMPT, cache=caches, max_tokens=40) == expected
    codec = random_codec(layers=3, name=fingerprint(mixed))
    del codec.layers[0], codec.layers[2]
    options = SpectralKVCache.with_options(codec=codec)
    packed = vq_kvcache.make_prompt_cache(mixed, cache=options)
    assert kinds(packed) == [RotatingKVCache, SpectralKVCache, RotatingKVCache]
    assert packed[1]._layer == 1


# Drafts.


@pytest.mark.parametrize("seed", [0, 1])  # a draft of the same weights, all accepted, and one that is always wrong
@pytest.mark.parametrize("num_draft_tokens", [2, 6])
def test_speculative_text_is_plain_text(model, tokenizer, full_text, seed, num_draft_tokens):
    draft = tiny_model(seed)
    options = {"draft_model": draft, "num_draft_tokens": num_draft_tokens, "max_tokens": 40}
    responses = list(vq_kvcache.stream_generate(model, tokenizer, PROMPT, cache=LOSSLESS, **options))
    assert "".join(r.text for r in responses) == full_text
    accepted = sum(r.from_draft for r in responses)
    assert accepted > 20 if seed == 0 else accepted < 10
    with vq_kvcache.install():
        assert early_bound(model, tokenizer, PROMPT, cache=LOSSLESS, **options) == full_text
    vq_kvcache.attach(model, tokenizer, cache=LOSSLESS)
    assert early_bound(model, tokenizer, PROMPT, **options) == full_text


@pytest.fixture
def seen_caches(monkeypatch):
    """The prompt caches that reach mlx-lm's speculative_generate_step."""
    seen = []

    def recorded(prompt, model, draft_model, *args, prompt_cache=None, **kwargs):
        seen.append(prompt_cache)
        return PRISTINE[1](prompt, model, draft_model, *args, prompt_cache=prompt_cache, **kwargs)

    monkeypatch.setattr(module("mlx_lm.generate"), "speculative_generate_step", recorded)
    return seen


def test_draft_models_keep_full_precision_unless_asked(model, tokenizer, model_folder, seen_caches):
    with vq_kvcache.install(LOSSLESS):
        draft, _ = mlx_lm.load(str(model_folder))  # the loader's hook attaches it too
        options = {"draft_model": draft, "max_tokens": 3}
        vq_kvcache.generate(model, tokenizer, PROMPT, cache=LOSSLESS, **options)
        early_bound(model, tokenizer, PROMPT, cache=LOSSLESS, **options)
        vq_kvcache.attach(model, cache=LOSSLESS)
        early_bound(model, tokenizer, PROMPT, **options)
        for caches in seen_caches:
            assert kinds(caches) == [SpectralKVCache] * 2 + [KVCache] * 2
            assert [c.offset for c in caches[:2]] >= [300] * 2
        both = vq_kvcache.make_prompt_cache(model, cache=LOSSLESS) + vq_kvcache.make_prompt_cache(draft, cache=LOSSLESS)
        early_bound(model, tokenizer, PROMPT, cache=both, **options)
        assert kinds(seen_caches[3]) == [SpectralKVCache] * 4
    assert len(seen_caches) == 4


def test_an_attached_model_that_drafts_for_another_keeps_full_precision(tokenizer, seen_caches):
    draft = vq_kvcache.attach(tiny_model(1))  # there is no codec of it, and nothing to make one with
    early_bound(tiny_model(), tokenizer, PROMPT, draft_model=draft, max_tokens=3)
    assert [kinds(caches) for caches in seen_caches] == [[KVCache] * 4]


# Loading.


def test_models_loaded_after_install_get_spectral_caches(model_folder, full_text):
    with vq_kvcache.install(LOSSLESS):
        loaded, tokenizer = mlx_lm.load(str(model_folder))
        assert kinds(mlx_lm_cache.make_prompt_cache(loaded)) == [SpectralKVCache] * 2
        assert mlx_lm.generate(loaded, tokenizer, PROMPT, max_tokens=40) == full_text
    assert kinds(mlx_lm_cache.make_prompt_cache(loaded)) == [KVCache] * 2
    plain, _ = mlx_lm.load(str(model_folder))
    assert kinds(mlx_lm_cache.make_prompt_cache(plain)) == [KVCache] * 2


def test_the_loader_is_called_as_mlx_lm_calls_it(model_folder):
    expected = PRISTINE[2](model_folder, lazy=True)[1]
    with vq_kvcache.install(LOSSLESS):
        loaded, config = module("mlx_lm.utils").load_model(model_path=model_folder, lazy=True)
    assert config == expected
    assert kinds(mlx_lm_cache.make_prompt_cache(loaded)) == [KVCache] * 2


def test_a_loaded_model_can_be_calibrated(model_folder, codec, monkeypatch):
    """What install attaches knows where its tokenizer is, and loads it only when a codec must be made."""
    asked = []

    def codec_for(model, tokenizer):
        asked.append(tokenizer().encode("w5 w7", add_special_tokens=False))
        return codec

    monkeypatch.setattr(attachment, "codec_for", codec_for)
    with vq_kvcache.install():
        loaded, _ = mlx_lm.load(str(model_folder))
        assert asked == []
        for _ in range(2):
            assert [c._plan.name for c in loaded.make_cache()] == [f"{codec.identity}@2.0"] * 2
    assert asked == [[5, 7]]


def test_load(model_folder, full_text, stored_codec):
    loaded, tokenizer = vq_kvcache.load(str(model_folder), cache=LOSSLESS)
    assert mlx_lm.generate(loaded, tokenizer, PROMPT, max_tokens=40) == full_text
    loaded, tokenizer, config = vq_kvcache.load(str(model_folder), return_config=True)
    assert config["hidden_size"] == 64
    assert [c._plan.name for c in loaded.make_cache()] == [f"{stored_codec.identity}@2.0"] * 2
    assert mlx_lm.generate(loaded, tokenizer, PROMPT, max_tokens=40) != full_text
