"""One small model of every kind: what is packed, that lossless logits are the model's own, and that bits help."""

import contextlib
import importlib.util

import mlx.core as mx
import numpy as np
import pytest
from conftest import pair, random_codec
from mlx.utils import tree_map_with_path
from mlx_lm.generate import BatchGenerator
from mlx_lm.models import cache as mlx_lm_cache

import vq_kvcache
from vq_kvcache import SpectralKVCache, attention, hooks
from vq_kvcache import cache as cache_module
from vq_kvcache.cache import ARRAYS_ONLY
from vq_kvcache.spectral import calibrate, intercept, memory_budget
from vq_kvcache.spectral.calibrate import calibrate_codec
from vq_kvcache.spectral.codec import Codec, LayerQuantizers, Plan
from vq_kvcache.spectral.intercept import members_of, plain_caches, replace_kv, uses

VOCABULARY = 96
PIECES = (140, 60, 3, 1, 1)  # a prompt, one more, a draft's check, two tokens
COMMON = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "num_hidden_layers": 2, "intermediate_size": 64, "rms_norm_eps": 1e-5,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512,
    "rope_theta": 10000.0,
}  # fmt: skip
LATENT = {
    **COMMON, "kv_lora_rank": 32, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "num_key_value_heads": 4,
}  # fmt: skip
SLIDING = {**COMMON, "sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts_per_tok": 1, "moe_intermediate_size": 32}

# module -> (configuration, how each packed cache is used, names of the caches that stay)
KINDS = {
    "deepseek_v2": (
        {**LATENT, "n_routed_experts": None, "rope_scaling": {
            "type": "yarn", "factor": 2, "original_max_position_embeddings": 256, "mscale": 1.0, "mscale_all_dim": 0.0,
            "beta_fast": 32, "beta_slow": 1}},
        ["paired"] * 2, [],
    ),
    "gemma3_text": ({**COMMON, "num_hidden_layers": 3, "sliding_window": 24, "sliding_window_pattern": 3,
                     "query_pre_attn_scalar": 16}, ["paired"], ["RotatingKVCache"] * 2),
    "gpt_oss": ({**SLIDING, "num_local_experts": 2, "num_experts_per_tok": 2}, ["paired"], ["RotatingKVCache"]),
    "llama4": (
        {"text_config": {
            **COMMON, "num_hidden_layers": 4, "attention_bias": False, "attention_chunk_size": 256,
            "interleave_moe_layer_step": 2, "intermediate_size_mlp": 64, "model_type": "llama4_text",
            "num_experts_per_tok": 1, "num_local_experts": 2, "rope_scaling": None, "use_qk_norm": True,
        }},
        ["paired"], ["ChunkedKVCache"] * 3,
    ),
    "cohere2": ({**COMMON, "logit_scale": 1.0, "sliding_window": 24, "sliding_window_pattern": 2}, ["paired"],
                ["RotatingKVCache"]),
    "olmo3": (SLIDING, ["paired"], ["RotatingKVCache"]),
    "deepseek_v3": ({**LATENT, "n_routed_experts": None, "rope_scaling": None}, ["latent"] * 2, []),
    "deepseek_v32": (
        {**LATENT, "n_routed_experts": None, "index_head_dim": 16, "index_n_heads": 2, "index_topk": 190},
        ["latent"] * 2, ["KVCache"] * 2,
    ),
    "qwen3_next": (
        {**COMMON, **EXPERTS, "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 16,
         "linear_value_head_dim": 16, "linear_conv_kernel_dim": 2, "num_experts": 2, "decoder_sparse_step": 1,
         "shared_expert_intermediate_size": 32, "mlp_only_layers": [0, 1], "partial_rotary_factor": 1.0,
         "full_attention_interval": 2},
        ["paired"], ["ArraysCache"],
    ),
    "falcon_h1": (
        {**COMMON, "mamba_d_head": 16, "mamba_d_ssm": 64, "mamba_d_state": 16, "mamba_n_heads": 4, "mamba_d_conv": 2,
         "lm_head_multiplier": 1.0, "attention_out_multiplier": 4.0},
        ["paired"] * 2, ["ArraysCache"] * 2,
    ),
    "lfm2": (
        {**COMMON, "norm_eps": 1e-5, "conv_bias": False, "conv_L_cache": 3, "block_dim": 64, "block_multiple_of": 8,
         "block_ffn_dim_multiplier": 1.0, "block_auto_adjust_ff_dim": False, "block_ff_dim": 64,
         "layer_types": ["conv", "full_attention"]},
        ["paired"], ["ArraysCache"],
    ),
    "gemma4_text": (
        {**COMMON, "num_hidden_layers": 6, "global_head_dim": 16, "num_kv_shared_layers": 2, "sliding_window": 24,
         "sliding_window_pattern": 2, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCABULARY,
         "layer_types": ["sliding_attention", "full_attention"] * 3},
        ["paired"] * 2, ["RotatingKVCache"] * 2,
    ),
    "gemma2": ({**COMMON, "query_pre_attn_scalar": 16}, ["own"] * 2, []),
    "minimax_m3_vl": (
        {"text_config": {
            **COMMON, "dense_intermediate_size": 32, "shared_intermediate_size": 32, "num_local_experts": 2,
            "num_experts_per_tok": 1, "rotary_dim": 8, "mlp_layer_types": ["dense", "sparse"],
            "layer_types": ["full_attention", "minimax_m3_sparse"], "index_n_heads": 2, "index_head_dim": 8,
            "index_block_size": 16, "index_topk_blocks": 4,
        }},
        ["paired"] * 2, ["KVCache"],
    ),
}  # fmt: skip


