"""The carried patch goes onto an mlx-lm tree, and off it byte for byte, or is refused with nothing written."""

import hashlib
import importlib.metadata
import importlib.util
import itertools
import os
import shutil
from pathlib import Path
from unittest.mock import Mock

import pytest

from vq_kvcache import patching
from vq_kvcache.patching import BACKUP_SUFFIX, PatchError

MonkeyPatch = pytest.MonkeyPatch
Capture = pytest.CaptureFixture[str]
PATCHED = ("chat.py", "generate.py", "server.py")

ONE = "".join(f"line {i}\n" for i in range(1, 21))
TWO = "first\r\nsecond\rhalf\nlast without newline"
TINY = """A tiny patch.

diff --git a/mlx_lm/one.py b/mlx_lm/one.py
--- a/mlx_lm/one.py
+++ b/mlx_lm/one.py
@@ -2,3 +2,4 @@ somewhere
 line 2
-line 3
+line three
+line three and a half
 line 4
@@ -18,3 +19,2 @@
 line 18
 line 19
-line 20
diff --git a/mlx_lm/sub/two.py b/mlx_lm/sub/two.py
--- a/mlx_lm/sub/two.py
+++ b/mlx_lm/sub/two.py
@@ -1,3 +1,3 @@
 first\r
 second\rhalf
-last without newline
\\ No newline at end of file
+last with newline
"""
ONE_PATCHED = ONE.replace("line 3\n", "line three\nline three and a half\n").replace("line 20\n", "")
TWO_PATCHED = TWO.replace("without newline", "with newline\n")


def write_tree(folder: Path) -> Path:
    """A package of version 9.9 with the two files of the tiny patch, one of them with an unusual mode."""
    package = folder / "mlx_lm"
    (package / "sub").mkdir(parents=True)
    (package / "_version.py").write_text("# Copyright\n__version__ = '9.9'\n")
    (package / "one.py").write_bytes(ONE.encode())
    (package / "sub/two.py").write_bytes(TWO.encode())
    (package / "sub/two.py").chmod(0o750)
    return package


def snapshot(package: Path) -> dict[str, tuple[bytes, int]]:
    files = (path for path in package.rglob("*") if path.is_file())
    return {str(path.relative_to(package)): (path.read_bytes(), path.stat().st_mode) for path in files}


def assert_refused(package: Path, match: str) -> None:
    """Every action raises, and writes nothing."""
    before = snapshot(package)
    for action in (patching.check, patching.apply, patching.revert):
        with pytest.raises(PatchError, match=match):
            action(package)
    assert snapshot(package) == before


def carry(monkeypatch: MonkeyPatch, folder: Path, text: str) -> None:
    """Make `text` the only carried patch, for version 9.9."""
    path = folder / "mlx-lm-9.9-tiny.patch"
    path.write_bytes(text.encode())
    monkeypatch.setattr(patching, "available_patches", lambda: {"9.9": path})


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: MonkeyPatch) -> Path:
    carry(monkeypatch, tmp_path, TINY)
    return write_tree(tmp_path)


def installed_copy(folder: Path) -> Path:
    """The patched files of the installed mlx-lm as released: a copy, unpatched where this environment's is patched."""
    spec = importlib.util.find_spec("mlx_lm")
    assert spec is not None
    source = Path(next(iter(spec.submodule_search_locations or ())))
    package = folder / "mlx_lm"
    package.mkdir()
    for name in ("_version.py", "__init__.py", *PATCHED, *(n + BACKUP_SUFFIX for n in PATCHED)):
        if (source / name).exists():
            shutil.copy2(source / name, package / name)
    if patching._read_version(package, installed=False) in patching.available_patches():
        patching.revert(package)
    return package


def refused(package: Path) -> bool:
    """Whether no patch is carried for this version; then every action must say so and write nothing."""
    version = patching._read_version(package, installed=False)
    if version in patching.available_patches():
        return False
    known = " or ".join(sorted(patching.available_patches()))
    assert_refused(package, rf"got mlx-lm {version} in .*, expected {known}; install ")
    return True


def test_carried_patches_are_named_by_version_and_say_why_and_until_when() -> None:
    patches = patching.available_patches()
    assert sorted(patches) == ["0.31.3", "0.32.2"]
    for version, path in patches.items():
        assert path.name.startswith(f"mlx-lm-{version}-")
        header = path.read_text().split("diff --git", 1)[0]
        assert "Why: " in header
        assert "When it can go: " in header


