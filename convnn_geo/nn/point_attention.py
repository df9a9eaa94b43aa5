"""Attention among the points of clouds."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from convnn_geo.checks import check_tensor
from convnn_geo.nn.attention import ConvNNAttention
from convnn_geo.nn.tracing import one_node
from convnn_geo.operation import Operation
from convnn_geo.points import Points
from convnn_geo.selection import KNearest


class PointAttention(nn.Module):
    """Attention among the points of each cloud, by their features alone.

    Args:
        in_channels: channels of ``x``, divided among the heads.
        out_channels: channels of the output; as many.
        num_heads: heads.
        k: nearest points that each attends to; None for all of its cloud. Where a cloud has fewer,
            the last are empty.
        self_point: of the ``k`` nearest, as in :class:`~convnn_geo.nn.ConvNNAttention`.
        **options: of :class:`~convnn_geo.nn.ConvNNAttention`: ``kernel``, ``backend``, ...

    Shapes:
        - **x:** :math:`(N, c)`
        - **pos:** anything: positions do not count
        - **batch:** :math:`(N)`, sorted; None for one cloud
        - **output:** :math:`(N, c)`

    Raises:
        ValueError: channels that are not kept, or that the heads do not divide; wrong shapes.

    Example:
        >>> import torch
        >>> x, batch = torch.randn(12, 4), torch.tensor([0] * 5 + [1] * 7)
        >>> PointAttention(4, 4, num_heads=2, k=3)(x, batch=batch).shape
        torch.Size([12, 4])
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        num_heads: int = 1,
        k: int | None = None,
        self_point: str = "natural",
        **options: Any,
    ) -> None:
        super().__init__()
        if in_channels != out_channels:
            raise ValueError(
                f"attention keeps channels: expected out_channels={in_channels}, got {out_channels}"
            )
        chosen = None if k is None else KNearest(k, self_point=self_point, short="pad")
        self.attention = ConvNNAttention(in_channels, num_heads, selection=chosen, **options)

    @one_node
    def forward(self, x: Tensor, pos: Tensor | None = None, batch: Tensor | None = None) -> Tensor:
        """Attend, cloud by cloud."""
        clouds, away = self._clouds(x, batch)
        out = self.attention(clouds.features, key_padding_mask=away, need_weights=False)[0]
        return clouds.to_rows(out)

    def operation(
        self, x: Tensor, pos: Tensor | None = None, batch: Tensor | None = None
    ) -> Operation:
        """The attention on these clouds, as an operation."""
        clouds, away = self._clouds(x, batch)
        return self.attention.operation(clouds.features, key_padding_mask=away)

    def _clouds(self, x: Tensor, batch: Tensor | None) -> tuple[Points, Tensor | None]:
        """Clouds as ``(b, n, c)``, and which of these points only fill the batch up."""
        clouds = Points.from_batch(check_tensor("x", x, 2), batch=batch)
        return clouds, None if clouds.mask is None else ~clouds.mask
