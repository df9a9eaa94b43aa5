"""Claim: knn takes a fraction of torch_cluster.knn's time on the CPU, and finds the same."""

from __future__ import annotations

import argparse

import torch

from convnn_geo.bench import compare, machine, report
from convnn_geo.extras import require
from convnn_geo.search import knn

#: examples, points in the smallest and the largest, dimension, k, and how many times as fast knn
#: is to be.
CASES = (
    (1, 16384, 16384, 3, 9, 2.4),
    (1, 100_000, 100_000, 3, 9, 2.4),
    (1, 100_000, 100_000, 2, 9, 2.4),
    (1, 1024, 1024, 64, 9, 18.0),
    (32, 256, 256, 192, 9, 15.0),
    (128, 100, 300, 3, 16, 2.0),
    (32, 800, 1200, 64, 20, 10.0),
)


def main() -> None:
    torch_cluster = require("torch_cluster", extra="cluster")
    torch.manual_seed(0)
    print(machine())
    for examples, least, most, dimension, k, wanted in CASES:
        sizes = torch.randint(least, most + 1, (examples,))
        batch = torch.arange(examples).repeat_interleave(sizes)
        x = torch.rand(len(batch), dimension)
        size = f"{least}" if least == most else f"{least} to {most}"
        timings = compare(
            {
                "torch_cluster.knn": lambda x=x, batch=batch, k=k: torch_cluster.knn(
                    x, x, k, batch, batch
                ),
                "knn": lambda x=x, batch=batch, k=k: knn(x, k=k, batch_x=batch),
            },
            rounds=7,
        )
        report(
            f"{examples} x {size} points, {dimension} dimensions, k = {k}",
            timings,
            f"Claim: ratio at most 1 / {wanted:g} = {1 / wanted:.2f}; measured 1 / "
            f"{1 / timings[1].ratio:.1f}.",
        )


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    main()
