"""Samples of the sources, shared by all targets."""

from __future__ import annotations

import torch
from torch.utils._python_dispatch import _disable_current_modes

from convnn_geo.caching import keep
from convnn_geo.candidates.base import Candidates, Subset, need_grid
from convnn_geo.checks import check_int
from convnn_geo.points import Points


class Strided(Candidates):
    """An evenly spaced lattice of ``r`` points along each axis of the image.

    Args:
        r: points an axis, so ``r * r`` candidates in an image.

    Example:
        >>> import torch
        >>> from convnn_geo.candidates import Strided
        >>> from convnn_geo.points import Points
        >>> image = Points.from_image(torch.zeros(1, 1, 3, 5))
        >>> Strided(2)(image, image).index.tolist()
        [[0, 4, 10, 14]]
    """

    def __init__(self, r: int) -> None:
        super().__init__()
        self.r = check_int("r", r)

    def forward(self, target: Points, source: Points) -> Subset:
        """Indices ``row * width + col`` of the lattice, ascending, ``(1, r ** p)``."""
        grid = need_grid("Strided", source)
        if self.r > min(grid.size):
            raise ValueError(f"Strided: r={self.r} is over the shortest axis of {grid.size}")
        index = torch.zeros(1, dtype=torch.long, device=source.device)
        for length in grid.size:
            axis = torch.arange(self.r, device=source.device) * (length - 1)
            axis = axis // max(self.r - 1, 1)
            index = (index[:, None] * length + axis).flatten()
        return Subset(index.unsqueeze(-2))

    def extra_repr(self) -> str:
        return f"r={self.r}"


class Random(Candidates):
    """``r`` sources drawn without replacement; drawn anew at each call in training, fixed in eval.

    In training the draw follows ``torch.manual_seed``, as dropout does; in eval it follows
    ``seed`` alone, so that eval is deterministic. Nothing is stored.

    Args:
        r: sources to draw.
        seed: of the draw in eval.
        per_example: draw for each example apart instead of once a call; in eval each place in a
            batch has a draw of its own.
    """

    def __init__(self, r: int, seed: int = 0, per_example: bool = False) -> None:
        super().__init__()
        self.r, self.seed = check_int("r", r), check_int("seed", seed, 0)
        self.per_example = per_example

    def forward(self, target: Points, source: Points) -> Subset:
        """Ascending indices, ``(1, r)`` or ``(b, 1, r)``."""
        m = source.num_points
        if self.r > m:
            raise ValueError(f"Random: r={self.r} candidates asked of {m} sources")
        lead = source.x.shape[:-2] if self.per_example and source.x is not None else ()
        if self.training:
            noise = torch.rand(*lead, m, device=source.device)
        else:
            noise = _noise(self.seed, (*lead, m), source.device)
        if source.mask is not None:  # points that only fill a batch up are drawn last
            noise = noise.masked_fill(~source.mask, 2.0)
        index = noise.argsort(-1)[..., : self.r].sort(-1).values
        return Subset(index.unsqueeze(-2))

    def extra_repr(self) -> str:
        return f"r={self.r}, seed={self.seed}, per_example={self.per_example}"


@keep(16)
def _noise(seed: int, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    return _fixed_noise(seed, shape).to(device)


@torch.compiler.assume_constant_result
def _fixed_noise(seed: int, shape: tuple[int, ...]) -> torch.Tensor:
    # Traced, it would go on drawing from the generator; under vmap it would draw for each example.
    with _disable_current_modes(), torch._C._DisableFuncTorch():
        return torch.rand(shape, generator=torch.Generator().manual_seed(seed), device="cpu")
