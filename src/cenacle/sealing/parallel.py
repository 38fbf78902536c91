"""Run one function over many chunks on a few threads.

The work is AES and SHA-256 inside OpenSSL and system calls, all of which release the
interpreter lock, so plain threads scale.
"""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable

from cenacle.errors import InputError

__all__ = ["Progress", "for_each", "start_thread", "thread_count"]

Progress = Callable[[int, int], None]
_MAX_DEFAULT = 8


def thread_count(threads: int | None) -> int:
    """The number to use: what was asked for, else the cores this process may run on, at most 8."""
    if threads is None:
        allowed = getattr(os, "sched_getaffinity", None)  # Linux only
        cores = len(allowed(0)) if allowed else os.cpu_count() or 1
        return max(1, min(_MAX_DEFAULT, cores))
    if threads < 1:
        raise InputError(
            "a number of threads must be positive", found=threads, expected="1 or more"
        )
    return threads


def start_thread(thread: threading.Thread) -> bool:
    """Start a helper; ``False`` where the system allows no more threads (a sandbox's limit)."""
    try:
        thread.start()
    except RuntimeError:
        return False
    return True


def for_each(
    count: int,
    make_worker: Callable[[], Callable[[int], None]],
    threads: int,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Call ``worker(i)`` for every ``i`` in ``range(count)``, in no particular order.

    Args:
        count: how many indices.
        make_worker: called once a thread, so each gets its own buffers.
        threads: at most this many threads, the calling one included.
        progress: called on the calling thread with the number of indices taken so far.

    Raises:
        Whatever a worker raises first; the others stop at their next index.
    """
    indices = itertools.count()  # next() is atomic under the interpreter lock
    stop = threading.Event()
    errors: list[BaseException] = []

    def run(report: Callable[[int], None] | None = None) -> None:
        try:
            worker = make_worker()
            while not stop.is_set():
                index = next(indices)
                if index >= count:
                    return
                worker(index)
                if report is not None:
                    report(index + 1)
        except BaseException as error:  # re-raised on the calling thread
            errors.append(error)
            stop.set()

    helpers = []
    for _ in range(min(threads, count) - 1):
        helper = threading.Thread(target=run, name="cenacle-sealing", daemon=True)
        if not start_thread(helper):
            break
        helpers.append(helper)
    run(progress)
    for helper in helpers:
        helper.join()
    if errors:
        raise errors[0]
    if progress is not None and count:
        progress(count)
