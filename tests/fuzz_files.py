"""Files made wrong, by the hundred thousand: `python tests/fuzz_files.py --cases 100000 --seed 0 --out FILE`.

Every kind of file this package reads is changed in its bytes and in its structure (mutations.py) and read again, by
processes that are watched: a reader refuses it with one of its documented errors in one sentence, or what it loads
works. Anything else is a finding: another error, a crash, a wait of more than HANG_S seconds, more memory than
LARGEST_GROWTH bytes, a file outside of the folder, a pickle that was run. A finding prints the case that repeats it:
`--seed S --case N`. Exit status 1 when there is any.
"""

import argparse
import collections
import concurrent.futures
import itertools
import json
import os
import pathlib
import resource
import select
import shutil
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import warnings

import mutations
from tqdm import tqdm

HERE = pathlib.Path(__file__).resolve()
HANG_S = 30
LARGEST_GROWTH = 512 << 20  # bytes of resident memory that one case may add
ROOM = 2 << 30  # bytes of address space for all of them
ENDLESS = 1_000_000_000
BATCH = 2000  # cases a process


class Worker:
    """The child's part: run cases, a line of JSON each."""

    def __init__(self, folder, seed, kinds):
        sys.path.insert(0, str(HERE.parent.parent))
        os.environ["VQ_KVCACHE_HOME"] = str(folder / "home")
        os.environ["MUTATIONS_MARKER"] = str(folder / "unpickled")
        import fuzz_targets

        import vq_kvcache

        warnings.simplefilter("ignore")
        vq_kvcache.install()
        self.targets_of, self.folder, self.seed = fuzz_targets, folder, seed
        self.targets = {n: fuzz_targets.TARGETS[n](folder / n.replace(" ", "-")) for n in kinds}
        self.inside = set(os.listdir(folder)) | {"case", "home"}
        with open("/proc/self/statm") as file:
            size = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + ROOM,) * 2)

    def run(self, index):
        """(kind, what became of it, finding or None)."""
        rng = self.targets_of.case_random(self.seed, index)
        name = rng.choice(list(self.targets))
        target, case = self.targets[name], self.folder / "case"
        self._write(target, case, rng)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        outcome, finding = self._exercise(target, case, rng)
        grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
        if grown > LARGEST_GROWTH:
            finding = f"{grown >> 20} MB of memory"
        if outside := set(os.listdir(self.folder)) - self.inside:
            finding = f"wrote {sorted(outside)}"
            for path in outside:
                self._remove(self.folder / path)
        return name, outcome, finding, grown

    def _write(self, target, case, rng):
        self._remove(case)
        case.mkdir()
        changed = target.mutate(rng)
        for path, data in {**target.files, **changed}.items():
            (case / path).parent.mkdir(exist_ok=True)
            if callable(data):
                data(rng, case / path)
            elif data is not None:
                (case / path).write_bytes(data)

    @staticmethod
    def _remove(path):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)

    def _exercise(self, target, case, rng):
        try:
            return ("loaded" if target.exercise(case, rng) else "empty"), None
        except target.refusals as error:
            return type(error).__name__, unclear(error, target.refusals)
        except Exception as error:  # any other error is what this looks for
            where = traceback.extract_tb(error.__traceback__)[-1]
            text = f"{type(error).__name__}: {error} ({pathlib.Path(where.filename).name}:{where.lineno})"
            return "finding", text[:400]


def unclear(error, documented):
    """What is wrong with a refusal: a sentence says what was found, then what to do."""
    text = str(error)
    if type(error) not in documented and not type(error).__module__.startswith("vq_kvcache"):
        return f"{type(error).__name__}: {text}"[:400]
    if "\n" in text or not text.endswith(".") or "; " not in text or len(text) > 1000:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"no clear sentence: {text[:300]!r} ({pathlib.Path(where.filename).name}:{where.lineno})"
    return None


def work(arguments):
    """The child: cases from one number to another, each announced before it is run."""
    worker = Worker(arguments.folder, arguments.seed, arguments.kinds)
    for index in range(arguments.first, arguments.last):
        print(json.dumps({"start": index}), flush=True)
        name, outcome, finding, grown = worker.run(index)
        print(
            json.dumps({"done": index, "kind": name, "outcome": outcome, "finding": finding, "grown": grown}),
            flush=True,
        )


