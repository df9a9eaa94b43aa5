"""MNIST, read from small files in the real form, written by the tests."""

import gzip
import struct

import numpy as np
import pytest
import torch
from dataset_cases import images_of, labels_of, md5

from convnn_geo.datasets import load
from convnn_geo.datasets.splits import hold_out


def mnist_arrays():
    generator = np.random.default_rng(0)
    x = generator.integers(0, 256, (60, 28, 28), np.uint8)
    return x[:40], np.arange(40, dtype=np.uint8) % 10, x[40:], np.arange(20, dtype=np.uint8) % 10


def check_mnist(task):
    x_train, y_train, x_test, y_test = mnist_arrays()
    assert (len(task.train), len(task.validation), len(task.test)) == (36, 4, 20)
    assert (task.num_classes, task.in_channels, task.image_size) == (10, 1, 28)
    train, validation = hold_out(40, 5)
    mean, std = (x_train[train] / 255).mean(), (x_train[train] / 255).std()
    for part, x, y in (
        (task.train, x_train[train], y_train[train]),
        (task.validation, x_train[validation], y_train[validation]),
        (task.test, x_test, y_test),
    ):
        expected = torch.from_numpy((x / 255 - mean) / std).float().unsqueeze(1)
        torch.testing.assert_close(images_of(part), expected, rtol=0, atol=1e-5)
        assert labels_of(part) == y.tolist()


def test_mnist_of_one_file(tmp_path):
    keys = ("x_train", "y_train", "x_test", "y_test")
    np.savez_compressed(tmp_path / "mnist.npz", **dict(zip(keys, mnist_arrays(), strict=True)))
    check_mnist(load("mnist", root=tmp_path, seed=5))
    task = load("mnist", root=str(tmp_path), image_size=32)
    assert task.image_size == 32 and task.test[0][0].shape == (1, 32, 32)


@pytest.mark.parametrize("damage", ["key", "shape", "text", "cut", "byte"])
def test_a_damaged_mnist_file_is_named(tmp_path, damage):
    file = tmp_path / "mnist.npz"
    x_train, y_train, x_test, y_test = mnist_arrays()
    arrays = {"x_train": x_train, "y_train": y_train, "x_test": x_test, "y_test": y_test}
    if damage == "key":
        del arrays["y_test"]
    if damage == "shape":
        arrays["y_test"] = y_test[:3]
    np.savez_compressed(file, **arrays)
    if damage == "byte":
        content = bytearray(file.read_bytes())
        content[900:904] = b"lost"
        file.write_bytes(content)
    if damage == "text":
        file.write_text("no archive")
    if damage == "cut":
        file.write_bytes(file.read_bytes()[:5000])
    with pytest.raises(ValueError, match=r"mnist\.npz"):
        load("mnist", root=tmp_path)


def write_idx(path, array):
    """LeCun's form: two zeros, the type (8: bytes), the dimensions, then the values."""
    head = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(head + array.tobytes())


def mnist_files(folder):
    folder.mkdir(parents=True)
    x_train, y_train, x_test, y_test = mnist_arrays()
    write_idx(folder / "train-images-idx3-ubyte", x_train)
    write_idx(folder / "train-labels-idx1-ubyte", y_train)
    write_idx(folder / "t10k-images-idx3-ubyte", x_test)
    write_idx(folder / "t10k-labels-idx1-ubyte", y_test)


def test_mnist_in_torchvisions_files(tmp_path, torchvision):
    mnist_files(tmp_path / "MNIST" / "raw")
    check_mnist(load("mnist", root=tmp_path, seed=5))


def test_mnist_is_downloaded_where_asked(tmp_path, torchvision, monkeypatch, server):
    """The sums are those of what the test's server holds."""
    address, folder = server
    mnist_files(tmp_path / "files")
    resources = []
    for path in sorted((tmp_path / "files").iterdir()):
        packed = folder / f"{path.name}.gz"
        packed.write_bytes(gzip.compress(path.read_bytes()))
        resources.append((packed.name, md5(packed)))
    kind = torchvision.datasets.MNIST
    monkeypatch.setattr(kind, "mirrors", [address])
    monkeypatch.setattr(kind, "resources", resources)
    check_mnist(load("mnist", root=tmp_path / "data", seed=5, download=True))
