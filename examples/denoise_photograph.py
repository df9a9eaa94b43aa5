"""Noise removed from a photograph by small networks of three kinds of layers.

python examples/denoise_photograph.py [picture.png]

Trains a small DnCNN of convolution, of branching and of ConvNN layers on noisy patches of
photographs, cleans a part of another photograph, prints PSNRs and draws what came out. One run of
each: it illustrates, and which layer is better it can't say. Networks, layers and the learning
rate, which was chosen for convolution, are those of `convnn-geo experiment denoising`, which
compares over seeds; what it found is printed, too.
"""

from __future__ import annotations

import argparse
import csv
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from convnn_geo.datasets import photograph, photographs
from convnn_geo.extras import require
from convnn_geo.models import create_model
from convnn_geo.viz import mean_deviation

HELD_OUT, TOP, LEFT = "chelsea", 90, 130
TILE, SIDE = 16, 96  # networks see tiles, since who is near by feature depends on who is there
STEP = TILE // 2  # tiles overlap, so that their edges are not seen
SIGMA = 0.1
STEPS, BATCH, RATE = 700, 8, 2e-2
LAYERS = {
    "convolution": ("conv", {}),
    "branching": ("branching", {"ratio": 0.5, "k": 9, "metric": "paper_mix"}),
    "ConvNN": ("convnn", {"k": 9, "metric": "paper_mix"}),
}
RESULTS = Path(__file__).parent / "results" / "denoising.csv"


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
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=RATE, total_steps=STEPS)
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
    """``(3, h, w)`` in squares that overlap, ``(b, 3, TILE, TILE)``."""
    squares = image.unfold(1, TILE, STEP).unfold(2, TILE, STEP)
    return squares.permute(1, 2, 0, 3, 4).flatten(0, 1)


def joined(squares: Tensor) -> Tensor:
    """Back from tiles: a mean that weighs the middle of a tile most."""
    slope = torch.arange(TILE).add(0.5)
    slope = slope.minimum(TILE - slope)
    weight = (slope[:, None] * slope).expand_as(squares)

    def summed(parts: Tensor) -> Tensor:
        return F.fold(parts.flatten(1).T[None], (SIDE, SIDE), TILE, stride=STEP)[0]

    return summed(squares * weight) / summed(weight)


def over_seeds() -> Iterator[str]:
    """What `convnn-geo experiment denoising` found for the same networks, as sentences."""
    with RESULTS.open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["series"].startswith("DnCNN")]
    for series in dict.fromkeys(row["series"] for row in rows):
        told = []
        for layer in LAYERS:
            scores = [
                float(row["test"]) for row in rows if (row["series"], row["at"]) == (series, layer)
            ]
            mean, deviation = mean_deviation(scores)
            told.append(f"{layer} {mean:.2f} ± {deviation:.2f} dB")
        yield f"{series}, {len(scores)} seeds, test patches: {', '.join(told)}"


def draw(path: Path, images: dict[str, Tensor], caption: str) -> None:
    figure = require("matplotlib.figure", extra="viz").Figure(
        figsize=(2.6 * len(images), 4), dpi=110, layout="constrained"
    )
    for axis, (title, image) in zip(figure.subplots(1, len(images)), images.items(), strict=True):
        axis.imshow(image.clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
        axis.set_title(title, fontsize=11)
        axis.set_axis_off()
    figure.supxlabel(caption, fontsize=10)
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("picture", nargs="?", type=Path, default=Path("denoise.png"))
    path = parser.parse_args().picture
    clean = photograph(HELD_OUT, width=320)[:, TOP : TOP + SIDE, LEFT : LEFT + SIDE]
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
    found = [f"{RESULTS.stem}.md: {said}" for said in over_seeds()]
    caption = f"Above one run each, {STEPS} steps at a rate chosen for convolution. Over seeds:"
    draw(path, {**images, "clean\n": clean}, "\n".join([caption, *found]))
    print(caption, *found, sep="\n")
    print(f"The picture is at {path}")


if __name__ == "__main__":
    main()
