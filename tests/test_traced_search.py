"""Search in traced programs: clouds of unequal size, images, and sizes that stay open."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from convnn_geo import recipes
from convnn_geo.metrics import Custom
from convnn_geo.nn import PointConvNN
from convnn_geo.points import Points
from convnn_geo.search import knn

BATCH = torch.tensor([0] * 10 + [1] * 25 + [3] * 15)
OTHER = torch.tensor([0] * 4 + [3] * 6)


@pytest.fixture(autouse=True)
def _forgetful():
    """Programs traced with other arguments do not count towards torch's limit."""
    torch.compiler.reset()
    yield
    assert torch.is_grad_enabled()  # also where a program raised


def parts(found):
    """What a search gives, as tensors."""
    return found.index, found.distance, found.mask


def same(found, wanted):
    """Whether two searches gave the same."""
    pairs = list(zip(found, wanted, strict=True))
    return all(a is b if a is None or b is None else torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("self_point", ["natural", "first", "excluded"])
@pytest.mark.parametrize("metric", ["euclidean", "cosine", "dot"])
@pytest.mark.parametrize("short, k", [("error", 6), ("pad", 6), ("pad", 20)])
@pytest.mark.parametrize("backend", ["auto", "dense", "kd_tree"])
def test_ragged_clouds_are_traced_whole(backend, short, k, metric, self_point):
    torch.manual_seed(0)
    x = torch.randint(-2, 3, (50, 4)).float()  # many ties

    def find(x: Tensor, batch: Tensor):
        options = {"metric": metric, "self_point": self_point, "short": short}
        return parts(knn(x, k=k, batch_x=batch, backend=backend, **options))

    index, distance, mask = torch.compile(find, fullgraph=True, backend="eager")(x, BATCH)
    wanted = find(x, BATCH)
    every = torch.ones_like(index, dtype=torch.bool)
    assert torch.equal(*(every if m is None else m for m in (mask, wanted[2])))
    assert torch.equal(index, wanted[0])
    torch.testing.assert_close(distance, wanted[1], rtol=1e-6, atol=1e-6)


def test_other_points_search_in_their_own_cloud():
    x, y = torch.randn(50, 3), torch.randn(10, 3)

    def find(x, y, batch_x, batch_y):
        return parts(knn(x, y, 5, batch_x, batch_y, max_distance=1.0))

    traced = torch.compile(find, fullgraph=True, backend="aot_eager")
    assert same(traced(x, y, BATCH, OTHER), find(x, y, BATCH, OTHER))
    one = torch.zeros_like(BATCH)
    assert same(traced(x, y, one, None), find(x, y, one, None))
    for search in (find, traced):
        with pytest.raises(Exception, match="batch_x names 4 examples, but there is no batch_y"):
            search(x, y, BATCH, None)
    nobody = y[:0], OTHER[:0]
    assert traced(x, nobody[0], BATCH, nobody[1])[0].shape == (0, 5)


def test_one_program_serves_all_sizes_of_clouds():
    def find(x, batch):
        return knn(x, k=3, batch_x=batch).index

    traced = torch.compile(find, fullgraph=True, dynamic=True, backend="eager")
    for sizes in ([3, 9], [20, 4, 5], [300, 700, 30]):
        batch = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
        x = torch.randn(len(batch), 3)
        assert torch.equal(traced(x, batch), find(x, batch))


class Clouds(nn.Module):
    def forward(self, x: Tensor, batch: Tensor) -> tuple[Tensor, Tensor]:
        found = knn(x, k=3, batch_x=batch)
        return found.index, found.distance


@pytest.mark.parametrize("strict", [False, True])
def test_ragged_clouds_are_exported(strict):
    n = torch.export.Dim("n", min=8, max=100_000)
    shapes = ({0: n}, {0: n})
    example = torch.randn(50, 3), BATCH
    program = torch.export.export(Clouds(), example, dynamic_shapes=shapes, strict=strict)
    for sizes in ([3, 9], [5000, 20]):
        batch = torch.arange(2).repeat_interleave(torch.tensor(sizes))
        x = torch.randn(len(batch), 3)
        assert same(program.module()(x, batch), Clouds()(x, batch))


@pytest.mark.parametrize(
    "x, batch, match",
    [
        (torch.randn(50, 3), BATCH.flip(0), "batch_x: expected sorted example numbers"),
        (torch.randn(50, 3), BATCH[:-1], "batch_x: expected one number a point"),
        (torch.randn(10, 3), OTHER, "k=5 is larger than the number of candidates, 4"),
    ],
)
def test_what_is_wrong_with_clouds_is_said_when_the_program_runs(x, batch, match):
    traced = torch.compile(
        lambda x, b: knn(x, k=5, batch_x=b).index, fullgraph=True, backend="eager"
    )
    with pytest.raises(ValueError, match=match):
        traced(x, batch)


@pytest.mark.parametrize(
    "options, match",
    [
        ({"short": "truncate"}, "how many neighbours it leaves can't be traced"),
        ({"metric": "paper_mix"}, "looks at whole clouds, whose sizes can't be traced"),
        (
            {"metric": Custom(lambda q, k: (q.x - k.x).abs().sum(-1))},
            "neither a distance of points",
        ),
        ({"backend": "cells"}, "cells are for up to 3 dimensions"),
        ({"backend": "nothing"}, "unknown search backend 'nothing'"),
    ],
)
def test_what_clouds_can_not_be_traced_with_is_said(options, match):
    x = torch.randn(50, 4)
    assert knn(x, k=3, batch_x=BATCH, **{**options, "backend": "auto"}).index.shape == (50, 3)
    traced = torch.compile(
        lambda x, b: knn(x, k=3, batch_x=b, **options).index, fullgraph=True, backend="eager"
    )
    with pytest.raises(Exception, match=match):
        traced(x, BATCH)


@pytest.mark.parametrize("excluded", [False, True])
@pytest.mark.parametrize("kind", ["points", "angles", "products"])
def test_the_operator_for_clouds_keeps_the_rules_of_torch(kind, excluded):
    x = torch.randn(50, 5)
    bias = torch.randn(50) if kind == "products" else None
    arguments = (kind, x, x, bias, None, 1.0, False, True, 4, BATCH, BATCH, excluded, True)
    torch.library.opcheck(
        torch.ops.convnn_geo.nearest_in_clouds.default, (*arguments, 2**20, "auto")
    )


@pytest.mark.parametrize(
    "layer",
    [
        lambda: PointConvNN(8, 4, 5, metric="cosine"),
        lambda: recipes.dynamic_edge_conv(8, 16, k=5),
        lambda: recipes.point_transformer(8, 8, k=5),
    ],
)
def test_layers_on_ragged_clouds_are_one_graph(layer):
    torch.manual_seed(0)
    layer, x, pos = layer(), torch.randn(50, 8), torch.randn(50, 3)
    outs, grads = [], []
    for one in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        leaf = x.clone().requires_grad_()
        outs.append(one(leaf, pos, BATCH))
        grads.append(torch.autograd.grad(outs[-1].square().sum(), [leaf, *layer.parameters()]))
    torch.testing.assert_close(*outs)
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-4)


