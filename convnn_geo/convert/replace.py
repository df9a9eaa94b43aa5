"""to_convnn: layers of a model replaced in place."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from convnn_geo.checks import check_instance
from convnn_geo.convert.known import is_ours, kind, places
from convnn_geo.convert.positions import place_tokens
from convnn_geo.convert.rules import Rule
from convnn_geo.convert.weights import NotApplicable

_HOOKS = ("_forward_", "_backward_", "_is_full_backward_hook")
"""Beginnings of the attributes where a module has the hooks of its runs."""


def to_convnn(model: nn.Module, rules: Iterable[Rule] | Rule | None = None) -> nn.Module:
    """Replace layers of a model by ours, in place, weights carried over.

    Known are ``nn.Conv1d``, ``nn.Conv2d``, ``nn.Conv3d``, ``nn.MultiheadAttention``, timm's
    ``Attention`` and PyG's ``DynamicEdgeConv``, wherever a model holds them. Each becomes what the
    first rule that matches says; where none does, it is left. Layers that are ours already stay.
    Nothing is replaced where an error is raised. Forward and backward hooks go over, and their
    handles still remove them.

    Args:
        model: any torch model.
        rules: in the order in which they are tried; every layer by the exact recipe by default.

    Returns:
        The model, or its replacement where the model itself is a known layer.

    Raises:
        NotApplicable: a layer can't become what its rule says; names both.
        ValueError: a rule's name fits no layer that is known.

    Example:
        >>> from convnn_geo import convert
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1))
        >>> rules = [convert.Rule("branching", depth=1), convert.Rule("exact")]
        >>> [type(layer).__name__ for layer in convert.to_convnn(model, rules)]
        ['ConvNN2d', 'Branching']
    """
    check_instance("model", model, nn.Module)
    rules = [Rule("exact")] if rules is None else [rules] if isinstance(rules, Rule) else [*rules]
    for rule in rules:
        check_instance("rules", rule, Rule)
    found = places(model, lambda layer: kind(layer) is not None or is_ours(layer))
    known = [(layer, names) for layer, names in found if not is_ours(layer)]
    _check_names(rules, [name for _, names in known for name in names], len(found) - len(known))
    replacements = []
    for depth, (layer, names) in enumerate(known):
        for rule in rules:
            if any(rule.matches(name, layer, depth) for name in names):
                replacements.append((layer, names, _become(rule, names[0], layer)))
                break
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # which only torch's own attention takes
    for layer, names, new in replacements:
        for name in names:
            if not name:
                return new
            parent, _, part = name.rpartition(".")
            setattr(model.get_submodule(parent), part, new)
        place_tokens(model, names[0], new)
    return model


def _become(rule: Rule, name: str, layer: nn.Module) -> nn.Module:
    where = f"{name or 'the model'} ({type(layer).__name__})"
    try:
        new: nn.Module = rule.become(layer)  # type: ignore[operator]
        _share_hooks(layer, new)
        return new
    except NotApplicable as error:
        become = rule.become.name  # type: ignore[union-attr]
        raise NotApplicable(f"{where} can't become {become!r}: {error}") from error
    except (TypeError, ValueError) as error:  # of an option, which the spec took unseen
        raise type(error)(f"{where}: {error}") from error


def _check_names(rules: list[Rule], names: list[str], ours: int) -> None:
    more = f"; {ours} more were converted before, and stay" if ours else ""
    for rule in rules:
        lone = Rule("keep", name=rule.name)
        if rule.name is not None and not any(lone.matches(n, nn.Identity(), 0) for n in names):
            raise ValueError(
                f"rule name={rule.name!r} fits no layer that is known; the model has: "
                f"{', '.join(names) or 'none'}{more}"
            )


def _share_hooks(old: nn.Module, new: nn.Module) -> None:
    """The hooks that a user put on a layer go on with what takes its place.

    Both have the same dictionaries, and not two alike, so that the handles still remove them.
    """
    if any(part is old for part in new.modules()):  # where they run as they did
        return
    hooks = {name: value for name, value in vars(old).items() if name.startswith(_HOOKS)}
    if not any(hooks.values()):
        return
    if any(vars(new)[name] for name in hooks):
        raise NotApplicable(
            "it has hooks, and what it would become has hooks of its own; remove those of one"
        )
    vars(new).update(hooks)
