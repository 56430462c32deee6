import dataclasses
import json
import os
import time
import warnings

import mlx.core as mx
import numpy as np
import pytest
from conftest import random_codec, random_prompt, random_transforms, tiny_model, tiny_tokenizer
from mlx import nn
from mlx.utils import tree_flatten, tree_map
from mlx_lm.tuner.utils import linear_to_lora_layers
from safetensors.numpy import load as load_safetensors
from safetensors.numpy import save as save_safetensors

from vq_kvcache.spectral import calibrate, codec
from vq_kvcache.spectral.codec import Codec, CodecError, Transforms, find_codec, fingerprint, plan_of_rotations
from vq_kvcache.spectral.packing import WORD_BITS
from vq_kvcache.spectral.spectral_quant import SpectralQuantizer, SpectralRotation

BITS = [0.25, 1, 1.5, 2, 2.25, 2.5, 3, 4, 8]
PARTS = [f.name for f in dataclasses.fields(Transforms)]


@pytest.fixture
def stored(tmp_path):
    """A saved codec and its file."""
    made = random_codec(layers=2, heads=2, key_dims=8, value_dims=12)
    made.save(tmp_path / "codec.safetensors")
    return made, tmp_path / "codec.safetensors"


def rewrite(file, change):
    """Save the codec's file again after `change(arrays, description)`."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    description = json.loads(json.loads(content[8 : 8 + length])["__metadata__"][codec.FORMAT])
    arrays = load_safetensors(content)
    change(arrays, description)
    file.write_bytes(save_safetensors(arrays, {codec.FORMAT: json.dumps(description)}))


# Files.


@pytest.mark.parametrize("kind", [str, lambda path: path])
def test_a_saved_codec_comes_back_whole(tmp_path, kind):
    made = random_codec(layers=3, heads=2, key_dims=8, value_dims=12, name="llama-1")
    made.save(kind(tmp_path / "new" / "codec.safetensors"))
    found = Codec.load(kind(tmp_path / "new" / "codec.safetensors"))
    assert (found.fingerprint, found.provenance, found.identity) == ("llama-1", made.provenance, made.identity)
    assert sorted(found.layers) == [0, 1, 2]
    for i, pair in made.layers.items():
        for a, b in zip(pair, found.layers[i], strict=True):
            assert all(np.array_equal(getattr(a, p), getattr(b, p)) for p in PARTS)


def test_equal_codecs_are_equal_files_and_others_have_another_identity(tmp_path):
    for name in ("a", "b"):
        random_codec(layers=3, key_dims=8).save(tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    identities = {random_codec(key_dims=8, seed=s, name=n).identity for s in (0, 1) for n in ("x", "y")}
    assert len(identities) == 4


def test_the_order_of_layers_and_of_provenance_changes_nothing():
    made = random_codec(layers=3, key_dims=8)
    backwards = {i: made.layers[i] for i in (2, 1, 0)}
    a, b = Codec("x", made.layers, {"seed": 0, "text": "t"}), Codec("x", backwards, {"text": "t", "seed": 0})
    assert a.identity == b.identity
    assert list(a.plan(2).layers) == list(b.plan(2).layers) == [0, 1, 2]


def test_an_interrupted_save_leaves_the_old_codec(stored, monkeypatch):
    made, file = stored

    def interrupted(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        random_codec(seed=5).save(file)
    assert Codec.load(file).identity == made.identity
    assert list(file.parent.glob("*codec.safetensors*")) == [file]


@pytest.mark.parametrize("keep", [0, 3, 8, 9, 100, 0.5, -1])
def test_a_truncated_codec_is_refused(stored, keep):
    _, file = stored
    content = file.read_bytes()
    file.write_bytes(content[: int(keep * len(content)) if isinstance(keep, float) else keep])
    with pytest.raises(
        CodecError, match=r"codec\.safetensors is truncated or no codec file \(.*\); calibrate again\.$"
    ):
        Codec.load(file)


NO_CODECS = [
    b"garbage " * 100,
    b"\xff" * 64,
    bytes(4096),
    (2).to_bytes(8, "little") + b"{}",
    (4).to_bytes(8, "little") + b"[[]]",
    save_safetensors({"a": np.ones(3)}),
    save_safetensors({"a": np.ones(3)}, {codec.FORMAT: "not JSON"}),
    save_safetensors({"a": np.ones(3)}, {codec.FORMAT: "[1]"}),
]


@pytest.mark.parametrize("content", NO_CODECS)
def test_what_is_no_codec_is_refused(tmp_path, content):
    (tmp_path / "codec").write_bytes(content)
    with pytest.raises(CodecError, match=r"codec is truncated or no codec file \(.*\); calibrate again\.$"):
        Codec.load(tmp_path / "codec")


def test_a_missing_codec_is_refused(tmp_path):
    with pytest.raises(CodecError, match=r"codec cannot be read \(No such file or directory\); expected a saved codec"):
        Codec.load(tmp_path / "codec")


@pytest.mark.parametrize("version", [0, codec.VERSION + 1, str(codec.VERSION), None])
def test_a_codec_of_another_version_is_refused(stored, version):
    _, file = stored
    rewrite(file, lambda arrays, description: description.update(version=version))
    with pytest.raises(CodecError, match=rf"codec version {version}, expected {codec.VERSION}; calibrate again"):
        Codec.load(file)


@pytest.mark.parametrize("missing", ["fingerprint", "provenance"])
def test_a_codec_that_does_not_say_whose_it_is_is_refused(stored, missing):
    _, file = stored
    rewrite(file, lambda arrays, description: description.pop(missing))
    with pytest.raises(CodecError, match=rf"is truncated or no codec file \('{missing}'\)"):
        Codec.load(file)


@pytest.mark.parametrize("part", PARTS)
def test_a_codec_without_one_of_its_arrays_is_refused(stored, part):
    _, file = stored
    rewrite(file, lambda arrays, description: arrays.pop(f"layers.1.values.{part}"))
    with pytest.raises(CodecError, match=rf"is truncated or no codec file \('layers\.1\.values\.{part}'\)"):
        Codec.load(file)


def change_array(name, change):
    def changed(arrays, description):
        arrays[name] = np.ascontiguousarray(change(arrays[name]))

    return changed


@pytest.mark.parametrize("part", PARTS)
def test_a_codec_of_other_numbers_than_float32_is_refused(stored, part):
    _, file = stored
    rewrite(file, change_array(f"layers.0.keys.{part}", lambda a: a.astype(np.float64)))
    with pytest.raises(CodecError, match=r"codec\.safetensors: layers\.0\.keys is not float32 \[H, D\]; expected"):
        Codec.load(file)


@pytest.mark.parametrize("part", PARTS)
def test_a_codec_with_nan_is_refused(stored, part):
    _, file = stored
    rewrite(file, change_array(f"layers.0.keys.{part}", lambda a: np.where(a == a.max(), np.nan, a)))
    with pytest.raises(CodecError, match=r"codec\.safetensors: transforms hold NaN, infinity or a scale of 0"):
        Codec.load(file)


@pytest.mark.parametrize("part", PARTS[1:])
def test_a_codec_of_the_wrong_shape_is_refused(stored, part):
    _, file = stored
    rewrite(file, change_array(f"layers.0.keys.{part}", lambda a: a[..., :-1]))
    with pytest.raises(
        CodecError, match=r"codec\.safetensors: transforms have shapes .*; expected .*; calibrate again"
    ):
        Codec.load(file)


def test_a_stretch_of_zero_is_refused():
    transforms = random_transforms(np.random.default_rng(0), 2, 8)
    with pytest.raises(CodecError, match="transforms hold NaN, infinity or a scale of 0; expected finite ones"):
        dataclasses.replace(transforms, stretch=np.zeros_like(transforms.stretch))


def test_a_codec_without_layers_is_refused():
    with pytest.raises(CodecError, match="no layer has a KV cache to pack; expected at least one full-attention layer"):
        Codec("nobody", {}, {})


# Plans.


def stored_bits(quantizers):
    """(bits, numbers) of a vector of every head of some quantizers."""
    return (
        sum(WORD_BITS * q.words for q in quantizers),
        sum(q.layout.heads * q.head_dim for q in quantizers),
    )


def quantizers_of(plan):
    return [q for layer in plan.layers.values() for q in (layer.keys, layer.values)]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("objective", ["variance", "fisher"])
def test_a_plan_meets_its_budget_from_below(bits, objective):
    made = random_codec(layers=3, heads=2, key_dims=48, value_dims=32)
    made.provenance["objective"] = objective
    quantizers = quantizers_of(made.plan(bits))
    assert len(quantizers) == 6
    for budgeted in [quantizers] if objective == "fisher" else [[q] for q in quantizers]:
        found, numbers = stored_bits(budgeted)
        assert bits * numbers - WORD_BITS < found <= bits * numbers


def test_layers_that_matter_more_get_more_bits_where_costs_are_in_nats():
    made = random_codec(layers=2, heads=2, key_dims=32)
    costly = dataclasses.replace(made.layers[1][0], costs=made.layers[1][0].costs * 100)
    weighed = Codec("x", {0: made.layers[0], 1: (costly, made.layers[1][1])}, {"objective": "fisher"})
    plan = weighed.plan(2)
    assert plan.layers[1].keys.words > 1.5 * plan.layers[1].values.words
    assert plan.layers[0].keys.words == plan.layers[0].values.words
    equal = Codec("x", weighed.layers, {"objective": "variance"}).plan(2)
    assert {q.words for q in quantizers_of(equal)} == {2 * 2 * 32 // 32}


def test_a_head_that_costs_more_gets_more_of_its_layers_bits():
    transforms = random_transforms(np.random.default_rng(0), 2, 32)
    costs = transforms.costs * np.array([1, 50], np.float32)[:, None, None]
    made = Codec("x", {0: (dataclasses.replace(transforms, costs=costs), transforms)}, {"objective": "variance"})
    widths = made.plan(2).layers[0].keys.widths
    assert sum(widths[1]) > 1.5 * sum(widths[0])
    equal = made.plan(2).layers[0].values.widths
    assert sum(equal[0]) == sum(equal[1])


def test_a_bit_that_measured_worse_by_chance_does_not_end_the_allocation():
    transforms = random_transforms(np.random.default_rng(0), 1, 32)
    costs = transforms.costs.copy()
    costs[:, :, 1] = costs[:, :, 0] * 1.001
    noisy = Codec("x", {0: (dataclasses.replace(transforms, costs=costs),) * 2}, {"objective": "variance"})
    widths = np.array(noisy.plan(2).layers[0].keys.widths[0])
    assert widths.sum() >= 62
    assert (np.diff(widths) <= 0).all()


def test_a_stretched_coordinate_is_quantized_with_that_much_more_room():
    transforms = random_transforms(np.random.default_rng(0), 1, 16)
    widths = [np.array([4] * 16)]
    wide = dataclasses.replace(
        transforms, stretch=np.where(np.arange(9) == 4, 1.5, 1).astype(np.float32) + 0 * transforms.stretch
    )
    x = mx.random.normal((1, 50, 16), key=mx.random.key(0)) * 2
    expected = SpectralQuantizer.from_transform(
        transforms.mean[0], transforms.analysis[0], transforms.eigenvalues[0] * 1.5**2, widths[0]
    )
    assert (wide.quantizer(widths).encode(x).codes == expected.encode(x[0]).codes).all().item()
    assert not (wide.quantizer(widths).encode(x).codes == transforms.quantizer(widths).encode(x).codes).all().item()


def test_plans_are_named_by_the_codecs_identity_and_made_once():
    made = random_codec()
    plan = made.plan(2)
    assert made.plan(2) is plan
    assert plan.name == f"{made.identity}@2.0"
    assert plan.fingerprint == made.fingerprint
    assert made.plan(3).name != plan.name
    assert plan.layers[0].nbytes == plan.layers[0].keys.nbytes + plan.layers[0].values.nbytes > 0


@pytest.mark.parametrize("bits", [0, 0.2, 8.1, -1, float("nan")])
def test_budgets_out_of_range_are_refused(bits):
    with pytest.raises(ValueError, match=rf"bits_per_value is {bits}; expected a number from 0\.25 to 8"):
        random_codec().plan(bits)


def rotation(dims=16, name="layers.0", seed=0, values=None, scale=1.0):
    basis = np.linalg.qr(np.random.default_rng(seed).normal(size=(dims, dims)))[0]
    spectrum = scale * np.concatenate([[9, 8], 0.5 * 0.8 ** np.arange(dims - 2)])
    arrays = [mx.array(a.astype(np.float32)) for a in (basis, spectrum, np.arange(dims))]
    return SpectralRotation(arrays[0], arrays[1], dims, name, arrays[2], values)


def test_rotations_serve_every_head_of_their_layer():
    rotations = [rotation(name="layers.2", values=rotation(seed=1)), rotation(name="layers.0", seed=2)]
    plan = plan_of_rotations(rotations, {0: 2, 1: 2, 2: 3}, 4, 1, False)
    assert sorted(plan.layers) == [0, 2]
    assert plan.layers[0].values is None
    assert plan.layers[2].keys.widths == [[4] * 2 + [1] * 14] * 3
    x = mx.random.normal((1, 3, 5, 16), key=mx.random.key(0))
    for found, r in ((plan.layers[2].keys, rotations[0]), (plan.layers[2].values, rotations[0].values)):
        alone = SpectralQuantizer(r, 4, 1)
        assert mx.allclose(found.decode(found.encode(x)), alone.decode(alone.encode(x)), atol=1e-5).item()


def test_rotations_without_a_number_in_their_name_go_by_position():
    assert sorted(plan_of_rotations([rotation(name="a"), rotation(name="b")], {0: 1, 1: 1}, 4, 1, True).layers) == [
        0,
        1,
    ]


def test_a_rotation_of_a_layer_that_the_model_does_not_have_is_refused():
    with pytest.raises(CodecError, match=r"rotation 'layers\.7' names layer 7; the model's KV caches are \[0, 1\]"):
        plan_of_rotations([rotation(name="layers.7")], {0: 1, 1: 1}, 4, 1, False)


def test_plans_of_rotations_are_named_by_all_that_changes_their_codes():
    def name(rotations, *options):
        return plan_of_rotations(rotations, {0: 1, 1: 1}, *options).name

    base = name([rotation()], 4, 1, False)
    assert base == name([rotation()], 4, 1, False)
    others = [
        name([rotation()], 5, 1, False), name([rotation()], 4, 2, False), name([rotation()], 4, 1, True),
        name([rotation(seed=1)], 4, 1, False), name([rotation(scale=2.0)], 4, 1, False),
        name([rotation(name="layers.1")], 4, 1, False), name([rotation(values=rotation())], 4, 1, False),
    ]  # fmt: skip
    assert len({base, *others}) == 1 + len(others)


# Whose codec.


def test_the_fingerprint_of_the_same_weights_is_the_same():
    assert fingerprint(tiny_model()) == fingerprint(tiny_model())
    assert fingerprint(tiny_model()).startswith("llama-")


def wider(model):
    model.set_dtype(mx.float32)


def fine_tuned(model):
    model.update(tree_map(lambda a: a * 1.001, model.parameters()))


def one_layer(model):
    model.layers[1].mlp.up_proj.weight *= 1.01


def last_rows(model):
    weight = model.layers[1].mlp.up_proj.weight
    model.layers[1].mlp.up_proj.weight = mx.concatenate([weight[:-20], weight[-20:] * 1.01])


def renamed(model):
    model.args.rope_theta = 5e5


def adapted(model):
    linear_to_lora_layers(model, 1, {"rank": 4, "scale": 10.0, "dropout": 0.0})


def quantized(model):
    nn.quantize(model, group_size=32, bits=8)


@pytest.mark.parametrize("change", [wider, fine_tuned, one_layer, last_rows, renamed, adapted, quantized])
def test_the_fingerprint_changes_with_anything_that_changes_keys_or_values(change):
    model = tiny_model()
    model.set_dtype(mx.float16)
    before = fingerprint(model)
    change(model)
    assert fingerprint(model) != before


def test_a_model_that_widens_parameters_when_it_runs_keeps_its_name():
    """As gemma3n does, whose second turn would find no codec."""
    model = tiny_model()
    model.set_dtype(mx.bfloat16)
    before = fingerprint(model)
    model.model.norm.set_dtype(mx.float32)
    assert model.model.norm.weight.dtype == mx.float32
    assert fingerprint(model) == before


def test_training_an_adapter_changes_the_fingerprint():
    model = tiny_model()
    adapted(model)
    before = fingerprint(model)
    model.layers[1].self_attn.q_proj.lora_b += 0.1
    assert fingerprint(model) != before


class Large(nn.Module):
    """80 million parameters in 320 arrays."""

    def __init__(self):
        super().__init__()
        self.arrays = [mx.zeros((500, 500), mx.float16) for _ in range(320)]


def test_the_fingerprint_of_a_large_model_is_quick_and_reads_little():
    model = Large()
    mx.eval(model.parameters())
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    start = time.perf_counter()
    fingerprint(model)
    assert time.perf_counter() - start < 0.5
    assert mx.get_peak_memory() - before <= 2 * codec.SAMPLED_BYTES
    assert sum(a.size for _, a in tree_flatten(model.parameters())) == 80_000_000


def test_a_stored_codec_is_found_by_the_fingerprint():
    made = random_codec(name="llama-abc")
    assert find_codec("llama-abc") is None
    made.save(codec.stored_path("llama-abc"))
    assert find_codec("llama-abc").identity == made.identity
    assert find_codec("llama-abd") is None


def test_a_shipped_codec_is_found_after_the_stored_one(tmp_path, monkeypatch):
    monkeypatch.setattr(codec, "shipped_path", lambda name: tmp_path / f"{name}.safetensors")
    shipped, stored = random_codec(name="llama-abc"), random_codec(name="llama-abc", seed=1)
    shipped.save(tmp_path / "llama-abc.safetensors")
    assert find_codec("llama-abc").identity == shipped.identity
    stored.save(codec.stored_path("llama-abc"))
    assert find_codec("llama-abc").identity == stored.identity


def test_a_stored_codec_of_another_model_is_refused():
    random_codec(name="llama-abc").save(codec.stored_path("llama-xyz"))
    with pytest.raises(
        CodecError, match=r"llama-xyz\.safetensors belongs to model llama-abc, not llama-xyz; remove it"
    ):
        find_codec("llama-xyz")


def test_a_truncated_stored_codec_is_refused_and_not_calibrated_over():
    model = tiny_model()
    file = codec.stored_path(fingerprint(model))
    file.parent.mkdir(parents=True)
    file.write_bytes(b"half")
    with pytest.raises(CodecError, match="is truncated or no codec file"):
        calibrate.codec_for(model, tiny_tokenizer())
    assert file.read_bytes() == b"half"


def quick_calibration(monkeypatch, made):
    """Let codec_for calibrate on one short sequence; `made` collects the tokenizers it was given."""
    calibrate_codec = calibrate.calibrate_codec

    def quick(model, tokenizer):
        made.append(tokenizer)
        return calibrate_codec(model, tokenizer, 1, 16, texts=["w2 w3 w5 w7 w11 w13 " * 10], objective="variance")

    monkeypatch.setattr(calibrate, "calibrate_codec", quick)


@pytest.mark.parametrize("loader", [False, True])
def test_a_codec_is_calibrated_once_and_stored(monkeypatch, loader):
    made, tokenizer, model = [], tiny_tokenizer(), tiny_model()
    quick_calibration(monkeypatch, made)
    first = calibrate.codec_for(model, (lambda: tokenizer) if loader else tokenizer)
    assert codec.stored_path(fingerprint(model)).is_file()
    assert calibrate.codec_for(model, None).identity == first.identity
    assert made == [tokenizer]


def test_neither_codec_nor_tokenizer_is_an_error():
    with pytest.raises(CodecError, match=r"no codec of model llama-\w+ in .*codecs and no tokenizer .*; pass the"):
        calibrate.codec_for(tiny_model(), None)


def test_a_cache_folder_that_cannot_be_written_costs_a_warning(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    monkeypatch.setenv("VQ_KVCACHE_HOME", str(tmp_path / "file"))
    quick_calibration(monkeypatch, [])
    with pytest.warns(UserWarning, match=r"the codec could not be stored in .*file.*\.safetensors \(.*\)"):
        assert calibrate.codec_for(tiny_model(), tiny_tokenizer()).layers


@pytest.mark.parametrize("objective", ["fisher", "variance"])
def test_a_model_with_adapters_is_calibrated(objective):
    model = tiny_model()
    linear_to_lora_layers(model, 2, {"rank": 4, "scale": 10.0, "dropout": 0.0, "keys": ["self_attn.o_proj"]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        text = " ".join(f"w{i}" for i in random_prompt(48))
        made = calibrate.calibrate_codec(model, tiny_tokenizer(), 1, 48, texts=[text], objective=objective, window=8)
    assert sorted(made.layers) == [0, 1]
    assert made.provenance["objective"] == objective
    assert made.fingerprint == fingerprint(model)
