"""Points: what every stage looks at, be it an image, a sentence or a cloud."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from convnn_geo.caching import keep
from convnn_geo.checks import check_tensor
from convnn_geo.shapes import broadcast_shapes

if TYPE_CHECKING:
    from torch_geometric.data import Data


@dataclass(frozen=True)
class Grid:
    """A regular lattice of points, in raster order (the last axis runs fastest).

    Args:
        size: points along each axis, e.g. ``(height, width)``.
        origin: position of the first point, in pixels; defaults to zeros.
        step: pixels between neighbours along each axis; defaults to ones.

    Example:
        >>> Grid((2, 3)).positions().tolist()
        [[0.0, 0.0], [0.0, 1.0], [0.0, 2.0], [1.0, 0.0], [1.0, 1.0], [1.0, 2.0]]
    """

    size: tuple[int, ...]
    origin: tuple[float, ...] = ()
    step: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        axes = len(self.size)
        known = (int, torch.SymInt)  # sizes that are traced must stay open
        size = tuple(s if isinstance(s, known) else int(s) for s in self.size)
        object.__setattr__(self, "size", size)
        object.__setattr__(self, "origin", tuple(map(float, self.origin)) or (0.0,) * axes)
        object.__setattr__(self, "step", tuple(map(float, self.step)) or (1.0,) * axes)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Grid):
            return NotImplemented
        # Sizes last: where they are traced, comparing them fixes them.
        places = self.step == other.step and self.origin == other.origin
        return places and self.size == other.size

    @property
    def num_points(self) -> int:
        """Number of points on the lattice."""
        return math.prod(self.size)

    def positions(
        self, device: torch.device | str | None = None, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        """Positions of all points in raster order, ``(n, p)``, in pixels."""
        axes = [
            torch.arange(s, device=device, dtype=dtype) * d + o
            for s, o, d in zip(self.size, self.origin, self.step, strict=True)
        ]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)

    def pad(self, pads: tuple[tuple[int, int], ...]) -> Grid:
        """The lattice with ``(before, after)`` more points at the ends of each axis."""
        return Grid(
            tuple(s + sum(p) for s, p in zip(self.size, pads, strict=True)),
            tuple(o - d * p[0] for o, d, p in zip(self.origin, self.step, pads, strict=True)),
            self.step,
        )

    def index_of(self, other: Grid, device: torch.device | str | None = None) -> Tensor | None:
        """Where each point of ``other`` lies on this lattice, ``(n,)``; None if some do not."""
        return _index_of(self, other, torch.device(device or "cpu"))


@keep(64)  # where it is wanted: nobody waits for it to get there again
def _index_of(grid: Grid, other: Grid, device: torch.device) -> Tensor | None:
    index = torch.zeros(1, dtype=torch.long, device="cpu")
    for axis, length in enumerate(grid.size):
        count = other.size[axis]
        start = (other.origin[axis] - grid.origin[axis]) / grid.step[axis]
        step = other.step[axis] / grid.step[axis] if count > 1 else 0.0
        if not (start.is_integer() and step.is_integer()):
            return None
        first, stride = int(start), int(step)
        last = first + stride * (count - 1) if count else first
        low, high = (first, last) if stride >= 0 else (last, first)
        if low < 0 or high >= length:
            return None
        place = torch.arange(count, device="cpu") * stride + first
        index = (index[:, None] * length + place).flatten()
    return index.to(device)


@dataclass(frozen=True)
class Points:
    """A set of points with features and positions.

    Args:
        x: features, ``(..., n, c)``.
        pos: positions, ``(..., n, p)``; in pixels for images. Left out where ``grid`` is given.
        mask: ``(..., n)``, True for real points, False for those that only fill a batch up.
        grid: the lattice that the points lie on in raster order, where there is one.
        on: device of the positions of a grid, where there is nothing else; the CPU by default.

    Example:
        >>> points = Points.from_image(torch.zeros(2, 3, 4, 5))
        >>> points.x.shape, points.position.shape
        (torch.Size([2, 20, 3]), torch.Size([20, 2]))
        >>> points.to_image().shape
        torch.Size([2, 3, 4, 5])
    """

    x: Tensor | None = None
    pos: Tensor | None = None
    mask: Tensor | None = None
    grid: Grid | None = None
    on: torch.device | None = None

    def __post_init__(self) -> None:
        if self.x is None and self.pos is None and self.grid is None:
            raise ValueError("Points: expected features x, positions pos or a grid, got none")
        for name, tensor in (("x", self.x), ("pos", self.pos)):
            if tensor is not None and tensor.ndim < 2:
                raise ValueError(
                    f"Points: expected {name} of shape (..., points, channels), got "
                    f"{tuple(tensor.shape)}; of one channel a point, {name}.unsqueeze(-1)"
                )
        counts = {
            name: count
            for name, count in (
                ("x", None if self.x is None else self.x.shape[-2]),
                ("pos", None if self.pos is None else self.pos.shape[-2]),
                ("mask", None if self.mask is None else self.mask.shape[-1]),
                ("grid", None if self.grid is None else self.grid.num_points),
            )
            if count is not None
        }
        first = next(iter(counts.values()))
        if any(count != first for count in counts.values()):  # a set would hash traced sizes
            raise ValueError(f"Points: numbers of points differ: {counts}")

    @property
    def num_points(self) -> int:
        """Number of points, ``n``."""
        if self.x is not None:
            return self.x.shape[-2]
        return self.pos.shape[-2] if self.pos is not None else self.grid.num_points  # type: ignore[union-attr]

    @property
    def device(self) -> torch.device:
        """Device of the features, or of the positions where there are none."""
        for tensor in (self.x, self.pos, self.mask):
            if tensor is not None:
                return tensor.device
        return torch.device("cpu") if self.on is None else self.on

    @property
    def position(self) -> Tensor:
        """Positions ``(..., n, p)``, from the grid where none were given."""
        if self.pos is not None:
            return self.pos
        if self.grid is None:
            raise ValueError("positions are needed here, but the points have neither pos nor grid")
        dtype = torch.float64 if self.x is not None and self.x.dtype == torch.float64 else None
        return self.grid.positions(self.device, dtype or torch.float32)

    @property
    def features(self) -> Tensor:
        """Features ``(..., n, c)``; an error where there are none."""
        if self.x is None:
            raise ValueError(
                "features are needed here, but the points have positions only; of targets and "
                "sources apart, layers take them as x=(x_source, x_target)"
            )
        return self.x

    @classmethod
    def from_image(cls, image: Tensor) -> Points:
        """Pixels of ``(b, c, *size)`` as points at (row, col), row 0 on top. A view, no copy."""
        if check_tensor("image", image).ndim < 3:
            raise ValueError(f"image: expected (b, c, *size), got shape {tuple(image.shape)}")
        return cls(image.flatten(2).transpose(1, 2), grid=Grid(tuple(image.shape[2:])))

    def to_image(self) -> Tensor:
        """Features as ``(b, c, *size)``, for points that lie on a grid."""
        if self.grid is None:
            raise ValueError("to_image: the points lie on no grid; set Points.grid first")
        return self.features.transpose(-1, -2).unflatten(-1, self.grid.size)

    @classmethod
    def from_tokens(cls, tokens: Tensor) -> Points:
        """Tokens ``(b, n, c)`` as points at 0, 1, 2, ... on a line."""
        check_tensor("tokens", tokens, 3)
        return cls(tokens, grid=Grid((tokens.shape[1],)))

    @classmethod
    def from_batch(
        cls,
        x: Tensor | None,
        pos: Tensor | None = None,
        batch: Tensor | None = None,
        batch_size: int | None = None,
    ) -> Points:
        """Ragged clouds in PyG's form (rows of all clouds, ``batch`` sorted) as ``(b, n_max)``.

        Clouds with fewer than ``n_max`` points are filled up with zeros and masked;
        :meth:`to_rows` undoes it.
        """
        from torch_geometric.utils import to_dense_batch

        rows = x if x is not None else pos
        if rows is None:
            raise ValueError("from_batch: expected features x, positions pos or both, got neither")
        if batch is None:
            return cls(None if x is None else x[None], None if pos is None else pos[None])
        if batch.numel() > 1 and bool((batch[1:] < batch[:-1]).any()):
            raise ValueError("batch: expected sorted cloud numbers; sort the points by batch first")
        dense = {}
        mask = None
        for name, tensor in (("x", x), ("pos", pos)):
            if tensor is not None:
                dense[name], mask = to_dense_batch(tensor, batch, batch_size=batch_size)
        return cls(mask=mask, **dense)

    def to_rows(self, values: Tensor) -> Tensor:
        """Rows of real points of ``values (b, n, ...)``, in PyG's order: undoes from_batch."""
        return values.flatten(0, 1) if self.mask is None else values[self.mask]

    @classmethod
    def from_data(cls, data: Data) -> Points:
        """A PyG ``Data`` or ``Batch`` with ``x`` and/or ``pos``."""
        return cls.from_batch(data.x, data.pos, getattr(data, "batch", None))

    def to_data(self) -> Data:
        """A PyG ``Data`` with ``x``, ``pos`` and, for several clouds, ``batch``."""
        from torch_geometric.data import Data

        placed = self.pos is not None or self.grid is not None
        parts = {"x": self.x, "pos": self.position if placed else None}
        lead = max((t.shape[:-2] for t in parts.values() if t is not None), key=len)
        if not lead:
            return Data(**parts)
        (b,), n = lead, self.num_points
        rows = {
            name: None if t is None else self.to_rows(t.expand(b, n, t.shape[-1]))
            for name, t in parts.items()
        }
        batch = torch.arange(b, device=self.device)[:, None].expand(b, n)
        return Data(**rows, batch=self.to_rows(batch))

    def pad(self, pads: tuple[tuple[int, int], ...]) -> Points:
        """Points of an image with a margin of zero points around it, at true pixel offsets."""
        if self.grid is None or self.x is None:
            raise ValueError("pad: expected points of an image, got points without a grid")
        if not any(map(any, pads)):
            return self
        rows = self.x.unflatten(-2, self.grid.size)  # points stay side by side, as they were
        margin = [0, 0, *(p for axis in reversed(pads) for p in axis)]
        return Points(F.pad(rows, margin).flatten(-len(pads) - 1, -2), grid=self.grid.pad(pads))

    def with_x(self, x: Tensor | None) -> Points:
        """The same points with other features."""
        return Points(x, self.pos, self.mask, self.grid)


