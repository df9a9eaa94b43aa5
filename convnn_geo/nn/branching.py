"""Branching: a convolution or attention beside ConvNN."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch_geometric.nn.inits import reset

from convnn_geo.checks import check_int, check_name, check_number, check_tensor
from convnn_geo.nn.attention import ConvNNAttention
from convnn_geo.nn.by_axes import CONVNN as _CONVNN
from convnn_geo.nn.tracing import one_node
from convnn_geo.operation import Operation

_POINTWISE = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
_NAMES = ("in_channels", "out_channels")


class PixelAttention(nn.Module):
    """Attention among the pixels of an image, then a linear layer.

    Among all of them by default; with ``k`` among the nearest, and with a ``kernel`` by taps.

    Args:
        in_channels: channels of the input, divided among the heads.
        out_channels: channels of the output.
        num_heads: heads.
        bias: of all parts.
        device: of the parameters.
        dtype: of the parameters.
        axes: of the image.
        **options: of :class:`~convnn_geo.nn.ConvNNAttention`: ``k``, ``kernel``, ``metric``, ...

    Shapes:
        - **input:** :math:`(b, c, *size)` or :math:`(c, *size)`
        - **output:** :math:`(b, d, *size)` or :math:`(d, *size)`

    Raises:
        ValueError: wrong shapes, k over the number of pixels, unknown names.

    Example:
        >>> import torch
        >>> layer = PixelAttention(4, 6, num_heads=2, k=9)
        >>> layer(torch.zeros(1, 4, 5, 3)).shape
        torch.Size([1, 6, 5, 3])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_heads: int = 1,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        axes: int = 2,
        **options: Any,
    ) -> None:
        super().__init__()
        self.axes = check_int("axes", axes)
        factory: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        self.attention = ConvNNAttention(in_channels, num_heads, axes=axes, **factory, **options)
        self.linear = nn.Linear(in_channels, out_channels, **factory)

    def reset_parameters(self) -> None:
        """Reset both parts."""
        self.attention.reset_parameters()
        self.linear.reset_parameters()

    @one_node
    def forward(self, x: Tensor) -> Tensor:
        """Attend, pixel by pixel."""
        grid = self._grid(x)
        out: Tensor = self.linear(self.attention(grid, need_weights=False)[0]).movedim(-1, 1)
        return out if x.ndim == grid.ndim else out.squeeze(0)

    def operation(self, x: Tensor) -> Operation:
        """The attention on an image, as an operation."""
        return self.attention.operation(self._grid(x))

    def _grid(self, x: Tensor) -> Tensor:
        """The pixels as ``(b, *size, c)``, so that the attention knows where each lies."""
        check_tensor("PixelAttention input", x, (self.axes + 1, self.axes + 2))
        return (x if x.ndim == self.axes + 2 else x.unsqueeze(0)).movedim(1, -1)


