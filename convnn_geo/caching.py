"""Computing once, in ways that ``torch.compile`` and fake tensors can live with."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, TypeVar

import torch

from convnn_geo.operators import is_watched

Result = TypeVar("Result")


class once:  # noqa: N801, as properties are written
    """A property of a frozen dataclass, computed when first asked for, then a plain attribute.

    :class:`functools.cached_property` takes a lock before Python 3.12, which is not traceable.

    Example:
        >>> from dataclasses import dataclass
        >>> @dataclass(frozen=True)
        ... class Square:
        ...     side: int
        ...     @once
        ...     def area(self):
        ...         print("computing")
        ...         return self.side**2
        >>> square = Square(3)
        >>> square.area, square.area
        computing
        (9, 9)
    """

    def __init__(self, function: Callable[[Any], Any]) -> None:
        self.function, self.__doc__ = function, function.__doc__

    def __get__(self, instance: Any, owner: type) -> Any:
        if instance is None:
            return self
        value = self.function(instance)
        object.__setattr__(instance, self.function.__name__, value)
        return value


class _CaptureError(Exception):
    """A CUDA graph records what is launched."""


def keep(size: int) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """:func:`functools.lru_cache` for functions that make tensors from sizes.

    Neither reads nor fills the cache while tensors may not be real: under ``torch.compile``, in
    ``torch.export``, inside a ``FakeTensorMode`` and where ``torch.func`` transforms. What a CUDA
    graph captures is filled when it is replayed, and not kept either. The function must name the
    device of what it makes: the default may change.
    """

    def decorate(function: Callable[..., Result]) -> Callable[..., Result]:
        @lru_cache(maxsize=size)
        def cached(*args: Any) -> Result:
            if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
                raise _CaptureError
            # What inference mode makes could not be saved for a later backward.
            with torch.inference_mode(False), torch.no_grad():
                return function(*args)

        @wraps(function)
        def call(*args: Any) -> Result:
            if is_watched():
                return function(*args)
            try:
                return cached(*args)
            except _CaptureError:
                return function(*args)

        return call

    return decorate
