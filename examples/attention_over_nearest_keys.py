"""nn.MultiheadAttention, k-NN attention and neighbourhood attention with the same weights."""

from __future__ import annotations

import torch
from torch import nn

from convnn_geo import recipes


def main() -> None:
    torch.manual_seed(0)
    attention = nn.MultiheadAttention(64, 4, batch_first=True)
    tokens = torch.randn(2, 14 * 14, 64)
    exact, _ = attention(tokens, tokens, tokens, need_weights=False)

    print("k nearest keys: largest difference to attention over all 196")
    for k in (1, 4, 16, 64, 196):
        layer = recipes.kvt(64, 4, k=k)
        layer.load_state_dict(attention.state_dict())
        out, _ = layer(tokens, need_weights=False)
        print(f"  k = {k:<4} {float((out - exact).abs().max()):.2e}")

    grid = tokens.unflatten(1, (14, 14))  # channels last: the layer then knows positions
    local = recipes.neighborhood_attention(64, 4, kernel_size=7, dilation=2)
    local.load_state_dict(attention.state_dict())
    print(
        "neighbourhood attention, 7 x 7, dilation 2:",
        tuple(local(grid, need_weights=False)[0].shape),
    )

    layer = nn.TransformerEncoderLayer(64, 4, batch_first=True)
    layer.self_attn = recipes.kvt(64, 4, k=16)
    print("inside nn.TransformerEncoderLayer:", tuple(layer.eval()(tokens).shape))


if __name__ == "__main__":
    with torch.no_grad():
        main()
