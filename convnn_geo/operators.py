"""Operators of our own: opaque to who looks on, and plain function calls where nobody does."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

Result = TypeVar("Result")
_PLAIN = (Tensor, nn.Parameter)
_TAGGED = "tags" in inspect.signature(torch.library.custom_op).parameters
_UNSAFE = getattr(torch.Tag, "cudagraph_unsafe", None) if _TAGGED else None
"""The tag of operators that no CUDA graph can hold, of torch releases that know it."""


class Operator:
    """A function of tensors, known to torch as ``torch.ops.convnn_geo.<name>``.

    Tracers, modes, transforms and tensors of other classes see the operator that torch registers;
    so do tensors that torch is yet to negate. To call that costs more time than to launch a kernel,
    several times as much where gradients are wanted: where nobody looks on the function is called
    directly, under the same rules. It knows nothing of autograd, and returns tensors that are
    nobody else's.

    Args:
        name: of the operator.
        function: what it does, annotated as :func:`torch.library.custom_op` wants it.
        waits: whether it may wait for a GPU's answer, which no CUDA graph can hold.
    """

    def __init__(self, name: str, function: Callable[..., Any], waits: bool = False) -> None:
        self.name, self.function = name, function
        options: dict[str, Any] = {"tags": (_UNSAFE,)} if waits and _UNSAFE is not None else {}
        register = torch.library.custom_op(f"convnn_geo::{name}", mutates_args=(), **options)
        self.registered: Any = register(function)
        self.learns: Any = None

    def register_fake(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Shapes and dtypes of the results, for tensors without values."""
        self.registered.register_fake(function)
        return function

    def register_flops(self, function: Callable[..., int]) -> Callable[..., int]:
        """What torch's ``FlopCounterMode`` adds up for a call: two a multiply-add.

        Args:
            function: of those arguments of the operator that it names; None for one left out.
        """
        names, wanted = (list(inspect.signature(f).parameters) for f in (self.function, function))

        def counted(*args: Any, out_val: Any = None, **kwargs: Any) -> int:
            given = {**dict(zip(names, args, strict=False)), **kwargs}
            return function(**{name: given.get(name) for name in wanted})

        packet = getattr(torch.ops.convnn_geo, self.name)
        register_flop_formula(packet, get_raw=True)(counted)
        return function

    def register_autograd(
        self, backward: Callable[..., Any], setup_context: Callable[..., None]
    ) -> None:
        """The gradient; see :meth:`torch.library.CustomOpDef.register_autograd`."""
        self.registered.register_autograd(backward, setup_context=setup_context)

        def forward(ctx: Any, *args: Any) -> Any:
            found = directly(self.function, *args)
            setup_context(ctx, args, found)
            return found

        parts = {"forward": staticmethod(forward), "backward": staticmethod(backward)}
        self.learns = type(self.name, (torch.autograd.Function,), parts)

    def __call__(self, *args: Any) -> Any:
        """Call it with all arguments by place."""
        if is_watched():
            return self.registered(*args)
        wanted = False
        for value in args:
            if isinstance(value, Tensor):
                if type(value) not in _PLAIN or value.is_meta or value.is_neg():
                    return self.registered(*args)  # which makes memory hold what it is read as
                wanted = wanted or value.requires_grad
        if wanted and self.learns is not None and torch.is_grad_enabled():
            return self.learns.apply(*args)
        return directly(self.function, *args)


def is_mapped(tensor: Tensor) -> bool:
    """Whether a tensor stands for many: gradients do where ``is_grads_batched`` asks for many."""
    functorch = torch._C._functorch
    return functorch.is_batchedtensor(tensor) or functorch.is_legacy_batchedtensor(tensor)


def directly(function: Callable[..., Any], *args: Any) -> Any:
    """Call it without a graph where nobody looks on; no result is a view."""
    with torch._C._AutoDispatchBelowADInplaceOrView():
        return function(*args)


def operator(name: str, waits: bool = False) -> Callable[[Callable[..., Any]], Operator]:
    """Make a function the operator ``convnn_geo::<name>``; see :class:`Operator`.

    Example:
        >>> @operator("doctest_double")
        ... def double(x: Tensor) -> Tensor:
        ...     return x + x
        >>> double(torch.ones(2)), torch.ops.convnn_geo.doctest_double(torch.ones(2))
        (tensor([2., 2.]), tensor([2., 2.]))
    """
    return lambda function: Operator(name, function, waits)


def without_gradient(make: Callable[[], Result]) -> Result:
    """What a function makes, without a graph.

    A traced program gets no region for it: nothing may happen inside, and what ``torch.export``
    makes of a region of nothing torch can't load. Searches take no gradient in any case.
    """
    if torch.compiler.is_compiling():
        return make()
    with torch.no_grad():
        return make()


def is_traced() -> bool:
    """Whether a compiler, a tracer or a mode, such as that of fake tensors, sees each operator."""
    compiling = torch.compiler.is_compiling()
    return compiling or torch._C._len_torch_dispatch_stack() > 0 or torch._C._is_tracing()


def is_transformed() -> bool:
    """Inside ``torch.func`` or forward-mode differentiation, which custom operators do not know."""
    if torch.compiler.is_compiling():
        return False
    dual = torch.autograd.forward_ad._current_level >= 0
    return dual or torch._C._are_functorch_transforms_active()


def is_watched() -> bool:
    """Either: what is run may then not simply be run."""
    return is_traced() or is_transformed()
