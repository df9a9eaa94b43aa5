"""Work in several processes, one thread each.

A thread more would split sums differently and so change the last bits of every result; with one
thread a job the numbers are the same however many jobs run at a time.
"""

from __future__ import annotations

import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from typing import TypeVar

import torch

from convnn_geo.checks import check_int

Key = TypeVar("Key")
Result = TypeVar("Result")


def run_jobs(
    jobs: Mapping[Key, Callable[[], Result]], workers: int
) -> Iterator[tuple[Key, Result]]:
    """Run jobs in so many processes, and give their results as they come.

    Args:
        jobs: by a key that comes back with the result; to be pickled, if there is a process more.
        workers: processes; 1 to run here. They end when this one does, even if it is killed.

    Raises:
        ValueError: less than one process.
        Exception: of the first job that fails, after the results of those that ran beside it.

    Example:
        >>> list(run_jobs({"three": lambda: 3}, workers=1))
        [('three', 3)]
    """
    check_int("workers", workers)
    if workers == 1 or len(jobs) < 2:
        for key, job in jobs.items():
            yield key, in_one_thread(job)
        return
    # Spawned, because a process forked after torch has used threads may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        min(workers, len(jobs)), mp_context=context, initializer=_end_with_parent
    ) as pool:
        left = {pool.submit(in_one_thread, job): key for key, job in jobs.items()}
        try:
            for future in as_completed(list(left)):
                result = future.result()
                yield left.pop(future), result
        except Exception:  # what has not begun is not begun; what runs is not lost
            pool.shutdown(cancel_futures=True)
            for future, key in left.items():
                if not future.cancelled() and future.exception() is None:
                    yield key, future.result()
            raise
        except BaseException:  # Ctrl-C
            pool.shutdown(cancel_futures=True)
            raise


def _end_with_parent() -> None:
    """End this process as soon as the one that started it is gone, by whatever signal.

    A process that is killed tells its workers nothing, and they would wait for work for ever.
    """

    def watch() -> None:
        multiprocessing.parent_process().join()  # type: ignore[union-attr]
        os._exit(1)  # at once, whatever the other thread is doing

    threading.Thread(target=watch, daemon=True).start()


def in_one_thread(job: Callable[[], Result]) -> Result:
    """Do a job while torch uses one thread."""
    with one_thread():
        return job()


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
