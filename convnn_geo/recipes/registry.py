"""The list of recipes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

_RECIPES: dict[str, Callable[..., Any]] = {}
Function = TypeVar("Function", bound=Callable[..., Any])


def recipe(function: Function) -> Function:
    """Enter a function into the list."""
    _RECIPES[function.__name__] = function
    return function


def names() -> list[str]:
    """Names of all recipes.

    Example:
        >>> from convnn_geo import recipes
        >>> {"conv2d", "kvt", "vig"} <= set(recipes.names())
        True
    """
    return sorted(_RECIPES)
