"""How the cache gets into mlx-lm, that text is the same by every way, and that all of it can be undone."""

import dataclasses
import functools
import importlib
import json
import subprocess
import sys

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from conftest import random_codec, random_prompt, tiny_config, tiny_model, tiny_tokenizer
from mlx.utils import tree_flatten
from mlx_lm import generate as early_bound
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.cache import KVCache, RotatingKVCache

import vq_kvcache
from vq_kvcache import SpectralKVCache, hooks
from vq_kvcache import cache as cache_module
from vq_kvcache.attention import attend
from vq_kvcache.spectral import calibrate_from_vectors, save_rotations
from vq_kvcache.spectral.codec import CodecError, fingerprint, stored_path
from vq_kvcache.spectral.rotation_files import RotationFileError
from vq_kvcache.spectral.spectral_quant import SpectralQuantizer

LOSSLESS = SpectralKVCache.with_options(lossless=True, window=32)
PROMPT = random_prompt(300)  # 128 of them are packed behind a window of 128, 192 behind one of 32


def module(name):
    return importlib.import_module(name)  # mlx_lm.generate, as an attribute, is the function


REPLACED = [
    ("mlx_lm.generate", "generate_step"),
    ("mlx_lm.generate", "speculative_generate_step"),
    ("mlx_lm.utils", "load_model"),
    ("mlx.core.fast", "scaled_dot_product_attention"),
    ("mlx_lm.models.cache", "SpectralKVCache"),
]


def symbols():
    """What the hooks replace or add, as it is now."""
    homes = [mx.fast if name == "mlx.core.fast" else module(name) for name, _ in REPLACED]
    return [getattr(home, symbol, None) for home, (_, symbol) in zip(homes, REPLACED, strict=True)]


PRISTINE = symbols()


@pytest.fixture
def stored_codec(codec):
    """The tiny model's codec in the cache folder, where it is found without a tokenizer."""
    codec.save(stored_path(codec.fingerprint))
    return codec


@pytest.fixture(scope="session")
def model_folder(model, tmp_path_factory):
    """The tiny model in the layout of a Hugging Face repository."""
    folder = tmp_path_factory.mktemp("tiny-llama")
    (folder / "config.json").write_text(json.dumps(tiny_config()))
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def full_text(model, tokenizer):
    """The tiny model's own text after PROMPT."""
    return early_bound(model, tokenizer, PROMPT, max_tokens=40)


def kinds(caches):
    return [type(c) for c in caches]


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
    monkeypatch.setattr(hooks, "codec_for", lambda model, tokenizer: asked.append(tokenizer) or codec)
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

    monkeypatch.setattr(hooks, "codec_for", codec_for)
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


# The documented path.


def rotations_for(layers=2, dims=32, values=True, seed=0):
    generator = np.random.default_rng(seed)
    spectrum = 2.0 * 0.9 ** np.arange(dims)
    vectors = [mx.array((generator.normal(size=(400, dims)) * spectrum).astype(np.float32)) for _ in range(2 * layers)]
    keys, of_values = calibrate_from_vectors(vectors[:layers]), calibrate_from_vectors(vectors[layers:])
    return [dataclasses.replace(k, values=v if values else None) for k, v in zip(keys, of_values, strict=True)]


@pytest.fixture
def folder(tmp_path):
    save_rotations(rotations_for(), tmp_path / "spectral")
    return tmp_path / "spectral"


def test_attach_with_rotations(model, tokenizer, folder, full_text):
    vq_kvcache.attach(model, rotations=folder, signal_bits=8, noise_bits=8)
    assert kinds(model.make_cache()) == [SpectralKVCache] * 2
    by_mlx_lm = early_bound(model, tokenizer, PROMPT, max_tokens=40)
    assert vq_kvcache.generate(model, tokenizer, PROMPT, max_tokens=40) == by_mlx_lm
    caches = model.make_cache()
    assert vq_kvcache.generate(model, tokenizer, PROMPT, prompt_cache=caches, max_tokens=40) == by_mlx_lm
    assert [c.stats()["packed_tokens"] for c in caches] == [192] * 2
    vq_kvcache.attach(model, rotations=folder, signal_bits=1, noise_bits=0)
    assert early_bound(model, tokenizer, PROMPT, max_tokens=40) != by_mlx_lm
    vq_kvcache.uninstall()
    assert early_bound(model, tokenizer, PROMPT, max_tokens=40) == full_text


