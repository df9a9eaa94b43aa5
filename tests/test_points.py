"""Points and grids: images, tokens, clouds and PyG data, there and back."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_geometric.data import Batch, Data

from convnn_geo.points import Grid, Points, gather_rows, position_range

quick = settings(deadline=None, max_examples=40, derandomize=True)


def test_pixels_are_rows_at_their_row_and_column():
    image = torch.randn(2, 3, 4, 5)
    points = Points.from_image(image)
    assert points.num_points == 20
    for i, (row, column) in enumerate(points.position.long().tolist()):
        assert (row, column) == divmod(i, 5)
        assert torch.equal(points.x[:, i], image[:, :, row, column])


@pytest.mark.parametrize("size", [(7,), (4, 5), (1, 6), (2, 3, 4)])
def test_images_go_there_and_back(size):
    image = torch.randn(2, 3, *size)
    points = Points.from_image(image)
    assert torch.equal(points.to_image(), image)
    assert points.x.data_ptr() == image.data_ptr()  # a view, no copy


def test_tokens_lie_on_a_line():
    tokens = torch.randn(2, 5, 3)
    points = Points.from_tokens(tokens)
    assert points.x is tokens
    assert points.position.flatten().tolist() == [0, 1, 2, 3, 4]


def test_positions_of_a_grid_are_as_precise_as_its_features():
    for dtype, expected in (
        (torch.float64, torch.float64),
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.float32),
    ):
        assert Points.from_tokens(torch.zeros(1, 300, 1, dtype=dtype)).position.dtype == expected


def test_given_positions_win_over_the_grid():
    pos = torch.rand(6, 2)
    assert Points(torch.zeros(6, 1), pos, grid=Grid((2, 3))).position is pos


# -- grids --------------------------------------------------------------------------------------


def test_a_grid_is_a_lattice_in_raster_order():
    grid = Grid((2, 3), origin=(0.5, -1), step=(2, 0.25))
    assert grid.num_points == 6
    expected = [[0.5 + 2 * r, -1 + 0.25 * c] for r in range(2) for c in range(3)]
    assert grid.positions().tolist() == expected
    assert grid == Grid((2, 3), (0.5, -1.0), (2.0, 0.25))
    assert hash(grid) == hash(Grid((2, 3), (0.5, -1.0), (2.0, 0.25)))


def test_padding_keeps_true_offsets():
    image = torch.randn(1, 2, 3, 4)
    padded = Points.from_image(image).pad(((1, 2), (0, 3)))
    assert padded.grid == Grid((6, 7), (-1, 0))
    assert torch.equal(padded.to_image(), torch.nn.functional.pad(image, (0, 3, 1, 2)))
    inside = Grid((6, 7), (-1, 0)).index_of(Grid((3, 4)))
    assert torch.equal(padded.x[:, inside], Points.from_image(image).x)
    assert torch.equal(padded.position[inside], Grid((3, 4)).positions())
    points = Points.from_image(image)
    assert points.pad(((0, 0), (0, 0))) is points
    coarse = Grid((2,), (4,), (3,)).pad(((2, 1),))
    assert coarse.positions().flatten().tolist() == [-2, 1, 4, 7, 10]


@pytest.mark.parametrize(
    ("grid", "other"),
    [
        (Grid((5, 7)), Grid((5, 7))),
        (Grid((5, 7)), Grid((2, 3), (1, 2), (2, 2))),
        (Grid((5, 7), (-2, -3)), Grid((2, 3))),
        (Grid((4,), (1,), (0.5,)), Grid((2,), (1.5,), (1,))),
        (Grid((3,)), Grid((1,), (2,), (0.3,))),
        (Grid((2, 3, 4)), Grid((1, 2, 2), (1, 1, 0), (1, 1, 3))),
    ],
)
def test_points_are_found_on_another_grid(grid, other):
    index = grid.index_of(other)
    assert torch.equal(grid.positions()[index], other.positions())


@pytest.mark.parametrize(
    ("grid", "other"),
    [
        (Grid((5,)), Grid((6,))),
        (Grid((5,)), Grid((2,), (-1,))),
        (Grid((5,)), Grid((2,), (0.5,))),
        (Grid((5,)), Grid((2,), (0,), (1.5,))),
        (Grid((5,), (0,), (2,)), Grid((2,), (1,), (2,))),
        (Grid((5, 5)), Grid((5, 5), (0, 1))),
    ],
)
def test_points_that_lie_beside_a_grid_are_not_found(grid, other):
    assert grid.index_of(other) is None


def test_what_is_kept_from_inference_mode_still_trains():
    grid = Grid((3, 17))
    with torch.inference_mode():
        grid.index_of(grid)
    x = torch.randn(51, requires_grad=True)
    x[grid.index_of(grid)].sum().backward()
    assert torch.equal(x.grad, torch.ones(51))


# -- clouds -------------------------------------------------------------------------------------


@quick
@given(st.lists(st.integers(0, 5), min_size=1, max_size=6).filter(any))
def test_ragged_clouds_go_there_and_back(sizes):
    batch = torch.arange(len(sizes)).repeat_interleave(torch.tensor(sizes))
    x, pos = torch.randn(len(batch), 3), torch.randn(len(batch), 2)
    points = Points.from_batch(x, pos, batch, len(sizes))
    assert points.x.shape == (len(sizes), max(sizes), 3)
    assert points.mask.sum(-1).tolist() == sizes
    assert not points.x[~points.mask].any()
    assert torch.equal(points.to_rows(points.x), x)
    assert torch.equal(points.to_rows(points.pos), pos)
    for b, size in enumerate(sizes):
        assert torch.equal(points.x[b, :size], x[batch == b])


def test_one_cloud_without_a_batch_vector():
    x = torch.randn(4, 3)
    points = Points.from_batch(x)
    assert points.x.shape == (1, 4, 3) and points.mask is None
    assert torch.equal(points.to_rows(points.x), x)
    assert Points.from_batch(None, x).pos.shape == (1, 4, 3)


def test_pyg_data_goes_there_and_back():
    clouds = [Data(x=torch.randn(n, 3), pos=torch.randn(n, 2)) for n in (3, 1, 5)]
    batch = Batch.from_data_list(clouds)
    data = Points.from_data(batch).to_data()
    assert torch.equal(data.x, batch.x)
    assert torch.equal(data.pos, batch.pos)
    assert torch.equal(data.batch, batch.batch)
    single = Points.from_data(clouds[0]).to_data()
    assert torch.equal(single.x, clouds[0].x) and torch.equal(single.pos, clouds[0].pos)
    plain = Points(clouds[0].x, clouds[0].pos).to_data()
    assert torch.equal(plain.x, clouds[0].x) and plain.batch is None


def test_data_without_positions_or_features_goes_there_and_back():
    x, pos = torch.randn(4, 3), torch.randn(4, 2)
    assert Points.from_data(Data(x=x)).to_data().pos is None
    assert torch.equal(Points.from_data(Data(x=x)).to_data().x, x)
    back = Points.from_data(Data(pos=pos)).to_data()
    assert back.x is None and torch.equal(back.pos, pos)


def test_an_image_as_data_has_its_positions():
    data = Points.from_image(torch.randn(2, 3, 2, 4)).to_data()
    assert data.x.shape == (16, 3) and data.pos.shape == (16, 2)
    assert data.batch.tolist() == [0] * 8 + [1] * 8


def test_ranges_look_at_real_points_alone():
    pos = torch.tensor([[[1.0, 5.0], [3.0, 2.0], [99.0, -99.0]], [[7.0, 7.0]] * 3])
    mask = torch.tensor([[True, True, False], [False] * 3])
    low, high = position_range(pos, mask)
    assert low[:, 0].tolist() == [[1, 2], [0, 0]] and high[:, 0].tolist() == [[3, 5], [0, 0]]
    low, high = position_range(pos)
    assert low[0, 0].tolist() == [1, -99] and high[0, 0].tolist() == [99, 5]


# -- rows ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "index"),
    [
        ((5, 3), (4, 2)),
        ((2, 5, 3), (4, 2)),
        ((5, 3), (2, 4, 2)),
        ((2, 5, 3), (2, 4, 2)),
        ((2, 1, 5, 3), (2, 3, 4, 2)),
        ((2, 3, 5, 3), (3, 4, 2)),
        ((1, 5, 3), (2, 4, 2)),
        ((2, 5, 3), (2, 0, 2)),
        ((2, 5, 3), (2, 4, 0)),
        ((0, 5, 3), (0, 4, 2)),
        ((0, 5, 3), (4, 2)),
    ],
)
def test_rows_are_gathered_for_any_leading_axes(values, index):
    x, i = torch.randn(values), torch.randint(values[-2], index)
    lead = torch.broadcast_shapes(values[:-2], index[:-2])
    found = gather_rows(x, i)
    wide = i.expand(*lead, *index[-2:]).unsqueeze(-1).expand(*lead, *index[-2:], values[-1])
    rows = x.expand(*lead, *values[-2:]).unsqueeze(-3)
    rows = rows.expand(*lead, index[-2], *values[-2:])
    assert torch.equal(found, rows.gather(-2, wide))


# -- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (
            lambda: Points(torch.zeros(4)),
            ValueError,
            r"expected x of shape .* got \(4,\); .*unsqueeze",
        ),
        (lambda: Points(), ValueError, "got none"),
        (lambda: Points(torch.zeros(3, 1), torch.zeros(4, 2)), ValueError, "differ"),
        (lambda: Points(torch.zeros(3, 1), mask=torch.ones(4).bool()), ValueError, "differ"),
        (lambda: Points(torch.zeros(3, 1), grid=Grid((4,))), ValueError, "differ"),
        (lambda: Points(torch.zeros(3, 1)).position, ValueError, "neither pos nor grid"),
        (lambda: Points(pos=torch.zeros(3, 1)).features, ValueError, "positions only"),
        (lambda: Points(torch.zeros(1, 3, 1)).to_image(), ValueError, "no grid"),
        (lambda: Points(torch.zeros(1, 3, 1)).pad(((1, 1),)), ValueError, "without a grid"),
        (lambda: Points.from_image(torch.zeros(3, 4)), ValueError, r"\(b, c, \*size\)"),
        (lambda: Points.from_image([1]), TypeError, "Tensor"),
        (lambda: Points.from_tokens(torch.zeros(3, 4)), ValueError, "3 dimensions"),
        (lambda: Points.from_batch(None), ValueError, "neither"),
        (
            lambda: Points.from_batch(torch.zeros(3, 1), batch=torch.tensor([0, 1, 0])),
            ValueError,
            "sorted",
        ),
    ],
)
def test_bad_points_are_refused(call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_points_know_their_device_and_number():
    assert Points(grid=Grid((2, 3))).num_points == 6
    assert Points(pos=torch.zeros(4, 2)).num_points == 4
    assert Points(grid=Grid((2, 3))).device == torch.device("cpu")
    assert Points(pos=torch.zeros(4, 2, device="meta")).device.type == "meta"
    assert math.prod(Points.from_image(torch.zeros(1, 1, 0, 3)).grid.size) == 0
