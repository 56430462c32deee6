"""Layers that share the keys and values of another: before mlx-lm 0.32 they read them from its `state`, which only
mlx-lm's own cache has as the two; there that one stays as it is, and says so."""

import contextlib

import mlx.core as mx
import pytest
from conftest import random_codec
from test_kinds_of_models import COMMON, KINDS, LOSSLESS, VOCABULARY, build, logits

import vq_kvcache
from vq_kvcache import SpectralKVCache, inspection
from vq_kvcache.cache import ARRAYS_ONLY
from vq_kvcache.spectral.codec import fingerprint
from vq_kvcache.spectral.intercept import plain_caches, read_by_state, uses

# module -> (configuration, indices of full-attention caches, the one that others share)
SHARING = {
    "afm7": (
        {"vocab_size": VOCABULARY, "hidden_dim": 64, "num_layers": 4, "num_kv_reuse_layers": 2, "num_heads": 4,
         "num_kv_heads": 2, "hidden_dim_scale_factor": 2.0, "rope_theta": 10000.0},
        {0, 1}, 1,
    ),
    "gemma3n": (
        {"text_config": {
            **COMMON, "model_type": "gemma3n_text", "num_hidden_layers": 6, "num_kv_shared_layers": 2,
            "sliding_window": 24, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY,
            "layer_types": ["sliding_attention", "full_attention"] * 3, "altup_num_inputs": 2,
            "altup_coef_clip": None, "altup_correct_scale": True, "altup_active_idx": 0, "laurel_rank": 8,
            "activation_sparsity_pattern": [0.0] * 6, "final_logit_softcapping": 30.0,
            "rope_local_base_freq": 10000.0, "rope_scaling": None,
        }},
        {1, 3}, 3,
    ),
}  # fmt: skip


@pytest.fixture(params=SHARING)
def model(request, monkeypatch):
    monkeypatch.setitem(KINDS, request.param, (SHARING[request.param][0], [], []))
    return build(request.param)


@pytest.fixture
def sharing(model):
    _, full, shared = SHARING[model.model_type.removesuffix("_text")]
    return full, shared


def said(index):
    """What is said when a cache stays as it is: here, or nothing."""
    if not ARRAYS_ONLY:
        return contextlib.nullcontext()
    return pytest.warns(UserWarning, match=rf"reads the keys of layers \[{index}\] where a packed cache has none")


def packed(caches):
    return {i for i, c in enumerate(caches) if isinstance(c, SpectralKVCache)}


def test_shared_caches_are_packed_where_mlx_lm_asks_the_cache_for_them(model, sharing):
    full, shared = sharing
    expected = full - {shared} if ARRAYS_ONLY else full
    assert read_by_state(model) == full - expected
    assert set(uses(model)) == expected
    with said(shared):
        caches = vq_kvcache.make_prompt_cache(model, cache=LOSSLESS)
    assert packed(caches) == expected
    reference = logits(model, plain_caches(model))
    assert mx.abs(logits(model, caches) - reference).max().item() < 1e-4 * reference.std(axis=-1).max().item()
    assert all(caches[i].stats()["packed_tokens"] == 128 for i in expected)


def test_a_codec_of_another_mlx_lm_packs_no_more(model, sharing):
    """It has transforms of the shared cache, too: of mlx-lm 0.32, where it was made."""
    full, shared = sharing
    layers = random_codec(layers=max(full) + 1, key_dims=16, name=fingerprint(model))
    layers.layers = {i: layer for i, layer in layers.layers.items() if i in full}
    with said(shared):
        caches = vq_kvcache.make_prompt_cache(model, cache=SpectralKVCache.with_options(8.0, window=16, codec=layers))
    assert packed(caches) == (full - {shared} if ARRAYS_ONLY else full)
    assert mx.isfinite(logits(model, caches)).all().item()


def test_inspect_says_why(model, sharing, monkeypatch):
    _, shared = sharing
    monkeypatch.setattr(inspection, "load", lambda *args, **kwargs: (model, None))
    row = inspection.inspect_model("folder")["layers"][shared]
    assert row["packed"] is not ARRAYS_ONLY
    assert ("layers that share it" in row["why"]) is ARRAYS_ONLY
