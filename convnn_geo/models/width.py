"""How wide a model is."""

from __future__ import annotations

from collections.abc import Sequence

from convnn_geo.checks import check_number

_WIDEST = 16


def scaled(channels: Sequence[int], width: float) -> list[int]:
    """Numbers of channels times ``width``, rounded, at least 1.

    Args:
        channels: at width 1.
        width: factor, greater than 0, at most 16.

    Example:
        >>> scaled([64, 128], 0.25), scaled([3], 0.1)
        ([16, 32], [1])
    """
    if check_number("width", width, exclusive=True) > _WIDEST:
        raise ValueError(
            f"width: expected a factor of the model's channels, at most {_WIDEST}, got {width}"
        )
    return [max(1, round(c * width)) for c in channels]
