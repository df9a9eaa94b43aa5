"""Windows among the tokens of a vision transformer: patches on their grid, and those before."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convnn_geo.candidates import Candidates, Subset
from convnn_geo.checks import check_tuple
from convnn_geo.convert.positions import PatchPositions, UnknownPositions
from convnn_geo.nn import ConvNN2d
from convnn_geo.operation import Operation
from convnn_geo.points import Points

Patches = PatchPositions | UnknownPositions


class PatchCandidates(Candidates):
    """Candidates among patches on their grid; the tokens before them see all, and all see them.

    Args:
        among: candidates on a grid: ``Window``, ``Block``, ``Congruent``, ``Strided``, ...
        patches: how many patches there are along each axis, and how many tokens before them.

    Example:
        >>> from convnn_geo.candidates import Window
        >>> window = PatchCandidates(Window(3, padding=1), PatchPositions((3, 3), prefix=1))
        >>> tokens = Points.from_tokens(torch.zeros(1, 10, 4))
        >>> window(tokens, tokens).mask[1].int().tolist()
        [1, 1, 1, 0, 1, 1, 0, 0, 0, 0]
    """

    def __init__(self, among: Candidates, patches: Patches) -> None:
        super().__init__()
        self.among, self.patches = among, patches

    def forward(self, target: Points, source: Points) -> Subset:
        """A mask ``(..., n, n)``."""
        grid = self.patches.grid(source.num_points)
        self.patches.grid(target.num_points)
        before = self.patches.prefix
        points = Points(source.features[..., before:, :], grid=grid)
        subset = self.among(points, points)
        mask = _as_mask(subset, points).expand(*_lead(subset), grid.num_points, grid.num_points)
        return Subset(mask=F.pad(mask, (before, 0, before, 0), value=True), own=subset.own)


def _lead(subset: Subset) -> torch.Size:
    """Leading axes of a subset, such as those of examples that draw apart."""
    named = subset.mask if subset.index is None else subset.index
    return torch.Size() if named is None else named.shape[:-2]


def _as_mask(subset: Subset, points: Points) -> Tensor:
    """A subset as what each target may see, ``(..., n | 1, m)``."""
    m = points.num_points
    if subset.index is None:
        here = torch.ones(m, m, dtype=torch.bool, device=points.device)
        return here if subset.mask is None else subset.mask
    index = subset.index if subset.mask is None else subset.index.where(subset.mask, m)
    none = torch.zeros(*index.shape[:-1], m + 1, dtype=torch.bool, device=index.device)
    return none.scatter(-1, index, True)[..., :m]  # the last is where nothing is


class PatchConv(nn.Module):
    r"""A convolution of patches on their grid, with the tokens before them.

    .. math:: y_i = \sum_{j \in \mathrm{window}(i)} W_{ij} x_j + U x_0, \qquad
              y_0 = V [x_0, \operatorname{mean}_i y_i]

    where :math:`x_0` are the tokens before the patches, side by side: all patches see them, and
    they see all patches, convolved.

    Args:
        in_channels: channels of the tokens.
        out_channels: channels of the output.
        kernel_size: patches along each axis, or one number for both.
        patches: where the patches lie.
        bias: learn additive biases.
        device: of the parameters.
        dtype: of the parameters.

    Shapes:
        - **input:** :math:`(b, c, n)`, channels first
        - **output:** :math:`(b, d, n)`

    Example:
        >>> layer = PatchConv(4, 6, 3, PatchPositions((2, 3), prefix=1))
        >>> layer(torch.zeros(1, 4, 7)).shape
        torch.Size([1, 6, 7])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        patches: Patches,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.patches = patches
        self.kernel_size = check_tuple("kernel_size", kernel_size, 2)
        given: dict[str, Any] = {"device": device, "dtype": dtype}
        self.convolution = ConvNN2d(
            in_channels, out_channels, self.kernel_size, padding="same", bias=bias, **given
        )
        self.seen: nn.Module | None = None
        self.summary: nn.Module | None = None
        if patches.prefix:
            wide = patches.prefix * in_channels
            self.seen = nn.Linear(wide, out_channels, bias=False, **given)
            self.summary = nn.Linear(
                wide + out_channels, patches.prefix * out_channels, bias=bias, **given
            )

    def operation(self, x: Tensor) -> Operation:
        """The convolution of the patches, as an operation."""
        return self.convolution.operation(self._parts(x)[1])

    def _parts(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The tokens before the patches ``(b, c, prefix)``, and the patches ``(b, c, *size)``."""
        grid = self.patches.grid(x.shape[-1])
        first, rest = x.split([self.patches.prefix, grid.num_points], -1)
        return first, rest.unflatten(-1, grid.size)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve the patches, and mix in the tokens before them."""
        first, image = self._parts(x)
        out: Tensor = self.convolution(image).flatten(2)
        if self.seen is None or self.summary is None:
            return out
        before = first.transpose(1, 2).flatten(1)
        out = out + self.seen(before).unsqueeze(-1)
        summary = self.summary(torch.cat([before, out.mean(-1)], -1))
        return torch.cat([summary.unflatten(-1, (self.patches.prefix, -1)).mT, out], -1)
