"""One launch of our kernel for all examples, be they of one size or clouds that are not."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Examples:
    """How many examples of equal size ``(b, n, d)`` and ``(b, m, d)`` are laid out.

    Args:
        longest: targets of the largest.
    """

    longest: int

    @property
    def starts(self) -> None:
        """Where they start follows from their size."""
        return None

    @property
    def alike(self) -> bool:
        """Whether targets and sources of the same numbers are of the same examples."""
        return True

    def mean(self, keys: Tensor) -> Tensor:
        """Of each example's sources, ``(b, d)``."""
        return keys.mean(1)

    def most(self, lengths: Tensor) -> Tensor:
        """Of each example's sources, ``(b,)``."""
        return lengths.amax(1)

    def to_targets(self, tensor: Tensor) -> Tensor:
        """What each example has, for each of its targets."""
        return tensor.unsqueeze(1)

    to_sources = to_targets

    def laid_out(self, tensor: Tensor) -> Tensor:
        """As the kernels take it: with an axis of heads."""
        return tensor.unsqueeze(1)


@dataclass(frozen=True)
class Clouds:
    """The same of clouds of unequal size, their rows ``(n, d)`` and ``(m, d)`` after one another.

    Args:
        longest: targets of the largest.
        starts: ``(b + 1,)`` twice, where clouds start among targets and among sources.
        batch: ``(n,)`` and ``(m,)``, the cloud of each.
    """

    longest: int
    starts: tuple[Tensor, Tensor]
    batch: tuple[Tensor, Tensor]

    @property
    def alike(self) -> bool:
        """Whether targets and sources of the same numbers are of the same clouds."""
        return _same(*self.batch)

    def mean(self, keys: Tensor) -> Tensor:
        """Of each cloud's sources, ``(b, d)``."""
        return self._reduced(keys, "mean")

    def most(self, lengths: Tensor) -> Tensor:
        """Of each cloud's sources, ``(b,)``."""
        return self._reduced(lengths, "max")

    def to_targets(self, tensor: Tensor) -> Tensor:
        """What each cloud has, for each of its targets."""
        return tensor[self.batch[0]]

    def to_sources(self, tensor: Tensor) -> Tensor:
        """What each cloud has, for each of its sources."""
        return tensor[self.batch[1]]

    def laid_out(self, tensor: Tensor) -> Tensor:
        """As the kernels take it: as it is."""
        return tensor

    def _reduced(self, rows: Tensor, by: str) -> Tensor:
        sizes = self.starts[1].diff()
        return torch.segment_reduce(rows, by, lengths=sizes, unsafe=True)  # unsafe: does not wait


def launch(
    q: Tensor,
    keys: Tensor,
    k: int,
    own: Tensor | None = None,
    angles: bool = False,
    examples: Examples | Clouds | None = None,
) -> tuple[Tensor, Tensor]:
    """Squared distances, half of them for angles, and places ``(b n, k)`` of all examples.

    Places count within each.
    """
    from convnn_geo.gpu.search import Rounding, nearest

    d, examples = q.shape[-1], examples or Examples(q.shape[1])
    q, keys = q.contiguous(), keys.contiguous()
    bias = rounding = None
    if not is_direct(q):
        center = examples.mean(keys)
        key_side = keys - examples.to_sources(center)
        side = key_side if examples.alike and _same(q, keys) else q - examples.to_targets(center)
        key_length = key_side.norm(dim=-1)
        length = key_length if side is key_side else side.norm(dim=-1)
        bias = key_length.square()
        slack = share(d) * (length + examples.to_targets(examples.most(key_length))).square()
        if angles:  # a zero key has squared length 1 by definition
            bias = bias + (keys.square().sum(-1) < 0.25)
        rounding = Rounding(
            center=center,
            q=examples.laid_out(side),
            keys=examples.laid_out(key_side),
            square=length.square().flatten(),
            slack=slack.flatten(),
            rough=_rough(d),
        )
        bias = examples.laid_out(bias)
    values, places = nearest(
        *(examples.laid_out(q), examples.laid_out(keys)),
        *(k, examples.starts, examples.longest, bias, 2.0),
        direct=is_direct(q),
        own=own,
        angles=angles,
        rounding=rounding,
        integers=torch.int64,
    )
    return values / 2 if angles else values, places


def _same(q: Tensor, keys: Tensor) -> bool:
    return q.data_ptr() == keys.data_ptr() and q.shape == keys.shape


def is_direct(q: Tensor) -> bool:
    """Whether axes are so few that differences cost no more than products."""
    return q.shape[-1] <= 8


def share(d: int) -> float:
    """Of the square of the sum of two lengths, that rounding may make up."""
    return 2 * (d + 4) * torch.finfo(torch.float32).eps


def _rough(d: int) -> float:
    """How much more is to be allowed for where products are of TF32.

    A factor that loses all but ten bits is off by 2^-10 of itself, so a product by 2^-9 of both
    lengths' product, a value by 2^-8, and a difference of two values by 2^-7 of it; which is at
    most a quarter of the square of the lengths' sum. A twentieth more covers products of errors.
    """
    return 1 + 1.05 * 2**-9 / share(d)
