"""Rules: which layers are to become what."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from convnn_geo.convert.specs import Spec, spec


@dataclass(frozen=True)
class Rule:
    """Which layers are to become what; all conditions that are given must hold.

    Args:
        become: a :class:`Spec`, its name, a recipe, or any function from a layer to a layer.
        name: glob of the layer's name, e.g. ``"features.*"``.
        type: class of the layer, or a tuple of classes.
        depth: number of known layers before it in the model's order, or a range of them.
        where: given the layer's name and the layer, whether the rule holds.
        optional: leave a layer that can't become it as it is, rather than raise an error;
            :func:`~convnn_geo.convert.report` says why.

    Raises:
        TypeError: a condition of the wrong type, or a layer to become rather than how to make one.
        ValueError: an unknown name to become.

    Example:
        >>> rule = Rule("keep", name="features.*", type=nn.Conv2d, depth=range(1, 4))
        >>> rule.matches("features.0", nn.Conv2d(1, 1, 1), 1)
        True
        >>> rule.matches("features.0", nn.Conv2d(1, 1, 1), 0)
        False
    """

    become: Spec | str | Callable[[nn.Module], nn.Module]
    name: str | None = None
    type: type[Any] | tuple[type[Any], ...] | None = None
    depth: int | range | None = None
    where: Callable[[str, nn.Module], bool] | None = None
    optional: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.become, Spec):
            object.__setattr__(self, "become", spec(self.become))
        if self.name is not None and not isinstance(self.name, str):
            raise TypeError(f"Rule: name is a glob such as 'features.*', got {self.name!r}")
        classes = self.type if isinstance(self.type, tuple) else (self.type,)
        if self.type is not None and not all(isinstance(c, type) for c in classes):
            raise TypeError(f"Rule: type is a class or a tuple of classes, got {self.type!r}")
        whole = isinstance(self.depth, int) and not isinstance(self.depth, bool)
        if self.depth is not None and not whole and not isinstance(self.depth, range):
            raise TypeError(f"Rule: depth is an integer or a range, got {self.depth!r}")
        if self.where is not None and not callable(self.where):
            raise TypeError(f"Rule: where is a function of name and layer, got {self.where!r}")
        if not isinstance(self.optional, bool):
            raise TypeError(f"Rule: optional is True or False, got {self.optional!r}")

    @property
    def conditions(self) -> dict[str, Any]:
        """The conditions that are given, by name."""
        given = {name: getattr(self, name) for name in ("name", "type", "depth", "where")}
        return {name: value for name, value in given.items() if value is not None}

    def __str__(self) -> str:
        given = "".join(f", {name}={_short(value)}" for name, value in self.conditions.items())
        given += ", optional=True" if self.optional else ""
        return f"Rule({self.become.name!r}{given})"  # type: ignore[union-attr]

    def matches(self, name: str, layer: nn.Module, depth: int) -> bool:
        """Whether all conditions hold."""
        depths = (self.depth,) if isinstance(self.depth, int) else self.depth
        return (
            (self.name is None or fnmatchcase(name, self.name))
            and (self.type is None or isinstance(layer, self.type))
            and (depths is None or depth in depths)
            and (self.where is None or bool(self.where(name, layer)))
        )


def _short(value: Any) -> str:
    """A condition, classes and functions by their names."""
    if isinstance(value, tuple):
        return f"({', '.join(map(_short, value))})"
    return getattr(value, "__name__", repr(value))
