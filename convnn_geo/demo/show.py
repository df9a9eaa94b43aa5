"""One picture of neighbours, on a photograph of the user's own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from convnn_geo import datasets, viz
from convnn_geo.demo import neighbors

_SHARP = 1024
"""Width of the photograph that is drawn on, at most."""


def show(
    out: str | Path,
    image: str | Path | None = None,
    pixels: Sequence[tuple[int, int]] = (),
    points: int = 5,
    k: int = neighbors.NEIGHBORS,
    width: int = neighbors.WIDTH,
) -> None:
    """Draw the neighbours of pixels from pure position to pure feature.

    Args:
        out: the picture to write.
        image: a picture file; None for a photograph that is shipped.
        pixels: (row, column) in the picture; by default its middle, or three of the photograph that
            is shipped.
        points: panels, from position to feature.
        k: neighbours.
        width: the search runs on a copy this wide, so that neighbours are large enough to see.

    Raises:
        ValueError: pixels outside the picture, fewer than two points, more neighbours than
            pixels, or a format that can't be written.
        OSError: a file that can't be read or written.
        MissingExtraError: an extra is not installed.
    """
    lams = neighbors.spectrum(points)
    named = {f"pixel ({row}, {column})": (row, column) for row, column in pixels}
    if image is None:
        photo = datasets.photograph(neighbors.PHOTOGRAPH)
        named = named or neighbors.PIXELS
    else:
        photo = datasets.read_image(image)
        named = named or {"the middle": (photo.shape[1] // 2, photo.shape[2] // 2)}
    small = datasets.resize(photo, min(width, photo.shape[2]))
    places = [neighbors.shrink(pixel, photo, small) for pixel in named.values()]
    hoods = neighbors.along_spectrum(small, places, k, lams)
    figure = viz.draw_neighbors(
        small,
        places,
        hoods,
        [neighbors.panel_title(lam) for lam in lams],
        names=list(named),
        backdrop=datasets.resize(photo, min(_SHARP, photo.shape[2])),
    )
    figure.savefig(out)
