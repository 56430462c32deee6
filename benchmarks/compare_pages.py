"""Write the pages of `vq_kvcache compare` in results/ again, from their figures.

    python benchmarks/compare_pages.py

The figures come from the command itself, `vq_kvcache compare MODEL --output compare-MODEL.html --json
compare-MODEL.json`; after a change to the page, or to how KL is predicted, this saves measuring again.
"""

import json
import pathlib

import measure

from vq_kvcache import measuring
from vq_kvcache.report_page import page
from vq_kvcache.spectral.files import write_atomically

RESULTS = pathlib.Path(__file__).resolve().parent / "results"


def main() -> None:
    """A page beside each compare-*.json."""
    for file in sorted(RESULTS.glob("compare-*.json")):
        report = json.loads(file.read_text("utf-8"))
        scored = max(m["positions"] for m in report["methods"])
        report = measure.predict_again(report, measuring.mass_of(measuring.PREFILL + scored))
        write_atomically(file, (json.dumps(report) + "\n").encode())
        write_atomically(file.with_suffix(".html"), page(report).encode())
        print(file.with_suffix(".html").name)


if __name__ == "__main__":
    main()
