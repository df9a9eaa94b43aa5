"""Branching: a convolution or attention beside ConvNN."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from convnn_geo.checks import check_int, check_number
from convnn_geo.nn.conv import ConvNN1d, ConvNN2d, ConvNN3d

_POINTWISE = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_CONVNN = {1: ConvNN1d, 2: ConvNN2d, 3: ConvNN3d}


class Branching(nn.Module):
    """Two branches on all input channels, then a 1 x 1 convolution over both.

    .. math:: y = P\\,[\\mathrm{neighbors}(x),\\ \\mathrm{other}(x)]

    The branching layer of https://arxiv.org/abs/2606.14725. Build it from two layers, or by
    :meth:`mix` from a ratio.

    Args:
        neighbors: the ConvNN branch; None where the ratio is 0.
        other: the convolution (or attention) branch; None where the ratio is 1.
        pointwise: from both branches' channels to the output's; None for none.
        channel_axis: along which the branches are concatenated: 1 for images, -1 for tokens.

    Shapes:
        - **input:** what both branches take, :math:`(b, c, *size)`
        - **output:** :math:`(b, d, *size)`

    Example:
        >>> import torch
        >>> layer = Branching.mix(3, 8, 3, ratio=0.25, k=9, metric="cosine")
        >>> layer(torch.zeros(1, 3, 5, 6)).shape, layer.neighbors.out_channels
        (torch.Size([1, 8, 5, 6]), 2)
    """

    def __init__(
        self,
        neighbors: nn.Module | None,
        other: nn.Module | None,
        pointwise: nn.Module | None,
        channel_axis: int = 1,
    ) -> None:
        super().__init__()
        if neighbors is None and other is None:
            raise ValueError("Branching: expected at least one branch, got none")
        self.neighbors, self.other, self.pointwise = neighbors, other, pointwise
        self.channel_axis = channel_axis

    @classmethod
    def mix(
        cls,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        ratio: float = 0.5,
        axes: int = 2,
        bias: bool = True,
        other: nn.Module | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **convnn: object,
    ) -> Branching:
        """``round(ratio * out_channels)`` channels of ConvNN, the rest of a convolution.

        Args:
            in_channels: channels of the input, which both branches see whole.
            out_channels: channels of the output.
            kernel_size: of the convolution, padded to the input's size.
            ratio: share of ConvNN, in [0, 1]; at 0 and 1 the layer is the pure branch.
            axes: 1, 2 or 3.
            bias: of all parts.
            other: a module to stand in for the convolution, from ``in_channels`` to the channels
                that the ratio leaves.
            device: of the parameters.
            dtype: of the parameters.
            convnn: options of ConvNN: ``k=9, metric="cosine"``, ...
        """
        check_int("in_channels", in_channels)
        check_int("out_channels", out_channels)
        if check_number("ratio", ratio) > 1:
            raise ValueError(f"ratio: expected a number in [0, 1], got {ratio}")
        if axes not in _CONVNN:
            raise ValueError(f"axes: expected 1, 2 or 3, got {axes}")
        factory = {"bias": bias, "device": device, "dtype": dtype}
        share = round(ratio * out_channels)
        neighbors = rest = None
        if share:
            neighbors = _CONVNN[axes](in_channels, share, **factory, **convnn)  # type: ignore[arg-type]
        if share < out_channels:
            rest = other or _CONVNN[axes](
                in_channels,
                out_channels - share,
                kernel_size,
                padding="same",
                **factory,  # type: ignore[arg-type]
            )
        if neighbors is None or rest is None:
            return cls(neighbors, rest, None)
        pointwise = _POINTWISE[axes](out_channels, out_channels, 1, **factory)  # type: ignore[arg-type]
        return cls(neighbors, rest, pointwise, -axes - 1)

    @property
    def branches(self) -> list[nn.Module]:
        """The branches that there are: both, or one where the ratio is 0 or 1."""
        return [branch for branch in (self.neighbors, self.other) if branch is not None]

    def reset_parameters(self) -> None:
        """Reset every part."""
        for part in (self.neighbors, self.other, self.pointwise):
            reset = getattr(part, "reset_parameters", None)
            if reset is not None:
                reset()

    def forward(self, x: Tensor) -> Tensor:
        """Both branches, concatenated and mixed."""
        parts = [branch(x) for branch in self.branches]
        parts = [part[0] if isinstance(part, tuple) else part for part in parts]
        out = parts[0] if len(parts) == 1 else torch.cat(parts, self.channel_axis)
        return out if self.pointwise is None else self.pointwise(out)
