"""ConvNNAttention: attention over chosen neighbours, a drop-in for nn.MultiheadAttention."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch_geometric.nn.inits import reset

from convnn_geo.candidates import All, Candidates, Causal, Window
from convnn_geo.checks import (
    check_instance,
    check_int,
    check_layer,
    check_name,
    check_number,
    check_tensor,
    check_values,
)
from convnn_geo.encodings import Encoding
from convnn_geo.kernels import HeadTaps, Kernel, Separable, Sum, Taps
from convnn_geo.lowering import run, run_with_weights
from convnn_geo.metrics import Metric
from convnn_geo.nn.masks import merge_masks
from convnn_geo.nn.measure import encode, layer_encoding, layer_metric
from convnn_geo.nn.settable import Settable, slots
from convnn_geo.nn.taps import check_self_point
from convnn_geo.nn.tracing import one_node
from convnn_geo.operation import Operation
from convnn_geo.points import Grid, Points
from convnn_geo.search import ENGINES
from convnn_geo.selection import Every, KNearest, Selection
from convnn_geo.typing import BACKENDS, ORDERS
from convnn_geo.weighting import Softmax, Weighting, as_weighting

KERNELS = ("sum", "standard", "depthwise", "separable")


class ConvNNAttention(Settable):
    r"""Attention over the ``k`` nearest keys: a drop-in for :class:`torch.nn.MultiheadAttention`.

    .. math:: y_i = \sum_{j \in I_i} \mathrm{softmax}_j(-d(q_i, k_j))\, v_j

    With ``k=None`` and all candidates it is multi-head attention, with the same parameters; with
    ``k`` it is the k-NN attention of KVT (https://arxiv.org/abs/2106.00515); with taps inside the
    heads the attention layer of ConvNN (https://arxiv.org/abs/2606.14725).

    Args:
        embed_dim: channels of the query and the output.
        num_heads: heads; must divide ``embed_dim``.
        dropout: probability of dropping a weight in training.
        bias: of the projections.
        add_bias_kv: append a learned key and value.
        add_zero_attn: append a key and a value of zeros.
        kdim: channels of the key; ``embed_dim`` by default.
        vdim: channels of the value; ``embed_dim`` by default.
        batch_first: ``(b, n, c)`` rather than ``(n, b, c)``.
        device: of the parameters.
        dtype: of the parameters.
        k: neighbours kept; None for all candidates. More than sizes allow are an error; where a
            border or a mask leaves fewer, the last are empty.
        metric: of projected queries and keys, head by head. It may look at positions, too. One
            by name takes the layer's dtype and device; a module keeps its own.
        candidates: where a query may look: ``Window``, ``Block``, ``Causal``, ``Random``, ...
        selection: whom to keep, instead of ``k`` and ``self_point``.
        weighting: ``"softmax"`` with ``dropout`` by default, or another.
        kernel: ``"sum"``, or taps over the neighbours inside a head: ``"standard"`` (head_dim x
            head_dim a tap), ``"depthwise"``, ``"separable"``.
        taps_per_head: one set of taps a head instead of one shared by all.
        order: of the taps, ``"rank"``, or ``"raster"``: by place in a window, by key index
            elsewhere. Without ``k`` it is raster.
        self_point: ``"natural"``, ``"first"`` or ``"excluded"``.
        encoding: positional encoding or its name; ``"rotary"`` turns queries and keys, others
            change the inputs of the projections, which grow with the channels that it adds.
        axes: of the grid, for encodings that need to know: 1 for sequences, 2 for images.
        backend: ``"auto"``, ``"native"``, ``"compiled"``, ``"gather"``, ``"message_passing"`` or
            ``"triton"``; :func:`convnn_geo.lowering.explain` says which runs.
        search: engine that finds the neighbours.

    Shapes:
        - **query:** :math:`(b, n, c)`, :math:`(n, c)`, or a grid :math:`(b, *size, c)` of two or
          three axes, whose positions the metric and the candidates then know
        - **key, value:** :math:`(b, m, c)`, likewise; the query itself by default
        - **key_padding_mask:** :math:`(b, m)`, True where a key is to be ignored, or floats added
        - **attn_mask:** :math:`(n, m)` or :math:`(b \cdot heads, n, m)`, likewise
        - **output:** the query's shape, and weights :math:`(b, n, m)` or :math:`(b, heads, n, m)`

    Raises:
        ValueError: wrong shapes, names, devices, masks, k over the number of candidates.

    Example:
        >>> import torch
        >>> from convnn_geo.nn import ConvNNAttention
        >>> x = torch.randn(2, 20, 32)
        >>> out, weights = ConvNNAttention(32, 4, k=5)(x, x, x)
        >>> out.shape, int((weights[0, 0] > 0).sum()) <= 4 * 5
        (torch.Size([2, 20, 32]), True)
    """

    # nn.TransformerEncoderLayer reads this in eval mode, and with True it would compute plain
    # attention from our weights without calling forward.
    _qkv_same_embed_dim = False

    # Parameters, or None where the options have no use for them.
    in_proj_weight: Any
    q_proj_weight: Any
    k_proj_weight: Any
    v_proj_weight: Any
    in_proj_bias: Any
    bias_k: Any
    bias_v: Any
    taps: Any
    pointwise: Any

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        k: int | None = None,
        metric: Metric | str = "scaled_dot",
        candidates: Candidates | None = None,
        selection: Selection | None = None,
        weighting: Weighting | str | None = None,
        kernel: str = "sum",
        taps_per_head: bool = False,
        order: str = "rank",
        self_point: str = "natural",
        encoding: Encoding | str | None = None,
        axes: int = 1,
        backend: str = "auto",
        search: str = "auto",
    ) -> None:
        super().__init__()
        self.embed_dim = check_int("embed_dim", embed_dim)
        self.num_heads = check_int("num_heads", num_heads)
        if embed_dim % num_heads:
            raise ValueError(f"num_heads={num_heads} must divide embed_dim={embed_dim}")
        self.head_dim = embed_dim // num_heads
        self.kdim = embed_dim if kdim is None else check_int("kdim", kdim)
        self.vdim = embed_dim if vdim is None else check_int("vdim", vdim)
        self.batch_first, self.add_zero_attn = batch_first, add_zero_attn
        self.backend = check_name("backend", backend, BACKENDS)
        self.search = check_name("search backend", search, ("auto", *ENGINES))
        self.candidates = (
            All() if candidates is None else check_instance("candidates", candidates, Candidates)
        )
        check_self_point(self_point, k is not None and selection is None)
        if k is not None and selection is not None:
            raise ValueError("expected k or a selection, and not both")
        if selection is None:
            selection = Every() if k is None else KNearest(k, self_point=self_point)
        self.selection = check_instance("selection", selection, Selection)
        self.k = slots(selection)
        self.axes = check_int("axes", axes)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        self.encoding = layer_encoding(encoding, embed_dim, axes, **factory)
        self.dropout = check_number("dropout", dropout)
        self.weighting = self._weighting(weighting)
        self.metric = layer_metric(metric, self.encoding, self.weighting, num_heads, **factory)
        self.order = check_name("order", order, ORDERS)
        self.kernel = check_name("kernel", kernel, KERNELS)
        self.taps_per_head = taps_per_head
        self._build_projections(bias, add_bias_kv, factory)
        self._build_taps(factory)
        self._reset_own_parameters()  # out_proj has drawn its own: one seed, the same as torch's
        self.built = True

    def _weighting(self, weighting: Weighting | str | None) -> Weighting:
        if weighting is None or weighting == "softmax":
            return Softmax(dropout=self.dropout)
        chosen = as_weighting(weighting)
        if self.dropout and getattr(chosen, "dropout", 0.0) != self.dropout:
            raise ValueError(
                f"dropout={self.dropout:g} is that of softmax weights, but the weighting is "
                f"{chosen}; pass weighting=Softmax(dropout=...), or leave dropout at 0"
            )
        return chosen

    def settling(self) -> dict[str, Callable[[Any], Any]]:
        """Of dropout, too, which is that of the weighting."""
        return {**super().settling(), "dropout": self._settle_dropout}

    def _settle_dropout(self, dropout: Any) -> float:
        dropout = check_number("dropout", dropout, maximum=1)
        if hasattr(self.weighting, "dropout"):
            self.weighting.dropout = dropout
        elif dropout:
            raise AttributeError(f"dropout: weights of {self.weighting} are never dropped")
        return dropout

    def has_taps(self) -> bool:
        """Whether the kernel has taps."""
        return self.taps is not None

    def _build_projections(self, bias: bool, add_bias_kv: bool, factory: dict[str, Any]) -> None:
        """Parameters by the names that nn.MultiheadAttention gives them."""
        e = self.embed_dim

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape, **factory))

        added = 0 if self.encoding is None else self.encoding.extra_channels(self.axes)
        seen = 0 if self.encoding is None or self.encoding.on == "value" else added
        self.widths = (e + seen, self.kdim + seen, self.vdim + added)
        self.packed = len(set(self.widths)) == 1
        for name in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
            self.register_parameter(name, None)
        if self.packed:
            self.in_proj_weight = parameter(3 * e, self.widths[0])
        else:
            self.q_proj_weight = parameter(e, self.widths[0])
            self.k_proj_weight = parameter(e, self.widths[1])
            self.v_proj_weight = parameter(e, self.widths[2])
        self.register_parameter("in_proj_bias", parameter(3 * e) if bias else None)
        self.out_proj = NonDynamicallyQuantizableLinear(e, e, bias=bias, **factory)
        self.register_parameter("bias_k", parameter(1, 1, e) if add_bias_kv else None)
        self.register_parameter("bias_v", parameter(1, 1, e) if add_bias_kv else None)

    def _build_taps(self, factory: dict[str, Any]) -> None:
        self.register_parameter("taps", None)
        self.register_parameter("pointwise", None)
        if self.kernel == "sum":
            return
        k = self.k
        if k is None and isinstance(self.candidates, Window):
            size = self.candidates.kernel_size
            k = None if isinstance(size, int) else math.prod(size)
        if k is None:
            raise ValueError(
                f"kernel={self.kernel!r} has one tap a neighbour: pass k=, or a Window with one "
                "kernel_size an axis"
            )
        channels = self.head_dim if self.kernel == "standard" else 1
        shape = (self.head_dim, channels, k)
        if self.taps_per_head:
            if self.kernel == "separable":
                raise ValueError("taps_per_head: separable taps are shared by all heads")
            shape = (self.num_heads, *shape)  # type: ignore[assignment]
        self.taps = nn.Parameter(torch.empty(shape, **factory))
        if self.kernel == "separable":
            self.pointwise = nn.Parameter(torch.empty(self.head_dim, self.head_dim, **factory))

    def reset_parameters(self) -> None:
        """As nn.MultiheadAttention does; taps start as a plain sum, other parts as they do."""
        for part in self.children():
            reset(part)
        self._reset_own_parameters()

    def _reset_own_parameters(self) -> None:
        for weight in (
            self.in_proj_weight,
            self.q_proj_weight,
            self.k_proj_weight,
            self.v_proj_weight,
        ):
            if weight is not None:
                nn.init.xavier_uniform_(weight)
        for bias in (self.in_proj_bias, self.out_proj.bias):
            if bias is not None:
                nn.init.zeros_(bias)
        for bias in (self.bias_k, self.bias_v):
            if bias is not None:
                nn.init.xavier_normal_(bias)
        with torch.no_grad():
            if self.taps is not None and self.kernel == "standard":
                eye = torch.eye(self.head_dim, device=self.taps.device, dtype=self.taps.dtype)
                self.taps.copy_(eye.unsqueeze(-1).expand(self.taps.shape))
            elif self.taps is not None:
                self.taps.fill_(1.0)
            if self.pointwise is not None:
                nn.init.eye_(self.pointwise)

    def bound_kernel(self) -> Kernel:
        """The kernel with this layer's taps."""
        if self.taps is None:
            return Sum()
        if self.taps_per_head:
            return HeadTaps(self.taps)
        if self.kernel == "separable":
            return Separable(self.taps, self.pointwise)
        return Taps(self.taps, None, 1 if self.kernel == "standard" else self.head_dim)

    @one_node
    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend; arguments, shapes and results are those of nn.MultiheadAttention."""
        op, grid = self._operation(
            query, key, value, key_padding_mask, need_weights, attn_mask, is_causal
        )
        if need_weights:
            out, weights = self._with_weights(op)
        else:
            out, weights = run(op, self.backend), None
        out = self.out_proj(out.transpose(1, 2).flatten(2))
        if weights is not None and average_attn_weights:
            weights = weights.mean(1)
        return self._restore(out, query, grid), (
            weights.squeeze(0) if weights is not None and query.ndim == 2 else weights
        )

    def operation(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
        need_weights: bool = False,
    ) -> Operation:
        """The layer on this input, as an operation on ``(b, heads, n, head_dim)``."""
        return self._operation(
            query, key, value, key_padding_mask, need_weights, attn_mask, is_causal
        )[0]

    def _operation(
        self,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        is_causal: bool,
    ) -> tuple[Operation, Grid]:
        alone = key is None or key is query
        key = query if key is None else key
        value = key if value is None else value
        self._check(query, key, value)
        shared = value is key
        query, grid = self._points(query)
        if alone:
            key, key_grid = query, grid
        else:
            key, key_grid = self._points(key)
        value = key if shared else self._points(value)[0]
        if self.encoding is not None and self.encoding.on == "value":
            value = encode(self.encoding, Points(value, grid=key_grid)).features
        for name, tensor, width in zip(
            ("query", "key", "value"), (query, key, value), self.widths, strict=True
        ):
            if tensor.shape[-1] != width:
                raise ValueError(
                    f"{name}: expected {width} channels once encoded, got {tensor.shape[-1]}; "
                    f"the layer was made for axes={self.axes}, the grid is {key_grid.size}"
                )
        q, k, v = self._project(query, key, value, alone and shared)
        b, n, m = q.shape[0], q.shape[1], k.shape[1]
        k, v = self._append(k, v)
        q, k, v = (t.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for t in (q, k, v))
        extra = k.shape[2] - m
        source = Points(k, grid=None if extra else key_grid)
        target = Points(q, grid=None if extra else grid)
        candidates = self.candidates
        if is_causal and attn_mask is None:
            if extra or not isinstance(candidates, All):
                attn_mask = torch.ones(n, m, dtype=torch.bool, device=q.device).triu(1)
            else:
                candidates = Causal()
        shape = (b, self.num_heads, n, m)
        mask, bias = merge_masks(key_padding_mask, attn_mask, shape, extra, q.device)
        op = Operation(
            target=target,
            source=source,
            value=v,
            metric=self.metric,
            candidates=candidates,
            selection=self.selection,
            weighting=self.weighting,
            kernel=self.bound_kernel(),
            order=self.order,
            mask=mask,
            bias=bias,
            search=self.search,
            with_weights=need_weights,
        )
        return op, grid

    def _check(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        weight = self.q_proj_weight if self.in_proj_weight is None else self.in_proj_weight
        for name, tensor, channels in (
            ("query", query, self.embed_dim),
            ("key", key, self.kdim),
            ("value", value, self.vdim),
        ):
            check_tensor(name, tensor, (2, 3, 4, 5))
            if tensor.shape[-1] != channels:
                raise ValueError(
                    f"{name}: expected {channels} channels last, got shape {tuple(tensor.shape)}"
                )
            check_layer(name, tensor, weight)
            if tensor.ndim != query.ndim:
                raise ValueError(
                    f"{name}: expected {query.ndim} dimensions like the query, got {tensor.ndim}"
                )
        batch = 1 if query.ndim == 3 and not self.batch_first else 0
        alike = query.ndim == 2 or query.shape[batch] == key.shape[batch]
        if not alike or key.shape[:-1] != value.shape[:-1]:
            raise ValueError(
                f"query, key and value: batches or lengths differ: {tuple(query.shape)}, "
                f"{tuple(key.shape)}, {tuple(value.shape)}; expected one batch for all, and one "
                "length or grid for key and value"
            )
        check_values("query, key and value", query, key, value)

    def _points(self, x: Tensor) -> tuple[Tensor, Grid]:
        """Tokens ``(b, n, c)`` and the grid they lie on, encoded."""
        if x.ndim == 2:
            x = x.unsqueeze(0)
        elif x.ndim == 3 and not self.batch_first:
            x = x.transpose(0, 1)
        grid = Grid(tuple(x.shape[1:-1]))
        x = x.flatten(1, -2)
        if self.encoding is not None and self.encoding.on == "features":
            x = encode(self.encoding, Points(x, grid=grid)).features
        return x, grid

    def _project(
        self, query: Tensor, key: Tensor, value: Tensor, alike: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        if self.packed and alike:
            q, k, v = F.linear(query, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
            return q, k, v
        if self.packed:
            weights = self.in_proj_weight.chunk(3)
        else:
            weights = (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
        biases = (None,) * 3 if self.in_proj_bias is None else self.in_proj_bias.chunk(3)
        inputs = (query, key, value)
        q, k, v = (F.linear(*part) for part in zip(inputs, weights, biases, strict=True))
        return q, k, v

    def _append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The learned key and value, and those of zeros, behind all others."""
        if self.bias_k is not None:
            k = torch.cat([k, self.bias_k.to(k.dtype).expand(k.shape[0], 1, -1)], 1)
            v = torch.cat([v, self.bias_v.to(v.dtype).expand(v.shape[0], 1, -1)], 1)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        return k, v

    def _with_weights(self, op: Operation) -> tuple[Tensor, Tensor]:
        """The result with attention weights ``(b, heads, n, m)``."""
        out, hood, weight = run_with_weights(op, self.backend)
        if weight is None:
            weight = torch.ones_like(hood.index, dtype=op.value.dtype)
        elif weight.ndim > op.value.ndim:  # one weight a channel: their mean
            weight = weight.mean(-1)
        shape = (*op.value.shape[:-2], hood.num_targets, hood.k)
        weight = weight.expand(shape)
        if hood.complete:
            return out, weight
        dense = weight.new_zeros(*shape[:-1], hood.num_sources)
        return out, dense.scatter_add(-1, hood.index.expand(shape), weight)

    def _restore(self, out: Tensor, query: Tensor, grid: Grid) -> Tensor:
        """The query's shape."""
        out = out.unflatten(1, grid.size) if len(grid.size) > 1 else out
        if query.ndim == 2:
            return out.squeeze(0)
        return out.transpose(0, 1) if query.ndim == 3 and not self.batch_first else out

    def extra_repr(self) -> str:
        taps = "" if self.kernel == "sum" else f", kernel={self.kernel!r}"
        return f"{self.embed_dim}, {self.num_heads}, k={self.k}, dropout={self.dropout}{taps}"
