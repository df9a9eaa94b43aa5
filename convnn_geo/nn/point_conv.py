"""PointConvNN: the operator on point clouds, with a graph built in each forward."""

from __future__ import annotations

from typing import Any, TypeAlias

import torch
from torch import Tensor

from convnn_geo.candidates import All, Candidates
from convnn_geo.checks import (
    check_alike,
    check_edges,
    check_floating,
    check_instance,
    check_int,
    check_layer,
    check_name,
    check_tensor,
    check_values,
)
from convnn_geo.encodings import Encoding
from convnn_geo.kernels import Kernel
from convnn_geo.kernels.base import lowered
from convnn_geo.lowering import run
from convnn_geo.metrics import Feature, Metric, Spatial
from convnn_geo.neighborhood import Neighborhood
from convnn_geo.nn.measure import encode, layer_encoding, layer_metric
from convnn_geo.nn.neighbor_conv import is_lazy
from convnn_geo.nn.settable import slots
from convnn_geo.nn.taps import TapLayer, check_self_point
from convnn_geo.nn.tracing import one_node
from convnn_geo.operation import Operation
from convnn_geo.points import Points
from convnn_geo.search import ENGINES, check_batch, knn, knows_pairs, radius
from convnn_geo.selection import Given, KNearest, Radius, Selection
from convnn_geo.typing import BACKENDS, ORDERS
from convnn_geo.weighting import Weighting, as_weighting

Pair: TypeAlias = "Tensor | tuple[Tensor | None, Tensor | None] | None"


