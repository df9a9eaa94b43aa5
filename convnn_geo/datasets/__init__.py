"""Real data that ships inside packages: nothing is downloaded.

Needs the extra ``data`` (scikit-learn and scikit-image).

Example:
    >>> from convnn_geo.datasets import digits
    >>> digits().train.x.shape
    torch.Size([1078, 1, 8, 8])
"""

from convnn_geo.datasets.clouds import CloudSplit, CloudSplits, digit_clouds
from convnn_geo.datasets.digits import ImageSplit, ImageSplits, digits
from convnn_geo.datasets.photographs import photograph, photographs, read_image, resize
from convnn_geo.datasets.stereo import motorcycle_cloud

__all__ = [
    "CloudSplit",
    "CloudSplits",
    "ImageSplit",
    "ImageSplits",
    "digit_clouds",
    "digits",
    "motorcycle_cloud",
    "photograph",
    "photographs",
    "read_image",
    "resize",
]
