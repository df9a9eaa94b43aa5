"""One layer, moved from convolution to attention-like neighbours by one number.

At ``lam = 0`` the layer is nn.Conv2d to the last digit that float32 holds; at ``lam = 1`` its
neighbours are the most similar pixels, wherever they are.
"""

from __future__ import annotations

import torch
from torch import nn

from convnn_geo import lowering, recipes
from convnn_geo.nn import ConvNN2d


def main() -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 16, 3, padding=1)
    x = torch.randn(1, 3, 24, 32)

    drop_in = ConvNN2d(3, 16, 3, padding=1)  # the same arguments and the same state_dict
    drop_in.load_state_dict(conv.state_dict())
    print("drop-in for nn.Conv2d, largest difference:", float((drop_in(x) - conv(x)).abs().max()))

    print("\nlam   largest difference to nn.Conv2d")
    for lam in (0.0, 0.4, 0.6, 0.8, 1.0):
        layer = recipes.interpolated_conv2d(3, 16, 3, lam, metric="cosine")
        layer.load_state_dict(conv.state_dict())
        print(f"{lam:<5} {float((layer(x) - conv(x)).abs().max()):.2e}")

    print("\nWhat runs, and why the faster ways do not:")
    print(lowering.explain(drop_in, x))
    print(lowering.explain(layer, x))


if __name__ == "__main__":
    with torch.no_grad():
        main()
