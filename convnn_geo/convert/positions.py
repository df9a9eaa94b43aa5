"""Positions of tokens: where a vision transformer's patches lie, and its class token."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from convnn_geo.checks import check_int, check_tuple
from convnn_geo.metrics import BilinearForm, Distances, Metric, Spatial
from convnn_geo.nn.branching import PixelAttention
from convnn_geo.points import Grid, Points


class PatchPositions(Metric):
    r"""Squared distance of patches on their grid; prefix tokens are at distance 0 of all.

    .. math:: d(i, j) = r_i r_j |p_i - p_j|^2

    with :math:`r = 0` for a prefix token (a class token, say) and 1 for a patch. Tokens are the
    prefix, then the patches in raster order.

    Args:
        size: patches along each axis, e.g. ``(14, 14)``.
        prefix: tokens before the patches.

    Example:
        >>> metric = PatchPositions((2, 2), prefix=1)
        >>> metric(Points.from_tokens(torch.zeros(1, 5, 3)))[4].tolist()
        [0.0, 2.0, 1.0, 1.0, 0.0]
    """

    def __init__(self, size: tuple[int, ...], prefix: int = 0) -> None:
        super().__init__()
        self.size = check_tuple("size", size, len(size))
        self.prefix = check_int("prefix", prefix, 0)

    def distances(self, target: Points, source: Points) -> Distances:
        """One matrix product, so that attention stays one call."""
        q, k = self._placed(target), self._placed(source)
        r, s = q[..., :1], k[..., :1]
        away, there = q.square().sum(-1, keepdim=True) - r, k.square().sum(-1, keepdim=True) - s
        query = torch.cat([-away, -r, 2 * q[..., 1:]], -1)
        return BilinearForm(query, torch.cat([s, there, k[..., 1:]], -1))

    def grid(self, tokens: int) -> Grid:
        """The patches' grid, for so many tokens.

        Raises:
            ValueError: there are more or fewer than the prefix and the patches.
        """
        grid = Grid(self.size)
        expected = self.prefix + grid.num_points
        if tokens != expected:
            raise ValueError(
                f"PatchPositions: expected {expected} tokens ({self.prefix} before patches of "
                f"{' x '.join(map(str, self.size))}), got {tokens}; give images of the "
                "size that the model was made for, and drop no patches (patch_drop_rate=0); after "
                "timm's set_input_size call set_interpolation again"
            )
        return grid

    def _placed(self, points: Points) -> Tensor:
        """``(r, r p)`` of each token, ``(n, 1 + axes)``."""
        grid = self.grid(points.num_points)
        double = points.x is not None and points.x.dtype == torch.float64
        dtype = torch.float64 if double else torch.float32
        place = grid.positions(points.device, dtype)
        place = torch.cat([torch.ones_like(place[:, :1]), place], -1)
        return nn.functional.pad(place, (0, 0, self.prefix, 0))

    def extra_repr(self) -> str:
        return f"{self.size}, prefix={self.prefix}"


class UnknownPositions(Metric):
    """Stands where a model's positions would, and raises as soon as they are asked for.

    Args:
        reason: why nobody knows where the patches lie.
    """

    prefix = 0

    def __init__(self, reason: str) -> None:
        super().__init__()
        self.reason = reason

    def grid(self, tokens: int) -> Grid:
        """Raise, for a window on a grid that is guessed would look elsewhere in silence."""
        raise ValueError(
            f"positions of patches: {self.reason}, so that their grid is unknown to windows; "
            "build the model for images of one size, or take a layer that looks at all tokens"
        )

    def distances(self, target: Points, source: Points) -> Distances:
        """Raise, for a grid that is guessed would give wrong distances in silence."""
        raise ValueError(
            f"positions of patches: {self.reason}, so that their grid is unknown to attention; "
            "build the model for images of one size, or leave it at the features' end (lam=1)"
        )


def token_positions(model: nn.Module, name: str) -> Spatial | PatchPositions | UnknownPositions:
    """The metric of positions for an attention in a model.

    An attention among pixels has them on their grid. Inside timm's or torchvision's
    ``VisionTransformer`` tokens are patches on theirs, which images of any size
    (``dynamic_img_size``) leave unknown; in any other model they are a sequence.
    """
    if isinstance(model.get_submodule(name), PixelAttention):
        return Spatial(squared=True)
    parts = name.split(".") if name else []
    for end in range(len(parts) - 1, -1, -1):
        found = _patches(model.get_submodule(".".join(parts[:end])))
        if found is not None:
            return found
    return Spatial(squared=True)


def is_of_sequence(metric: Metric) -> bool:
    """Whether a metric is the one that recipes of attention take for positions."""
    return isinstance(metric, Spatial) and metric.squared and metric.scale is None


def _patches(module: Any) -> PatchPositions | UnknownPositions | None:
    prefix = getattr(module, "num_prefix_tokens", None)
    if prefix is not None:  # timm's
        size = getattr(getattr(module, "patch_embed", None), "grid_size", None)
        if size is None:
            return UnknownPositions(f"{type(module).__name__} names no grid_size of a patch_embed")
        if getattr(module, "dynamic_img_size", False):
            return UnknownPositions("dynamic_img_size=True takes images of any size")
        return PatchPositions(tuple(size), prefix)
    sizes = [getattr(module, name, None) for name in ("image_size", "patch_size")]
    if isinstance(getattr(module, "class_token", None), nn.Parameter) and all(
        isinstance(size, int) for size in sizes
    ):  # torchvision's
        side = module.image_size // module.patch_size
        return PatchPositions((side, side), 1)
    return None
