"""CIFAR, read from small files in the real form, written by the tests."""

import pickle
import tarfile

import numpy as np
import pytest
import torch
from dataset_cases import images_of, labels_of, md5, same

from convnn_geo.datasets import load
from convnn_geo.datasets.splits import hold_out


def cifar_batch(path, start, count, **labels):
    data = (np.arange(count * 3072) * 7 + start).astype(np.uint8).reshape(count, 3072)
    names = [f"photo_{number}.png" for number in range(start, start + count)]
    batch = {"batch_label": path.name, "data": data, "filenames": names, **labels}
    path.write_bytes(pickle.dumps(batch, protocol=2))  # as Python 2 wrote the real ones
    return data.reshape(count, 3, 32, 32)


@pytest.fixture
def cifar10(tmp_path, torchvision, monkeypatch):
    """Files of CIFAR-10, with their own sums in place of the real ones'."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    train = [
        cifar_batch(folder / f"data_batch_{n}", n, 10, labels=[*range(10)]) for n in range(1, 6)
    ]
    test = cifar_batch(folder / "test_batch", 9, 10, labels=[*range(9, -1, -1)])
    names = ["plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    meta = {"num_cases_per_batch": 10, "label_names": names, "num_vis": 3072}
    (folder / "batches.meta").write_bytes(pickle.dumps(meta, protocol=2))
    kind = torchvision.datasets.CIFAR10
    sums = [[path.name, md5(path)] for path in sorted(folder.glob("data_batch_*"))]
    monkeypatch.setattr(kind, "train_list", sums)
    monkeypatch.setattr(kind, "test_list", [["test_batch", md5(folder / "test_batch")]])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5(folder / "batches.meta")})
    return tmp_path, np.concatenate(train), test


def test_cifar10(cifar10):
    root, train, test = cifar10
    task = load("cifar10", root=root, augment=False, seed=1)
    assert (len(task.train), len(task.validation), len(task.test)) == (45, 5, 10)
    assert (task.num_classes, task.in_channels, task.image_size) == (10, 3, 32)
    index, held = hold_out(50, 1)
    mean = (train[index] / 255).mean((0, 2, 3), keepdims=True)
    std = (train[index] / 255).std((0, 2, 3), keepdims=True)
    for part, x in ((task.train, train[index]), (task.validation, train[held]), (task.test, test)):
        expected = torch.from_numpy((x / 255 - mean) / std).float()
        torch.testing.assert_close(images_of(part), expected, rtol=0, atol=1e-4)
    assert labels_of(task.test) == [*range(9, -1, -1)]
    assert labels_of(task.validation) == (held % 10).tolist()


def test_cifar_is_augmented_in_training_only(cifar10):
    root, _, _ = cifar10
    plain, task = load("cifar10", root=root, augment=False), load("cifar10", root=root)
    with pytest.raises(TypeError, match="augment: expected an instance of bool, got 'no'"):
        load("cifar10", root=root, augment="no")
    assert same(task.validation[0], plain.validation[0]) and same(task.test[0], plain.test[0])
    black = (-plain.train.mean / plain.train.std)[:, None, None]
    seen = set()
    for epoch in range(12):
        task.set_epoch(epoch)
        x, y = task.train[3]
        image, label = plain.train[3]
        assert y == label
        padded = black.expand(3, 40, 40).clone()
        padded[:, 4:36, 4:36] = image
        crops = {
            (flip, top, left)
            for flip in (False, True)
            for top in range(9)
            for left in range(9)
            if torch.equal(x.flip(-1) if flip else x, padded[:, top : top + 32, left : left + 32])
        }
        assert len(crops) == 1
        seen |= crops
    assert len(seen) > 8 and len({flip for flip, _, _ in seen}) == 2


def test_cifar10_with_a_damaged_file_is_refused(cifar10):
    root, _, _ = cifar10
    file = root / "cifar-10-batches-py" / "data_batch_3"
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(FileNotFoundError, match=r"CIFAR10 in .*corrupted"):
        load("cifar10", root=root)


def test_cifar10_is_downloaded_where_asked(cifar10, torchvision, monkeypatch, server):
    root, train, _ = cifar10
    address, folder = server
    packed = folder / "cifar-10-python.tar.gz"
    with tarfile.open(packed, "w:gz") as archive:
        archive.add(root / "cifar-10-batches-py", "cifar-10-batches-py")
    kind = torchvision.datasets.CIFAR10
    monkeypatch.setattr(kind, "url", address + packed.name)
    monkeypatch.setattr(kind, "tgz_md5", md5(packed))
    task = load("cifar10", root=root / "data", download=True, augment=False)
    assert torch.equal(task.train.images, torch.from_numpy(train)[hold_out(50, 0)[0]])


def test_cifar10_denoising(cifar10):
    root, _, test = cifar10
    task = load("cifar10_denoising", root=root, sigma=0.2)
    assert (task.kind, task.in_channels, task.image_size) == ("denoising", 3, 32)
    noisy, clean = task.test[4]
    torch.testing.assert_close(clean, torch.from_numpy(test[4] / 255).float())
    assert (noisy - clean).std() == pytest.approx(0.2, rel=0.05)
    assert load("cifar10_denoising", root=root, image_size=16).test[0][0].shape == (3, 16, 16)


def test_cifar100_has_its_fine_labels(tmp_path, torchvision, monkeypatch):
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    coarse = [number % 20 for number in range(100)]
    cifar_batch(folder / "train", 1, 100, fine_labels=[*range(100)], coarse_labels=coarse)
    cifar_batch(folder / "test", 2, 3, fine_labels=[99, 7, 50], coarse_labels=[0, 0, 0])
    names = {"fine_label_names": [f"fine_{n}" for n in range(100)], "coarse_label_names": ["any"]}
    (folder / "meta").write_bytes(pickle.dumps(names, protocol=2))
    kind = torchvision.datasets.CIFAR100
    monkeypatch.setattr(kind, "train_list", [["train", md5(folder / "train")]])
    monkeypatch.setattr(kind, "test_list", [["test", md5(folder / "test")]])
    monkeypatch.setattr(kind, "meta", {**kind.meta, "md5": md5(folder / "meta")})
    task = load("cifar100", root=tmp_path)
    assert (task.num_classes, len(task.train), len(task.validation)) == (100, 90, 10)
    assert labels_of(task.test) == [99, 7, 50]
    assert labels_of(task.train) == hold_out(100, 0)[0].tolist()
