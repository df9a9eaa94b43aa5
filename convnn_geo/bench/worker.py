"""A process that measures, and that is ended where a call takes too long.

Compiled code can't be interrupted from within; and what runs out of memory takes only itself along.
"""

from __future__ import annotations

import contextlib
import multiprocessing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Any

import torch

PREPARING = 180.0
"""Seconds for what comes before the first call: inputs, and engines that compile themselves."""


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
    """

    def __init__(self, measure: Callable[[Any], Iterator[Any]], limit: float) -> None:
        self.measure, self.limit = measure, limit
        self._context = multiprocessing.get_context("spawn")
        self._process: Any = None
        self._connection: Any = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.end()

    def ask(self, question: Any) -> Any:
        """The answer, or :class:`Failed`."""
        if self._process is None:
            self._start()
        stages = (
            (PREPARING, f"preparing took over {PREPARING:g} s"),
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


def _serve(measure: Callable[[Any], Iterator[Any]], connection: Connection, threads: int) -> None:
    torch.set_num_threads(threads)
    with contextlib.suppress(KeyboardInterrupt, EOFError, ConnectionError):
        while True:
            question = connection.recv()
            try:
                for message in measure(question):
                    connection.send(message)
            except Exception as error:  # one cell that fails must not end the others
                connection.send(Failed(f"{type(error).__name__}: {' '.join(str(error).split())}"))
