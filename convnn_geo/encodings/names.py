"""Encodings by name."""

from __future__ import annotations

from convnn_geo.checks import check_name
from convnn_geo.encodings.base import (
    Conditional,
    Coordinates,
    Encoding,
    Fourier,
    LearnedAbsolute,
)
from convnn_geo.encodings.rotary import Rotary

_KNOWN = ("coordinates", "fourier", "learned", "rotary", "conditional")


def encoding_names() -> list[str]:
    """Names that :func:`as_encoding` knows."""
    return sorted(_KNOWN)


def as_encoding(
    encoding: Encoding | str | None, channels: int, axes: int, size: tuple[int, ...] | None = None
) -> Encoding | None:
    """Resolve a name or an instance; ``"learned"`` needs an instance, since it needs a size."""
    if encoding is None or isinstance(encoding, Encoding):
        return encoding
    name = check_name("encoding", encoding, _KNOWN)
    if name == "learned":
        if size is None:
            raise ValueError(
                "encoding='learned' needs a size: pass LearnedAbsolute(channels, size)"
            )
        return LearnedAbsolute(channels, size)
    if name == "conditional":
        return Conditional(channels, axes)
    if name == "rotary":
        return Rotary()
    return Coordinates() if name == "coordinates" else Fourier()
