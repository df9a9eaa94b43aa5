"""Arrays of the data sets that torchvision downloads and reads."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from convnn_geo.extras import require


def torchvision_arrays(
    name: str, root: Path, download: bool
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Images and labels of torchvision's data set, to train and to test on, as they are stored.

    Args:
        name: of the class in ``torchvision.datasets``.
        root: folder under which it keeps its files.
        download: what is not there.

    Raises:
        FileNotFoundError: files are missing or damaged, or can't be downloaded.
        MissingExtraError: torchvision is not installed.
    """
    kind = getattr(require("torchvision.datasets", extra="vision"), name)
    try:
        parts = [kind(root, train=train, download=download) for train in (True, False)]
    except RuntimeError as error:  # what torchvision raises for each of these
        raise FileNotFoundError(
            f"expected the files of {name} in {root}, but: {error}; download=True (--download) "
            "downloads them"
        ) from error
    train, test = ((torch.as_tensor(part.data), torch.as_tensor(part.targets)) for part in parts)
    return train, test
