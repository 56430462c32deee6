"""Progress bars on a terminal and in a log."""

import io
import sys
import time

import pytest

from vq_kvcache.spectral.progress import bar


@pytest.mark.parametrize(("terminal", "least", "most"), [(True, 4, 22), (False, 2, 2)])
def test_a_log_gets_the_beginning_and_the_end_of_a_short_bar(monkeypatch, terminal, least, most):
    class Stream(io.StringIO):
        def isatty(self):
            return terminal

    written = Stream()
    monkeypatch.setattr(sys, "stderr", written)
    for _ in bar(range(20), desc="reading", unit="line"):
        time.sleep(0.03)
    lines = [line for line in written.getvalue().split("\r") if "reading" in line]
    assert least <= len(lines) <= most
    assert "0/20" in lines[0]
    assert "20/20" in lines[-1]
