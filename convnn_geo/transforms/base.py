"""What all transforms share."""

from __future__ import annotations

from torch_geometric.transforms import BaseTransform


class Transform(BaseTransform):
    """A transform that says all its settings.

    A PyG data set compares what its ``pre_transform`` says with what made the files on disk.
    """

    def __repr__(self) -> str:
        given = ", ".join(f"{name}={value!r}" for name, value in vars(self).items())
        return f"{self.__class__.__name__}({given})"
