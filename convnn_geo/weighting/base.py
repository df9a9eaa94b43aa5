"""Weightings: functions of distance. All fall as the distance grows."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convnn_geo.checks import check_number
from convnn_geo.pairs import Pairs


class Weighting(nn.Module, ABC):
    """Weights of chosen pairs, ``rho(s_i)``."""

    uses_distance = True
    """Whether the weights depend on distances, so that the metric learns through them."""
    uses_offset = False
    """Whether the weights depend on relative positions."""

    @abstractmethod
    def forward(self, pairs: Pairs) -> Tensor | None:
        """Weights ``(..., n, k)``, or ``(..., n, k, c)`` for one a channel; None for ones.

        Empty slots weigh 0.
        """


class Ones(Weighting):
    """Every neighbour counts 1."""

    uses_distance = False

    def forward(self, pairs: Pairs) -> Tensor | None:
        """None, or the mask where some slots are empty."""
        return None if pairs.mask is None else pairs.mask.to(pairs.value.dtype)


class Softmax(Weighting):
    """``softmax(-d / temperature)`` over the neighbours of a target.

    Args:
        temperature: positive number.
        dropout: probability of dropping a weight in training, as in attention.
    """

    def __init__(self, temperature: float = 1.0, dropout: float = 0.0) -> None:
        super().__init__()
        self.temperature = check_number("temperature", temperature, exclusive=True)
        self.dropout = check_number("dropout", dropout, maximum=1)

    def forward(self, pairs: Pairs) -> Tensor:
        """Softmax in the distances' precision; a target without neighbours gets zeros."""
        weight = _softmax(-pairs.distance / self.temperature, pairs.mask)
        return F.dropout(weight.to(pairs.value.dtype), self.dropout, self.training)

    def extra_repr(self) -> str:
        return f"temperature={self.temperature:g}, dropout={self.dropout:g}"


def _softmax(score: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax over filled slots; zeros, with zero gradient, where a target has none."""
    if mask is None:
        return score.softmax(-1)
    score = score.masked_fill(~mask, -torch.inf)
    # A row of -inf alone has no softmax: zeros in its place keep its gradient 0.
    return score.masked_fill(~mask.any(-1, keepdim=True), 0.0).softmax(-1) * mask


class MeanOneSoftmax(Weighting):
    """``k softmax(-d)`` over the neighbours of a target: weights whose mean is 1.

    With them a convolution of ``k`` taps keeps its scale, and its metric gets a gradient.

    Example:
        >>> MeanOneSoftmax()
        MeanOneSoftmax(
          (softmax): Softmax(temperature=1, dropout=0)
        )
    """

    def __init__(self) -> None:
        super().__init__()
        self.softmax = Softmax()

    def forward(self, pairs: Pairs) -> Tensor:
        """The softmax times the slots of a target."""
        return self.softmax(pairs) * pairs.neighborhood.k


class Gaussian(Weighting):
    """``exp(-d^2 / (2 sigma^2))``, optionally normalised.

    Metrics that take a root, as ``"spatial"`` and ``"euclidean"`` do, are squared; what others give
    (``"squared_euclidean"``, ``"cosine"``, mixtures with such) counts as squared.

    Args:
        sigma: standard deviation, in the unit of the distance before squaring.
        normalize: divide by the sum over the neighbours, as non-local means does.
    """

    def __init__(self, sigma: float = 1.0, normalize: bool = False) -> None:
        super().__init__()
        self.sigma, self.normalize = check_number("sigma", sigma, exclusive=True), normalize

    def forward(self, pairs: Pairs) -> Tensor:
        """Gaussian of the distance."""
        exponent = -pairs.squared_distance / (2 * self.sigma**2)
        if self.normalize:
            weight = _softmax(exponent, pairs.mask)
        elif pairs.mask is None:
            weight = exponent.exp()
        else:  # hidden before exp, which might overflow there
            weight = exponent.masked_fill(~pairs.mask, -torch.inf).exp()
        return weight.to(pairs.value.dtype)

    def extra_repr(self) -> str:
        return f"sigma={self.sigma:g}, normalize={self.normalize}"


class InverseDistance(Weighting):
    """``1 / (d + eps)``, normalised over the neighbours, as point interpolation does.

    Args:
        eps: keeps the weight of a coincident point finite.
    """

    def __init__(self, eps: float = 1e-8) -> None:
        super().__init__()
        self.eps = check_number("eps", eps, exclusive=True)

    def forward(self, pairs: Pairs) -> Tensor:
        """Normalised inverse distances."""
        distance = pairs.distance.clamp_min(0.0)  # none is nearer than a coincident point
        if pairs.mask is not None:
            distance = distance.masked_fill(~pairs.mask, torch.inf)
        weight = 1 / (distance + self.eps)
        total = weight.sum(-1, keepdim=True)
        return (weight / torch.where(total == 0, 1.0, total)).to(pairs.value.dtype)

    def extra_repr(self) -> str:
        return f"eps={self.eps:g}"


class Similarity(Weighting):
    """The similarity itself: a dot product, a cosine, or minus a distance."""

    def forward(self, pairs: Pairs) -> Tensor:
        """Similarities."""
        weight = pairs.similarity
        if pairs.mask is not None:
            weight = torch.where(pairs.mask, weight, 0.0)
        return weight.to(pairs.value.dtype)


_RESOLVER: dict[str, type[Weighting]] = {
    "gaussian": Gaussian,
    "inverse_distance": InverseDistance,
    "ones": Ones,
    "similarity": Similarity,
    "softmax": Softmax,
}


def weighting_names() -> list[str]:
    """Names that :func:`as_weighting` knows."""
    return sorted(_RESOLVER)


def as_weighting(weighting: Weighting | str | type[Weighting]) -> Weighting:
    """Resolve a name, a class or an instance.

    Example:
        >>> as_weighting("softmax")
        Softmax(temperature=1, dropout=0)
    """
    if isinstance(weighting, Weighting):
        return weighting
    if isinstance(weighting, type) and issubclass(weighting, Weighting):
        return weighting()
    if isinstance(weighting, str) and weighting in _RESOLVER:
        return _RESOLVER[weighting]()
    raise ValueError(
        f"unknown weighting {weighting!r}; expected a Weighting or one of: "
        f"{', '.join(weighting_names())}"
    )
