"""How long sequences may be, how many at once, and what must be computed twice, so that calibration fits a budget."""

import gc
import os
from collections.abc import Callable
from typing import Any, NamedTuple

import mlx.core as mx

PROBES = (128, 256)  # tokens
RUNS = 3  # of each: memory is claimed ahead of the work by as much as threads happen to run apart
STEP = 64  # tokens: sequences are shortened by whole steps
LEAST_BEYOND = 64  # tokens that a sequence must have beyond window and sinks


class Room(NamedTuple):
    """What fits: tokens of a sequence, whether layers are computed again in the backward pass, sequences at once."""

    sequence_length: int
    checkpoint: bool
    at_once: int


def default_budget() -> int:
    """Bytes that calibration may take above what is active: what the device recommends, or half of a host's memory."""
    if mx.default_device() == mx.gpu:
        info = mx.device_info()
        sizes = [info[n] for n in ("max_recommended_working_set_size", "memory_size", "total_memory") if n in info]
        return int(0.9 * min(map(int, sizes))) - mx.get_active_memory() if sizes else 1 << 62
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2


def fit(run: Callable[[int, bool], Any], sequence_length: int, shortest: int, budget: int) -> Room:
    """Room within `budget` bytes for sequences of at most `sequence_length` tokens, and at least `shortest` + 64.

    run(tokens, checkpoint) evaluates one short sequence: its peak memory is measured, not modelled. ValueError, with
    the bytes that would do, when not even the shortest fits.
    """
    for checkpoint in (False, True):
        needs = _needs(run, checkpoint)
        if needs(sequence_length) <= budget:
            return Room(sequence_length, checkpoint, _at_once(budget // max(needs(sequence_length), 1)))
    least = min(shortest + LEAST_BEYOND, sequence_length)
    if needs(least) > budget:
        raise ValueError(
            f"memory_budget is {budget:,} bytes; expected at least {needs(least):,}, for {least} tokens of this model; "
            'allow more, or calibrate with objective="variance", which needs no gradients.'
        )
    length = max(n for n in (least, *range(STEP, sequence_length, STEP)) if n >= least and needs(n) <= budget)
    return Room(length, True, 1)


def _needs(run: Callable[[int, bool], Any], checkpoint: bool) -> Callable[[int], int]:
    """Bytes by tokens: a + b T would underrate attention, so a parabola through nothing and two measurements."""
    (t, low), (u, high) = ((n, max(_peak(run, n, checkpoint) for _ in range(RUNS))) for n in PROBES)
    bend = max((high / u - low / t) / (u - t), 0.0)
    slope = max(high / u - bend * u, 0.0)
    return lambda tokens: int(slope * tokens + bend * tokens**2)


def _peak(run: Callable[[int, bool], Any], tokens: int, checkpoint: bool) -> int:
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(run(tokens, checkpoint))
    peak = mx.get_peak_memory()
    gc.collect()  # gradients leave cycles of closures, which hold arrays
    return max(peak - before, 0)


def _at_once(fitting: int) -> int:
    """MLX's CPU back-end runs a stream on one thread; a GPU is busy with one sequence."""
    cores = (
        1
        if mx.default_device() == mx.gpu
        else len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count() or 1
    )
    return max(1, min(cores, fitting, 8))
