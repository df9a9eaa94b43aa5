"""Claim: ConvNNAttention without k costs at most 1.05 times torch's attention."""

from __future__ import annotations

import argparse
from functools import partial

import torch
from torch import Tensor, nn

from convnn_geo.bench import forward_and_backward, machine
from convnn_geo.metrics import interpolate
from convnn_geo.nn import ConvNNAttention


def attend(layer: nn.Module, x: Tensor) -> Tensor:
    return layer(x, x, x, need_weights=False)[0]


def main() -> None:
    torch.manual_seed(0)
    print(machine())
    for b, n, c, heads in ((32, 197, 192, 3), (4, 1024, 192, 3)):
        attention = nn.MultiheadAttention(c, heads, batch_first=True)
        layer = ConvNNAttention(c, heads)
        mixture = interpolate("squared_spatial", "scaled_dot", 0.9)
        mixed = ConvNNAttention(c, heads, metric=mixture)
        for other in (layer, mixed):
            other.load_state_dict(attention.state_dict())
        forward_and_backward(
            f"{b} x {n} x {c}, {heads} heads",
            {
                "nn.MultiheadAttention": partial(attend, attention),
                "ConvNNAttention": partial(attend, layer),
                "ConvNNAttention, 0.1 position + 0.9 feature": partial(attend, mixed),
            },
            [torch.randn(b, n, c) for _ in range(4)],
            "Claim: ratio at most 1.05 for the second row. Floor: 1, since both call "
            "scaled_dot_product_attention; the third row pays for two more channels.",
        )


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    main()
