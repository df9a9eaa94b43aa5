"""Claim: ConvNNAttention without k costs at most 1.05 times torch's attention."""

from __future__ import annotations

import torch
from measure import compare, machine, report
from torch import Tensor, nn

from convnn_geo.metrics import Feature, interpolate
from convnn_geo.nn import ConvNNAttention


def main() -> None:
    """Print the tables."""
    torch.manual_seed(0)
    print(machine())
    for b, n, c, heads in ((32, 197, 192, 3), (4, 1024, 192, 3)):
        torch_layer = nn.MultiheadAttention(c, heads, batch_first=True)
        layer = ConvNNAttention(c, heads)
        layer.load_state_dict(torch_layer.state_dict())
        mixed = ConvNNAttention(c, heads, metric=interpolate("squared_spatial", Feature("scaled_dot"), 0.9))
        inputs = [torch.randn(b, n, c) for _ in range(4)]
        turn = iter(range(10**9))

        def forward(module: nn.Module, inputs: list[Tensor] = inputs) -> Tensor:
            x = inputs[next(turn) % len(inputs)]
            with torch.no_grad():
                return module(x, x, x, need_weights=False)[0]

        def both(module: nn.Module, inputs: list[Tensor] = inputs) -> None:
            x = inputs[next(turn) % len(inputs)].requires_grad_()
            module(x, x, x, need_weights=False)[0].sum().backward()

        torch_layer.train(), layer.train(), mixed.train()
        for name, run in (("forward", forward), ("forward and backward", both)):
            timings = compare(
                {
                    "nn.MultiheadAttention": lambda r=run: r(torch_layer),
                    "ConvNNAttention": lambda r=run: r(layer),
                    "ConvNNAttention, 0.1 position + 0.9 feature": lambda r=run: r(mixed),
                }
            )
            report(
                f"{b} x {n} x {c}, {heads} heads, {name}",
                timings,
                "Claim: ratio at most 1.05 for the second row. Floor: 1, since both call "
                "scaled_dot_product_attention; the third row pays for two more channels.",
            )


if __name__ == "__main__":
    main()
