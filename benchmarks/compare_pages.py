"""Write the pages of `vq_kvcache compare` in results/ again, from their figures.

    python benchmarks/compare_pages.py

The figures come from the command itself, `vq_kvcache compare MODEL --output compare-MODEL.html --json
compare-MODEL.json`; after a change to the page this saves measuring again.
"""

import json
import pathlib

from vq_kvcache.report_page import page
from vq_kvcache.spectral.files import write_atomically

RESULTS = pathlib.Path(__file__).resolve().parent / "results"


def main() -> None:
    """A page beside each compare-*.json."""
    for file in sorted(RESULTS.glob("compare-*.json")):
        write_atomically(file.with_suffix(".html"), page(json.loads(file.read_text("utf-8"))).encode())
        print(file.with_suffix(".html").name)


if __name__ == "__main__":
    main()
