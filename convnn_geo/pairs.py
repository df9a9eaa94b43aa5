"""Pairs: what a weighting and a kernel may ask of chosen pairs, computed when asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from convnn_geo.caching import once
from convnn_geo.metrics import Distances, full_precision
from convnn_geo.neighborhood import Neighborhood
from convnn_geo.operators import is_transformed
from convnn_geo.points import Points, gather_rows


@dataclass(frozen=True)
class Pairs:
    """Targets with their neighbours, as ``(..., n, k)`` and ``(..., n, k, c)``.

    Args:
        target: the targets.
        source: the sources.
        value: ``(..., m, c)``, what the sources give.
        bind: gives the distances with gradient; asked only where a weighting needs them.
        neighborhood: who was chosen.
        rooted: whether the metric took a root.
    """

    target: Points
    source: Points
    value: Tensor
    bind: Callable[[], Distances]
    neighborhood: Neighborhood
    rooted: bool = False

    @property
    def mask(self) -> Tensor | None:
        """``(..., n, k)``, False where a slot is empty."""
        return self.neighborhood.mask

    @once
    def distance(self) -> Tensor:
        """Distances with gradient, ``(..., n, k)``, float32 or better."""
        with full_precision(self.value.device):
            if self.neighborhood.complete:
                return self.bind().rows()
            return self.bind().at(self.neighborhood.index)

    @property
    def squared_distance(self) -> Tensor:
        """The same, squared where the metric took a root, as ``"euclidean"`` does."""
        return self.distance.square() if self.rooted else self.distance

    @property
    def similarity(self) -> Tensor:
        """Similarities, ``(..., n, k)``: what the metric negated."""
        return self.bind().offset - self.distance

    @property
    def x_i(self) -> Tensor:
        """Features of targets, ``(..., n, 1, c)``; zeros where a target has no neighbours."""
        own = self.target.features.unsqueeze(-2)
        if self.mask is None:
            return own
        return own.masked_fill(~self.mask.any(-1)[..., None, None], 0.0)

    @once
    def x_j(self) -> Tensor:
        """Values of neighbours, ``(..., n, k, c)``; zeros in empty slots."""
        return self._filled(gather_rows(self.value, self.neighborhood.index))

    @once
    def offset(self) -> Tensor:
        """Positions of neighbours relative to the target, ``p_j - p_i``, ``(..., n, k, p)``.

        Zeros in empty slots.
        """
        chosen = gather_rows(self.source.position, self.neighborhood.index)
        return self._filled(chosen - self.target.position.unsqueeze(-2))

    def _filled(self, slots: Tensor) -> Tensor:
        """Zeros where slots are empty, written into what is given where it may be."""
        if self.mask is None:
            return slots
        empty = ~self.mask.unsqueeze(-1)
        alike = empty.shape[:-1] == slots.shape[:-1] and not is_transformed()
        return slots.masked_fill_(empty, 0.0) if alike else slots.masked_fill(empty, 0.0)


@dataclass(frozen=True)
class EdgePairs:
    """The same for edges in PyG's form: ``x_i (E, c)``, ``x_j (E, c)``, ``offset (E, p)``."""

    x_i: Tensor | None
    x_j: Tensor
    offset: Tensor | None


_ROW_BY_ROW = (
    *(nn.Linear, nn.Identity, nn.Dropout, nn.LayerNorm, nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.GELU),
    *(nn.ELU, nn.SELU, nn.SiLU, nn.Mish, nn.ReLU6, nn.Hardswish, nn.Tanh, nn.Sigmoid, nn.Softplus),
)
"""Layers to which the other rows make no difference."""


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def is_plain(module: object, *types: type[nn.Module]) -> bool:
    """Whether a module is of one of these classes, and nothing is put upon it: hooks, a forward."""
    if type(module) not in types or "forward" in vars(module):
        return False
    return not any(getattr(module, hooks) for hooks in _HOOKS)


def on_rows(module: nn.Module, x: Tensor, pairs: Pairs | EdgePairs | None = None) -> Tensor:
    """A module on ``x (..., c)`` as rows ``(N, c)``; where it counts, on filled slots' alone.

    So that a module that normalises over rows, such as :class:`torch.nn.BatchNorm1d`, sees the
    same rows whichever way the operator runs. In empty slots ``x`` must be finite; what comes out
    there is nobody's.
    """
    rows = x.flatten(0, -2)
    mask = pairs.mask if isinstance(pairs, Pairs) else None
    parts = module.modules() if isinstance(module, nn.Module) else (module,)
    if mask is None or all(is_plain(part, nn.Sequential, *_ROW_BY_ROW) for part in parts):
        return module(rows).unflatten(0, x.shape[:-1])
    filled = mask.expand(x.shape[:-1]).flatten().nonzero().squeeze(-1)
    out = module(rows.index_select(0, filled))
    every = out.new_zeros(rows.shape[0], out.shape[-1]).index_copy(0, filled, out)
    return every.unflatten(0, x.shape[:-1])
