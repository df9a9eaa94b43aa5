"""Point clouds of things: ModelNet's classes and ShapeNet's parts, by PyTorch Geometric."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.utils.data import Subset
from torch_geometric.datasets import ModelNet, ShapeNet
from torch_geometric.transforms import Compose, NormalizeScale, SamplePoints

from convnn_geo.checks import check_int, check_name
from convnn_geo.datasets.clouds import digit_clouds
from convnn_geo.datasets.repeatable import Repeatable
from convnn_geo.datasets.splits import hold_out
from convnn_geo.datasets.task import Task, collate_points


def digit_clouds_task(seed: int = 0, height: float = 4.0) -> Task:
    """The digits as clouds of 16 to 42 points, a task of ten classes.

    Args:
        seed: of the split.
        height: of a pixel full of ink, in pixels.
    """
    splits = digit_clouds(seed, height)
    return _classes("digit_clouds", 10, splits.train, splits.validation, splits.test)


def modelnet10_task(root: Path, seed: int = 0, download: bool = False, points: int = 1024) -> Task:
    """ModelNet10: points on the faces of furniture, centred and scaled into (-1, 1).

    Points are drawn anew in every epoch of training, and once and for all to validate and to test
    on. One in ten of the training examples is held out to validate on.

    Args:
        root: folder of ``modelnet10``; the unpacked archive is in ``modelnet10/raw``.
        seed: of the split and the points.
        download: what is not in ``root``.
        points: a cloud.
    """
    return _modelnet("10", root, seed, download, points)


def modelnet40_task(root: Path, seed: int = 0, download: bool = False, points: int = 1024) -> Task:
    """ModelNet40: forty classes; else as :func:`modelnet10_task`.

    Args:
        root: folder of ``modelnet40``.
        seed: of the split and the points.
        download: what is not in ``root``.
        points: a cloud.
    """
    return _modelnet("40", root, seed, download, points)


def shapenet_task(root: Path, download: bool = False, category: str | None = None) -> Task:
    """Parts of things of 16 categories: 50 classes, one a point; the set's own three parts.

    What is scored is the share of points, not the mean intersection over union of categories.

    Args:
        root: folder of ``shapenet``; the unpacked archive is in ``shapenet/raw``.
        download: what is not in ``root``.
        category: of things, e.g. ``"Airplane"``; None for all. There are 50 classes either way.
    """
    if category is not None:
        check_name("category", category, ShapeNet.category_ids)
    folder = _folder(ShapeNet, root / "shapenet", download)
    train, validation, test = (
        ShapeNet(folder, category, include_normals=False, split=split)
        for split in ("train", "val", "test")
    )
    return Task(
        name="shapenet",
        kind="point_segmentation",
        train=train,
        validation=validation,
        test=test,
        num_classes=train.num_classes,
        in_channels=3,
        image_size=None,
        collate=collate_points,
    )


def _modelnet(number: str, root: Path, seed: int, download: bool, points: int) -> Task:
    transform = Compose([SamplePoints(check_int("points", points)), NormalizeScale()])
    folder = _folder(ModelNet, root / f"modelnet{number}", download)
    whole, test = (ModelNet(folder, number, train, transform) for train in (True, False))
    train, validation = (Subset(whole, index.tolist()) for index in hold_out(len(whole), seed))
    # A seed a part: else clouds of the same number would have the same draws.
    parts = [Repeatable(part, 3 * seed + p) for p, part in enumerate((train, validation, test))]
    return _classes(f"modelnet{number}", int(number), *parts)


def _folder(kind: Any, folder: Path, download: bool) -> str:
    """The folder, if PyTorch Geometric will find all there that it would else download."""
    names = kind.__new__(kind).raw_file_names
    missing = [name for name in names if not (folder / "raw" / name).exists()]
    if missing and not download:
        raise FileNotFoundError(
            f"expected the files of {kind.__name__} in {folder / 'raw'}, but there is no "
            f"{missing[0]}; download=True (--download) downloads them"
        )
    return str(folder)


def _classes(name: str, num_classes: int, train: Any, validation: Any, test: Any) -> Task:
    return Task(
        name=name,
        kind="point_classification",
        train=train,
        validation=validation,
        test=test,
        num_classes=num_classes,
        in_channels=3,
        image_size=None,
        collate=collate_points,
    )
