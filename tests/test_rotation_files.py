import inspect
import io
import json
import os
import pathlib
import pickle
import zipfile

import mlx.core as mx
import numpy as np
import pytest

from vq_kvcache.spectral.calibrate import load_cached_rotations, save_rotations
from vq_kvcache.spectral.files import cache_folder, sha256, write_atomically
from vq_kvcache.spectral.rotation_files import RotationFileError
from vq_kvcache.spectral.spectral_quant import SpectralRotation


def rotation(layer, dims=6, mean=True, values=None):
    generator = np.random.default_rng(layer)
    parts = (
        generator.normal(size=(dims, dims)),
        np.sort(generator.random(dims))[::-1].copy(),
        generator.normal(size=dims),
    )
    matrix, eigenvalues, centre = (mx.array(p.astype(np.float32)) for p in parts)
    return SpectralRotation(matrix, eigenvalues, dims, f"layers.{layer}", centre if mean else None, values)


def three_rotations():
    return [rotation(0, values=rotation(10)), rotation(1, mean=False), rotation(2, dims=4, values=rotation(12, dims=8))]


def equal(a, b):
    if a is None or b is None:
        return a is b
    if isinstance(a, mx.array):
        return a.dtype == b.dtype and mx.array_equal(a, b).item()
    parts = ("rotation_matrix", "eigenvalues", "mean", "values")
    return (a.head_dim, a.layer_name) == (b.head_dim, b.layer_name) and all(
        equal(getattr(a, p), getattr(b, p)) for p in parts
    )


def assert_loads(folder, expected):
    found = load_cached_rotations(folder)
    assert len(found) == len(expected)
    assert all(equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.fixture
def saved(tmp_path):
    """A folder of saved rotations, and the file of the first one's matrix."""
    save_rotations(three_rotations(), tmp_path / "spectral")
    (file,) = (tmp_path / "spectral").glob("000.rotation_matrix.*.npy")
    return tmp_path / "spectral", file


def edit_manifest(folder, change):
    manifest = json.loads((folder / "manifest.json").read_text())
    change(manifest)
    (folder / "manifest.json").write_text(json.dumps(manifest))


def replace_content(folder, file, content):
    """Other bytes in a file, with a manifest that vouches for them."""
    file.write_bytes(content)

    def vouch(manifest):
        manifest["rotations"][0]["arrays"]["rotation_matrix"]["sha256"] = sha256(content)

    edit_manifest(folder, vouch)


def npy(array, **options):
    buffer = io.BytesIO()
    np.save(buffer, array, **options)
    return buffer.getvalue()


def test_the_documented_signatures():
    save, load = inspect.signature(save_rotations), inspect.signature(load_cached_rotations)
    assert list(save.parameters) == ["rotations", "path"]
    assert save.return_annotation is None
    assert list(load.parameters) == ["path"]
    assert load.return_annotation == list[SpectralRotation]


@pytest.mark.parametrize("kind", [str, pathlib.Path])
def test_saved_rotations_come_back_whole(tmp_path, kind):
    assert save_rotations(three_rotations(), kind(tmp_path / "a" / "b")) is None
    assert_loads(kind(tmp_path / "a" / "b"), three_rotations())


def test_the_folder_holds_plain_arrays_and_a_manifest_that_describes_them(saved):
    folder, file = saved
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["format"], manifest["version"]) == ("vq_kvcache.rotations", 1)
    description = manifest["rotations"][0]["arrays"]["rotation_matrix"]
    assert description == {
        "file": file.name, "dtype": "float32", "shape": [6, 6], "sha256": sha256(file.read_bytes()),
    }  # fmt: skip
    assert np.array_equal(np.load(file, allow_pickle=False), np.array(three_rotations()[0].rotation_matrix))
    assert {f.suffix for f in folder.iterdir()} == {".npy", ".json"}
    assert len(list(folder.glob("*.npy"))) == 3 + 3 + 2 + 3 + 3