class PointConvNN(TapLayer):
    r"""Convolution over the ``k`` nearest points of each point, by position or by feature.

    .. math:: y_i = \sum_{j=1}^{k} W_j\, \rho_{ij}\, x_{I_i(j)} + b

    The graph is built in each forward: static in effect for ``metric="spatial"``, dynamic for a
    metric over features, as in DGCNN. See https://arxiv.org/abs/2606.14725.

    Args:
        in_channels: channels of ``x``; the axes of ``pos`` where no ``x`` is given.
        out_channels: channels of the output.
        k: neighbours, the point itself among them unless ``self_point="excluded"``.
        metric: how near, over ``pos``, ``x`` or both.
        kernel: ``"standard"``, ``"depthwise"``, ``"separable"``, ``"sum"``, ``"mean"``,
            ``"max"`` or a :class:`~convnn_geo.kernels.Kernel`.
        weighting: how much each neighbour counts.
        groups: groups of channels.
        bias: learn an additive bias, where the kernel has taps.
        candidates: where to look.
        selection: whom to keep, instead of ``k``.
        self_point: ``"natural"``, ``"first"`` or ``"excluded"``.
        short: clouds of fewer than k points: ``"error"``, or ``"pad"`` with empty slots.
        order: of the taps, ``"rank"`` or ``"raster"`` (by index).
        encoding: positional encoding or its name.
        axes: of ``pos``, for encodings that add channels for each.
        backend: ``"auto"``, or one of those of :data:`convnn_geo.typing.BACKENDS` by name.
        search: engine that finds the neighbours.

    Shapes:
        - **x:** :math:`(N, c)`, None, or a pair (source, target) for bipartite clouds
        - **pos:** :math:`(N, p)`, or a pair
        - **batch:** :math:`(N)`, sorted, or a pair
        - **edge_index:** :math:`(2, E)`, to reuse a graph; its edges' order is their rank
        - **output:** :math:`(N, d)`, a row a target

    Raises:
        ValueError: wrong shapes, channels, batch vectors, k over the points of a cloud.
        TypeError: wrong dtypes.

    Example:
        >>> import torch
        >>> from convnn_geo.nn import PointConvNN
        >>> x, pos = torch.randn(12, 4), torch.rand(12, 3)
        >>> batch = torch.tensor([0] * 5 + [1] * 7)
        >>> PointConvNN(4, 8, k=3)(x, pos, batch).shape
        torch.Size([12, 8])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        k: int | None = None,
        metric: Metric | str = "spatial",
        kernel: str | Kernel = "standard",
        weighting: Weighting | str = "ones",
        groups: int = 1,
        bias: bool = True,
        *,
        candidates: Candidates | None = None,
        selection: Selection | None = None,
        self_point: str = "natural",
        short: str = "error",
        order: str = "rank",
        encoding: Encoding | str | None = None,
        axes: int = 3,
        backend: str = "auto",
        search: str = "auto",
    ) -> None:
        super().__init__()
        self.in_channels = check_int("in_channels", in_channels)
        self.out_channels = check_int("out_channels", out_channels)
        if (k is None) == (selection is None):
            raise ValueError("expected k or a selection, and not both")
        check_self_point(self_point, selection is None)
        if short != "error" and selection is not None:
            raise ValueError(f"short={short!r} is an option of k: put it into the selection")
        if selection is None:
            selection = KNearest(k, self_point=self_point, short=short)  # type: ignore[arg-type]
        self.selection = check_instance("selection", selection, Selection)
        self.k = slots(selection)
        self.axes = check_int("axes", axes)
        self.encoding = layer_encoding(encoding, in_channels, axes)
        self.weighting = as_weighting(weighting)
        self.metric = layer_metric(metric, self.encoding, self.weighting)
        self.candidates = (
            All() if candidates is None else check_instance("candidates", candidates, Candidates)
        )
        self.order = check_name("order", order, ORDERS)
        self.backend = check_name("backend", backend, BACKENDS)
        self.search = check_name("search backend", search, ("auto", *ENGINES))
        extra = 0 if self.encoding is None else self.encoding.extra_channels(axes)
        taps = None if self.k is None else (self.k,)
        self.build_kernel(kernel, (in_channels + extra, out_channels), taps, groups, bias, {})
        self.reset_taps()
        self.built = True

    def operation(
        self, x: Pair, pos: Pair = None, batch: Pair = None, edge_index: Tensor | None = None
    ) -> Operation:
        """The layer on these clouds, as an operation."""
        return self._operation(*self._clouds(x, pos), batch, edge_index)

    def _clouds(self, x: Pair, pos: Pair) -> tuple[Points, Points]:
        """Sources and targets, the same object where there is one set of points."""
        pos_source, pos_target = _pair(pos)
        bipartite = isinstance(x, tuple) or isinstance(pos, tuple)
        x_source, x_target = (x, None) if bipartite and not isinstance(x, tuple) else _pair(x)
        source = self._points("source", x_source, pos_source)
        if not bipartite:
            return source, source
        target = self._points("target", x_target, pos_target)
        for key in ("x", "pos"):
            given = getattr(source, key), getattr(target, key)
            if given[0] is not None and given[1] is not None:
                check_alike(f"{key} (source)", given[0], f"{key} (target)", given[1])
        return source, target

    def _operation(
        self, source: Points, target: Points, batch: Pair, edge_index: Tensor | None
    ) -> Operation:
        alone = target is source
        kernel = self.bound_kernel()
        for part, looks in ((kernel, kernel.needs_target), (self.metric, self._sees_features)):
            if looks and target.x is None and source.x is not None:
                raise ValueError(
                    f"{type(part).__name__} looks at features of targets, and there are none: pass "
                    "x=(x_source, x_target)"
                )
        batch = _pair(batch)
        for vector in batch:
            if isinstance(vector, Tensor) and vector.ndim == 2 and vector.shape[0] == 2:
                raise TypeError(
                    "batch: expected a batch vector, got what looks like a graph; pass it as "
                    "edge_index="
                )
        source = self._encoded(source, batch[0])
        target = source if alone else self._encoded(target, batch[1], kernel.needs_target)
        selection = self.selection
        if edge_index is None and self._by_cloud(*batch):
            selection = Given(self._searched(source, target, *batch), "search.knn, cloud by cloud")
        elif edge_index is None:
            source, target = self._dense(source, target, *batch)
        else:
            check_edges(edge_index, source.device)
            selection = Given(
                Neighborhood.from_edge_index(
                    edge_index, target.num_points, source.num_points, k=self.k
                )
            )
        return Operation(
            target=target,
            source=source,
            value=source.position if source.x is None else source.x,
            metric=self.metric,
            candidates=self.candidates,
            selection=selection,
            weighting=self.weighting,
            kernel=kernel,
            order=self.order if edge_index is None else "rank",
            search=self.search,
        )

    @one_node
    def forward(
        self, x: Pair, pos: Pair = None, batch: Pair = None, edge_index: Tensor | None = None
    ) -> Tensor:
        """Build the graph and convolve.

        Args:
            x: features ``(N, c)``, None where positions are the features, or a pair
                ``((M, c), (N, c) | None)`` of sources and targets; beside a pair of positions
                those of the sources alone, as PyG's layers take them.
            pos: positions ``(N, p)``, or a pair ``((M, p), (N, p))``.
            batch: ``(N,)``, the sorted cloud numbers of the points, or a pair of them; None for
                one cloud.
            edge_index: ``(2, E)``, sources above targets, to reuse a graph instead of building
                one: the order of a target's edges is their rank.

        Returns:
            ``(N, d)``, a row a target.
        """
        source, target = self._clouds(x, pos)
        if not target.num_points:  # connected to the input, as any output
            rows = source.position if source.x is None else source.x
            learns = sum((p.sum() for p in self.parameters() if not is_lazy(p)), rows.sum())
            return learns * lowered(rows).new_zeros(0, self.out_channels)
        op = self._operation(source, target, batch, edge_index)
        out = self.check_channels(run(op, self.backend), self.out_channels)
        return out if isinstance(op.selection, Given) else op.target.to_rows(out)

    @property
    def _sees_features(self) -> bool:
        """Whether the metric looks at features, as far as its class tells."""
        return self.encoding is None and _looks_at_features(self.metric)

    def _encoded(self, points: Points, batch: Tensor | None, needed: bool = True) -> Points:
        if self.encoding is None or self.encoding.on == "metric":
            return points
        if points.x is None and not needed and not _looks_at_features(self.metric):
            return points  # of targets nobody looks at more than where they are
        if batch is None:
            return encode(self.encoding, points)
        check_batch("batch", batch, points)
        dense = Points.from_batch(points.x, points.pos, batch)  # each cloud by itself
        return points.with_x(dense.to_rows(encode(self.encoding, dense).features))

    def _points(self, name: str, x: Tensor | None, pos: Tensor | None) -> Points:
        if x is None and pos is None:
            raise ValueError(f"expected x, pos or both for the {name} points, got neither")
        if isinstance(pos, Tensor) and pos.dtype == torch.long and pos.shape[:1] == (2,):
            raise TypeError(
                "pos: expected positions, got what looks like a graph; pass it as edge_index="
            )
        if isinstance(pos, Tensor) and pos.dtype == torch.long and pos.ndim == 1:
            raise TypeError(
                "pos: expected positions, got what looks like a batch vector; pass it as batch="
            )
        for key, tensor in (("x", x), ("pos", pos)):
            if tensor is not None:
                check_floating(f"{key} ({name})", check_tensor(f"{key} ({name})", tensor, 2))
        if x is not None and pos is not None:
            check_alike("x", x, "pos", pos)
            if x.shape[0] != pos.shape[0]:
                raise ValueError(
                    f"x and pos ({name}): numbers of points differ: {x.shape[0]} and {pos.shape[0]}"
                )
        value = pos if x is None else x
        if name == "source" and value.shape[-1] != self.in_channels:  # type: ignore[union-attr]
            raise ValueError(
                f"expected {self.in_channels} channels, got shape {tuple(value.shape)}"  # type: ignore[union-attr]
            )
        adds = self.encoding is not None and self.encoding.extra_channels(self.axes)
        if adds and pos is not None and pos.shape[-1] != self.axes:
            raise ValueError(
                f"pos ({name}): expected {self.axes} axes for the encoding's channels, got shape "
                f"{tuple(pos.shape)}; pass axes={pos.shape[-1]} to the layer"
            )
        if self.weight is not None:
            check_layer(f"the {name}", value, self.weight)  # type: ignore[arg-type]
        check_values(f"{name} points", x, pos)
        return Points(x, pos)

    def _dense(
        self, source: Points, target: Points, batch_source: Tensor | None, batch: Tensor | None
    ) -> tuple[Points, Points]:
        """Clouds of a batch as ``(b, n_max)``; a mask where they are ragged."""
        if batch_source is None and batch is None:
            self._check_size(source.num_points, target.num_points)
            dense = Points.from_batch(source.x, source.pos)
            return dense, dense if target is source else Points.from_batch(target.x, target.pos)
        alone = target is source
        batch_source, batch, examples = self._check_clouds(source, target, batch_source, batch)
        dense = Points.from_batch(source.x, source.pos, batch_source, examples)
        if alone:
            return dense, dense
        return dense, Points.from_batch(target.x, target.pos, batch, examples)

    def _by_cloud(self, batch_source: Tensor | None, batch: Tensor | None) -> bool:
        """Whether clouds of a batch can be searched as rows, instead of filled up to one size."""
        if batch_source is None or batch is None or not batch.numel():
            return False
        if type(self.candidates) is not All:
            return False
        selection, known = self.selection, type(self.metric) in (Feature, Spatial)
        if torch.compiler.is_compiling():  # which has no sizes of clouds to fill up to
            return known and type(selection) is KNearest and selection.dilation == 1
        return type(selection) in (KNearest, Radius) and knows_pairs(self.metric)

    def _searched(
        self, source: Points, target: Points, batch_source: Tensor | None, batch: Tensor | None
    ) -> Neighborhood:
        """Each cloud's neighbours, counted as rows."""
        selection: Any = self.selection
        alone = target is source
        if not torch.compiler.is_compiling():
            self._check_clouds(source, target, batch_source, batch)
        if type(self.metric) is Spatial and source.pos is not None:  # features may be of any width
            places = Points(pos=source.pos), Points(pos=target.pos)
            source, target = places[0], places[0] if alone else places[1]
        points = (source, None if alone else target)
        batches = (batch_source, None if alone else batch)
        options: dict[str, Any] = {
            "metric": self.metric,
            "backend": self.search,
            "check": False,
        }
        if isinstance(selection, Radius):
            found = radius(*points, selection.r, *batches, selection.max_k, **options)
            return found.padded(selection.max_k)
        return knn(
            *(*points, selection.k * selection.dilation, *batches),
            self_point=selection.self_point,
            short=selection.short,
            **options,
        ).apply(lambda t: t[..., :: selection.dilation])

    def _check_clouds(
        self, source: Points, target: Points, batch_source: Tensor | None, batch: Tensor | None
    ) -> tuple[Tensor, Tensor, int]:
        """Both batch vectors, sound, and how many clouds there are; k must fit into each."""
        alone = target is source
        batch_source = check_batch("batch", batch_source, source)
        batch = batch_source if alone else check_batch("batch", batch, target)
        counts = torch.bincount(batch_source)
        examples = counts.numel() if alone else max(counts.numel(), int(batch.max()) + 1)
        counts = torch.bincount(batch_source, minlength=examples)
        self._check_size(int(counts[batch.unique()].min()) if batch.numel() else 0, batch.numel())
        return batch_source, batch, examples

    def _check_size(self, smallest: int, targets: int) -> None:
        selection = self.selection
        if not targets or not isinstance(selection, KNearest) or selection.short == "pad":
            return
        available = smallest - (selection.self_point == "excluded")
        if selection.k * selection.dilation > available:
            raise ValueError(
                f"k={selection.k} (dilation {selection.dilation}) is larger than the smallest "
                f"cloud's {available} candidates; lower k, drop small clouds, or pass short='pad'"
            )

    def extra_repr(self) -> str:
        parts = [f"{self.in_channels}, {self.out_channels}, k={self.k}", *self.kernel_repr()]
        return ", ".join(parts if self.order == "rank" else [*parts, f"order={self.order!r}"])


def _looks_at_features(metric: Metric) -> bool:
    return any(type(part) is Feature for part in metric.modules())


def _pair(value: Pair) -> tuple[Tensor | None, Tensor | None]:
    return value if isinstance(value, tuple) else (value, value)
