"""Computing once, in ways that ``torch.compile`` and fake tensors can live with."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")


def once(function: Callable[[Any], Result]) -> Any:
    """A property of a frozen dataclass, computed when first asked for.

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
    name = f"_once_{function.__name__}"

    @wraps(function)
    def get(self: Any) -> Result:
        if not hasattr(self, name):
            object.__setattr__(self, name, function(self))
        return getattr(self, name)

    return property(get)


def keep(size: int) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """:func:`functools.lru_cache` for functions that make tensors from sizes.

    Neither reads nor fills the cache while tensors may not be real: under ``torch.compile``, in
    ``torch.export`` and inside a ``FakeTensorMode``.
    """

    def decorate(function: Callable[..., Result]) -> Callable[..., Result]:
        @lru_cache(maxsize=size)
        def cached(*args: Any) -> Result:
            # What inference mode makes could not be saved for a later backward.
            with torch.inference_mode(False), torch.no_grad():
                return function(*args)

        @wraps(function)
        def call(*args: Any) -> Result:
            if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
                return function(*args)
            return cached(*args)

        return call

    return decorate
