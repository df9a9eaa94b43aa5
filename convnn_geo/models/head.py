"""The last layer of a classifier."""

from __future__ import annotations

from torch import nn


def linear_head(channels: int, num_classes: int) -> nn.Module:
    """A linear layer to the classes; nothing, so that features come out, where there are none.

    Args:
        channels: of the features.
        num_classes: of the data; 0 for none.

    Example:
        >>> linear_head(64, 10), linear_head(64, 0)
        (Linear(in_features=64, out_features=10, bias=True), Identity())
    """
    return nn.Linear(channels, num_classes) if num_classes else nn.Identity()
