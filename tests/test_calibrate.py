import argparse
import inspect
import types
import warnings

import mlx.core as mx
import numpy as np
import oracle
import pytest
from conftest import tiny_model, tiny_tokenizer
from mlx import nn
from mlx.utils import tree_map
from mlx_lm.models.cache import KVCache
from mlx_lm.tokenizer_utils import TokenizerWrapper

from vq_kvcache.spectral import calibration_text
from vq_kvcache.spectral.calibrate import calibrate_codec, calibrate_from_vectors, calibrate_spectral_rotation
from vq_kvcache.spectral.spectral_quant import SpectralQuantizer, SpectralRotation

SIZES = {"head_dim": 16, "vocab_size": 64}
TEXTS = ["".join(chr(97 + (i * i + 3 * i // 7) % 26) for i in range(96))]  # three sequences of 32


class Letters:
    """A tokenizer: a token for each character."""

    def encode(self, text, add_special_tokens=True):
        assert add_special_tokens is False
        return [2 + ord(c) % 62 for c in text]


@pytest.fixture(scope="module")
def model():
    return tiny_model(**SIZES)


def rotations_of(model, texts=TEXTS, tokenizer=None, **options):
    options = {"num_samples": 3, "sequence_length": 32, "device": "cpu", **options}
    return calibrate_spectral_rotation(model, tokenizer or Letters(), texts=texts, **options)


def seen_by_own_hook(monkeypatch, model, length=32):
    """[(queries, keys, values)] of every call of attention, float64, caught without the package."""
    original, calls = mx.fast.scaled_dot_product_attention, []

    def hook(queries, keys, values, **options):
        calls.append([np.array(a.astype(mx.float32), dtype=np.float64) for a in (queries, keys, values)])
        return original(queries, keys, values, **options)

    ids = Letters().encode(TEXTS[0], add_special_tokens=False)
    with monkeypatch.context() as patch:
        patch.setattr(mx.fast, "scaled_dot_product_attention", hook)
        for start in range(0, len(ids), length):
            mx.eval(model(mx.array(ids[start : start + length])[None]))
    return calls


def vectors_of(calls, layer, part, head=None, layers=2):
    """[N, D] of one layer, all heads or one."""
    chosen = [c[part] if head is None else c[part][:, head : head + 1] for c in calls[layer::layers]]
    return np.concatenate([x.reshape(-1, x.shape[-1]) for x in chosen])


def assert_is_pca(rotation, x, tolerance):
    mean, basis, eigenvalues = oracle.pca(x)
    found = np.array(rotation.rotation_matrix, dtype=np.float64)
    assert np.array(rotation.mean) == pytest.approx(mean, abs=tolerance)
    assert np.array(rotation.eigenvalues) == pytest.approx(eigenvalues, rel=tolerance, abs=tolerance * eigenvalues[0])
    assert (np.diff(np.array(rotation.eigenvalues)) <= 0).all()
    assert found.T @ found == pytest.approx(np.eye(len(mean)), abs=1e-5)
    # Each column but for its sign, and but for turns among neighbours whose eigenvalues are nearly the same.
    found_spectrum = ((found.T @ basis) ** 2) @ eigenvalues
    assert found_spectrum == pytest.approx(eigenvalues, abs=tolerance * eigenvalues[0])
    distinct = np.abs(np.diff(eigenvalues)).min() > 1e-3 * eigenvalues[0]
    assert not distinct or np.abs(found.T @ basis) == pytest.approx(np.eye(len(mean)), abs=50 * tolerance)


def test_the_documented_signatures():
    signature = inspect.signature(calibrate_spectral_rotation)
    positional = [p for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert [p.name for p in positional] == ["model", "tokenizer", "num_samples", "sequence_length", "device"]
    assert [p.default for p in positional[2:]] == [64, 1024, "gpu"]
    assert signature.parameters["texts"].kind is inspect.Parameter.KEYWORD_ONLY
    assert signature.return_annotation == list[SpectralRotation]
    signature = inspect.signature(calibrate_from_vectors)
    assert {n: p.annotation for n, p in signature.parameters.items()} == {"key_vectors": list[mx.array]}
    assert signature.return_annotation == list[SpectralRotation]


@pytest.mark.parametrize("dtype", [mx.float32, mx.float16, mx.bfloat16])
@pytest.mark.parametrize("shape", [(200, 6), (2, 3, 50, 6)])
def test_rotations_of_vectors_are_their_principal_axes(shape, dtype):
    generator = np.random.default_rng(1)
    axes = generator.normal(size=(6, 6)) * np.array([4, 2.5, 1.5, 1, 0.5, 0.25])
    arrays = [
        mx.array((generator.normal(size=shape) @ axes.T + 5 * i).astype(np.float32)).astype(dtype) for i in (0, 1)
    ]
    found = calibrate_from_vectors(arrays)
    assert [(r.layer_name, r.head_dim, r.values) for r in found] == [("layers.0", 6, None), ("layers.1", 6, None)]
    for r, x in zip(found, arrays, strict=True):
        exact = np.array(x.astype(mx.float32), dtype=np.float64).reshape(-1, 6)
        basis = oracle.pca(exact)[1]
        assert_is_pca(r, exact, 1e-5)
        assert np.abs(np.array(r.rotation_matrix).T @ basis) == pytest.approx(np.eye(6), abs=1e-5)
        assert all(a.dtype == mx.float32 for a in (r.rotation_matrix, r.eigenvalues, r.mean))


def test_fewer_vectors_than_dimensions_give_a_whole_basis_and_no_variance_beyond_them():
    x = mx.random.normal((4, 10), key=mx.random.key(0))
    (r,) = calibrate_from_vectors([x])
    assert_is_pca(r, np.array(x, dtype=np.float64), 1e-5)
    assert np.abs(np.array(r.eigenvalues)[3:]).max() < 1e-6
    quantizer = SpectralQuantizer(r, 8, 8)
    assert mx.allclose(quantizer.decode(quantizer.encode(x)), x, atol=0.05).item()


@pytest.mark.parametrize("bad", [mx.ones((1, 4)), mx.ones((0, 4)), mx.array([[1.0, float("nan")]] * 3)])
def test_too_few_vectors_or_nan_are_refused(bad):
    with pytest.raises(ValueError, match=rf"array 1 holds {len(bad)} vectors or NaN; expected at least 2 finite ones"):
        calibrate_from_vectors([mx.random.normal((5, 4)), bad])


def test_rotations_of_a_model_are_the_principal_axes_of_its_keys_and_values(model, monkeypatch):
    found = rotations_of(model)
    calls = seen_by_own_hook(monkeypatch, model)
    assert [r.layer_name for r in found] == [r.values.layer_name for r in found] == ["layers.0", "layers.1"]
    assert len(calls) == 3 * 2
    for layer, r in enumerate(found):
        assert_is_pca(r, vectors_of(calls, layer, 1), 1e-4)
        assert_is_pca(r.values, vectors_of(calls, layer, 2), 1e-4)
        assert r.values.values is None


@pytest.mark.parametrize("kind", ["float16", "bfloat16", "quantized"])
def test_weights_of_any_format_are_calibrated(monkeypatch, kind):
    model = tiny_model(**SIZES)
    if kind == "quantized":
        nn.quantize(model, group_size=32, bits=8)
    else:
        model.set_dtype(getattr(mx, kind))
    found = rotations_of(model)
    calls = seen_by_own_hook(monkeypatch, model)
    for layer, r in enumerate(found):
        assert_is_pca(r, vectors_of(calls, layer, 1), 1e-4)


def test_tokenizers_come_bare_or_wrapped(model):
    text = ["w5 w9 w33 " * 20]
    bare = rotations_of(tiny_model(), text, tiny_tokenizer())
    wrapped = rotations_of(tiny_model(), text, TokenizerWrapper(tiny_tokenizer()))
    assert all((a.mean == b.mean).all().item() for a, b in zip(bare, wrapped, strict=True))


def test_calibration_shows_progress(model, capsys):
    rotations_of(model)
    assert "calibrating: 100%" in capsys.readouterr().err


def test_a_machine_without_a_gpu_warns_once_and_calibrates_all_the_same(model, monkeypatch):
    for backend in (mx.metal, mx.cuda):
        monkeypatch.setattr(backend, "is_available", lambda: False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = rotations_of(model, device="gpu")
    ours = [w for w in caught if "no GPU on this machine; calibrating on Device(" in str(w.message)]
    assert len(ours) == len(caught) == 1
    assert all((a.mean == b.mean).all().item() for a, b in zip(found, rotations_of(model), strict=True))


def test_the_cpu_that_was_asked_for_is_no_reason_to_warn(model):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(rotations_of(model, device="cpu")) == 2


def test_the_warning_points_at_the_caller(model, monkeypatch):
    for backend in (mx.metal, mx.cuda):
        monkeypatch.setattr(backend, "is_available", lambda: False)
    with pytest.warns(UserWarning, match="no GPU on this machine") as caught:
        calibrate_spectral_rotation(model, Letters(), 1, 8, texts=TEXTS)
    assert caught[0].filename == __file__


def test_an_unknown_device_is_refused(model):
    with pytest.raises(ValueError, match='device is \'tpu\'; expected "gpu" or "cpu"'):
        rotations_of(model, device="tpu")


@pytest.mark.parametrize(("samples", "length"), [(0, 32), (1, 1), (-1, 32)])
def test_too_little_to_calibrate_on_is_refused(model, samples, length):
    with pytest.raises(ValueError, match=f"{samples} samples of {length} tokens; expected at least 1 of at least 2"):
        rotations_of(model, num_samples=samples, sequence_length=length)


@pytest.mark.parametrize("texts", [[], [""], ["a"]])
def test_texts_without_tokens_are_refused(model, texts):
    with pytest.raises(ValueError, match="the calibration texts hold fewer than two tokens; expected some text"):
        rotations_of(model, texts)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("calibrate", [rotations_of, lambda model: calibrate_codec(model, Letters(), texts=TEXTS)])
def test_a_model_with_nan_weights_is_refused(calibrate):
    model = tiny_model(**SIZES)
    model.update(tree_map(lambda a: a * float("nan"), model.parameters()))
    with pytest.raises(ValueError, match=r"^activations hold NaN or infinity; expected finite .*; check the model\.$"):
        calibrate(model)


class Empty(nn.Module):
    """A model whose layers attend without mx.fast.scaled_dot_product_attention."""

    layers = (None,)

    def __call__(self, ids, cache=None):
        return mx.zeros((*ids.shape, 64))


def test_a_model_that_never_shows_its_keys_is_refused():
    with pytest.raises(ValueError, match="no layer of this model has a KV cache to pack; expected full"):
        rotations_of(Empty())


def test_layers_with_a_sliding_window_get_no_entry():
    model = tiny_model(
        num_hidden_layers=3,
        layer_types=["full_attention", "sliding_attention", "full_attention"],
        sliding_window=8,
        **SIZES,
    )
    assert [r.layer_name for r in rotations_of(model)] == ["layers.0", "layers.2"]


def test_attention_is_restored_after_calibration_even_by_an_error(model):
    before = mx.fast.scaled_dot_product_attention
    rotations_of(model)
    assert mx.fast.scaled_dot_product_attention is before
    with pytest.raises(ValueError, match="no layer of this model"):
        rotations_of(Empty())
    assert mx.fast.scaled_dot_product_attention is before


def test_the_built_in_text_needs_no_text_from_the_user(model):
    found = calibrate_spectral_rotation(model, Letters(), num_samples=1, sequence_length=32, device="cpu")
    assert [r.layer_name for r in found] == ["layers.0", "layers.1"]
    assert all(r.eigenvalues[0].item() > 0 for r in found)


def test_the_built_in_text_is_prose_reference_facts_and_code_of_the_running_interpreter():
    texts = calibration_text.built_in_texts()
    assert len(texts) == 4
    assert 300_000 < sum(len(t.encode()) for t in texts[:3]) < 600_000
    assert all(len(t) > 50_000 for t in texts)
    assert inspect.getsource(argparse) in texts[3]


def sequences(model, count, length, texts=None, tokenizer=None, seed=0):
    found = calibration_text.calibration_sequences(model, tokenizer or Letters(), count, length, texts, seed)
    return [s.tolist() for s in found]


@pytest.mark.parametrize("count", [1, 3, 4, 7, 8, 16])
def test_as_many_sequences_as_asked_for_each_as_long_as_asked_for(model, count):
    found = sequences(model, count, 24)
    assert [len(ids) for ids in found] == [24] * count
    shipped = count - count // 8
    assert len({tuple(ids) for ids in found[:shipped]}) == shipped


def test_every_built_in_text_has_an_equal_share_and_the_model_writes_an_eighth(model, monkeypatch):
    texts = [c * 200 for c in "abcd"]
    monkeypatch.setattr(calibration_text, "built_in_texts", lambda: texts)
    letters = [2 + ord(c) % 62 for c in "abcd"]
    found = sequences(model, 16, 8)
    assert [[ids == [letter] * 8 for ids in found].count(True) for letter in letters] == [4, 4, 3, 3]
    assert len(found) == 16


def test_sequences_are_spread_over_the_whole_text(model):
    text = "".join(chr(97 + i // 50) for i in range(1000))
    found = sequences(model, 3, 10, [text])
    ids = Letters().encode(text, add_special_tokens=False)
    assert found == [ids[:10], ids[495:505], ids[990:]]


def test_a_short_text_is_one_short_sequence(model):
    assert [len(ids) for ids in sequences(model, 4, 100, ["abcdef"])] == [6]


def test_no_more_sequences_than_asked_for_come_from_many_short_texts(model):
    assert len(sequences(model, 3, 100, ["abc"] * 10)) == 3


def test_the_model_writes_the_same_text_from_the_same_seed_and_another_from_another(model):
    tokenizer = tiny_tokenizer()
    written = {s: calibration_text.write_sequences(model, tokenizer, 2, 12, s) for s in (0, 1)}
    again = calibration_text.write_sequences(model, tokenizer, 2, 12, 0)
    assert [w.tolist() for w in written[0]] == [w.tolist() for w in again]
    assert [w.tolist() for w in written[0]] != [w.tolist() for w in written[1]]
    assert written[0][0].tolist() != written[0][1].tolist()
    assert all(w[0].item() == tokenizer.eos_token_id for w in written[0])


class Dice(nn.Module):
    """A model that finds the same four tokens as likely as `chances`, whatever came before."""

    layers = ()
    chances = (0.5, 0.3, 0.15, 0.05)

    def __call__(self, ids, cache=None):
        return mx.broadcast_to(mx.log(mx.array(self.chances)), (*ids.shape, 4))


def test_the_model_writes_at_temperature_one_and_draws_every_token_anew():
    count = 2000
    written = np.array(mx.stack(calibration_text.write_sequences(Dice(), Letters(), count, 3, 0)))
    assert written.shape == (count, 3)
    for column in (1, 2):
        found = np.bincount(written[:, column], minlength=4) / count
        assert found == pytest.approx(Dice.chances, abs=5 * np.sqrt(0.25 / count))
    same = np.mean(written[:, 1] == written[:, 2])
    assert same == pytest.approx(np.square(Dice.chances).sum(), abs=5 * np.sqrt(0.25 / count))


def test_texts_of_the_user_are_all_there_is():
    nobody = None  # asked to write, it would fail
    assert sequences(nobody, 16, 8, ["a" * 200]) == [Letters().encode("a" * 8, add_special_tokens=False)] * 16


class Chat(Letters):
    """A tokenizer with a chat template."""

    chat_template = "a template"

    def apply_chat_template(self, messages, add_generation_prompt, return_dict):
        assert add_generation_prompt
        assert not return_dict
        assert [m["role"] for m in messages] == ["user"]
        return [7, 8, 9]


def test_a_model_with_a_chat_template_writes_an_answer(model):
    (written,) = calibration_text.write_sequences(model, Chat(), 1, 10, 0)
    assert written.tolist()[:3] == [7, 8, 9]
    assert written.shape == (10,)


@pytest.mark.parametrize("has_its_own", [True, False])
def test_a_model_that_already_carries_the_cache_hook_writes_with_plain_caches(has_its_own):
    model = tiny_model(**SIZES)
    own = {"make_cache": (lambda self: [KVCache() for _ in self.layers]) if has_its_own else None}
    model.__class__ = type("Hooked", (type(model),), own)

    def hook():
        raise AssertionError("the hook would calibrate, and calibration asks the hook")

    model.make_cache = hook
    assert len(calibration_text.write_sequences(model, Letters(), 1, 5, 0)) == 1


def test_caches_of_the_models_own_making_are_used_for_writing():
    model = tiny_model(layer_types=["full_attention", "sliding_attention"], sliding_window=4, **SIZES)
    made = []

    class Own(type(model)):
        def make_cache(self):
            made.append([KVCache() for _ in self.layers])
            return made[-1]

    model.__class__ = Own
    calibration_text.write_sequences(model, Letters(), 1, 5, 0)
    assert [c.offset for c in made[0]] == [4, 4]


def test_positions_lie_within_the_context_and_reach_its_end():
    ids = [mx.zeros(100, mx.int32)] * 64
    offsets = [p.offset for p in calibration_text.place(ids, 1000)]
    assert offsets[0] == min(offsets) == 0
    assert 800 < max(offsets) <= 900
    assert sum(o < 225 for o in offsets) == pytest.approx(32, abs=2)  # half of them in the first quarter
    assert [p.offset for p in calibration_text.place(ids, 0)] == [0] * 64


def test_the_context_is_the_models_and_bounded(model):
    assert calibration_text.context_of(model) == calibration_text.context_of(Empty()) == 0
    assert calibration_text.context_of(tiny_model(max_position_embeddings=4096, **SIZES)) == 4096
    assert calibration_text.context_of(tiny_model(max_position_embeddings=10**6, **SIZES)) == 32768


def test_the_longest_sequence_is_read_wherever_a_configuration_says_it():
    for args, expected in (
        ({"max_position_embeddings": 10**6}, 10**6),
        ({"n_positions": 2048}, 2048),
        ({"max_seq_len": 4096, "max_position_embeddings": None}, 4096),
        ({"text_config": {"max_position_embeddings": 131_072}}, 131_072),
        ({"text_config": types.SimpleNamespace(max_position_embeddings=777)}, 777),
        ({"vocab_size": 5}, None),
    ):
        model = types.SimpleNamespace(args=types.SimpleNamespace(**args))
        assert calibration_text.longest_sequence(model) == expected
        assert calibration_text.context_of(model) == min(expected or 0, 32768)


def raised(metric, floor=1e-5):
    values, vectors = np.linalg.eigh(metric)
    return (vectors * np.maximum(values, floor * values[-1])) @ vectors.T


def test_the_variance_codec_weighs_keys_by_their_queries_and_values_by_the_output_projection(monkeypatch):
    model = tiny_model(**SIZES)
    codec = calibrate_codec(model, Letters(), 3, 32, texts=TEXTS, objective="variance")
    calls = seen_by_own_hook(monkeypatch, model)
    for layer, (keys, values) in codec.layers.items():
        output = np.array(model.layers[layer].self_attn.o_proj.weight, dtype=np.float64).T.reshape(4, 16, -1)
        for h in range(2):
            queries = np.concatenate([vectors_of(calls, layer, 0, head) for head in (2 * h, 2 * h + 1)])
            metrics = queries.T @ queries / len(queries), sum(w @ w.T for w in output[2 * h : 2 * h + 2])
            for part, (transforms, metric) in enumerate(zip((keys, values), metrics, strict=True)):
                x = vectors_of(calls, layer, 1 + part, h)
                analysis = transforms.analysis[h].astype(np.float64)
                expected = raised(metric)
                assert analysis @ analysis.T == pytest.approx(expected, abs=1e-4 * np.abs(expected).max())
                covariance = analysis.T @ np.cov(x, rowvar=False, bias=True) @ analysis
                top = covariance[0, 0]
                assert covariance == pytest.approx(np.diag(transforms.eigenvalues[h]), abs=1e-3 * top)
                assert transforms.mean[h] == pytest.approx(x.mean(axis=0), abs=1e-4)


@pytest.mark.parametrize("projection", ["quantized", "none"])
def test_the_output_projection_may_be_quantized_or_missing(projection):
    model = tiny_model(**SIZES)
    attention = model.layers[1].self_attn
    if projection == "quantized":
        attention.o_proj = nn.QuantizedLinear.from_linear(attention.o_proj, 32, 8)
        weight = mx.dequantize(*(attention.o_proj[n] for n in ("weight", "scales", "biases")), group_size=32, bits=8)
        rows = np.array(weight, dtype=np.float64).T.reshape(4, 16, -1)
        expected = [raised(sum(w @ w.T for w in rows[2 * h : 2 * h + 2])) for h in range(2)]
    else:
        attention.mixer_out = attention.o_proj
        del attention.o_proj
        attention.__class__ = type("Renamed", (Renamed, type(attention)), {})
        expected = [np.eye(16)] * 2
    codec = calibrate_codec(model, Letters(), 3, 32, texts=TEXTS, objective="variance")
    for h in range(2):
        analysis = codec.layers[1][1].analysis[h].astype(np.float64)
        assert analysis @ analysis.T == pytest.approx(expected[h], abs=1e-4 * np.abs(expected[h]).max())


class Renamed:
    """An attention whose output projection has a name that nobody knows."""

    def __getattr__(self, name):
        return super().__getattr__("mixer_out" if name == "o_proj" else name)


def test_an_unknown_objective_is_refused(model):
    with pytest.raises(ValueError, match='objective is \'best\'; expected "fisher" or "variance"'):
        calibrate_codec(model, Letters(), texts=TEXTS, objective="best")
