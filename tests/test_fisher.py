"""Fisher calibration: gradients, memory budget, interruption, determinism, and models of every kind."""

import json

import mlx.core as mx
import numpy as np
import pytest
from conftest import tiny_model, tiny_tokenizer
from mlx import nn
from mlx_lm.models import gemma3_text, mixtral, qwen3_next

from vq_kvcache.spectral import calibrate, fisher, memory_budget, partial
from vq_kvcache.spectral.calibrate import calibrate_codec
from vq_kvcache.spectral.calibration_text import Placed
from vq_kvcache.spectral.far_attention import far_attention, far_attention_reference
from vq_kvcache.spectral.fisher import Setting
from vq_kvcache.spectral.intercept import dispatching

TEXT = " ".join(f"w{2 + i * 7 % 90}" for i in range(600))
SETTING = Setting(window=8, sinks=2, seed=0)


def masks(length, heads):
    generator = np.random.default_rng(0)
    seen = np.tril(np.ones((length, length), dtype=bool))
    some = np.where(generator.random((1, heads, length, length)) > 0.3, 0.0, -1e9).astype(np.float32)
    return {
        "causal": "causal", "none": None, "booleans": mx.array(seen),
        "per batch": mx.array(seen[None, None]), "per head": mx.array(some),
    }  # fmt: skip


@pytest.mark.parametrize("sinks", [False, True], ids=["no sinks", "sinks"])
@pytest.mark.parametrize("mask", ["causal", "none", "booleans", "per batch", "per head"])
@pytest.mark.parametrize("length", [100, 300])
def test_gradients_of_far_attention_are_those_of_the_reference(length, mask, sinks):
    keys = mx.random.split(mx.random.key(3), 5)
    q, c = (mx.random.normal((1, 4, length, 16), key=k) for k in keys[:2])
    k, v = (mx.random.normal((1, 2, length, 16), key=k) for k in keys[2:4])
    options = {"window": 40, "exact": 3, "scale": 0.25, "mask": masks(length, 4)[mask]}
    options["sinks"] = mx.random.normal((4,), key=keys[4]) if sinks else None
    zero = mx.zeros_like(k)
    results = [
        mx.value_and_grad(lambda *a, f=f: (f(*a, **options) * c).sum(), argnums=(0, 1, 2, 3, 4))(q, k, v, zero, zero)
        for f in (far_attention, far_attention_reference)
    ]
    for found, expected in zip(results[0][1], results[1][1], strict=True):
        assert float(mx.abs(expected).max()) > 0.01
        assert mx.allclose(found, expected, rtol=1e-4, atol=1e-5 * float(mx.abs(expected).max())).item()
    assert float(results[0][0]) == pytest.approx(float(results[1][0]), rel=1e-5)


def test_far_errors_alone_move_the_reference():
    q, k, e = (mx.random.normal((1, 1, 60, 8), key=mx.random.key(i)) for i in range(3))
    options = {"window": 20, "exact": 2, "scale": 1.0, "mask": "causal"}
    zero = mx.zeros_like(e)
    plain = far_attention_reference(q, k, k, zero, zero, **options)
    moved = far_attention_reference(q, k, k, e, e, **options)
    still = np.array(mx.abs(plain - moved).max(axis=(0, 1, 3)) == 0)
    assert still[:22].all()
    assert not still[22:].any()


def gradients(model, checkpoint=False, length=40):
    ids = mx.array(np.random.default_rng(0).integers(2, 90, length))
    setting = SETTING._replace(checkpoint=checkpoint)
    return fisher._gradients(model, Placed(ids, 0), setting, mx.random.key(1))


