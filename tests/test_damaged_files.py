"""What fuzzing found: files that crashed, hung or fooled a reader, and are refused in one sentence since."""

import io
import json
import os
import signal
import time
import zipfile

import mlx.core as mx
import mutations
import numpy as np
import pytest
from conftest import Feed, pair, random_codec
from fuzz_targets import Unfinished
from mlx_lm.models import cache as mlx_lm_cache
from test_rotation_files import three_rotations

import vq_kvcache
from vq_kvcache import inspection, library, patching
from vq_kvcache.batch_cache import BatchSpectralKVCache
from vq_kvcache.cache import SpectralKVCache
from vq_kvcache.spectral.codec import Codec, CodecError, Transforms, stored_path
from vq_kvcache.spectral.files import write_atomically
from vq_kvcache.spectral.rotation_files import RotationFileError, load_cached_rotations, save_rotations
from vq_kvcache.spectral.spectral_quant import SpectralQuantizer


@pytest.fixture(autouse=True)
def _alarm():
    """A reader that waits for ever is a failure."""

    def late(*_):
        raise AssertionError("no answer in 10 seconds")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(10)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


DEEP = "[" * 100_000 + "]" * 100_000


def described(path, change):
    """A codec's file with something else in its description."""
    random_codec().save(path)
    header, body = mutations.split_safetensors(path.read_bytes())
    (key,) = header["__metadata__"]
    header["__metadata__"][key] = change(json.loads(header["__metadata__"][key]))
    path.write_bytes(mutations.joined_safetensors(header, body))
    return path


@pytest.mark.parametrize("name", ["../../escaped", "/tmp/escaped", "a/b", "", "a\nb", None, 7, "x" * 300])
def test_a_codec_cannot_say_where_it_is_stored(tmp_path, name):
    path = described(tmp_path / "evil.safetensors", lambda d: json.dumps({**d, "fingerprint": name}))
    with pytest.raises(CodecError, match="the fingerprint is no plain name; expected letters, digits, - and _; calibr"):
        library.take(path, force=True)
    with pytest.raises(CodecError, match="is no model's fingerprint; expected a plain name"):
        stored_path("../../escaped")


@pytest.mark.parametrize("change", [lambda d: DEEP, lambda d: '{"version": NaN}'])
def test_a_description_that_json_cannot_hold_is_refused(tmp_path, change):
    with pytest.raises(CodecError, match=r"is truncated or no codec file \((nested too deep|the number NaN)\); calib"):
        Codec.load(described(tmp_path / "deep.safetensors", change))


@pytest.mark.parametrize("version", ["\n\x1b[31m", "x" * 5000, [1, [2]]])
def test_a_version_is_quoted_in_one_line(tmp_path, version):
    with pytest.raises(CodecError, match=r"codec version .{,40}, expected 2; calibrate again\.$"):
        Codec.load(described(tmp_path / "a.safetensors", lambda d: json.dumps({**d, "version": version})))


def test_a_patch_is_quoted_in_few_words(tmp_path):
    patch = b"diff --git a/mlx_lm/a b/mlx_lm/a\n--- a/mlx_lm/a\n+++ b/mlx_lm/a\n@@ -1 +1 @@\n-a\n+b\n" + b"\xc1" * 3000
    (tmp_path / "patch").write_bytes(patch)
    with pytest.raises(patching.PatchError, match=r"expected a hunk header instead of .{,180}\); reinstall vq_kvcache"):
        patching._parse(tmp_path / "patch")


@pytest.mark.parametrize("length", ["many", -1, 1e300, None])
def test_a_codec_of_a_length_that_is_no_number_is_refused(tmp_path, length):
    path = described(
        tmp_path / "a.safetensors",
        lambda d: json.dumps({**d, "provenance": {"costs": "nats", "sequence_length": length}}),
    )
    with pytest.raises(CodecError, match=r"it tells of \[.*\] tokens; expected whole numbers; calibrate again"):
        Codec.load(path)


@pytest.mark.parametrize(
    "name", ["mean", "layers.0", "layers.-1.keys.mean", "layers.01.keys.mean", "layers.x.keys.mean"]
)
def test_an_array_of_another_name_is_refused(tmp_path, name):
    path = tmp_path / "a.safetensors"
    random_codec().save(path)
    header, body = mutations.split_safetensors(path.read_bytes())
    header[name] = header.pop("layers.0.keys.mean")
    path.write_bytes(mutations.joined_safetensors(header, body))
    with pytest.raises(CodecError, match=r"it holds '.*'; expected layers\.<i>\.keys\.mean and so on; calibrate again"):
        Codec.load(path)


