"""One run a folder at a time."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from convnn_geo.train.config import ConfigError


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a folder against other runs until the block ends, or the process and its workers do.

    By a lock of the system on ``.lock``. Where a system or a file system has no such locks, nobody
    is held off. A folder that stays empty is removed.

    Raises:
        ConfigError: another run holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    with _locked(path):
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
            with suppress(OSError):
                folder.rmdir()


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    while True:
        with path.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ConfigError(
                    f"{path.parent} is in use: another run is writing there; wait for it, or "
                    "choose another folder by out (--out)"
                ) from error
            except OSError:  # no locks here
                pass
            if _is_at(file, path):  # and not removed by who held it, after it was opened here
                yield
                return


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
