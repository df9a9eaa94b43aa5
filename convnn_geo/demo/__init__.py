"""A demonstration on real data that ships with packages: ``python -m convnn_geo demo``."""

from convnn_geo.demo.run import Demonstration, run

__all__ = ["Demonstration", "run"]
