"""A model spread over several processes by mlx-lm, on MLX's ring back-end over loopback, against one process."""

import contextlib
import json
import pathlib
import socket
import subprocess
import sys

import mlx.core as mx
import numpy as np
import pytest
import split_worker
from conftest import random_codec, tiny_config, tiny_model, tiny_tokenizer
from mlx.utils import tree_flatten
from mlx_lm.models import ministral3

import vq_kvcache
from vq_kvcache import cache as cache_module
from vq_kvcache.demo import model_folder as shipped_folder
from vq_kvcache.shards import Share
from vq_kvcache.spectral.codec import CodecError, fingerprint, fingerprint_of_files, stored_path

HERE = pathlib.Path(__file__).resolve().parent
SECONDS = 150


def free_ports(count):
    """The first of so many neighbouring ports that nobody listens on, below those that systems hand out."""
    for first in np.random.default_rng().integers(10_000, 30_000, 100).tolist():
        with contextlib.ExitStack() as stack, contextlib.suppress(OSError):
            for port in range(first, first + count):
                stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
            return first
    raise AssertionError("no free ports")


def launch(processes, folder, how, output):
    """The worker in so many processes; returns (logits by cache, what each rank held)."""
    port = free_ports(processes)
    launcher = pathlib.Path(sys.executable).with_name("mlx.launch")
    command = [launcher, "-n", processes, "--backend", "ring", "--starting-port", port, "--python", sys.executable,
               "--", HERE / "split_worker.py", folder, how, output]  # fmt: skip
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=SECONDS, check=False)
    files = [pathlib.Path(f"{output}.{rank}.json") for rank in range(processes)]
    assert all(f.exists() for f in files), done.stdout[-1500:] + done.stderr[-1500:]
    return np.load(f"{output}.npz"), [json.loads(f.read_text()) for f in files]


def mean_kl(a, b):
    p, q = (x - np.logaddexp.reduce(x, axis=-1, keepdims=True) for x in (a.astype(np.float64), b.astype(np.float64)))
    return (np.exp(p) * (p - q)).sum(axis=-1).mean()


def assert_same_logits(found, whole):
    """Within 1e-4 of one process. Where sums in another order round a number to the next code the logits move by a
    part of that code's own error, so the codec's are held to a hundredth of its KL."""
    for name in ("own", "lossless"):
        assert np.abs(found[name] - whole[name]).max() < 1e-4
    own_error = mean_kl(whole["own"], whole["codec"])
    assert own_error > 1e-6
    assert mean_kl(whole["codec"], found["codec"]) < own_error / 100
    assert np.abs(found["codec"][:130] - whole["codec"][:130]).max() < 1e-4  # nothing was read from codes yet


