"""What inspect says of a model, a codec and a prompt cache, and that calibrate makes the codec it speaks of."""

import json

import mlx.core as mx
import pytest
from conftest import random_codec, tiny_config
from mlx_lm.models import cache as mlx_lm_cache
from mlx_lm.models.cache import KVCache, RotatingKVCache
from test_kinds_of_models import KINDS, build
from test_split_models import save

from vq_kvcache import SpectralKVCache, cli, hooks
from vq_kvcache.inspection import inspect
from vq_kvcache.spectral.codec import Codec, fingerprint, stored_path

PACKED = "keys and values"
# kind -> (packed, why) of each cache
SAID = {
    "gemma3_text": [
        (False, "sliding window: holds at most 24 tokens"), (False, "sliding window: holds at most 24 tokens"),
        (True, PACKED),
    ],
    "llama4": [(False, "chunked attention: holds at most 256 tokens")] * 3 + [(True, PACKED)],
    "qwen3_next": [(False, "recurrent state: does not grow"), (True, PACKED)],
    "deepseek_v32": [
        (True, "latents; positions beside them stay exact"), (False, "keys of an indexer, which no attention reads"),
    ] * 2,
    "gemma2": [(True, "keys and values; decoded at each step for the model's own attention")] * 2,
}  # fmt: skip


@pytest.mark.parametrize("kind", SAID)
def test_a_model_says_what_is_packed_and_why_not(kind, tmp_path):
    model = build(kind)
    folder = save(model, {"model_type": kind, **KINDS[kind][0]}, tmp_path / kind)
    report = inspect(str(folder))
    assert (report["kind"], report["codec"]) == ("model", None)
    assert report["fingerprint"] == fingerprint(model)
    assert [(row["packed"], row["why"]) for row in report["layers"]] == SAID[kind]
    assert not list(tmp_path.glob("home/**/*.safetensors"))  # nothing was calibrated
    json.dumps(report)


