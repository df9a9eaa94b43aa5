"""Errors that say what was expected, what came and what to do.

Every public entry checks shapes, names and types before it works. Values (finite features, say)
are looked at where a graph is built, and everywhere inside :func:`checking`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence
from contextvars import ContextVar
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

_CHECK_VALUES: ContextVar[bool] = ContextVar("check_values", default=False)


@contextlib.contextmanager
def checking(enabled: bool = True) -> Iterator[None]:
    """Look at values, too, in every layer's forward: the switch for debugging.

    Layers look at shapes only, as :class:`torch.nn.Conv2d` does, so that forward never waits for
    the device. Inside this context they refuse non-finite inputs, and ranks that meet in one tap.

    Example:
        >>> import torch
        >>> from convnn_geo import checking
        >>> from convnn_geo.nn import ConvNN2d
        >>> layer = ConvNN2d(3, 4, k=2, metric="cosine")
        >>> with checking():
        ...     _ = layer(torch.zeros(1, 3, 4, 4))
    """
    token = _CHECK_VALUES.set(enabled)
    try:
        yield
    finally:
        _CHECK_VALUES.reset(token)


def looks_at_values() -> bool:
    """Whether values may be looked at: inside :func:`checking`, and never while compiling."""
    return not torch.compiler.is_compiling() and _CHECK_VALUES.get()


def check_values(name: str, *tensors: Tensor | None) -> None:
    """Refuse non-finite tensors where values may be looked at."""
    if looks_at_values():
        check_finite(name, *tensors)


def check_finite(name: str, *tensors: Tensor | None) -> None:
    """Raise ``ValueError`` where a tensor holds NaN or infinity."""
    for tensor in tensors:
        if tensor is not None and tensor.is_floating_point() and not all_finite(tensor):
            bad = tensor.numel() - int(torch.isfinite(tensor).sum())
            raise ValueError(
                f"{name}: expected finite values, got {bad} that are NaN or infinite in a "
                f"tensor of shape {tuple(tensor.shape)}; clean the input, or pass check=False "
                "where the function offers it"
            )


def all_finite(tensor: Tensor) -> bool:
    """Whether a tensor holds neither NaN nor infinity.

    Example:
        >>> all_finite(torch.tensor([3e38, 3e38])), all_finite(torch.tensor([1.0, torch.inf]))
        (True, False)
    """
    if math.isfinite(tensor.detach().sum().item()):  # several times as fast as to look at each
        return True
    return bool(tensor.isfinite().all())


def check_tensor(name: str, value: Any, ndim: int | Sequence[int] | None = None) -> Tensor:
    """Return ``value`` if it is a tensor with one of the allowed numbers of dimensions."""
    if not isinstance(value, Tensor):
        how = "; torch.from_numpy makes one" if type(value).__name__ == "ndarray" else ""
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}{how}")
    if value.is_nested:
        raise TypeError(
            f"{name}: expected a dense tensor, got a nested one; pad it and pass a mask. "
            "nn.TransformerEncoder makes none where its enable_nested_tensor and "
            "use_nested_tensor are False"
        )
    if value.layout not in (torch.strided, torch._mkldnn):  # type: ignore[attr-defined]
        raise TypeError(f"{name}: expected a dense tensor, got {value.layout}; pass x.to_dense()")
    allowed = (ndim,) if isinstance(ndim, int) else ndim
    if allowed is not None and value.ndim not in allowed:
        wanted = " or ".join(str(d) for d in allowed)
        raise ValueError(
            f"{name}: expected {wanted} dimensions, got {value.ndim} (shape {tuple(value.shape)})"
        )
    return value


def check_floating(name: str, value: Tensor) -> None:
    """Raise ``TypeError`` unless ``value`` is real floating point."""
    if not value.is_floating_point():
        raise TypeError(
            f"{name}: expected a floating-point tensor, got {value.dtype}; "
            "convert with .float() first"
        )


def check_alike(name: str, first: Tensor, other_name: str, second: Tensor) -> None:
    """Raise unless two tensors share device and dtype, but for what autocast lowers of them."""
    if first.device != second.device:
        raise ValueError(
            f"{name} is on {first.device} but {other_name} on {second.device}; "
            "move both to one device"
        )
    if first.dtype == second.dtype:
        return
    if torch.float64 in (first.dtype, second.dtype) or not casts(first.device):
        raise TypeError(
            f"{name} is {first.dtype} but {other_name} {second.dtype}; convert one of them"
        )


_CASTING = [kind for kind in ("cpu", "cuda", "mps", "xpu") if torch.amp.is_autocast_available(kind)]
"""Kinds of devices that know autocast; those of tensors without values, say, do not."""


def casts(device: torch.device) -> bool:
    """Whether autocast is on for a device: features may then have fewer bits than positions."""
    return device.type in _CASTING and torch.is_autocast_enabled(device.type)


def check_edges(edge_index: Any, device: torch.device) -> None:
    """Raise unless ``edge_index`` is int64 of shape ``(2, E)`` on ``device``."""
    if isinstance(edge_index, Tensor) and edge_index.layout != torch.strided:
        raise TypeError(
            f"edge_index: expected edges of shape (2, E), got a matrix of {edge_index.layout}; "
            "torch_geometric.utils.to_edge_index makes edges of it, a row for each source"
        )
    check_tensor("edge_index", edge_index)
    if edge_index.ndim != 2 or edge_index.shape[0] != 2 or edge_index.dtype != torch.long:
        raise ValueError(
            f"edge_index: expected int64 of shape (2, E), got {edge_index.dtype} of shape "
            f"{tuple(edge_index.shape)}"
        )
    if edge_index.device != device:
        raise ValueError(
            f"edge_index is on {edge_index.device}, the points on {device}; move both to one device"
        )


def check_layer(name: str, x: Tensor, weight: Tensor) -> None:
    """Raise unless a layer's input is where its weights are, and of their dtype or autocast."""
    if x.device != weight.device:
        raise ValueError(f"{name} is on {x.device}, the layer on {weight.device}; move one of them")
    if x.dtype != weight.dtype and not casts(x.device):
        raise TypeError(f"{name} is {x.dtype}, the layer {weight.dtype}; convert one of them")