class Pixels(nn.Module):
    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        found = knn(Points.from_image(image), k=5, metric="spatial")
        return found.index, found.distance


@pytest.mark.parametrize("strict", [False, True])
def test_pixels_by_place_are_exported_for_any_size(strict):
    size = torch.export.Dim("h", min=4, max=5000)
    example = (torch.rand(2, 3, 6, 7),)
    program = torch.export.export(Pixels(), example, dynamic_shapes=({2: size},), strict=strict)
    assert "nearest_on_grid" in str(program)
    for h in (4, 19):
        image = torch.rand(2, 3, h, 7)
        assert same(program.module()(image), Pixels()(image))


@pytest.mark.parametrize("scale", [None, [1.0, 2.0]])
def test_the_operator_for_grids_keeps_the_rules_of_torch(scale):
    size, places = [4, 5], ([0.0, 0.0], [1.0, 1.0])
    arguments = (
        size,
        3,
        False,
        torch.device("cpu"),
        *places,
        size,
        *places,
        2.0,
        True,
        scale,
        True,
    )
    torch.library.opcheck(torch.ops.convnn_geo.nearest_on_grid.default, arguments)


def test_what_a_traced_program_takes_fits_the_size_that_comes(monkeypatch):
    """An engine is named when the program runs, and not for the sizes that it was traced with."""
    asked = []
    chosen = "convnn_geo.search.registry.fastest"
    monkeypatch.setattr(chosen, lambda query: asked.append(query.source.num_points) or "dense")
    traced = torch.compile(
        lambda x: knn(x, k=3).index, fullgraph=True, dynamic=True, backend="eager"
    )
    for n in (30, 5000):
        traced(torch.randn(n, 3))
    assert asked == [30, 5000]
