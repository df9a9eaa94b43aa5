"""Branching: ConvNN beside a convolution or attention, then a 1 x 1 mix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from convnn_geo.nn import Branching, ConvNN1d, ConvNN2d, ConvNN3d, ConvNNAttention
from convnn_geo.nn.branching import neighbor_channels


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def equal(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


OPTIONS = {"k": 3, "metric": "cosine"}


@pytest.mark.parametrize("ratio, share", [(0.07, 1), (0.25, 2), (0.5, 4), (0.7, 6), (0.93, 7)])
def test_shares_of_channels_are_rounded(ratio, share):
    layer = Branching(3, 8, ratio=ratio, **OPTIONS)
    assert layer.neighbors.out_channels == share and layer.other.out_channels == 8 - share


@pytest.mark.parametrize(
    "channels, ratio, match",
    [
        (8, 0.01, r"of out_channels=8, which is 0 .*pass 0, 1 or a multiple of 1/8 = 0.125"),
        (8, 0.0625, "which is 0 when rounded"),
        (8, 0.99, "got 0.99 of out_channels=8, which is 8 when rounded"),
        (1, 0.5, "of out_channels=1, which is 0 .*pass 0 or 1, as one channel can't be divided"),
        (1, 0.75, "of out_channels=1, which is 1 "),
    ],
)
def test_a_ratio_that_leaves_a_branch_without_channels_is_refused(channels, ratio, match):
    with pytest.raises(ValueError, match=f"ratio: expected a share that leaves both .*{match}"):
        Branching(3, channels, ratio=ratio, **OPTIONS)


@pytest.mark.parametrize("channels", [2, 3, 7, 49, 1000])
def test_a_ratio_that_the_refusal_names_is_taken(channels):
    for part in {1, channels // 2, channels - 1}:
        assert neighbor_channels(channels, part / channels) == part
    assert neighbor_channels(channels, 0) == 0 and neighbor_channels(channels, 1) == channels


def test_both_branches_see_all_channels_and_are_mixed():
    layer = Branching(3, 8, 5, ratio=0.25, **OPTIONS).double()
    x = random(2, 3, 6, 7)
    conv = nn.Conv2d(3, 6, 5, padding=2).double()
    conv.load_state_dict(layer.other.state_dict())
    near = ConvNN2d(3, 2, **OPTIONS).double()
    near.load_state_dict(layer.neighbors.state_dict())
    expected = nn.functional.conv2d(
        torch.cat([near(x), conv(x)], 1), layer.pointwise.weight, layer.pointwise.bias
    )
    equal(layer(x), expected)


@pytest.mark.parametrize("ratio", [0, 0.0])
def test_ratio_zero_is_the_convolution(ratio):
    torch.manual_seed(0)
    layer = Branching(3, 8, 3, ratio=ratio, **OPTIONS)
    torch.manual_seed(0)
    conv = nn.Conv2d(3, 8, 3, padding=1)
    assert layer.neighbors is None and layer.pointwise is None
    x = torch.randn(1, 3, 5, 6)
    assert torch.equal(layer(x), conv(x))


@pytest.mark.parametrize("ratio", [1, 1.0])
def test_ratio_one_is_convnn(ratio):
    torch.manual_seed(0)
    layer = Branching(3, 8, 3, ratio=ratio, **OPTIONS)
    torch.manual_seed(0)
    near = ConvNN2d(3, 8, **OPTIONS)
    assert layer.other is None and layer.pointwise is None
    x = torch.randn(1, 3, 5, 6)
    assert torch.equal(layer(x), near(x))


@pytest.mark.parametrize("axes, cls", [(1, ConvNN1d), (2, ConvNN2d), (3, ConvNN3d)])
def test_every_dimension(axes, cls):
    layer = Branching(3, 8, 3, axes=axes, **OPTIONS)
    assert isinstance(layer.neighbors, cls) and isinstance(layer.other, cls)
    x = torch.randn(2, 3, *(4, 5, 3)[:axes])
    assert layer(x).shape == (2, 8, *x.shape[2:])
    assert layer(x[0]).shape == (8, *x.shape[2:])


def test_attention_beside_attention_on_tokens():
    near, other = ConvNNAttention(8, 2, k=3), ConvNNAttention(8, 2)
    layer = Branching.of(near, other, nn.Linear(16, 8), channel_axis=-1).double()
    x = random(2, 6, 8)
    expected = layer.pointwise(torch.cat([near(x)[0], other(x)[0]], -1))
    equal(layer(x), expected)


def test_another_module_in_place_of_the_convolution():
    other = nn.Conv2d(3, 4, 1)
    layer = Branching(3, 8, ratio=0.5, other=other, **OPTIONS)
    assert layer.other is other
    assert layer(torch.randn(1, 3, 4, 5)).shape == (1, 8, 4, 5)


def test_options_reach_the_parts():
    layer = Branching(
        4, 8, bias=False, dtype=torch.float64, k=3, metric="cosine", backend="message_passing"
    )
    assert layer.neighbors.backend == "message_passing"
    assert all(p.dtype == torch.float64 for p in layer.parameters())
    assert not any(name.endswith("bias") for name, _ in layer.named_parameters())


def test_reset_parameters_resets_every_part():
    layer = Branching(3, 8, **OPTIONS)
    with torch.no_grad():
        for p in layer.parameters():
            p.fill_(3)
    layer.reset_parameters()
    assert all(bool((p != 3).all()) for p in layer.parameters())


def test_no_branch_is_an_error():
    with pytest.raises(ValueError, match="at least one branch"):
        Branching.of(None, None, None)


@pytest.mark.parametrize(
    "options, match",
    [
        ({"ratio": 1.5}, r"ratio: expected a number in \[0, 1\], got 1.5"),
        ({"ratio": -0.1}, r"ratio: expected a number in \[0, 1\], got -0.1"),
        ({"axes": 4}, "axes: expected 1, 2 or 3, got 4"),
        ({"num_heads": 2}, "num_heads=2 is an option of other='attention'"),
    ],
)
def test_bad_options(options, match):
    with pytest.raises(ValueError, match=match):
        Branching(3, 8, **OPTIONS, **options)


def test_attention_branch_attends_among_all_pixels() -> None:
    layer = Branching(4, 6, ratio=0.5, other="attention", num_heads=2, **OPTIONS).double()
    x = torch.randn(2, 4, 3, 5, dtype=torch.float64)
    tokens = x.flatten(2).transpose(1, 2)
    attended = layer.other.linear(layer.other.attention(tokens)[0]).transpose(1, 2)
    both = torch.cat([layer.neighbors(x), attended.unflatten(2, (3, 5))], 1)
    torch.testing.assert_close(layer(x), layer.pointwise(both))


@pytest.mark.parametrize(
    "options, error, match",
    [
        ({"metrc": "cosine"}, TypeError, "metrc"),
        ({"k": 0, "metric": "cosine"}, ValueError, "k: expected an integer of at least 1"),
        ({"k": 3, "metric": "cosinus"}, ValueError, "unknown metric 'cosinus'"),
        ({"k": 3}, ValueError, "k nearest by what"),
    ],
)
@pytest.mark.parametrize("ratio", [0.0, 1.0])
def test_wrong_options_are_refused_where_they_do_not_count(ratio, options, error, match):
    with pytest.raises(error, match=match):
        Branching(4, 6, ratio=ratio, **options)


def test_checking_options_draws_nothing():
    torch.manual_seed(0)
    Branching(3, 8, 3, ratio=0, encoding="conditional", groups=3, **OPTIONS)
    after = torch.rand(1)
    torch.manual_seed(0)
    nn.Conv2d(3, 8, 3)
    assert torch.equal(after, torch.rand(1))


@pytest.mark.parametrize(
    "other, match",
    [
        (nn.Conv2d(4, 5, 1), "expected a module from 4 to 4 channels, got one that gives 5"),
        (nn.Conv2d(3, 4, 1), "expected a module from 4 to 4 channels, got one that takes 3"),
        (nn.Linear(4, 3), "got one that gives 3"),
    ],
)
def test_another_module_has_the_channels_that_are_left(other, match):
    with pytest.raises(ValueError, match=match):
        Branching(4, 8, other=other, **OPTIONS)


def test_branches_that_do_not_fit_together_say_so():
    layer = Branching(4, 8, other=nn.Sequential(nn.Conv2d(4, 5, 1)), **OPTIONS)
    with pytest.raises(ValueError, match=r"give 4 and 5 channels, the pointwise layer takes 8"):
        layer(torch.zeros(1, 4, 5, 6))
    layer = Branching(4, 8, other=nn.Conv2d(4, 4, 1, stride=2), **OPTIONS)
    with pytest.raises(ValueError, match=r"give \(1, 4, 5, 6\) and \(1, 4, 3, 3\), which differ"):
        layer(torch.zeros(1, 4, 5, 6))
    with pytest.raises(ValueError, match="both branches keep the image's size; pass no stride"):
        Branching(4, 8, stride=2, **OPTIONS)


def test_unknown_other_branch_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"unknown other branch 'conv'.*convolution, attention"):
        Branching(4, 6, other="conv", **OPTIONS)