class Watcher:
    """The parent's part: a process for every few hundred cases, and what became of each."""

    def __init__(self, arguments):
        self.arguments, self.findings, self.lock = arguments, [], threading.Lock()
        self.outcomes = collections.defaultdict(collections.Counter)
        self.done = self.crashes = self.hangs = self.largest = 0

    def run(self):
        with tempfile.TemporaryDirectory() as folder:
            os.environ["MUTATIONS_BOMB"] = f"{folder}/bomb.npz"
            mutations.write_bomb(os.environ["MUTATIONS_BOMB"])
            return self._run()

    def _run(self):
        first, cases = self.arguments.first, self.arguments.cases
        self.until = time.monotonic() + (self.arguments.seconds or float("inf"))
        began = time.monotonic()
        batches = ((n, min(n + BATCH, first + cases)) for n in itertools.count(first, BATCH))
        with (
            tqdm(total=cases if cases < ENDLESS else None, unit="case", desc="fuzzing") as self.progress,
            concurrent.futures.ThreadPoolExecutor(self.arguments.jobs) as pool,
        ):
            list(pool.map(self._batches, [batches] * self.arguments.jobs))
        self.seconds = time.monotonic() - began
        return self

    def _batches(self, batches):
        """Take one range of cases after the other, as long as there is time."""
        while time.monotonic() < self.until:
            with self.lock:
                first, last = next(batches, (None, None))
            if first is None or first >= self.arguments.first + self.arguments.cases:
                return
            while first < last and time.monotonic() < self.until:
                first = self._batch(first, last)

    def _batch(self, first, last):
        """Run cases first..last in a process, as many as it survives; returns the next one."""
        with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
            command = [sys.executable, str(HERE), "--work", folder, "--seed", str(self.arguments.seed)]
            command += ["--first", str(first), "--last", str(last), "--kinds", *self.arguments.kinds]
            with (
                tempfile.TemporaryFile() as said,
                subprocess.Popen(command, stdout=subprocess.PIPE, stderr=said) as child,
            ):
                at, how = self._listen(child, first)
                said.seek(0)
                errors = said.read().decode("utf-8", "replace")[-300:]
        if at >= last or how == "time":
            return last
        if how == "hang":
            self.hangs += 1
            self._found(at, f"no answer in {HANG_S} s")
        else:
            self.crashes += 1
            self._found(at, f"the process ended with {child.returncode}: {errors}")
        return at + 1

    def _listen(self, child, first):
        """(the case that was not done, how it came about: "hang", "end" or "time")."""
        at, rest = first, b""
        while True:
            ready, _, _ = select.select([child.stdout], [], [], HANG_S)
            if not ready or time.monotonic() > self.until:
                child.kill()
                return at, "time" if ready else "hang"
            chunk = os.read(child.stdout.fileno(), 1 << 16)
            if not chunk:
                child.wait()
                return at, "end"
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                said = json.loads(line)
                if "done" in said:
                    at = said["done"] + 1
                    with self.lock:
                        self._count(said)

    def _count(self, said):
        self.done += 1
        self.progress.update()
        self.outcomes[said["kind"]][said["outcome"]] += 1
        self.largest = max(self.largest, said["grown"])
        if said["finding"]:
            self._found(said["done"], f"{said['kind']}: {said['finding']}")

    def _found(self, index, text):
        self.findings.append({"case": index, "what": text})
        tqdm.write(f"FINDING --seed {self.arguments.seed} --case {index}: {text}")

    def report(self):
        return {
            "seed": self.arguments.seed, "cases": self.done, "seconds": round(self.seconds, 1),
            "by_file": {kind: dict(sorted(seen.items())) for kind, seen in sorted(self.outcomes.items())},
            "crashes": self.crashes, "hangs": self.hangs, "largest_growth_bytes": self.largest,
            "findings": self.findings[:200], "number_of_findings": len(self.findings),
        }  # fmt: skip


KINDS = [
    "codec", "rotations", "archive", "prompt cache", "batch prompt cache", "partial calibration", "patch",
]  # fmt: skip


def main():
    """Run the cases; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", type=int, default=ENDLESS, help="how many (default: until --seconds are over)")
    parser.add_argument("--seconds", type=float, help="stop after so many")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--case", type=int, help="only this one")
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--out", type=pathlib.Path)
    parser.add_argument("--work", dest="folder", type=pathlib.Path, help=argparse.SUPPRESS)
    parser.add_argument("--first", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--last", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.folder is not None:
        work(arguments)
        return 0
    if arguments.case is not None:
        arguments.first, arguments.cases = arguments.case, 1
    if arguments.seconds is None and arguments.cases == ENDLESS:
        arguments.seconds = 60.0
    report = Watcher(arguments).run().report()
    text = json.dumps(report, indent=1)
    if arguments.out is not None:
        arguments.out.write_text(text + "\n")
    print(text)
    print(f"{report['cases']:,} files, seed {report['seed']}: {report['number_of_findings']} findings.")
    return int(bool(report["findings"]))


if __name__ == "__main__":
    sys.exit(main())