def build(kind, seed=0):
    """A model with random float32 weights, large enough that far tokens matter."""
    arch = importlib.import_module(f"mlx_lm.models.{kind}")
    mx.random.seed(seed)
    model = arch.Model(arch.ModelArgs.from_dict({"model_type": kind, **KINDS[kind][0]}))
    model.update(
        tree_map_with_path(
            lambda path, a: a if a.ndim < 2 or "conv" in path else mx.random.normal(a.shape) / a.shape[-1] ** 0.5,
            model.parameters(),
        )
    )
    mx.eval(model.parameters())
    return model


# Models that mlx-lm before 0.32 does not stop gradients in: routing by sorted indices.
NO_GRADIENTS = {"gpt_oss", "llama4"} if ARRAYS_ONLY else set()


@pytest.fixture(params=[k for k in KINDS if importlib.util.find_spec(f"mlx_lm.models.{k}")])
def kind(request):
    return request.param


class Characters:
    def encode(self, text, add_special_tokens=False):
        return [ord(c) % VOCABULARY for c in text]


def text(seed, length=160):
    return "".join(map(chr, np.random.default_rng(seed).integers(200, 200 + VOCABULARY, length)))


TOKENS = mx.array(np.random.default_rng(7).integers(0, VOCABULARY, sum(PIECES)))


def logits(model, caches):
    found, start = [], 0
    for size in PIECES:
        found.append(model(TOKENS[None, start : start + size], cache=caches)[0].astype(mx.float32))
        mx.eval(found[-1], [c.state for c in caches])
        start += size
    return mx.concatenate(found)


def mean_kl(full, other):
    p, q = (x - mx.logsumexp(x, axis=-1, keepdims=True) for x in (full, other))
    return (mx.exp(p) * (p - q)).sum(axis=-1).mean().item()


LOSSLESS = SpectralKVCache.with_options(lossless=True, window=16)


def lossless_caches(model):
    return vq_kvcache.make_prompt_cache(model, cache=LOSSLESS)


def flat(caches):
    return [m for c in caches for m in members_of(c)]


def test_full_attention_is_packed_and_the_rest_stays(kind):
    model = build(kind)
    _, kinds, others = KINDS[kind]
    assert [u.kind for u in uses(model).values()] == kinds
    caches = flat(lossless_caches(model))
    assert [type(c).__name__ for c in caches if not isinstance(c, SpectralKVCache)] == others
    assert [i for i, c in enumerate(caches) if isinstance(c, SpectralKVCache)] == list(uses(model))


def test_bare_handles_go_to_models_that_attend_and_do_nothing_else(kind):
    caches = hooks.spectral_caches(lossless_caches(build(kind)))
    assert {c.bare_handles for c in caches} == {kind not in {"deepseek_v3", "deepseek_v32", "gemma2"}}


