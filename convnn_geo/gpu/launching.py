"""Launching a kernel without asking Triton anew which of its compiled forms a call needs.

For that Triton looks at each argument: some 40 microseconds for a kernel of 40 arguments, more than
attention itself takes. What it looks at is known here, so that a form, once found, is kept by it.
"""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor

_MOST = 4096
"""Forms that are kept."""
_forms: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    tensors: tuple[Tensor | None, ...],
    numbers: tuple[int, ...] = (),
    floats: tuple[float, ...] = (),
    **constants: Any,
) -> None:
    """``kernel[grid](*tensors, *numbers, *floats, **constants)``.

    Args:
        kernel: decorated with ``triton.jit``.
        grid: programs on up to three axes.
        tensors: the first of them is one.
        numbers: integers, each of which may have a form of its own.
        floats: numbers that all forms take.
        constants: those of the kernel, and options of the launch, always in one order.
    """
    key = (
        id(kernel),
        tensors[0].device,  # type: ignore[union-attr]
        numbers,
        tuple(constants.values()),
        *[None if t is None else (t.dtype, t.data_ptr() % 16) for t in tensors],
    )
    form = _forms.get(key)
    if form is not None:
        compiled, last = form
        compiled[(*grid, 1, 1)[:3]](*tensors, *numbers, *floats, *last)
        return
    compiled = kernel[grid](*tensors, *numbers, *floats, **constants)
    if compiled is None or not _takes_constants():  # None: it was interpreted
        return
    given = len(tensors) + len(numbers) + len(floats)
    if len(_forms) >= _MOST:
        _forms.clear()
    _forms[key] = compiled, tuple(constants[name] for name in kernel.arg_names[given:])


@functools.cache
def _takes_constants() -> bool:
    """Whether forms are launched with their constants, as they are from Triton 3.3 on."""
    import triton

    return tuple(int(part) for part in triton.__version__.split(".")[:2]) >= (3, 3)
