"""Distances as numbers and tensors alone: what an operator can take."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from convnn_geo.metrics.angular import Angular
from convnn_geo.metrics.bilinear import BilinearForm, Summed
from convnn_geo.metrics.combined import Biased, Combination
from convnn_geo.metrics.differences import Differences
from convnn_geo.metrics.distances import Distances

_FORMS: tuple[Any, ...] = (Angular, Biased, BilinearForm, Combination, Differences, Summed)
# Grids are compared before: their sizes must stay open in what is traced.
_FIELDS = [tuple(f.name for f in fields(form) if f.name != "grids") for form in _FORMS]
_DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
_NONE, _NUMBER, _TENSOR, _DTYPE, _LIST, _FORM = map(float, range(6))


def pack(distances: Distances) -> tuple[list[float], list[Tensor]] | None:
    """Numbers and tensors, without gradient; None for distances by a function of the user's.

    Example:
        >>> numbers, tensors = pack(Differences(torch.zeros(2, 3), torch.ones(4, 3), p=1.0))
        >>> len(tensors), unpack(numbers, tensors).rows().shape
        (2, torch.Size([2, 4]))
    """
    numbers: list[float] = []
    tensors: list[Tensor] = []
    return (numbers, tensors) if _put(distances, numbers, tensors) else None


def unpack(numbers: Sequence[float], tensors: Sequence[Tensor]) -> Distances:
    """What :func:`pack` took apart."""
    found: Distances = _take(iter(numbers), iter(tensors))
    return found


def _put(value: Any, numbers: list[float], tensors: list[Tensor]) -> bool:
    """Append a value, behind what tells its kind; False where it is of none."""
    if value is None:
        numbers.append(_NONE)
    elif isinstance(value, Tensor):
        numbers.append(_TENSOR)
        tensors.append(value.detach())
    elif isinstance(value, torch.dtype):
        numbers.extend((_DTYPE, float(_DTYPES.index(value))))
    elif isinstance(value, (list, tuple)):
        numbers.extend((_LIST, float(len(value))))
        return all([_put(part, numbers, tensors) for part in value])
    elif isinstance(value, Distances):
        if type(value) not in _FORMS:
            return False
        form = _FORMS.index(type(value))
        numbers.extend((_FORM, float(form)))
        return all([_put(getattr(value, name), numbers, tensors) for name in _FIELDS[form]])
    else:
        numbers.extend((_NUMBER, float(value)))
    return True


def _take(numbers: Any, tensors: Any) -> Any:
    kind = next(numbers)
    if kind == _NONE:
        return None
    if kind == _TENSOR:
        return next(tensors)
    value = next(numbers)
    if kind == _NUMBER:
        return value
    if kind == _DTYPE:
        return _DTYPES[int(value)]
    if kind == _LIST:
        return [_take(numbers, tensors) for _ in range(int(value))]
    form = int(value)
    return _FORMS[form](*[_take(numbers, tensors) for _ in _FIELDS[form]])
