"""Positional encodings: modules from points to points that compose with any layer."""

from convnn_geo.encodings.base import (
    Conditional,
    Coordinates,
    Encoding,
    Fourier,
    LearnedAbsolute,
)
from convnn_geo.encodings.names import as_encoding, encoding_names
from convnn_geo.encodings.rotary import Rotary

__all__ = [
    "Conditional",
    "Coordinates",
    "Encoding",
    "Fourier",
    "LearnedAbsolute",
    "Rotary",
    "as_encoding",
    "encoding_names",
]
