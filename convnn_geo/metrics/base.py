"""The metric: how near a source is to a target. Smaller is nearer, always."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn
from torch_geometric.nn.inits import reset

from convnn_geo.checks import casts, check_number, same_code
from convnn_geo.metrics.combined import Combination, Pairwise
from convnn_geo.metrics.distances import Distances
from convnn_geo.points import Points, gather_rows
from convnn_geo.shapes import broadcast_shapes


def precise(tensor: Tensor) -> Tensor:
    """Half precision as float32: bfloat16 coordinates choose wrong neighbours."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def of_both(
    what: Callable[[Points], Tensor], target: Points, source: Points
) -> tuple[Tensor, Tensor]:
    """What is made of targets and of sources: one tensor where these are the same points."""
    made = what(target)
    return made, made if target is source else what(source)


def seen_by(module: object, x: Tensor) -> Tensor:
    """Features as a module of the metric takes them, now that autocast converts nothing.

    Half precision becomes float32, unless the module's own parameters are in half precision.
    """
    if x.dtype not in (torch.float16, torch.bfloat16):
        return x
    parameters = module.parameters() if isinstance(module, nn.Module) else iter(())
    return x.to(next((p.dtype for p in parameters if p.is_floating_point()), torch.float32))


def full_precision(device: torch.device) -> AbstractContextManager[object]:
    """A context in which autocast lowers nothing."""
    return torch.autocast(device.type, enabled=False) if casts(device) else nullcontext()


class Metric(nn.Module, ABC):
    """Dissimilarity of two sets of points; smaller is nearer.

    A subclass implements :meth:`distances`, from what there is: :class:`Differences`,
    :class:`BilinearForm` and the like. :class:`Custom` makes one of a function. Metrics add, and
    multiply by non-negative numbers:
    ``0.3 * Spatial() + 0.7 * Feature("cosine")`` is a metric.

    Example:
        >>> import torch
        >>> from convnn_geo.metrics import Feature, Spatial
        >>> from convnn_geo.points import Points
        >>> points = Points.from_image(torch.randn(1, 3, 4, 4))
        >>> metric = 0.3 * Spatial() + 0.7 * Feature("cosine")
        >>> metric(points, points).shape
        torch.Size([1, 16, 16])
    """

    by_set = False
    """Whether a distance depends on all points of a set, as where features are normalised."""

    @property
    def rooted(self) -> bool:
        """Whether distances took a root, so that not they but their squares are squared ones."""
        return False

    @abstractmethod
    def distances(self, target: Points, source: Points) -> Distances:
        """Bind the metric to points: project, normalise, whatever is done once a point."""

    def bind(self, target: Points, source: Points) -> Distances:
        """:meth:`distances`, in float32 or better under autocast."""
        with full_precision(target.device):
            found = self.distances(target, source)
        if not isinstance(found, Distances):
            raise TypeError(
                f"{type(self).__name__}.distances: expected Distances, got "
                f"{type(found).__name__}; a function of pairs becomes a metric by metrics.Custom"
            )
        return found

    def forward(self, target: Points, source: Points | None = None) -> Tensor:
        """All distances, ``(..., n, m)``; the targets are the sources where none are given."""
        bound = self.bind(target, target if source is None else source)
        with full_precision(target.device):
            return bound.rows()

    def pairs(self, target: Points, source: Points, index: Tensor) -> Tensor:
        """Distances of chosen pairs with gradient, ``(..., n, k)``."""
        bound = self.bind(target, source)
        with full_precision(target.device):
            return bound.at(index)

    @property
    def learnable(self) -> bool:
        """Whether the metric has parameters that want a gradient."""
        return any(p.requires_grad for p in self.parameters())

    def __add__(self, other: object) -> Metric:
        if not isinstance(other, Metric):
            return NotImplemented
        terms = [term for m in (self, other) for term in _terms(m)]
        return Sum([m for _, m in terms], [w for w, _ in terms])

    def __mul__(self, weight: object) -> Metric:
        if isinstance(weight, Tensor):
            raise TypeError(
                "weights of a sum of metrics are numbers, and fixed; one that learns is that of "
                "interpolate(first, second, lam, learnable=True)"
            )
        if isinstance(weight, bool) or not isinstance(weight, (int, float)):
            return NotImplemented
        weight = check_number("weight of a metric", weight)
        terms = _terms(self)
        return Sum([m for _, m in terms], [w * weight for w, _ in terms])

    __rmul__ = __mul__

    def __sub__(self, other: object) -> Metric:
        """Refused: a distance that counts against others is none."""
        raise TypeError(
            "distances are added up, a * first + b * second, with weights that are not negative; "
            "they can't be subtracted"
        )


