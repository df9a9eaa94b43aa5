"""ModelNet and ShapeNet, read from small files in the real form, written by the tests."""

import io
import json
import zipfile

import numpy as np
import pytest
import torch
from dataset_cases import same
from torch.utils.data import Subset
from torch_geometric.datasets import ModelNet, ShapeNet

from convnn_geo.datasets import load

CLASSES = ["bathtub", "bed", "chair", "desk", "dresser", "monitor", "night_stand", "sofa"]
CLASSES += ["table", "toilet"]
CORNERS = torch.tensor([[x, y, z] for x in (0, 1) for y in (0, 1) for z in (0, 1)])
FACES = [
    (0, 1, 3), (0, 3, 2), (4, 5, 7), (4, 7, 6), (0, 1, 5), (0, 5, 4),
    (2, 3, 7), (2, 7, 6), (0, 2, 6), (0, 6, 4), (1, 3, 7), (1, 7, 5),
]  # fmt: skip


def box_off(height):
    """A box 100 x 100 x 100 * height in the form of an OFF file."""
    corners = (CORNERS * torch.tensor([100, 100, 100 * height])).tolist()
    lines = ["OFF", f"{len(corners)} {len(FACES)} 0"]
    lines += [" ".join(str(float(value)) for value in corner) for corner in corners]
    lines += [f"3 {a} {b} {c}" for a, b, c in FACES]
    return "\n".join(lines) + "\n"


@pytest.fixture
def modelnet_zip(tmp_path):
    """ModelNet10.zip with a box a class, the taller the later its name."""
    path = tmp_path / "ModelNet10.zip"
    with zipfile.ZipFile(path, "w") as archive:
        for height, name in enumerate(CLASSES, start=1):
            for part, numbers in (("train", (1, 2)), ("test", (3,))):
                for number in numbers:
                    file = f"ModelNet10/{name}/{part}/{name}_{number:04}.off"
                    archive.writestr(file, box_off(height))
    return path


def check_modelnet(task, points):
    assert (len(task.train), len(task.validation), len(task.test)) == (18, 2, 10)
    assert sorted(int(task.test[number].y) for number in range(10)) == [*range(10)]
    for part in (task.train, task.validation, task.test):
        data = part[0]
        assert data.pos.shape == (points, 3) and data.pos.abs().max() < 1
        assert data.pos.mean(0).abs().max() < 1e-4
        extent = data.pos.max(0).values - data.pos.min(0).values
        assert extent[2] / extent[0] == pytest.approx(int(data.y) + 1, rel=0.1)
        assert same(part[0], data) and not same(part[1], data)


def test_modelnet10_is_downloaded_where_asked(tmp_path, modelnet_zip, monkeypatch):
    monkeypatch.setitem(ModelNet.urls, "10", modelnet_zip.as_uri())
    root = tmp_path / "data"
    task = load("modelnet10", root=root, points=300, download=True)
    check_modelnet(task, 300)
    assert (task.kind, task.num_classes, task.in_channels) == ("point_classification", 10, 3)
    before = [part[0] for part in (task.train, task.validation, task.test)]
    task.set_epoch(1)
    after = [part[0] for part in (task.train, task.validation, task.test)]
    assert [same(a, b) for a, b in zip(before, after, strict=True)] == [False, True, True]
    (pos, batch), y = task.collate([task.test[number] for number in (4, 0)])
    assert pos.shape == (600, 3) and batch.bincount().tolist() == [300, 300]
    assert y.tolist() == [int(task.test[4].y), int(task.test[0].y)]
    monkeypatch.setitem(ModelNet.urls, "10", "file:///nowhere")
    check_modelnet(load("modelnet10", root=root, points=200), 200)


def test_modelnet40_unpacked(tmp_path, modelnet_zip):
    with zipfile.ZipFile(modelnet_zip) as archive:
        archive.extractall(tmp_path)
    (tmp_path / "modelnet40").mkdir()
    (tmp_path / "ModelNet10").rename(tmp_path / "modelnet40" / "raw")
    task = load("modelnet40", root=tmp_path)
    assert task.num_classes == 40
    check_modelnet(task, 1024)


@pytest.fixture
def shapenet_zip(tmp_path):
    """Rows of position, normal and part, a file a thing; lists of files a part of the set."""
    path = tmp_path / "shapenetcore_partanno_segmentation_benchmark_v0_normal.zip"
    top, lists = path.stem, {"train": [], "val": [], "test": []}
    generator = np.random.default_rng(0)
    with zipfile.ZipFile(path, "w") as archive:
        for category, number in ShapeNet.category_ids.items():
            archive.writestr(f"{top}/{number}/", "")
            if category not in ("Airplane", "Table"):
                continue
            labels = ShapeNet.seg_classes[category]
            for part, count in (("train", 3), ("val", 1), ("test", 2)):
                for thing in range(count):
                    rows = generator.standard_normal((20 + thing, 7))
                    rows[:, 6] = [labels[row % len(labels)] for row in range(len(rows))]
                    text = io.StringIO()
                    np.savetxt(text, rows, fmt="%.6f")
                    archive.writestr(f"{top}/{number}/{part}{thing}.txt", text.getvalue())
                    lists[part].append(f"shape_data/{number}/{part}{thing}")
        for part, names in lists.items():
            file = f"{top}/train_test_split/shuffled_{part}_file_list.json"
            archive.writestr(file, json.dumps(names))
    return path


def test_shapenet_is_downloaded_where_asked(tmp_path, shapenet_zip, monkeypatch):
    monkeypatch.setattr(ShapeNet, "url", shapenet_zip.as_uri())
    root = tmp_path / "data"
    task = load("shapenet", root=root, download=True)
    assert (len(task.train), len(task.validation), len(task.test)) == (6, 2, 4)
    assert (task.kind, task.num_classes, task.in_channels) == ("point_segmentation", 50, 3)
    (pos, batch), y = task.collate([task.test[number] for number in range(4)])
    assert batch.bincount().tolist() == [20, 21, 20, 21] and pos.shape == (82, 3)
    assert y[batch < 2].unique().tolist() == [0, 1, 2, 3]
    assert y[batch > 1].unique().tolist() == [47, 48, 49]
    monkeypatch.setattr(ShapeNet, "url", "file:///nowhere/v0.zip")
    tables = load("shapenet", root=root, category="Table")
    assert (len(tables.train), len(tables.test), tables.num_classes) == (3, 2, 50)
    with zipfile.ZipFile(shapenet_zip) as archive:
        name = f"{shapenet_zip.stem}/04379243/train0.txt"
        rows = torch.from_numpy(np.loadtxt(io.BytesIO(archive.read(name)))).float()
    torch.testing.assert_close(tables.train[0].pos, rows[:, :3])
    assert tables.train[0].y.tolist() == rows[:, 6].long().tolist()
    (root / "shapenet" / "raw" / "04379243" / "train0.txt").unlink()
    (root / "shapenet" / "raw" / "02773838").rmdir()
    with pytest.raises(FileNotFoundError, match="no 02773838"):
        load("shapenet", root=root)


def test_parts_of_modelnet_are_disjoint(tmp_path, modelnet_zip, monkeypatch):
    monkeypatch.setitem(ModelNet.urls, "10", modelnet_zip.as_uri())
    task = load("modelnet10", root=tmp_path / "data", download=True, seed=4)
    train, validation = task.train.dataset, task.validation.dataset
    assert isinstance(train, Subset) and train.dataset is validation.dataset
    assert sorted([*train.indices, *validation.indices]) == list(range(20))
