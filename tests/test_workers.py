"""Jobs in several processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

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


def wait_long(folder, name):
    Path(folder, name).write_text(str(os.getpid()))
    time.sleep(120)


def lives(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"  # one that nobody waited for yet is done, too


def within(seconds, condition):
    end = time.monotonic() + seconds
    while not (met := condition()) and time.monotonic() < end:
        time.sleep(0.05)
    return met


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="looks at processes by /proc")
@pytest.mark.parametrize("by", ["SIGTERM", "SIGKILL"])
def test_workers_end_with_the_process_that_started_them(tmp_path, by):
    here = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})"
    jobs = f"{{name: partial(wait_long, {str(tmp_path)!r}, name) for name in 'abc'}}"
    file = tmp_path / "main.py"
    file.write_text(
        f"{here}\nfrom functools import partial\nfrom test_workers import run_jobs, wait_long\n"
        f"if __name__ == '__main__':\n    list(run_jobs({jobs}, workers=2))\n"
    )
    parent = subprocess.Popen([sys.executable, file])
    begun = [tmp_path / "a", tmp_path / "b"]
    assert within(60, lambda: all(each.exists() and each.read_text() for each in begun))
    pids = [int(each.read_text()) for each in begun]
    assert all(map(lives, pids))
    parent.send_signal(getattr(signal, by))
    parent.wait()
    assert within(10, lambda: not any(map(lives, pids)))
