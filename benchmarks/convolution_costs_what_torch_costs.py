"""Claim: ConvNN2d as a convolution costs at most 1.05 times F.conv2d, forward and backward."""

from __future__ import annotations

import torch
from measure import compare, machine, report
from torch import Tensor, nn

from convnn_geo.nn import ConvNN2d


def main() -> None:
    """Print both tables."""
    torch.manual_seed(0)
    print(machine())
    for shape in ((32, 64, 32, 32), (8, 3, 224, 224)):
        conv = nn.Conv2d(shape[1], 64, 3, padding=1)
        layer = ConvNN2d(shape[1], 64, 3, padding=1)
        layer.load_state_dict(conv.state_dict())
        inputs = [torch.randn(shape) for _ in range(4)]
        turn = iter(range(10**9))

        def forward(module: nn.Module, inputs: list[Tensor] = inputs) -> Tensor:
            with torch.no_grad():
                return module(inputs[next(turn) % len(inputs)])

        def both(module: nn.Module, inputs: list[Tensor] = inputs) -> None:
            x = inputs[next(turn) % len(inputs)].requires_grad_()
            module(x).sum().backward()

        for name, run in (("forward", forward), ("forward and backward", both)):
            timings = compare(
                {"nn.Conv2d": lambda r=run: r(conv), "ConvNN2d": lambda r=run: r(layer)}
            )
            report(
                f"{'x'.join(map(str, shape))}, 3x3, 64 channels out, {name}",
                timings,
                "Claim: ratio at most 1.05. Floor: 1, since it is the same call.",
            )


if __name__ == "__main__":
    main()
