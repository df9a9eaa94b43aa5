"""ConvNN1d, ConvNN2d and ConvNN3d: convolution whose neighbours are chosen."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from convnn_geo.candidates import PADDING_MODES, All, Candidates, Window
from convnn_geo.checks import (
    check_floating,
    check_instance,
    check_int,
    check_layer,
    check_name,
    check_tensor,
    check_tuple,
    check_values,
)
from convnn_geo.encodings import Encoding
from convnn_geo.kernels import Kernel
from convnn_geo.lowering import run
from convnn_geo.lowering.convolution import convolve, unlike_windows
from convnn_geo.metrics import Feature, Metric, Spatial
from convnn_geo.nn.measure import encode, layer_encoding, layer_metric
from convnn_geo.nn.settable import slots
from convnn_geo.nn.shuffle import check_divides, pixel_shuffle, pixel_unshuffle
from convnn_geo.nn.taps import TapLayer, check_self_point
from convnn_geo.nn.tracing import one_node
from convnn_geo.operation import Operation, keeps_all
from convnn_geo.points import Grid, Points
from convnn_geo.search import ENGINES
from convnn_geo.selection import Every, KNearest, Selection
from convnn_geo.typing import BACKENDS, ORDERS
from convnn_geo.weighting import Weighting, as_weighting


class _ConvNN(TapLayer):
    """What the layers of one, two and three axes share."""

    axes: int

    def __init__(
        self,
        in_channels: int | None,
        out_channels: int | None,
        kernel_size: int | tuple[int, ...] | None = None,
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] | str = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: str = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        k: int | None = None,
        metric: Metric | str | None = None,
        candidates: Candidates | None = None,
        selection: Selection | None = None,
        weighting: Weighting | str = "ones",
        kernel: str | Kernel = "standard",
        order: str | None = None,
        self_point: str = "natural",
        encoding: Encoding | str | None = None,
        shuffle: int = 1,
        backend: str = "auto",
        search: str = "auto",
    ) -> None:
        super().__init__()
        free = in_channels is None and out_channels is None
        self.in_channels = None if free else check_int("in_channels", in_channels)
        self.out_channels = None if free else check_int("out_channels", out_channels)
        self.shuffle = check_int("shuffle", shuffle)
        self.backend = check_name("backend", backend, BACKENDS)
        self.search = check_name("search backend", search, ("auto", *ENGINES))
        self.padding_mode = padding_mode
        self.stride = check_tuple("stride", stride, self.axes)
        if kernel_size is None and k is None and selection is None:
            raise ValueError(
                "expected kernel_size (a window), k (that many neighbours) or a selection; got none"
            )
        self.kernel_size = (
            None if kernel_size is None else check_tuple("kernel_size", kernel_size, self.axes)
        )
        self.dilation: int | tuple[int, ...]
        if self.kernel_size is None:  # of ranks, not of axes
            self.dilation = check_int("dilation", dilation)
        else:
            self.dilation = check_tuple("dilation", dilation, self.axes)
        self.padding: str | tuple[int, ...] = (
            padding if isinstance(padding, str) else check_tuple("padding", padding, self.axes, 0)
        )
        self._windows = (self._window(),)  # no part of its own: mostly these are the candidates
        if k is not None and selection is not None:
            raise ValueError("expected k or a selection, and not both")
        given = selection is not None
        taps = math.prod(self.kernel_size) if self.kernel_size else None
        if candidates is None:
            candidates = All() if kernel_size is None else self.window
        self.candidates = check_instance("candidates", candidates, Candidates)
        if selection is None:
            if isinstance(candidates, Window) and k is None and taps is not None:
                selection = Every()
            else:
                every = self.dilation if isinstance(self.dilation, int) else 1
                selection = KNearest(taps if k is None else k, every, self_point)  # type: ignore[arg-type]
        self.selection = check_instance("selection", selection, Selection)
        self.k = slots(selection) or taps
        check_self_point(self_point, isinstance(selection, KNearest) and not given)
        factory: dict[str, Any] = {"device": device, "dtype": dtype}
        seen = (in_channels or 0) * self.shuffle**self.axes
        self.encoding = layer_encoding(encoding, seen, self.axes, **factory)
        if metric is None and isinstance(selection, KNearest):
            raise ValueError(
                "k nearest by what? Pass metric=, e.g. metric='cosine' for features or "
                "metric='spatial' for positions"
            )
        self.weighting = as_weighting(weighting)
        if isinstance(selection, Every):
            self._check_every(metric, order)
        measure = Spatial() if metric is None else metric
        self.metric = layer_metric(measure, self.encoding, self.weighting, **factory)
        default = "rank" if kernel_size is None else "raster"
        self.order = check_name("order", order or default, ORDERS)
        scale = self.shuffle**self.axes
        extra = 0 if self.encoding is None else self.encoding.extra_channels(self.axes)
        whole = self.kernel_size is not None and self.k == taps
        shape = self.kernel_size if whole else None if self.k is None else (self.k,)
        channels = (None, None) if free else (in_channels * scale + extra, out_channels * scale)
        self.build_kernel(kernel, channels, shape, groups, bias, factory)
        self.reset_taps()
        self.built = True

    def settling(self) -> dict[str, Callable[[Any], Any]]:
        """Of what makes a window, too."""
        moved = {name: partial(self._settle_window, name) for name in _WINDOWED}
        return {**super().settling(), **moved, "kernel_size": self._settle_kernel_size}

    def _settle_kernel_size(self, kernel_size: Any) -> Any:
        if self.kernel_size is None or (
            check_tuple("kernel_size", kernel_size, self.axes) != self.kernel_size
        ):
            raise AttributeError(
                f"kernel_size: the layer was made for {self.kernel_size}; make a new one"
            )
        return self.kernel_size

    def _settle_window(self, name: str, value: Any) -> Any:
        """Move the window, and with it the candidates where they are that window."""
        of_ranks = name == "dilation" and self.kernel_size is None
        if of_ranks:
            value = check_int(name, value)
        elif name != "padding_mode" and not isinstance(value, str):
            value = check_tuple(name, value, self.axes, int(name != "padding"))
        if value == getattr(self, name):
            return value
        if of_ranks:
            if not isinstance(self.selection, KNearest):
                raise AttributeError("dilation: the layer chooses by no k; make a new selection")
            self.selection.dilation = value
            return value
        if name == "dilation" and self.candidates is not self.window:
            raise AttributeError(
                f"dilation: it is that of a window, and candidates are {self.candidates}; of a "
                "layer that convert has moved, set it where it is a convolution (lam = 0)"
            )
        before, after = self.window, self._window(**{name: value})
        if self.candidates is before:
            self.__dict__["_modules"] = dict(self._modules)  # a shallow copy has its own window
            self.candidates = after
        self._windows = (after,)
        return value

    @property
    def window(self) -> Window:
        """Where on the image targets lie; with ``kernel_size`` alone also where they look."""
        return self._windows[0]

    def _window(self, **changed: Any) -> Window:
        """Of the layer's attributes, but for those that are about to change."""
        given = {name: changed.get(name, getattr(self, name)) for name in _WINDOWED}
        if self.kernel_size is not None:
            return Window(self.kernel_size, **given)
        mode, padding = given["padding_mode"], given["padding"]
        check_name("padding_mode", mode, PADDING_MODES)
        if mode != "zeros" or isinstance(padding, str):
            raise ValueError(
                "without kernel_size, padding is a number of zero points around the image that may "
                f"be chosen; got padding={padding!r}, padding_mode={mode!r}"
            )
        return Window(1, given["stride"])

    def _check_every(self, metric: object, order: str | None) -> None:
        """Raise for options that choose, where every candidate is kept."""
        sees = "encoding" if self.encoding and self.encoding.on == "metric" else None
        name = sees if metric is None else "metric"
        if name is not None and not self.weighting.uses_distance:
            raise ValueError(
                f"{name}= has no effect: every candidate is kept, and weights of "
                f"{type(self.weighting).__name__} do not depend on distances. Pass k=, "
                "candidates=All(), or weighting='softmax', say"
            )
        if order == "rank":
            raise ValueError(
                "order='rank' has no effect: every candidate is kept, in raster order. Pass k=, or "
                "leave order out"
            )

    def _margin(self) -> tuple[tuple[int, int], ...]:
        """Zero points before and after, axis by axis."""
        if self.kernel_size is None and not isinstance(self.padding, str):
            return tuple((p, p) for p in self.padding)
        return self.window.pads(self.axes)

    def operation(self, input: Tensor) -> Operation:
        """The layer on an image ``(b, c, *size)`` or ``(c, *size)``, as an operation."""
        self._check(input)
        x = input.unsqueeze(0) if input.ndim == self.axes + 1 else input
        if self.shuffle > 1:
            check_divides(tuple(x.shape[2:]), self.shuffle)
            x = pixel_unshuffle(x, self.shuffle)
        source = Points.from_image(x)
        whole = source.grid
        if not isinstance(self.selection, Every):  # rows are selected: better side by side
            source = source.with_x(source.features.contiguous())
        if self.encoding is not None and self.encoding.on == "features":
            source = encode(self.encoding, source)
        value = source
        if self.encoding is not None and self.encoding.on == "value":
            value = encode(self.encoding, source)
        grid = self.window.targets(whole)  # type: ignore[arg-type]
        if not isinstance(self.candidates, Window):
            pads = self._margin()
            source, value = source.pad(pads), value.pad(pads)
        kernel = self.bound_kernel()
        return Operation(
            target=self._target(source, grid, kernel),
            source=source,
            value=value.features,
            metric=self.metric,
            candidates=self.candidates,
            selection=self.selection,
            weighting=self.weighting,
            kernel=kernel,
            order=self.order,
            search=self.search,
            image=x if isinstance(self.candidates, Window) and self.encoding is None else None,
        )

    def _target(self, source: Points, grid: Grid, kernel: Kernel) -> Points:
        if grid == source.grid:
            return source
        asked = self.weighting.uses_distance or kernel.needs_target
        if isinstance(self.selection, Every) and not asked:
            return Points(grid=grid, on=source.device)  # nobody asks for the targets' features
        index = source.grid.index_of(grid, source.device)  # type: ignore[union-attr]
        if index is None:
            chooses = not keeps_all(self.candidates, self.selection, self.order, self.axes)
            sees = any(type(part) is Feature for part in self.metric.modules())
            if sees and (chooses or self.weighting.uses_distance):
                raise ValueError(
                    f"kernel_size={self.kernel_size}, padding={self.padding}: the middle of a "
                    "window is no pixel, and the metric asks for its features; pass an odd size, "
                    "and padding up to half of it"
                )
            return Points(grid=grid, on=source.device)
        return Points(source.features.index_select(-2, index), grid=grid)

    @one_node
    def forward(self, input: Tensor) -> Tensor:
        """Apply the layer to ``(b, c, *size)`` or ``(c, *size)``."""
        if isinstance(input, Tensor) and input.ndim == self.axes + 2 and input.shape[0] == 0:
            return self._empty(input)
        if self._convolves():
            return self._convolved(input)
        op = self.operation(input)
        scale = self.shuffle**self.axes
        expected = None if self.out_channels is None else self.out_channels * scale
        out = self.check_channels(run(op, self.backend), expected)
        out = out.transpose(1, 2).unflatten(-1, op.target.grid.size)  # type: ignore[union-attr]
        if self.shuffle > 1:
            out = pixel_shuffle(out, self.shuffle)
        return out if input.ndim == self.axes + 2 else out.squeeze(0)

    def _convolves(self) -> bool:
        """Whether this is a convolution whatever the image, which then need not become points."""
        parts = self.candidates, self.selection, self.weighting, self.order
        return (
            self.backend in ("auto", "native")
            and self.candidates is self.window
            and self.encoding is None
            and self.shuffle == 1
            and self.kernel in ("standard", "depthwise", "separable")
            and unlike_windows(*parts, self.axes) is None
        )

    def _convolved(self, input: Tensor) -> Tensor:
        self._check(input)
        x = input.unsqueeze(0) if input.ndim == self.axes + 1 else input
        self.window.size(tuple(x.shape[2:]))  # raises where none fits
        out = convolve(x, self.bound_kernel(), self.window)  # type: ignore[arg-type]
        return out if x is input else out.squeeze(0)

    def _empty(self, x: Tensor) -> Tensor:
        """No examples: no output, of the right shape."""
        probe = self.forward(x.new_zeros(1, *x.shape[1:]))
        return x.sum() * probe[:0]

    def _check(self, x: Tensor) -> None:
        name = type(self).__name__
        check_tensor(f"{name} input", x, (self.axes + 1, self.axes + 2))
        check_floating(f"{name} input", x)
        channels = x.shape[-self.axes - 1]
        if 0 in x.shape[-self.axes :]:
            raise ValueError(f"{name}: expected an image with pixels, got shape {tuple(x.shape)}")
        if self.in_channels is not None and self.in_channels != channels:
            raise ValueError(
                f"{name}: expected {self.in_channels} channels, got {channels} "
                f"(shape {tuple(x.shape)}, channels first)"
            )
        if self.weight is not None:
            check_layer(f"{name} input", x, self.weight)
        check_values(f"{name} input", x)

    def extra_repr(self) -> str:
        parts = [f"{self.in_channels}, {self.out_channels}"]
        if self.kernel_size is not None:
            parts.append(f"kernel_size={self.kernel_size}")
        if isinstance(self.selection, KNearest):
            parts.append(f"k={self.k}")
        parts.append(f"stride={self.stride}")
        if isinstance(self.padding, str) or any(self.padding):
            parts.append(f"padding={self.padding!r}")
        parts += [*self.kernel_repr(), f"order={self.order!r}"]
        if self.shuffle > 1:
            parts.append(f"shuffle={self.shuffle}")
        return ", ".join(parts)


