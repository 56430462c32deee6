"""Saved rotations: a folder of .npy files and a manifest, and the archives of veloxquant_mlx."""

import contextlib
import io
import json
import os
import pathlib
import re
import zipfile
import zlib
from typing import Any

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from .files import parse_json, read_file, sha256, write_atomically
from .spectral_quant import SpectralRotation

FORMAT = "vq_kvcache.rotations"
VERSION = 1
MANIFEST = "manifest.json"
PARTS = ("rotation_matrix", "eigenvalues", "mean")
_MEMBER = re.compile(r"layer_[0-9]{1,9}_(key|val)_(U|ev)\.npy")
MOST_BYTES = 1 << 30  # that an archive may unpack to
# Of what NumPy writes, floating-point arrays alone; nothing in a header is evaluated.
_NPY = re.compile(
    rb"\x93NUMPY(?:\x01\x00..|[\x02\x03]\x00....)\{'descr': '([<>]f[248])', 'fortran_order': (True|False), "
    rb"'shape': \(([0-9]{1,9}(?:, [0-9]{1,9})*)?,?\), \} *\n",
    re.DOTALL,
)


class RotationFileError(ValueError):
    """A saved rotation that cannot be used; the message says which file, what was expected and what to do."""


def save_rotations(rotations: list[SpectralRotation], path: str | os.PathLike[str]) -> None:
    """Write rotations as a folder: one .npy per array, float32, named by content, and manifest.json written last.

    A folder at `path` that already holds rotations is replaced only when the new manifest is complete on disk.
    """
    if not rotations:
        raise ValueError("no rotations to save; expected at least one; calibrate first.")
    folder = pathlib.Path(path)
    entries = [_save_one(folder, f"{i:03d}", rotation) for i, rotation in enumerate(rotations)]
    manifest = {"format": FORMAT, "version": VERSION, "rotations": entries}
    write_atomically(folder / MANIFEST, json.dumps(manifest, indent=1).encode())
    _remove_unused(folder, entries)


def _save_one(folder: pathlib.Path, name: str, rotation: SpectralRotation) -> dict[str, Any]:
    entry: dict[str, Any] = {"layer_name": rotation.layer_name, "head_dim": rotation.head_dim, "arrays": {}}
    for part in PARTS:
        array = getattr(rotation, part)
        if array is None:
            continue
        data = np.array(array.astype(mx.float32))
        buffer = io.BytesIO()
        np.save(buffer, data, allow_pickle=False)
        content = buffer.getvalue()
        file = f"{name}.{part}.{sha256(content)[:12]}.npy"
        write_atomically(folder / file, content)
        entry["arrays"][part] = {
            "file": file, "dtype": str(data.dtype), "shape": list(data.shape), "sha256": sha256(content),
        }  # fmt: skip
    if rotation.values is not None:
        entry["values"] = _save_one(folder, f"{name}.values", rotation.values)
    return entry


def _remove_unused(folder: pathlib.Path, entries: list[dict[str, Any]]) -> None:
    used = {a["file"] for e in entries for d in (e, e.get("values", {"arrays": {}})) for a in d["arrays"].values()}
    for file in folder.glob("*.npy"):
        if file.name not in used and re.fullmatch(r"\d{3}\..*\.[0-9a-f]{12}\.npy", file.name):
            with contextlib.suppress(OSError):
                file.unlink()


def load_cached_rotations(path: str | os.PathLike[str]) -> list[SpectralRotation]:
    """Rotations saved at `path` by `save_rotations` (a folder), or by veloxquant_mlx (rotations.npz, or its folder).

    RotationFileError, in one sentence, for anything missing, truncated, altered or pickled.
    """
    source = pathlib.Path(path)
    archive = source if source.suffix == ".npz" else source / "rotations.npz"
    if not (source / MANIFEST).is_file() and archive.is_file():
        return _load_archive(archive)
    entries = _read_manifest(source / MANIFEST)
    return [_load_one(source, entry) for entry in entries]


def _read_manifest(path: pathlib.Path) -> list[dict[str, Any]]:
    try:
        manifest = parse_json(read_file(path))
    except FileNotFoundError:
        raise RotationFileError(f"no {MANIFEST} in {path.parent}; expected saved rotations; calibrate first.") from None
    except (ValueError, OSError) as error:
        raise RotationFileError(f"{path} cannot be read ({error}); expected JSON; calibrate again.") from None
    if not isinstance(manifest, dict) or (manifest.get("format"), manifest.get("version")) != (FORMAT, VERSION):
        raise RotationFileError(f"{path} is not {FORMAT} version {VERSION}; calibrate again with this version.")
    entries = manifest.get("rotations")
    if not isinstance(entries, list) or not all(isinstance(e, dict) for e in entries):
        raise RotationFileError(f"{path} lists no rotations; expected a list of entries; calibrate again.")
    return entries


