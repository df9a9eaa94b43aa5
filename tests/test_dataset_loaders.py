"""Tasks by name: their parts are disjoint, prepared as they say, and the same for the same seed.

What is downloaded is read here from small files in the real form, written by the tests.
"""

import functools
import gzip
import hashlib
import http.server
import io
import json
import pickle
import shutil
import struct
import tarfile
import threading
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, Dataset, Subset
from torch_geometric.datasets import ModelNet, ShapeNet

from convnn_geo.datasets import Task, data_names, digits, load, patches, photographs
from convnn_geo.datasets.images import ImageDataset, channel_statistics
from convnn_geo.datasets.repeatable import Repeatable
from convnn_geo.datasets.splits import hold_out

FEW = {"patches": {"count": 50}, "denoising": {"count": 50}}
DOWNLOADED = ["mnist", "cifar10", "cifar100", "modelnet10", "modelnet40", "shapenet"]


@pytest.fixture
def torchvision():
    return pytest.importorskip("torchvision")


def images_of(dataset):
    return torch.stack([dataset[number][0] for number in range(len(dataset))])


def labels_of(dataset):
    return [dataset[number][1] for number in range(len(dataset))]


def same(first, second):
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if hasattr(first, "pos"):
        return torch.equal(first.pos, second.pos)
    if isinstance(first, tuple):
        return all(same(a, b) for a, b in zip(first, second, strict=True))
    return first == second


# Tasks


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


# What tasks are made of


@given(count=st.integers(2, 300), seed=st.integers(0, 9))
def test_hold_out_is_a_split(count, seed):
    train, validation = hold_out(count, seed)
    assert torch.cat([train, validation]).sort().values.tolist() == list(range(count))
    assert len(validation) == max(1, count // 10)


def test_hold_out_depends_on_the_seed():
    assert not torch.equal(hold_out(100, 0)[1], hold_out(100, 1)[1])


def test_channel_statistics_of_bytes_and_floats():
    images = torch.randint(256, (2500, 3, 4, 5), dtype=torch.uint8)
    images[:, 2] = 51
    for given_images in (images, images.double() / 255):
        mean, std = channel_statistics(given_images)
        rows = images.double().transpose(0, 1).flatten(1) / 255
        torch.testing.assert_close(mean.double(), rows.mean(1), rtol=1e-5, atol=0)
        torch.testing.assert_close(std[:2].double(), rows[:2].std(1, correction=0))
        assert std[2] == 1  # a constant channel can't be scaled


def test_batches_of_images_are_single_images():
    images = torch.randint(256, (6, 3, 9, 7), dtype=torch.uint8)
    mean, std = channel_statistics(images)
    dataset = ImageDataset(images, torch.arange(6), 5, mean, std, transform=lambda x: x.flip(-1))
    for (x, y), number in zip(dataset.__getitems__([4, 1]), (4, 1), strict=True):
        assert y == number
        torch.testing.assert_close(x, dataset[number][0])
    alone = ImageDataset(images, None)
    assert torch.equal(alone[2], images[2].float() / 255)
    assert len(alone) == 6 and len(alone.__getitems__([0, 1])) == 2


def test_image_dataset_refuses_labels_of_another_number():
    with pytest.raises(ValueError, match=r"target: expected shape \(6,\)"):
        ImageDataset(torch.zeros(6, 1, 2, 2), torch.zeros(5))


class Draws(Dataset):
    """Its examples are random numbers."""

    def __len__(self):
        return 8

    def __getitem__(self, number):
        return torch.rand(3)


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 2**40),
    order=st.permutations(range(8)),
    before=st.integers(0, 99),
)
def test_repeatable_depends_on_seed_epoch_and_number_alone(seed, epoch, order, before):
    dataset, again = Repeatable(Draws(), seed), Repeatable(Draws(), seed)
    dataset.set_epoch(epoch)
    again.set_epoch(epoch)
    expected = {number: dataset[number] for number in range(8)}
    torch.manual_seed(before)
    state = torch.get_rng_state()
    found = {number: again[number] for number in order}
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(found[number], expected[number]) for number in range(8))
    again.set_epoch(epoch + 1)
    values = [*expected.values(), *(again[number] for number in range(8))]
    values.append(Repeatable(Draws(), seed + 1)[0])
    assert len({tuple(value.tolist()) for value in values}) == 17


