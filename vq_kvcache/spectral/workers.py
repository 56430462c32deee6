"""A few things at once, each on a CPU core of its own: MLX's CPU streams are one thread each."""

import queue
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from typing import Any

import mlx.core as mx

_Task = tuple[Future[Any], Callable[[Any], Any], Any]
_tasks: queue.SimpleQueue[_Task] = queue.SimpleQueue()
_threads: list[threading.Thread] = []
_starting = threading.Lock()


def each(make: Callable[[Any], Any], items: Sequence[Any], at_once: int) -> Iterator[Any]:
    """make(item) of each in turn; what it raises is raised here."""
    if at_once == 1:
        yield from map(make, items)
        return
    _start(at_once)
    for start in range(0, len(items), at_once):
        futures = [Future[Any]() for _ in items[start : start + at_once]]
        for future, item in zip(futures, items[start:], strict=False):
            _tasks.put((future, make, item))
        try:
            wait(futures)
        finally:  # an interrupt too waits for what is under way
            wait(futures)
        yield from (future.result() for future in futures)


def _start(threads: int) -> None:
    with _starting:
        while len(_threads) < threads:
            _threads.append(threading.Thread(target=_work, name="vq_kvcache", daemon=True))
            _threads[-1].start()


def _work() -> None:
    # Never ends: MLX frees what a thread compiled after Python has joined it, and asks for the interpreter's lock to do
    # so. Where the interpreter is just ending, that kills the process ("terminate called without an active exception").
    with mx.stream(mx.new_stream(mx.cpu)):  # a stream belongs to the thread that made it
        while True:
            _run(*_tasks.get())


def _run(future: Future[Any], make: Callable[[Any], Any], item: Any) -> None:
    try:
        future.set_result(make(item))
    except BaseException as error:
        future.set_exception(error)
