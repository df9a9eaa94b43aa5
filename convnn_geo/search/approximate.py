"""Engines that may miss neighbours: what they find is measured and ordered as everywhere."""

from __future__ import annotations

import torch
from torch import Tensor

from convnn_geo.search.points import PointEngine
from convnn_geo.search.problem import Problem


class ApproximateEngine(PointEngine):
    """Proposals are taken as they are. Never chosen by ``backend="auto"``."""

    approximate = True

    def unsure(
        self, problem: Problem, q: Tensor, keys: Tensor, farthest: Tensor, last: Tensor
    ) -> Tensor:
        """Only targets for which fewer than k were proposed."""
        return last == torch.inf