class Branching(nn.Module):
    r"""Two branches on all input channels, then a 1 x 1 convolution over both.

    .. math:: y = P\,[\mathrm{neighbors}(x),\ \mathrm{other}(x)]

    ``round(ratio * out_channels)`` channels are of ConvNN, the rest of the other branch. The
    branching layer of https://arxiv.org/abs/2606.14725; :meth:`of` builds it from any two layers.

    Args:
        in_channels: channels of the input, which both branches see whole.
        out_channels: channels of the output.
        kernel_size: of the convolution, padded to the input's size.
        ratio: share of ConvNN, in [0, 1]; at 0 and 1 the layer is the pure branch, and between them
            both branches have a channel at least.
        other: ``"convolution"``, ``"attention"`` among all pixels, or a module from
            ``in_channels`` to the channels that the ratio leaves.
        num_heads: of the attention branch.
        axes: 1, 2 or 3.
        bias: of all parts.
        device: of the parameters.
        dtype: of the parameters.
        **convnn: options of ConvNN: ``k=9, metric="cosine"``, ...

    Shapes:
        - **input:** :math:`(b, c, *size)`
        - **output:** :math:`(b, d, *size)`

    Raises:
        ValueError: a ratio outside [0, 1], or inside and of too few channels for two branches;
            unknown names, wrong channels, a stride.

    Example:
        >>> import torch
        >>> layer = Branching(3, 8, 3, ratio=0.25, k=9, metric="cosine")
        >>> layer(torch.zeros(1, 3, 5, 6)).shape, layer.neighbors.out_channels
        (torch.Size([1, 8, 5, 6]), 2)
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        *,
        ratio: float = 0.5,
        other: str | nn.Module = "convolution",
        num_heads: int = 1,
        axes: int = 2,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **convnn: Any,
    ) -> None:
        super().__init__()
        check_int("in_channels", in_channels)
        check_int("out_channels", out_channels)
        share = neighbor_channels(out_channels, ratio)
        if axes not in _CONVNN:
            raise ValueError(f"axes: expected 1, 2 or 3, got {axes}")
        if not isinstance(other, nn.Module):
            check_name("other branch", other, ("convolution", "attention"))
        if "stride" in convnn:
            raise ValueError("Branching: both branches keep the image's size; pass no stride")
        if num_heads != 1 and other != "attention":
            raise ValueError(f"num_heads={num_heads} is an option of other='attention'")
        factory: dict[str, Any] = {"bias": bias, "device": device, "dtype": dtype}
        rest = out_channels - share
        neighbors = branch = pointwise = None
        if share:
            neighbors = _CONVNN[axes](in_channels, share, **factory, **convnn)
        elif convnn:  # checked, though at this end of the spectrum none of them counts
            with torch.device("meta"):
                _CONVNN[axes](in_channels, in_channels, bias=bias, dtype=dtype, **convnn)
        if rest and isinstance(other, nn.Module):
            branch = _check_other(other, in_channels, rest)
        elif rest and other == "attention":
            branch = PixelAttention(in_channels, rest, num_heads, axes=axes, **factory)
        elif rest:
            branch = _CONVNN[axes](in_channels, rest, kernel_size, padding="same", **factory)
        if share and rest:
            pointwise = _POINTWISE[axes](out_channels, out_channels, 1, **factory)
        self._set(neighbors, branch, pointwise, -axes - 1)

    @classmethod
    def of(
        cls,
        neighbors: nn.Module | None,
        other: nn.Module | None,
        pointwise: nn.Module | None = None,
        channel_axis: int = 1,
    ) -> Branching:
        """Two layers beside each other, whatever they are.

        Args:
            neighbors: the ConvNN branch, or None.
            other: the other branch, or None.
            pointwise: from both branches' channels to the output's; None for none.
            channel_axis: along which they are concatenated: 1 for images, -1 for tokens and points.
        """
        if neighbors is None and other is None:
            raise ValueError("Branching: expected at least one branch, got none")
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._set(neighbors, other, pointwise, channel_axis)
        return layer

    def _set(
        self,
        neighbors: nn.Module | None,
        other: nn.Module | None,
        pointwise: nn.Module | None,
        channel_axis: int,
    ) -> None:
        self.neighbors, self.other, self.pointwise = neighbors, other, pointwise
        self.channel_axis = channel_axis

    @property
    def branches(self) -> list[nn.Module]:
        """The branches that there are: both, or one where the ratio is 0 or 1."""
        return [branch for branch in (self.neighbors, self.other) if branch is not None]

    def reset_parameters(self) -> None:
        """Reset every part."""
        for part in (self.neighbors, self.other, self.pointwise):
            reset(part)

    @one_node
    def forward(self, x: Tensor, *more: Any) -> Tensor:
        """Both branches, concatenated and mixed.

        Args:
            x: what both branches see.
            *more: for both branches, too: positions and clouds, for layers of points.
        """
        parts = [branch(x, *more) for branch in self.branches]
        parts = [part[0] if isinstance(part, tuple) else part for part in parts]
        out = parts[0] if len(parts) == 1 else self._join(*parts)
        return out if self.pointwise is None else self.pointwise(out)

    def _join(self, first: Tensor, second: Tensor) -> Tensor:
        """Both branches as channels of one tensor, as many as the pointwise layer takes."""
        axis = self.channel_axis
        if first.movedim(axis, 0).shape[1:] != second.movedim(axis, 0).shape[1:]:
            raise ValueError(
                f"the branches give {tuple(first.shape)} and {tuple(second.shape)}, which differ "
                "in more than channels; give both one size"
            )
        wanted, _ = _channels(self.pointwise)
        given = first.shape[axis] + second.shape[axis]
        if wanted not in (None, given):
            raise ValueError(
                f"the branches give {first.shape[axis]} and {second.shape[axis]} channels, the "
                f"pointwise layer takes {wanted}; change the other branch's"
            )
        return torch.cat([first, second], axis)


def neighbor_channels(out_channels: int, ratio: float) -> int:
    """How many channels of a branching layer are of ConvNN.

    Args:
        out_channels: of both branches together.
        ratio: share of ConvNN, in [0, 1].

    Raises:
        ValueError: a ratio outside [0, 1], or inside and leaving one branch without channels.

    Example:
        >>> neighbor_channels(16, 0.25), neighbor_channels(16, 0.0)
        (4, 0)
    """
    check_number("ratio", ratio, maximum=1)
    share = round(ratio * out_channels)
    if 0 < share < out_channels or ratio in (0, 1):
        return share
    possible = "0 or 1, as one channel can't be divided"
    if out_channels > 1:
        possible = f"0, 1 or a multiple of 1/{out_channels} = {1 / out_channels:.4g}"
    raise ValueError(
        f"ratio: expected a share that leaves both branches channels, got {ratio} of out_channels="
        f"{out_channels}, which is {share} when rounded; pass {possible}"
    )


def _channels(module: nn.Module | None) -> tuple[int | None, int | None]:
    """Channels in and out that a linear layer or a convolution names; None for others."""
    names = ("in_features", "out_features") if isinstance(module, nn.Linear) else _NAMES
    found = (getattr(module, name, None) for name in names)
    channels_in, channels_out = (n if isinstance(n, int) else None for n in found)
    return channels_in, channels_out


def _check_other(other: nn.Module, channels_in: int, channels_out: int) -> nn.Module:
    """The other branch, where what it says of its channels is right."""
    wanted = (channels_in, channels_out)
    for side, given, number in zip(("takes", "gives"), _channels(other), wanted, strict=True):
        if given not in (None, number):
            raise ValueError(
                f"other: expected a module from {channels_in} to {channels_out} channels, "
                f"got one that {side} {given}"
            )
    return other
