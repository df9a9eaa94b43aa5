"""What all transforms share."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
from torch import Tensor
from torch_geometric.transforms import BaseTransform


class Transform(BaseTransform):
    """A transform that says all its settings.

    A PyG data set compares what its ``pre_transform`` says with what made the files on disk.
    """

    def __repr__(self) -> str:
        given = ", ".join(f"{name}={_said(value)}" for name, value in vars(self).items())
        return f"{self.__class__.__name__}({given})"


def _said(value: Any) -> str:
    """A setting; of arrays, which print in part, their size and a digest of all of it."""
    if not isinstance(value, (Tensor, np.ndarray)):
        return repr(value)
    array = np.ascontiguousarray(value.cpu().numpy() if isinstance(value, Tensor) else value)
    digest = hashlib.sha256(array.tobytes()).hexdigest()[:12]
    return f"{array.dtype}{list(array.shape)}#{digest}"
