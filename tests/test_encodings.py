"""Positional encodings against formulas written out point by point."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from convnn_geo.encodings import (
    Conditional,
    Coordinates,
    Encoding,
    Fourier,
    LearnedAbsolute,
    Rotary,
    as_encoding,
    encoding_names,
)
from convnn_geo.points import Points


def image(*size, channels=4, batch=2, dtype=torch.float64):
    return Points.from_image(torch.randn(batch, channels, *size, dtype=dtype))


def cloud(n=6, channels=4, mask=None):
    return Points(
        torch.randn(2, n, channels, dtype=torch.float64),
        10 * torch.rand(2, n, 3, dtype=torch.float64),
        mask,
    )


def unit(positions, mask=None):
    """Positions scaled to [-1, 1] along each axis, as lists; 0 where an axis has one place."""
    real = [p for i, p in enumerate(positions) if mask is None or mask[i]]
    out = []
    for p in positions:
        row = []
        for axis, value in enumerate(p):
            low, high = min(q[axis] for q in real), max(q[axis] for q in real)
            row.append(2 * (value - low) / (high - low) - 1 if high > low else 0.0)
        out.append(row)
    return out


def positions(points, b):
    return (points.position if points.position.ndim == 2 else points.position[b]).tolist()


def coordinates(u):
    return u[::-1]


def fourier(u):
    angles = [math.pi * 2**f * v / 2 for v in u for f in range(3)]
    return [math.sin(a) for a in angles] + [math.cos(a) for a in angles]


APPENDED = {"coordinates": (Coordinates(), coordinates), "fourier": (Fourier(3), fourier)}
POINTS = {
    "image": lambda: image(3, 5),
    "narrow image": lambda: image(1, 4),
    "volume": lambda: image(2, 3, 2),
    "tokens": lambda: Points.from_tokens(torch.randn(2, 7, 4, dtype=torch.float64)),
    "cloud": cloud,
}


@pytest.mark.parametrize("kind", POINTS)
@pytest.mark.parametrize("name", APPENDED)
def test_channels_are_appended(name, kind):
    encoding, formula = APPENDED[name]
    points = POINTS[kind]()
    encoded = encoding(points)
    for b in range(2):
        expected = [formula(u) for u in unit(positions(points, b))]
        found = encoded.x[b, :, 4:]
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))
        assert found.shape[-1] == encoding.extra_channels(points.position.shape[-1])
    assert torch.equal(encoded.x[..., :4], points.x)
    assert encoded.grid == points.grid and encoded.pos is points.pos


@pytest.mark.parametrize("name", APPENDED)
def test_padding_of_a_ragged_batch_changes_nothing(name):
    encoding, formula = APPENDED[name]
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    points = cloud(mask=mask)
    points.pos[1, 4:] = 99.0
    encoded = encoding(points)
    expected = [formula(u) for u in unit(positions(points, 1), mask[1].tolist())]
    expected = torch.tensor(expected, dtype=torch.float64)
    torch.testing.assert_close(encoded.x[1, :4, 4:], expected[:4])
    assert encoded.x.isfinite().all()


def test_coordinates_are_x_then_y_for_images():
    encoded = Coordinates()(image(2, 3)).to_image()
    assert encoded[0, 4].tolist() == [[-1, 0, 1], [-1, 0, 1]]
    assert encoded[0, 5].tolist() == [[-1, -1, -1], [1, 1, 1]]


def test_coordinates_of_images_and_of_their_points_agree():
    points = image(3, 5)
    spelled = Points(points.x, points.position)
    for encoding, _ in APPENDED.values():
        torch.testing.assert_close(encoding(points).x, encoding(spelled).x)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", APPENDED)
def test_waves_of_half_precision_features_are_computed_in_float32(name, dtype):
    encoding = APPENDED[name][0] if name == "coordinates" else Fourier(6)
    points = image(30, 50, dtype=torch.float32)
    half = points.with_x(points.x.to(dtype))
    assert torch.equal(encoding(half).x, encoding(points).x.to(dtype))
    placed = Points(points.x.to(dtype), points.position.to(dtype))  # whole pixels are exact
    torch.testing.assert_close(encoding(placed).x, encoding(half).x, atol=1e-3, rtol=0)


# -- learned ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(7,), (3, 5), (2, 3, 4)])
def test_learned_vectors_are_added_place_by_place(size):
    encoding = LearnedAbsolute(4, size).double()
    points = image(*size)
    encoded = encoding(points)
    for i, place in enumerate(torch.cartesian_prod(*map(torch.arange, size)).view(-1, len(size))):
        vector = encoding.table[(slice(None), *place.tolist())]
        torch.testing.assert_close(encoded.x[:, i], points.x[:, i] + vector)


def test_learned_vectors_are_resampled_to_other_sizes():
    encoding = LearnedAbsolute(4, (3, 5)).double()
    points = image(6, 7)
    table = nn.functional.interpolate(encoding.table[None], (6, 7), mode="bilinear")
    torch.testing.assert_close(encoding(points).to_image(), points.to_image() + table)


def test_learned_vectors_learn():
    encoding = LearnedAbsolute(4, 6).double()
    points = Points.from_tokens(torch.randn(2, 6, 4, dtype=torch.float64))
    (grad,) = torch.autograd.grad(encoding(points).x.sum(), encoding.table)
    assert torch.equal(grad, torch.full((4, 6), 2.0).double())


@pytest.mark.parametrize("size", [(7,), (4, 6), (2, 3, 4)])
def test_conditional_adds_a_depthwise_convolution(size):
    encoding = Conditional(4, axes=len(size)).double()
    points = image(*size)
    encoded = encoding(points).to_image()
    torch.testing.assert_close(encoded, points.to_image() + encoding.conv(points.to_image()))
    for channel in range(4):
        other = points.to_image().clone()
        other[:, channel] += 1
        changed = encoding(Points.from_image(other)).to_image() != encoded
        assert changed[:, channel].any()
        assert not changed[:, [c for c in range(4) if c != channel]].any()


# -- rotary -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "channels"), [("image", 8), ("tokens", 4), ("volume", 12)])
def test_rotary_turns_pairs_of_channels(kind, channels):
    points = POINTS[kind]()
    points = points.with_x(torch.randn(2, points.num_points, channels, dtype=torch.float64))
    encoded = Rotary(base=50.0)(points).x
    axes = points.position.shape[-1]
    pairs = channels // (2 * axes)
    for i, p in enumerate(points.position.tolist()):
        channel = 0
        for axis in range(axes):
            for f in range(pairs):
                angle = p[axis] * 50.0 ** -(f / pairs)
                x = points.x[0, i, channel : channel + 2].tolist()
                turned = complex(*x) * complex(math.cos(angle), math.sin(angle))
                found = encoded[0, i, channel : channel + 2].tolist()
                assert found == pytest.approx([turned.real, turned.imag])
                channel += 2


def test_rotary_angles_are_not_rounded_with_the_features():
    x = torch.randn(1, 300, 4)
    for dtype, tolerance in ((torch.bfloat16, 0.03), (torch.float16, 0.005)):
        rough = Rotary()(Points.from_tokens(x.to(dtype))).x.float()
        fine = Rotary()(Points.from_tokens(x.to(dtype).double())).x.float()
        torch.testing.assert_close(rough, fine, atol=tolerance, rtol=0)
    pos = torch.arange(256.0)[:, None]
    half = Points(x[0, :256].bfloat16(), pos.bfloat16())  # whole numbers to 256 are exact
    assert torch.equal(Rotary()(half).x, Rotary()(Points(half.x, pos)).x)


# -- all ----------------------------------------------------------------------------------------


def make(name):
    torch.manual_seed(0)
    return as_encoding(name, 4, 2, (3, 5))


@pytest.mark.parametrize("name", encoding_names())
def test_names_resolve(name):
    encoding = make(name)
    assert isinstance(encoding, Encoding)
    assert as_encoding(encoding, 4, 2) is encoding
    assert encoding.on in ("value", "features", "metric")


def test_which_part_sees_an_encoding():
    where = {name: make(name).on for name in encoding_names()}
    assert where == {
        "conditional": "features",
        "coordinates": "value",
        "fourier": "features",
        "learned": "features",
        "rotary": "metric",
    }


@pytest.mark.parametrize("name", encoding_names())
def test_encodings_have_the_right_gradient(name):
    encoding, points = make(name).double(), image(3, 5, batch=1)
    x = points.x.detach().requires_grad_()
    leaves = [x, *encoding.parameters()]
    assert torch.autograd.gradcheck(lambda x, *_: encoding(points.with_x(x)).x, leaves)


@pytest.mark.parametrize("name", encoding_names())
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_features_keep_their_dtype(name, dtype):
    points = image(3, 5, dtype=dtype)
    encoding = make(name).to(dtype)
    assert encoding(points).x.dtype == dtype
    if dtype in (torch.bfloat16, torch.float32):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert make(name)(points).x.dtype == dtype


@pytest.mark.parametrize("name", encoding_names())
def test_copies_and_states(name):
    encoding, points = make(name).double(), image(3, 5)
    expected = encoding(points).x
    assert torch.equal(copy.deepcopy(encoding)(points).x, expected)
    torch.manual_seed(9)
    again = as_encoding(name, 4, 2, (3, 5)).double()
    again.load_state_dict(encoding.state_dict())
    assert torch.equal(again(points).x, expected)


@pytest.mark.parametrize("name", ["learned", "conditional"])
def test_parameters_are_reset(name):
    encoding = make(name)
    before = [p.clone() for p in encoding.parameters()]
    encoding.reset_parameters()
    for p, old in zip(encoding.parameters(), before, strict=True):
        assert not torch.equal(p, old)


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: Fourier(0), "at least 1"),
        (lambda: LearnedAbsolute(0, 3), "at least 1"),
        (lambda: LearnedAbsolute(2, (3, 0)), "at least 1"),
        (lambda: LearnedAbsolute(2, (3, 3, 3, 3)), "1, 2 or 3 axes"),
        (lambda: LearnedAbsolute(4, 15)(image(3, 5)), "as many axes"),
        (lambda: LearnedAbsolute(4, 6)(cloud()), "grid"),
        (lambda: Conditional(4, kernel_size=2), "odd"),
        (lambda: Conditional(4, axes=4), "1, 2 or 3"),
        (lambda: Conditional(4)(cloud()), "grid"),
        (lambda: LearnedAbsolute(3, (3, 5))(image(3, 5)), "expected features of 3 channels, got 4"),
        (lambda: Conditional(3)(image(3, 5)), "expected features of 3 channels, got 4"),
        (lambda: Rotary(1.0), "greater than 1"),
        (lambda: Rotary()(image(3, 5, channels=6)), "multiple of 4"),
        (lambda: as_encoding("sine", 4, 2), "coordinates, fourier"),
        (lambda: as_encoding("learned", 4, 2), "size"),
        (lambda: Coordinates()(Points(torch.zeros(3, 1))), "neither pos nor grid"),
    ],
)
def test_bad_encodings_are_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()


def test_a_convolution_of_another_dtype_says_so():
    with pytest.raises(TypeError, match=r"input is torch.float64, the layer torch.float32"):
        Conditional(4)(image(3, 5))


def test_no_encoding():
    assert as_encoding(None, 4, 2) is None
