"""Whom to keep of the candidates."""

from convnn_geo.selection.base import Every, Given, KNearest, Radius, Selection

__all__ = ["Every", "Given", "KNearest", "Radius", "Selection"]