@pytest.mark.parametrize("bits", [(4, 1, False), (3, 2, False), (4, 1, True)])
def test_rotations_pack_as_the_documented_quantizer_does(model, folder, bits):
    rotations = rotations_for()
    for given in (str(folder), rotations):
        vq_kvcache.attach(model, rotations=given, signal_bits=bits[0], noise_bits=bits[1], use_water_filling=bits[2])
        cache = model.make_cache()[1]
        x = mx.random.normal((1, 2, 300, 32))
        cache.update_and_fetch(x, 2 * x)
        alone = [SpectralQuantizer(r, *bits) for r in (rotations[1], rotations[1].values)]
        for held, given_x, quantizer in zip(cache.keys_and_values(), (x, 2 * x), alone, strict=True):
            packed = given_x[:, :, 4:132]
            expected = quantizer.decode(quantizer.encode(packed))
            np.testing.assert_allclose(np.array(held[:, :, 4:132]), np.array(expected), rtol=1e-4, atol=1e-4)


def test_load_with_rotations(model_folder, folder):
    loaded, tokenizer = vq_kvcache.load(str(model_folder), rotations=folder, signal_bits=8, noise_bits=8)
    caches = loaded.make_cache()
    assert {w for c in caches for head in c._plan.layers[0].keys.widths for w in head} == {8}
    text = mlx_lm.generate(loaded, tokenizer, PROMPT, prompt_cache=caches, max_tokens=5)
    assert len(text.split()) == 5


def test_other_bits_of_the_same_rotations_are_another_plan(model, folder):
    names = set()
    for bits in ((4, 4), (5, 5), (4, 1)):
        vq_kvcache.attach(model, rotations=folder, signal_bits=bits[0], noise_bits=bits[1])
        plan = model.make_cache()[0]._plan
        assert {w for head in plan.layers[0].keys.widths for w in head} == set(bits)
        names.add(plan.name)
    assert len(names) == 3


def test_the_same_rotations_serve_two_models(model, tokenizer, folder):
    for each in (model, tiny_model(seed=3)):
        vq_kvcache.attach(each, rotations=folder)
        caches = each.make_cache()
        assert {c._fingerprint for c in caches} == {fingerprint(each)}
        assert len(vq_kvcache.generate(each, tokenizer, PROMPT, prompt_cache=caches, max_tokens=3).split()) == 3


@pytest.mark.parametrize(
    ("layers", "dims", "error", "sentence"),
    [
        (2, 16, CodecError, r"the rotation of layer 0 has head_dim 16; this model has 32; calibrate on this model\."),
        (3, 32, CodecError, r"rotation 'layers\.2' names layer 2; the model's KV caches are \[0, 1\]; calibrate on th"),
    ],
)
def test_rotations_of_another_model_are_refused(model, layers, dims, error, sentence):
    with pytest.raises(error, match=sentence):
        vq_kvcache.attach(model, rotations=rotations_for(layers, dims))
    assert kinds(mlx_lm_cache.make_prompt_cache(model)) == [KVCache] * 2


def test_missing_rotations_are_refused(model, tmp_path):
    with pytest.raises(RotationFileError, match=r"no manifest\.json in .*; expected saved rotations; calibrate first"):
        vq_kvcache.attach(model, rotations=tmp_path)


def test_what_rotations_leave_out_is_told(model, tokenizer):
    with pytest.warns(UserWarning, match=r"the rotations of layers \[0, 1\] are of keys alone: values stay exact\."):
        vq_kvcache.attach(model, rotations=rotations_for(values=False))
    cache = model.make_cache()[0]
    x = mx.random.normal((1, 2, 300, 32))
    cache.update_and_fetch(x, x)
    keys, values = cache.keys_and_values()
    assert mx.array_equal(values, x)
    assert not mx.array_equal(keys, x)
    with pytest.warns(UserWarning, match=r"no rotation for layers \[1\]: their caches stay full precision\."):
        vq_kvcache.attach(model, rotations=rotations_for(layers=1))
    assert kinds(model.make_cache()) == [SpectralKVCache, KVCache]
    assert len(early_bound(model, tokenizer, PROMPT, max_tokens=3).split()) == 3


# Bad input.


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