_WINDOWED = ("stride", "padding", "dilation", "padding_mode")

_DOC = """A drop-in for :class:`torch.nn.Conv{n}d` over chosen neighbours of {a} {what}.

    .. math:: y_i = \\sum_{{j=1}}^{{k}} W_j\\, \\rho_{{ij}}\\, x_{{I_i(j)}} + b

    With ``kernel_size`` alone it is the convolution, with the same parameters. With ``k`` alone
    the neighbours are the ``k`` nearest of the whole {what} by ``metric``. With both, the ``k``
    nearest inside the window; with ``kernel_size`` and ``candidates=All()``, the
    ``prod(kernel_size)`` nearest of the padded {what}, which is the convolution again where the
    metric is ``Spatial("chebyshev")``. See https://arxiv.org/abs/2606.14725.

    Args:
        in_channels: channels of the input; with ``out_channels`` None for any, where the kernel
            has no weights.
        out_channels: channels of the output.
        kernel_size: the window, in pixels; one number or one an axis.
        stride: pixels between outputs.
        padding: as in ``nn.Conv{n}d``; without a window, zero points around the {what} that may
            be chosen.
        dilation: of the window; without one, every ``dilation``-th of the nearest is kept.
        groups: groups of channels.
        bias: learn an additive bias, where the kernel has taps.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        device: of the parameters.
        dtype: of the parameters.
        k: neighbours. More than a window or the {what} has are an error; where a border or a mask
            leaves fewer, the last are empty.
        metric: a metric or its name, e.g. ``"cosine"``; needed with ``k``. One by name takes the
            layer's dtype and device; a module keeps its own.
        candidates: where to look; the window where there is one, everywhere otherwise.
        selection: whom to keep, instead of ``k`` and ``self_point``.
        weighting: how much each counts: ``"ones"``, ``"softmax"``, ``"gaussian"``, ...
        kernel: ``"standard"``, ``"depthwise"``, ``"separable"``, ``"sum"``, ``"mean"``, ``"max"``
            or a :class:`~convnn_geo.kernels.Kernel`.
        order: of the taps, ``"rank"`` (nearest first) or ``"raster"`` (by place in the window, by
            source index where candidates are no window); raster with a window, rank without. As
            many neighbours as a window has are all of it in raster order, tap j its j-th place.
        self_point: ``"natural"``, ``"first"`` (always tap 0) or ``"excluded"``.
        encoding: a positional encoding or its name: ``"coordinates"``, ``"fourier"``,
            ``"rotary"``, ``"conditional"``, or ``LearnedAbsolute(...)``.
        shuffle: work on the pixel-unshuffled {what}, this many pixels an axis in one point, and
            shuffle back.
        backend: ``"auto"``, ``"native"``, ``"compiled"``, ``"gather"``, ``"message_passing"`` or
            ``"triton"``; :func:`convnn_geo.lowering.explain` says which runs.
        search: engine that finds the neighbours; see :func:`convnn_geo.search.engines`.

    Shapes:
        - **input:** :math:`(b, c, {size})` or :math:`(c, {size})`
        - **output:** :math:`(b, d, {out})`, the size that ``nn.Conv{n}d`` gives for a window,
          the input's divided by the stride otherwise
        - **weight:** :math:`(d, c / groups, *kernel\\_size)` for a whole window, else
          :math:`(d, c / groups, k)`

    Raises:
        ValueError: wrong shapes, names, devices, k over the number of candidates.
        TypeError: wrong dtypes.

    Example:
        >>> import torch
        >>> from convnn_geo.nn import ConvNN{n}d
        >>> x = torch.randn(2, 3, {example})
        >>> ConvNN{n}d(3, 8, 3, padding=1)(x).shape  # the convolution
        torch.Size([2, 8, {example}])
        >>> ConvNN{n}d(3, 8, k=9, metric="cosine")(x).shape  # neighbours by feature
        torch.Size([2, 8, {example}])
    """


class ConvNN1d(_ConvNN):  # noqa: D101
    __doc__ = _DOC.format(a="a", what="sequence", n=1, size="l", out="l'", example="12")
    axes = 1


class ConvNN2d(_ConvNN):  # noqa: D101
    __doc__ = _DOC.format(a="an", what="image", n=2, size="h, w", out="h', w'", example="6, 5")
    axes = 2


class ConvNN3d(_ConvNN):  # noqa: D101
    __doc__ = _DOC.format(
        a="a", what="volume", n=3, size="t, h, w", out="t', h', w'", example="3, 4, 5"
    )
    axes = 3
