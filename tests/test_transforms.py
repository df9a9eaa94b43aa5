"""Transforms: images become points, points become graphs, as PyTorch Geometric has it."""

import importlib
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data.datapipes.iter import IterableWrapper
from torch_geometric.data import Batch, Data, HeteroData, InMemoryDataset
from torch_geometric.loader import DataLoader
from torch_geometric.transforms import Compose, ToSLIC
from torch_geometric.utils import is_undirected, to_undirected

from convnn_geo.datasets import motorcycle_cloud
from convnn_geo.metrics import Feature, Mahalanobis, Spatial
from convnn_geo.points import Points
from convnn_geo.search import ENGINES
from convnn_geo.transforms import SLIC, ImageToPoints, NeighborGraph

Image = pytest.importorskip("PIL.Image")


# --- images ---------------------------------------------------------------------------------


def image(channels=3, height=4, width=6):
    return torch.rand(channels, height, width)


def test_pixels_are_points_in_raster_order():
    pixels = image()
    data = ImageToPoints()(pixels)
    assert data.x.shape == (24, 3) and data.pos.shape == (24, 2)
    row, column = data.pos.long().unbind(-1)
    assert torch.equal(data.x, pixels[:, row, column].T)
    assert torch.equal(data.pos, Points.from_image(pixels[None]).position)
    assert row.max() == 3 and column.max() == 5
    assert data.x.is_contiguous()


def test_every_form_of_an_image_gives_the_same_points():
    array = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    wanted = ImageToPoints()(torch.tensor(array).permute(2, 0, 1) / 255)
    forms = [
        array,
        array[::-1][::-1],
        torch.tensor(array).permute(2, 0, 1),
        Image.fromarray(array),
        array.astype(np.uint16) * 257,
        (array.astype(np.uint16) * 257).astype(">u2"),
        array.astype(np.float32) / 255,
        Data(image=Image.fromarray(array)),
    ]
    for form in forms:
        data = ImageToPoints()(form)
        assert torch.allclose(data.x, wanted.x) and torch.equal(data.pos, wanted.pos)
        assert "image" not in data


@pytest.mark.parametrize(
    ("mode", "channels"),
    [("1", 1), ("L", 1), ("LA", 2), ("P", 3), ("RGB", 3), ("RGBA", 4), ("CMYK", 3), ("I;16", 1)],
)
def test_modes_of_pil(mode, channels):
    white = Image.new("RGB", (6, 4), "white")
    picture = Image.new(mode, (6, 4), 65535) if mode == "I;16" else white.convert(mode)
    data = ImageToPoints()(picture)
    assert torch.equal(data.x, torch.ones(24, channels))


def test_grey_images_and_dtypes():
    assert ImageToPoints()(torch.rand(4, 6)).x.shape == (24, 1)
    assert ImageToPoints()(np.eye(3, dtype=bool)).x.sum() == 3
    double = ImageToPoints()(image().double())
    assert double.x.dtype == double.pos.dtype == torch.float64
    half = ImageToPoints()(image().half())  # positions up to 2048 at most would be exact in half
    assert half.x.dtype == half.pos.dtype == torch.float32
    kept = ImageToPoints()(3 * image() - 1)
    assert kept.x.min() < 0 and kept.x.max() > 1


def test_stride_keeps_places_in_the_whole_image():
    pixels = image(1, 5, 7)
    data = ImageToPoints(stride=(2, 3))(pixels)
    assert data.pos.tolist() == [[r, c] for r in (0, 2, 4) for c in (0, 3, 6)]
    assert torch.equal(data.x[:, 0], pixels[0, ::2, ::3].flatten())


def test_mask_keeps_pixels():
    pixels = image(2, 4, 6)
    mask = torch.rand(4, 6) > 0.5
    row, column = mask.nonzero(as_tuple=True)
    for given in (mask, mask.numpy(), lambda seen: mask):
        data = ImageToPoints(mask=given)(pixels)
        assert torch.equal(data.pos, mask.nonzero().float())
        assert torch.equal(data.x, pixels[:, row, column].T)
    with_stride = ImageToPoints(stride=2, mask=mask)(pixels)
    assert len(with_stride.pos) == mask[::2, ::2].sum()
    bright = ImageToPoints(mask=lambda seen: seen.sum(0) > 1)(pixels)
    assert (bright.x.sum(-1) > 1).all() and len(bright.x) == (pixels.sum(0) > 1).sum()
    nothing = ImageToPoints(mask=torch.zeros(4, 6, dtype=torch.bool))(pixels)
    assert nothing.x.shape == (0, 2) and nothing.pos.shape == (0, 2)


