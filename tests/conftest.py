"""Shared by all tests: two threads, and a seed for each test."""

from __future__ import annotations

import pytest
import torch

torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