def test_the_patches_of_a_wheel_come_first(tmp_path: Path, monkeypatch: MonkeyPatch) -> None:
    monkeypatch.setattr(patching, "__file__", str(tmp_path / "vq_kvcache/patching.py"))
    assert patching.available_patches() == {}
    with pytest.raises(PatchError, match="expected a version with a carried patch, and none is carried; install"):
        patching.check(write_tree(tmp_path))
    for name in ("patches", "vq_kvcache/patches"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "mlx-lm-9.9-a-b.patch").touch()
        (tmp_path / name / "other-9.9-a.patch").touch()
        assert patching.available_patches() == {"9.9": tmp_path / name / "mlx-lm-9.9-a-b.patch"}


def test_installed_mlx_lm_is_patched_and_restored(tmp_path: Path) -> None:
    package = installed_copy(tmp_path)
    if refused(package):
        return
    before = snapshot(package)
    version = patching._read_version(package, installed=False)
    files = [package / name for name in PATCHED]
    assert patching.check(package).startswith(f"clean: mlx-lm {version} in ")
    assert patching.apply(package) == files
    assert patching.check(package).startswith("applied: ")
    for file in files:  # a patch's index lines are git's own statement of the result
        data = file.read_bytes()
        blob = hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()
        assert f"..{blob} 100644\n" in patching.available_patches()[version].read_text()
    assert patching.revert(package) == files
    assert snapshot(package) == before


def test_an_edit_outside_the_patched_lines_is_refused(tmp_path: Path) -> None:
    package = installed_copy(tmp_path)
    if refused(package):
        return
    path = package / "generate.py"
    path.write_bytes(path.read_bytes().replace(b'DEFAULT_PROMPT = "hello"', b'DEFAULT_PROMPT = "howdy"'))
    assert_refused(package, r"got an edited file \(the text outside the patched lines differs\), expected")


def test_apply_and_revert_are_byte_exact_and_keep_the_mode(tree: Path) -> None:
    before = snapshot(tree)
    files = [tree / "one.py", tree / "sub/two.py"]
    assert patching.apply(tree) == files
    assert (tree / "one.py").read_bytes() == ONE_PATCHED.encode()
    assert (tree / "sub/two.py").read_bytes() == TWO_PATCHED.encode()
    after = snapshot(tree)
    assert after.pop("one.py" + BACKUP_SUFFIX) == before["one.py"]
    assert after.pop("sub/two.py" + BACKUP_SUFFIX) == before["sub/two.py"]
    assert {name: mode for name, (_, mode) in after.items()} == {name: mode for name, (_, mode) in before.items()}
    assert patching.revert(tree) == files
    assert snapshot(tree) == before


def test_dry_runs_and_second_runs_write_nothing(tree: Path) -> None:
    before = snapshot(tree)
    assert patching.revert(tree) == []
    assert len(patching.apply(tree, dry_run=True)) == 2
    assert snapshot(tree) == before
    patching.apply(tree)
    after = snapshot(tree)
    assert patching.apply(tree) == []
    assert len(patching.revert(tree, dry_run=True)) == 2
    assert snapshot(tree) == after


def test_apply_leaves_a_hard_linked_file_of_another_environment_alone(tree: Path) -> None:
    twin = tree.parent / "twin.py"
    os.link(tree / "one.py", twin)
    patching.apply(tree)
    assert twin.read_bytes() == ONE.encode()


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("line 2\n", "line two\n", "the text at line 2 differs"),
        ("line 1\n", "line 0\nline 1\n", "the text at line 2 differs"),
        ("line 20\n", "line 20", "the text at line 18 differs"),
        ("line 19\nline 20\n", "", "the text at line 18 differs"),
    ],
)
def test_an_edited_file_is_refused(tree: Path, old: str, new: str, reason: str) -> None:
    (tree / "one.py").write_text(ONE.replace(old, new, 1))
    assert_refused(tree, rf"got an edited file \({reason}\), expected .*one.py of mlx-lm 9.9 .*; `pip")


def test_a_bad_second_file_leaves_the_first_untouched(tree: Path) -> None:
    (tree / "sub/two.py").write_text("edited\n")
    assert_refused(tree, r"got an edited file .*two\.py")
    (tree / "sub/two.py").unlink()
    assert_refused(tree, r"got an mlx-lm 9\.9 with an unreadable two\.py")


