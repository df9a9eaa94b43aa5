"""Neighbours of a few pixels of a photograph, from pure position to pure feature."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from convnn_geo.checks import check_int, check_tensor
from convnn_geo.metrics import Feature, Metric, Spatial, interpolate
from convnn_geo.neighborhood import Neighborhood
from convnn_geo.points import Points
from convnn_geo.search import knn

PHOTOGRAPH = "astronaut"
WIDTH = 128
PIXELS = {"the suit": (322, 274), "the hair": (58, 186), "the flag": (178, 66)}
"""Of the photograph as it ships: (row, column)."""
NEIGHBORS = 81
TIES = (
    "Ties go to the lowest index, counted row by row: in a flat region, where many pixels are at "
    "the same distance, the starred pixel itself may not be among its nearest."
)
"""What a reader of the pictures may wonder about."""


def spectrum(points: int) -> list[float]:
    """Evenly spaced points from 0 to 1.

    Example:
        >>> spectrum(5)
        [0.0, 0.25, 0.5, 0.75, 1.0]
    """
    check_int("spectrum", points, 2)
    return [step / (points - 1) for step in range(points)]


def shrink(pixel: tuple[int, int], image: Tensor, copy: Tensor) -> tuple[int, int]:
    """Where a pixel of an image lies on a resized copy of it.

    Args:
        pixel: (row, column).
        image: ``(c, height, width)``.
        copy: the same at another size.

    Raises:
        ValueError: the pixel is outside the image.

    Example:
        >>> shrink((99, 40), torch.zeros(3, 100, 200), torch.zeros(3, 50, 100))
        (49, 20)
    """
    row, column = pixel
    height, width = image.shape[1:]
    if not (0 <= row < height and 0 <= column < width):
        raise ValueError(
            f"pixel {row},{column} is outside the picture: expected a row from 0 to {height - 1} "
            f"and a column from 0 to {width - 1}"
        )
    return row * copy.shape[1] // height, column * copy.shape[2] // width


def panel_title(lam: float) -> str:
    """What a panel at this point of the spectrum is called.

    Example:
        >>> panel_title(0.25)
        'λ = 0.25'
    """
    return f"λ = {lam:.3g}" + {0.0: " (position)", 1.0: " (feature)"}.get(lam, "")


def patches(image: Tensor, size: int = 5) -> Tensor:
    r"""The square around each pixel as its feature, of total variance 1.

    A patch says more than one pixel's colour: stripes find stripes, and edges find edges.

    Args:
        image: ``(c, height, width)``, larger than half a patch.
        size: of the square in pixels, odd.

    Shapes:
        - **output:** :math:`(height \cdot width, c)` or more channels, in raster order

    Example:
        >>> patches(torch.rand(3, 6, 8), size=3).shape
        torch.Size([48, 27])
    """
    check_tensor("image", image, 3)
    padded = F.pad(image.unsqueeze(0), (size // 2,) * 4, mode="replicate")
    features = F.unfold(padded, size).squeeze(0).T
    return features / _deviation(features)


def metric_at(lam: float, image: Tensor) -> Metric:
    """Squared distance of positions mixed with that of features, both of total variance 1."""
    position = Points.from_image(image.unsqueeze(0)).position
    spatial = Spatial("l2", squared=True, scale=1 / _deviation(position))
    return interpolate(spatial, Feature("squared_euclidean"), lam)


def median_distance(hood: Neighborhood, pixels: Sequence[tuple[int, int]], width: int) -> float:
    """How far neighbours are from their pixels: the median, in pixels.

    Args:
        hood: ``index (number of pixels, k)`` of an image's pixels in raster order.
        pixels: targets, as (row, column).
        width: of the image.

    Example:
        >>> hood = Neighborhood(torch.tensor([[0, 3, 8]]), 48)
        >>> median_distance(hood, [(0, 0)], width=8)
        1.0
    """
    place = torch.stack([hood.index // width, hood.index % width], -1)
    offset = place - torch.tensor(pixels).unsqueeze(1)
    return offset.double().norm(dim=-1).median().item()


def _deviation(points: Tensor) -> float:
    """Root mean square distance from the mean; 1 where all points are the same."""
    return points.var(0, correction=0).sum().sqrt().item() or 1.0


def along_spectrum(
    image: Tensor, pixels: Sequence[tuple[int, int]], k: int, lams: Sequence[float]
) -> list[Neighborhood]:
    """The ``k`` nearest of each pixel at each point of the spectrum.

    Args:
        image: ``(c, height, width)``.
        pixels: targets, as (row, column).
        k: neighbours.
        lams: points of the spectrum.

    Returns:
        One neighbourhood a point, ``index (number of pixels, k)``.

    Example:
        >>> hoods = along_spectrum(torch.rand(3, 6, 8), [(2, 3)], k=5, lams=spectrum(3))
        >>> len(hoods), hoods[0].index.shape
        (3, torch.Size([1, 5]))
    """
    width = image.shape[2]
    every = Points(patches(image), Points.from_image(image.unsqueeze(0)).position)
    index = torch.tensor([row * width + column for row, column in pixels], dtype=torch.long)
    target = Points(every.features[index], every.position[index])
    return [knn(every, target, k, metric=metric_at(lam, image)) for lam in lams]
