"""Numeric cases from files: inputs, weights, outputs and gradients of the published code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from convnn_geo.candidates import All
from convnn_geo.checks import check_name
from convnn_geo.metrics import Feature, Metric, PaperMix
from convnn_geo.nn import Branching, ConvNN2d, ConvNNAttention
from convnn_geo.recipes import conv2d_by_position
from convnn_geo.verify.runner import Row

BOUND = 1e-10
_KERNELS = {"depthwise-separable": "separable"}


def golden(directory: str | Path) -> list[Row]:
    """Check every ``*.npz`` of a directory: outputs and the gradients that it holds.

    Each file holds a json string ``meta`` (operator, k, metric, ...), inputs, weights and
    outputs in float64; see :func:`layer_of` for the weights' names.
    """
    files = sorted(Path(directory).glob("*.npz"))
    if not files:
        raise ValueError(f"no *.npz files in {directory}; pass the folder of numeric cases")
    return [row for file in files for row in check_file(file)]


def check_file(file: str | Path) -> list[Row]:
    """One file on the gather and message-passing backends."""
    with np.load(file) as archive:
        meta = json.loads(str(archive["meta"]))
        arrays = {key: torch.from_numpy(archive[key]) for key in archive.files if key != "meta"}
    rows = []
    for backend in ("gather", "message_passing"):
        layer, weights = layer_of(meta, arrays, backend)
        x = arrays["x"].clone().requires_grad_()
        out = layer(x)
        out = out[0] if isinstance(out, tuple) else out
        gradient = 0.0
        if "grad_out" in arrays:
            wanted = {"x": x, **weights}
            found = torch.autograd.grad(out, list(wanted.values()), arrays["grad_out"])
            for name, value in zip(wanted, found, strict=True):
                exact = arrays.get(f"grad_{name}")
                if exact is not None:
                    gradient = max(gradient, _error(value, exact))
        rows.append(
            Row(
                str(meta["operator"]),
                Path(file).stem,
                "numeric case",
                backend,
                "float64",
                _error(out, arrays["out"]),
                gradient,
                BOUND,
            )
        )
    return rows


def layer_of(
    meta: dict[str, Any], arrays: dict[str, Tensor], backend: str = "auto"
) -> tuple[nn.Module, dict[str, Tensor]]:
    """The layer that a file describes, and its parameters by the file's names.

    Args:
        meta: ``operator`` is ``"ConvNN2d"``, ``"ConvNNAttention"``, ``"KVT attention"`` or
            ``"branching"``.
        arrays: the weights, named as in the file.
        backend: of the layer.
    """
    operator = check_name("operator", meta.get("operator"), _BUILDERS)
    return _BUILDERS[operator](meta, arrays, backend)


def _metric(name: str) -> Metric:
    return Feature({"matmul": "scaled_dot", "scaled dot product": "scaled_dot"}.get(name, name))


def _fill(parameters: dict[str, Any], arrays: dict[str, Tensor]) -> dict[str, Tensor]:
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(arrays[name].reshape(parameter.shape))
    return dict(parameters)


def _convnn(meta: dict[str, Any], arrays: dict[str, Tensor], backend: str) -> Any:
    d, _, k = arrays["weight"].shape
    channels = arrays["x"].shape[1]
    padding = int(meta.get("zero_padding", 0))
    similarity = meta["similarity"]
    options: dict[str, Any] = {"dtype": torch.float64, "backend": backend}
    if meta.get("aggregate_coordinates"):
        options["encoding"] = "coordinates"
    if similarity == "spatial":
        side = round(k**0.5)
        layer = conv2d_by_position(channels, d, side, padding=padding, **options)
    else:
        metric = PaperMix(meta["lam"]) if similarity == "mixed" else _metric(meta["metric"])
        layer = ConvNN2d(
            channels, d, k=k, metric=metric, candidates=All(), padding=padding, **options
        )
    return layer, _fill({"weight": layer.weight, "bias": layer.bias}, arrays)


def _attention(meta: dict[str, Any], arrays: dict[str, Tensor], backend: str) -> Any:
    embed = arrays["x"].shape[-1]
    kernel = _KERNELS.get(meta["kernel"], meta["kernel"])
    layer = ConvNNAttention(
        embed,
        meta["heads"],
        bias=False,
        dtype=torch.float64,
        k=meta["k"],
        metric=_metric(meta["metric"]),
        weighting=meta["weighting"],
        kernel=kernel,
        backend=backend,
    )
    packed = torch.cat([arrays[f"{part}_weight"] for part in ("query", "key", "value")])
    taps = arrays["depthwise" if kernel == "separable" else "taps"]
    parameters: dict[str, Any] = {"packed": layer.in_proj_weight, "taps": layer.taps}
    values = {"packed": packed, "taps": taps, "out_weight": arrays["out_weight"]}
    if kernel == "separable":
        parameters["pointwise"] = layer.pointwise
        values["pointwise"] = arrays["pointwise"]
    _fill({**parameters, "out_weight": layer.out_proj.weight}, values)
    # The file has gradients of the three projections apart: split the packed one as they are.
    parts = [p.detach().clone().requires_grad_() for p in packed.chunk(3)]
    names = ("query_weight", "key_weight", "value_weight")
    return _Split(layer, parts), dict(zip(names, parts, strict=True))


class _Split(nn.Module):
    """The layer with its packed projection made from three leaves."""

    def __init__(self, layer: ConvNNAttention, parts: list[Tensor]) -> None:
        super().__init__()
        self.layer, self.parts = layer, parts

    def forward(self, x: Tensor) -> Any:
        """The layer on the packed leaves."""
        packed = {"in_proj_weight": torch.cat(self.parts)}
        return torch.func.functional_call(self.layer, packed, (x,))


def _kvt(meta: dict[str, Any], arrays: dict[str, Tensor], backend: str) -> Any:
    layer = ConvNNAttention(
        arrays["x"].shape[-1],
        meta["heads"],
        bias=False,
        dtype=torch.float64,
        k=meta["k"],
        backend=backend,
    )
    parameters = {"qkv_weight": layer.in_proj_weight, "out_weight": layer.out_proj.weight}
    return layer, _fill(parameters, arrays)


def _branching(meta: dict[str, Any], arrays: dict[str, Tensor], backend: str) -> Any:
    layer = Branching(
        arrays["x"].shape[1],
        arrays["out"].shape[1],
        meta["conv_kernel_size"],
        ratio=meta["ratio"],
        k=meta["k"],
        metric=_metric(meta["metric"]),
        dtype=torch.float64,
        backend=backend,
    )
    parts = {"convnn": layer.neighbors, "conv": layer.other, "point": layer.pointwise}
    parameters = {
        f"{name}_{kind}": getattr(part, kind)
        for name, part in parts.items()
        if part is not None
        for kind in ("weight", "bias")
    }
    return layer, _fill(parameters, arrays)


_BUILDERS = {
    "ConvNN2d": _convnn,
    "ConvNNAttention": _attention,
    "KVT attention": _kvt,
    "branching": _branching,
}


def _error(found: Tensor, exact: Tensor) -> float:
    return (
        float((found.detach() - exact).abs().max()) if found.shape == exact.shape else float("nan")
    )
