"""Files that are whole or not there: a crash, a full disk or a kill leaves the one before.

A file is written beside its place, synced to the disk, and put in its place by one rename; the
checkpoint that was there is kept as ``checkpoint.previous.pt``.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

_NO_COMMENT = bytes(2)
"""How an archive without a comment ends: with the comment's length."""

NAME, PREVIOUS, WEIGHTS = "checkpoint.pt", "checkpoint.previous.pt", "weights.pt"


class CheckpointError(OSError):
    """A file of a run can't be written or read; the message says what is left and what to do."""


def write_atomically(path: Path, content: bytes | str) -> None:
    """Put content in a file's place at once.

    Args:
        path: of the file; what was there stays until all of the new content is on the disk.
        content: bytes, or text to be encoded in UTF-8.

    Raises:
        CheckpointError: it can't be written; the file is as before.
    """
    with _replacing(path) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def save_checkpoint(folder: Path, state: dict[str, Any]) -> None:
    """Write ``checkpoint.pt``, and keep the one before.

    Args:
        folder: of the run.
        state: tensors, numbers, text, lists and dictionaries.

    Raises:
        CheckpointError: it can't be written; the one before is still there.
    """
    with _replacing(folder / NAME, keep=folder / PREVIOUS) as file:
        file.write(_bytes(state))


def save_tensors(path: Path, state: dict[str, Any]) -> None:
    """Write a file for :func:`load_tensors`, at once."""
    write_atomically(path, _bytes(state))


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """Read ``checkpoint.pt``, or the one before where it is missing; None where both are.

    Args:
        folder: of the run.

    Raises:
        CheckpointError: the file is corrupt; it and the one before are left as they are.
    """
    for path in (folder / NAME, folder / PREVIOUS):
        if path.exists():
            try:
                return load_tensors(path)
            except CheckpointError as error:
                spare = folder / PREVIOUS
                advice = (
                    f"delete it to continue from {spare.name}, an epoch before"
                    if path.name == NAME and spare.exists()
                    else "delete it to start this run anew"
                )
                raise CheckpointError(f"{error}; {advice}") from error
    return None


def load_tensors(path: Path) -> dict[str, Any]:
    """Read a file that this module wrote; nothing in it is executed.

    Args:
        path: of the file.

    Raises:
        CheckpointError: the file is corrupt: cut off, changed, or something else.
        FileNotFoundError: there is no such file.
    """
    content = path.read_bytes()
    body = content[: -len(_sealed(b""))] + _NO_COMMENT
    if _sealed(body) != content:
        raise CheckpointError(f"{path} is corrupt: cut off, or bad checksum")
    try:
        state = torch.load(io.BytesIO(body), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise CheckpointError(f"{path} is corrupt: {error}") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} is no checkpoint: it holds a {type(state).__name__}")
    return state


def _bytes(state: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()  # torch.save turns errors of a file into others
    torch.save(state, buffer)
    return _sealed(buffer.getvalue())


def _sealed(archive: bytes) -> bytes:
    """An archive with a checksum of all of it as its comment, which ``torch.load`` skips.

    The checksums in an archive are of its members: a changed byte between them may lead elsewhere.
    """
    digest = hashlib.sha256(archive).hexdigest().encode()
    return archive[: -len(_NO_COMMENT)] + len(digest).to_bytes(2, "little") + digest


@contextlib.contextmanager
def _replacing(path: Path, keep: Path | None = None) -> Iterator[BinaryIO]:
    new = path.with_name(path.name + ".tmp")
    try:
        with new.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if keep is not None and path.exists():
            os.replace(path, keep)
        os.replace(new, path)
    except OSError as error:
        raise CheckpointError(
            f"can't write {path}: {error.strerror or error}; what was there before is kept. Make "
            "room or choose another folder, and continue with --resume"
        ) from error
    finally:
        new.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make renames last through a power cut, where the system can."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