def test_workers_that_live_on_see_the_epoch():
    dataset = Repeatable(Draws(), 0)
    loader = DataLoader(dataset, batch_size=4, num_workers=1, persistent_workers=True)
    for epoch in (0, 1):
        dataset.set_epoch(epoch)
        found = torch.cat(list(loader))
        assert torch.equal(found, torch.stack([dataset[number] for number in range(8)]))


def test_set_epoch_of_a_task_draws_training_examples_anew():
    task = load("denoising", count=10)
    before = {part: getattr(task, part)[0] for part in ("train", "validation", "test")}
    task.set_epoch(1)
    assert not torch.equal(task.train[0][0], before["train"][0])
    assert torch.equal(task.train[0][1], before["train"][1])
    assert same(task.validation[0], before["validation"])
    assert same(task.test[0], before["test"])
    task.set_epoch(0)
    assert same(task.train[0], before["train"])
    plain = load("digits")
    plain.set_epoch(3)
    assert same(plain.train[0], load("digits").train[0])


# Patches and noise


def map_of(name):
    """A photograph that says of every pixel which photograph, row and column it is."""
    rows, columns = torch.meshgrid(torch.arange(150.0), torch.arange(210.0), indexing="ij")
    label = torch.full_like(rows, photographs().index(name))
    return torch.stack([label, rows, columns]) / 255


@settings(max_examples=6, deadline=None)
@given(size=st.integers(3, 24), seed=st.integers(0, 99))
def test_patches_of_different_parts_share_no_pixel(size, seed):
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(patches, "photograph", map_of)
        parts = patches.photograph_patches(size, 20, seed)
    pixels = []
    for (x, y), count in zip(parts, (12, 4, 4), strict=True):
        assert x.shape == (len(photographs()) * count, 3, size, size)
        assert y.bincount().tolist() == [count] * len(photographs())
        label, row, column = (x * 255).round().long().unbind(1)
        assert (label == y[:, None, None]).all()
        steps = torch.arange(size)
        assert (row == row[:, :1, :1] + steps[:, None]).all()
        assert (column == column[:, :1, :1] + steps).all()
        corners = {tuple(c) for c in torch.stack([y, row[:, 0, 0], column[:, 0, 0]], 1).tolist()}
        assert len(corners) == len(x)
        pixels.append(torch.unique((label * 150 + row) * 210 + column))
    train, validation, test = pixels
    assert not torch.isin(train, torch.cat([validation, test])).any()
    assert not torch.isin(validation, test).any()


def test_patches_are_of_the_photographs():
    """Mean colours alone tell a photograph far better than one in eleven."""
    task = load("patches", count=50)
    assert task.num_classes == task.train.target.max() + 1 == len(photographs())
    centres = torch.stack(
        [task.train.images[task.train.target == c].mean((0, 2, 3)) for c in range(11)]
    )
    guess = torch.cdist(task.test.images.mean((2, 3)), centres).argmin(1)
    assert (guess == task.test.target).float().mean() > 0.25


@pytest.mark.parametrize("sigma", [0.0, 0.1, 0.5])
def test_denoising_adds_gaussian_noise(sigma):
    task = load("denoising", sigma=sigma, count=40, size=16)
    clean = patches.photograph_patches(16, 40)
    noises = []
    for part, (images, _) in zip((task.train, task.validation, task.test), clean, strict=True):
        pairs = [part[number] for number in range(len(part))]
        assert torch.equal(torch.stack([pair[1] for pair in pairs]), images)
        noise = torch.stack([pair[0] for pair in pairs]) - images
        assert noise.std() == pytest.approx(sigma, rel=0.02)
        assert noise.mean().abs() <= 0.02 * sigma
        noises.append(noise[0])
    if sigma:  # up to rounding, the same draws would give the same noise
        for one, other in zip(noises, noises[1:] + noises[:1], strict=True):
            assert (one - other).abs().mean() > 0.5 * sigma
    assert (task.kind, task.num_classes, task.image_size) == ("denoising", None, 16)


# Files of downloaded sets, small but in their real form


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


@pytest.fixture
def server(tmp_path):
    """Address of a server of this machine, and the folder that it serves."""
    folder = tmp_path / "server"
    folder.mkdir()
    handler = functools.partial(QuietHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        thread = threading.Thread(target=running.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{running.server_address[1]}/", folder
        running.shutdown()
        thread.join()


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


def md5(path):
    return hashlib.md5(path.read_bytes()).hexdigest()


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
