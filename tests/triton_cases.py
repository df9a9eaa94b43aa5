"""What tests of Triton's kernels share: where they run, and when they can."""

import pytest
import torch

from convnn_geo import gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TRITON = [
    pytest.mark.triton,
    pytest.mark.skipif(
        gpu.refuses(torch.device(DEVICE)) is not None,
        reason="needs Triton, and a GPU or TRITON_INTERPRET=1",
    ),
    # numpy's words for what a GPU does without one
    pytest.mark.filterwarnings("ignore:invalid value encountered"),
    pytest.mark.filterwarnings("ignore:overflow encountered"),
    pytest.mark.filterwarnings("ignore:All-NaN slice encountered"),
]
