r"""convnn_geo: convolution, attention and everything between, as one choice of neighbours.

The pipeline, stage by stage; each module hands a small value to the next::

    points -> metrics -> candidates -> search, selection -> neighborhood
           -> weighting -> kernels -> operation -> lowering -> nn -> recipes -> convert -> models

A layer turns its input into points, measures how near they are, looks among candidates, keeps the
nearest, weighs them and applies a kernel:

.. math:: y_i = \sum_j W_j\, \rho(s_i)_j\, v_{I_i(j)} + b

Convolution measures positions, attention measures features; ``metrics.interpolate`` lies between.
See "Interpolation between Convolution and Attention via K-Nearest Neighbors"
(https://arxiv.org/abs/2606.14725).

Example:
    >>> import torch
    >>> import convnn_geo as cg
    >>> metric = 0.3 * cg.metrics.Spatial() + 0.7 * cg.metrics.Feature("cosine")
    >>> layer = cg.nn.ConvNN2d(3, 8, k=9, metric=metric)
    >>> layer(torch.zeros(1, 3, 8, 8)).shape
    torch.Size([1, 8, 8, 8])
"""

from convnn_geo import (
    candidates,
    convert,
    encodings,
    kernels,
    lowering,
    metrics,
    models,
    nn,
    recipes,
    search,
    selection,
    weighting,
)
from convnn_geo.checks import checking
from convnn_geo.neighborhood import Neighborhood
from convnn_geo.points import Grid, Points

__version__ = "0.1.0"

__all__ = [
    "Grid",
    "Neighborhood",
    "Points",
    "__version__",
    "candidates",
    "checking",
    "convert",
    "encodings",
    "kernels",
    "lowering",
    "metrics",
    "models",
    "nn",
    "recipes",
    "search",
    "selection",
    "weighting",
]