def save(model, config, folder):
    """The model in the layout of a Hugging Face repository, with an index as pipelines ask for."""
    folder.mkdir()
    weights = dict(tree_flatten(model.parameters()))
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    index = {"weight_map": dict.fromkeys(weights, "model.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    tiny_tokenizer().save_pretrained(folder)
    return folder


def test_two_processes_share_the_heads_of_the_shipped_model(tmp_path):
    whole, held = split_worker.run(str(shipped_folder()), "whole", None)
    found, ranks = launch(2, shipped_folder(), "tensor", tmp_path / "out")
    assert_same_logits(found, whole)
    assert [r["packed"] for r in ranks] == [held["packed"]] * 2 == [[128] * 6] * 2
    assert [r["heads"] for r in ranks] == [[1] * 6] * 2
    assert [r["plan"] for r in ranks] == [f"{held['plan']}#{rank}/2+0" for rank in (0, 1)]
    assert sum(r["nbytes"] for r in ranks) == pytest.approx(held["nbytes"], rel=0.15)


def test_four_processes_share_eight_heads(tmp_path):
    config = tiny_config(num_attention_heads=16, num_key_value_heads=8, head_dim=16, hidden_size=128)
    model = tiny_model(**{k: v for k, v in config.items() if k != "model_type"})
    folder = save(model, config, tmp_path / "model")
    codec = random_codec(layers=2, heads=8, key_dims=16, name=fingerprint(model))
    codec.save(stored_path(codec.fingerprint))
    whole, held = split_worker.run(str(folder), "whole", None)
    found, ranks = launch(4, folder, "tensor", tmp_path / "out")
    assert_same_logits(found, whole)
    assert [r["heads"] for r in ranks] == [[2, 2]] * 4
    assert [r["packed"] for r in ranks] == [held["packed"]] * 4 == [[128] * 2] * 4


def test_a_pipeline_of_two_packs_its_own_layers(tmp_path):
    rope = {"rope_theta": 10000.0, "llama_4_scaling_beta": 0.1, "original_max_position_embeddings": 64}
    config = tiny_config(model_type="ministral3", num_hidden_layers=4, rope_parameters=rope)
    mx.random.seed(2)
    model = ministral3.Model(ministral3.ModelArgs.from_dict(config))
    mx.eval(model.parameters())
    folder = save(model, config, tmp_path / "model")
    codec = random_codec(layers=4, name=fingerprint(model))
    codec.save(stored_path(codec.fingerprint))
    whole, held = split_worker.run(str(folder), "whole", None)
    found, ranks = launch(2, folder, "pipeline", tmp_path / "out")
    assert_same_logits(found, whole)
    assert [r["heads"] for r in ranks] == [[2, 2]] * 2
    assert [r["plan"] for r in ranks] == [f"{held['plan']}#0/1+{first}" for first in (2, 0)]  # rank 0 has the last


# Without any second process.


def test_a_share_is_its_heads_of_its_layers(codec):
    plan = codec.plan(3.0)
    for rank in (0, 1):
        share = Share(rank, 2, 1)
        part = share.of_plan(plan)
        assert Share.named(part.name) == (plan.name, share)
        assert list(part.layers) == [0]
        for q, whole in zip(
            (part.layers[0].keys, part.layers[0].values), (plan.layers[1].keys, plan.layers[1].values), strict=True
        ):
            assert q.widths == [whole.widths[rank]]
            x = mx.random.normal((1, 2, 5, 32))
            assert mx.array_equal(q.decode_words(q.encode_words(x[:, rank : rank + 1])),
                                  whole.decode_words(whole.encode_words(x))[:, rank : rank + 1]).item()  # fmt: skip
    latent = random_codec(layers=1, heads=1)
    assert Share(1, 4, 0).of_plan(latent.plan(2.0)).layers[0].keys is latent.plan(2.0).layers[0].keys
    assert Share.named(plan.name) == (plan.name, None)


def test_a_saved_share_finds_its_part_of_the_codec(stored_codec, monkeypatch):
    part = Share(1, 2, 0).of_plan(stored_codec.plan(3.0))
    found = cache_module.find_plan(part.name, part.fingerprint)
    assert found is not part
    assert found.name == part.name
    assert [layer.keys.widths for layer in found.layers.values()] == [
        layer.keys.widths for layer in part.layers.values()
    ]


def test_the_name_of_a_whole_model_is_read_from_its_files(model, model_folder):
    from mlx_lm.utils import load_model

    assert fingerprint_of_files(lambda: load_model(model_folder, lazy=True)[0]) == fingerprint(model)


def split(model, monkeypatch):
    monkeypatch.setattr(Share, "of", classmethod(lambda cls, model: Share(0, 2, 0)))
    return model


def test_a_model_split_before_it_was_attached_is_refused(model, monkeypatch):
    with pytest.raises(CodecError, match="the model was split over several processes before it was attached"):
        vq_kvcache.make_prompt_cache(split(model, monkeypatch))


def test_a_split_model_is_not_calibrated(model_folder, monkeypatch):
    import mlx_lm

    with vq_kvcache.install():
        loaded, _ = mlx_lm.load(str(model_folder))
        with pytest.raises(CodecError, match=r"no codec of model llama-\w+ in .*, and a model split .* run `vq_kv"):
            split(loaded, monkeypatch).make_cache()
