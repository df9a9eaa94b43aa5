"""Layers of any torch model replaced by ours, weights carried over, and moved along the spectrum.

Example:
    >>> import torch
    >>> from torch import nn
    >>> from convnn_geo import convert
    >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 3))
    >>> x = torch.randn(1, 3, 8, 8)
    >>> before = model(x)
    >>> torch.allclose(convert.to_convnn(model)(x), before, atol=1e-5)
    True
    >>> convert.set_interpolation(model, 0.5)
    ['0', '2']
"""

from convnn_geo.convert.attention import TimmAttention, original_state_dict
from convnn_geo.convert.edge import DynamicEdgeConvNN
from convnn_geo.convert.nearest_keys import NearestKeys
from convnn_geo.convert.patches import PatchCandidates, PatchConv
from convnn_geo.convert.positions import PatchPositions
from convnn_geo.convert.replace import to_convnn
from convnn_geo.convert.rules import Rule
from convnn_geo.convert.specs import Spec, spec, spec_names, spec_options
from convnn_geo.convert.spectrum import MeanOneSoftmax, interpolation, set_interpolation
from convnn_geo.convert.summary import Line, Report, report
from convnn_geo.convert.tokens import TimmTokens
from convnn_geo.convert.weights import NotApplicable

__all__ = [
    "DynamicEdgeConvNN",
    "Line",
    "MeanOneSoftmax",
    "NearestKeys",
    "NotApplicable",
    "PatchCandidates",
    "PatchConv",
    "PatchPositions",
    "Report",
    "Rule",
    "Spec",
    "TimmAttention",
    "TimmTokens",
    "interpolation",
    "original_state_dict",
    "report",
    "set_interpolation",
    "spec",
    "spec_names",
    "spec_options",
    "to_convnn",
]