def test_a_model_with_its_codec_has_bytes_and_kl(model_folder, codec):
    told = {"objective": "fisher", "sequence_length": 256, "window": 64, "sinks": 4, "context": 300}
    nats = Codec(codec.fingerprint, codec.layers, told)
    del nats.layers[1]
    nats.save(stored_path(nats.fingerprint))
    report = inspect(str(model_folder))
    assert report["codec"] == nats.identity
    assert [(row["packed"], row["why"]) for row in report["layers"]] == [
        (True, PACKED), (False, "not in the model's codec"),
    ]  # fmt: skip
    one = 2 * (32 + 32) * 4  # heads, numbers and bytes of a float32 layer
    assert [row["bytes_per_token"] for row in report["layers"]] == [one] * 2
    assert report["bytes_per_token"] == {
        "full precision": 2 * one, **{f"{b} bits": one + 2 * 64 * b // 8 for b in (1, 2, 3, 4)}
    }  # fmt: skip
    assert report["predicted_kl"] == {f"{b} bits": nats.predicted_kl(float(b), 300) for b in (1, 2, 3, 4)}
    assert report["predicted_kl_tokens"] == 300


def test_positions_beside_latents_count_in_full(tmp_path):
    model = build("deepseek_v32")
    keys = random_codec(layers=3, heads=1).layers
    Codec(fingerprint(model), {i: (keys[i][0], None) for i in (0, 2)}, {"objective": "none"}).save(
        stored_path(fingerprint(model))
    )
    folder = save(model, {"model_type": "deepseek_v32", **KINDS["deepseek_v32"][0]}, tmp_path / "model")
    report = inspect(str(folder))
    assert report["predicted_kl"] is None
    assert report["bytes_per_token"]["full precision"] == 2 * (32 + 8) * 4
    assert report["bytes_per_token"]["2 bits"] == 2 * (32 * 2 // 8 + 8 * 4)


def test_a_codec_file(codec, tmp_path, capsys):
    codec.save(tmp_path / "mine.safetensors")
    report = inspect(str(tmp_path / "mine.safetensors"))
    assert (report["kind"], report["identity"]) == ("codec", codec.identity)
    assert (report["fingerprint"], report["predicted_kl"]) == (codec.fingerprint, None)
    assert report["bytes"] == (tmp_path / "mine.safetensors").stat().st_size
    assert [(r["heads"], r["key_dims"], r["value_dims"], r["keys_bits_at_2"]) for r in report["layers"]] == [
        (2, 32, 32, 2.0)
    ] * 2
    assert cli.main(["inspect", str(tmp_path / "mine.safetensors"), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(json.dumps(report))


def filled(cache, tokens=300):
    cache.update_and_fetch(*(mx.random.normal((1, 2, tokens, 32)) for _ in range(2)))
    return cache


def test_a_prompt_cache_needs_no_codec(packed, lossless, tmp_path, capsys):
    file = str(tmp_path / "prompt.safetensors")
    inner = filled(lossless())
    caches = [filled(packed()), filled(RotatingKVCache(max_size=40)), mlx_lm_cache.CacheList(inner, filled(KVCache()))]
    with hooks.install():
        mlx_lm_cache.save_prompt_cache(file, caches, {"model": "somewhere"})
    report = inspect(file)
    assert (report["kind"], report["model"], report["bytes"]) == ("prompt cache", "somewhere", (tmp_path /
            "prompt.safetensors").stat().st_size)  # fmt: skip
    rows = report["layers"]
    assert [(r["cache"], r["class"], r["packed"]) for r in rows] == [
        (0, "SpectralKVCache", True), (1, "RotatingKVCache", False), (2, "SpectralKVCache", True),
        (2, "CacheList", False),
    ]  # fmt: skip
    for row, cache in ((rows[0], caches[0]), (rows[2], inner)):
        assert row["packed_tokens"] == cache.stats()["packed_tokens"] == 192
        assert row["exact_tokens"] == cache.stats()["exact_tokens"]
        assert row["bytes"] == cache.nbytes
        assert row["plan"] == cache._plan_name
    assert rows[1]["bytes"] >= caches[1].nbytes > 0
    plain = sum(a.nbytes for a in caches[2][1].state if isinstance(a, mx.array))
    assert 0 <= rows[3]["bytes"] - plain < 1000  # and two names
    assert len(report["codecs"]) == 2
    assert cli.main(["inspect", file]) == 0
    text = capsys.readouterr().out
    assert "kind: prompt cache" in text
    assert "packed_tokens" in text


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"", "is no safetensors file"),
        (b"\xff" * 20, "is no safetensors file (its header is longer than the file)"),
        (None, "is neither a codec nor a prompt cache of mlx-lm; expected a file of one of them."),
    ],
)
def test_another_file_is_refused(content, sentence, tmp_path, capsys):
    file = tmp_path / "other.safetensors"
    if content is None:
        mx.save_safetensors(str(file), {"a": mx.zeros(3)}, {"format": "mlx"})
    else:
        file.write_bytes(content)
    assert cli.main(["inspect", str(file)]) == 1
    assert f"vq_kvcache inspect: {file} {sentence}" in capsys.readouterr().err


def test_calibrate_makes_the_codec_that_the_cache_finds(model_folder, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text(" ".join(f"w{2 + i * i % 95}" for i in range(400)))
    line = ["calibrate", str(model_folder), "--text", str(text), "--samples", "2", "--length", "160"]
    assert cli.main(line) == 0
    first = capsys.readouterr().out
    report = inspect(str(model_folder))
    assert report["codec"] is not None
    assert f"codec {report['codec']} of model {report['fingerprint']}, 2 layers" in first
    assert "predicted KL, nats, of the newest of 4,096 tokens:" in first
    assert cli.main([*line, "--output", str(tmp_path / "codec.safetensors")]) == 0
    assert inspect(str(tmp_path / "codec.safetensors"))["identity"] == report["codec"]
    assert inspect(str(tmp_path / "codec.safetensors"))["provenance"]["text"] == "user"
    caches = hooks.load(str(model_folder))[0].make_cache()
    assert [type(c) for c in caches] == [SpectralKVCache] * tiny_config()["num_hidden_layers"]


def test_calibrate_says_what_is_missing(model_folder, tmp_path, capsys):
    assert cli.main(["calibrate", str(model_folder), "--text", str(tmp_path / "none.txt")]) == 1
    assert "vq_kvcache calibrate: [Errno 2] No such file" in capsys.readouterr().err