def test_rotations_of_half_precision_are_saved_as_float32(tmp_path):
    half = rotation(3)
    half.rotation_matrix, half.mean = half.rotation_matrix.astype(mx.bfloat16), half.mean.astype(mx.float16)
    save_rotations([half], tmp_path)
    half.rotation_matrix, half.mean = half.rotation_matrix.astype(mx.float32), half.mean.astype(mx.float32)
    assert_loads(tmp_path, [half])


def test_saving_again_replaces_the_rotations_and_leaves_other_files_alone(saved):
    folder, file = saved
    (folder / "notes.npy").write_bytes(b"mine")
    save_rotations([rotation(7)], folder)
    assert_loads(folder, [rotation(7)])
    assert not file.exists()
    assert len(list(folder.iterdir())) == 1 + 3 + 1
    assert (folder / "notes.npy").read_bytes() == b"mine"


@pytest.mark.parametrize("finished", range(4))
def test_an_interrupted_save_leaves_the_old_rotations(saved, monkeypatch, finished):
    folder, _ = saved
    done, replace = [], os.replace

    def interrupted(source, target):
        if len(done) == finished:
            raise KeyboardInterrupt
        done.append(target)
        replace(source, target)

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt, match=r"^$"):
        save_rotations([rotation(7)], folder)
    monkeypatch.undo()
    assert_loads(folder, three_rotations())
    assert not [f for f in folder.iterdir() if f.name.startswith(".")]


def test_nothing_to_save_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no rotations to save; expected at least one; calibrate first"):
        save_rotations([], tmp_path)


@pytest.mark.parametrize("keep", [0, 1, 40, -1])
def test_a_truncated_array_is_refused(saved, keep):
    folder, file = saved
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(RotationFileError, match=rf"{file.name} does not match its checksum \(truncated or altered\)"):
        load_cached_rotations(folder)


def test_an_altered_byte_is_refused(saved):
    folder, file = saved
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    with pytest.raises(RotationFileError, match=rf"{file.name} does not match its checksum"):
        load_cached_rotations(folder)


def test_a_missing_array_is_refused(saved):
    folder, file = saved
    file.unlink()
    with pytest.raises(RotationFileError, match=rf"{file.name} cannot be read \(No such file or directory\)"):
        load_cached_rotations(folder)