def test_gradients_are_the_derivatives_of_the_loss():
    model = tiny_model()
    ids, key = mx.array(np.random.default_rng(0).integers(2, 90, 40)), mx.random.key(1)
    found = gradients(model)
    step = 1e-3
    for part, layer in ((1, 0), (3, 1)):
        direction = mx.random.normal(found[layer][part].shape, key=mx.random.key(7))
        losses = []
        for sign in (step, -step):

            def attend(i, q, k, v, original, error=sign * direction, at=(layer, part // 2), **options):
                errors = [mx.zeros(k.shape), mx.zeros(v.shape)]
                if i == at[0]:
                    errors[at[1]] = error
                return far_attention_reference(q, k, v, *errors, window=8, exact=2, **options)

            attend.vectors, attend.used, attend.append = {}, None, lambda i, k, v: (k, v)
            with dispatching():
                losses.append(float(fisher._loss(model, Placed(ids, 0), attend, key)[0]))
        slope = (losses[0] - losses[1]) / (2 * step)
        assert float((found[layer][part] * direction).sum()) == pytest.approx(slope, rel=0.02)


def test_layers_computed_twice_have_the_same_gradients_and_are_put_back():
    model = tiny_model()
    own = type(model.layers[0]).__call__
    kept, again = gradients(model), gradients(model, checkpoint=True)
    assert type(model.layers[0]).__call__ is own
    for layer, arrays in kept.items():
        for a, b in zip(arrays, again[layer], strict=True):
            assert float(mx.abs(a).max()) > 0
            assert mx.allclose(a, b, rtol=1e-4, atol=1e-6).item()


def test_layers_computed_twice_take_less_memory():
    model = tiny_model(num_hidden_layers=8, intermediate_size=1024)
    peaks = [memory_budget._peak(lambda n, c: gradients(model, c, n), 256, c) for c in (False, True)]
    assert peaks[1] < 0.6 * peaks[0]


def quick(model, **options):
    options = {"texts": [TEXT], "window": 8, "sinks": 2, **options}
    return calibrate_codec(model, tiny_tokenizer(), options.pop("num_samples", 6), 64, **options)


def test_the_same_seed_gives_the_same_file_however_many_at_once(tmp_path, monkeypatch):
    files = []
    for at_once in (1, 2, 3):
        monkeypatch.setattr(memory_budget, "_at_once", lambda fitting, n=at_once: n)
        file = tmp_path / f"{at_once}.safetensors"
        quick(tiny_model()).save(file)
        files.append(file.read_bytes())
    assert files[0] == files[1] == files[2]
    assert quick(tiny_model(), seed=1).identity != quick(tiny_model()).identity


class InterruptionError(Exception):
    pass


def interrupt_after(monkeypatch, count):
    update, calls = partial.Partial.save, []

    def save(self, statistics, done):
        update(self, statistics, done)
        calls.append(done)
        if done == count:
            raise InterruptionError

    monkeypatch.setattr(partial.Partial, "save", save)
    return calls


@pytest.mark.parametrize("count", [1, 3, 5])
def test_an_interrupted_calibration_goes_on_and_ends_alike(monkeypatch, tmp_path, count):
    monkeypatch.setattr(partial, "SECONDS_BETWEEN_SAVES", 0.0)
    whole = quick(tiny_model())
    folder = tmp_path / "home" / "partial"
    assert not folder.exists()
    with monkeypatch.context() as patch:
        interrupt_after(patch, count)
        with pytest.raises(InterruptionError):
            quick(tiny_model())
    assert [f.name for f in next(folder.iterdir()).glob("sums*")] == ["sums"]
    calls = interrupt_after(monkeypatch, -1)
    again = quick(tiny_model())
    assert calls == list(range(count + 1, 7))
    assert again.identity == whole.identity
    assert not folder.exists()


def test_another_setting_does_not_go_on_from_it(monkeypatch):
    monkeypatch.setattr(partial, "SECONDS_BETWEEN_SAVES", 0.0)
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        with pytest.raises(InterruptionError):
            quick(tiny_model())
    calls = interrupt_after(monkeypatch, -1)
    for change in ({"seed": 1}, {"window": 9}, {"texts": [TEXT[:-100]]}):
        quick(tiny_model(), **change)
        assert calls[0] == 1
        calls.clear()


def test_damaged_statistics_are_started_anew(monkeypatch, tmp_path):
    monkeypatch.setattr(partial, "SECONDS_BETWEEN_SAVES", 0.0)
    whole = quick(tiny_model())
    with monkeypatch.context() as patch:
        interrupt_after(patch, 3)
        with pytest.raises(InterruptionError):
            quick(tiny_model())
    (sums,) = (tmp_path / "home" / "partial").glob("*/sums")
    sums.write_bytes(sums.read_bytes()[:-9])
    assert quick(tiny_model()).identity == whole.identity


def test_a_folder_that_cannot_be_written_costs_a_warning(monkeypatch, tmp_path):
    monkeypatch.setattr(partial, "SECONDS_BETWEEN_SAVES", 0.0)
    (tmp_path / "home").write_text("a file")
    with pytest.warns(UserWarning, match="cannot be written .*; an interruption loses all"):
        assert quick(tiny_model(), num_samples=2).layers


def test_what_fits_is_chosen_by_measured_peaks(monkeypatch):
    monkeypatch.setattr(memory_budget, "_peak", lambda run, n, again: n * (1000 if not again else 400) + n * n)
    fit = lambda budget: memory_budget.fit(None, 1024, 132, budget)  # noqa: E731
    monkeypatch.setattr(memory_budget, "_at_once", lambda fitting: fitting)
    whole, again = 1024 * 1000 + 1024**2, 1024 * 400 + 1024**2
    assert fit(3 * whole) == (1024, False, 3)
    assert fit(whole) == (1024, False, 1)
    assert fit(whole - 1) == (1024, True, 1)
    assert fit(again - 1) == (960, True, 1)
    assert fit(196 * 400 + 196**2) == (196, True, 1)
    with pytest.raises(ValueError, match=r"memory_budget is 1,000 bytes; expected at least 116,816, for 196 tokens"):
        fit(1000)


@pytest.mark.parametrize("lowest", [0, 1, 2])
def test_the_worst_of_several_peaks_counts(monkeypatch, lowest):
    calls = []

    def peak(run, n, again):
        calls.append(n)
        return n * (500 if len(calls) % 3 == lowest else 1000)

    monkeypatch.setattr(memory_budget, "_peak", peak)
    assert memory_budget._needs(None, False)(512) == 512_000


def test_a_budget_is_kept_while_gradients_are_taken(monkeypatch):
    used, budget = [], 24_000_000

    def save(self, statistics, done):
        used.append((mx.get_peak_memory(), statistics[0][0].kept[0][0].shape[1]))
        raise InterruptionError

    monkeypatch.setattr(partial.Partial, "save", save)
    model = tiny_model(num_hidden_layers=6, intermediate_size=2048)
    peaks = []
    for allowed in (1 << 40, budget):
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        with pytest.raises(InterruptionError):
            calibrate_codec(
                model, tiny_tokenizer(), 1, 512, texts=[TEXT * 10], window=8, sinks=2, memory_budget=allowed
            )
        peaks.append(used[-1][0] - before)
    assert peaks[0] > budget
    assert used[0][1] == 512
    assert peaks[1] < 1.1 * budget


def test_nothing_of_a_probe_stays_in_memory():
    model = tiny_model()
    before = mx.get_active_memory()
    memory_budget._peak(lambda n, c: gradients(model, c, n), 256, True)
    assert mx.get_active_memory() - before < 10_000


def test_too_small_a_budget_is_refused():
    with pytest.raises(ValueError, match=r'memory_budget is 1,000 bytes; expected at least .* objective="variance"'):
        quick(tiny_model(), memory_budget=1000)


def mixture():
    mx.random.seed(0)
    sizes = {"model_type": "mixtral", "vocab_size": 97, "hidden_size": 64, "intermediate_size": 64,
             "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
             "num_local_experts": 4}  # fmt: skip
    return mixtral.Model(mixtral.ModelArgs.from_dict(sizes)), {0, 1}


def quantized():
    model = tiny_model()
    nn.quantize(model, 32, 4)
    return model, {0, 1}


def sliding():
    mx.random.seed(0)
    sizes = {"model_type": "gemma3_text", "vocab_size": 97, "hidden_size": 64, "intermediate_size": 64, "head_dim": 32,
             "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "sliding_window": 16,
             "sliding_window_pattern": 2}  # fmt: skip
    return gemma3_text.Model(gemma3_text.ModelArgs.from_dict(sizes)), {1, 3}


def hybrid():
    mx.random.seed(0)
    sizes = {
        "model_type": "qwen3_next", "hidden_size": 64, "num_hidden_layers": 4, "intermediate_size": 64,
        "num_attention_heads": 4, "num_key_value_heads": 2, "linear_num_value_heads": 2, "linear_num_key_heads": 2,
        "linear_key_head_dim": 32, "linear_value_head_dim": 32, "linear_conv_kernel_dim": 3, "num_experts": 4,
        "num_experts_per_tok": 2, "decoder_sparse_step": 1, "shared_expert_intermediate_size": 64,
        "mlp_only_layers": [], "moe_intermediate_size": 64, "rms_norm_eps": 1e-5, "head_dim": 32, "vocab_size": 97,
        "rope_theta": 1000.0, "partial_rotary_factor": 0.5, "max_position_embeddings": 1000,
        "full_attention_interval": 2,
    }  # fmt: skip
    return qwen3_next.Model(qwen3_next.ModelArgs.from_dict(sizes)), {1, 3}


@pytest.mark.parametrize("kind", [mixture, quantized, sliding, hybrid])
def test_models_of_every_kind_are_calibrated_by_gradients(kind, recwarn):
    model, layers = kind()
    codec = quick(model, num_samples=2)
    assert codec.provenance["objective"] == "fisher"
    assert not [w for w in recwarn if "no gradients" in str(w.message)]
    assert set(codec.layers) == layers
    for keys, values in codec.layers.values():
        assert (keys.costs[..., 0].sum(axis=1) > 0).all()
        assert (values.costs[..., 0].sum(axis=1) > 0).all()


def test_without_gradients_layers_are_weighed_by_what_their_errors_cost(capsys):
    model = tiny_model()
    model.layers[1].self_attn.o_proj.weight = model.layers[1].self_attn.o_proj.weight * 1e-3
    codec = quick(model, objective="variance")
    assert codec.in_nats
    assert codec.provenance["sensitivities"] == "measured forward"
    assert "layer sensitivities measured forward" in capsys.readouterr().err
    first, second = ([t.costs[..., 2].sum() for t in codec.layers[i]] for i in (0, 1))
    assert min(first) > 100 * max(second)


def test_a_model_without_gradients_is_calibrated_forward_with_a_warning(monkeypatch):
    def refuses(*args, **options):
        raise ValueError("[custom_kernel] Not implemented for vjp.")

    monkeypatch.setattr(fisher, "far_attention", refuses)
    with pytest.warns(UserWarning, match="no gradients through this model .*Not implemented.*calibrating by variance"):
        codec = quick(tiny_model())
    assert codec.provenance["objective"] == "variance"
    assert codec.in_nats


def test_sixteen_bit_weights_come_back_as_they_were():
    model = tiny_model()
    model.set_dtype(mx.bfloat16)
    before = {n: np.array(a.view(mx.uint16)) for n, a in nn.utils.tree_flatten(model.parameters())}
    name = calibrate.codecs.fingerprint(model)
    codec = quick(model, num_samples=2)
    after = dict(nn.utils.tree_flatten(model.parameters()))
    assert all(
        after[n].dtype == mx.bfloat16 and (np.array(after[n].view(mx.uint16)) == a).all() for n, a in before.items()
    )
    assert codec.fingerprint == name
    assert json.dumps(codec.provenance)
