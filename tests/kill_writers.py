"""Writers killed at random moments: `python tests/kill_writers.py --cases 500 --seed 0 --out FILE`.

A child writes (a codec into the library, rotations over others, a calibration's sums, a patch on mlx-lm and off again)
again and again, until SIGKILL ends it. Then every file that is there must load and be
whole, the old one or the new one; a run afterwards must end as if nothing had happened; and what the dead left behind
must not be taken for anything, nor stay in folders that are swept. A finding prints the case that repeats its moment
as nearly as clocks allow: `--seed S --case N`. Exit status 1 when there is any.
"""

import collections
import json
import os
import pathlib
import random
import signal
import sys
import tempfile
import time

import numpy as np
from conftest import random_codec
from fuzz_targets import NAME, PATCH, Unfinished, random_rotation
from many_cases import Cases

from vq_kvcache import library, patching
from vq_kvcache.spectral.codec import Codec, stored_path
from vq_kvcache.spectral.rotation_files import load_cached_rotations, save_rotations

LONGEST_S = 0.25  # from the child's first write to the signal
VERSIONS = 2


class CodecWriter:
    """Two codecs of one model, in turn."""

    def __init__(self, folder):
        self.folder = folder
        os.environ["VQ_KVCACHE_HOME"] = str(folder)
        self.codecs = [random_codec(2, 2, 32, name=NAME, seed=seed) for seed in range(VERSIONS)]

    def write(self, version):
        self.codecs[version].save(stored_path(NAME))

    def read(self):
        found = [codec for path, codec in library.codecs() if path.parent == stored_path(NAME).parent]
        assert len(found) <= 1, f"{len(found)} codecs are listed"
        if not stored_path(NAME).exists():
            return None
        return [c.identity for c in self.codecs].index(Codec.load(stored_path(NAME)).identity)


class RotationWriter:
    """Two sets of rotations into one folder, in turn: several files and a manifest."""

    def __init__(self, folder):
        self.folder = folder / "rotations"
        self.sets = [[random_rotation(i + 20 * v, random_rotation(i + 40)) for i in range(3)] for v in range(VERSIONS)]

    def write(self, version):
        save_rotations(self.sets[version], self.folder)

    def read(self):
        if not (self.folder / "manifest.json").exists():
            return None
        found = np.array(load_cached_rotations(self.folder)[0].rotation_matrix)
        return [np.array_equal(found, np.array(s[0].rotation_matrix)) for s in self.sets].index(True)


class CalibrationWriter:
    """The sums of an unfinished calibration, of fewer and of more sequences."""

    def __init__(self, folder):
        self.target = Unfinished(folder / f"made-{os.getpid()}")
        self.statistics, _ = self.target.partial.load()
        self.folder = self.target.partial.folder = folder / "partial"

    def write(self, version):
        self.target.partial._saved_at = -1e9
        self.target.partial._kept = 0
        self.target.partial.save(self.statistics, 3 + version)

    def read(self):
        statistics, done = self.target.partial.load()
        if not done:
            assert not (self.folder / "sums").exists(), "sums are there, and do not load"
            return None
        assert self.target.digest(statistics, 3) == self.target.sums, "other sums than were written"
        return done - 3


class PatchWriter:
    """A patch put on and taken off."""

    def __init__(self, folder):
        self.folder = folder / "mlx_lm"
        self.released = "".join(f"line {i}\n" for i in range(1, 4000)).encode()
        changed = self.released.replace(b"line 3\n", b"line three\nline three and a half\n")
        self.texts = [self.released, changed]
        self.folder.mkdir(exist_ok=True)
        if not (self.folder / "one.py").exists():
            (self.folder / "one.py").write_bytes(self.released)
            (self.folder / "_version.py").write_text("__version__ = '9.9'\n")
        patch = folder / "patch"
        old, new = (patching._blob_id(text)[:10] for text in self.texts)
        patch.write_text(PATCH.format(old=old, new=new))
        patching.available_patches = lambda: {"9.9": patch}

    def write(self, version):
        (patching.apply if version else patching.revert)(self.folder)

    def read(self):
        patching.check(self.folder)
        return self.texts.index((self.folder / "one.py").read_bytes())


WRITERS = {"codec": CodecWriter, "rotations": RotationWriter, "calibration": CalibrationWriter, "patch": PatchWriter}


class Child:
    """A fork of this warm process, so that a kill costs no import. This one must not compute with MLX, whose threads
    a fork has not."""

    def __init__(self, kind, folder):
        self.pid = os.fork()
        if self.pid == 0:
            try:
                writer, version = WRITERS[kind](folder), 0
                (folder / "begun").touch()
                while True:
                    writer.write(version)
                    version = (version + 1) % VERSIONS
            finally:
                os._exit(1)

    def kill_after(self, folder, seconds):
        until = time.monotonic() + 60
        while not (folder / "begun").exists():
            if time.monotonic() > until:
                raise RuntimeError("the child did not begin")
            time.sleep(0.001)
        time.sleep(seconds)
        os.kill(self.pid, signal.SIGKILL)
        _, status = os.waitpid(self.pid, 0)
        assert os.WIFSIGNALED(status), "the child ended by itself: a writer failed"


def look(kind, folder):
    """What is there, how many temporaries beside it, and what is wrong or None: in a fork of its own."""
    receive, send = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.write(send, json.dumps(_look(kind, folder)).encode())
        finally:
            os._exit(0)
    os.close(send)
    with open(receive, "rb") as pipe:
        said = pipe.read()
    os.waitpid(pid, 0)
    return json.loads(said) if said else (None, 0, f"{kind}: the reader crashed")


def _look(kind, folder):
    try:
        writer = WRITERS[kind](folder)
        found = writer.read()
        left = [p for p in writer.folder.rglob(".*") if p.is_file()] if writer.folder.exists() else []
        for path in left:
            os.utime(path, (0, 0))  # an hour later
        for version in (1, 0):
            writer.write(version)
            assert writer.read() == version, "what was written afterwards is not what is read"
        swept = kind != "patch"  # in the folder of a package nothing is swept
        assert not (swept and any(p.exists() for p in left)), f"{len(left)} temporaries stay"
        return found, len(left), None
    except Exception as error:  # whatever does not load
        return None, 0, " ".join(f"{kind}: {type(error).__name__}: {error}".split())[:400]


def run_case(seed, index):
    """(kind, what was there afterwards, temporaries left, what was wrong or None)."""
    rng = random.Random(f"{seed}/{index}")
    kind = rng.choice(list(WRITERS))
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        Child(kind, folder).kill_after(folder, rng.random() ** 2 * LONGEST_S)
        return kind, *look(kind, folder)


def main():
    """Run the cases; returns the exit status."""
    cases, kills, left = Cases(__doc__, "kill"), collections.Counter(), 0
    for case in cases:
        kind, found, temporaries, wrong = run_case(cases.seed, case)
        kills[f"{kind}, {'absent' if found is None else 'whole'}"] += 1
        left += bool(temporaries)
        if wrong:
            cases.found(case, wrong)
    return cases.finish(by_file=dict(sorted(kills.items())), kills_that_left_a_temporary=left)


if __name__ == "__main__":
    sys.exit(main())
