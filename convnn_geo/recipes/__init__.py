"""Every special case as one line: convolution, attention, and their relatives.

Example:
    >>> from convnn_geo import recipes
    >>> len(recipes.names()) >= 30
    True
    >>> recipes.kvt(64, 8, k=16).k
    16
"""

from convnn_geo.recipes.attention import (
    block_attention,
    causal_attention,
    dilated_attention,
    interpolated_attention,
    kvt,
    multihead_attention,
    neighborhood_attention,
    sliding_window_attention,
    strided_attention,
)
from convnn_geo.recipes.convolution import (
    avg_pool1d,
    avg_pool2d,
    avg_pool3d,
    bilateral_filter,
    conv1d,
    conv1d_by_position,
    conv2d,
    conv2d_by_position,
    conv3d,
    conv3d_by_position,
    depthwise_conv1d,
    depthwise_conv2d,
    depthwise_conv3d,
    feature_conv2d,
    interpolated_conv2d,
    max_pool1d,
    max_pool2d,
    max_pool3d,
    non_local_means,
    separable_conv1d,
    separable_conv2d,
    separable_conv3d,
)
from convnn_geo.recipes.graph import (
    dynamic_edge_conv,
    edge_conv,
    grav_net,
    point_conv,
    point_transformer,
    set_abstraction,
    vig,
)
from convnn_geo.recipes.registry import names

__all__ = [
    "avg_pool1d",
    "avg_pool2d",
    "avg_pool3d",
    "bilateral_filter",
    "block_attention",
    "causal_attention",
    "conv1d",
    "conv1d_by_position",
    "conv2d",
    "conv2d_by_position",
    "conv3d",
    "conv3d_by_position",
    "depthwise_conv1d",
    "depthwise_conv2d",
    "depthwise_conv3d",
    "dilated_attention",
    "dynamic_edge_conv",
    "edge_conv",
    "feature_conv2d",
    "grav_net",
    "interpolated_attention",
    "interpolated_conv2d",
    "kvt",
    "max_pool1d",
    "max_pool2d",
    "max_pool3d",
    "multihead_attention",
    "names",
    "neighborhood_attention",
    "non_local_means",
    "point_conv",
    "point_transformer",
    "separable_conv1d",
    "separable_conv2d",
    "separable_conv3d",
    "set_abstraction",
    "sliding_window_attention",
    "strided_attention",
    "vig",
]
