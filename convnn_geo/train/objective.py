"""What is minimised and what is scored, for each kind of task."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Objective:
    """Loss and score of single items: examples, or the points of clouds that are segmented.

    Args:
        score: its name.
        loss: (output, target) -> ``(n,)``.
        scores: (output, target) -> ``(n,)``, higher is better.
    """

    score: str
    loss: Callable[[Tensor, Tensor], Tensor]
    scores: Callable[[Tensor, Tensor], Tensor]


def objective(kind: str, label_smoothing: float = 0.0) -> Objective:
    """The objective of a kind of task: cross entropy and accuracy, or squared error and PSNR.

    Args:
        kind: of :class:`convnn_geo.datasets.Task`.
        label_smoothing: share of the target spread over all classes.

    Example:
        >>> target = torch.tensor([0, 1])
        >>> output = torch.tensor([[2.0, 0.0], [2.0, 0.0]])
        >>> objective("classification").scores(output, target)
        tensor([1., 0.])
    """
    if kind == "denoising":
        return Objective("psnr", squared_error, psnr)

    def cross_entropy(output: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(output, target, reduction="none", label_smoothing=label_smoothing)

    return Objective("accuracy", cross_entropy, right)


def squared_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean squared error of each image, ``(n,)``."""
    return (output - target).square().flatten(1).mean(1)


def psnr(output: Tensor, target: Tensor) -> Tensor:
    r"""Peak signal-to-noise ratio of each image in decibels, its range being [0, 1].

    .. math:: -10 \log_{10} \text{MSE}

    The output is clamped to the range first, as it is when a picture is saved; 100 dB at most.

    Example:
        >>> psnr(torch.full((1, 3, 4, 4), 0.6), torch.full((1, 3, 4, 4), 0.5))
        tensor([20.0000])
    """
    return -10 * squared_error(output.clamp(0, 1), target).clamp_min(1e-10).log10()


def right(output: Tensor, target: Tensor) -> Tensor:
    """1 for each item whose class has the largest output, else 0."""
    return (output.argmax(1) == target).float()


def mix(x: Tensor, strength: float) -> tuple[Tensor, float]:
    r"""Images mixed with those of the same batch in reverse order, and the share of their own.

    .. math:: \tilde x_i = s\, x_i + (1 - s)\, x_{n - 1 - i}, \quad s \sim \text{Beta}(a, a)

    See "mixup: Beyond Empirical Risk Minimization", https://arxiv.org/abs/1710.09412.

    Args:
        x: ``(n, c, height, width)``.
        strength: :math:`a`.
    """
    share = float(torch.distributions.Beta(strength, strength).sample())
    return share * x + (1 - share) * x.flip(0), share
