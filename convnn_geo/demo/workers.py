"""Training several networks side by side, one thread each.

A thread more would split sums differently and so change the last bits of every result; with one
thread a network the numbers are the same however many networks train at a time.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from convnn_geo.demo.training import Network, Run, Settings, Splits, train


@dataclass(frozen=True)
class Job:
    """A network and the data that it learns.

    Args:
        task: what the data are called.
        load: gives the data; loaded where the job runs.
        network: what to train.
        settings: of the training.
    """

    task: str
    load: Callable[[], Splits]
    network: Network
    settings: Settings

    def __call__(self) -> list[Run]:
        """Do it, in one thread."""
        with one_thread():
            return train(self.task, self.network, self.load(), self.settings)


@contextmanager
def one_thread() -> Iterator[None]:
    """Let torch use one thread inside."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_jobs(
    jobs: Sequence[Job], workers: int, done: Callable[[Job], object] = lambda job: None
) -> list[Run]:
    """Run jobs in so many processes, and give their runs in the jobs' order.

    Args:
        jobs: networks to train.
        workers: processes; 1 to run here.
        done: called with each job when it is done.
    """
    if workers == 1:
        results = []
        for job in jobs:
            results += job()
            done(job)
        return results
    # Spawned, because a process forked after torch has used threads may hang.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context) as pool:
        futures = {pool.submit(job): job for job in jobs}
        try:
            for future in as_completed(futures):
                future.result()  # raises here what was raised there
                done(futures[future])
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
    return [run for future in futures for run in future.result()]
