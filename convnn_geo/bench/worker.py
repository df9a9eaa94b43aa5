"""A process that measures, and that is ended where a call takes too long.

Compiled code can't be interrupted from within; and what runs out of memory takes only itself along.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import torch


@dataclass(frozen=True)
class Failed:
    """No result, and why."""

    reason: str


class Stage(str):
    """What a measurement has come to; sent so that its time can be limited."""


_QUIET = "ignore:resource_tracker:UserWarning"
"""Processes that are killed leave semaphores to Python's tracker, which frees them and says so."""

READY, CALLED = Stage("ready"), Stage("called")


class Worker:
    """Measures questions, one at a time, in processes of its own.

    Args:
        measure: a function at the top of a module that takes a question and yields ``READY`` when
            only the call is left, ``CALLED`` after the first call, and then its answer; or its
            answer at once.
        limit: seconds that the first call may take.
        preparing: seconds for what comes before it: inputs, and engines that compile themselves.
        device: where. On the CPU new processes are forked from one that has imported all and
            done nothing; CUDA does not survive a fork.
        apart: which process a question goes to: one an engine, say, for an engine's threads stay
            with its process.
    """

    def __init__(
        self,
        measure: Callable[[Any], Iterator[Any]],
        limit: float,
        preparing: float = 180.0,
        device: str = "cpu",
        apart: Callable[[Any], object] = lambda question: None,
    ) -> None:
        self.measure, self.limit, self.preparing, self.apart = measure, limit, preparing, apart
        if _QUIET not in sys.warnoptions:  # which the tracker inherits
            sys.warnoptions.append(_QUIET)
        forks = device == "cpu" and "forkserver" in multiprocessing.get_all_start_methods()
        self._context: Any = multiprocessing.get_context("forkserver" if forks else "spawn")
        if forks:
            self._context.set_forkserver_preload([measure.__module__])
        self._running: dict[object, tuple[Any, Any]] = {}

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        for key, (process, connection) in list(self._running.items()):
            if kind is None:
                with contextlib.suppress(ConnectionError):
                    connection.send(None)
                    process.join(5)
            self.end(key)

    def ask(self, question: Any) -> Any:
        """The answer, or :class:`Failed`."""
        key = self.apart(question)
        if key not in self._running:
            self._running[key] = self._start()
        connection = self._running[key][1]
        stages = (
            (self.preparing, f"preparing took over {self.preparing:g} s"),
            (self.limit, f"> {self.limit:g} s"),
            (60 + 4 * self.limit, "later calls took much longer than the first"),
        )
        try:
            connection.send(question)
            for limit, reason in stages:
                if not connection.poll(limit):
                    self.end(key)
                    return Failed(reason)
                answer = connection.recv()
                if not isinstance(answer, Stage):
                    return answer
        except (EOFError, ConnectionError):
            self.end(key)
            return Failed("its process died: out of memory?")
        raise TypeError(f"{self.measure.__name__} gave no answer after {answer!r}")

    def end(self, key: object = None) -> None:
        """End a process, whatever it is doing; the next question to it starts another."""
        process, connection = self._running.pop(key)
        process.kill()
        process.join()
        connection.close()

    def _start(self) -> tuple[Any, Any]:
        mine, other = self._context.Pipe()
        process = self._context.Process(
            target=_serve, args=(self.measure, other, torch.get_num_threads()), daemon=True
        )
        process.start()
        other.close()
        mine.recv()  # that it is there
        return process, mine


def _serve(measure: Callable[[Any], Iterator[Any]], connection: Connection, threads: int) -> None:
    torch.set_num_threads(threads)
    with open(os.devnull, "w") as nowhere:  # engines that compile say so, across the progress bar
        os.dup2(nowhere.fileno(), 1)
    with contextlib.suppress(KeyboardInterrupt, EOFError, ConnectionError):
        connection.send(READY)
        while True:
            question = connection.recv()
            if question is None:
                return
            try:
                for message in measure(question):
                    connection.send(message)
            except Exception as error:  # one cell that fails must not end the others
                connection.send(Failed(f"{type(error).__name__}: {' '.join(str(error).split())}"))
