"""Points about centers, and the values that a search by products gives because of them."""

import pytest
import torch
from triton_cases import DEVICE, TRITON

from convnn_geo.search import knn

pytestmark = TRITON


def centered(q, keys, alike=False, angles=False, starts=None, batch=(None, None)):
    from convnn_geo.gpu.centered import centered as kernels

    def there(t):
        return None if t is None else t.to(DEVICE)

    q, keys, starts = there(q), there(keys), there(starts)
    found = kernels(q, keys, alike, angles, starts, tuple(there(t) for t in batch))
    return found, q, keys


def check(found, q, keys, examples_of_q, examples_of_keys, angles):
    """One vector was taken from all points of an example; lengths and the longest are as said."""
    square = found.keys.square().sum(-1)
    torch.testing.assert_close(found.square, found.q.square().sum(-1))
    zero = (keys.square().sum(-1) < 0.25) & angles
    torch.testing.assert_close(found.bias, square + zero)
    for example, longest in enumerate(found.longest):
        moved = (
            keys[examples_of_keys == example] - found.keys[examples_of_keys == example],
            q[examples_of_q == example] - found.q[examples_of_q == example],
        )
        center = torch.cat(moved)
        if len(moved[0]):
            torch.testing.assert_close(center, center[:1].expand_as(center), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(longest, square[examples_of_keys == example].max().sqrt())
        else:
            assert longest == 0


@pytest.mark.parametrize("angles", [False, True])
@pytest.mark.parametrize("alike", [False, True])
@pytest.mark.parametrize("b, n, m, d", [(1, 1, 1, 9), (3, 70, 40, 20), (2, 5, 300, 130)])
def test_examples_of_one_size(b, n, m, d, alike, angles):
    torch.manual_seed(0)
    keys = 5 + torch.randn(b, m, d)
    keys[:, ::3] = keys[:, ::3] * (not angles)
    q = keys if alike else torch.randn(b, n, d)
    found, q, keys = centered(q, keys, alike, angles)
    assert (found.q is found.keys) == alike
    numbers = torch.arange(b, device=DEVICE)[:, None]
    check(found, q, keys, numbers.expand(q.shape[:2]), numbers.expand(b, m), angles)


@pytest.mark.parametrize("angles", [False, True])
def test_clouds(angles):
    torch.manual_seed(0)
    sizes, counts = torch.tensor([5, 0, 40, 3]), torch.tensor([130, 7, 0, 200])
    q, keys = torch.randn(int(sizes.sum()), 12), 100 + torch.randn(int(counts.sum()), 12)
    keys[3::7] = 0
    batch = tuple(torch.arange(4).repeat_interleave(t) for t in (sizes, counts))
    starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    found, q, keys = centered(q, keys, False, angles, starts, batch)
    check(found, q, keys, *(t.to(DEVICE) for t in batch), angles)


def test_offsets_are_taken_away():
    """Points in the order of two far clusters: the center is between these, not in one."""
    torch.manual_seed(0)
    keys = torch.randn(1, 1000, 16) + 1e4
    found, *_ = centered(keys, keys, True)
    assert found.longest < 20
    keys[:, 500:] -= 2e4
    found, *_ = centered(keys, keys, True)
    assert found.longest < 4e4 * 1.05


@pytest.mark.parametrize("value", [torch.nan, -torch.nan, torch.inf])
def test_what_is_no_number_is_the_longest(value):
    keys = torch.ones(2, 200, 16)
    keys[1, 78, 3] = value  # not among those whose mean is taken
    found, *_ = centered(keys, keys, True)
    assert found.longest[0] == 0 and not found.longest[1] < torch.inf
    assert found.keys[1, :78].isfinite().all()


@pytest.mark.parametrize("metric", ["squared_euclidean", "euclidean", "cosine"])
@pytest.mark.parametrize("m, k", [(200, 9), (60, 9), (60, 40)])
def test_distances_are_those_of_differences(metric, m, k):
    """Not of products, which near points would leave with hardly a digit."""
    torch.manual_seed(0)
    x = torch.randn(1, 20) + 1e-4 * torch.randn(m, 20)
    x[1::9] = x[::9][: len(x[1::9])]
    x = x.to(DEVICE)
    found = knn(x, k=k, metric=metric, backend="triton")
    wanted = knn(x, k=k, metric=metric, backend="dense")
    assert torch.equal(found.index, wanted.index)
    torch.testing.assert_close(found.distance, wanted.distance, rtol=2e-7, atol=0)


@pytest.mark.parametrize("seed", [1, 4, 5])
def test_who_is_nearer_than_products_tell_is_looked_for_again(seed):
    """Eighty points on a sphere about the target: products have them in another order."""
    torch.manual_seed(seed)
    unit = torch.nn.functional.normalize
    y, u = unit(torch.randn(1, 20), dim=-1) * 3, unit(torch.randn(80, 20).double(), dim=-1)
    near = y.double() + u * (1 + 1e-6 * torch.rand(80, 1).double())
    x = torch.cat([near.float(), -(y.double() + u * 2).float()]).to(DEVICE)
    found, wanted = (knn(x, y.to(DEVICE), 20, backend=b) for b in ("triton", "dense"))
    assert torch.equal(found.index, wanted.index)


def test_a_batch_vector_may_be_a_column_of_a_table():
    torch.manual_seed(0)
    batch = torch.arange(3).repeat_interleave(torch.tensor([40, 23, 17]))
    table = torch.stack([batch, 2 - batch, torch.arange(80) + 10**6], 1).to(DEVICE)
    x = torch.randn(80, 12) + 1e3 * batch[:, None]
    x = x.to(DEVICE)
    for y, batch_y in ((None, None), (x.clone(), table[:, 0].clone()), (x.clone(), table[:, 0])):
        options = {"k": 5, "batch_x": table[:, 0], "batch_y": batch_y}
        found, wanted = (knn(x, y, backend=b, **options) for b in ("triton", "dense"))
        assert torch.equal(found.index, wanted.index)


def test_what_lies_apart_is_the_same_in_itself():
    from convnn_geo.gpu import centered as kernels

    launched, x = [], torch.randn(24, 70).to(DEVICE).T  # not contiguous
    points = kernels._center
    with pytest.MonkeyPatch.context() as patch:

        class Counted:
            arg_names = points.arg_names

            def __getitem__(self, grid):
                launched.append(grid)
                return points[grid]

        patch.setattr(kernels, "_center", Counted())
        found = knn(x, k=5, backend="triton")
    assert len(launched) == 1
    assert torch.equal(found.index, knn(x, k=5, backend="dense").index)