def _terms(metric: Metric) -> list[tuple[float, Metric]]:
    if isinstance(metric, Sum):
        return list(zip(metric.weights, metric.metrics, strict=True))  # type: ignore[arg-type]
    return [(1.0, metric)]


class Sum(Metric):
    """Non-negative combination of metrics, ``sum_r weight_r d_r``; what ``+`` and ``*`` make.

    Args:
        metrics: the metrics.
        weights: one non-negative number each. A metric of weight 0 takes no part at all, so the
            ends of a spectrum are exact.
    """

    def __init__(self, metrics: Sequence[Metric], weights: Sequence[float]) -> None:
        super().__init__()
        if len(metrics) != len(weights) or not metrics:
            raise ValueError(
                f"Sum: expected one weight a metric, got {len(metrics)} metrics and "
                f"{len(weights)} weights"
            )
        self.metrics = nn.ModuleList(metrics)
        self.weights = tuple(check_number("weight of a metric", w) for w in weights)

    @property
    def rooted(self) -> bool:
        """Whether all that count did."""
        counted = [m for w, m in zip(self.weights, self.metrics, strict=True) if w > 0]
        return bool(counted) and all(m.rooted for m in counted)

    def distances(self, target: Points, source: Points) -> Distances:
        """The weighted distances of the metrics that count."""
        parts: list[tuple[float | Tensor, Distances]] = [
            (w, m.distances(target, source))  # type: ignore[operator]
            for w, m in zip(self.weights, self.metrics, strict=True)
            if w > 0
        ]
        if len(parts) == 1 and parts[0][0] == 1:
            return parts[0][1]
        if not parts:  # every weight is 0: all sources are equally near
            parts = [(0.0, self.metrics[0].distances(target, source))]  # type: ignore[operator]
        return Combination(parts)

    def extra_repr(self) -> str:
        return f"weights={self.weights}"


class Interpolation(Metric):
    """``(1 - lam) first + lam second``: exactly ``first`` at 0 and exactly ``second`` at 1.

    Args:
        first: the metric at ``lam = 0``.
        second: the metric at ``lam = 1``.
        lam: a number in [0, 1].
        learnable: make ``lam`` a parameter, kept in [0, 1] by clamping. It learns through the
            weighting of distances; selection alone gives no gradient.

    Example:
        >>> from convnn_geo.metrics import Feature, Spatial, interpolate
        >>> interpolate(Spatial(), Feature("cosine"), 0.25)
        Interpolation(
          lam=0.25
          (first): Spatial(p=2.0)
          (second): Feature('cosine')
        )
    """

    start = 0.5
    """Where a learned place goes back to."""

    def __init__(
        self, first: Metric, second: Metric, lam: float = 0.5, learnable: bool = False
    ) -> None:
        super().__init__()
        self.first, self.second = as_metric(first), as_metric(second)
        lam = check_number("lam", lam, maximum=1)
        self.start = lam
        self.lam: float | nn.Parameter = (
            nn.Parameter(torch.tensor(lam)) if learnable else lam  # a 0-d parameter
        )

    def reset_parameters(self) -> None:
        """A learned place as it was given, and both metrics as they do themselves."""
        if isinstance(self.lam, nn.Parameter):
            nn.init.constant_(self.lam, self.start)
        reset(self.first), reset(self.second)

    @property
    def rooted(self) -> bool:
        """Whether both did, wherever the place is."""
        return self.first.rooted and self.second.rooted

    @property
    def end(self) -> Metric | None:
        """The metric that a fixed ``lam`` of 0 or 1 comes down to; None in between."""
        if isinstance(self.lam, Tensor) or self.lam not in (0.0, 1.0):
            return None
        return self.second if self.lam else self.first

    def distances(self, target: Points, source: Points) -> Distances:
        """Both distances, weighted; at a fixed end only the one that counts."""
        if self.end is not None:
            return self.end.distances(target, source)
        lam: float | Tensor = self.lam
        if isinstance(lam, Tensor):
            lam = between_ends(lam)
        return Combination(
            [
                (1 - lam, self.first.distances(target, source)),
                (lam, self.second.distances(target, source)),
            ]
        )

    def extra_repr(self) -> str:
        if isinstance(self.lam, Tensor):
            return "lam=" + ("" if self.lam.is_meta else f"{self.lam.item():g}, ") + "learnable"
        return f"lam={self.lam:g}"


def between_ends(lam: Tensor) -> Tensor:
    """A learned place, clamped to [0, 1]; its gradient passes, or beyond an end it were lost."""
    return lam + (lam.clamp(0, 1) - lam).detach()


def interpolate(
    first: Metric | str, second: Metric | str, lam: float = 0.5, learnable: bool = False
) -> Interpolation:
    """The metric between two metrics, ``(1 - lam) first + lam second``; see Interpolation."""
    return Interpolation(as_metric(first), as_metric(second), lam, learnable)


