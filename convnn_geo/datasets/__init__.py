"""Real data: some ships inside packages, some is downloaded where asked, by :func:`load`.

What ships needs the extra ``data`` (scikit-learn and scikit-image), CIFAR and ImageNet ``vision``
(torchvision).

Example:
    >>> from convnn_geo.datasets import digits, load
    >>> digits().train.x.shape
    torch.Size([1078, 1, 8, 8])
    >>> load("digits", image_size=32).train[0][0].shape
    torch.Size([1, 32, 32])
"""

from convnn_geo.datasets.clouds import CloudSplit, CloudSplits, digit_clouds
from convnn_geo.datasets.digits import ImageSplit, ImageSplits, digits
from convnn_geo.datasets.load import data_names, load
from convnn_geo.datasets.patches import photograph_patches
from convnn_geo.datasets.photographs import photograph, photographs, read_image, resize
from convnn_geo.datasets.stereo import motorcycle_cloud
from convnn_geo.datasets.task import Task

__all__ = [
    "CloudSplit",
    "CloudSplits",
    "ImageSplit",
    "ImageSplits",
    "Task",
    "data_names",
    "digit_clouds",
    "digits",
    "load",
    "motorcycle_cloud",
    "photograph",
    "photograph_patches",
    "photographs",
    "read_image",
    "resize",
]
