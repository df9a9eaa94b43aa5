"""Backward of attention by Triton against sums over pairs one by one."""

import pytest
import torch
from triton_cases import DEVICE, TRITON

pytestmark = TRITON
ROUGH = {
    torch.float32: {"rtol": 1e-4, "atol": 1e-5},
    torch.float16: {"rtol": 5e-3, "atol": 5e-3},
    torch.bfloat16: {"rtol": 0.04, "atol": 0.04},
}


def pairs(n, m, k, lead=(1,), hub=False):
    """Weights and places of random neighbours; with a ``hub`` everybody's first is source 3."""
    place = torch.rand(*lead, n, m).argsort(-1)[..., :k]
    if hub:
        place = torch.rand(*lead, n, m).index_fill(-1, torch.tensor(3), -1).argsort(-1)[..., :k]
    return torch.rand(*lead, n, k).softmax(-1), place.int()


def points(n, m, d, c, lead=(1,), dtype=torch.float32):
    sizes = ((n, d), (m, d), (m, c), (n, c))
    return [torch.randn(*lead, *size).to(dtype) for size in sizes]


def one_by_one(q, keys, value, grad, weight, place, keep, scale, temperature):
    """Gradients in float64, of pairs with weight alone."""
    lead, (n, k) = place.shape[:-2], place.shape[-2:]
    q, keys, value, grad, weight = (t.double() for t in (q, keys, value, grad, weight))
    found = [torch.zeros_like(t) for t in (q, keys, value)] + [
        keys.new_zeros(*lead, keys.shape[-2])
    ]
    for at in torch.cartesian_prod(*(torch.arange(size) for size in (*lead, n))).tolist():
        at, row = tuple(at[:-1]), at[-1]
        used = [j for j in range(k) if weight[at][row, j] != 0]
        slope, mean = {}, 0.0
        for j in used:
            kept = 1.0 if keep is None else keep[at][row, j].item()
            slope[j] = kept * (grad[at][row] @ value[at][place[at][row, j]]) if kept else 0.0
            mean += weight[at][row, j] * slope[j]
            if kept:
                found[2][at][place[at][row, j]] += kept * weight[at][row, j] * grad[at][row]
        for j in used:
            of_distance = weight[at][row, j] * (mean - slope[j]) / temperature
            source = place[at][row, j]
            found[0][at][row] -= scale * of_distance * keys[at][source]
            found[1][at][source] -= scale * of_distance * q[at][row]
            found[3][at][source] += of_distance
    return found


def backward(q, keys, value, grad, weight, place, keep=None, scale=0.5, temperature=0.7, **how):
    from convnn_geo.gpu.attention import attend_backward

    q, keys, value, grad, weight, place = (
        t.to(DEVICE) for t in (q, keys, value, grad, weight, place)
    )
    keep = None if keep is None else keep.to(DEVICE)
    rest = (keep, scale, temperature, grad, weight, place)
    *found, pairs = attend_backward(q, keys, value, *rest, of_pairs=True, **how)
    if found[3].numel():  # what a bias gets is what its pairs get
        summed = torch.zeros(*place.shape[:-2], keys.shape[-2], device=DEVICE)
        summed.scatter_add_(-1, place.flatten(-2).long(), pairs.flatten(-2))
        torch.testing.assert_close(found[3], summed, rtol=1e-4, atol=1e-5, equal_nan=True)
    *same, none = attend_backward(q, keys, value, *rest, **how)
    assert not none.numel() and len(same) == 4
    return [t.cpu() for t in found]


def check(parts, weight, place, keep=None):
    rough = ROUGH[parts[0].dtype]
    wanted = one_by_one(*parts, weight, place, keep, 0.5, 0.7)
    found = backward(*parts, weight, place, keep)
    close(found[:3], wanted[:3], parts[:3], rough)
    close(found[3:], wanted[3:], [weight], ROUGH[torch.float32])
    if parts[0].dtype == torch.bfloat16:  # of which less is sent where no bias learns
        found = backward(*parts, weight, place, keep, biased=False)
        close(found[:3], wanted[:3], parts[:3], rough)


def close(found, wanted, likes, rough):
    for a, b, like in zip(found, wanted, likes, strict=True):
        assert a.dtype == like.dtype
        a = a.double()
        assert torch.equal(a.isfinite(), b.isfinite())
        torch.testing.assert_close(a.where(a.isfinite(), 0.0), b.where(b.isfinite(), 0.0), **rough)


@pytest.fixture(params=[False, True], ids=["any order", "fixed order"])
def order(request):
    torch.use_deterministic_algorithms(request.param)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.usefixtures("order")