@pytest.mark.parametrize("old", ["line 4\n", "line 10\n"])
def test_a_file_edited_after_patching_is_refused(tree: Path, old: str) -> None:
    patching.apply(tree)
    (tree / "one.py").write_text(ONE_PATCHED.replace(old, "mine\n"))
    assert_refused(tree, r"got .*one\.py edited after it was patched, .*; save your changes")


def test_a_missing_backup_is_refused(tree: Path) -> None:
    patching.apply(tree)
    (tree / ("one.py" + BACKUP_SUFFIX)).unlink()
    assert_refused(tree, r"got a patched file without its backup, .*--force-reinstall")


@pytest.mark.parametrize("size", [0, 30, len(ONE) - 1])
def test_a_truncated_backup_is_refused(tree: Path, size: int) -> None:
    patching.apply(tree)
    (tree / ("one.py" + BACKUP_SUFFIX)).write_text(ONE[:size])
    assert_refused(tree, r"got a damaged backup \(the text at line \d+ differs\), .*one\.py")


def test_an_old_backup_beside_a_clean_file_is_replaced(tree: Path) -> None:
    (tree / ("one.py" + BACKUP_SUFFIX)).write_text("of an older release\n")
    patching.apply(tree)
    assert (tree / ("one.py" + BACKUP_SUFFIX)).read_text() == ONE


def test_a_half_patched_tree_is_named_and_can_be_finished(tree: Path) -> None:
    before = snapshot(tree)
    patching.apply(tree)
    shutil.copy2(tree / ("one.py" + BACKUP_SUFFIX), tree / "one.py")
    with pytest.raises(PatchError, match=r"with two\.py patched and one\.py not, expected all or none; run"):
        patching.check(tree)
    assert patching.apply(tree) == [tree / "one.py"]
    (tree / "one.py").write_text(ONE)
    assert patching.revert(tree) == [tree / "sub/two.py"]
    (tree / ("one.py" + BACKUP_SUFFIX)).unlink()
    assert snapshot(tree) == before


def test_an_unknown_version_is_refused(tree: Path) -> None:
    (tree / "_version.py").write_text('__version__ = "9.10"\n')
    assert_refused(tree, r"got mlx-lm 9\.10 in .*, expected 9\.9; install an mlx-lm that")
    (tree / "_version.py").unlink()
    assert_refused(tree, r"got no __version__ in .*_version\.py, expected the folder of an installed")


def fail_replace(context: MonkeyPatch, error: BaseException, calls: range, late: bool = False) -> None:
    """Let the calls of os.replace with these numbers, from 1 on, raise `error`: instead of the work, or after it."""
    replace, numbers = os.replace, itertools.count(1)

    def failing(source: Path, target: Path) -> None:
        number = next(numbers)
        if number not in calls or late:
            replace(source, target)
        if number in calls:
            raise error

    context.setattr(os, "replace", failing)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("call", [1, 2, 3, 4])
@pytest.mark.parametrize("error", [PermissionError("no"), KeyboardInterrupt("stop")])
def test_an_interrupted_write_is_undone(
    tree: Path, monkeypatch: MonkeyPatch, call: int, error: BaseException, late: bool
) -> None:
    before = snapshot(tree)
    expected, text = (PatchError, "nothing was changed") if isinstance(error, OSError) else (KeyboardInterrupt, "stop")
    with monkeypatch.context() as context:
        fail_replace(context, error, range(call, call + 1), late)
        with pytest.raises(expected, match=text):
            patching.apply(tree)
    assert snapshot(tree) == before
    assert len(patching.apply(tree)) == 2


def test_a_write_that_cannot_be_undone_says_how_to_recover(tree: Path, monkeypatch: MonkeyPatch) -> None:
    before = snapshot(tree)
    with monkeypatch.context() as context:
        fail_replace(context, PermissionError("no"), range(4, 9))
        with pytest.raises(PatchError, match=r"while undoing a failed write, .* run `vq_kvcache patch --revert`"):
            patching.apply(tree)
    assert patching.revert(tree) == [tree / "one.py"]
    (tree / ("sub/two.py" + BACKUP_SUFFIX)).unlink()
    assert snapshot(tree) == before


