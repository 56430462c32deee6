"""Progress bars: lively on a terminal; in a log, which keeps every one that is printed, a line now and then."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

SELDOM = 10.0  # seconds; as long as tqdm's own maxinterval


def bar(iterable: Iterable[Any] | None = None, **options: Any) -> Any:
    """tqdm's bar on standard error, with its `options`. Not off in a log or a notebook: calibration takes minutes."""
    terminal = sys.stderr is not None and sys.stderr.isatty()
    return tqdm(iterable, mininterval=0.1 if terminal else SELDOM, **options)
