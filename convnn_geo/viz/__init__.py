"""Pictures: who the neighbours of a pixel are, and how a network does along the spectrum.

Needs the extra ``viz`` (matplotlib). Every function returns a Figure and touches no global state:
nothing is shown, and ``figure.savefig(path)`` works on machines without a display.

Example:
    >>> import torch
    >>> from convnn_geo.points import Points
    >>> from convnn_geo.search import knn
    >>> image = torch.rand(3, 6, 8)
    >>> pixels = Points.from_image(image[None]).with_x(None)
    >>> nearest = knn(pixels, Points(pos=torch.tensor([[2.0, 3.0]])), k=5, metric="spatial")
    >>> figure = draw_neighbors(image, [(2, 3)], [nearest], ["the 5 nearest"])
"""

from convnn_geo.viz.clouds import draw_clouds
from convnn_geo.viz.colors import COLORS
from convnn_geo.viz.neighbors import draw_neighbors
from convnn_geo.viz.spectrum import mean_deviation, plot_spectrum

__all__ = ["COLORS", "draw_clouds", "draw_neighbors", "mean_deviation", "plot_spectrum"]
