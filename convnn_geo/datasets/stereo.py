"""A room as a coloured point cloud: the motorcycle of Middlebury's stereo pairs."""

from __future__ import annotations

import importlib.resources

import numpy as np
import torch
from torch_geometric.data import Data

from convnn_geo.checks import check_tuple
from convnn_geo.datasets.photographs import photograph
from convnn_geo.extras import require
from convnn_geo.typing import Size

# Of the images as scikit-image ships them, from its documentation of data.stereo_motorcycle.
FOCAL_LENGTH = 994.978  # pixels
PRINCIPAL_POINT = (254.877, 311.193)  # of the left camera: row, column
PRINCIPAL_OFFSET = 31.086  # columns by which the right camera's lies further right
BASELINE = 0.193001  # metres between the cameras


def motorcycle_cloud(stride: Size = 1) -> Data:
    r"""A motorcycle in a workshop, 343 274 coloured points in metres.

    Every pixel of the left image whose disparity :math:`\delta` is known, back through the camera:

    .. math:: z = \frac{f \, b}{\delta + o}, \quad
        (x, y, z) = \left(\frac{c - c_0}{f} z, \frac{r - r_0}{f} z, z\right)

    with focal length :math:`f`, baseline :math:`b`, principal point :math:`(r_0, c_0)`, and the
    cameras' principal points :math:`o` columns apart. Positions are what the camera sees: right,
    down, forward. Pixels without disparity, in a margin or seen by one camera only, are left out.

    From the Middlebury benchmark of 2014 (Scharstein et al., "High-resolution stereo datasets with
    subpixel-accurate ground truth", GCPR 2014), at a quarter of its size, as in scikit-image.

    Args:
        stride: take every ``stride``-th row and column only; an integer or (row, col).

    Shapes:
        - **x:** :math:`(n, 3)`, red, green and blue in [0, 1]
        - **pos:** :math:`(n, 3)`, right, down and forward of the camera, in metres

    Raises:
        MissingExtraError: scikit-image is not installed.
        ValueError: stride < 1.

    Example:
        >>> motorcycle_cloud(stride=8)
        Data(x=[5442, 3], pos=[5442, 3])
    """
    steps = check_tuple("stride", stride, 2)
    require("skimage", extra="data")
    file = importlib.resources.files("skimage").joinpath("data/motorcycle_disp.npz")
    with importlib.resources.as_file(file) as path, np.load(path) as arrays:
        disparity = torch.from_numpy(arrays["arr_0"]).double()[:: steps[0], :: steps[1]]
    image = photograph("motorcycle")[:, :: steps[0], :: steps[1]]
    known = disparity.isfinite()
    forward = FOCAL_LENGTH * BASELINE / (disparity[known] + PRINCIPAL_OFFSET)
    row, column = (
        (index * step - centre) / FOCAL_LENGTH * forward
        for index, step, centre in zip(
            known.nonzero(as_tuple=True), steps, PRINCIPAL_POINT, strict=True
        )
    )
    pos = torch.stack([column, row, forward], -1).float()
    return Data(x=image.permute(1, 2, 0)[known], pos=pos)