def test_a_full_disk_while_staging_leaves_everything_as_it_was(tree: Path, monkeypatch: MonkeyPatch) -> None:
    before = snapshot(tree)
    monkeypatch.setattr(os, "chmod", Mock(side_effect=OSError("no space left")))
    with pytest.raises(PatchError, match=r"no space left.*nothing was changed"):
        patching.apply(tree)
    assert snapshot(tree) == before


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        (TINY, "", "without a change, expected a unified diff"),
        ("@@ -2,3 +2,4 @@ somewhere", "@@ 2 @@", "expected a hunk below|expected a hunk header"),
        ("+last with newline\n", "", "ends too early"),
        ("+last with newline\n", "+last with newline", "ends too early"),
        ("-2,3 +2,4", "-2,3 +2,3", "has more lines than it says|ends too early"),
        ("-2,3 +2,4", "-2,2 +2,3", "expected a hunk header instead of b' line 4"),
        ("mlx_lm/sub/two.py", "mlx_lm/../two.py", "expected one file of mlx_lm"),
        ("+++ b/mlx_lm/one.py", "+++ /dev/null", "expected one file of mlx_lm"),
        ("+19,2", "+20,2", "has a wrong second line number"),
        ("@@ -18,3 ", "@@ -0,0 +6 @@\n+a hunk that goes back\n@@ -18,3 ", "the text at line 1 differs"),
        ("@@ -18,3 ", "@@ -30,0 +32 @@\n+a hunk past the end\n@@ -18,3 ", "has a wrong second line number"),
        (TINY[TINY.index("@@ -1,3") :], "", "expected a hunk below"),
    ],
)
def test_a_damaged_patch_is_refused(tree: Path, monkeypatch: MonkeyPatch, old: str, new: str, reason: str) -> None:
    assert old in TINY
    carry(monkeypatch, tree.parent, TINY.replace(old, new))
    assert_refused(tree, reason)


@pytest.mark.parametrize(
    ("text", "hunks", "result"),
    [
        ("a\n\nb\n", "@@ -1,3 +1,3 @@\n a\n\n-b\n+c\n", "a\n\nc\n"),  # an editor took the blank line's space
        ("a\nb\n", "@@ -0,0 +1 @@\n+new\n@@ -2 +2,0 @@\n-b\n", "new\na\n"),  # no context lines
    ],
)
def test_rare_hunks(tree: Path, monkeypatch: MonkeyPatch, text: str, hunks: str, result: str) -> None:
    (tree / "one.py").write_text(text)
    carry(monkeypatch, tree.parent, TINY[TINY.index("diff") : TINY.index("@@")] + hunks)
    patching.apply(tree)
    assert (tree / "one.py").read_text() == result


def test_main_says_what_it_did(tree: Path, monkeypatch: MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(patching, "_installed_package", lambda: tree)

    def said(*argv: str) -> str:
        assert patching.main(list(argv)) == 0
        return capsys.readouterr().out

    paths = [tree / "one.py", tree / "sub/two.py"]
    assert said("--check").startswith("clean: mlx-lm 9.9 in ")
    assert said("--apply", "--dry-run") == "".join(f"would patch {path}\n" for path in paths)
    assert said("--apply") == "".join(f"patched {path}\n" for path in paths)
    assert said("--apply").startswith("nothing to do, applied: ")
    assert said("--revert", "--dry-run") == "".join(f"would restore {path}\n" for path in paths)
    assert said("--check").startswith("applied: ")
    assert said("--revert") == "".join(f"restored {path}\n" for path in paths)
    assert said("--revert").startswith("nothing to do, clean: ")


def test_main_fails_clearly_and_takes_one_action(tree: Path, monkeypatch: MonkeyPatch, capsys: Capture) -> None:
    monkeypatch.setattr(patching, "_installed_package", lambda: tree)
    (tree / "one.py").write_text("edited\n")
    for action in ("--check", "--apply", "--revert"):
        assert patching.main([action]) == 1
        assert capsys.readouterr().err.startswith("vq_kvcache patch: got an edited file ")
    for argv in ([], ["--apply", "--revert"]):
        with pytest.raises(SystemExit, match="2"):
            patching.main(argv)


def test_the_installed_package_is_the_default(monkeypatch: MonkeyPatch) -> None:
    spec = importlib.util.find_spec("mlx_lm")
    assert spec is not None
    assert patching._installed_package() == Path(next(iter(spec.submodule_search_locations or ())))
    assert patching._read_version(Path("/nowhere"), installed=True) == importlib.metadata.version("mlx-lm")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(PatchError, match="got no mlx_lm in this Python environment, expected an installed one"):
        patching.check()
