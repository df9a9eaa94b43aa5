"""Transforms: images become points, points become graphs, as PyTorch Geometric has it."""

import numpy as np
import pytest
import torch
from torch_geometric.data import Data
from torch_geometric.transforms import ToSLIC

from convnn_geo.points import Points
from convnn_geo.transforms import SLIC, ImageToPoints

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
    assert repr(SLIC(9, sigma=2)) == "SLIC(n_segments=9, compactness=10.0, sigma=2)"
