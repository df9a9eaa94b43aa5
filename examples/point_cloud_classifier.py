"""A point-cloud network of PyG layers: graphs by position, then by feature, built in forward."""

from __future__ import annotations

import argparse

import torch
from torch import Tensor, nn
from torch_geometric.data import Batch, Data
from torch_geometric.nn import global_max_pool

from convnn_geo import recipes
from convnn_geo.nn import NeighborConv, PointConvNN
from convnn_geo.search import knn


class Classifier(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.by_position = recipes.edge_conv(3, 32, k=9)  # an MLP of (x_i, x_j - x_i), by position
        self.by_feature = PointConvNN(32, 64, k=9, metric="cosine")
        self.on_a_graph = NeighborConv(64, 64, k=9)
        self.head = nn.Linear(64, classes)

    def forward(self, data: Data) -> Tensor:
        x = self.by_position(data.pos, data.pos, data.batch).relu()
        x = self.by_feature(x, data.pos, data.batch).relu()
        edge_index, rank = knn(data.pos, None, 9, data.batch).to_edge_index()
        x = self.on_a_graph(x, edge_index, rank=rank).relu()
        return self.head(global_max_pool(x, data.batch))


def sphere(points: int) -> Tensor:
    """Points on the unit sphere."""
    return nn.functional.normalize(torch.randn(points, 3), dim=-1)


def cube(points: int) -> Tensor:
    """Points on a cube of half side 0.8."""
    pos = torch.rand(points, 3) * 1.6 - 0.8
    face = torch.arange(points) % 3
    pos[torch.arange(points), face] = pos[torch.arange(points), face].sign() * 0.8
    return pos


def clouds(count: int) -> tuple[Batch, Tensor]:
    """Clouds of 40 to 80 points, half of them spheres."""
    sizes = torch.randint(40, 81, (count,)).tolist()
    shapes = [cube if i % 2 else sphere for i in range(count)]
    batch = Batch.from_data_list(
        [Data(pos=shape(size)) for shape, size in zip(shapes, sizes, strict=True)]
    )
    return batch, torch.arange(count) % 2


def main() -> None:
    torch.manual_seed(0)
    model = Classifier(2)
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
    for step in range(60):
        batch, label = clouds(16)
        loss = nn.functional.cross_entropy(model(batch), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 20 == 19:
            print(f"step {step + 1}: loss {loss.item():.3f}")
    batch, label = clouds(200)
    with torch.no_grad():
        accuracy = (model.eval()(batch).argmax(-1) == label).float().mean().item()
    print(f"sphere or cube, 200 new clouds: {100 * accuracy:.1f} % right")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    main()