def test_data_keeps_what_is_no_image():
    before = Data(image=image(), y=torch.tensor([3]))
    data = ImageToPoints()(before)
    assert data.y.item() == 3 and sorted(data.keys()) == ["pos", "x", "y"]
    assert sorted(before.keys()) == ["image", "y"]  # the one given is left alone


@pytest.mark.parametrize("transform", [ImageToPoints, SLIC])
@pytest.mark.parametrize(
    ("value", "error", "match"),
    [
        ("photo.png", TypeError, "expected a PIL image.* got str"),
        (torch.rand(2, 3, 4, 5), ValueError, r"\(c, h, w\), got shape \(2, 3, 4, 5\).*one image"),
        (np.zeros(5), ValueError, r"\(h, w, c\), got shape \(5,\)"),
        (torch.zeros(3, 4, 5, dtype=torch.long), TypeError, "got torch.int64; convert"),
        (Data(x=torch.rand(3, 1)), ValueError, r"data\.image; got Data\(x=\[3, 1\]\)"),
    ],
)
def test_what_is_no_image_is_refused(transform, value, error, match):
    with pytest.raises(error, match=match):
        transform()(value)


@pytest.mark.parametrize("transform", [ImageToPoints, SLIC])
def test_what_is_no_mask_is_refused(transform):
    with pytest.raises(TypeError, match=r"expected a mask.* got int"):
        transform(mask=3)
    with pytest.raises(TypeError, match=r"boolean mask.* got torch\.float32"):
        transform(mask=torch.rand(4, 6))
    with pytest.raises(TypeError, match="boolean mask"):
        transform(mask=lambda seen: seen)(image())
    with pytest.raises(ValueError, match=r"size \(4, 6\), got \(6, 4\)"):
        transform(mask=torch.ones(6, 4, dtype=torch.bool))(image())


@pytest.mark.parametrize("stride", [0, (1, 2, 3), 1.5])
def test_wrong_strides_are_refused(stride):
    with pytest.raises((ValueError, TypeError), match="stride"):
        ImageToPoints(stride)


# --- superpixels ----------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
def test_superpixels_are_those_of_pyg(channels):
    pixels = image(channels, 20, 33)
    ours = SLIC(n_segments=12, add_segment=True, sigma=1)(pixels)
    theirs = ToSLIC(n_segments=12, add_seg=True, sigma=1)(pixels)
    assert torch.equal(ours.segment, theirs.seg)
    assert torch.allclose(ours.x, theirs.x, atol=1e-6)
    assert torch.allclose(ours.pos.flip(-1), theirs.pos, atol=1e-4)
    assert len(ours.x) > 4


def test_superpixels_under_a_mask():
    pixels = image(3, 20, 33)
    mask = torch.zeros(20, 33, dtype=torch.bool)
    mask[4:16, 10:30] = True
    data = SLIC(n_segments=8, mask=mask, add_segment=True)(pixels)
    segment = data.segment[0]
    assert torch.equal(segment >= 0, mask)
    assert segment[mask].unique().tolist() == list(range(len(data.x)))
    for number in range(len(data.x)):
        here = segment == number
        assert torch.allclose(data.x[number], pixels[:, here].mean(-1), atol=1e-6)
        assert torch.allclose(data.pos[number], here.nonzero().float().mean(0), atol=1e-4)


def test_superpixels_of_almost_nothing():
    nothing = SLIC(mask=torch.zeros(4, 6, dtype=torch.bool), add_segment=True)(image())
    assert nothing.x.shape == (0, 3) and nothing.pos.shape == (0, 2)
    assert (nothing.segment == -1).all()
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[1, 2] = True
    assert SLIC(mask=mask)(image()).pos.tolist() == [[1.0, 2.0]]
    assert SLIC()(torch.rand(3, 0, 4)).pos.shape == (0, 2)
    assert SLIC()(torch.rand(3, 1, 1)).pos.tolist() == [[0.0, 0.0]]


def test_slic_refuses_what_it_does_not_know():
    with pytest.raises(TypeError, match=r"got sigmas; there are .*sigma"):
        SLIC(sigmas=2)
    with pytest.raises(TypeError, match="got start_label"):
        SLIC(start_label=1)
    with pytest.raises(ValueError, match="n_segments"):
        SLIC(0)
    with pytest.raises(ValueError, match="compactness"):
        SLIC(compactness=0)
    with pytest.raises(ValueError, match="1 that are NaN"):
        SLIC()(torch.tensor([[0.0, torch.nan]]))


