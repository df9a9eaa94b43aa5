"""Our convolutions, by the axes that they run along."""

from __future__ import annotations

from typing import Any

from convnn_geo.nn.conv import ConvNN1d, ConvNN2d, ConvNN3d

CONVNN: dict[int, type[Any]] = {1: ConvNN1d, 2: ConvNN2d, 3: ConvNN3d}