@pytest.mark.parametrize(("heads", "dims"), [(0, 4), (2, 0), (0, 0)])
def test_transforms_of_nothing_are_refused(heads, dims):
    shapes = (heads, dims), (heads, dims, dims), (heads, dims), (heads, dims, 9), (heads, dims, 9)
    with pytest.raises(CodecError, match=f"transforms of {heads} heads of {dims} are empty or hold numbers beyond"):
        Transforms(*(np.ones(shape, np.float32) for shape in shapes))


@pytest.mark.parametrize("part", ["mean", "analysis", "eigenvalues"])
def test_numbers_that_would_overflow_are_refused(part):
    own = vars(random_codec().layers[0][0])
    with pytest.raises(CodecError, match=r"are empty or hold numbers beyond 1e\+15; expected smaller ones"):
        Transforms(**{**own, part: np.where(np.arange(own[part].size).reshape(own[part].shape) == 0, 1e30, own[part])})
    with pytest.raises(
        ValueError, match=r"singular or not finite; expected|a transform reaches 1e\+15; expected small"
    ):
        SpectralQuantizer.from_transform(np.full(2, 1e30), np.diag([1e200, 1e200]), np.ones(2), [2, 2])


def pipe(path):
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def device(path):
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


@pytest.mark.parametrize("place", [pipe, device])
def test_what_never_ends_is_not_read(tmp_path, place):
    place(tmp_path / "a.safetensors")
    with pytest.raises(CodecError, match=r"cannot be read \(not a regular file\); expected a saved codec"):
        Codec.load(tmp_path / "a.safetensors")
    with pytest.raises(CodecError, match=r"is no file; expected a model, a codec or a prompt cache; check the name"):
        inspection.inspect(str(tmp_path / "a.safetensors"))
    save_rotations(three_rotations(), tmp_path / "r")
    place(tmp_path / "r" / "manifest.json")
    with pytest.raises(RotationFileError, match=r"not a regular file|expected saved rotations; calibrate first"):
        load_cached_rotations(tmp_path / "r")
    place(tmp_path / "_version.py")
    with pytest.raises(patching.PatchError, match="got no __version__ in"):
        patching.check(tmp_path)


def test_a_manifest_nested_too_deep_is_refused(tmp_path):
    (tmp_path / "manifest.json").write_text(DEEP)
    with pytest.raises(RotationFileError, match=r"cannot be read \(nested too deep\); expected JSON; calibrate again"):
        load_cached_rotations(tmp_path)


HEADERS = [
    "{'descr': '<f4', 'fortran_order': False, 'shape': (1099511627776,), }", "{'descr': '|O', 'fortran_order': False,"
    " 'shape': (1,), }", "{'descr': '<f4', 'fortran_order': False, 'shape': (-1,), }", "-" * 9000 + "1", "(" * 5000,
    "'''", "{'descr': '<f4', 'fortran_order': False, 'shape': (999999999, 999999999), }",
]  # fmt: skip


