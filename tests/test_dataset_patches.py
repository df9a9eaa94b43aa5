"""Patches of photographs, no pixel in two parts, and noise on them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from convnn_geo.datasets import load, patches, photographs


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