# --- graphs ---------------------------------------------------------------------------------


def cloud(points=50, axes=3, **more):
    return Data(pos=torch.rand(points, axes), **more)


def edges(edge_index):
    return sorted(map(tuple, edge_index.T.tolist()))


def clouds(*sizes):
    return Batch.from_data_list([cloud(size) for size in sizes])


@pytest.mark.parametrize("loop", [False, True])
@pytest.mark.parametrize("flow", ["source_to_target", "target_to_source"])
@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("force_undirected", [False, True])
def test_graph_is_that_of_knn_graph(loop, flow, cosine, force_undirected):
    """Of PyG's transform by its own definition, with torch_cluster for pyg-lib."""
    theirs = pytest.importorskip("torch_cluster").knn_graph
    data = clouds(40, 7, 23)
    metric = "cosine" if cosine else "spatial"
    ours = NeighborGraph(5, loop, force_undirected, flow, metric)(data).edge_index
    # On the CPU torch_cluster knows no cosine; on the unit sphere it has the Euclidean order.
    pos = torch.nn.functional.normalize(data.pos) if cosine else data.pos
    wanted = theirs(pos, 5, data.batch, loop=loop, flow=flow)
    if force_undirected:
        wanted = to_undirected(wanted, num_nodes=data.num_nodes)
    assert edges(ours) == edges(wanted)
    assert is_undirected(ours) or not force_undirected


def test_edges_are_sorted_by_target_then_distance():
    data = NeighborGraph(4, distance="edge_weight")(clouds(9, 20))
    source, target = data.edge_index
    assert target.tolist() == [i for i in range(29) for _ in range(4)]
    assert (data.edge_weight.view(-1, 4).diff() >= 0).all()
    assert torch.equal(data.batch[source], data.batch[target])
    assert type(data.edge_index) is torch.Tensor


@pytest.mark.parametrize("backend", ["dense", "torch_cluster"])
def test_any_engine_gives_the_same_graph(backend):
    if backend != "dense":
        pytest.importorskip(backend)
    data = clouds(30, 30)
    assert torch.equal(
        NeighborGraph(3, backend=backend)(data).edge_index, NeighborGraph(3)(data).edge_index
    )


def test_metric_chooses_between_features_and_positions():
    data = cloud(30, x=torch.randn(30, 4))
    by_pos, by_x = NeighborGraph(3), NeighborGraph(3, metric="cosine")
    assert torch.equal(by_pos(data).edge_index, by_pos(cloud_of(data.pos)).edge_index)
    assert torch.equal(by_x(data).edge_index, by_x(cloud_of(data.x)).edge_index)
    at_pos = NeighborGraph(3, metric="cosine", features="pos")(data)
    assert torch.equal(at_pos.edge_index, by_x(cloud_of(data.pos)).edge_index)
    mixed = 0.5 * Spatial() + 2 * Feature("euclidean")
    found = NeighborGraph(3, metric=mixed, distance="edge_weight")(data)
    source, target = found.edge_index
    wanted = 0.5 * (data.pos[source] - data.pos[target]).norm(dim=-1)
    wanted += 2 * (data.x[source] - data.x[target]).norm(dim=-1)
    assert torch.allclose(found.edge_weight, wanted, atol=1e-5)
    only_features = Data(x=data.x)
    assert torch.equal(by_x(only_features).edge_index, by_x(data).edge_index)


def cloud_of(pos):
    return Data(pos=pos)


def test_what_the_metric_does_not_ask_for_is_not_looked_at():
    data = cloud(9, x=torch.full((9, 1), torch.nan))
    assert NeighborGraph(2)(data).num_edges == 18
    atoms = cloud(9, x=torch.arange(9))
    assert NeighborGraph(2)(atoms).num_edges == 18
    with pytest.raises(TypeError, match=r"data\.x: expected a floating-point.*convert"):
        NeighborGraph(2, metric="cosine")(atoms)


def test_distance_goes_where_it_is_asked_to():
    data = cloud()
    source, target = NeighborGraph(4)(data).edge_index
    wanted = (data.pos[source] - data.pos[target]).norm(dim=-1)
    weight = NeighborGraph(4, distance="edge_weight")(data)
    assert torch.allclose(weight.edge_weight, wanted) and "edge_attr" not in weight
    attribute = NeighborGraph(4, distance="edge_attr")(data)
    assert torch.allclose(attribute.edge_attr, wanted[:, None]) and "edge_weight" not in attribute
    both_ways = NeighborGraph(4, force_undirected=True, distance="edge_weight")(data)
    source, target = both_ways.edge_index
    assert torch.allclose(both_ways.edge_weight, (data.pos[source] - data.pos[target]).norm(dim=-1))


