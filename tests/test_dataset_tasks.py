"""Tasks by name: prepared as they say, the same for the same seed, refused by name."""

import pytest
import torch
from dataset_cases import images_of, labels_of, same
from torch.utils.data import DataLoader, Subset

from convnn_geo.datasets import Task, data_names, digits, load

FEW = {"patches": {"count": 50}, "denoising": {"count": 50}}
DOWNLOADED = ["mnist", "cifar10", "cifar100", "modelnet10", "modelnet40", "shapenet"]


def test_names():
    assert set(DOWNLOADED) < set(data_names())
    assert {"digits", "patches", "imagenet", "denoising", "digit_clouds"} < set(data_names())
    assert "cifar10_denoising" in data_names()


@pytest.mark.parametrize("name", ["digits", "patches", "denoising", "digit_clouds"])
def test_what_ships_loads_and_batches(name):
    task = load(name, **FEW.get(name, {}))
    assert isinstance(task, Task) and task.name == name
    for part in (task.train, task.validation, task.test):
        some = Subset(part, range(0, len(part), 7))
        loader = DataLoader(some, batch_size=len(some), collate_fn=task.collate)
        inputs, target = next(iter(loader))
        first, _ = task.collate([some[number] for number in range(len(some))])
        assert all(same(a, b) for a, b in zip(inputs, first, strict=True))
        if task.kind == "point_classification":
            pos, batch = inputs
            assert pos.shape == (len(batch), task.in_channels)
            assert batch[-1] == len(target) - 1
        else:
            (x,) = inputs
            size = (task.in_channels, task.image_size, task.image_size)
            assert x.shape == (len(some), *size) and x.dtype == torch.float32
        if task.num_classes is None:
            assert target.shape == x.shape
        else:
            assert target.dtype == torch.long and set(target.tolist()) == {*range(task.num_classes)}


@pytest.mark.parametrize("name", ["digits", "patches", "denoising", "digit_clouds"])
def test_tasks_depend_on_the_seed_alone(name):
    options = FEW.get(name, {})
    torch.manual_seed(1)
    first = load(name, seed=3, **options)
    torch.manual_seed(2)
    again, other = load(name, seed=3, **options), load(name, seed=4, **options)
    for part in ("train", "validation", "test"):
        assert same(getattr(first, part)[5], getattr(again, part)[5])
        assert not same(getattr(first, part)[5], getattr(other, part)[5])


def test_digits_are_normalised_by_the_part_to_train_on():
    task, splits = load("digits", seed=2), digits(2)
    x = images_of(task.train)
    assert x.mean().abs() < 1e-4 and (x.std(correction=0) - 1).abs() < 1e-4
    mean, std = splits.train.x.mean(), splits.train.x.std(correction=0)
    for part in ("validation", "test"):
        expected = (getattr(splits, part).x - mean) / std
        torch.testing.assert_close(images_of(getattr(task, part)), expected, rtol=0, atol=1e-5)
        assert labels_of(getattr(task, part)) == getattr(splits, part).y.tolist()


def test_image_size_is_that_of_torchvision(torchvision):
    resize = pytest.importorskip("torchvision.transforms.v2").Resize((20, 20), antialias=True)
    small, large = load("digits").test, load("digits", image_size=20).test
    images = [small[number][0] * small.std + small.mean for number in range(9)]
    for number, image in enumerate(images):
        found = large[number][0] * large.std + large.mean
        torch.testing.assert_close(found, resize(image), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "options", "error"),
    [
        ("digit", {}, r"unknown data set 'digit'.*digits, patches"),
        ("digits", {"sigma": 0.1}, r"unknown option 'sigma' of data set 'digits'.*takes none"),
        ("denoising", {"sgima": 0.1}, r"did you mean 'sigma'\? it takes: sigma, size, count"),
        ("digit_clouds", {"image_size": 32}, r"image_size: digit_clouds holds clouds"),
        ("digits", {"image_size": 0}, r"image_size: expected an integer of at least 1"),
        ("digits", {"seed": -1}, r"seed: expected an integer of at least 0"),
        *((name, {"seed": 2**64}, r"seed: .* less than 2\*\*64") for name in ("digits", "patches")),
        ("shapenet", {"seed": 3}, r"seed: shapenet has parts of its own and draws nothing"),
        ("denoising", {"sigma": -0.1}, r"sigma: expected a finite number"),
        ("patches", {"count": 4}, r"count: expected an integer of at least 5"),
        ("patches", {"size": 200}, r"size: photograph .* cells of 400 x 400.*under 200"),
        ("patches", {"count": 10**6}, r"count: photograph .* places.*choose fewer"),
        ("shapenet", {"category": "Plane"}, r"unknown category 'Plane'.*Airplane, Bag"),
        ("modelnet10", {"points": 0}, r"points: expected an integer of at least 1"),
    ],
)
def test_bad_requests_say_why(tmp_path, name, options, error):
    with pytest.raises(ValueError, match=error):
        load(name, root=tmp_path, **options)


@pytest.mark.parametrize(
    ("options", "error"),
    [
        ({"seed": 1.0}, r"seed: expected an integer, got 1\.0"),
        ({"image_size": (8, 8)}, r"image_size: expected an integer, got \(8, 8\)"),
        ({"root": None}, "root: expected the path of a folder, got None"),
        ({"download": "no"}, "download: expected an instance of bool, got 'no'"),
    ],
)
def test_arguments_of_the_wrong_type_are_named(options, error):
    with pytest.raises(TypeError, match=error):
        load("digits", **options)


@pytest.mark.parametrize("name", ["modelnet10", "modelnet40", "shapenet"])
def test_missing_clouds_are_not_downloaded_unasked(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=rf"{name}.*download=True"):
        load(name, root=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["mnist", "cifar10", "cifar100", "cifar10_denoising"])
def test_missing_images_are_not_downloaded_unasked(tmp_path, torchvision, name):
    with pytest.raises(FileNotFoundError, match=r"download=True"):
        load(name, root=tmp_path)
    assert not list(tmp_path.iterdir())
