"""One run a folder at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from convnn_geo.train.config import ConfigError


@contextmanager
def alone(folder: Path) -> Iterator[None]:
    """Hold a folder against other runs until the block ends, or the process does.

    By a lock of the system on ``.lock``, which a crash releases. Where a system or a file system
    has no such locks, nobody is held off.

    Raises:
        ConfigError: another run holds it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / ".lock"
    with path.open("w") as file:
        try:
            import fcntl

            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"{folder} is in use: another run is writing there; wait for it, or choose another "
                "folder by out (--out)"
            ) from error
        except (ImportError, OSError):
            pass
        try:
            yield
        finally:
            path.unlink(missing_ok=True)
