"""Bad input to every public entry: refused before work, by a message that says what came.

One table. Each row: an id, a call, the exception, and what its message must say.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import convnn_geo
from convnn_geo import encodings, kernels, lowering, metrics, recipes, search, weighting
from convnn_geo.candidates import Block, Congruent, Random, Strided, Window
from convnn_geo.datasets.mnist import mnist_task
from convnn_geo.neighborhood import Neighborhood
from convnn_geo.nn import (
    Branching,
    ConvNN1d,
    ConvNN2d,
    ConvNN3d,
    ConvNNAttention,
    NeighborConv,
    PointConvNN,
)
from convnn_geo.points import Points
from convnn_geo.search import knn
from convnn_geo.selection import KNearest, Radius
from convnn_geo.transforms import NeighborGraph

NAN = float("nan")


def image(*shape: int) -> Tensor:
    return torch.zeros(shape or (1, 4, 6, 6))


def tokens(*shape: int) -> Tensor:
    return torch.zeros(shape or (2, 5, 8))


def edges(*columns: tuple[int, int]) -> Tensor:
    return torch.tensor(columns or [(0, 1), (1, 2)]).t()


def conv(*args: object, **options: object) -> ConvNN2d:
    return ConvNN2d(*(args or (4, 6)), **options)


def near(**options: object) -> ConvNN2d:
    return ConvNN2d(4, 6, **{"k": 3, "metric": "cosine", **options})


def attend(x: Tensor | None = None, *rest: Tensor, **options: object) -> object:
    made = {k: options.pop(k) for k in list(options) if k in ("k", "candidates", "selection")}
    return ConvNNAttention(8, 2, **made)(tokens() if x is None else x, *rest, **options)


def cloud(x: object = None, pos: object = None, batch: object = None, **options: object) -> object:
    given = options.pop("edge_index", None)
    return PointConvNN(4, 5, **{"k": 2, **options})(x, pos, batch, given)


def graph(x: object = None, edge_index: object = None, *args: object, **options: object) -> object:
    made = {k: options.pop(k) for k in list(options) if k in ("heads", "groups", "aggr")}
    layer = NeighborConv(4, 6, 2, **made)
    x = torch.zeros(3, 4) if x is None else x
    return layer(x, edges() if edge_index is None else edge_index, *args, **options)


def points(n: int = 6, c: int = 3) -> Tensor:
    return torch.arange(float(n * c)).view(n, c)


V, T = ValueError, TypeError
Row = tuple[str, Callable[[], object], type[Exception], str]

TABLE: list[Row] = [
    # --- images ---
    ("conv-k-0", lambda: near(k=0), V, "k: expected an integer of at least 1, got 0"),
    ("conv-k-negative", lambda: near(k=-3), V, "k: expected an integer of at least 1, got -3"),
    ("conv-k-float", lambda: near(k=3.0), T, r"k: expected an integer, got 3.0 of type float"),
    ("conv-k-bool", lambda: near(k=True), T, "k: expected an integer, got True of type bool"),
    ("conv-k-many", lambda: near(k=37)(image()), V, "k=37 needs 37 candidates, but there are 36"),
    (
        "conv-k-window",
        lambda: conv(4, 6, 3, k=10, metric="cosine")(image()),
        V,
        "k=10 needs 10 candidates, but there are 9",
    ),
    (
        "conv-k-window-others",
        lambda: conv(4, 6, 3, padding=1, k=9, metric="cosine", self_point="excluded")(image()),
        V,
        "k=9 needs 9 candidates, but there are 8 besides the point itself",
    ),
    (
        "attention-k-block",
        lambda: attend(k=5, candidates=Block(2)),
        V,
        "k=5 needs 5 candidates, but there are 2; lower k",
    ),
    (
        "conv-self-point-window",
        lambda: conv(4, 6, 3, self_point="excluded"),
        V,
        "self_point='excluded' is an option of the k nearest: pass k=",
    ),
    (
        "conv-self-point-selection",
        lambda: conv(selection=KNearest(3), metric="cosine", self_point="first"),
        V,
        "self_point='first' is an option of the k nearest: pass k=, or a selection such as",
    ),
    (
        "conv-metric-window",
        lambda: conv(4, 6, 3, metric="cosine"),
        V,
        "metric= has no effect: every candidate is kept, and weights of Ones do not depend on",
    ),
    (
        "conv-encoding-window",
        lambda: conv(4, 6, 3, encoding="rotary"),
        V,
        "encoding= has no effect: every candidate is kept",
    ),
    (
        "conv-order-window",
        lambda: conv(4, 6, 3, order="rank"),
        V,
        "order='rank' has no effect: every candidate is kept, in raster order",
    ),
    (
        "conv-groups-kernel",
        lambda: conv(4, 4, 3, groups=2, kernel="sum"),
        V,
        "groups=2 is an option of kernel='standard', not of 'sum'",
    ),
    (
        "conv-bias-heads",
        lambda: near(metric=metrics.PositionBias((6, 6), heads=2)),
        V,
        "PositionBias has tables for 2 heads, but the layer has no heads",
    ),
    (
        "cloud-bias-heads",
        lambda: cloud(metric=0.5 * metrics.PositionBias(6, heads=2) + metrics.Feature()),
        V,
        "PositionBias has tables for 2 heads, but the layer has no heads",
    ),
    (
        "attention-bias-heads",
        lambda: ConvNNAttention(8, 2, metric=metrics.PositionBias(5, heads=4)),
        V,
        "PositionBias has tables for 4 heads, but the layer has 2; give it as many",
    ),
    (
        "attention-self-point",
        lambda: ConvNNAttention(8, 2, self_point="first"),
        V,
        "self_point='first' is an option of the k nearest: pass k=",
    ),
    (
        "attention-self-point-selection",
        lambda: ConvNNAttention(8, 2, selection=KNearest(3), self_point="excluded"),
        V,
        "self_point='excluded' is an option of the k nearest",
    ),
    (
        "attention-value-grid",
        lambda: attend(tokens(2, 3, 4, 8), tokens(2, 3, 4, 8), tokens(2, 4, 3, 8)),
        V,
        r"\(2, 3, 4, 8\), \(2, 4, 3, 8\); expected one batch .* one length or grid for key and v",
    ),
    (
        "cloud-self-point-selection",
        lambda: cloud(k=None, selection=KNearest(2), self_point="first"),
        V,
        "self_point='first' is an option of the k nearest",
    ),
    (
        "cloud-short-selection",
        lambda: cloud(k=None, selection=KNearest(2), short="pad"),
        V,
        "short='pad' is an option of k: put it into the selection",
    ),
    (
        "cloud-encoding-axes",
        lambda: cloud(points(6, 4), points(6, 2), encoding="coordinates"),
        V,
        r"pos \(source\): expected 3 axes for the encoding's channels, got shape \(6, 2\); pass ax",
    ),
    (
        "graph-target-channels",
        lambda: NeighborConv((4, 5), 6, 2)((torch.zeros(3, 4), torch.zeros(3, 4)), edges()),
        V,
        r"x \(target\): expected 5 channels, got shape \(3, 4\)",
    ),
    (
        "graph-target-rank",
        lambda: NeighborConv(4, 6, 2)((torch.zeros(3, 4), torch.zeros(3)), edges()),
        V,
        r"x \(target\): expected 2 dimensions, got 1",
    ),
    (
        "graph-three-channels",
        lambda: NeighborConv((4, 5, 6), 6, 2),
        V,
        r"in_channels: expected a number or \(source, target\), got \(4, 5, 6\)",
    ),
    (
        "conv-k-random",
        lambda: near(k=6, candidates=Random(5))(image()),
        V,
        "k=6 needs 6 candidates, but there are 5",
    ),
    (
        "conv-k-dilated",
        lambda: near(k=20, dilation=2)(image()),
        V,
        "k=20 with dilation 2 needs 40 candidates, but there are 36",
    ),
    ("conv-nothing", lambda: conv(), V, "expected kernel_size .*, k .* or a selection; got none"),
    (
        "conv-k-and-selection",
        lambda: near(selection=KNearest(3)),
        V,
        "expected k or a selection, and not both",
    ),
    ("conv-no-metric", lambda: conv(k=3), V, "k nearest by what. Pass metric="),
    (
        "conv-rank",
        lambda: conv(4, 6, 3)(torch.zeros(4, 6)),
        V,
        r"ConvNN2d input: expected 3 or 4 dimensions, got 2 \(shape \(4, 6\)\)",
    ),
    (
        "conv-1d-rank",
        lambda: ConvNN1d(4, 6, 3)(image()),
        V,
        "ConvNN1d input: expected 2 or 3 dimensions, got 4",
    ),
    (
        "conv-3d-rank",
        lambda: ConvNN3d(4, 6, 3)(torch.zeros(6, 6)),
        V,
        "ConvNN3d input: expected 4 or 5 dimensions, got 2",
    ),
    (
        "conv-channels",
        lambda: conv(4, 6, 3)(image(1, 3, 6, 6)),
        V,
        r"ConvNN2d: expected 4 channels, got 3 \(shape \(1, 3, 6, 6\)",
    ),
    (
        "conv-dtype",
        lambda: conv(4, 6, 3)(image().double()),
        T,
        "input is torch.float64, the layer torch.float32",
    ),
    (
        "conv-integer",
        lambda: conv(4, 6, 3)(image().long()),
        T,
        "expected a floating-point tensor, got torch.int64",
    ),
    (
        "conv-complex",
        lambda: conv(4, 6, 3)(image().to(torch.complex64)),
        T,
        "expected a floating-point tensor, got torch.complex64",
    ),
    (
        "conv-device",
        lambda: conv(4, 6, 3)(image().to("meta")),
        V,
        "input is on meta, the layer on cpu",
    ),
    ("conv-array", lambda: conv(4, 6, 3)([[1.0]]), T, "expected a torch.Tensor, got list"),
    (
        "conv-no-pixels",
        lambda: conv(4, 6, 3)(image(1, 4, 0, 6)),
        V,
        r"expected an image with pixels, got shape \(1, 4, 0, 6\)",
    ),
    (
        "conv-small-image",
        lambda: conv(4, 6, 9)(image()),
        V,
        r"a window of \(9, 9\) .* does not fit into an image of \(6, 6\)",
    ),
    (
        "conv-in-channels",
        lambda: ConvNN2d(0, 6, 3),
        V,
        "in_channels: expected an integer of at least 1, got 0",
    ),
    ("conv-out-channels", lambda: ConvNN2d(4, 6.0, 3), T, "out_channels: expected an integer"),
    (
        "conv-kernel-size",
        lambda: conv(4, 6, 0),
        V,
        "kernel_size: expected an integer of at least 1",
    ),
    (
        "conv-kernel-axes",
        lambda: conv(4, 6, (3, 3, 3)),
        V,
        r"kernel_size: expected 2 integers, one an axis, got \(3, 3, 3\)",
    ),
    (
        "conv-stride",
        lambda: conv(4, 6, 3, 0),
        V,
        "stride: expected an integer of at least 1, got 0",
    ),
    ("conv-padding", lambda: conv(4, 6, 3, 1, -1), V, "padding: expected an integer of at least 0"),
    (
        "conv-padding-name",
        lambda: conv(4, 6, 3, padding="full"),
        V,
        "unknown padding 'full'; expected one of: same, valid",
    ),
    (
        "conv-padding-same-stride",
        lambda: conv(4, 6, 3, stride=2, padding="same"),
        V,
        r"padding='same' takes no stride, got \(2, 2\)",
    ),
    ("conv-dilation", lambda: conv(4, 6, 3, dilation=0), V, "dilation: expected an integer of at"),
    (
        "conv-padding-mode",
        lambda: conv(4, 6, 3, padding_mode="mirror"),
        V,
        "unknown padding_mode 'mirror'; expected one of: zeros, reflect, replicate, circular",
    ),
    (
        "conv-k-padding-mode",
        lambda: near(padding=1, padding_mode="reflect"),
        V,
        "without kernel_size, padding is a number of zero points .* got .*'reflect'",
    ),
    ("conv-k-same", lambda: near(padding="same"), V, "without kernel_size, padding is a number"),
    (
        "conv-reflect",
        lambda: conv(4, 6, 13, padding=6, padding_mode="reflect", backend="gather")(image()),
        V,
        "reflect padding of 6 must be under the axis of 6",
    ),
    (
        "conv-reflect-native",
        lambda: conv(4, 6, 13, padding=6, padding_mode="reflect")(image()),
        V,
        "reflect padding of 6 must be under the axis of 6",
    ),
    (
        "conv-circular-native",
        lambda: conv(4, 6, 15, padding=7, padding_mode="circular")(image()),
        V,
        "circular padding of 7 is over the axis of 6",
    ),
    ("conv-groups", lambda: conv(4, 6, 3, groups=4), V, "groups: 4 must divide in_channels=4 and"),
    (
        "conv-groups-0",
        lambda: conv(4, 6, 3, groups=0),
        V,
        "groups: expected an integer of at least",
    ),
    ("conv-groups-float", lambda: conv(4, 6, 3, groups=2.0), T, "groups: expected an integer"),
    (
        "conv-depthwise",
        lambda: conv(4, 6, 3, kernel="depthwise"),
        V,
        "groups: 4 must divide in_channels=4 and out_channels=6",
    ),
    (
        "conv-kernel",
        lambda: conv(4, 6, 3, kernel="dense"),
        V,
        "unknown kernel 'dense'; expected one of: standard, depthwise, separable, sum, mean, max",
    ),
    (
        "conv-kernel-class",
        lambda: conv(4, 6, 3, kernel=kernels.Max),
        T,
        "kernel: expected a Kernel or one of standard, .*Max",
    ),
    (
        "conv-sum-channels",
        lambda: conv(4, 6, 3, kernel="sum"),
        V,
        "kernel='sum' keeps channels: expected out_channels=4, got 6",
    ),
    (
        "conv-any-channels",
        lambda: ConvNN2d(None, None, 3),
        V,
        "kernel='standard' has weights: pass in_channels, out_channels",
    ),
    (
        "conv-half-any",
        lambda: ConvNN2d(None, 6, 3),
        T,
        "in_channels: expected an integer, got None",
    ),
    ("conv-order", lambda: near(order="near"), V, "unknown order 'near'; expected one of: rank, r"),
    (
        "conv-self-point",
        lambda: near(self_point="last"),
        V,
        "unknown self_point 'last'; expected one of: natural, first, excluded",
    ),
    (
        "conv-self-point-even",
        lambda: conv(4, 6, 2, k=2, metric="spatial", self_point="first")(image()),
        V,
        "self_point='first' needs targets that are among the sources",
    ),
    (
        "conv-backend",
        lambda: conv(4, 6, 3, backend="fast"),
        V,
        "unknown backend 'fast'; expected one of: auto, native, compiled, gather, message_pa",
    ),
    (
        "conv-native",
        lambda: near(backend="native")(image()),
        V,
        "backend='native' can't run this layer: convolution: candidates are All, not a Window",
    ),
    (
        "conv-search",
        lambda: near(search="kd"),
        V,
        "unknown search backend 'kd'; expected one of: auto, grid, rings, cells",
    ),
    (
        "conv-search-refuses",
        lambda: near(search="grid")(image()),
        V,
        "search backend 'grid' can't serve this query: the metric looks at more than positions",
    ),
    (
        "conv-metric",
        lambda: near(metric="cosinus"),
        V,
        "unknown metric 'cosinus'; expected a Metric or one of: .*cosine.*spatial",
    ),
    (
        "conv-weighting",
        lambda: near(weighting="soft"),
        V,
        "unknown weighting 'soft'; expected a Weighting or one of: gaussian, .*softmax",
    ),
    (
        "conv-encoding",
        lambda: near(encoding="sine"),
        V,
        "unknown encoding 'sine'; expected one of: coordinates, fourier",
    ),
    ("conv-learned", lambda: near(encoding="learned"), V, "encoding='learned' needs a size"),
    ("conv-shuffle", lambda: near(shuffle=0), V, "shuffle: expected an integer of at least 1"),
    (
        "conv-shuffle-size",
        lambda: near(shuffle=4)(image()),
        V,
        r"shuffle=4 must divide every axis of the input, got size \(6, 6\)",
    ),
    (
        "conv-dilation-axes",
        lambda: near(dilation=(2, 2)),
        T,
        r"dilation: expected an integer, got \(2, 2\)",
    ),
    (
        "conv-self-point-unused",
        lambda: conv(4, 6, 3, self_point="last"),
        V,
        "unknown self_point 'last'",
    ),
    (
        "conv-selection",
        lambda: conv(4, 6, selection="near"),
        T,
        "selection: expected an instance of Selection, got 'near'",
    ),
    (
        "conv-candidates",
        lambda: near(candidates="window"),
        T,
        "candidates: expected an instance of Candidates, got 'window'",
    ),
    # --- tokens ---
    (
        "attention-heads",
        lambda: ConvNNAttention(8, 3),
        V,
        "num_heads=3 must divide embed_dim=8",
    ),
    ("attention-heads-0", lambda: ConvNNAttention(8, 0), V, "num_heads: expected an integer of at"),
    ("attention-embed", lambda: ConvNNAttention(8.0, 2), T, "embed_dim: expected an integer"),
    ("attention-kdim", lambda: ConvNNAttention(8, 2, kdim=0), V, "kdim: expected an integer of at"),
    (
        "attention-dropout",
        lambda: ConvNNAttention(8, 2, dropout=1.5),
        V,
        r"dropout: expected a number in \[0, 1\], got 1.5",
    ),
    (
        "attention-dropout-lost",
        lambda: ConvNNAttention(8, 2, dropout=0.5, weighting="gaussian"),
        V,
        "dropout=0.5 is that of softmax weights, but the weighting is Gaussian",
    ),
    ("attention-k", lambda: ConvNNAttention(8, 2, k=0), V, "k: expected an integer of at least 1"),
    (
        "attention-k-many",
        lambda: attend(k=6),
        V,
        "k=6 needs 6 candidates, but there are 5",
    ),
    (
        "attention-rank",
        lambda: attend(torch.zeros(8)),
        V,
        "query: expected 2 or 3 or 4 or 5 dimens",
    ),
    (
        "attention-channels",
        lambda: attend(tokens(2, 5, 7)),
        V,
        r"query: expected 8 channels last, got shape \(2, 5, 7\)",
    ),
    (
        "attention-key-channels",
        lambda: attend(tokens(), tokens(2, 5, 4), tokens(2, 5, 4)),
        V,
        r"key: expected 8 channels last, got shape \(2, 5, 4\)",
    ),
    (
        "attention-batch",
        lambda: attend(tokens(), tokens(3, 5, 8), tokens(3, 5, 8)),
        V,
        r"query, key and value: batches or lengths differ: \(2, 5, 8\), \(3, 5, 8\)",
    ),
    (
        "attention-lengths",
        lambda: attend(tokens(), tokens(2, 4, 8), tokens(2, 5, 8)),
        V,
        "batches or lengths differ",
    ),
    (
        "attention-unbatched-key",
        lambda: attend(tokens(), tokens(5, 8), tokens(5, 8)),
        V,
        "key: expected 3 dimensions like the query, got 2",
    ),
    ("attention-dtype", lambda: attend(tokens().half()), T, "query is torch.float16, the layer"),
    ("attention-integer", lambda: attend(tokens().int()), T, "query is torch.int32, the layer"),
    (
        "attention-device",
        lambda: attend(tokens().to("meta")),
        V,
        "query is on meta, the layer on c",
    ),
    ("attention-array", lambda: attend([1.0]), T, "query: expected a torch.Tensor, got list"),
    (
        "attention-mask-shape",
        lambda: attend(attn_mask=torch.zeros(5, 4, dtype=torch.bool)),
        V,
        r"attn_mask: expected shape \(5, 5\) or \(4, 5, 5\), got \(5, 4\)",
    ),
    (
        "attention-mask-dtype",
        lambda: attend(attn_mask=torch.zeros(5, 5, dtype=torch.long)),
        T,
        "attn_mask: expected bool or floating point, got torch.int64",
    ),
    (
        "attention-mask-device",
        lambda: attend(attn_mask=torch.zeros(5, 5, dtype=torch.bool, device="meta")),
        V,
        "attn_mask is on meta, the layer on cpu",
    ),
    (
        "attention-padding-shape",
        lambda: attend(key_padding_mask=torch.zeros(5, dtype=torch.bool)),
        V,
        r"key_padding_mask: expected shape \(2, 5\), got \(5,\)",
    ),
    (
        "attention-mask-array",
        lambda: attend(attn_mask=[[True]]),
        T,
        "attn_mask: expected a torch.Tensor, got list",
    ),
    (
        "attention-kernel",
        lambda: ConvNNAttention(8, 2, k=3, kernel="max"),
        V,
        "unknown kernel 'max'; expected one of: sum, standard, depthwise, separable",
    ),
    (
        "attention-taps",
        lambda: ConvNNAttention(8, 2, kernel="standard"),
        V,
        "kernel='standard' has one tap a neighbour: pass k=",
    ),
    (
        "attention-taps-window",
        lambda: ConvNNAttention(8, 2, kernel="standard", candidates=Window((3, 3)))(tokens()),
        V,
        "kernel_size: expected 1 integers",
    ),
    (
        "attention-encoding",
        lambda: ConvNNAttention(8, 2, encoding="coordinates", axes=2)(torch.randn(1, 5, 8)),
        V,
        "made for axes=2",
    ),
    (
        "attention-conditional",
        lambda: ConvNNAttention(8, 2, encoding="conditional", axes=2)(tokens()),
        V,
        r"Conditional of 2 axes needs points on such a grid, got a grid of \(5,\)",
    ),
    ("attention-axes", lambda: ConvNNAttention(8, 2, axes=0), V, "axes: expected an integer of at"),
    (
        "attention-window-short",
        lambda: attend(candidates=Window(7, border="shift")),
        V,
        "a window of 7 .* needs an axis of at least 7 points, got 5",
    ),
    (
        "attention-search",
        lambda: ConvNNAttention(8, 2, search="x"),
        V,
        "unknown search backend 'x'",
    ),
    # --- clouds ---
    (
        "cloud-k-0",
        lambda: cloud(points(6, 4), k=0),
        V,
        "k: expected an integer of at least 1, got 0",
    ),
    (
        "cloud-k-many",
        lambda: cloud(points(6, 4), points(), k=7),
        V,
        "k=7 .* larger than the smallest cloud's 6 candidates",
    ),
    (
        "cloud-k-batch",
        lambda: cloud(points(6, 4), points(), torch.tensor([0, 1, 1, 1, 1, 1])),
        V,
        "k=2 .* larger than the smallest cloud's 1 candidates; .* short='pad'",
    ),
    (
        "cloud-batch-second",
        lambda: cloud(torch.zeros(6, 4), torch.zeros(6, dtype=torch.long)),
        T,
        "pos: .*a batch vector; pass it as batch=",
    ),
    (
        "cloud-graph-third",
        lambda: cloud(torch.zeros(6, 4), torch.zeros(6, 3), edges()),
        T,
        "batch: .*a graph; pass it as edge_index=",
    ),
    ("cloud-k-and-selection", lambda: cloud(selection=Radius(1.0, 3)), V, "expected k or a selec"),
    ("cloud-nothing", lambda: cloud(), V, "expected x, pos or both for the source points"),
    ("cloud-rank", lambda: cloud(torch.zeros(1, 6, 4)), V, r"x \(source\): expected 2 dimensions"),
    ("cloud-channels", lambda: cloud(points(6, 3)), V, r"expected 4 channels, got shape \(6, 3\)"),
    (
        "cloud-numbers",
        lambda: cloud(points(6, 4), points(5)),
        V,
        r"x and pos \(source\): numbers of points differ: 6 and 5",
    ),
    (
        "cloud-dtype",
        lambda: cloud(points(6, 4), points().double()),
        T,
        "x is torch.float32 but pos torch.float64",
    ),
    (
        "cloud-layer-dtype",
        lambda: cloud(points(6, 4).double(), points().double()),
        T,
        "the source is torch.float64, the layer torch.float32",
    ),
    ("cloud-integer", lambda: cloud(points(6, 4).long()), T, "expected a floating-point tensor"),
    (
        "cloud-device",
        lambda: cloud(points(6, 4), points().to("meta")),
        V,
        "x is on cpu but pos on meta",
    ),
    (
        "cloud-unsorted",
        lambda: cloud(points(6, 4), points(), torch.tensor([0, 1, 0, 1, 0, 1])),
        V,
        "batch: expected sorted example numbers",
    ),
    (
        "cloud-batch-length",
        lambda: cloud(points(6, 4), points(), torch.tensor([0, 0, 0])),
        V,
        "batch: expected one number a point, got 3 for 6",
    ),
    (
        "cloud-batch-dtype",
        lambda: cloud(points(6, 4), points(), torch.zeros(6)),
        T,
        "batch: expected dtype torch.int64, got torch.float32",
    ),
    (
        "cloud-batch-device",
        lambda: cloud(points(6, 4), points(), torch.zeros(6, dtype=torch.long, device="meta")),
        V,
        "batch is on meta, the points on cpu",
    ),
    (
        "cloud-bipartite-dtype",
        lambda: cloud((points(6, 4), None), (points(), points(2).double())),
        T,
        "the target is torch.float64, the layer torch.float32",
    ),
    (
        "cloud-bipartite-alike",
        lambda: PointConvNN(3, 3, 2, kernel="max")(None, (points(), points(2).double())),
        T,
        r"pos \(source\) is torch.float32 but pos \(target\) torch.float64",
    ),
    (
        "cloud-selection",
        lambda: cloud(selection=3, k=None),
        T,
        "selection: expected an instance of",
    ),
    (
        "cloud-no-position",
        lambda: cloud(points(6, 4)),
        V,
        "positions are needed here, but the points have neither pos nor grid",
    ),
    (
        "cloud-axes",
        lambda: cloud((points(6, 4), None), (points(), points(2, 2))),
        V,
        "positions of targets have 2 axes, of sources 3",
    ),
    (
        "cloud-edges",
        lambda: cloud(points(6, 4), points(), edge_index=torch.zeros(3, 2, dtype=torch.long)),
        V,
        r"edge_index: expected int64 of shape \(2, E\), got torch.int64 of shape \(3, 2\)",
    ),
    (
        "cloud-edges-dtype",
        lambda: cloud(points(6, 4), points(), edge_index=torch.zeros(2, 2)),
        V,
        r"edge_index: expected int64 of shape \(2, E\), got torch.float32",
    ),
    (
        "cloud-edges-many",
        lambda: cloud(points(6, 4), points(), edge_index=edges((0, 1), (2, 1), (3, 1))),
        V,
        "a target has rank 2, but there are only 2 slots",
    ),
    (
        "cloud-edges-range",
        lambda: cloud(points(6, 4), points(), edge_index=edges((0, 1), (9, 1))),
        V,
        "sources are numbered from 0 to 9, but there are 6",
    ),
    ("cloud-search", lambda: cloud(search="octree"), V, "unknown search backend 'octree'"),
    # --- graphs ---
    ("graph-aggr", lambda: NeighborConv(4, 6, 2, aggr=None), V, "aggr: expected 'taps', or a"),
    (
        "graph-decomposed",
        lambda: NeighborConv(4, 6, 2, decomposed_layers=2),
        V,
        "decomposed_layers: the taps take all channels",
    ),
    (
        "graph-weight-other-dtype",
        lambda: graph(None, None, torch.ones(2).double()),
        T,
        "x is torch.float32 but edge_weight torch.float64",
    ),
    (
        "graph-weight-axes",
        lambda: graph(None, None, torch.ones(2, 1, 1)),
        V,
        "edge_weight: expected 1 or 2 dimensions, got 3",
    ),
    ("graph-ranks-list", lambda: graph(rank=[0, 0]), T, "rank: expected a torch.Tensor, got list"),
    (
        "graph-ranks-negative",
        lambda: graph(rank=torch.tensor([-1, 0])),
        V,
        "ranks run from -1 to 0, the layer's k=2 taps from 0 to 1",
    ),
    ("graph-k", lambda: NeighborConv(4, 6, 0), V, "k: expected an integer of at least 1, got 0"),
    ("graph-channels", lambda: graph(torch.zeros(3, 5)), V, r"x: expected 4 channels, got .*3, 5"),
    ("graph-rank", lambda: graph(torch.zeros(1, 3, 4)), V, "x: expected 2 dimensions, got 3"),
    ("graph-dtype", lambda: graph(torch.zeros(3, 4).double()), T, "x is torch.float64, the layer"),
    ("graph-integer", lambda: graph(torch.zeros(3, 4).long()), T, "x: expected a floating-point"),
    (
        "graph-edges",
        lambda: graph(None, torch.zeros(3, 2, dtype=torch.long)),
        V,
        r"edge_index: expected int64 of shape \(2, E\)",
    ),
    (
        "graph-edges-dtype",
        lambda: graph(None, edges().int()),
        V,
        "edge_index: expected int64 of sh",
    ),
    ("graph-edges-device", lambda: graph(None, edges().to("meta")), V, "edge_index is on meta"),
    ("graph-edges-list", lambda: graph(None, [[0], [1]]), T, "edge_index: expected a torch.Tensor"),
    (
        "graph-weight",
        lambda: graph(None, None, torch.ones(3)),
        V,
        "edge_weight: expected one row an",
    ),
    (
        "graph-heads",
        lambda: graph(None, None, torch.ones(2, 3)),
        V,
        "3 heads must divide 4 channels",
    ),
    (
        "graph-rank-length",
        lambda: graph(None, None, rank=torch.zeros(3, dtype=torch.long)),
        V,
        "rank: expected one row an edge, got 3 for 2",
    ),
    (
        "graph-ranks",
        lambda: graph(None, edges((0, 1), (1, 1), (2, 1))),
        V,
        "ranks run from 0 to 2, the layer's k=2 taps from 0 to 1",
    ),
    (
        "graph-rank-dtype",
        lambda: graph(None, None, rank=torch.zeros(2)),
        T,
        "rank: expected dtype torch.int64, got torch.float32",
    ),
    (
        "graph-range",
        lambda: graph(None, edges((0, 7))),
        V,
        "edge_index: targets are numbered from 7 to 7, but there are 3",
    ),
    (
        "graph-weight-dtype",
        lambda: graph(None, None, torch.ones(2, dtype=torch.long)),
        T,
        "edge_weight: expected a floating-point tensor, got torch.int64",
    ),
    ("graph-groups", lambda: graph(groups=4), V, "groups=4 must divide out_channels=6"),
    ("graph-groups-in", lambda: graph(groups=3), V, "groups=3 must divide in_channels=4"),
    ("graph-heads-in", lambda: graph(heads=3), V, "heads=3 must divide in_channels=4"),
    (
        "graph-lazy-groups",
        lambda: NeighborConv(-1, 6, 2, 3)(points(3, 4), edges()),
        V,
        "groups=3 m",
    ),
    (
        "graph-in-channels",
        lambda: NeighborConv(0, 6, 2),
        V,
        "in_channels: expected an integer of at",
    ),
    # --- branching and lowering ---
    (
        "branching-stride",
        lambda: Branching(4, 6, k=3, metric="cosine", stride=2),
        V,
        "both branches keep the image's size; pass no stride",
    ),
    (
        "branching-other",
        lambda: Branching(4, 6, other="linear"),
        V,
        "unknown other branch 'linear'; expected one of: convolution, attention",
    ),
    (
        "branching-pixels",
        lambda: Branching(4, 6, ratio=0, other="attention")(torch.zeros(4, 6)),
        V,
        "PixelAttention input: expected 3 or 4 dimensions, got 2",
    ),
    (
        "branching-none",
        lambda: Branching.of(None, None, None),
        V,
        "expected at least one branch, got",
    ),
    (
        "branching-ratio",
        lambda: Branching(4, 6, ratio=2),
        V,
        r"ratio: expected a number in \[0",
    ),
    (
        "branching-ratio-bool",
        lambda: Branching(4, 6, ratio=True),
        T,
        "ratio: expected a number",
    ),
    ("branching-axes", lambda: Branching(4, 6, axes=0), V, "axes: expected 1, 2 or 3, got 0"),
    ("explain", lambda: lowering.explain(nn.Linear(2, 2)), T, "expected a layer of convnn_geo.nn"),
    # --- metrics, weightings, candidates, encodings ---
    (
        "metric-weight",
        lambda: -1 * metrics.Spatial(),
        V,
        "weight of a metric: .* at least 0, got -1",
    ),
    (
        "metric-weight-nan",
        lambda: NAN * metrics.Spatial(),
        V,
        "weight of a metric: expected a finite number",
    ),
    ("metric-norm", lambda: metrics.Spatial("l3"), V, "unknown norm 'l3'; expected one of: l1"),
    ("metric-p", lambda: metrics.Spatial(0.5), V, "p: expected a finite number of at least 1"),
    ("metric-kind", lambda: metrics.Feature("dots"), V, "unknown kind of feature metric 'dots'"),
    (
        "metric-lam",
        lambda: metrics.PaperMix(1.5),
        V,
        r"lam: expected a number in \[0, 1\], got 1.5",
    ),
    (
        "metric-lam-learnable",
        lambda: metrics.interpolate("spatial", "cosine", -0.1, learnable=True),
        V,
        r"lam: expected a number in \[0, 1\], got -0.1",
    ),
    ("metric-custom", lambda: metrics.Custom(3), T, "expected a function of two Points, got 3"),
    (
        "metric-mahalanobis-channels",
        lambda: near(metric=metrics.Mahalanobis(3), weighting="softmax")(image()),
        V,
        "Mahalanobis: expected features of 3 channels, got 4",
    ),
    (
        "metric-mahalanobis-dtype",
        lambda: near(metric=metrics.Mahalanobis(4).double(), weighting="softmax")(image()),
        T,
        "the input is torch.float32 but the metric Mahalanobis torch.float64; convert one",
    ),
    (
        "metric-bilinear-channels",
        lambda: metrics.Bilinear(4, 3)(Points(points(6, 4))),
        V,
        "Bilinear: expected features of 3 channels, got 4",
    ),
    (
        "metric-query-channels",
        lambda: metrics.Feature(query=nn.Sequential(nn.Linear(3, 2), nn.ReLU()))(
            Points(points(6, 4))
        ),
        V,
        "Feature: query= takes 3 channels, got 4",
    ),
    (
        "metric-key-dtype",
        lambda: metrics.Feature(key=nn.Linear(4, 4).double())(Points(points(6, 4))),
        T,
        "the input is torch.float32 but key= of the metric Feature torch.float64",
    ),
    (
        "metric-custom-shape",
        lambda: metrics.Custom(lambda i, j: (i.x - j.x).abs())(Points(points(6, 4))),
        V,
        r"Custom: expected distances of shape \(..., 6, 6\) from the function, got \(6, 6, 4\)",
    ),
    (
        "metric-custom-pairs",
        lambda: metrics.Custom(lambda i, j: j.x).pairs(
            Points(points(6, 4)), Points(points(6, 4)), torch.zeros(6, 2, dtype=torch.long)
        ),
        V,
        r"expected distances of shape \(..., 6, 2\) from the function, got \(6, 2, 4\)",
    ),
    (
        "metric-custom-number",
        lambda: metrics.Custom(lambda i, j: 1.0)(Points(points(6, 4))),
        T,
        "Custom: expected a tensor from the function, got 1.0",
    ),
    ("softmax-temperature", lambda: weighting.Softmax(0.0), V, "temperature: .* greater than 0"),
    ("gaussian-sigma", lambda: weighting.Gaussian(-1.0), V, "sigma: .* greater than 0, got -1"),
    ("radius", lambda: Radius(-1.0, 3), V, "r: expected a finite number of at least 0, got -1"),
    ("short", lambda: KNearest(3, short="drop"), V, "unknown short 'drop'; expected one of: error"),
    (
        "strided",
        lambda: near(candidates=Strided(7))(image()),
        V,
        "r=7 is over the shortest axis of",
    ),
    ("random", lambda: near(candidates=Random(37))(image()), V, "r=37 candidates asked of 36 sour"),
    (
        "window-border",
        lambda: Window(3, border="wrap"),
        V,
        "unknown border 'wrap'; expected one of",
    ),
    (
        "window-shift",
        lambda: Window(3, padding=1, border="shift"),
        V,
        "takes neither stride nor pad",
    ),
    ("block", lambda: Block(0), V, "size: expected an integer of at least 1, got 0"),
    ("congruent", lambda: Congruent(0), V, "stride: expected an integer of at least 1, got 0"),
    ("fourier", lambda: encodings.Fourier(0), V, "frequencies: expected an integer of at least 1"),
    (
        "rotary",
        lambda: near(metric="dot", encoding=encodings.Rotary())(image(1, 4, 6, 6)[:, :3]),
        V,
        "expected 4 channels, got 3",
    ),
    (
        "rotary-channels",
        lambda: ConvNN2d(3, 6, k=2, metric="dot", encoding="rotary")(image(1, 3, 4, 4)),
        V,
        "Rotary over 2 axes needs a multiple of 4 channels, got 3",
    ),
    # --- search and points ---
    ("knn-k-0", lambda: knn(points(), None, 0), V, "k: expected an integer of at least 1, got 0"),
    ("knn-k-second", lambda: knn(points(), 2), T, "neighbours, k=; pass k=2, it comes third"),
    ("knn-k-tensor", lambda: knn(points(), k=torch.tensor(2)), T, r"k: .*int\(...\) reads it"),
    ("knn-sparse", lambda: knn(points().to_sparse(), k=2), T, r"x: expected a dense .*to_dense"),
    ("knn-numbers", lambda: knn(points()[:, 0], k=2), V, r"one number a point, pass x.unsqueeze"),
    (
        "knn-graph-loop",
        lambda: search.knn_graph(points(), 2, None, torch.zeros(6, dtype=torch.long)),
        T,
        "loop: expected True or False, got Tensor; batch comes third",
    ),
    ("knn-graph-loop-name", lambda: search.knn_graph(points(), 2, loop="no"), T, "loop: .*got str"),
    (
        "radius-tensor",
        lambda: search.radius(points(), None, torch.tensor(1.0)),
        T,
        r"r: expected a number.*float\(...\) reads it",
    ),
    (
        "neighbor-graph-distance",
        lambda: NeighborGraph(3, max_distance="a"),
        T,
        "max_distance: expected a number, got 'a'",
    ),
    ("knn-no-axes", lambda: knn(points()[:, :0], k=2), V, "at least one dimension a point, got"),
    (
        "knn-batch-third",
        lambda: knn(points(), None, torch.zeros(4)),
        T,
        r"got a tensor of shape \(4,\)",
    ),
    ("knn-no-k", lambda: knn(points(), points()), T, "expected the number of neighbours, k="),
    ("knn-unpacked", lambda: tuple(knn(points(), k=2)), T, "take .index and .distance"),
    (
        "explain-search-k-over",
        lambda: search.explain_search(points(4), k=4, self_point="excluded"),
        V,
        "k=4 is larger than the number of candidates, 3 besides the point itself",
    ),
    ("explain-search-k", lambda: search.explain_search(points(), k=0), V, "at least 1, got 0"),
    ("knn-k-float", lambda: knn(points(), None, 2.0), T, "k: expected an integer, got 2.0"),
    (
        "knn-k-many",
        lambda: knn(points(), None, 7),
        V,
        "k=7 is larger than the number of candidates",
    ),
    (
        "knn-nan",
        lambda: knn(points() * NAN, None, 2),
        V,
        "x: expected finite values, got 18 that are",
    ),
    (
        "knn-inf",
        lambda: knn(points(), points().clone().fill_(torch.inf), 2),
        V,
        "y: expected finite values, got 18 that are NaN or infinite .* pass check=False",
    ),
    (
        "knn-integer",
        lambda: knn(points().long(), None, 2),
        T,
        "x: expected a floating-point tensor",
    ),
    ("knn-dtype", lambda: knn(points(), points().double(), 2), T, "x is torch.float32 but y torch"),
    ("knn-device", lambda: knn(points(), points().to("meta"), 2), V, "x is on cpu but y on meta"),
    (
        "knn-dimensions",
        lambda: knn(points(), points(6, 2), 2),
        V,
        "dimensions differ: 3 in x, 2 in y",
    ),
    (
        "knn-unsorted",
        lambda: knn(points(4), None, 1, torch.tensor([1, 0, 1, 0])),
        V,
        "batch_x: expected sorted example numbers",
    ),
    (
        "knn-backend",
        lambda: knn(points(), None, 2, backend="x"),
        V,
        "unknown search backend 'x'; exp",
    ),
    (
        "knn-metric",
        lambda: knn(points(), None, 2, metric="x"),
        V,
        "unknown metric 'x'; expected a Met",
    ),
    ("points-none", lambda: Points(), V, "expected features x, positions pos or a grid, got none"),
    ("points-numbers", lambda: Points(points(6), points(5)), V, "numbers of points differ: .*6.*5"),
    (
        "neighborhood-rank",
        lambda: Neighborhood.from_edge_index(edges((0, 0), (1, 0)), 1, 2, k=1),
        V,
        "a target has rank 1, but there are only 1 slots",
    ),
    # --- recipes ---
    (
        "recipe-even-window",
        lambda: recipes.conv2d_by_position(4, 6, 4),
        V,
        r"odd sides only, got \(4, 4\); use the plain convolution recipe",
    ),
    (
        "recipe-even-side",
        lambda: recipes.interpolated_conv2d(4, 6, (3, 2)),
        V,
        r"odd sides only, got \(3, 2\)",
    ),
    (
        "recipe-lam",
        lambda: recipes.interpolated_conv2d(4, 6, lam=1.01),
        V,
        r"lam: expected a number in \[0, 1\], got 1.01",
    ),
    (
        "recipe-patch",
        lambda: recipes.non_local_means(1.0, 2),
        V,
        "patch_size: expected an odd number",
    ),
    (
        "recipe-filter",
        lambda: recipes.bilateral_filter(0.0, 1.0),
        V,
        "sigma_space: .* greater than 0",
    ),
    (
        "recipe-even-attention",
        lambda: recipes.sliding_window_attention(8, 2, 4),
        V,
        "kernel_size: a window around the query has odd sides, got 4",
    ),
    (
        "recipe-kvt",
        lambda: recipes.kvt(8, 2, k=0),
        V,
        "k: expected an integer of at least 1, got 0",
    ),
    (
        "recipe-plane",
        lambda: recipes.point_transformer(8, 8, k=4)(torch.zeros(9, 8), torch.zeros(9, 2)),
        V,
        "takes 3 channels, but offset has 2; .*axes=",
    ),
    (
        "recipe-plane-edges",
        lambda: recipes.set_abstraction(8, 8, r=1.0)(torch.zeros(9, 8), torch.zeros(9, 2)),
        V,
        r"takes 11 channels, but source \+ offset has 10",
    ),
    (
        "recipe-lazy",
        lambda: recipes.point_transformer(-1, 8),
        V,
        "in_channels: expected an integer of at least 1, got -1",
    ),
    (
        "recipe-pair",
        lambda: recipes.dynamic_edge_conv((8, 3), 8, k=3),
        T,
        "in_channels: expected an integer",
    ),
    (
        "temperature-parameter",
        lambda: weighting.Softmax(nn.Parameter(torch.ones(()))),
        T,
        "it is fixed, and what is to learn needs a part of your own",
    ),
    (
        "metric-parameter",
        lambda: nn.Parameter(torch.ones(())) * metrics.Spatial(),
        T,
        "weights of a sum of metrics are numbers, and fixed; one that learns is that of",
    ),
    (
        "graph-matrix",
        lambda: graph(None, torch.eye(3).to_sparse()),
        T,
        r"expected edges of shape \(2, E\), got a matrix of torch.sparse_coo",
    ),
]


@pytest.mark.parametrize(
    "call, error, message", [row[1:] for row in TABLE], ids=[r[0] for r in TABLE]
)
def test_bad_input(call: Callable[[], object], error: type[Exception], message: str):
    with pytest.raises(Exception, match=message) as caught:
        call()
    assert type(caught.value) is error
    # Ours, and not what torch or Python found out on the way.
    package = Path(convnn_geo.__file__).parent
    last = Path(traceback.extract_tb(caught.value.__traceback__)[-1].filename)
    assert package in last.parents


def test_the_table_is_a_table():
    ids = [row[0] for row in TABLE]
    assert len(ids) == len(set(ids)) >= 45


@pytest.mark.parametrize("n", [0, 1])
def test_meaningful_emptiness_is_no_error(n: int):
    """No examples and no targets give no output."""
    assert conv(4, 6, 3)(image(n, 4, 6, 6)).shape == (n, 6, 4, 4)
    assert near()(image(n, 4, 6, 6)).shape == (n, 6, 6, 6)
    assert attend(tokens(n, 5, 8))[0].shape == (n, 5, 8)
    assert attend(tokens(n, 5, 8), k=2)[0].shape == (n, 5, 8)
    assert attend(tokens(2, n, 8), tokens(), tokens())[0].shape == (2, n, 8)
    assert attend(tokens(2, n, 8), tokens(), tokens(), k=2)[0].shape == (2, n, 8)
    assert cloud((points(6, 4), None), (points(), points(n))).shape == (n, 5)
    assert graph(torch.zeros(n, 4), torch.zeros(2, 0, dtype=torch.long)).shape == (n, 6)
    assert knn(points(), points(n), 2).index.shape == (n, 2)


def test_non_finite_values_pass_where_told():
    x = points()
    x[0] = NAN
    assert knn(x, None, 2, check=False).index.shape == (6, 2)


def test_every_engine_is_named_by_the_error():
    with pytest.raises(ValueError) as caught:
        near(search="none")
    assert all(name in str(caught.value) for name in search.ENGINES)


def test_missing_digits_are_told_both_ways_to_come(tmp_path):
    pytest.importorskip("torchvision")
    with pytest.raises(FileNotFoundError, match=r"--download.*mnist\.npz with x_train, .* will do"):
        mnist_task(tmp_path)
