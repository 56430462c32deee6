"""A few things at once, on threads that outlast the work."""

import os
import pathlib
import subprocess
import sys
import threading

import pytest

from vq_kvcache.spectral.workers import each

ROOT = pathlib.Path(__file__).resolve().parent.parent

# MLX keeps the keys of what it compiled until the thread has ended; these take long to be freed.
ENDING = """
import time
import mlx.core as mx
from vq_kvcache.spectral.workers import each

class Key(str):
    def __del__(self):
        for _ in range(1000):
            time.sleep(0.001)

compiled = []

def make(i):
    compiled.append(mx.compile(lambda x: {Key("y"): x + i}))
    mx.eval(compiled[-1](mx.array(1.0)))

list(each(make, range(2), 2))
"""


def test_results_come_in_turn_and_several_run_at_once():
    meeting = threading.Barrier(3, timeout=60)

    def make(i):
        meeting.wait()
        return i * i

    assert list(each(make, range(6), 3)) == [i * i for i in range(6)]


def test_what_is_raised_is_raised_and_the_next_call_works():
    def make(i):
        if i == 1:
            raise ValueError(f"item {i}")
        return i

    with pytest.raises(ValueError, match="item 1"):
        list(each(make, range(4), 2))
    assert list(each(str, range(3), 2)) == ["0", "1", "2"]


def test_an_interpreter_that_ends_at_once_is_not_killed():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    child = subprocess.run(
        [sys.executable, "-c", ENDING], check=False, capture_output=True, text=True, env=environment, timeout=120
    )
    assert (child.returncode, child.stderr) == (0, "")
