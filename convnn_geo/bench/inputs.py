"""What is searched: random points, and real ones that ship with packages."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from convnn_geo.checks import check_name
from convnn_geo.datasets import digits, motorcycle_cloud, photograph, photographs
from convnn_geo.metrics import Feature, Metric, Spatial, as_metric
from convnn_geo.points import Grid, Points

_PATCH = 8


@dataclass(frozen=True)
class Kind:
    """A source of points.

    Args:
        draw: gives so many points of a dimension, for so many examples.
        dimensions: that it has; None for any.
        most: points that an example can have.
    """

    draw: Callable[[int, int, int, torch.Generator], Points]
    dimensions: tuple[int, ...] | None = None
    most: float = math.inf


def points(name: str, n: int, dimension: int, batch: int = 1, seed: int = 0) -> Points:
    """Points to search: features ``(batch, n, dimension)``, and positions.

    ``random``: uniform in the unit cube up to three dimensions, normal beyond, with positions of
    their own in a unit square. ``lattice``: positions on a grid (2 dimensions). ``photograph``:
    colours, or 8 x 8 patches in grey or colour (3, 64, 192), of pixels on a grid. ``stereo``:
    places of a cloud from a stereo pair (3). ``digits``: handwritten ones (64), each at the centre
    of its ink.

    Args:
        name: one of :func:`input_names`.
        n: points.
        dimension: of the features.
        batch: examples.
        seed: of what is drawn.

    Shapes:
        - **x:** :math:`(b, n, d)`
        - **pos:** :math:`(b, n, p)`, or a grid

    Raises:
        ValueError: the input has no such dimension, or too few points.
        MissingExtraError: the package that ships it is not installed.

    Example:
        >>> points("random", n=5, dimension=3, batch=2).x.shape
        torch.Size([2, 5, 3])
    """
    if not suits(check_name("input", name, _KINDS), n, dimension):
        raise ValueError(f"{name} has no {n} points of {dimension} dimensions: {_KINDS[name]}")
    return _KINDS[name].draw(n, dimension, batch, torch.Generator().manual_seed(seed))


def suits(name: str, n: int, dimension: int) -> bool:
    """Whether an input has so many points of that dimension.

    Example:
        >>> suits("lattice", 1024, 2), suits("lattice", 1024, 3)
        (True, False)
    """
    kind = _KINDS[name]
    return n <= kind.most and (kind.dimensions is None or dimension in kind.dimensions)


def input_names() -> list[str]:
    """Names that :func:`points` knows.

    Example:
        >>> input_names()
        ['random', 'lattice', 'photograph', 'stereo', 'digits']
    """
    return list(_KINDS)


def metric(name: str) -> Metric:
    """A metric by name; ``mixed`` is 0.3 times squared position and 0.7 times cosine.

    Example:
        >>> metric("cosine")
        Feature('cosine')
    """
    return (
        0.3 * Spatial(squared=True) + 0.7 * Feature("cosine")
        if name == "mixed"
        else as_metric(name)
    )


def _random(n: int, dimension: int, batch: int, generator: torch.Generator) -> Points:
    draw = torch.rand if dimension <= 3 else torch.randn
    x = draw(batch, n, dimension, generator=generator)
    return Points(x, torch.rand(batch, n, 2, generator=generator))


def _lattice(n: int, dimension: int, batch: int, generator: torch.Generator) -> Points:
    grid = Grid(sides(n))
    return Points(grid.positions().repeat(batch, 1, 1), grid=grid)


def _photograph(n: int, dimension: int, batch: int, generator: torch.Generator) -> Points:
    size, names = sides(n), photographs()
    images = []
    for i in range(batch):  # every photograph, then every one turned
        image = torch.rot90(photograph(names[i % len(names)]), i // len(names), (1, 2))
        images.append(F.interpolate(image[None], size, mode="bicubic", antialias=True))
    x = torch.cat(images)
    if dimension == _PATCH**2:
        x = x.mean(1, keepdim=True)
    if dimension > 3:
        before, after = _PATCH // 2 - 1, _PATCH // 2
        x = F.unfold(F.pad(x, (before, after, before, after), mode="replicate"), _PATCH)
    return Points(x.flatten(2).transpose(1, 2).contiguous(), grid=Grid(size))


def sides(n: int) -> tuple[int, int]:
    """Height and width of ``n`` pixels, as near a square as they come.

    Example:
        >>> sides(1024), sides(100_000)
        ((32, 32), (250, 400))
    """
    height = next(h for h in range(math.isqrt(n), 0, -1) if n % h == 0)
    return height, n // height


def _stereo(n: int, dimension: int, batch: int, generator: torch.Generator) -> Points:
    pos: Tensor = motorcycle_cloud().pos
    return _drawn(pos, pos, n, batch, generator)


def _digits(n: int, dimension: int, batch: int, generator: torch.Generator) -> Points:
    splits = digits()
    x = torch.cat([split.x.flatten(1) for split in (splits.train, splits.validation, splits.test)])
    center = x @ Grid((8, 8)).positions() / x.sum(1, keepdim=True)
    return _drawn(x, center, n, batch, generator)


def _drawn(x: Tensor, pos: Tensor, n: int, batch: int, generator: torch.Generator) -> Points:
    """``n`` rows for each example, each example its own draw."""
    order = torch.stack([torch.randperm(len(x), generator=generator)[:n] for _ in range(batch)])
    return Points(x[order], pos[order])


_KINDS = {
    "random": Kind(_random),
    "lattice": Kind(_lattice, (2,)),
    "photograph": Kind(_photograph, (3, _PATCH**2, 3 * _PATCH**2)),
    "stereo": Kind(_stereo, (3,), 343_274),
    "digits": Kind(_digits, (_PATCH**2,), 1797),
}
