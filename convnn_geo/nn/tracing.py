"""What a layer is to torch's tracers: one node of a graph, or an error that says what to use."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar

import torch
from torch import nn
from torch.fx import Proxy

Forward = TypeVar("Forward", bound=Callable[..., Any])


def one_node(forward: Forward) -> Forward:
    """A forward that ``torch.fx`` keeps whole, as it keeps those of torch's own layers.

    What a layer does depends on the sizes of its input, which ``torch.fx`` does not know, and
    ``torch.jit.trace`` would fix. ``torch.compile`` and ``torch.export`` look inside.

    Raises:
        RuntimeError: traced by ``torch.jit.trace``, or by ``torch.fx`` without a model around it.

    Example:
        >>> from convnn_geo.nn import ConvNN2d
        >>> graph = torch.fx.symbolic_trace(nn.Sequential(ConvNN2d(3, 8, 3), nn.ReLU())).graph
        >>> [node.op for node in graph.nodes]
        ['placeholder', 'call_module', 'call_module', 'output']
    """

    @wraps(forward)
    def call(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if torch.jit.is_tracing():
            raise RuntimeError(
                f"{type(self).__name__}: torch.jit.trace would fix the sizes of this one input; "
                "use torch.export.export(model, inputs); torch.onnx.export(..., dynamo=True) takes "
                "layers that come down to torch's own, and none that searches"
            )
        for value in (*args, *kwargs.values()):
            for part in value if isinstance(value, (tuple, list)) else (value,):
                if isinstance(part, Proxy):
                    return _node(self, part, args, kwargs)
        return forward(self, *args, **kwargs)

    return call  # type: ignore[return-value]


def _node(layer: nn.Module, value: Proxy, args: Any, kwargs: Any) -> Proxy:
    tracer: Any = value.tracer
    if tracer.root is layer:
        raise RuntimeError(
            f"{type(layer).__name__}: torch.fx has no graph of a layer alone; trace a model that "
            "holds it, e.g. nn.Sequential(layer)"
        )
    name = tracer.path_of_module(layer)
    return tracer.create_proxy("call_module", name, args, kwargs)
