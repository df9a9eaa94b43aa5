"""Numeric cases of the published code, matched to 1e-10."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from convnn_geo import verify
from convnn_geo.verify.golden import check_file

FILES = sorted((Path(__file__).parent / "golden").glob("*.npz"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_published_numbers(file: Path) -> None:
    for row in check_file(file):
        assert row.passed, row


def test_there_are_cases() -> None:
    assert len(FILES) >= 13


def test_a_wrong_number_is_seen(tmp_path: Path) -> None:
    with np.load(FILES[0]) as archive:
        arrays = dict(archive)
    arrays["out"] = arrays["out"] + 1e-9
    np.savez(tmp_path / "broken.npz", **arrays)
    assert not any(row.passed for row in verify.golden(tmp_path))


def test_an_empty_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no \*\.npz files"):
        verify.golden(tmp_path)


def test_a_folder_is_checked_whole(tmp_path: Path) -> None:
    for file in FILES[:2]:
        shutil.copy(file, tmp_path)
    assert {row.case for row in verify.golden(tmp_path)} == {file.stem for file in FILES[:2]}
