"""Claim: between convolution and features, a ConvNN2d looks at few of all pairs, on the CPU."""

from __future__ import annotations

import argparse

import torch
from torch import nn

from convnn_geo import recipes
from convnn_geo.bench import forward_and_backward, machine
from convnn_geo.datasets import photograph

LAM = 0.8


def compare(name: str, x: torch.Tensor, channels: int, rounds: int, **window: int) -> None:
    """A convolution, the layer on its way to features, and the same by all distances."""
    c = x.shape[1]
    near, every = (recipes.interpolated_conv2d(c, channels, **window, lam=LAM) for _ in range(2))
    every.load_state_dict(near.state_dict())
    every.search = "dense"
    forward_and_backward(
        f"{name}, lam = {LAM}",
        {
            "nn.Conv2d": nn.Conv2d(c, channels, **window),
            "interpolated_conv2d": near,
            "interpolated_conv2d, all distances": every,
        },
        [x + 0.01 * torch.randn_like(x) for _ in range(4)],
        "Claim: the second row takes at most half the third's time. Floor: the chosen pairs alone, "
        "a gathered convolution.",
        rounds=rounds,
    )


def main() -> None:
    torch.manual_seed(0)
    print(machine())
    picture = photograph("astronaut", width=112)[None]
    compare(
        f"a photograph, {picture.shape[2]} x {picture.shape[3]}, 7 x 7, stride 2, 64 channels",
        picture,
        *(64, 5),
        **{"kernel_size": 7, "stride": 2, "padding": 3},
    )
    hidden = torch.relu(nn.Conv2d(3, 64, 3, padding=1)(photograph("astronaut", width=56)[None]))
    compare(
        f"64 channels of it, {hidden.shape[2]} x {hidden.shape[3]}, 3 x 3 window",
        hidden.detach(),
        *(64, 15),
        **{"kernel_size": 3, "padding": 1},
    )


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    main()
