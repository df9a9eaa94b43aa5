"""What layers with one tap a neighbour share: parameters by a convolution's names."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch_geometric.nn.inits import reset

from convnn_geo.checks import check_int, check_name
from convnn_geo.kernels import Kernel, Max, Mean, Separable, Sum, Taps
from convnn_geo.nn.settable import Settable
from convnn_geo.typing import SELF_POINTS

KERNELS = ("standard", "depthwise", "separable", "sum", "mean", "max")
_PLAIN: dict[str, type[Kernel]] = {"sum": Sum, "mean": Mean, "max": Max}


def check_self_point(self_point: str, by_k: bool) -> None:
    """Raise for an unknown name, and where the layer makes no selection of its own from it."""
    check_name("self_point", self_point, SELF_POINTS)
    if self_point != "natural" and not by_k:
        raise ValueError(
            f"self_point={self_point!r} is an option of the k nearest: pass k=, or a selection "
            "such as KNearest(k, self_point=...) alone"
        )


def _check_learns(kernel: Kernel) -> None:
    """Raise where a kernel's parameters would neither be trained nor saved nor moved."""
    parts = () if isinstance(kernel, nn.Module) else vars(kernel).values()
    if any(isinstance(part, (nn.Module, nn.Parameter)) for part in parts):
        name = type(kernel).__name__
        raise TypeError(
            f"kernel: {name} has parameters, but is no module, so that they would not learn; "
            f"derive it from both: class {name}(nn.Module, Kernel)"
        )


class TapLayer(Settable):
    """A layer that owns ``weight``, ``pointwise`` and ``bias``, and binds them to a kernel."""

    # Parameters, or None where the kernel has no use for them.
    weight: Any
    pointwise: Any
    bias: Any

    def build_kernel(
        self,
        kernel: str | Kernel,
        channels: tuple[int | None, int | None],
        taps: tuple[int, ...] | None,
        groups: int,
        bias: bool,
        factory: dict[str, Any],
    ) -> None:
        """Register the parameters that the kernel needs.

        Args:
            kernel: a name, or a kernel of the user's own, which brings its own parameters.
            channels: in and out; None for any, which only a kernel without weights can take.
            taps: the shape of the neighbours, ``(k,)`` or the kernel size.
            groups: groups of channels.
            bias: learn an additive bias.
            factory: device and dtype.
        """
        c, d = channels
        if kernel != "standard" and groups not in (1, c if kernel == "depthwise" else 1):
            raise ValueError(
                f"groups={groups} is an option of kernel='standard', not of {kernel!r}"
            )
        for name in ("weight", "pointwise", "bias"):
            self.register_parameter(name, None)
        self.kernel: str | Kernel
        if isinstance(kernel, Kernel):
            _check_learns(kernel)
            self.kernel, self.groups = kernel, 1  # registered where it is a module
            return
        if not isinstance(kernel, str):
            raise TypeError(
                f"kernel: expected a Kernel or one of {', '.join(KERNELS)}, got {kernel!r}"
            )
        self.kernel = check_name("kernel", kernel, KERNELS)
        if c is None or d is None:
            if kernel not in _PLAIN:
                raise ValueError(f"kernel={kernel!r} has weights: pass in_channels, out_channels")
            self.groups = 1
            return
        self.groups = c if kernel in ("depthwise", "separable") else check_int("groups", groups)
        if kernel in _PLAIN:
            if c != d:
                raise ValueError(
                    f"kernel={kernel!r} keeps channels: expected out_channels={c}, got {d}"
                )
            return
        if taps is None:
            raise ValueError(f"kernel={kernel!r} has one tap a neighbour: pass k= or kernel_size=")
        out = c if kernel == "separable" else d
        if c % self.groups or out % self.groups:
            raise ValueError(
                f"groups: {self.groups} must divide in_channels={c} and out_channels={out}"
            )
        self.weight = nn.Parameter(torch.empty(out, c // self.groups, *taps, **factory))
        if kernel == "separable":
            self.pointwise = nn.Parameter(torch.empty(d, c, **factory))
        if bias:
            self.bias = nn.Parameter(torch.empty(d, **factory))

    def has_taps(self) -> bool:
        """Whether the kernel has weights."""
        return self.weight is not None

    def reset_parameters(self) -> None:
        """As :class:`torch.nn.Conv2d` does; metric, encoding and the like as they do themselves."""
        for part in self.children():
            reset(part)
        self.reset_taps()

    def reset_taps(self) -> None:
        """The layer's own parameters alone: what it was made of may be trained already."""
        for weight in (self.weight, self.pointwise):
            if weight is not None:
                nn.init.kaiming_uniform_(weight, a=math.sqrt(5))
        if self.bias is not None:
            last = self.weight if self.pointwise is None else self.pointwise
            bound = 1 / math.sqrt(last[0].numel())
            nn.init.uniform_(self.bias, -bound, bound)

    def check_channels(self, out: torch.Tensor, expected: int | None) -> torch.Tensor:
        """What a kernel of the user's own gave, if it has as many channels as the layer says."""
        if isinstance(self.kernel, Kernel) and expected not in (None, out.shape[-1]):
            raise ValueError(
                f"the kernel {type(self.kernel).__name__} gives {out.shape[-1]} channels, but the "
                f"layer was made for {expected}: pass out_channels to match"
            )
        return out

    def kernel_repr(self) -> list[str]:
        """What of the kernel is not as by default."""
        parts = [] if self.groups == 1 else [f"groups={self.groups}"]
        if self.weight is not None and self.bias is None:
            parts.append("bias=False")
        if isinstance(self.kernel, str) and self.kernel != "standard":
            parts.append(f"kernel={self.kernel!r}")
        if isinstance(self.kernel, Kernel) and not isinstance(self.kernel, nn.Module):
            parts.append(f"kernel={type(self.kernel).__name__}()")
        return parts

    def bound_kernel(self) -> Kernel:
        """The kernel with this layer's weights."""
        if isinstance(self.kernel, Kernel):
            return self.kernel
        if self.kernel in _PLAIN:
            return _PLAIN[self.kernel]()
        if self.kernel == "separable":
            return Separable(self.weight, self.pointwise, self.bias)
        return Taps(self.weight, self.bias, self.groups)
