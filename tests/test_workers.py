"""Jobs in several processes."""

from __future__ import annotations

import time
from functools import partial

import pytest
import torch

from convnn_geo.workers import run_jobs


def fail(after):
    time.sleep(after)
    raise OSError("disk full")


def slow(after):
    time.sleep(after)
    return torch.get_num_threads()


@pytest.mark.parametrize("workers", [1, 2])
def test_results_come_with_their_keys_each_of_one_thread(workers):
    jobs = {name: partial(slow, 0.0) for name in "abc"}
    assert dict(run_jobs(jobs, workers)) == dict.fromkeys("abc", 1)


def test_no_process_at_all_is_refused():
    with pytest.raises(ValueError, match="workers: expected an integer of at least 1, got 0"):
        list(run_jobs({}, workers=0))


def test_what_runs_beside_a_job_that_fails_is_not_lost():
    jobs = {"bad": partial(fail, 0.5), "good": partial(slow, 1.5)}
    jobs |= {str(number): partial(slow, 0.1) for number in range(20)}
    found = []
    with pytest.raises(OSError, match="disk full"):
        for key, _ in run_jobs(jobs, workers=2):
            found.append(key)
    assert "good" in found and len(found) < len(jobs) - 1
