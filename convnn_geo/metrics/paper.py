"""The published mixing of positions and features, as one named preset."""

from __future__ import annotations

import torch
from torch import Tensor

from convnn_geo.checks import check_number
from convnn_geo.metrics.base import Metric, of_both, precise, register_metric
from convnn_geo.metrics.combined import Combination
from convnn_geo.metrics.differences import Differences
from convnn_geo.metrics.distances import Distances
from convnn_geo.points import Points, position_range


class PaperMix(Metric):
    r"""The mixed distance of the ConvNN paper (https://arxiv.org/abs/2606.14725), squared.

    .. math:: d = \lambda^2 |f_i - f_j|^2 / \sigma^2 + (1 - \lambda)^2 |p_i - p_j|^2

    with ``sigma`` the unbiased standard deviation of all features of one image and each axis of
    ``p`` scaled to [-1, 1]. Scaled axes measure unequally on non-square images; prefer
    ``(1 - a) * Spatial() + a * Feature()``, which measures in pixels.

    Args:
        lam: 0 for positions, 1 for features.
    """

    by_set = True

    def __init__(self, lam: float = 0.5) -> None:
        super().__init__()
        self.lam = check_number("lam", lam, maximum=1)

    def distances(self, target: Points, source: Points) -> Distances:
        """Squared distances of normalised features and positions."""
        parts: list[tuple[float | Tensor, Distances]] = []
        if self.lam > 0:
            f_q, f_k = of_both(lambda points: precise(points.features), target, source)
            sigma = _deviation(f_k, source.mask)
            parts.append((self.lam**2, Differences(f_q, f_k, root=False, scale=1 / sigma)))
        if self.lam < 1:
            p_q, p_k = of_both(lambda points: precise(points.position), target, source)
            low, high = position_range(p_k, source.mask)
            scale = 2 / (high - low).clamp_min(2e-12)  # to [-1, 1]; the middle drops out
            parts.append(((1 - self.lam) ** 2, Differences(p_q, p_k, root=False, scale=scale)))
        return Combination(parts)

    def extra_repr(self) -> str:
        return f"lam={self.lam:g}"


def _deviation(features: Tensor, mask: Tensor | None) -> Tensor:
    """Unbiased deviation over all real points and channels, ``(..., 1, 1)``; 1 where it is 0."""
    dtype = features.dtype
    if mask is None:
        sigma = features.double().flatten(-2)  # of numbers far from 0, float32 keeps little
        sigma = (sigma.std(-1) if sigma.shape[-1] > 1 else torch.ones_like(sigma[..., 0]))[
            ..., None, None
        ]
    else:
        real = mask.unsqueeze(-1).double()
        features = features.double()
        count = real.sum((-2, -1), keepdim=True) * features.shape[-1]
        real_features = features.masked_fill(~mask.unsqueeze(-1), 0.0)
        mean = real_features.sum((-2, -1), keepdim=True) / count.clamp_min(1)
        square = ((real_features - mean) * real).square().sum((-2, -1), keepdim=True)
        positive = square > 0  # the root's slope at 0 is infinite
        sigma = (torch.where(positive, square, 1.0) / (count - 1).clamp_min(1)).sqrt()
        sigma = torch.where(positive, sigma, 0.0)
    return torch.where(sigma > 0, sigma, 1.0).to(dtype)


register_metric("paper_mix", PaperMix)