def _load_one(folder: pathlib.Path, entry: dict[str, Any]) -> SpectralRotation:
    try:
        arrays = {part: _load_array(folder, entry["arrays"][part]) for part in PARTS if part in entry["arrays"]}
        if (arrays["eigenvalues"] < 0).any():
            raise ValueError("an eigenvalue is negative")
        values = _load_one(folder, entry["values"]) if "values" in entry else None
        return SpectralRotation(
            rotation_matrix=mx.array(arrays["rotation_matrix"]),
            eigenvalues=mx.array(arrays["eigenvalues"]),
            head_dim=int(entry["head_dim"]),
            layer_name=str(entry["layer_name"]),
            mean=mx.array(arrays["mean"]) if "mean" in arrays else None,
            values=values,
        )
    except RotationFileError:
        raise
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise RotationFileError(f"{folder / MANIFEST} is malformed ({error!r:.300}); calibrate again.") from None


def _load_array(folder: pathlib.Path, description: dict[str, Any]) -> NDArray[np.float32]:
    file = folder / pathlib.PurePath(str(description["file"])).name  # never outside the folder
    try:
        content = read_file(file)
    except OSError as error:
        raise RotationFileError(f"{file} cannot be read ({error.strerror}); calibrate again.") from None
    if sha256(content) != description["sha256"]:
        raise RotationFileError(f"{file} does not match its checksum (truncated or altered); calibrate again.")
    try:
        array = _read_npy(content)
    except ValueError as error:
        raise RotationFileError(
            f"{file} is no plain .npy array ({error}); expected float32; calibrate again."
        ) from None
    if list(array.shape) != description["shape"] or not np.isfinite(array).all():
        raise RotationFileError(f"{file} has shape {array.shape} or non-finite numbers; calibrate again.")
    return array


def _read_npy(content: bytes) -> NDArray[np.float32]:
    """ValueError for anything but a whole .npy of floating-point numbers."""
    if (match := _NPY.match(content)) is None:
        raise ValueError("no plain .npy array")
    shape = [int(n) for n in (match[3] or b"").split(b", ") if n]
    array = np.frombuffer(content, match[1].decode(), offset=match.end())
    return array.reshape(shape, order="F" if match[2] == b"True" else "C").astype(np.float32)


def _load_archive(path: pathlib.Path) -> list[SpectralRotation]:
    """veloxquant_mlx 0.94: layer_<i>_{key,val}_{U,ev}, eigenvectors as columns, no mean."""
    try:
        with zipfile.ZipFile(io.BytesIO(read_file(path))) as archive:
            members = [m for m in archive.infolist() if _MEMBER.fullmatch(m.filename)]
            if sum(m.file_size for m in members) > MOST_BYTES:
                raise ValueError(f"more than {MOST_BYTES:,} bytes unpacked")
            if any(m.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) for m in members):
                raise ValueError("compressed in another way than NumPy's")
            arrays = {m.filename.removesuffix(".npy"): _read_npy(archive.read(m)) for m in members}
    except (ValueError, EOFError, OSError, RuntimeError, OverflowError, zlib.error, zipfile.BadZipFile) as error:
        raise RotationFileError(
            f"{path} cannot be read ({error!r:.300}); expected veloxquant_mlx's rotations.npz; calibrate again."
        ) from None
    layers = sorted(int(m[1]) for name in arrays if (m := re.fullmatch(r"layer_([0-9]{1,9})_key_U", name)))
    if not layers:
        raise RotationFileError(
            f"{path} holds no layer_<i>_key_U; expected veloxquant_mlx's rotations.npz; calibrate again."
        )
    try:
        return [_archived(arrays, i, "key", _archived(arrays, i, "val", None)) for i in layers]
    except (KeyError, IndexError, ValueError, OverflowError) as error:
        raise RotationFileError(
            f"{path} is incomplete ({error}); expected U and ev of every layer; calibrate again."
        ) from None


def _archived(
    arrays: dict[str, NDArray[np.float32]], layer: int, part: str, values: SpectralRotation | None
) -> SpectralRotation:
    matrix = mx.array(arrays[f"layer_{layer}_{part}_U"])
    return SpectralRotation(
        rotation_matrix=matrix,
        eigenvalues=mx.maximum(mx.array(arrays[f"layer_{layer}_{part}_ev"]), 0),
        head_dim=int(matrix.shape[-1]),
        layer_name=f"layers.{layer}",
        values=values,
    )
