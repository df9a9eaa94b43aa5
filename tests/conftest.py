"""Shared by all tests: two threads, and a seed for each test."""

from __future__ import annotations

import pytest
import torch

from convnn_geo.extras import prepare_torchvision

torch.set_num_threads(2)
prepare_torchvision()  # so that tests may import it plainly


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)
