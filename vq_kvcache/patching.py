"""Apply, check and revert the patch this package carries for the installed mlx-lm.

There is no fuzz: every hunk must match where its header says, and a file must be the released one. Everything is
validated before the first write, and `revert` gives back the released file byte for byte.
"""

import argparse
import contextlib
import hashlib
import importlib.metadata
import importlib.util
import os
import re
import sys
import tempfile
from collections import deque
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

BACKUP_SUFFIX = ".vq_kvcache-backup"
_PATCH_NAME = re.compile(r"mlx-lm-(\d[^-]*)-.+\.patch")
_VERSION = re.compile(r"""^__version__\s*=\s*["']([^"']+)["']""", re.MULTILINE)
_HUNK = re.compile(rb"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@")
_INDEX = re.compile(rb"^index ([0-9a-f]{7,40})\.\.([0-9a-f]{7,40})", re.MULTILINE)


class PatchError(RuntimeError):
    """The patch or the installed mlx-lm is not in a state this module can change safely."""


class _MismatchError(Exception):
    """A file is not the one a patch was made from; the message is the reason, a part of a sentence."""


@dataclass(frozen=True)
class _Hunk:
    """`old` lines, found after `old_start` lines of the file, become `new` lines after `new_start` lines."""

    old_start: int
    new_start: int
    old: list[bytes]
    new: list[bytes]


@dataclass(frozen=True)
class _FilePatch:
    """The hunks of one file, `name` relative to the package; a blob id is empty when the patch has no index line."""

    name: str
    old_blob: str
    new_blob: str
    hunks: list[_Hunk]

    def forward(self, data: bytes) -> bytes:
        """Return the patched text of the file `data`, which must be the one the patch was made from."""
        lines, result, cursor = BytesIO(data).readlines(), list[bytes](), 0
        for hunk in self.hunks:
            end = hunk.old_start + len(hunk.old)
            if hunk.old_start < cursor or lines[hunk.old_start : end] != hunk.old:
                raise _MismatchError(f"the text at line {hunk.old_start + 1} differs")
            result += lines[cursor : hunk.old_start]
            if len(result) != hunk.new_start:
                raise _MismatchError(f"the patch's hunk at line {hunk.old_start + 1} has a wrong second line number")
            result += hunk.new
            cursor = end
        patched = b"".join(result + lines[cursor:])
        # The hunks see only the lines around them: git's blob id covers the rest of the file.
        for blob, text in ((self.old_blob, data), (self.new_blob, patched)):
            if not _blob_id(text).startswith(blob):
                raise _MismatchError("the text outside the patched lines differs")
        return patched

    def is_new(self, data: bytes) -> bool:
        """Tell whether `data` already holds the new lines of every hunk."""
        lines = BytesIO(data).readlines()
        return all(lines[h.new_start : h.new_start + len(h.new)] == h.new for h in self.hunks)


@dataclass(frozen=True)
class _File:
    """A file of the installed package: its bytes now, and after `apply` (a clean file) or `revert` (an applied one)."""

    path: Path
    now: bytes
    then: bytes

    @property
    def backup(self) -> Path:
        return _backup_path(self.path)


@dataclass(frozen=True)
class _Survey:
    """The state of every file that the patch names."""

    version: str
    folder: Path
    patch: Path
    clean: list[_File]
    applied: list[_File]


def available_patches() -> dict[str, Path]:
    """Return the carried patches by mlx-lm version: the wheel's own folder, or else the repository's."""
    here = Path(__file__).resolve().parent
    folder = next((f for f in (here / "patches", here.parent / "patches") if f.is_dir()), here)
    found = ((_PATCH_NAME.fullmatch(path.name), path) for path in sorted(folder.glob("*.patch")))
    return {match[1]: path for match, path in found if match}


def check(package_dir: Path | None = None) -> str:
    """Return one sentence that starts with 'clean' or 'applied'; any other state raises PatchError."""
    survey = _survey(package_dir)
    where = f"mlx-lm {survey.version} in {survey.folder}"
    if survey.clean and survey.applied:
        raise PatchError(
            f"got {where} with {_names(survey.applied)} patched and {_names(survey.clean)} not, expected all or none; "
            "run `vq_kvcache patch --apply` or `--revert` to finish."
        )
    if survey.clean:
        return f"clean: {where} is as released and {survey.patch.name} fits it."
    return f"applied: {where} is patched with {survey.patch.name}."


def apply(package_dir: Path | None = None, dry_run: bool = False) -> list[Path]:
    """Patch the installed mlx-lm and return the files changed: none when the patch is already applied."""
    survey = _survey(package_dir)
    if not dry_run:
        # Backups come first, so that no moment has a patched file without its backup.
        _write_all([(f.backup, f.now, f.path) for f in survey.clean] + [(f.path, f.then, f.path) for f in survey.clean])
    return [f.path for f in survey.clean]


