"""The documented path: saved rotations of a model, attached to it, and text generated with them."""

import dataclasses

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest
from conftest import PROMPT, kinds, tiny_model
from mlx_lm import generate as early_bound
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.cache import KVCache

import vq_kvcache
from vq_kvcache import SpectralKVCache
from vq_kvcache.spectral import calibrate_from_vectors, save_rotations
from vq_kvcache.spectral.codec import CodecError, fingerprint
from vq_kvcache.spectral.rotation_files import RotationFileError
from vq_kvcache.spectral.spectral_quant import SpectralQuantizer


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
