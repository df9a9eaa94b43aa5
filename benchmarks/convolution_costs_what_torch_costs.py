"""Claim: ConvNN2d as a convolution costs at most 1.05 times F.conv2d, forward and backward."""

from __future__ import annotations

import argparse

import torch
from torch import nn

from convnn_geo.bench import forward_and_backward, machine
from convnn_geo.nn import ConvNN2d


def main() -> None:
    torch.manual_seed(0)
    print(machine())
    for shape in ((32, 64, 32, 32), (8, 3, 224, 224)):
        conv = nn.Conv2d(shape[1], 64, 3, padding=1)
        layer = ConvNN2d(shape[1], 64, 3, padding=1)
        layer.load_state_dict(conv.state_dict())
        forward_and_backward(
            f"{'x'.join(map(str, shape))}, 3x3, 64 channels out",
            {"nn.Conv2d": conv, "ConvNN2d": layer},
            [torch.randn(shape) for _ in range(4)],
            "Claim: ratio at most 1.05. Floor: 1, since it is the same call.",
            rounds=45,  # what is looked for is smaller than what disturbs a single one
        )


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    main()
