"""ImageNet, read from small files in the real form, written by the tests."""

import shutil

import pytest
import torch
from dataset_cases import labels_of

from convnn_geo.datasets import load

COLOURS = {"n01440764": (250, 10, 20), "n01443537": (30, 200, 90)}


@pytest.fixture
def imagenet(tmp_path):
    """Photographs of one colour a class, of unequal size, in ImageNet's folders."""
    image_module = pytest.importorskip("PIL.Image")
    for part, count in (("train", 10), ("val", 3)):
        for name, colour in COLOURS.items():
            folder = tmp_path / part / name
            folder.mkdir(parents=True)
            for number in range(count):
                image = image_module.new("RGB", (60 + number, 50), colour)
                image.paste((0, 0, 0), (0, 0, 30, 50))
                image.save(folder / f"{name}_{number}.JPEG", quality=95)
    return tmp_path


def test_imagenet_folders(imagenet, torchvision):
    task = load("imagenet", root=imagenet, image_size=28)
    assert (len(task.train), len(task.validation), len(task.test)) == (18, 2, 6)
    assert (task.num_classes, task.in_channels, task.image_size) == (2, 3, 28)
    assert load("imagenet", root=imagenet).train[0][0].shape == (3, 224, 224)
    assert labels_of(task.test) == [0, 0, 0, 1, 1, 1]
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    for part in (task.train, task.validation, task.test):
        for x, y in (part[number] for number in range(len(part))):
            assert x.shape == (3, 28, 28)
            colour = torch.tensor([*COLOURS.values()][y]) / 255
            pixels = x * std[:, None, None] + mean[:, None, None]
            if part is task.train:  # flipped or not, between black and the colour
                assert (pixels <= colour[:, None, None] + 0.1).all() and (pixels > -0.1).all()
            else:
                assert (pixels[:, 14, -1] - colour).abs().max() < 0.03
                assert pixels[:, 14, 0].abs().max() < 0.03


def test_imagenet_is_augmented_in_training_only(imagenet, torchvision):
    task = load("imagenet", root=imagenet, image_size=28)
    before = [part[0][0] for part in (task.train, task.validation, task.test)]
    assert torch.equal(task.train[0][0], before[0])
    task.set_epoch(1)
    after = [part[0][0] for part in (task.train, task.validation, task.test)]
    assert [torch.equal(a, b) for a, b in zip(before, after, strict=True)] == [False, True, True]


def test_imagenet_folders_that_do_not_fit_are_refused(imagenet, torchvision):
    (imagenet / "val" / "n01443537").rename(imagenet / "val" / "n09999999")
    with pytest.raises(ValueError, match=r"same classes.*n01443537, n09999999"):
        load("imagenet", root=imagenet)
    shutil.rmtree(imagenet / "val")
    with pytest.raises(FileNotFoundError, match=r"no folder .*val"):
        load("imagenet", root=imagenet)
