"""The graph of a real cloud: 343 274 points of a stereo pair, the 16 nearest of each, a picture.

    python examples/stereo_cloud_graph.py
    python examples/stereo_cloud_graph.py --downsample 4 --k 8 --out cloud.png

Needs the extras data and viz.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor
from torch_geometric.data import Data

from convnn_geo.datasets import motorcycle_cloud
from convnn_geo.extras import require
from convnn_geo.search import explain_search
from convnn_geo.transforms import NeighborGraph

PICTURE = Path("runs") / "stereo_cloud.png"
EDGES = "#00E5FF"
MUDGUARD = (0.87, 0.19, 2.64)  # metres right, down and forward of the camera
HALF = 0.03  # of the close-up's side, in the picture's plane


def build(cloud: Data, k: int, backend: str) -> tuple[Data, float]:
    """The cloud with its graph, and the seconds that took."""
    transform = NeighborGraph(k, backend=backend)
    transform(Data(pos=cloud.pos[: 2048 + k]))  # what is compiled and imported once is not timed
    start = time.perf_counter()
    data = transform(cloud)
    return data, time.perf_counter() - start


def engine_of(cloud: Data, k: int, backend: str) -> tuple[str, list[str]]:
    """The engine that serves the query, and why those asked before it did not."""
    if backend != "auto":
        return backend, []
    metric = NeighborGraph(k).metric
    *others, (engine, _) = explain_search(cloud.pos, k=k, metric=metric, self_point="excluded")
    return engine, [f"not {name}: {reason}" for name, reason in others]


def seen(pos: Tensor, turn: float = -8, tilt: float = 6) -> tuple[Tensor, Tensor]:
    """Places in the picture ``(n, 2)`` and depths ``(n,)`` for a camera moved around the scene."""
    turn, tilt = math.radians(turn), math.radians(tilt)
    sideways = torch.tensor(
        [
            [math.cos(turn), 0, math.sin(turn)],
            [0, 1, 0],
            [-math.sin(turn), 0, math.cos(turn)],
        ]
    )
    upwards = torch.tensor(
        [
            [1, 0, 0],
            [0, math.cos(tilt), -math.sin(tilt)],
            [0, math.sin(tilt), math.cos(tilt)],
        ]
    )
    middle = torch.tensor([0.0, -0.2, 2.9])
    moved = (pos - middle) @ (upwards @ sideways).T + middle
    depth = moved[:, 2] + 0.2
    return moved[:, :2] / depth[:, None], depth


def spread(place: Tensor, depth: Tensor, middle: Tensor, side: int = 8) -> Tensor:
    """Points all over the close-up: near a lattice, where there are some, and in front."""
    step = 2 * HALF / side
    line = (torch.arange(side) + 0.5) * step - HALF
    distance = torch.cdist(torch.cartesian_prod(line, line) + middle, place)
    index = (distance + 0.01 * depth).argmin(1, keepdim=True)
    return index[distance.gather(1, index) < step / 3].unique()


def draw(data: Data, k: int, downsample: int, path: Path) -> None:
    """The whole cloud, and a close-up with the edges of some of its points."""
    figure = require("matplotlib.figure", extra="viz").Figure(
        figsize=(13.2, 5.9), dpi=100, layout="compressed"
    )
    lines = require("matplotlib.collections", extra="viz").LineCollection
    between = require("matplotlib.patches", extra="viz").ConnectionPatch
    whole, near = figure.subplots(1, 2, width_ratios=[1.35, 1])
    place, depth = seen(data.pos)
    middle = seen(torch.tensor([MUDGUARD]))[0][0]
    order = depth.argsort(descending=True)  # near points are drawn over far ones
    inside = order[((place - middle).abs() < 1.05 * HALF).all(-1)[order]]
    for axis, shown, size in ((whole, order, 0.95), (near, inside, 5.8)):
        axis.scatter(
            *place[shown].T,
            s=(size * downsample) ** 2,
            c=data.x[shown].numpy(),
            marker="s" if axis is whole else "o",
            linewidths=0,
        )
        axis.set(aspect="equal", xticks=[], yticks=[])
        axis.invert_yaxis()  # positions run downwards

    some = inside[spread(place[inside], depth[inside], middle)]
    edges = data.edge_index[:, torch.isin(data.edge_index[1], some)]
    near.add_collection(lines(place[edges.T].numpy(), colors=EDGES, linewidths=1.2))
    near.plot(*place[some].T, "o", color=EDGES, markersize=4.5, markeredgecolor="black")
    left, top, right, bottom = *(middle - HALF).tolist(), *(middle + HALF).tolist()
    near.set(xlim=(left, right), ylim=(bottom, top))
    whole.indicate_inset((left, top, 2 * HALF, 2 * HALF), edgecolor="black", alpha=1)
    for corner, height in (((right, top), 1), ((right, bottom), 0)):
        figure.add_artist(
            between(corner, (0, height), "data", "axes fraction", axesA=whole, axesB=near)
        )
    number = f"{len(place):,}".replace(",", " ")
    whole.set_title(f"{number} points of a stereo pair (white: hidden from the cameras)")
    near.set_title(f"{len(some)} points around the front mudguard and the {k} nearest of each")
    whole.axis("off")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, pil_kwargs={"optimize": True})


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--k", type=int, default=16, help="neighbours of a point")
    parser.add_argument("--downsample", type=int, default=1, help="take every n-th row and column")
    parser.add_argument("--backend", default="auto", help="a search engine, or auto")
    parser.add_argument("--out", type=Path, default=PICTURE, help="where the picture goes")
    options = parser.parse_args(arguments)

    cloud = motorcycle_cloud(options.downsample)
    engine, others = engine_of(cloud, options.k, options.backend)
    data, seconds = build(cloud, options.k, options.backend)
    print(f"engine   {engine}", *others, sep="\n         ")
    print(f"points   {data.num_nodes}, {cloud.pos.shape[1]} coordinates")
    print(f"edges    {data.num_edges}, {options.k} to each point")
    print(f"seconds  {seconds:.2f} on {torch.get_num_threads()} threads")
    print(f"rate     {data.num_nodes / seconds:.0f} points a second")
    options.out.parent.mkdir(parents=True, exist_ok=True)
    draw(data, options.k, options.downsample, options.out)
    print(f"picture  {options.out}")


if __name__ == "__main__":
    main()
