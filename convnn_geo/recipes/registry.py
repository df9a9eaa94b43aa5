"""The list of recipes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

_RECIPES: dict[str, Callable[..., Any]] = {}
_BY_POSITION: set[Callable[..., Any]] = set()
Function = TypeVar("Function", bound=Callable[..., Any])


def recipe(function: Function) -> Function:
    """Enter a function into the list."""
    _RECIPES[function.__name__] = function
    return function


def recipe_by_position(function: Function) -> Function:
    """Enter a recipe that has no window: it takes the nearest positions that make one up."""
    _BY_POSITION.add(function)
    return recipe(function)


def by_position(function: Callable[..., Any]) -> bool:
    """Whether a recipe takes the nearest positions in the place of a window.

    Example:
        >>> from convnn_geo import recipes
        >>> by_position(recipes.conv2d_by_position), by_position(recipes.conv2d)
        (True, False)
    """
    return function in _BY_POSITION


def names() -> list[str]:
    """Names of all recipes.

    Example:
        >>> from convnn_geo import recipes
        >>> {"conv2d", "kvt", "vig"} <= set(recipes.names())
        True
    """
    return sorted(_RECIPES)