def test_a_bounded_cache_keeps_what_is_no_kv_cache(kind):
    """--max-kv-size: full-attention layers rotate, the others stay as the model made them, and it still runs."""
    model = build(kind)
    with pytest.warns(UserWarning, match="max_kv_size=400 drops old tokens instead of packing them"):
        caches = vq_kvcache.make_prompt_cache(model, max_kv_size=400)
    for bounded, own in zip(flat(caches), flat(plain_caches(model)), strict=True):
        rotates = type(own).__name__ == "KVCache" and not hasattr(caches[0], "caches")
        assert type(bounded).__name__ == ("RotatingKVCache" if rotates else type(own).__name__)
    assert mx.allclose(logits(model, caches), logits(model, plain_caches(model)), atol=1e-3).item()


def test_lossless_logits_are_the_models_own(kind):
    model = build(kind)
    full, caches = logits(model, plain_caches(model)), lossless_caches(model)
    found = logits(model, caches)
    packed = [c.stats()["packed_tokens"] for c in hooks.spectral_caches(caches)]
    assert packed == [128] * len(KINDS[kind][1])
    spread = full.std(axis=-1).max().item()
    assert mx.abs(found - full).max().item() < 1e-4 * spread
    other = replace_kv(plain_caches(build(kind, seed=1)), lambda i, own, nested: own)
    assert mx.abs(logits(build(kind, seed=1), other) - full).max().item() > 0.1 * spread


def test_bits_of_a_codec_calibrated_on_the_model_bring_the_logits_near(kind, tmp_path):
    model = build(kind)
    with contextlib.ExitStack() as stack:
        if kind in NO_GRADIENTS:
            stack.enter_context(pytest.warns(UserWarning, match="no gradients through this model"))
        codec = calibrate_codec(model, Characters(), 3, 160, texts=[text(i) for i in range(3)], window=16)
    codec.save(tmp_path / "codec.safetensors")
    again = Codec.load(tmp_path / "codec.safetensors")
    assert again.identity == codec.identity
    assert codec.in_nats == (kind not in NO_GRADIENTS)
    kinds = [u.kind for u in uses(model).values()]
    assert [pair[1] is None for pair in again.layers.values()] == [k == "latent" for k in kinds]
    full, kls = logits(model, plain_caches(model)), []
    for bits in (0.5, 4.0, 8.0):
        options = SpectralKVCache.with_options(bits, window=16, codec=again)
        found = logits(model, vq_kvcache.make_prompt_cache(model, cache=options))
        assert mx.isfinite(found).all().item()
        kls.append(mean_kl(full, found))
    assert kls[0] > 1e-5
    assert kls[1] < kls[0] / 4
    assert kls[2] < kls[0] / 100
    assert not codec.in_nats or kls[0] / 100 < codec.predicted_kl(0.5) < kls[0] * 100


UNBATCHED = {"llama4", "gemma2"}  # mlx-lm itself cannot batch these


def batched_tokens(model):
    """30 tokens after each of three prompts of other lengths, and what the caches hold that came back."""
    generator = BatchGenerator(model, prefill_step_size=64)
    prompts = [np.random.default_rng(n).integers(0, VOCABULARY, n).tolist() for n in (150, 9, 90)]
    tokens = {uid: [] for uid in generator.insert(prompts, [30] * 3)}
    packed, running = 0, len(prompts)
    while running:
        for response in generator.next_generated():
            tokens[response.uid].append(response.token)
            if response.finish_reason is not None:
                running -= 1
                packed += sum(c.stats()["packed_tokens"] for c in hooks.spectral_caches(response.prompt_cache))
    return list(tokens.values()), packed


def test_a_batch_says_what_it_says_without_the_hook(kind):
    if kind in UNBATCHED:
        with pytest.raises(ValueError, match=r"does not yet support batching|cannot be broadcast"):
            batched_tokens(build(kind))
        return
    expected, _ = batched_tokens(build(kind))
    found, packed = batched_tokens(vq_kvcache.attach(build(kind), cache=LOSSLESS))
    # mlx-lm before 0.32 lets pads into the recurrent state of the shortest row.
    rows = (0, 2) if ARRAYS_ONLY and kind == "falcon_h1" else (0, 1, 2)
    assert [found[row] for row in rows] == [expected[row] for row in rows]
    assert packed >= 64 * len(KINDS[kind][1])


