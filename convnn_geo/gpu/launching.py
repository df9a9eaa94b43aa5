"""Launching a kernel without asking Triton anew which of its compiled forms a call needs.

For that Triton looks at each argument: some 40 microseconds for a kernel of 40 arguments, more than
attention itself takes. What it looks at is known here, so that a form, once found, is kept by it.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

_MOST = 4096
"""Launches that are kept, and forms of each."""
_launches: dict[tuple[Any, ...], Launch] = {}


class Launch:
    """Launches of a kernel that differ by their tensors, of the same dtypes, and floats alone.

    Args:
        kernel: decorated with ``triton.jit``.
        numbers: integers, each of which may have a form of its own.
        constants: those of the kernel, and options of the launch.
    """

    def __init__(self, kernel: Any, numbers: tuple[int, ...] = (), **constants: Any) -> None:
        self.kernel, self.numbers, self.constants = kernel, numbers, constants
        self._forms: dict[tuple[int | None, ...], tuple[Any, tuple[Any, ...]]] = {}

    def __call__(
        self,
        grid: tuple[int, ...],
        tensors: tuple[Tensor | None, ...],
        floats: tuple[float, ...] = (),
    ) -> None:
        """``kernel[grid](*tensors, *numbers, *floats, **constants)``."""
        lie = tuple([None if t is None else t.data_ptr() % 16 for t in tensors])
        form = self._forms.get(lie)
        if form is not None:
            compiled, last = form
            compiled[(*grid, 1, 1)[:3]](*tensors, *self.numbers, *floats, *last)
            return
        compiled = self.kernel[grid](*tensors, *self.numbers, *floats, **self.constants)
        if compiled is None:  # it was interpreted
            return
        given = len(tensors) + len(self.numbers) + len(floats)
        names = self.kernel.arg_names[given:]
        if len(self._forms) >= _MOST:
            self._forms.clear()
        self._forms[lie] = compiled, tuple(self.constants[name] for name in names)


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
    kinds = [None if t is None else t.dtype for t in tensors]
    of_tensors = (tensors[0].device, *kinds)  # type: ignore[union-attr]
    prepared(kernel, of_tensors, numbers, **constants)(grid, tensors, floats)


def prepared(
    kernel: Any, kinds: tuple[Any, ...], numbers: tuple[int, ...] = (), **constants: Any
) -> Launch:
    """The :class:`Launch` of all who ask with the same arguments.

    Args:
        kernel: decorated with ``triton.jit``.
        kinds: from which the device and the dtype of each tensor follow.
        numbers: as :class:`Launch` takes them.
        constants: likewise, always in one order.
    """
    key = (id(kernel), kinds, numbers, tuple(constants.values()))
    known = _launches.get(key)
    if known is None:
        if len(_launches) >= _MOST:
            _launches.clear()
        known = _launches[key] = Launch(kernel, numbers, **constants)
    return known
