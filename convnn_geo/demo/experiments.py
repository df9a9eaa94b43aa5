"""Which networks are trained on what."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from convnn_geo.datasets import digit_clouds, digits
from convnn_geo.demo import clouds, spectrum
from convnn_geo.demo.training import Network, Settings, Splits

_PROTOCOL = (
    "Every network is trained alike; its learning rate is chosen on the validation part with the "
    "first seed; the test part is read once, after the last epoch. Small networks and few epochs: "
    "a demonstration, no benchmark."
)


@dataclass(frozen=True)
class Experiment:
    """Networks to be compared on the same data.

    Args:
        name: in files and tables.
        title: above pictures and tables.
        what: is compared, in words.
        load: gives the data.
        networks: to be compared.
        settings: of the training.
    """

    name: str
    title: str
    what: str
    load: Callable[[], Splits]
    networks: Sequence[Network]
    settings: Settings


def experiments(lams: Sequence[float], seeds: int = 3, quick: bool = False) -> list[Experiment]:
    """Digits as images, then as point clouds.

    Args:
        lams: points of the spectrum.
        seeds: runs of each network.
        quick: train on little data, for two epochs.
    """
    images = Settings(seeds=tuple(range(seeds)))
    points = replace(images, epochs=3)
    if quick:
        images = points = replace(images, epochs=2, rates=(0.03,), train_size=200)
    return [
        Experiment(
            "spectrum",
            "Digits as images",
            "1797 handwritten digits of 8 × 8 pixels. One small network whose two mixing layers "
            "have nine taps on the nine nearest pixels, by (1 − λ) · Chebyshev distance + "
            "λ · cosine distance, a side of the image counting 1, beside plain convolution (which "
            "λ = 0 is, up to rounding errors that grow during training) and plain attention with "
            "about as many parameters. "
            f"{_PROTOCOL}",
            digits,
            spectrum.networks(lams),
            images,
        ),
        Experiment(
            "clouds",
            "Digits as point clouds",
            "The same digits as points (row, column, ink), one for each pixel with ink: 16 to 42 "
            "a digit. Two layers of PointConvNN on the nine nearest points, by (1 − λ) · Euclidean "
            "distance of positions, in sides of the image, + λ · cosine distance of features, "
            f"beside the same network whose points stand alone. {_PROTOCOL}",
            digit_clouds,
            clouds.networks(lams),
            points,
        ),
    ]