@pytest.mark.parametrize("which", ["falcon_h1", "deepseek_v3", "gemma3_text"])
def test_prompt_cache_files_of_mixed_caches(which, tmp_path):
    model = build(which)
    caches = lossless_caches(model)
    mx.eval(model(TOKENS[None, :150], cache=caches))
    file = str(tmp_path / "prompt.safetensors")
    mlx_lm_cache.save_prompt_cache(file, caches, {"model": which})
    again = mlx_lm_cache.load_prompt_cache(file)
    assert [type(c) for c in flat(again)] == [type(c) for c in flat(caches)]
    expected, found = (model(TOKENS[None, 150:160], cache=c) for c in (caches, again))
    assert mx.array_equal(expected, found).item()


def latent_cache():
    """32 latent numbers at 3 bits and 8 positional ones exact, window 32."""
    codec = random_codec(layers=1, heads=1, key_dims=32, value_dims=8)
    return SpectralKVCache(Plan("latent", "", {0: LayerQuantizers(codec.plan(3.0).layers[0].keys, None)}), 0, window=32)


@pytest.mark.parametrize("length", [1, 3])
def test_keys_that_are_values_too_are_attended_from_their_codes(length, monkeypatch):
    """Multi-head latent attention: what is cached as values, of other dimensions, takes no part in it."""
    keys, positions = pair(250, heads=1, dims=(32, 8))
    cache = latent_cache()
    cache.update_and_fetch(keys[:, :, :-length], positions[:, :, :-length])
    latent, exact = cache.update_and_fetch(keys[:, :, -length:], positions[:, :, -length:])
    assert mx.array_equal(exact, positions).item()
    assert not mx.array_equal(latent, keys).item()
    queries, mask = (mx.random.normal((1, 4, length, n)).astype(mx.float16) for n in (32, 250))
    expected = intercept.original_attention()(queries, mx.array(latent), mx.array(latent), scale=0.2, mask=mask)
    attended = []
    monkeypatch.setattr(cache_module, "attend", lambda *args: attended.append(args) or attention.attend(*args))
    with intercept.dispatching():
        result = mx.fast.scaled_dot_product_attention(queries, latent, latent, scale=0.2, mask=mask)
    assert len(attended) == 1
    assert mx.allclose(result, expected, atol=2e-3).item()


def test_a_codec_of_latents_alone_has_budgets_too(tmp_path):
    """No values to pack: a pair of budgets, a saved file and a rotation of keys alone all go by."""
    keys = random_codec(layers=2, heads=1, key_dims=32).layers
    codec = Codec("latent-model", {i: (k, None) for i, (k, _) in keys.items()}, {"objective": "fisher"})
    codec.save(tmp_path / "codec.safetensors")
    again = Codec.load(tmp_path / "codec.safetensors")
    for bits in (2.0, (2.0, 4.0)):
        layers = again.plan(bits).layers
        assert [layer.values for layer in layers.values()] == [None] * 2
        assert sum(layer.keys.words for layer in layers.values()) == 4  # 2 layers x 32 numbers x 2 bits
    assert again.predicted_kl(2.0) > again.predicted_kl(4.0) > 0


def test_a_head_that_nothing_depends_on_can_be_calibrated():
    model = build("gemma2")
    for layer in model.layers:
        layer.self_attn.o_proj.weight = mx.zeros_like(layer.self_attn.o_proj.weight)
    codec = calibrate_codec(model, Characters(), 1, 160, texts=[text(0)], window=16)
    assert codec.provenance["objective"] == "fisher"
    options = SpectralKVCache.with_options(2.0, window=16, codec=codec)
    found = logits(model, vq_kvcache.make_prompt_cache(model, cache=options))
    assert mx.allclose(found, logits(model, plain_caches(model)), atol=1e-5).item()


@pytest.mark.parametrize(("which", "at_once"), [("deepseek_v2", 2), ("gemma3_text", 1), ("deepseek_v3", 1)])
def test_several_sequences_at_once_only_where_all_caches_are_plain(which, at_once, monkeypatch):
    """MLX crashes on the gradients of gemma3n where two threads take them."""
    seen = []

    def gather(model, sequences, setting, *rest):
        seen.append(setting.at_once)
        return original(model, sequences, setting, *rest)

    original = calibrate.gather
    monkeypatch.setattr(calibrate, "gather", gather)
    monkeypatch.setattr(memory_budget, "_at_once", lambda fitting: 2)
    calibrate_codec(build(which), Characters(), 2, 100, texts=[text(i) for i in range(2)], window=16)
    assert seen == [at_once]
