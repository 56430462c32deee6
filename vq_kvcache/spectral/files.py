"""Writing files so that nothing is lost, and finding the folder they live in."""

import contextlib
import errno
import glob
import hashlib
import json
import os
import pathlib
import secrets
import stat
import sys
import tempfile
import time
from typing import Any, NoReturn

LEFT_BEHIND_S = 3600


def cache_folder() -> pathlib.Path:
    """VQ_KVCACHE_HOME, or `vq_kvcache` in the user's cache directory. Not created here."""
    if home := os.environ.get("VQ_KVCACHE_HOME"):
        return pathlib.Path(home).expanduser()
    if sys.platform == "darwin":
        return pathlib.Path.home() / "Library" / "Caches" / "vq_kvcache"
    base = os.environ.get("XDG_CACHE_HOME")
    return (pathlib.Path(base) if base else pathlib.Path.home() / ".cache") / "vq_kvcache"


def write_atomically(path: pathlib.Path, data: bytes) -> None:
    """Write under a temporary name in the same folder, then rename: readers see the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not tempfile: its files are for their owner alone, and a codec or rotations may be shared.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sweep(path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def require_writable(path: pathlib.Path) -> None:
    """ValueError unless a file of this name can be written; for asking before the work whose result it is to hold."""
    try:
        if path.is_dir():
            raise IsADirectoryError(0, "Is a directory")
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ValueError(
            f"{path} cannot be written ({error.strerror}); expected a file in a folder that can."
        ) from None


def _sweep(path: pathlib.Path) -> None:
    """Remove what writers of this file that were killed left behind; one that is still at work is younger."""
    with contextlib.suppress(OSError):
        for left in path.parent.glob(f".{glob.escape(path.name)}.*"):
            if time.time() - left.stat().st_mtime > LEFT_BEHIND_S:
                left.unlink()


def read_file(path: pathlib.Path) -> bytes:
    """The content of a regular file, links followed; OSError for a pipe or a device, which may never end."""
    # A pipe would block even while it is opened.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "not a regular file", str(path))
        return file.read()


def parse_json(text: str | bytes) -> Any:
    """JSON of finite numbers; ValueError for any other text, however deep."""

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"the number {constant}")

    try:
        return json.loads(text, parse_constant=refuse)
    except RecursionError:
        raise ValueError("nested too deep") from None


def sha256(data: bytes) -> str:
    """Hexadecimal SHA-256."""
    return hashlib.sha256(data).hexdigest()
