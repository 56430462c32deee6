"""What the scripts with many random cases share: their options, the walk over the cases, and their report."""

import argparse
import json
import pathlib
import time

from tqdm import tqdm


class Cases:
    """One run: iterate over it for the numbers of the cases, and tell it what was found."""

    def __init__(self, description, unit):
        parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
        parser.add_argument("--cases", type=int, help=f"how many {unit}s (default: until --seconds are over)")
        parser.add_argument("--seconds", type=float, help="stop after so many (default: 60, unless --cases are given)")
        parser.add_argument("--seed", type=int, default=0)
        parser.add_argument("--case", type=int, help="only this one")
        parser.add_argument("--out", type=pathlib.Path)
        self._options, self._unit = parser.parse_args(), unit
        self.seed, self.done, self.findings, self._began = self._options.seed, 0, [], time.monotonic()

    def __iter__(self):
        first, cases = self._options.case, self._options.cases
        first, cases = (0, cases) if first is None else (first, 1)
        seconds = self._options.seconds or (60.0 if cases is None else float("inf"))
        with tqdm(total=cases, unit=self._unit) as progress:
            while (cases is None or self.done < cases) and time.monotonic() - self._began < seconds:
                yield first + self.done
                self.done += 1
                progress.update()

    def found(self, case, wrong):
        """Note what was wrong with a case, and how it is repeated."""
        self.findings.append({"case": case, "what": wrong})
        tqdm.write(f"FINDING --seed {self.seed} --case {case}: {wrong}")

    def finish(self, **seen):
        """Write and print the report; returns the exit status."""
        report = {
            "seed": self.seed, f"{self._unit}s": self.done, **seen, "seconds": round(time.monotonic() - self._began, 1),
            "findings": self.findings[:200], "number_of_findings": len(self.findings),
        }  # fmt: skip
        text = json.dumps(report, indent=1)
        if self._options.out is not None:
            self._options.out.write_text(text + "\n")
        print(text)
        print(f"{self.done:,} {self._unit}s, seed {self.seed}: {len(self.findings)} findings.")
        return int(bool(self.findings))
