"""Where a target may look: everywhere, in a window, in a sample, in a pattern."""

from convnn_geo.candidates.base import All, Both, Candidates, Subset
from convnn_geo.candidates.pattern import Block, Causal, Congruent
from convnn_geo.candidates.sampled import Random, Strided
from convnn_geo.candidates.window import PADDING_MODES, Window

__all__ = [
    "PADDING_MODES",
    "All",
    "Block",
    "Both",
    "Candidates",
    "Causal",
    "Congruent",
    "Random",
    "Strided",
    "Subset",
    "Window",
]