@pytest.mark.parametrize("header", HEADERS)
@pytest.mark.parametrize("archived", [False, True])
def test_an_array_whose_header_lies_is_refused(tmp_path, header, archived):
    text = header.encode() + b"\n"
    content = b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + bytes(16)
    if archived:
        with zipfile.ZipFile(tmp_path / "rotations.npz", "w") as archive:
            archive.writestr("layer_0_key_U.npy", content)
        with pytest.raises(RotationFileError, match=r"rotations\.npz cannot be read \(.*\); expected veloxquant_mlx's"):
            load_cached_rotations(tmp_path)
        return
    save_rotations(three_rotations(), tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    described = manifest["rotations"][0]["arrays"]["eigenvalues"]
    (tmp_path / described["file"]).write_bytes(content)
    described["sha256"] = vq_kvcache.spectral.files.sha256(content)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(RotationFileError, match=r"is no plain \.npy array \(.*\); expected float32; calibrate again"):
        load_cached_rotations(tmp_path)


def test_an_archive_that_blows_up_is_not_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(vq_kvcache.spectral.rotation_files, "MOST_BYTES", 1000)
    buffer = io.BytesIO()
    np.save(buffer, np.zeros(4096, np.float32))
    with zipfile.ZipFile(tmp_path / "rotations.npz", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("layer_0_key_U.npy", buffer.getvalue())
    with pytest.raises(RotationFileError, match=r"more than 1,000 bytes unpacked.*; expected veloxquant_mlx's"):
        load_cached_rotations(tmp_path)


def test_a_negative_variance_is_refused_when_it_is_read(tmp_path):
    save_rotations(three_rotations(), tmp_path)
    entry = json.loads((tmp_path / "manifest.json").read_text())
    made = three_rotations()
    made[0].eigenvalues = -made[0].eigenvalues
    save_rotations(made, tmp_path)
    assert entry
    with pytest.raises(RotationFileError, match="an eigenvalue is negative"):
        load_cached_rotations(tmp_path)


# Prompt caches.


@pytest.fixture
def saved(tmp_path, packed):
    """A prompt-cache file of two caches."""
    caches = [packed() for _ in range(2)]
    for cache in caches:
        Feed(1, (32, 32))(cache, 200)
    path = tmp_path / "saved.safetensors"
    mlx_lm_cache.save_prompt_cache(str(path), caches, {"model": "tiny"})
    with vq_kvcache.install():
        yield path


def rewritten(path, change):
    header, body = mutations.split_safetensors(path.read_bytes())
    change(header)
    path.write_bytes(mutations.joined_safetensors(header, body))


def without(name):
    return lambda header: header["__metadata__"].pop(name)


def with_metadata(**entries):
    return lambda header: header["__metadata__"].update({k.replace("_", "."): v for k, v in entries.items()})


def renamed(old, new):
    return lambda header: header.update({new: header.pop(old)})


CHANGES = [
    with_metadata(_1_0="x"), with_metadata(**{"1.0": "os"}), with_metadata(**{"2.1.0": "9.9"}), without("2.1.0"),
    with_metadata(**{"2.1.1": "number"}), with_metadata(**{"1.2": "SpectralKVCache"}), without("1.0"),
    with_metadata(**{"0" + ".0" * 40: "x"}), with_metadata(**{"3.0": "x"}), renamed("0.1", "0.1000000"),
    renamed("0.1", "0.x"), renamed("0.0", "7.0"), renamed("0.2", ".".join("0" * 900)),
    lambda header: header["0.1"].update(dtype="F4"), lambda header: header["0.1"].pop("shape"),
    lambda header: header["0.1"].update(data_offsets=[0, 1 << 60]), lambda header: header["0.1"].update(shape=[-1]),
    lambda header: header["0.1"].update(dtype=7), lambda header: header.pop("0.1"),
]  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_damaged_prompt_cache_is_refused_in_one_sentence(saved, change):
    rewritten(saved, change)
    with pytest.raises(ValueError, match="; ") as caught:
        mlx_lm_cache.load_prompt_cache(str(saved))
    text = str(caught.value)
    assert text.endswith(".")
    assert "\n" not in text


@pytest.mark.parametrize("content", [b"", b"\0" * 8, b"\xff" * 64, b"{}"])
def test_what_is_no_prompt_cache_is_refused(saved, content):
    saved.write_bytes(content)
    with pytest.raises(
        CodecError, match=r"is no prompt cache that can be read .*; expected a whole one; make it again"
    ):
        mlx_lm_cache.load_prompt_cache(str(saved), return_metadata=True)
    with pytest.raises(CodecError, match="is no safetensors file"):
        inspection.inspect(str(saved))


def test_names_do_not_say_how_much_memory_is_taken(saved):
    rewritten(saved, with_metadata(**{"1.3000000": "SpectralKVCache"}))
    for read in (lambda: mlx_lm_cache.load_prompt_cache(str(saved)), lambda: inspection.inspect(str(saved))):
        with pytest.raises(CodecError, match=r"the name '1\.3000000'"):
            read()


def test_the_loader_goes_when_the_hooks_go(saved):
    import mlx_lm.generate  # noqa: F401  # which binds it

    assert mlx_lm_cache.load_prompt_cache.__wrapped__
    vq_kvcache.uninstall()
    assert not hasattr(mlx_lm_cache.load_prompt_cache, "__wrapped__")


def test_a_file_that_is_written_over_changes_no_cache(saved, packed):
    loaded = mlx_lm_cache.load_prompt_cache(str(saved))
    before = saved.read_bytes()
    saved.write_bytes(b"\xff" * len(before))
    for cache in loaded:
        expected = packed()
        fetched = Feed(1, (32, 32))(expected, 200)
        for x, y in zip(cache.keys_and_values(), expected.keys_and_values(), strict=True):
            np.testing.assert_array_equal(np.array(x + 0), np.array(y + 0))
        assert len(fetched) == 2


def described_state(cache, **fields):
    text, *arrays = cache.state
    return [json.dumps({**json.loads(text), **fields}), *arrays]


@pytest.mark.parametrize("fields", [
    {"window": 10**12}, {"window": 100_000}, {"sinks": -1, "held_sinks": -1}, {"window": -1}, {"layer": -1},
    {"plan": "a\nb"}, {"fingerprint": "../../x"}, {"window": float("inf")}, {"chunks": [64, 0]},
])  # fmt: skip
@pytest.mark.parametrize("make", ["packed", "lossless"])
def test_a_description_that_asks_for_more_than_the_file_holds_is_refused(request, make, fields):
    cache = request.getfixturevalue(make)()
    Feed(1, (32, 32))(cache, 200)
    with pytest.raises(ValueError, match=r"; .*\.$"):
        SpectralKVCache.from_state(described_state(cache, **fields))


@pytest.mark.parametrize("fields", [
    {"columns": 10**9}, {"left_padding": [10**9, 10**9], "columns": 10**9 + 200}, {"left_padding": [-5, 0]},
    {"left_padding": []}, {"window": 10**9}, {"columns": -1},
])  # fmt: skip
def test_a_batch_that_asks_for_more_than_the_file_holds_is_refused(packed, fields):
    caches = [packed(), packed()]
    for cache, count in zip(caches, (200, 50), strict=True):
        cache.update_and_fetch(*pair(count))
    batch = BatchSpectralKVCache.merge(caches)
    assert BatchSpectralKVCache.from_state(batch.state).size() == 200
    with pytest.raises(ValueError, match=r"; .*\.$"):
        BatchSpectralKVCache.from_state(described_state(batch, **fields))


def test_padding_that_no_array_holds_is_refused(packed):
    caches = [packed(), packed()]
    caches[0].update_and_fetch(*pair(200))
    batch = BatchSpectralKVCache.merge(caches)
    with pytest.raises(ValueError, match=r"padding or columns that cannot be\); expected one of this version"):
        BatchSpectralKVCache.from_state(described_state(batch, left_padding=[0, 2**40]))


@pytest.mark.parametrize("change", [
    lambda x: mx.where(mx.arange(x.shape[2])[:, None] == 3, mx.array(mx.nan, x.dtype), x), lambda x: x.astype(mx.int32),
    lambda x: x.astype(mx.float32), lambda x: x[:, :1], lambda x: x[:0],
])  # fmt: skip
def test_exact_vectors_that_no_model_gives_are_refused(packed, change):
    cache = packed()
    Feed(1, (32, 32))(cache, 200)
    text, keys, *rest = cache.state
    with pytest.raises(ValueError, match=r"; .*\.$"):
        SpectralKVCache.from_state([text, change(keys), *rest])


# A calibration's sums.


@pytest.mark.parametrize("name", ["sums", "kept-0", "kept-2"])
@pytest.mark.parametrize("damage", [
    lambda b: b[:-1], lambda b: b[:-9] + bytes([b[-9] ^ 1]) + b[-8:], lambda b: b + b"\0", lambda b: b"",
    lambda b: b[64:],
])  # fmt: skip
def test_damaged_sums_are_not_gone_on_from(tmp_path, name, damage):
    target = Unfinished(tmp_path / "made")
    assert target.partial.load()[1] == 3
    path = tmp_path / "made" / name
    path.write_bytes(damage(path.read_bytes()))
    assert target.partial.load() == ({}, 0)


# What killed writers leave.


def test_what_a_killed_writer_left_is_swept_and_a_living_one_is_not_disturbed(tmp_path):
    old, young, other = (tmp_path / n for n in (".a[1].npy.1.ab", ".a[1].npy.2.cd", ".b.npy.1.ab"))
    for path in (old, young, other):
        path.write_bytes(b"half")
    for path in (old, other):
        os.utime(path, (time.time() - 4000,) * 2)
    write_atomically(tmp_path / "a[1].npy", b"whole")
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted([young.name, other.name, "a[1].npy"])
