"""Claim: feature k-NN ConvNN2d costs at most 8 times F.conv2d on the CPU, and keeps no b c n k."""

from __future__ import annotations

import torch
from measure import compare, machine, report
from torch import Tensor, nn

from convnn_geo.nn import ConvNN2d


def published(x: Tensor, weight: Tensor) -> Tensor:
    """All scores, topk, a gathered copy for each neighbour, a strided convolution over it."""
    b, c, h, w = x.shape
    k = weight.shape[-1]
    unit = torch.nn.functional.normalize(x.flatten(2), dim=1)
    index = (unit.transpose(1, 2) @ unit).topk(k, dim=-1).indices
    rows = x.flatten(2).unsqueeze(2).expand(b, c, h * w, h * w)
    taps = rows.gather(3, index.unsqueeze(1).expand(b, c, h * w, k)).flatten(2)
    return torch.nn.functional.conv1d(taps, weight, stride=k).unflatten(-1, (h, w))


def main() -> None:
    """Print the tables."""
    torch.manual_seed(0)
    print(machine())
    b, c, h, w, k = 32, 64, 32, 32, 9
    conv = nn.Conv2d(c, c, 3, padding=1)
    layer = ConvNN2d(c, c, k=k, metric="cosine")
    inputs = [torch.randn(b, c, h, w) for _ in range(4)]
    turn = iter(range(10**9))

    def forward(module: object) -> object:
        with torch.no_grad():
            return module(inputs[next(turn) % len(inputs)])  # type: ignore[operator]

    def both(module: object) -> None:
        x = inputs[next(turn) % len(inputs)].requires_grad_()
        module(x).sum().backward()  # type: ignore[operator]

    for name, run in (("forward", forward), ("forward and backward", both)):
        timings = compare(
            {
                "nn.Conv2d": lambda r=run: r(conv),
                "ConvNN2d, k = 9, cosine": lambda r=run: r(layer),
                "scores, topk, gathered copies": lambda r=run: r(
                    lambda x: published(x, layer.weight)
                ),
            },
            rounds=9,
        )
        report(
            f"{b} x {c} x {h} x {w}, k = {k}, {name}",
            timings,
            f"Claim: ratio at most 8 for the second row, forward. b c n k in float32 is "
            f"{b * c * h * w * k * 4 / 2**20:.0f} MiB; all scores are "
            f"{b * (h * w) ** 2 * 4 / 2**20:.0f} MiB. Floor: the scores' product and the taps' "
            f"are {1 + h * w / (c * k):.1f} times the convolution's arithmetic.",
        )


if __name__ == "__main__":
    main()
