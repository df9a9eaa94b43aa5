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

#: (batch, heads, n, channels), k, the ratio to reach, and whether scores have a bias that learns.
CASES = (
    ((32, 3, 197, 64), 9, 1.2, False),
    ((32, 3, 197, 64), 9, None, True),
    ((32, 3, 197, 64), 40, None, False),
    ((128, 3, 49, 32), 9, None, True),
    ((4, 3, 1024, 64), 9, None, False),
    ((4, 3, 1024, 64), 32, 2.0, False),
)


def all_scores(q: Tensor, k: Tensor, bias: Tensor | None) -> Tensor:
    """Scaled products, and what is added to them."""
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    return scores if bias is None else scores + bias


def with_copies(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, count: int) -> Tensor:
    """All scores, topk, gathered copies of the values."""
    best, index = all_scores(q, k, bias).topk(count, dim=-1)
    rows = v.unsqueeze(-3).expand(*index.shape[:-1], *v.shape[-2:])
    near = rows.gather(-2, index.unsqueeze(-1).expand(*index.shape, v.shape[-1]))
    return (best.softmax(-1).unsqueeze(-2) @ near).squeeze(-2)


def with_mask(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, count: int) -> Tensor:
    """All scores, topk, what is below the k-th at -inf, softmax over all."""
    scores = all_scores(q, k, bias)
    least = scores.topk(count, dim=-1).values[..., -1:]
    return scores.masked_fill(scores < least, -torch.inf).softmax(-1) @ v


def furthest(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, count: int) -> Tensor:
    """Largest error, in float64, of queries whose choice is not within rounding."""
    found = knn_attention(q, k, v, count, bias)
    q, k, v = q.double(), k.double(), v.double()
    best = all_scores(q, k, bias).topk(count + 1, dim=-1).values
    clear = best[..., -2] - best[..., -1] > 1e-5
    return (found - with_copies(q, k, v, bias, count)).abs().amax(-1)[clear].max()


def main() -> None:
    torch.manual_seed(0)
    print(machine())
    for shape, k, wanted, biased in CASES:
        inputs = [torch.randn(3, *shape) for _ in range(4)]
        bias = torch.randn(shape[1], shape[2], shape[2]) if biased else None
        functions = {
            "scaled_dot_product_attention": F.scaled_dot_product_attention,
            "knn_attention": lambda q, key, v, bias, k=k: knn_attention(q, key, v, k, bias),
            "scores, topk, gathered copies": partial(with_copies, count=k),
            "scores, topk, mask, softmax": partial(with_mask, count=k),
        }
        error = furthest(*inputs[0], bias, k)
        for backward in (False, True):
            turn = itertools.cycle(inputs)

            def call(function, turn=turn, bias=bias, backward=backward):  # type: ignore[no-untyped-def]
                q, key, value = next(turn).requires_grad_(backward)
                added = None if bias is None else bias.requires_grad_(backward)
                out = function(q, key, value, added)
                if backward:
                    out.sum().backward()

            what = "forward and backward" if backward else "forward"
            claim = "" if backward or wanted is None else f"Claim: ratio at most {wanted:g}. "
            report(
                f"{' x '.join(map(str, shape))}, k = {k}, {'biased, ' * biased}{what}",
                compare({name: partial(call, f) for name, f in functions.items()}, rounds=9),
                f"{claim}Largest error: {error:.1e}. Floor: the scores' "
                "product, half of attention's arithmetic.",
            )


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    main()
