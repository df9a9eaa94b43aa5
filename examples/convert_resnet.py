"""A torchvision resnet18 made ours, equal to the last digits, then moved along the spectrum.

python examples/convert_resnet.py [weights.pth], a file of torchvision's resnet18; random weights
without one.
"""

from __future__ import annotations

import argparse

import torch

from convnn_geo import convert
from convnn_geo.datasets import photograph
from convnn_geo.extras import require

MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def picture() -> torch.Tensor:
    """The middle of a photograph as torchvision's models take it, (1, 3, 224, 224)."""
    image = photograph("chelsea", width=340)
    top, left = (image.shape[1] - 224) // 2, (image.shape[2] - 224) // 2
    image = image[:, top : top + 224, left : left + 224]
    mean, deviation = (torch.tensor(values)[:, None, None] for values in (MEAN, DEVIATION))
    return ((image - mean) / deviation).unsqueeze(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("weights", nargs="?", help="a file of torchvision's resnet18")
    weights = parser.parse_args().weights
    resnet18 = require("torchvision.models", extra="vision").resnet18
    torch.manual_seed(0)
    model = resnet18().eval()
    if weights is not None:
        model.load_state_dict(torch.load(weights, weights_only=True))
    x = picture()
    before = model(x)

    convert.to_convnn(model)
    print("largest difference of logits:", f"{float((model(x) - before).abs().max()):.2e}")
    print()
    print(convert.report(model, x))

    print("\nlayer4 along the spectrum: 0 chooses by position, 1 by feature")
    print("after a ReLU cosine distances stay below a step of a pixel: nothing moves up to 0.5")
    print("lam   change of the logits")
    for lam in (0.0, 0.25, 0.5, 0.6, 0.75, 0.9, 1.0, 0.0):
        moved = convert.set_interpolation(model.layer4, lam)
        change = float((model(x) - before).norm() / before.norm())
        print(f"{lam:<5} {change:.2e}")
    print(f"moved: {', '.join(moved)}; the 1 x 1 convolution has one neighbour and stays")

    half = convert.to_convnn(
        resnet18().eval(), [convert.Rule(convert.spec("branching", ratio=0.25), name="layer4.1.*")]
    )
    print("\nBranching in the last block, a quarter of its channels ConvNN:")
    print("\n".join(str(convert.report(half, x)).splitlines()[-6:]))


if __name__ == "__main__":
    with torch.no_grad():
        main()