def revert(package_dir: Path | None = None, dry_run: bool = False) -> list[Path]:
    """Restore the released files byte for byte and return them: none when mlx-lm is clean."""
    survey = _survey(package_dir)
    if not dry_run:
        _write_all([(f.path, f.then, f.path) for f in survey.applied])
        # A backup that stays beside a clean file is harmless: the next apply replaces it.
        with contextlib.suppress(OSError):
            for file in survey.applied:
                file.backup.unlink()
    return [f.path for f in survey.applied]


def main(argv: list[str]) -> int:
    """Run `vq_kvcache patch` and return its exit status."""
    parser = argparse.ArgumentParser(
        prog="vq_kvcache patch", description="Give the installed mlx_lm.generate, chat and server the spectral cache."
    )
    choice = parser.add_mutually_exclusive_group(required=True)
    choice.add_argument("--apply", action="store_true", help="Patch the installed mlx-lm, keeping a backup")
    choice.add_argument("--check", action="store_true", help="Say whether the installed mlx-lm is patched")
    choice.add_argument("--revert", action="store_true", help="Restore the released mlx-lm from the backup")
    parser.add_argument("--dry-run", action="store_true", help="Say what would be done and write nothing")
    args = parser.parse_args(argv)
    action, done, planned = (apply, "patched", "would patch") if args.apply else (revert, "restored", "would restore")
    try:
        paths = [] if args.check else action(dry_run=args.dry_run)
        for path in paths:
            print(planned if args.dry_run else done, path)
        if not paths:
            print(check() if args.check else f"nothing to do, {check()}")
    except PatchError as error:
        print(f"vq_kvcache patch: {error}", file=sys.stderr)
        return 1
    return 0


def _names(files: list[_File]) -> str:
    return ", ".join(f.path.name for f in files)


def _read(path: Path) -> bytes:
    """The content of a regular file: a pipe or a device may never end."""
    if path.exists() and not path.is_file():
        raise OSError("not a regular file")
    return path.read_bytes()


def _backup_path(path: Path) -> Path:
    return path.with_name(path.name + BACKUP_SUFFIX)


def _blob_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0%b" % (len(data), data), usedforsecurity=False).hexdigest()


def _installed_package() -> Path:
    """Return the folder of the installed mlx_lm without importing it."""
    spec = importlib.util.find_spec("mlx_lm")
    if spec is None or not spec.submodule_search_locations:
        raise PatchError("got no mlx_lm in this Python environment, expected an installed one; `pip install mlx-lm`.")
    return Path(next(iter(spec.submodule_search_locations)))


def _read_version(folder: Path, installed: bool) -> str:
    """Return the version in the folder's own _version.py; the metadata may describe another installation."""
    try:
        match = _VERSION.search(_read(folder / "_version.py").decode())
    except (OSError, UnicodeDecodeError):
        match = None
    if match:
        return match[1]
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        if installed:
            return importlib.metadata.version("mlx-lm")
    raise PatchError(
        f"got no __version__ in {folder / '_version.py'}, expected the folder of an installed mlx_lm; reinstall it."
    )


def _survey(package_dir: Path | None) -> _Survey:
    folder = package_dir or _installed_package()
    version = _read_version(folder, installed=package_dir is None)
    patches = available_patches()
    if version not in patches:
        known = " or ".join(sorted(patches)) or "a version with a carried patch, and none is carried"
        raise PatchError(
            f"got mlx-lm {version} in {folder}, expected {known}; install an mlx-lm that a patch fits "
            "or leave it unpatched."
        )
    clean: list[_File] = []
    applied: list[_File] = []
    for file_patch in _parse(patches[version]):
        is_clean, file = _inspect(file_patch, folder / file_patch.name, version)
        (clean if is_clean else applied).append(file)
    return _Survey(version, folder, patches[version], clean, applied)


def _inspect(patch: _FilePatch, path: Path, version: str) -> tuple[bool, _File]:
    """Return whether the file at `path` is clean, and the file; any state between clean and applied raises."""
    backup = _backup_path(path)
    reinstall = f"`pip install --force-reinstall --no-deps mlx-lm=={version}` restores it."
    try:
        now = _read(path)
        original = _read(backup) if backup.exists() else None
    except OSError as error:
        raise PatchError(f"got an mlx-lm {version} with an unreadable {path.name} ({error}); {reinstall}") from error
    try:
        # A clean file may have a backup beside it: left by an interrupted run, or by a reinstalled mlx-lm.
        return True, _File(path, now, patch.forward(now))
    except _MismatchError as reason:
        if original is None:
            got = "a patched file without its backup" if patch.is_new(now) else f"an edited file ({reason})"
            raise PatchError(f"got {got}, expected {path} of mlx-lm {version} as released; {reinstall}") from reason
    try:
        patched = patch.forward(original)
    except _MismatchError as reason:
        raise PatchError(
            f"got a damaged backup ({reason}), expected {backup} to be {path.name} of mlx-lm {version} as released; "
            f"{reinstall}"
        ) from reason
    if patched != now:
        raise PatchError(
            f"got {path} edited after it was patched, expected the patch's own result; "
            f"save your changes elsewhere, then copy {backup.name} over it."
        )
    return False, _File(path, now, original)