def position_range(pos: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The lowest and the highest position of real points on each axis, ``(..., 1, p)``."""
    if mask is None:
        return pos.amin(-2, keepdim=True), pos.amax(-2, keepdim=True)
    empty = ~mask.unsqueeze(-1)
    none = empty.all(-2, keepdim=True)
    low = pos.masked_fill(empty, torch.inf).amin(-2, keepdim=True).masked_fill(none, 0.0)
    high = pos.masked_fill(empty, -torch.inf).amax(-2, keepdim=True).masked_fill(none, 0.0)
    return low, high


@keep(64)
def row_starts(examples: int, rows: int, device: torch.device) -> Tensor:
    """Where each example starts among the rows of all, ``(examples,)``."""
    return torch.arange(examples, device=device) * rows


def gather_rows(values: Tensor, index: Tensor) -> Tensor:
    """Rows of ``values (..., m, c)`` at ``index (..., n, k)``: ``(..., n, k, c)``.

    Leading axes broadcast; an index without leading axes is applied to every example at once.
    """
    if index.ndim == 2 or values.ndim == 2:
        return values.index_select(-2, index.flatten()).unflatten(-2, tuple(index.shape))
    lead = broadcast_shapes(values.shape[:-2], index.shape[:-2])
    m, c = values.shape[-2:]
    n, k = index.shape[-2:]
    values = values.expand(*lead, m, c).reshape(math.prod(lead) * m, c)
    flat = (index + row_starts(math.prod(lead), m, index.device).view(*lead, 1, 1)).flatten()
    return values.index_select(0, flat).view(*lead, n, k, c)
