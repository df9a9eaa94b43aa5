"""A process that measures, and that is ended where a call takes too long.

Compiled code can't be interrupted from within; and what runs out of memory takes only itself along.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
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


READY, CALLED = Stage("ready"), Stage("called")


class Worker:
    """Measures questions, one at a time, in a process of its own.

    Args:
        measure: a function at the top of a module that takes a question and yields ``READY`` when
            only the call is left, ``CALLED`` after the first call, and then its answer; or its
            answer at once.
        limit: seconds that the first call may take.
        preparing: seconds for what comes before it: inputs, and engines that compile themselves.
        device: where. On the CPU new processes are forked from one that has imported all and
            done nothing; CUDA does not survive a fork.
    """

    def __init__(
        self,
        measure: Callable[[Any], Iterator[Any]],
        limit: float,
        preparing: float = 180.0,
        device: str = "cpu",
    ) -> None:
        self.measure, self.limit, self.preparing = measure, limit, preparing
        forks = device == "cpu" and "forkserver" in multiprocessing.get_all_start_methods()
        self._context: Any = multiprocessing.get_context("forkserver" if forks else "spawn")
        if forks:
            self._context.set_forkserver_preload([measure.__module__])
        self._process: Any = None
        self._connection: Any = None

    def __enter__(self) -> Worker:
        self._start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if self._process is not None and kind is None:
            self._connection.send(None)
            self._process.join(5)
        self.end()

    def ask(self, question: Any) -> Any:
        """The answer, or :class:`Failed`."""
        if self._process is None:
            self._start()
        stages = (
            (self.preparing, f"preparing took over {self.preparing:g} s"),
            (self.limit, f"> {self.limit:g} s"),
            (60 + 4 * self.limit, "later calls took much longer than the first"),
        )
        try:
            self._connection.send(question)
            for limit, reason in stages:
                if not self._connection.poll(limit):
                    self.end()
                    return Failed(reason)
                answer = self._connection.recv()
                if not isinstance(answer, Stage):
                    return answer
        except (EOFError, ConnectionError):
            self.end()
            return Failed("its process died: out of memory?")
        raise TypeError(f"{self.measure.__name__} gave no answer after {answer!r}")

    def end(self) -> None:
        """End the process, whatever it is doing; the next question starts another."""
        if self._process is not None:
            self._process.kill()
            self._process.join()
            self._connection.close()
            self._process = None

    def _start(self) -> None:
        self._connection, other = self._context.Pipe()
        self._process = self._context.Process(
            target=_serve, args=(self.measure, other, torch.get_num_threads()), daemon=True
        )
        self._process.start()
        other.close()
        self._connection.recv()  # that it is there


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