class Custom(Metric):
    """A metric from a function of pairs of points.

    Args:
        fn: given two :class:`~convnn_geo.points.Points` whose ``x (..., n, 1, c)`` and
            ``pos (..., n, 1, p)``, and ``x (..., n | 1, k, c)`` and ``pos``, broadcast, returns
            distances ``(..., n, k)``.

    Example:
        >>> import torch
        >>> from convnn_geo.metrics import Custom
        >>> from convnn_geo.points import Points
        >>> metric = Custom(lambda i, j: (i.x - j.x).abs().amax(-1))
        >>> metric(Points(torch.tensor([[0.0], [2.0]]))).tolist()
        [[0.0, 2.0], [2.0, 0.0]]
    """

    def __init__(self, fn: Callable[[Points, Points], Tensor]) -> None:
        super().__init__()
        if not callable(fn):
            raise TypeError(f"Custom: expected a function of two Points, got {fn!r}")
        self.fn = fn

    def distances(self, target: Points, source: Points) -> Distances:
        """Pairwise distances, by the function."""

        def expand(points: Points, axis: int) -> Points:
            has_pos = points.pos is not None or points.grid is not None
            return Points(
                None if points.x is None else precise(points.x).unsqueeze(axis),
                precise(points.position).unsqueeze(axis) if has_pos else None,
            )

        def evaluate(start: int, stop: int | None, index: Tensor | None) -> Tensor:
            rows = expand(target, -2)
            pick = lambda t: None if t is None else t[..., start:stop, :, :]  # noqa: E731
            rows = Points(pick(rows.x), pick(rows.pos))
            n = target.num_points
            n = (n if stop is None else min(stop, n)) - start
            if index is None:
                return _checked(self.fn(rows, expand(source, -3)), n, source.num_points)
            chosen = Points(
                None if source.x is None else gather_rows(precise(source.x), index),
                None if rows.pos is None else gather_rows(precise(source.position), index),
            )
            return _checked(self.fn(rows, chosen), n, index.shape[-1])

        lead: tuple[int, ...] = ()
        for t, s in ((target.x, source.x), (target.pos, source.pos)):
            if t is not None and s is not None:
                lead = broadcast_shapes(lead, t.shape[:-2], s.shape[:-2])
        return Pairwise(torch.Size((*lead, target.num_points, source.num_points)), evaluate)


def _checked(distance: Tensor, n: int, k: int) -> Tensor:
    """What a function gave, if it is distances of ``n`` targets to ``k`` sources each."""
    if not isinstance(distance, Tensor):
        raise TypeError(f"Custom: expected a tensor from the function, got {distance!r}")
    if distance.shape[-2:] != (n, k):
        raise ValueError(
            f"Custom: expected distances of shape (..., {n}, {k}) from the function, got "
            f"{tuple(distance.shape)}; channels must be reduced: (i.x - j.x).norm(dim=-1), say"
        )
    return distance


_RESOLVER: dict[str, Callable[[], Metric]] = {}


def as_metric(metric: Metric | str | type[Metric]) -> Metric:
    """Resolve a name, a class or an instance to a metric.

    Example:
        >>> from convnn_geo.metrics import as_metric
        >>> as_metric("cosine")
        Feature('cosine')
    """
    if isinstance(metric, Metric):
        return metric
    if isinstance(metric, type) and issubclass(metric, Metric):
        return metric()
    if isinstance(metric, str) and metric in _RESOLVER:
        return _RESOLVER[metric]()
    if callable(metric):
        raise TypeError(f"metric: expected a Metric or a name, got a function; Custom({metric!r})?")
    raise ValueError(
        f"unknown metric {metric!r}; expected a Metric or one of: {', '.join(metric_names())}"
    )


def metric_names() -> list[str]:
    """Names that :func:`as_metric` knows."""
    return sorted(_RESOLVER)


def register_metric(name: str, factory: Callable[[], Metric]) -> None:
    """Make ``factory()`` available to :func:`as_metric` under ``name``.

    Args:
        name: that no other metric has.
        factory: makes the metric, anew each time.

    Raises:
        ValueError: the name is taken.

    Example:
        >>> from convnn_geo.metrics import Spatial, as_metric, register_metric
        >>> register_metric("taxicab", lambda: Spatial("l1"))
        >>> as_metric("taxicab")
        Spatial(p=1.0)
        >>> del _RESOLVER["taxicab"]  # here alone, as other examples list all metrics
    """
    if name in _RESOLVER and not same_code(_RESOLVER[name], factory):
        raise ValueError(
            f"expected a new name of a metric, got {name!r}; choose another, as taken are: "
            f"{', '.join(metric_names())}"
        )
    _RESOLVER[name] = factory