def test_data_carries_no_gradient_of_a_learnable_metric():
    data = cloud(9, x=torch.rand(9, 4))
    transform = NeighborGraph(2, metric=Mahalanobis(4), distance="edge_weight")
    assert transform.metric.learnable and not transform(data).edge_weight.requires_grad


def test_edges_of_an_earlier_graph_are_replaced():
    before = NeighborGraph(4, distance="edge_attr")(cloud(y=torch.tensor([1])))
    before.edge_weight = torch.rand(before.num_edges)
    after = NeighborGraph(2)(before)
    assert sorted(after.keys()) == ["edge_index", "pos", "y"] and after.num_edges == 100
    assert before.num_edges == 200 and "edge_weight" in before  # the one given is left alone


def test_one_neighbour_and_no_point():
    data = Data(pos=torch.tensor([0.0, 1.0, 3.0, 3.5]))  # a line's positions may be (n,)
    assert edges(NeighborGraph(1)(data).edge_index) == [(0, 1), (1, 0), (2, 3), (3, 2)]
    assert edges(NeighborGraph(1, loop=True)(data).edge_index) == [(i, i) for i in range(4)]
    empty = NeighborGraph(3, distance="edge_attr")(Data(pos=torch.zeros(0, 3)))
    assert empty.edge_index.shape == (2, 0) and empty.edge_index.dtype == torch.long
    assert empty.edge_attr.shape == (0, 1)


def test_points_that_coincide_are_neighbours_but_not_of_themselves():
    data = Data(pos=torch.zeros(5, 2))
    found = NeighborGraph(3)(data).edge_index
    assert edges(found)[:3] == [(0, 1), (0, 2), (0, 3)] and found.shape == (2, 15)
    assert (found[0] != found[1]).all()


def test_clouds_with_too_few_points():
    data = clouds(3, 10)
    with pytest.raises(ValueError, match="k=4 is larger"):
        NeighborGraph(4)(data)
    padded = NeighborGraph(4, short="pad")(data)
    assert padded.edge_index[1].bincount().tolist() == [2] * 3 + [4] * 10
    theirs = pytest.importorskip("torch_cluster").knn_graph
    assert edges(padded.edge_index) == edges(theirs(data.pos, 4, data.batch))
    assert NeighborGraph(2, short="pad")(Data(pos=torch.rand(1, 3))).num_edges == 0


def test_max_distance_leaves_far_points_out():
    data = Data(pos=torch.tensor([[0.0], [1.0], [5.0]]))
    found = NeighborGraph(2, max_distance=1.5, distance="edge_weight")(data)
    assert edges(found.edge_index) == [(0, 1), (1, 0)] and found.edge_weight.tolist() == [1, 1]


def test_transforms_are_a_pre_transform(tmp_path):
    class Pictures(InMemoryDataset):
        def __init__(self, root, pre_transform):
            super().__init__(root, pre_transform=pre_transform)
            self.load(self.processed_paths[0])

        @property
        def processed_file_names(self):
            return ["data.pt"]

        def process(self):
            pictures = [Data(image=image(3, 4 + i, 6), y=torch.tensor([i])) for i in range(3)]
            self.save([self.pre_transform(data) for data in pictures], self.processed_paths[0])

    superpixels = Compose([SLIC(4), NeighborGraph(2, loop=True, distance="edge_weight")])
    for number, transform in enumerate(
        (Compose([ImageToPoints(stride=2), NeighborGraph(4)]), superpixels)
    ):
        pictures = Pictures(tmp_path / str(number), transform)
        assert [data.y.item() for data in pictures] == [0, 1, 2]
        assert all(data.has_self_loops() == bool(number) for data in pictures)
        loaded = next(iter(DataLoader(pictures, batch_size=3)))
        assert torch.equal(loaded.batch[loaded.edge_index[0]], loaded.batch[loaded.edge_index[1]])
    assert "ImageToPoints(stride=(2, 2), mask=None)" in (
        tmp_path / "0/processed/pre_transform.pt"
    ).read_text(encoding="latin-1")


def test_functional_names_are_registered():
    pipe = IterableWrapper([image(), image(1, 5, 3)])
    graphs = list(pipe.image_to_points(stride=2).neighbor_graph(k=2))
    assert [graph.num_nodes for graph in graphs] == [6, 6]
    assert [graph.num_edges for graph in graphs] == [12, 12]
    assert all(data.num_nodes for data in IterableWrapper([image()]).slic(n_segments=4))


