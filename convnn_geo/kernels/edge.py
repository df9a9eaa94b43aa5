"""Kernels that compute each pair's message: MLPs on edges, max-relative, vector attention."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convnn_geo.checks import check_name
from convnn_geo.kernels.base import Join, Kernel, Max, Mean, Sum
from convnn_geo.pairs import EdgePairs, Pairs, is_plain, on_rows

INPUTS = ("target", "source", "difference", "offset")
REDUCTIONS: dict[str, Kernel] = {"max": Max(), "mean": Mean(), "sum": Sum()}


class EdgeMLP(nn.Module, Kernel):
    """``y_i = reduce_j mlp(inputs_ij)``.

    ``inputs=("target", "difference")`` is EdgeConv (https://arxiv.org/abs/1801.07829),
    ``("source", "offset")`` the set abstraction of PointNet++ (https://arxiv.org/abs/1706.02413).

    Where the network begins with a linear layer, that is applied to each input by itself, to a
    target's features once, not once a pair; and no pair's inputs are put side by side.

    Args:
        mlp: from the inputs' channels to the messages'.
        inputs: what the network sees, in order: ``"target"`` x_i, ``"source"`` x_j,
            ``"difference"`` x_j - x_i, ``"offset"`` p_j - p_i.
        reduce: ``"max"``, ``"mean"`` or ``"sum"``.
    """

    counts_slots = False

    def __init__(
        self,
        mlp: nn.Module,
        inputs: Sequence[str] = ("target", "difference"),
        reduce: str = "max",
    ) -> None:
        super().__init__()
        self.mlp = mlp
        self.inputs = tuple(check_name("input of EdgeMLP", i, INPUTS) for i in inputs)
        self.reduction = check_name("reduction", reduce, REDUCTIONS)
        self.needs_target = bool({"target", "difference"} & set(self.inputs))
        self.needs_offset = "offset" in self.inputs

    def message(self, pairs: Pairs | EdgePairs) -> Tensor:
        """The network on the inputs of each pair."""
        parts = [_input(name, pairs) for name in self.inputs]
        widths = [part.shape[-1] for part in parts]
        _check_width("EdgeMLP", self.mlp, sum(widths), " + ".join(self.inputs))
        first, rest = _linear_first(self.mlp)
        if first is None or {*self.inputs} == {"target"}:
            shape = pairs.x_j.shape[:-1]
            return on_rows(self.mlp, torch.cat([p.expand(*shape, -1) for p in parts], -1), pairs)
        weights, biases = first.weight.split(widths, -1), (first.bias, *[None] * (len(widths) - 1))
        return on_rows(rest, reduce(torch.add, map(F.linear, parts, weights, biases)), pairs)

    def reduce(self, messages: Tensor, mask: Tensor | None) -> Tensor:
        """As named."""
        return REDUCTIONS[self.reduction].reduce(messages, mask)

    def extra_repr(self) -> str:
        return f"inputs={self.inputs}, reduce={self.reduction!r}"


def _input(name: str, pairs: Pairs | EdgePairs) -> Tensor:
    """What a network sees by that name, ``(..., n, k, c)``, or ``(..., n, 1, c)`` of targets."""
    if name == "source":
        return pairs.x_j
    if name == "offset":
        like = pairs.value if isinstance(pairs, Pairs) else pairs.x_j
        return _there(pairs.offset).to(like.dtype)
    x_i = _there(pairs.x_i)
    return x_i if name == "target" else pairs.x_j - x_i


def _linear_first(network: nn.Module) -> tuple[nn.Linear | None, nn.Module]:
    """The linear layer that a network begins with, and the rest; None where there is none.

    Nor where somebody looks on, who expects its input, or where it is more than its class says.
    """
    if not is_plain(network, nn.Sequential, nn.Linear):
        return None, network
    first, *others = network if isinstance(network, nn.Sequential) and len(network) else [network]
    if not isinstance(first, nn.Linear) or not is_plain(first, nn.Linear):
        return None, network
    if type(first.weight) not in (Tensor, nn.Parameter):  # of other kinds not all can be cut
        return None, network
    return first, others[0] if len(others) == 1 else nn.Sequential(*others)


class MaxRelative(nn.Module, Kernel):
    """``y_i = update([x_i, max_j (x_j - x_i)])``: the graph convolution of ViG
    (https://arxiv.org/abs/2206.00272).

    Args:
        update: module on ``2 c`` channels, the target's own first.
    """

    needs_target = True
    counts_slots = False

    def __init__(self, update: nn.Module) -> None:
        super().__init__()
        self.update = update

    def message(self, pairs: Pairs | EdgePairs) -> Tensor:
        """Relative features."""
        return pairs.x_j - _there(pairs.x_i)

    def reduce(self, messages: Tensor, mask: Tensor | None) -> Tensor:
        """Maximum over neighbours."""
        return REDUCTIONS["max"].reduce(messages, mask)

    def finish(self, reduced: Tensor, x_i: Tensor | None) -> Tensor:
        """Concatenate the target's own features and update."""
        own = _there(x_i).expand(*reduced.shape[:-1], -1)
        return on_rows(self.update, torch.cat([own, reduced], -1))


class VectorAttention(nn.Module, Kernel):
    r"""Vector attention of Point Transformer (https://arxiv.org/abs/2012.09164).

    .. math:: y_i = \sum_j \mathrm{softmax}_j(\gamma(Q x_i - K x_j + \delta_{ij}))
              \odot (V x_j + \delta_{ij}), \quad \delta_{ij} = \theta(p_i - p_j)

    Args:
        query: module on the target's features.
        key: module on the source's features.
        value: module on the source's features.
        position: ``theta``, from relative positions to channels.
        attention: ``gamma``, from channels to channels; the identity by default.
    """

    needs_target = True
    needs_offset = True
    counts_slots = False

    def __init__(
        self,
        query: nn.Module,
        key: nn.Module,
        value: nn.Module,
        position: nn.Module,
        attention: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.query, self.key, self.value = query, key, value
        self.position = position
        self.attention = nn.Identity() if attention is None else attention

    def project(self, value: Tensor) -> Tensor:
        """Keys and values side by side, ``2 d`` channels."""
        return torch.cat([self.key(value), self.value(value)], -1)

    def message(self, pairs: Pairs | EdgePairs) -> Tensor:
        """Scores and values side by side, ``2 d`` channels."""
        return torch.cat(self._scores_and_values(pairs), -1)

    def reduce(self, messages: Tensor, mask: Tensor | None) -> Tensor:
        """Softmax over neighbours, channel by channel, and the weighted sum."""
        score, value = messages.chunk(2, -1)
        return self._attend(score, value, mask)

    def gather(self, pairs: Pairs, weight: Tensor | None) -> Tensor:
        """The same without putting them side by side, which takes as long as all else."""
        if weight is not None:
            return super().gather(pairs, weight)
        return self._attend(*self._scores_and_values(pairs), pairs.mask)

    def _scores_and_values(self, pairs: Pairs | EdgePairs) -> tuple[Tensor, Tensor]:
        key, value = pairs.x_j.chunk(2, -1)
        offset = _there(pairs.offset)
        _check_width("VectorAttention", self.position, offset.shape[-1], "offset")
        delta = on_rows(self.position, -offset.to(key.dtype), pairs)
        score = on_rows(self.attention, self.query(_there(pairs.x_i)) - key + delta, pairs)
        return score, value + delta

    @staticmethod
    def _attend(score: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
        if mask is not None:
            score = score.masked_fill(~mask.unsqueeze(-1), -torch.inf)
            alone = ~mask.any(-1)[..., None, None]
            return (score.masked_fill(alone, 0.0).softmax(-2) * value).masked_fill(alone, 0).sum(-2)
        return (score.softmax(-2) * value).sum(-2)


class GravNet(nn.Module, Kernel):
    """Mean and maximum of projected values, and the target's own: GravNet
    (https://arxiv.org/abs/1902.07987).

    Args:
        value: module on the sources' features.
        own: module on the target's features.
        update: module on mean and maximum side by side.
    """

    needs_target = True
    counts_slots = False

    def __init__(self, value: nn.Module, own: nn.Module, update: nn.Module) -> None:
        super().__init__()
        self.value, self.own, self.update = value, own, update

    def project(self, value: Tensor) -> Tensor:
        """Project the values."""
        return self.value(value)

    def reduce(self, messages: Tensor, mask: Tensor | None) -> Tensor:
        """Mean and maximum."""
        return Join(Mean(), Max()).reduce(messages, mask)

    def finish(self, reduced: Tensor, x_i: Tensor | None) -> Tensor:
        """Add both parts."""
        return self.own(_there(x_i)) + self.update(reduced)


def _check_width(name: str, module: nn.Module, width: int, inputs: str) -> None:
    """Raise where a network that begins with a linear layer takes other inputs than there are."""
    first = module[0] if isinstance(module, nn.Sequential) and len(module) else module
    lazy = isinstance(first, nn.LazyLinear)
    if isinstance(first, nn.Linear) and not lazy and first.in_features != width:
        raise ValueError(
            f"{name}: its network takes {first.in_features} channels, but {inputs} has {width}; of "
            "other than three axes of positions recipes are told by axes="
        )


def _there(tensor: Tensor | None) -> Tensor:
    if tensor is None:
        raise ValueError(
            "this kernel looks at targets' features and positions: give x as (x_src, x_dst), "
            "and pos"
        )
    return tensor
