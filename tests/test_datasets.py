"""Data that ships with packages: complete, disjoint, and the same for the same seed."""

from pathlib import Path

import pytest
import torch

from convnn_geo.datasets import (
    digit_clouds,
    digits,
    motorcycle_cloud,
    photograph,
    photographs,
    read_image,
    resize,
)
from convnn_geo.extras import MissingExtraError, require


def rows(x):
    return {tuple(image.flatten().tolist()) for image in x}


def test_digits_are_split_without_overlap():
    splits = digits()
    parts = [splits.train, splits.validation, splits.test]
    assert [len(part) for part in parts] == [1078, 359, 360]
    everything = torch.cat([part.x for part in parts])
    assert everything.shape == (1797, 1, 8, 8)
    assert len(rows(everything)) == sum(len(rows(part.x)) for part in parts)
    assert everything.min() == 0 and everything.max() == 1
    assert all(part.y.bincount().numel() == 10 for part in parts)


def test_digits_depend_on_the_seed_alone():
    torch.manual_seed(1)
    first = digits(3)
    torch.manual_seed(2)
    assert torch.equal(first.test.x, digits(3).test.x)
    assert not torch.equal(first.test.x, digits(4).test.x)


@pytest.mark.parametrize("seed", [-1, 0.5, "0", 2**64])
def test_digits_refuse_a_wrong_seed(seed):
    with pytest.raises((ValueError, TypeError), match="seed"):
        digits(seed)


def test_clouds_are_the_digits():
    images, clouds = digits(1).test, digit_clouds(1, height=2.0).test
    assert torch.equal(images.y, clouds.y)
    for number in (0, 17, 359):
        data = clouds[number]
        drawn = torch.zeros(8, 8)
        pixel = data.pos[:, :2].long()
        drawn[pixel[:, 0], pixel[:, 1]] = data.pos[:, 2] / 2
        assert torch.equal(drawn, images.x[number, 0])
        assert int(data.y) == int(images.y[number])


def test_clouds_batch_as_rows():
    clouds = digit_clouds().train
    (pos, batch), y = clouds.batch(torch.tensor([5, 2, 9]))
    assert batch.tolist() == sorted(batch.tolist())
    assert torch.equal(y, clouds.y[[5, 2, 9]])
    for place, number in enumerate((5, 2, 9)):
        assert torch.equal(pos[batch == place], clouds[number].pos)


@pytest.mark.parametrize("name", photographs())
def test_photographs_are_shipped(name):
    image = photograph(name, width=40)
    assert image.shape[0] == 3 and image.shape[2] == 40
    assert image.dtype == torch.float32
    assert image.min() >= 0 and image.max() <= 1 and image.std() > 0.02


def test_photograph_has_its_colours():
    red, green, blue = photograph("astronaut")[:, 322, 274]
    assert red > 0.8 and green < 0.6 and blue < 0.4


def test_unknown_photograph_lists_the_known():
    with pytest.raises(ValueError, match=r"'cat'.*chelsea"):
        photograph("cat")


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "CMYK", "I;16"])
def test_read_image_takes_every_mode(tmp_path, mode):
    from PIL import Image

    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    if mode == "I;16":
        Image.new(mode, (6, 4), 65535).save(path)
    else:
        Image.new("RGB", (6, 4), "white").convert(mode).save(path)
    assert torch.equal(read_image(path), torch.ones(3, 4, 6))


def test_read_image_refuses_what_is_no_picture(tmp_path):
    text = tmp_path / "notes.png"
    text.write_text("no picture")
    with pytest.raises(ValueError, match=r"expected a picture, but .*notes\.png"):
        read_image(text)
    with pytest.raises(FileNotFoundError, match=r"no file .*lost\.png"):
        read_image(tmp_path / "lost.png")
    with pytest.raises(FileNotFoundError, match="no file"):
        read_image(tmp_path)


def test_resize_keeps_proportions_and_range():
    image = (torch.rand(3, 30, 60) > 0.5).float()
    small = resize(image, 20)
    assert small.shape == (3, 10, 20)
    assert small.min() >= 0 and small.max() <= 1
    assert resize(image, 60) is image
    assert resize(torch.rand(1, 2, 100), 10).shape == (1, 1, 10)
    with pytest.raises(ValueError, match=r"a pixel at least, got shape \(3, 5, 0\)"):
        resize(torch.zeros(3, 5, 0), 10)


def test_motorcycle_is_seen_again_through_the_right_camera():
    """The cloud projects onto the right image where that has the same colours."""
    data = motorcycle_cloud()
    assert data.x.shape == data.pos.shape == (343274, 3)
    assert data.x.min() >= 0 and data.x.max() <= 1 and data.pos.isfinite().all()
    folder = Path(pytest.importorskip("skimage.data").__file__).parent
    right = read_image(folder / "motorcycle_right.png").permute(1, 2, 0)
    x, y, z = data.pos.unbind(-1)
    row = (y / z * 994.978 + 254.877).round().long()
    column = ((x - 0.193001) / z * 994.978 + 311.193 + 31.086).round().long()
    seen = (column >= 0) & (column < right.shape[1])
    assert seen.float().mean() > 0.95
    there = right[row[seen], column[seen]]
    assert (there - data.x[seen]).abs().mean() < 0.04
    assert (right[row[seen], (column[seen] + 5) % 741] - data.x[seen]).abs().mean() > 0.08


def test_motorcycle_with_a_stride_is_part_of_the_whole():
    whole, part = motorcycle_cloud(), motorcycle_cloud((8, 5))
    assert len(part.pos) == pytest.approx(len(whole.pos) / 40, rel=0.02)
    rows_of_whole = {tuple(point) for point in whole.pos[:, 1:].tolist()}
    assert {tuple(point) for point in part.pos[:, 1:].tolist()} <= rows_of_whole
    with pytest.raises(ValueError, match="stride"):
        motorcycle_cloud(0)


def test_missing_package_is_named():
    with pytest.raises(MissingExtraError, match=r"pip install 'convnn-geo\[data,viz\]'"):
        require("no_such_package.part", extra="data,viz")
    with pytest.raises(ModuleNotFoundError) as caught:
        require("json.no_such_part", extra="viz")
    assert not isinstance(caught.value, MissingExtraError)