def _write_all(changes: list[tuple[Path, bytes, Path]]) -> None:
    """Write each (path, data, file whose mode it takes), or on any failure none of them."""
    before: dict[Path, bytes | None] = {}
    staged: list[Path] = []
    try:
        for path, data, mode_of in changes:
            before[path] = path.read_bytes() if path.exists() else None
            staged.append(_stage(path, data, mode_of))
        for temporary, path in zip(staged, before, strict=True):
            # Package managers share files between environments by hard links; a replaced name leaves the others alone.
            os.replace(temporary, path)
    except BaseException as error:
        _undo(before)
        if not isinstance(error, OSError):
            raise
        raise PatchError(
            f"got {error!r}, expected to write in {changes[0][0].parent}; nothing was changed, unlock it and run again."
        ) from error
    finally:
        for temporary in staged:
            temporary.unlink(missing_ok=True)


def _undo(before: dict[Path, bytes | None]) -> None:
    """Give each path its bytes back, last first, so that a backup goes only after the patched file did."""
    try:
        for path, data in reversed(before.items()):
            if data is None:
                path.unlink(missing_ok=True)
            elif path.read_bytes() != data:
                temporary = _stage(path, data, mode_of=path)
                try:
                    os.replace(temporary, path)
                finally:
                    temporary.unlink(missing_ok=True)
    except OSError as error:
        raise PatchError(
            f"got {error!r} while undoing a failed write, expected to restore {path}; "
            "run `vq_kvcache patch --revert` when the folder is writable."
        ) from error


def _stage(path: Path, data: bytes, mode_of: Path) -> Path:
    """Write `data` beside `path`, under another name, and return that name."""
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(data)
        os.chmod(name, mode_of.stat().st_mode & 0o7777)
    except BaseException:
        os.unlink(name)
        raise
    return Path(name)


def _parse(patch: Path) -> list[_FilePatch]:
    """Read a git-style patch that changes existing files of mlx_lm, and nothing else."""
    try:
        lines = deque(BytesIO(_read(patch)).readlines())
        files: list[_FilePatch] = []
        while lines and not lines[0].startswith(b"diff --git "):
            lines.popleft()
        while lines:
            files.append(_parse_file(lines))
    except (OSError, ValueError) as error:
        raise PatchError(f"got {patch} that cannot be read ({error}); reinstall vq_kvcache.") from error
    if not files:
        raise PatchError(f"got {patch} without a change, expected a unified diff; reinstall vq_kvcache.")
    return files


def _parse_file(lines: deque[bytes]) -> _FilePatch:
    header = []
    while lines and not lines[0].startswith(b"@@ "):
        header.append(lines.popleft().rstrip(b"\n"))
    names = [line[len(b"--- a/mlx_lm/") :] for line in header if line.startswith((b"--- a/mlx_lm/", b"+++ b/mlx_lm/"))]
    if len(names) != 2 or names[0] != names[1] or b".." in names[0].split(b"/"):
        raise ValueError(f"expected one file of mlx_lm below {header[0].decode()!r}")
    index = _INDEX.search(b"\n".join(header))
    old_blob, new_blob = (index[1].decode(), index[2].decode()) if index else ("", "")
    hunks = []
    while lines and not lines[0].startswith(b"diff --git "):
        hunks.append(_parse_hunk(lines))
    if not hunks:
        raise ValueError(f"expected a hunk below {header[0].decode()!r}")
    return _FilePatch(names[0].decode(), old_blob, new_blob, hunks)


def _parse_hunk(lines: deque[bytes]) -> _Hunk:
    header = lines.popleft()
    match = _HUNK.match(header)
    if match is None:
        raise ValueError(f"expected a hunk header instead of {header[:40]!r}")
    old_line, old_count, new_line, new_count = (1 if group is None else int(group) for group in match.groups())
    old: list[bytes] = []
    new: list[bytes] = []
    while len(old) < old_count or len(new) < new_count:
        line = lines.popleft() if lines else b""
        kind, text = (b" ", line) if line == b"\n" else (line[:1], line[1:])
        if kind not in (b" ", b"-", b"+") or not text.endswith(b"\n"):
            raise ValueError(f"the hunk {header[:40]!r} ends too early")
        if lines and lines[0].startswith(b"\\"):  # "\ No newline at end of file"
            lines.popleft()
            text = text[:-1]
        if kind != b"+":
            old.append(text)
        if kind != b"-":
            new.append(text)
    if (len(old), len(new)) != (old_count, new_count):
        raise ValueError(f"the hunk {header[:40]!r} has more lines than it says")
    # A side without lines is numbered by the line before it.
    return _Hunk(old_line - (old_count > 0), new_line - (new_count > 0), old, new)