def check_int(name: str, value: Any, minimum: int = 1) -> int:
    """Return ``value`` if it is an integer of at least ``minimum``."""
    if isinstance(value, bool) or not isinstance(value, (int, Integral)):
        got = f"{value!r} of type {type(value).__name__}"
        if isinstance(value, Tensor):
            got = f"a tensor of shape {tuple(value.shape)}"
            got += "; int(...) reads it" if value.numel() == 1 else ""
        raise TypeError(f"{name}: expected an integer, got {got}")
    if value < minimum:
        raise ValueError(f"{name}: expected an integer of at least {minimum}, got {value}")
    return value if isinstance(value, int) else int(value)


def check_number(
    name: str,
    value: Any,
    minimum: float = 0.0,
    maximum: float = math.inf,
    *,
    exclusive: bool = False,
) -> float:
    """Return ``value`` if it is a finite real number between bounds.

    Args:
        name: of the argument, for the error.
        value: to be checked.
        minimum: the least that it may be.
        maximum: the most that it may be.
        exclusive: refuse the minimum itself.
    """
    if isinstance(value, bool) or not isinstance(value, (int, float, Real)):
        how = "; float(...) reads it" if isinstance(value, Tensor) and value.numel() == 1 else ""
        if isinstance(value, torch.nn.Parameter):
            how = "; it is fixed, and what is to learn needs a part of your own"
        raise TypeError(
            f"{name}: expected a number, got {value!r} of type {type(value).__name__}{how}"
        )
    number = float(value)
    inside = minimum < number <= maximum if exclusive else minimum <= number <= maximum
    if not (inside and -math.inf < number < math.inf):
        raise ValueError(f"{name}: expected {_numbers(minimum, maximum, exclusive)}, got {value}")
    return number


def check_limit(name: str, value: Any, minimum: float = -math.inf) -> float:
    """As :func:`check_number`; infinity is one, too: no limit."""
    unlimited = isinstance(value, float) and value == math.inf
    return math.inf if unlimited else check_number(name, value, minimum)


def _numbers(minimum: float, maximum: float, exclusive: bool) -> str:
    """The numbers between bounds, in words.

    Example:
        >>> _numbers(0, 1, exclusive=True), _numbers(0, math.inf, exclusive=True)
        ('a number in (0, 1]', 'a finite number greater than 0')
    """
    if math.isfinite(maximum):
        return f"a number in {'(' if exclusive else '['}{minimum:g}, {maximum:g}]"
    if math.isfinite(minimum):
        return f"a finite number {'greater than' if exclusive else 'of at least'} {minimum:g}"
    return "a finite number"


def check_instance(name: str, value: Any, kind: type) -> Any:
    """Return ``value`` if it is a ``kind``."""
    if not isinstance(value, kind):
        raise TypeError(f"{name}: expected an instance of {kind.__name__}, got {value!r}")
    return value


def check_name(what: str, name: Any, known: Iterable[str]) -> str:
    """Return ``name`` if it is known; the error lists what is."""
    names = list(known)
    if not isinstance(name, str) or name not in names:
        raise ValueError(f"unknown {what} {name!r}; expected one of: {', '.join(names)}")
    return name


def check_tuple(name: str, value: Any, length: int, minimum: int = 1) -> tuple[int, ...]:
    """Spread an integer over ``length`` axes, or check a sequence of that many integers."""
    if isinstance(value, (tuple, list)):
        if len(value) != length:
            raise ValueError(f"{name}: expected {length} integers, one an axis, got {value!r}")
        return tuple(check_int(name, v, minimum) for v in value)
    return (check_int(name, value, minimum),) * length


def same_code(one: object, other: object) -> bool:
    """Whether two functions are one, defined again: a cell run or a module loaded once more."""
    first, second = (
        (getattr(code, "__module__", None), getattr(code, "__qualname__", None))
        for code in (one, other)
    )
    return first == second and "<lambda>" not in str(first)


def in_this_package(value: object) -> bool:
    """Whether its class is one of ours, so that what it gives is known."""
    return type(value).__module__.startswith("convnn_geo.")