def test_graph_refuses_what_it_can_not_take():
    hetero = HeteroData()
    hetero["point"].pos = torch.rand(5, 3)
    with pytest.raises(TypeError, match=r"expected a Data, got HeteroData; .*one type"):
        NeighborGraph(2)(hetero)
    with pytest.raises(ValueError, match=r"needs positions data\.pos; got Data\(x="):
        NeighborGraph(2)(Data(x=torch.rand(5, 3)))
    with pytest.raises(ValueError, match=r"needs features data\.normal; got Data\(pos="):
        NeighborGraph(2, metric="cosine", features="normal")(cloud(5))
    with pytest.raises(ValueError, match=r"needs features data\.x"):
        NeighborGraph(2, metric="cosine")(Data())
    with pytest.raises(ValueError, match=r"data\.pos: expected finite"):
        NeighborGraph(1)(Data(pos=torch.tensor([[0.0], [torch.inf]])))
    with pytest.raises(TypeError, match=r"data\.pos: expected a floating-point"):
        NeighborGraph(1)(Data(pos=torch.tensor([[0], [1]])))
    with pytest.raises(ValueError, match="sorted"):
        NeighborGraph(1)(cloud(4, batch=torch.tensor([1, 0, 1, 0])))


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"k": 0}, ValueError, "k: expected an integer of at least 1"),
        ({"k": 2.0}, TypeError, "k: expected an integer"),
        ({"flow": "up"}, ValueError, "unknown flow 'up'; expected one of: source_to_target"),
        ({"metric": "far"}, ValueError, "unknown metric 'far'"),
        ({"backend": "magic"}, ValueError, "unknown search backend 'magic'"),
        ({"distance": "weight"}, ValueError, "'weight'; expected one of: edge_weight, edge_attr"),
        ({"features": "x"}, ValueError, "features='x': .* looks at positions alone"),
        ({"short": "skip"}, ValueError, "'skip'; expected one of: error, truncate, pad"),
    ],
)
def test_wrong_options_are_refused_at_once(options, error, match):
    with pytest.raises(error, match=match):
        NeighborGraph(**options)


def test_transforms_say_all_their_settings():
    """A data set tells by them whether its files are stale."""
    assert repr(ImageToPoints(2)) == "ImageToPoints(stride=(2, 2), mask=None)"
    assert "n_segments=9" in repr(SLIC(9)) and repr(SLIC(9)) != repr(SLIC(9, sigma=2))
    assert "k=4, loop=False" in repr(NeighborGraph(4))
    assert repr(NeighborGraph(4)) != repr(NeighborGraph(4, metric="cosine"))


# --- the example ----------------------------------------------------------------------------


def test_example_builds_and_draws_the_graph_of_a_cloud(tmp_path, monkeypatch, capsys):
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples")
    main = importlib.import_module("stereo_cloud_graph").main
    picture = tmp_path / "new" / "cloud.png"
    main(["--downsample", "10", "--k", "4", "--out", str(picture)])
    told = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert told["engine"] in ENGINES
    count = motorcycle_cloud(10).num_nodes
    assert told["points"] == f"{count}, 3 coordinates"
    assert told["edges"] == f"{4 * count}, 4 to each point"
    with Image.open(picture) as drawn:
        colors = drawn.convert("RGB").resize((132, 59)).getcolors(10**5)
    assert len(colors) > 1000


def test_two_masks_are_told_apart_by_what_a_data_set_compares():
    mask = torch.zeros(100, 100, dtype=torch.bool)
    other = mask.clone()
    other[50, 50] = True
    assert repr(ImageToPoints(mask=mask)) != repr(ImageToPoints(mask=other))
    assert repr(ImageToPoints(mask=mask)) == repr(ImageToPoints(mask=mask.numpy().copy()))


@pytest.mark.parametrize("transform", [ImageToPoints(), SLIC(n_segments=4)])
@pytest.mark.parametrize(
    "image, how",
    [
        (torch.rand(12, 10, 3), r"tensor \(c, h, w\) of shape \(12, 10, 3\).*permute\(2, 0, 1\)"),
        (
            np.random.rand(3, 12, 10),
            r"array .* of shape \(3, 12, 10\).*transpose\(1, 2, 0\)",
        ),
    ],
)
def test_channels_on_the_other_side_are_told(transform, image, how):
    with pytest.warns(UserWarning, match=how):
        transform(image)
