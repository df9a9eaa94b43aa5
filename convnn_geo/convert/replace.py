"""to_convnn: layers of a model replaced in place."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from torch import nn

from convnn_geo.checks import check_instance
from convnn_geo.convert.known import KNOWN, is_ours, kind, places
from convnn_geo.convert.placing import place_tokens
from convnn_geo.convert.rules import Rule
from convnn_geo.convert.specs import Spec
from convnn_geo.convert.weights import NotApplicable, set_mode

_HOOKS = ("_forward_", "_backward_", "_is_full_backward_hook")
"""Beginnings of the attributes where a module has the hooks of its runs."""
_STATE_HOOKS = ("_state_dict_", "_load_state_dict_")
"""Those of its state, written for parameters by their names."""

_ROOT = "the model itself"
"""Where a name would be empty."""

_Places = list[tuple[nn.Module, list[str]]]
_Replacements = list[tuple[nn.Module, list[str], nn.Module]]


def to_convnn(
    model: nn.Module, rules: Iterable[Rule] | Rule | Spec | str | None = None
) -> nn.Module:
    """Replace layers of a model by ours, in place, weights carried over.

    Known are ``nn.Conv1d``, ``nn.Conv2d``, ``nn.Conv3d``, ``nn.MultiheadAttention``, timm's
    ``Attention`` and PyG's ``DynamicEdgeConv``, wherever a model holds them. Each becomes what the
    first rule that matches says; where none does, it is left. With no rules a layer that has no
    exact counterpart is left, too, as by any rule that is ``optional``, and :func:`report` says
    why. Layers that are ours already stay, and so do those with a forward of their own, such as the
    windowed attention of timm's Swin: :func:`report` names what was converted or could be, and
    counts these among the others.
    Nothing is replaced where an error is raised. Forward and backward hooks go over, and their
    handles still remove them.

    ``torch.compile`` and ``torch.export`` take a converted model; to ``torch.fx`` a layer of ours
    is one node; ``torch.jit.trace`` is refused. ``torch.func.vmap`` maps exact layers and attention
    without taps; others take what it would map as a part of the batch.

    Args:
        model: any torch model.
        rules: in the order in which they are tried; a spec, or its name, for every layer; every
            layer by the exact recipe by default, where there is one.

    Returns:
        The model, or its replacement where the model itself is a known layer.

    Raises:
        NotApplicable: a layer can't become what its rule says, which is not optional, or it shares
            a parameter with another part of the model and would not any more; names both.
        ValueError: a rule's conditions fit no layer that is known, or a rule without conditions
            stands before others. A rule may fit those layers alone that earlier rules took, so that
            a list of rules serves models that differ.

    Example:
        >>> from convnn_geo import convert
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1))
        >>> rules = [convert.Rule("branching", depth=1), convert.Rule("exact")]
        >>> [type(layer).__name__ for layer in convert.to_convnn(model, rules)]
        ['ConvNN2d', 'Branching']
    """
    check_instance("model", model, nn.Module)
    if rules is None:
        rules = Rule("exact", optional=True)
    elif isinstance(rules, (str, Spec)):
        rules = Rule(rules)
    if not isinstance(rules, (Rule, Iterable)):
        raise TypeError(f"rules: expected rules, or the name of a spec, got {rules!r}")
    rules = [rules] if isinstance(rules, Rule) else [*rules]
    for rule in rules:
        check_instance("rules", rule, Rule)
    found = places(model, lambda layer: kind(layer) is not None or is_ours(layer))
    known = [(layer, names) for layer, names in found if not is_ours(layer)]
    chosen = [_first(rules, names, layer, depth) for depth, (layer, names) in enumerate(known)]
    _check_rules(rules, chosen, known, len(found) - len(known))
    replacements, left = _replacements(model, chosen, known)
    for layer, _ in known:
        vars(layer).pop("left_because", None)  # of a call before
    for layer, reason in left.items():
        layer.left_because = reason  # type: ignore[assignment]
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False  # which only torch's own attention takes
    for _, names, new in replacements:
        for name in names:
            if not name:
                return new
            parent, _, part = name.rpartition(".")
            setattr(model.get_submodule(parent), part, new)
        place_tokens(model, names[0], new)
    return model


def _replacements(
    model: nn.Module, chosen: list[Rule | None], known: _Places
) -> tuple[_Replacements, dict[nn.Module, str]]:
    """What takes the place of what; and the layers that optional rules leave, each with why."""
    made: _Replacements = []
    left: dict[nn.Module, str] = {}
    rules: dict[nn.Module, Rule] = {}
    for rule, (layer, names) in zip(chosen, known, strict=True):
        if rule is None:
            continue
        rules[layer] = rule
        try:
            made.append((layer, names, _become(rule, names[0], layer)))
        except NotApplicable as error:
            if not rule.optional:
                raise NotApplicable(
                    f"{_where(names[0], layer)} can't become {rule.become.name!r}: {error}; "  # type: ignore[union-attr]
                    f"{replace(rule, optional=True)} leaves such layers as they are"
                ) from error
            left[layer] = str(error)
    for layer, reason in _ties(model, made).items():
        if not rules[layer].optional:
            name = next(names[0] for old, names, _ in made if old is layer)
            raise NotApplicable(f"{_where(name, layer)} {reason}")
        left[layer] = f"it {reason}"
    return [replacement for replacement in made if replacement[0] not in left], left


def _where(name: str, layer: nn.Module) -> str:
    return f"{name or _ROOT} ({type(layer).__name__})"


def _become(rule: Rule, name: str, layer: nn.Module) -> nn.Module:
    try:
        new: nn.Module = rule.become(layer)  # type: ignore[operator]
        _share_hooks(layer, new)
        set_mode(new, layer.modules(), layer.training)
        return new
    except NotApplicable:
        raise
    except (TypeError, ValueError) as error:  # of an option, which the spec took unseen
        raise type(error)(f"{_where(name, layer)}: {error}") from error


def _ties(model: nn.Module, replacements: _Replacements) -> dict[nn.Module, str]:
    """Layers that share a parameter that a conversion would draw apart, and with whom."""
    within = {id(part): names[0] for old, names, _ in replacements for part in old.modules()}
    holders: dict[int, set[str]] = {}
    for name, part in model.named_modules():
        for parameter in part._parameters.values():
            if parameter is not None:
                holder = within.get(id(part), name) or _ROOT
                holders.setdefault(id(parameter), set()).add(holder)
    found: dict[nn.Module, str] = {}
    for old, names, new in replacements:
        kept = {id(parameter) for parameter in new.parameters()}
        for name, parameter in old.named_parameters():
            others = sorted(holders[id(parameter)] - {names[0] or _ROOT})
            if others and kept and id(parameter) not in kept:
                found[old] = (
                    f"shares its {name} with {', '.join(others)}, and a {type(new).__name__} in "
                    "its place would not; keep such layers, convert them by 'exact', or give each "
                    "a parameter of its own before: "
                    f"layer.{name} = nn.Parameter(layer.{name}.detach().clone())"
                )
    return found


def _first(rules: list[Rule], names: list[str], layer: nn.Module, depth: int) -> Rule | None:
    """The first rule that matches a layer under any of its names."""
    for rule in rules:
        if any(rule.matches(name, layer, depth) for name in names):
            return rule
    return None


def _check_rules(
    rules: list[Rule], chosen: list[Rule | None], known: _Places, converted: int
) -> None:
    """Raise for rules that can't have been meant: they fit no layer, or are never tried."""
    more = (
        f"; {converted} more were converted before, and stay: set_interpolation moves them, and "
        "what is to become something else is converted from the model as it was"
        if converted
        else ""
    )
    for place, rule in enumerate(rules):
        if not rule.conditions and place + 1 < len(rules):
            raise ValueError(
                f"rules[{place}], {rule}, takes every layer, so that rules[{place + 1}], "
                f"{rules[place + 1]}, is never tried; put it last"
            )
        if not rule.conditions or any(rule is other for other in chosen):
            continue
        every = enumerate(known)  # it may fit those alone that earlier rules took
        if all(_first([rule], names, layer, depth) is None for depth, (layer, names) in every):
            there = ", ".join(f"{names[0]} ({type(layer).__name__})" for layer, names in known)
            raise ValueError(
                f"rules[{place}], {rule}, fits no layer; expected a layer that can be converted "
                f"({KNOWN}), and of those the model has, in the order of depth: "
                f"{there or 'none'}{more}"
            )


def _share_hooks(old: nn.Module, new: nn.Module) -> None:
    """The hooks that a user put on a layer go on with what takes its place.

    Both have the same dictionaries, and not two alike, so that the handles still remove them.
    """
    kept = set(new.modules())
    for name, part in old.named_modules():
        if part in kept:  # where they run as they did
            continue
        if any(value for key, value in vars(part).items() if key.startswith(_STATE_HOOKS)):
            raise NotApplicable(
                f"{f'its {name}' if name else 'it'} has hooks of its state_dict, which may not fit "
                "other parameters; remove them, and register them again on what takes its place"
            )
        hooks = {key: value for key, value in vars(part).items() if key.startswith(_HOOKS)}
        if not any(hooks.values()):
            continue
        if part is not old:
            raise NotApplicable(f"its {name} has hooks, and goes; remove them first")
        if any(vars(new)[key] for key in hooks):
            raise NotApplicable(
                "it has hooks, and what it would become has hooks of its own; remove those of one"
            )
        vars(new).update(hooks)
