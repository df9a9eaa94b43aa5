"""Metrics over features, raw or projected to queries and keys."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from convnn_geo.checks import check_alike, check_name, check_number
from convnn_geo.metrics.angular import Angular
from convnn_geo.metrics.base import Metric, of_both, precise, register_metric, seen_by
from convnn_geo.metrics.bilinear import BilinearForm
from convnn_geo.metrics.differences import Differences
from convnn_geo.metrics.distances import Distances
from convnn_geo.points import Points

KINDS = (
    "euclidean",
    "squared_euclidean",
    "cosine",
    "pearson",
    "dot",
    "scaled_dot",
    "manhattan",
    "minkowski",
)


class Feature(Metric):
    """Distance of features; similarities enter negated, so that smaller is nearer.

    ====================  =====================================================
    kind                  d(i, j) of a query q and a key k
    ====================  =====================================================
    ``euclidean``         |q - k|
    ``squared_euclidean`` |q - k|^2
    ``cosine``            1 - <q, k> / (|q| |k|); 1 from and to a zero vector
    ``pearson``           cosine after subtracting each vector's mean
    ``dot``               -<q, k>
    ``scaled_dot``        -<q, k> / sqrt(dimension)
    ``manhattan``         sum |q - k|
    ``minkowski``         (sum |q - k|^p)^(1/p)
    ====================  =====================================================

    Args:
        kind: one of the table.
        p: exponent of ``minkowski``.
        query: module on the features of targets; the features themselves by default.
        key: module on the features of sources. Where it is ``query`` itself, and targets are the
            sources, it runs once.

    Example:
        >>> import torch
        >>> from convnn_geo.metrics import Feature
        >>> from convnn_geo.points import Points
        >>> Feature("dot")(Points(torch.eye(2))).tolist()
        [[-1.0, -0.0], [-0.0, -1.0]]
    """

    def __init__(
        self,
        kind: str = "euclidean",
        p: float = 3.0,
        query: nn.Module | None = None,
        key: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.kind = check_name("kind of feature metric", kind, KINDS)
        self.p = check_number("p", p, 1.0)
        self.query = query
        self.key = key

    @property
    def rooted(self) -> bool:
        """Of norms."""
        return self.kind in ("euclidean", "manhattan", "minkowski")

    def distances(self, target: Points, source: Points) -> Distances:
        """Project, then bind the kind's form."""
        if self.query is self.key:
            q, k = of_both(lambda p: _project("query", self.query, p.features), target, source)
        else:
            q = _project("query", self.query, target.features)
            k = _project("key", self.key, source.features)
        if q.shape[-1] != k.shape[-1]:
            raise ValueError(
                f"features of targets have {q.shape[-1]} channels, of sources {k.shape[-1]}; "
                "give projections to one dimension (query=, key=)"
            )
        return _bind(self.kind, q, k, self.p)

    def extra_repr(self) -> str:
        return f"{self.kind!r}" + (f", p={self.p}" if self.kind == "minkowski" else "")


def _project(name: str, module: nn.Module | None, x: Tensor) -> Tensor:
    """What a module makes of features; the features themselves where there is none."""
    if module is None:
        return precise(x)
    x, first = seen_by(module, x), module
    while isinstance(first, nn.Sequential) and len(first):
        first = first[0]
    if type(first) is nn.Linear:  # which says what it takes
        if first.in_features != x.shape[-1]:
            raise ValueError(
                f"Feature: {name}= takes {first.in_features} channels, got {x.shape[-1]}"
            )
        check_alike("the input", x, f"{name}= of the metric Feature", first.weight)
    return precise(module(x))


def _bind(kind: str, q: Tensor, k: Tensor, p: float) -> Distances:
    if kind == "dot":
        return BilinearForm(q, k)
    if kind == "scaled_dot":
        return BilinearForm(q, k, scale=q.shape[-1] ** -0.5)
    if kind == "pearson":
        centred = _centred(q)
        q, k = centred, centred if q is k else _centred(k)
    if kind in ("cosine", "pearson"):
        unit = _unit(q)
        return Angular(unit, unit if q is k else _unit(k))
    if kind == "manhattan":
        return Differences(q, k, 1.0)
    return Differences(q, k, p if kind == "minkowski" else 2.0, kind != "squared_euclidean")


def _unit(x: Tensor) -> Tensor:
    """Unit vectors; zero, and without gradient, where there is no direction."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / norm.masked_fill(norm < 1e-12, torch.inf)


def _centred(x: Tensor) -> Tensor:
    """Vectors less their mean; zero where only rounding is left."""
    mean = x.mean(-1, keepdim=True)
    centred = x - mean
    rounding = 4 * torch.finfo(x.dtype).eps * mean.detach().abs()
    return centred.masked_fill((centred.abs() <= rounding).all(-1, keepdim=True), 0.0)


for _kind in KINDS:
    register_metric(_kind, lambda kind=_kind: Feature(kind))  # type: ignore[misc]
