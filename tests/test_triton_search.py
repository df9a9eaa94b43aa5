"""The search by a bound finds what the search of every row by insertion finds."""

import pytest
import torch
from triton_cases import DEVICE, TRITON

from convnn_geo.search.problem import Problem

pytestmark = TRITON


@pytest.fixture
def both(monkeypatch):
    """A search, once with the bound and once without; and the share of rows that it missed."""
    from convnn_geo.gpu import plans, search

    def run(call):
        results, shares = [], []

        class Watched:
            def __getitem__(self, grid):
                def launch(*args, **kwargs):
                    kernel[grid](*args, **kwargs)
                    missed = [t for t in args if getattr(t, "dtype", None) == torch.uint8][-1]
                    shares.append(missed.float().mean().item())

                return launch

        kernel = search._nearest_survivors
        for shortest in (1, 10**9):
            with monkeypatch.context() as patch:
                patch.setattr(plans, "SHORTEST", shortest)
                patch.setattr(search, "_nearest_survivors", Watched())
                search.similar.cache_clear()
                results.append(call())
        search.similar.cache_clear()
        (values, places), (wanted, order) = results
        assert torch.equal(places, order)
        (share,) = shares
        return values, wanted, share

    return run


def search(*args, **kwargs):
    from convnn_geo.gpu.search import nearest

    return nearest(*(t.to(DEVICE) if isinstance(t, torch.Tensor) else t for t in args), **kwargs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "n, m, d, k, biased, lessened",
    [
        (70, 300, 16, 9, True, False),
        (5, 256, 80, 32, False, False),
        (5, 200, 20, 1, False, False),
        (70, 210, 16, 9, True, True),
    ],
)
def test_products(both, dtype, n, m, d, k, biased, lessened):
    torch.manual_seed(0)
    q, keys = torch.randn(1, 2, n, d).to(dtype), torch.randn(1, 2, m, d).to(dtype)
    bias = torch.randn(1, 2, m) if biased else None
    less = torch.randn(1, 1, n, m).expand(1, 2, n, m).to(DEVICE) if lessened else None
    values, wanted, missed = both(lambda: search(q, keys, k, None, n, bias, 2.0, less=less))
    if lessened:
        scores = bias.unsqueeze(-2) - 2 * q.float() @ keys.float().mT - less.cpu()
        best = scores.sort(dim=-1).values[..., :k].reshape(-1, k).to(DEVICE)
        torch.testing.assert_close(values, best, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(values, wanted)
    assert missed < 0.1


def launch(kind, q, keys, k, own=None, bias=None, scale=1.0):
    from convnn_geo.search.launches import launch

    problem = Problem(kind, q, keys, bias, scale, torch.float32, None, True)
    return launch(problem, k, own)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("d", [3, 20])
@pytest.mark.parametrize("kind", ["points", "angles", "products"])
@pytest.mark.parametrize("own", [False, True])
def test_points(both, d, kind, own, double):
    torch.manual_seed(0)
    x = torch.randn(1, 220, d, dtype=torch.float64 if double else torch.float32)
    if kind == "angles":
        x = x / x.norm(dim=-1, keepdim=True)
    x[:, 200:] = x[:, :20]
    q = x[:, 190:]
    places = torch.arange(190, 220).to(DEVICE) if own else None
    x, q = x.to(DEVICE), q.to(DEVICE)
    bias, scale = (x[..., 0].abs(), 0.3) if kind == "products" and own else (None, 0.3)
    values, wanted, missed = both(lambda: launch(kind, q, x, 9, places, bias, scale))
    torch.testing.assert_close(values, wanted, rtol=1e-5, atol=1e-5)
    assert missed < 0.1


def test_products_are_of_tf32_and_neighbours_of_float32(both):
    torch.manual_seed(0)
    x = (100 + torch.randn(1, 1, 16) + 1e-3 * torch.randn(1, 200, 16)).to(DEVICE)
    _, _, missed = both(lambda: launch("points", x[:, :20], x, 5))
    assert missed < 1


@pytest.mark.filterwarnings("ignore:invalid value encountered")  # numpy, of what is not a number
def test_what_lists_cannot_hold(both):
    torch.manual_seed(0)
    q, keys = torch.randn(1, 1, 12, 16), torch.randn(1, 1, 200, 16)
    keys[..., 3, :], keys[..., 7:10, :], q[..., 2, 0] = torch.nan, torch.inf, torch.nan
    keys[..., 20:180, :] = keys[..., 20:21, :]
    mask = torch.rand(1, 1, 12, 200) < 0.5
    mask[..., 0, :], mask[..., 1, 4:] = False, False
    for allowed in (None, mask.to(DEVICE)):
        values, wanted, missed = both(lambda m=allowed: search(q, keys, 9, None, 12, mask=m))
        torch.testing.assert_close(values, wanted, equal_nan=True)
        assert 0 < missed < 1


def test_causal(both):
    torch.manual_seed(0)
    q = torch.randn(1, 2, 200, 16)
    mask = torch.ones(200, 200, dtype=torch.bool).tril().expand(1, 2, 200, 200).to(DEVICE)
    _, _, missed = both(lambda: search(q[..., 150:, :], q, 9, None, 50, mask=mask[..., 150:, :]))
    assert missed == 0


def test_ragged(both):
    torch.manual_seed(0)
    sizes, counts = [5, 0, 40, 30], [30, 10, 12, 500]
    q, keys = torch.randn(sum(sizes), 12), torch.randn(sum(counts), 12)
    starts = tuple(torch.tensor([0, *s]).cumsum(0).to(DEVICE) for s in (sizes, counts))
    bias = torch.randn(sum(counts))
    _, _, missed = both(lambda: search(q, keys, 5, starts, 40, bias, 2.0))
    assert missed < 0.1


def test_regular_orders_fill_all_groups(both):
    """An image as wide as there are groups: above one another lie all of a neighbourhood."""
    y, x = torch.meshgrid(torch.arange(5.0), torch.arange(128.0), indexing="ij")
    points = torch.stack([x, y], -1).reshape(1, 1, -1, 2)
    _, _, missed = both(lambda: search(points[..., 300:330, :], points, 9, None, 30, direct=True))
    assert missed == 0


def test_nobody_looks():
    keys = torch.randn(2, 3, 10, 16)
    values, places = search(keys[..., :0, :], keys, 4, None, 0)
    assert values.shape == places.shape == (0, 4)
    starts = tuple(torch.tensor(s).to(DEVICE) for s in ([0, 0, 0], [0, 10, 20]))
    values, places = search(keys[0, 0, :0], keys[0].flatten(0, 1)[:20], 4, starts, 0)
    assert values.shape == places.shape == (0, 4)


def test_blocks_beyond_a_cloud_find_nothing(both):
    torch.manual_seed(0)
    sizes, counts = [70, 1, 3], [300, 20, 12]
    q, keys = torch.randn(sum(sizes), 3), torch.randn(sum(counts), 3)
    starts = tuple(torch.tensor([0, *s]).cumsum(0).to(DEVICE) for s in (sizes, counts))
    _, _, missed = both(lambda: search(q, keys, 5, starts, 70, direct=True))
    assert missed < 0.1
