"""Claim: feature k-NN ConvNN2d costs at most 6 times F.conv2d on the CPU, and keeps no b c n k."""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convnn_geo.bench import forward_and_backward, machine
from convnn_geo.nn import ConvNN2d


def with_copies(x: Tensor, weight: Tensor) -> Tensor:
    """All scores, topk, a gathered copy for each neighbour, a strided convolution over it."""
    b, c, h, w = x.shape
    k = weight.shape[-1]
    unit = F.normalize(x.flatten(2), dim=1).detach()
    index = (unit.transpose(1, 2) @ unit).topk(k, dim=-1).indices
    index = index.flatten(1).unsqueeze(1).expand(b, c, h * w * k)
    taps = x.flatten(2).gather(2, index)
    return F.conv1d(taps, weight, stride=k).unflatten(-1, (h, w))


def main() -> None:
    torch.manual_seed(0)
    print(machine())
    b, c, h, w, k = 32, 64, 32, 32, 9
    layer = ConvNN2d(c, c, k=k, metric="cosine")
    forward_and_backward(
        f"{b} x {c} x {h} x {w}, k = {k}",
        {
            "nn.Conv2d": nn.Conv2d(c, c, 3, padding=1),
            "ConvNN2d, k = 9, cosine": layer,
            "scores, topk, gathered copies": lambda x: with_copies(x, layer.weight),
        },
        [torch.randn(b, c, h, w) for _ in range(4)],
        f"Claim: ratio at most 6 for the second row, forward. b c n k in float32 is "
        f"{b * c * h * w * k * 4 / 2**20:.0f} MiB; all scores are "
        f"{b * (h * w) ** 2 * 4 / 2**20:.0f} MiB. Floor: the scores' product and the taps' "
        f"are {1 + h * w / (c * k):.1f} times the convolution's arithmetic.",
        rounds=15,
    )


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    main()
