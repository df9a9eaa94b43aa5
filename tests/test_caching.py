"""What is computed once is right for whoever asks next, and wherever they are."""

from __future__ import annotations

import pytest
import torch

from convnn_geo import recipes
from convnn_geo.caching import keep
from convnn_geo.candidates import Random, Window
from convnn_geo.nn import ConvNN2d, ConvNNAttention, NeighborConv, PointConvNN
from convnn_geo.search import engines, knn, knn_graph, radius_graph


def test_what_is_kept_is_computed_once():
    seen = []
    counted = keep(4)(lambda n: seen.append(n) or torch.arange(n))
    assert counted(3) is counted(3) and counted(4).numel() == 4
    assert seen == [3, 4]


@pytest.mark.parametrize(
    "layer",
    [
        ConvNN2d(4, 6, k=5, metric="cosine", stride=2),
        recipes.interpolated_conv2d(4, 6, 3, lam=0.8),
        ConvNN2d(4, 6, 3, k=4, metric="euclidean", padding=1),
    ],
    ids=["nearest", "interpolated", "window"],
)
def test_transforms_leave_nothing_behind(layer):
    x = torch.randn(1, 4, 7, 5)

    def loss(z):
        return layer(z).square().sum()

    found = []
    for _ in range(2):
        wanted = torch.autograd.functional.hessian(loss, x)
        torch.testing.assert_close(torch.func.hessian(loss)(x), wanted, rtol=1e-3, atol=1e-4)
        torch.func.vmap(torch.func.grad(loss))(x[None])
        found.append(layer(x))
    assert torch.equal(*found)


def test_what_a_graph_captures_is_not_kept(monkeypatch):
    """It holds its values once the graph is replayed."""
    counted = keep(4)(lambda n: torch.arange(n))
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    first = counted(3)
    assert torch.equal(first, torch.arange(3)) and counted(3) is not first
    monkeypatch.undo()
    kept = counted(3)
    assert kept is not first and counted(3) is kept
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert counted(3) is kept  # filled before


# -- whatever the default device is: tensors that do not follow their inputs would be meta -------


IMAGES = {
    "nearest": ConvNN2d(4, 6, k=5, metric="cosine"),
    "strided": ConvNN2d(4, 6, k=5, metric="cosine", stride=2, padding=1),
    "random": ConvNN2d(4, 6, k=5, metric="cosine", candidates=Random(20)).eval(),
    "window": ConvNN2d(4, 6, 3, k=4, metric="cosine", padding=1),
    "interpolated": recipes.interpolated_conv2d(4, 6, 3, lam=0.8),
    "position": recipes.conv2d_by_position(4, 6, 3, padding=1),
    "convolution": recipes.conv2d(4, 6, 3),
    "vig": recipes.vig(4, k=4, dilation=2),
}
TOKENS = {
    "all": ConvNNAttention(16, 2),
    "nearest": ConvNNAttention(16, 2, k=5),
    "nearly all": ConvNNAttention(16, 2, k=28),
    "window": ConvNNAttention(16, 2, candidates=Window(5)),
}


@pytest.mark.parametrize("name", IMAGES)
def test_images_on_another_than_the_default_device(name):
    x = torch.randn(2, 4, 9, 8)
    wanted = IMAGES[name](x)
    with torch.device("meta"):
        assert torch.equal(IMAGES[name](x), wanted)
        found = IMAGES[name](torch.randn(2, 4, 8, 9, device="cpu"))  # of which nothing is kept
    assert found.device.type == "cpu"


@pytest.mark.parametrize("name", TOKENS)
def test_tokens_on_another_than_the_default_device(name):
    x, mask = torch.randn(2, 30, 16), torch.arange(30).expand(2, 30) > 20
    for options in ({}, {"key_padding_mask": mask}, {"is_causal": True}, {"need_weights": False}):
        if name == "nearly all" and options.get("is_causal"):
            continue
        wanted = TOKENS[name](x, **options)[0]
        with torch.device("meta"):
            assert torch.equal(TOKENS[name](x, **options)[0], wanted)


@pytest.mark.parametrize("d", [3, 40])
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_searches_on_another_than_the_default_device(metric, d):
    x, batch = torch.rand(300, d), torch.arange(300) // 110
    for backend in engines():
        for options in (
            {},
            {"batch_x": batch},
            {"batch_x": batch, "self_point": "excluded"},
            {"self_point": "first"},
        ):
            options = {"k": 5, "metric": metric, "backend": backend, **options}
            try:
                wanted = knn(x, **options)
            except ValueError as refusal:
                assert "can't serve" in str(refusal)
                continue
            with torch.device("meta"):
                assert torch.equal(knn(x, **options).index, wanted.index)


def test_clouds_on_another_than_the_default_device():
    x, batch = torch.rand(300, 3), torch.arange(300) // 110
    edge_index, rank = knn(x, k=4, batch_x=batch).to_edge_index()
    layers = PointConvNN(3, 4, k=5), recipes.point_transformer(3, 4, k=5), NeighborConv(3, 4, k=4)
    with torch.device("meta"):
        for layer in layers[:2]:
            assert layer(x, x, batch).device.type == "cpu"
        assert layers[2](x, edge_index, rank=rank).device.type == "cpu"
        assert knn_graph(x, 5, batch, return_distance=True)[1].device.type == "cpu"
        assert radius_graph(x, 0.2, batch).device.type == "cpu"


def test_tensors_without_values():
    layer = recipes.conv2d_by_position(4, 6, 3, padding=1).to("meta")
    assert layer(torch.randn(2, 4, 5, 6, device="meta")).shape == (2, 6, 5, 6)
    assert knn(torch.rand(20, 3, device="meta"), k=3).index.shape == (20, 3)
