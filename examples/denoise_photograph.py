"""Noise removed from a photograph by small networks of three kinds of layers.

python examples/denoise_photograph.py [picture.png]

Trains a small DnCNN of convolution, of branching and of ConvNN layers on noisy patches of
photographs, cleans a part of another photograph, prints PSNRs and draws what came out. One run of
each, with steps, rate and ratio chosen by looking at this very picture: it illustrates, and which
layer is better it can't say. `convnn-geo experiment denoising` compares over seeds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convnn_geo.datasets import photograph, photographs
from convnn_geo.extras import require
from convnn_geo.models import create_model

HELD_OUT, TOP, LEFT = "chelsea", 90, 130
TILE, TILES = 16, 6  # networks see tiles, since who is near by feature depends on who is there
SIGMA = 0.1
STEPS, BATCH = 700, 8
LAYERS = {
    "convolution": ("conv", {}),
    "branching": ("branching", {"ratio": 0.25, "k": 9, "metric": "euclidean"}),
    "ConvNN": ("convnn", {"k": 9, "metric": "euclidean"}),
}


def batches(seed: int = 0) -> Iterator[Tensor]:
    """Patches of all photographs but one, ``(b, 3, TILE, TILE)``, turned at random."""
    generator = torch.Generator().manual_seed(seed)
    images = [photograph(name, width=320) for name in photographs() if name != HELD_OUT]

    def draw(high: int) -> int:
        return int(torch.randint(high, (), generator=generator))

    for _ in range(STEPS):
        patches = []
        for _ in range(BATCH):
            image = images[draw(len(images))]
            row, column = (draw(side - TILE + 1) for side in image.shape[1:])
            patch = image[:, row : row + TILE, column : column + TILE]
            patches.append(patch.rot90(draw(4), (1, 2)))
        yield torch.stack(patches)


def train(model: nn.Module) -> None:
    """Mean squared error, on new noise in every step."""
    generator = torch.Generator().manual_seed(1)
    optimizer = torch.optim.AdamW(model.parameters())
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=STEPS)
    for clean in batches():
        noisy = clean + SIGMA * torch.randn(clean.shape, generator=generator)
        optimizer.zero_grad()
        F.mse_loss(model(noisy), clean).backward()
        optimizer.step()
        rates.step()


def psnr(image: Tensor, clean: Tensor) -> float:
    """In decibels, of values in [0, 1]."""
    return float(-10 * (image.clamp(0, 1) - clean).square().mean().log10())


def tiles(image: Tensor) -> Tensor:
    """``(3, h, w)`` in squares, ``(b, 3, TILE, TILE)``."""
    squares = image.unfold(1, TILE, TILE).unfold(2, TILE, TILE)
    return squares.permute(1, 2, 0, 3, 4).flatten(0, 1)


def joined(squares: Tensor) -> Tensor:
    """Back from tiles."""
    rows = squares.unflatten(0, (TILES, TILES)).permute(2, 0, 3, 1, 4)
    return rows.flatten(3).flatten(1, 2)


def draw(path: Path, images: dict[str, Tensor]) -> None:
    figure = require("matplotlib.figure", extra="viz").Figure(
        figsize=(2.6 * len(images), 3.3), dpi=110, layout="constrained"
    )
    for axis, (title, image) in zip(figure.subplots(1, len(images)), images.items(), strict=True):
        axis.imshow(image.clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
        axis.set_title(title, fontsize=11)
        axis.set_axis_off()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("picture", nargs="?", type=Path, default=Path("denoise.png"))
    path = parser.parse_args().picture
    side = TILE * TILES
    clean = photograph(HELD_OUT, width=320)[:, TOP : TOP + side, LEFT : LEFT + side]
    noisy = clean + SIGMA * torch.randn(clean.shape, generator=torch.Generator().manual_seed(2))
    images = {f"noisy\n{psnr(noisy, clean):.2f} dB": noisy}
    print("layer        parameters  PSNR (dB)  seconds")
    print(f"{'none':<13}{'':>10}{psnr(noisy, clean):>11.2f}")
    for name, (layer, options) in LAYERS.items():
        began = time.perf_counter()
        torch.manual_seed(0)
        model = create_model("dncnn", layer, width=0.5, depth=4, **options)
        train(model)
        with torch.no_grad():
            cleaned = joined(model.eval()(tiles(noisy)))
        score, seconds = psnr(cleaned, clean), time.perf_counter() - began
        parameters = sum(p.numel() for p in model.parameters())
        print(f"{name:<13}{parameters:>10}{score:>11.2f}{seconds:>9.1f}", flush=True)
        images[f"{name}\n{score:.2f} dB"] = cleaned
    draw(path, {**images, "clean\n": clean})
    print(f"The picture is at {path}")


if __name__ == "__main__":
    main()