class Bomb:
    """An object whose unpickling leaves a trace."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


@pytest.mark.parametrize("form", ["npy of objects", "pickle"])
def test_a_pickled_array_is_refused_and_not_unpickled(saved, tmp_path, form):
    folder, file = saved
    bomb = Bomb(tmp_path / "exploded")
    content = pickle.dumps(bomb) if form == "pickle" else npy(np.array([bomb], dtype=object), allow_pickle=True)
    replace_content(folder, file, content)
    with pytest.raises(RotationFileError, match=rf"{file.name} is no plain \.npy array .*; expected float32"):
        load_cached_rotations(folder)
    assert not (tmp_path / "exploded").exists()


@pytest.mark.parametrize(
    "content", [b"", b"\x93NUMPY", npy(np.ones(2))[:100], b"PK\x03\x04garbage", npy(np.array(["a"]))]
)
def test_content_that_is_no_array_of_numbers_is_refused(saved, content):
    folder, file = saved
    replace_content(folder, file, content)
    with pytest.raises(RotationFileError, match=rf"{file.name} is no plain \.npy array"):
        load_cached_rotations(folder)


@pytest.mark.parametrize("array", [np.ones((6, 5), np.float32), np.full((6, 6), np.nan, np.float32)])
def test_an_array_of_another_shape_or_with_nan_is_refused(saved, array):
    folder, file = saved
    replace_content(folder, file, npy(array))
    with pytest.raises(RotationFileError, match=rf"{file.name} has shape .* or non-finite numbers; calibrate again"):
        load_cached_rotations(folder)


@pytest.mark.parametrize("create", [True, False])
def test_a_folder_without_a_manifest_is_refused(tmp_path, create):
    if create:
        (tmp_path / "x").mkdir()
    with pytest.raises(RotationFileError, match=r"no manifest\.json in .*x; expected saved rotations; calibrate first"):
        load_cached_rotations(tmp_path / "x")


@pytest.mark.parametrize("text", ["", "{", "[" * 10, "\xff"])
def test_a_manifest_that_is_no_json_is_refused(saved, text):
    folder, _ = saved
    (folder / "manifest.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(RotationFileError, match=r"manifest\.json cannot be read .*; expected JSON"):
        load_cached_rotations(folder)


@pytest.mark.parametrize("change", [{"version": 2}, {"version": "1"}, {"format": "other"}])
def test_a_manifest_of_another_version_or_format_is_refused(saved, change):
    folder, _ = saved
    edit_manifest(folder, lambda manifest: manifest.update(change))
    with pytest.raises(RotationFileError, match=r"manifest\.json is not vq_kvcache\.rotations version 1"):
        load_cached_rotations(folder)


@pytest.mark.parametrize("rotations", [None, {}, [1]])
def test_a_manifest_without_a_list_of_rotations_is_refused(saved, rotations):
    folder, _ = saved
    edit_manifest(folder, lambda manifest: manifest.update(rotations=rotations))
    with pytest.raises(RotationFileError, match=r"manifest\.json lists no rotations; expected a list of entries"):
        load_cached_rotations(folder)


def drop_matrix(entry):
    del entry["arrays"]["rotation_matrix"]


def drop_checksum(entry):
    del entry["arrays"]["mean"]["sha256"]


@pytest.mark.parametrize(
    "change",
    [
        drop_matrix,
        drop_checksum,
        lambda entry: entry.update(head_dim="many"),
        lambda entry: entry.update(head_dim=7),
        lambda entry: entry.update(arrays=3),
        lambda entry: entry.update(values=[1]),
        lambda entry: entry.pop("layer_name"),
    ],
)
def test_a_malformed_entry_is_refused(saved, change):
    folder, _ = saved
    edit_manifest(folder, lambda manifest: change(manifest["rotations"][0]))
    with pytest.raises(RotationFileError, match=r"manifest\.json is malformed \(.*\); calibrate again"):
        load_cached_rotations(folder)


@pytest.mark.parametrize("path", ["../secret.npy", "/{parent}/secret.npy", "sub/../../secret.npy", "..", ""])
def test_a_manifest_cannot_name_a_file_outside_its_folder(saved, tmp_path, path):
    folder, file = saved
    content = file.read_bytes()
    (tmp_path / "secret.npy").write_bytes(content)
    file.unlink()
    name = path.format(parent=tmp_path)
    edit_manifest(folder, lambda m: m["rotations"][0]["arrays"]["rotation_matrix"].update(file=name))
    with pytest.raises(RotationFileError, match=r"spectral/?.* cannot be read \("):
        load_cached_rotations(folder)


def archive_arrays(layers=(0, 2, 10), dims=5):
    """What veloxquant_mlx 0.94.15 writes (spectral/calibrate.py, save_rotations)."""
    arrays = {"meta_n_tokens": np.array(512, dtype=np.int64)}
    for layer in layers:
        for i, part in enumerate(("key", "val")):
            generator = np.random.default_rng([layer, i])
            matrix = np.linalg.qr(generator.normal(size=(dims, dims)))[0]
            arrays[f"layer_{layer}_{part}_U"] = matrix.astype(np.float32)
            arrays[f"layer_{layer}_{part}_ev"] = np.sort(generator.random(dims))[::-1].astype(np.float64)
            arrays[f"layer_{layer}_{part}_ds"] = np.array(3, dtype=np.int32)
    return arrays


@pytest.mark.parametrize("named", ["folder", "file"])
def test_the_archive_of_veloxquant_is_read(tmp_path, named):
    arrays = archive_arrays()
    np.savez(tmp_path / "rotations.npz", **arrays)
    found = load_cached_rotations(tmp_path if named == "folder" else tmp_path / "rotations.npz")
    assert [r.layer_name for r in found] == ["layers.0", "layers.2", "layers.10"]
    for r, layer in zip(found, (0, 2, 10), strict=True):
        for half, part in ((r, "key"), (r.values, "val")):
            assert half.head_dim == 5
            assert half.mean is None
            assert np.array_equal(half.rotation_matrix, arrays[f"layer_{layer}_{part}_U"])
            assert np.array_equal(half.eigenvalues, arrays[f"layer_{layer}_{part}_ev"].astype(np.float32))
        assert r.values.values is None


def test_rounding_below_zero_in_an_archive_counts_as_zero(tmp_path):
    arrays = archive_arrays([0])
    arrays["layer_0_key_ev"][-1] = -1e-9
    np.savez(tmp_path / "rotations.npz", **arrays)
    assert load_cached_rotations(tmp_path)[0].eigenvalues[-1].item() == 0


def test_a_manifest_is_read_before_an_archive_beside_it(saved):
    folder, _ = saved
    np.savez(folder / "rotations.npz", **archive_arrays())
    assert_loads(folder, three_rotations())


@pytest.mark.parametrize("missing", ["layer_2_key_ev", "layer_2_val_U"])
def test_an_incomplete_archive_is_refused(tmp_path, missing):
    arrays = archive_arrays()
    del arrays[missing]
    np.savez(tmp_path / "rotations.npz", **arrays)
    with pytest.raises(RotationFileError, match=rf"is incomplete \('{missing}'\); expected U and ev of every layer"):
        load_cached_rotations(tmp_path)


@pytest.mark.parametrize("array", [np.float32(1), np.ones(5), np.ones((5, 4)), np.full((5, 5), np.nan)])
def test_an_archive_with_arrays_of_the_wrong_form_is_refused(tmp_path, array):
    np.savez(tmp_path / "rotations.npz", **{**archive_arrays(), "layer_2_key_U": array})
    with pytest.raises(RotationFileError, match=r"is incomplete \(.*\); expected U and ev of every layer"):
        load_cached_rotations(tmp_path)


def test_an_archive_of_other_arrays_is_refused(tmp_path):
    np.savez(tmp_path / "rotations.npz", weights=np.ones(3))
    with pytest.raises(RotationFileError, match="holds no layer_<i>_key_U; expected veloxquant_mlx"):
        load_cached_rotations(tmp_path)


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04", b"no archive", "half", "objects"])
def test_a_broken_archive_is_refused(tmp_path, content):
    file = tmp_path / "rotations.npz"
    if content == "half":
        np.savez(file, **archive_arrays())
        content = file.read_bytes()[: file.stat().st_size // 2]
    if content == "objects":
        np.savez(file, layer_0_key_U=np.array([Bomb(tmp_path / "exploded")], dtype=object))
    else:
        file.write_bytes(content)
    with pytest.raises(RotationFileError, match=r"rotations\.npz cannot be read \(.*\); expected veloxquant_mlx's"):
        load_cached_rotations(tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_an_archive_with_an_altered_member_is_refused(tmp_path):
    file = tmp_path / "rotations.npz"
    np.savez(file, **archive_arrays())
    with zipfile.ZipFile(file) as archive:
        start = archive.getinfo("layer_2_key_U.npy").header_offset + 200
    content = bytearray(file.read_bytes())
    content[start] ^= 0xFF
    file.write_bytes(content)
    with pytest.raises(RotationFileError, match=r"rotations\.npz cannot be read \(.*CRC.*\)"):
        load_cached_rotations(tmp_path)


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    file = tmp_path / "new" / "file"
    write_atomically(file, b"old")

    def full_disk(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left on device"):
        write_atomically(file, b"new content")
    assert [f.name for f in file.parent.iterdir()] == ["file"]
    assert file.read_bytes() == b"old"


def test_the_cache_folder_is_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("VQ_KVCACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("VQ_KVCACHE_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    monkeypatch.setattr("sys.platform", "linux")
    assert cache_folder() == tmp_path / "x" / "vq_kvcache"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_folder() == pathlib.Path.home() / ".cache" / "vq_kvcache"
    monkeypatch.setattr("sys.platform", "darwin")
    assert cache_folder() == pathlib.Path.home() / "Library" / "Caches" / "vq_kvcache"