class TestGradients:
    @pytest.mark.parametrize("dtype", list(ROUGH))
    @pytest.mark.parametrize(
        "n, m, k, d, c", [(5, 7, 1, 16, 16), (37, 50, 9, 20, 33), (70, 18, 18, 64, 16)]
    )
    def test_of_all_sizes(self, dtype, n, m, k, d, c):
        check(points(n, m, d, c, dtype=dtype), *pairs(n, m, k))

    @pytest.mark.parametrize("dtype", list(ROUGH)[::2])
    def test_of_what_all_choose(self, dtype):
        check(points(150, 40, 16, 16, dtype=dtype), *pairs(150, 40, 3, hub=True))

    @pytest.mark.parametrize("dtype", list(ROUGH)[::2])
    def test_of_wide_heads(self, dtype):
        check(points(9, 20, 256, 128, dtype=dtype), *pairs(9, 20, 4))

    def test_of_many_heads_that_lie_apart(self):
        parts = [
            t.transpose(-2, -3).contiguous().transpose(-2, -3)
            for t in points(9, 12, 16, 16, (2, 3))
        ]
        check(parts, *pairs(9, 12, 4, (2, 3)))

    @pytest.mark.parametrize("dtype", list(ROUGH))
    def test_dropped_and_hidden_pairs_have_no_part(self, dtype):
        parts, (weight, place) = points(30, 20, 16, 16, dtype=dtype), pairs(30, 20, 6)
        weight[:, ::3, 2:], weight[:, 7] = 0.0, 0.0
        keep = (torch.rand(1, 30, 6) < 0.6) / 0.6
        place[:, 0, 2:] = 19  # hidden: it may be anything
        parts[1][:, 19], parts[2][:, 19] = torch.nan, torch.inf
        weight = weight.where(place != 19, 0.0)
        check(parts, weight, place, keep)

    @pytest.mark.parametrize("dtype", list(ROUGH))
    @pytest.mark.parametrize("lost", [torch.nan, torch.inf])
    @pytest.mark.parametrize("which", range(4))
    def test_what_is_not_finite_reaches_those_who_chose_it(self, dtype, lost, which):
        parts, (weight, place) = points(20, 40, 16, 16, dtype=dtype), pairs(20, 40, 3)
        parts[which][0, 4, 5], parts[which][0, 6] = lost, -lost
        check(parts, weight, place)

    def test_slopes_beyond_half_precision(self):
        parts, (weight, place) = points(20, 40, 16, 16, dtype=torch.float16), pairs(20, 40, 3)
        parts[0] *= 1e-4
        parts[2] *= 1e3
        parts[3] *= 1e3
        wanted = one_by_one(*parts, weight, place, None, 0.5, 0.7)[1]
        assert wanted.abs().max() > 10
        found = backward(*parts, weight, place)[1]
        torch.testing.assert_close(found.double(), wanted, rtol=5e-3, atol=0.5)

    def test_of_what_is_broadcast_are_left_to_be_summed(self):
        parts, (weight, place) = points(9, 12, 16, 16, dtype=torch.bfloat16), pairs(9, 12, 4, (2,))
        whole = [t.expand(2, *t.shape[1:]) for t in parts]
        wanted = one_by_one(*whole, weight, place, None, 0.5, 0.7)
        parts[3] = whole[3]
        for a, b in zip(backward(*parts, weight, place), wanted, strict=True):
            assert a.dtype == torch.float32 and a.shape == b.shape
            torch.testing.assert_close(a.double(), b, **ROUGH[torch.bfloat16])

    def test_a_bias_may_have_none(self):
        parts, (weight, place) = points(9, 12, 16, 16), pairs(9, 12, 4)
        found, wanted = (backward(*parts, weight, place, biased=biased) for biased in (False, True))
        assert not found[3].numel()
        for a, b in zip(found[:3], wanted, strict=False):
            torch.testing.assert_close(a, b)


def test_slots_follow_targets_where_the_order_is_fixed():
    from convnn_geo.gpu.choosers import Lists

    weight, place = (t.to(DEVICE) for t in pairs(150, 20, 5, (2,), hub=True))
    weight[:, ::4, 3] = 0.0
    lists = Lists.of(weight, place, 2, 20, True)
    start, slot = lists.start.cpu(), lists.slot.cpu()
    assert not lists.count.any()  # every slot is taken
    for example in range(2):
        taken = start[example].tolist()
        for row in range(150):
            for j in range(5):
                source = place[example, row, j].item()
                if weight[example, row, j] != 0:
                    assert slot[example, row, j] == taken[source]
                    taken[source] += 1
        assert taken[:-1] == start[example, 1:].tolist() and start[example, 0] == 0


def prepared(*tensors, pairs=(2, 9, 4), biased=False):
    from convnn_geo.gpu import gradients

    return gradients._plain(tuple(gradients.seen(t) for t in tensors), pairs, False, biased, False)


def test_only_bfloat16_is_sent_as_such():
    q, keys, value, grad = points(9, 12, 16, 16, (2,), torch.bfloat16)
    pairs = torch.Size((2, 9, 4))
    assert prepared(q, keys, value, grad, pairs=pairs)._packed
    assert not prepared(q, keys, value, grad, pairs=pairs, biased=True)._packed
    for dtype in (torch.float16, torch.float32):
        assert not prepared(q, keys, value.to(dtype), grad.to(dtype), pairs=pairs)._packed


def test_gradients_of_what_is_broadcast_are_others():
    """They are in float32, although strides are those of what was expanded."""
    q, keys, value, grad = points(9, 12, 16, 16, (2,), torch.bfloat16)
    pairs, keys = torch.Size((2, 9, 4)), keys[:1]
    alike = [prepared(q, k, value, grad, pairs=pairs) for k in (keys, keys.expand_as(value))]
    assert alike[0].strides == alike[1].strides
    assert alike[0]._of_sources[0] is not alike[1]._of_sources[0]


def test_other_dtypes_of_what_was_found_are_converted():
    parts, (weight, place) = points(9, 12, 16, 16), pairs(9, 12, 4)
    keep = (torch.rand(1, 9, 4) < 0.6) / 0.6
    wanted = backward(*parts, weight, place, keep)
    found = backward(*parts, weight.double(), place.long(), keep.double())
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)
