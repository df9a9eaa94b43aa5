"""Claim: attention over the k nearest keys costs about what attention costs, on the CPU."""

from __future__ import annotations

import argparse
import itertools
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from convnn_geo.bench import compare, machine, report
from convnn_geo.nn.functional import knn_attention

#: (batch, heads, n, channels), k, and the ratio to reach.
CASES = (
    ((32, 3, 197, 64), 9, 1.2),
    ((32, 3, 197, 64), 40, None),
    ((4, 3, 1024, 64), 9, None),
    ((4, 3, 1024, 64), 32, 2.0),
)


def with_copies(q: Tensor, k: Tensor, v: Tensor, count: int) -> Tensor:
    """All scores, topk, gathered copies of the values."""
    best, index = ((q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)).topk(count, dim=-1)
    rows = v.unsqueeze(-3).expand(*index.shape[:-1], *v.shape[-2:])
    near = rows.gather(-2, index.unsqueeze(-1).expand(*index.shape, v.shape[-1]))
    return (best.softmax(-1).unsqueeze(-2) @ near).squeeze(-2)


def with_mask(q: Tensor, k: Tensor, v: Tensor, count: int) -> Tensor:
    """All scores, topk, what is below the k-th at -inf, softmax over all."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    least = scores.topk(count, dim=-1).values[..., -1:]
    return scores.masked_fill(scores < least, -torch.inf).softmax(-1) @ v


def furthest(q: Tensor, k: Tensor, v: Tensor, count: int) -> Tensor:
    """Largest error, in float64, of queries whose choice is not within rounding."""
    q, k, v = q.double(), k.double(), v.double()
    best = (q @ k.transpose(-1, -2)).topk(count + 1, dim=-1).values
    clear = best[..., -2] - best[..., -1] > 1e-4
    found = knn_attention(q.float(), k.float(), v.float(), count)
    return (found - with_copies(q, k, v, count)).abs().amax(-1)[clear].max()


def main() -> None:
    torch.manual_seed(0)
    print(machine())
    for shape, k, wanted in CASES:
        inputs = [torch.randn(3, *shape) for _ in range(4)]
        functions = {
            "scaled_dot_product_attention": F.scaled_dot_product_attention,
            "knn_attention": partial(knn_attention, k=k),
            "scores, topk, gathered copies": partial(with_copies, count=k),
            "scores, topk, mask, softmax": partial(with_mask, count=k),
        }
        error = furthest(*inputs[0], k)
        for backward in (False, True):
            turn = itertools.cycle(inputs)

            def call(function, turn=turn, backward=backward):  # type: ignore[no-untyped-def]
                q, key, value = next(turn).requires_grad_(backward)
                out = function(q, key, value)
                if backward:
                    out.sum().backward()

            what = "forward and backward" if backward else "forward"
            claim = "" if backward or wanted is None else f"Claim: ratio at most {wanted:g}. "
            report(
                f"{' x '.join(map(str, shape))}, k = {k}, {what}",
                compare({name: partial(call, f) for name, f in functions.items()}, rounds=9),
                f"{claim}Largest error: {error:.1e}. Floor: the scores' "
                "product, half of attention's arithmetic.",
            )


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    main()
