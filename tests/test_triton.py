"""Kernels in Triton against plain sums: on a GPU, or on the CPU under TRITON_INTERPRET=1."""

import functools
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from triton_cases import DEVICE, TRITON

from convnn_geo import gpu
from convnn_geo.lowering import choose, explain, run
from convnn_geo.lowering.neighbor_attention import TritonAttention
from convnn_geo.metrics import Feature, interpolate
from convnn_geo.nn import ConvNN2d, ConvNNAttention
from convnn_geo.nn.functional import knn_attention
from convnn_geo.search import knn

HALVES = [torch.float32, torch.bfloat16, torch.float16]


def on(*tensors):
    return [t.to(DEVICE) for t in tensors]


@pytest.fixture(autouse=True)
def forgotten():
    """Tests look at one call in several ways."""
    yield
    if gpu.refuses(torch.device(DEVICE)) is None:
        from convnn_geo.gpu import attention

        attention._plain.cache_clear()
        attention._call.cache_clear()


WAITING = ("__bool__", "__int__", "__float__", "item", "tolist", "cpu", "nonzero")
CLOUDS = {
    "grid": lambda n, d: torch.randint(3, (n, d)).float(),
    "coincident": lambda n, d: torch.ones(n, d),
    "doubled": lambda n, d: torch.randn(n // 2, d).repeat(2, 1),
    "last bits": lambda n, d: torch.randn(1, d) + 1e-6 * torch.randn(n, d),
    "far away": lambda n, d: 1e6 + torch.randint(50, (n, d)).float(),
    "with zeros": lambda n, d: torch.randn(n, d) * (torch.arange(n) % 3 > 0)[:, None],
}
METRICS = {
    "euclidean": "euclidean",
    "cosine": "cosine",
    "dot": "dot",
    "scaled dot": Feature("scaled_dot"),
    "points in float64": 0.3 * Feature("squared_euclidean") + 0.7 * Feature("cosine"),
    "products in float64": 0.3 * Feature("squared_euclidean") + 0.7 * Feature("dot"),
}


class TestSearch:
    pytestmark = TRITON

    def starts(self, *sizes):
        return torch.tensor([0, *sizes]).cumsum(0).to(DEVICE)

    def check(self, q, keys, k, q_sizes, key_sizes, bias=None, scale=1.0, direct=False):
        from convnn_geo.gpu.search import nearest

        q, keys = on(q, keys)
        bias = None if bias is None else bias.to(DEVICE)
        starts = self.starts(*q_sizes), self.starts(*key_sizes)
        values, places = nearest(q, keys, k, starts, max(q_sizes), bias, scale, direct=direct)
        assert values.dtype == torch.float32 and places.dtype == torch.int32
        row = 0
        for i, (n, m) in enumerate(zip(q_sizes, key_sizes, strict=True)):
            here, there = q[starts[0][i] :][:n].float(), keys[starts[1][i] :][:m].float()
            if direct:
                wanted = (here[:, None] - there[None]).square()
                total = wanted[..., 0]
                for axis in range(1, wanted.shape[-1]):
                    total = total + wanted[..., axis]
                wanted = total
            else:
                wanted = -scale * (here @ there.T)
                wanted = wanted if bias is None else wanted + bias[starts[1][i] :][:m]
            best, order = wanted.sort(dim=-1, stable=True)
            found, at = values[row : row + n], places[row : row + n].long()
            torch.testing.assert_close(found, best[:, :k], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(wanted.gather(1, at), found, rtol=1e-5, atol=1e-5)
            assert (at.sort(-1).values.diff(dim=-1) > 0).all()
            if direct or (q == q.round()).all():
                assert torch.equal(at, order[:, :k])
            row += n

    @pytest.mark.parametrize("dtype", HALVES)
    @pytest.mark.parametrize("n, m, d, k", [(1, 1, 3, 1), (40, 70, 16, 9), (33, 200, 80, 40)])
    def test_by_products(self, dtype, n, m, d, k):
        q, keys = torch.randn(n, d).to(dtype), torch.randn(m, d).to(dtype)
        self.check(q, keys, k, [n], [m], torch.randn(m), 2.0)

    @pytest.mark.parametrize("d", [1, 2, 3, 8])
    def test_by_differences_with_ties(self, d):
        x = torch.randint(4, (150, d)).float()
        self.check(x, x, 12, [150], [150], direct=True)

    def test_ties_of_products(self):
        x = torch.randint(3, (100, 10)).float()
        self.check(x, x, 20, [100], [100], x.square().sum(-1), 2.0)

    def test_ragged_examples(self):
        x, y = torch.randn(75, 12), torch.randn(90, 12)
        self.check(x, y, 5, [5, 0, 50, 20], [40, 10, 5, 35])

    @pytest.mark.parametrize("spare", [0, 2])
    @pytest.mark.parametrize("self_point", ["natural", "first", "excluded"])
    @pytest.mark.parametrize(
        "metric, d", [("euclidean", 3), ("euclidean", 12), ("cosine", 12), ("scaled dot", 3)]
    )
    def test_unequal_clouds_are_searched_in_one_launch(
        self, d, metric, self_point, spare, monkeypatch
    ):
        from convnn_geo.search import launches, triton

        asked = []
        monkeypatch.setattr(
            triton, "launch", lambda *args: asked.append(args) or launches.launch(*args)
        )
        sizes = [40, 0, 7, 210]
        batch = torch.arange(4).repeat_interleave(torch.tensor(sizes))
        x, batch = on(torch.randint(9, (257, d)) * torch.rand(257, 1).round(decimals=1), batch)
        k = 7 - (self_point == "excluded") - spare  # the smallest cloud may give all it has
        options = {"k": k, "batch_x": batch, "metric": METRICS[metric], "self_point": self_point}
        found, wanted = (knn(x, backend=b, **options) for b in ("triton", "dense"))
        assert torch.equal(found.index, wanted.index) and len(asked) == 1
        torch.testing.assert_close(found.distance, wanted.distance)

    def test_large_clouds_of_few_axes_are_worth_a_search_each(self, monkeypatch):
        from convnn_geo.search import triton
        from convnn_geo.search.problem import Problem

        x, batch = on(torch.randn(30, 4), torch.arange(3).repeat_interleave(10))
        monkeypatch.setattr(triton, "WORTH_CELLS", 10)

        def one_launch(d, engine):
            problem = Problem("points", x[:, :d], x[:, :d], None, 1.0, torch.float32)
            return triton.in_clouds(problem, 3, batch, batch, False, engine) is not None

        assert one_launch(3, "triton") and one_launch(4, "auto") and not one_launch(3, "auto")
        monkeypatch.setattr(triton, "WORTH_CELLS", 11)
        assert one_launch(3, "auto")
        monkeypatch.setattr(triton, "EMPTY", 0)
        assert not one_launch(3, "auto")

    @pytest.mark.parametrize("k", [3, 4])
    def test_ties_where_the_smallest_cloud_gives_all_it_has(self, k):
        batch = torch.tensor([0] * 4 + [1] * 16)
        for _ in range(4):
            x, batch = on(torch.randint(-2, 3, (20, 12)).float(), batch)
            found, wanted = (knn(x, k=k, batch_x=batch, backend=b) for b in ("triton", "dense"))
            assert torch.equal(found.index, wanted.index)

    def test_one_set_of_points_may_be_two_sets_of_clouds(self):
        x = torch.randn(400, 12)
        x[210:] += 30  # far from what the first cloud of sources is about
        x, number = on(x, torch.arange(400))
        of_x, of_y = (number >= 210).long(), (number >= 250).long()
        found, wanted = (knn(x, x, 9, of_x, of_y, backend=b) for b in ("triton", "dense"))
        assert torch.equal(found.index, wanted.index)

    def test_targets_of_some_clouds(self):
        x, y = on(torch.randn(75, 4), torch.randn(20, 4))
        of_x = torch.arange(4).repeat_interleave(torch.tensor([40, 20, 5, 10])).to(DEVICE)
        of_y = torch.tensor([0] * 12 + [3] * 8).to(DEVICE)
        found, wanted = (knn(x, y, 9, of_x, of_y, backend=b) for b in ("triton", "dense"))
        assert torch.equal(found.index, wanted.index)
        with pytest.raises(ValueError, match="k=11 is larger than the number of candidates, 10"):
            knn(x, y, 11, of_x, of_y, backend="triton")
        found, wanted = (
            knn(x, y, 11, of_x, of_y, backend=b, short="pad") for b in ("triton", "dense")
        )
        assert torch.equal(found.mask, wanted.mask) and torch.equal(found.index, wanted.index)
        full = knn(x, y, 9, of_x, of_y, backend="triton", short="pad")
        assert full.mask is None

    def test_all_and_many_neighbors(self):
        x = torch.randn(64, 16)
        self.check(x, x, 64, [64], [64])
        self.check(x[:8], torch.randn(270, 16), 256, [8], [270])

    slow = pytest.mark.skipif(gpu.interpreted(), reason="takes a minute when interpreted")

    @pytest.mark.parametrize("d", [3, pytest.param(16, marks=slow)])
    def test_the_engine_finds_256(self, d):
        x = torch.randn(1, 262, d, device=DEVICE)
        found, wanted = (knn(x, x[:, :4], 256, backend=b) for b in ("triton", "dense"))
        assert torch.equal(found.index, wanted.index)

    def test_a_mask_and_rows_that_see_nobody(self):
        from convnn_geo.gpu.search import nearest

        q, keys = on(torch.randn(6, 16), torch.randn(20, 16))
        mask = (torch.rand(1, 1, 6, 20) < 0.5).to(DEVICE)
        mask[..., 2, :] = False
        values, places = nearest(q, keys, 5, (self.starts(6), self.starts(20)), 6, mask=mask)
        wanted = (-(q @ keys.T)).masked_fill(~mask[0, 0], torch.inf).sort(dim=-1, stable=True)
        torch.testing.assert_close(values, wanted.values[:, :5], rtol=1e-5, atol=1e-5)
        assert (places[2] == torch.arange(5, device=DEVICE)).all() and values[2].isinf().all()

    @pytest.mark.parametrize("metric", ["euclidean", "cosine", "dot"])
    @pytest.mark.parametrize("d", [3, 20])
    def test_the_engine_finds_what_dense_finds(self, metric, d):
        x = torch.randn(2, 30, d)
        x[:, 20:25] = x[:, :5]
        (x,) = on(x)
        for options in ({}, {"self_point": "excluded"}):
            found = knn(x, k=4, metric=metric, backend="triton", **options)
            wanted = knn(x, k=4, metric=metric, backend="dense", **options)
            assert torch.equal(found.index, wanted.index)
            torch.testing.assert_close(found.distance, wanted.distance)

    def check_without_waiting(self, monkeypatch, x, y, k, metric, self_point):
        wanted = knn(x, y, k, metric=metric, backend="dense", self_point=self_point)
        with monkeypatch.context() as patch:
            for name in WAITING:
                patch.setattr(torch.Tensor, name, waited)
            found = knn(
                x, y, k, metric=metric, backend="triton", self_point=self_point, check=False
            )
        assert torch.equal(found.index, wanted.index)
        torch.testing.assert_close(found.distance, wanted.distance, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("metric", ["euclidean", "cosine"])
    @pytest.mark.parametrize("d", [3, 20])
    @pytest.mark.parametrize("cloud", CLOUDS)
    def test_what_is_hard_to_tell_apart_is_settled_without_waiting(
        self, cloud, d, metric, monkeypatch
    ):
        torch.manual_seed(0)
        (x,) = on(torch.stack([CLOUDS[cloud](20, d), torch.randn(20, d)]))
        self.check_without_waiting(monkeypatch, x, None, 5, metric, "natural")
        self.check_without_waiting(monkeypatch, x, None, 5, metric, "excluded")
        self.check_without_waiting(monkeypatch, x, x[:, 15:], 17, metric, "natural")

    @pytest.mark.parametrize("metric", ["dot", "points in float64", "products in float64"])
    @pytest.mark.parametrize("cloud", CLOUDS)
    def test_products_and_mixtures_are_settled_without_waiting(self, cloud, metric, monkeypatch):
        torch.manual_seed(0)
        (x,) = on(CLOUDS[cloud](24, 5))
        self.check_without_waiting(monkeypatch, x, None, 3, METRICS[metric], "excluded")


def waited(*_):
    raise AssertionError("the host waited for the device")


def plain_attention(q, k, v, count, mask=None, bias=None, scale=None):
    """In float64 on the chosen alone."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    score = (q @ k.transpose(-1, -2)) * scale
    score = score if bias is None else score + bias
    score = score if mask is None else score.masked_fill(~mask, -torch.inf)
    order = score.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    chosen = torch.zeros_like(score, dtype=torch.bool).scatter(-1, order, True)
    score = score.masked_fill(~chosen, -torch.inf)
    empty = (score == -torch.inf).all(-1, keepdim=True)
    return score.masked_fill(empty, 0).softmax(-1).masked_fill(empty, 0) @ v


class TestAttention:
    pytestmark = TRITON

    @pytest.mark.parametrize("row", [512, 8])  # in one kernel, and in two
    @pytest.mark.parametrize(
        "shape, m, c, k",
        [
            ((2, 2, 17, 16), 29, 16, 5),
            ((1, 1, 40, 20), 70, 33, 9),
            ((1, 2, 5, 16), 5, 16, 5),
            ((1, 1, 3, 16), 40, 16, 1),
        ],
    )
    @pytest.mark.parametrize("masked", [False, True, "by floats"])
    def test_values_and_gradients(self, monkeypatch, row, shape, m, c, k, masked):
        from convnn_geo.gpu import rows

        monkeypatch.setattr(rows, "LONGEST", row)
        lead = shape[:-2]
        q, keys = torch.randn(shape), torch.randn(*lead, m, shape[-1])
        value = torch.randn(*lead, m, c)
        mask = None
        if masked:
            mask = torch.rand(lead[0], 1, shape[-2], m) < 0.5
            mask[..., 0, :] = False
        parts = [t.requires_grad_() for t in on(q, keys, value)]
        mask = None if mask is None else mask.to(DEVICE)
        given, less = mask, None
        if masked == "by floats":
            less = torch.randn(*lead[:1], 1, *mask.shape[-2:], device=DEVICE).requires_grad_()
            given = less.masked_fill(~mask, -torch.inf)
            parts.append(less)
        out = knn_attention(*parts[:3], k, attn_mask=given, backend="triton")
        bias = None if less is None else less.double()
        exact = plain_attention(*(t.double() for t in parts[:3]), k, mask, bias)
        torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=1e-5)
        grad = torch.randn_like(out)
        wanted = torch.autograd.grad(exact, parts, grad.double())
        for deterministic in (False, True):
            torch.use_deterministic_algorithms(deterministic)
            try:
                found = torch.autograd.grad(out, parts, grad, retain_graph=True)
            finally:
                torch.use_deterministic_algorithms(False)
            for a, b in zip(found, wanted, strict=True):
                torch.testing.assert_close(a.double(), b.double(), rtol=1e-3, atol=1e-5)

    @pytest.mark.parametrize("row", [512, 8])
    @pytest.mark.parametrize("shape", [(20, 20), (1, 20), (2, 1, 1, 20), (1, 3, 20, 20)])
    def test_scores_that_are_added_broadcast(self, monkeypatch, row, shape):
        from convnn_geo.gpu import rows

        monkeypatch.setattr(rows, "LONGEST", row)
        q, k, v = (t.bfloat16() for t in on(*torch.randn(3, 2, 3, 20, 16)))
        less = torch.randn(shape, device=DEVICE).bfloat16().requires_grad_()
        out = knn_attention(q, k, v, 6, attn_mask=less, backend="triton")
        exact = plain_attention(*(t.double() for t in (q, k, v)), 6, bias=less.double())
        torch.testing.assert_close(out.double(), exact, rtol=0.02, atol=0.02)
        grads = [torch.autograd.grad(t.sum(), less)[0].double() for t in (out, exact)]
        torch.testing.assert_close(*grads, rtol=0.05, atol=0.05)

    @pytest.mark.parametrize("dtype", HALVES[1:])
    @pytest.mark.parametrize("row", [512, 8])
    def test_half_precision_with_float32_scores(self, monkeypatch, dtype, row):
        from convnn_geo.gpu import rows

        monkeypatch.setattr(rows, "LONGEST", row)
        q, k, v = on(*(torch.randn(1, 2, 20, 16).to(dtype) for _ in range(3)))
        out = knn_attention(q, k, v, 6, backend="triton")
        exact = plain_attention(q.double(), k.double(), v.double(), 6)
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), exact, rtol=0.02, atol=0.02)

    @pytest.mark.parametrize("row", [512, 8])
    def test_ties_go_to_the_lowest_index(self, monkeypatch, row):
        from convnn_geo.gpu import rows

        monkeypatch.setattr(rows, "LONGEST", row)
        q = torch.randint(2, (1, 30, 16)).float()
        value = torch.eye(30)[None]
        q, value = on(q, value)
        out = knn_attention(q, q, value, 7, backend="triton", scale=1.0)
        wanted = plain_attention(q.double(), q.double(), value.double(), 7, scale=1.0)
        torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("row", [512, 8])
    def test_dropout(self, monkeypatch, row, dtype):
        from convnn_geo.gpu import rows

        monkeypatch.setattr(rows, "LONGEST", row)
        q, k, v, keep = on(*(torch.randn(1, 12, 16) for _ in range(3)), torch.rand(1, 12, 5))
        q, k, v = (tensor.to(dtype) for tensor in (q, k, v))
        rough = {} if dtype == torch.float32 else {"rtol": 0.05, "atol": 0.05}
        for tensor in (q, k, v):
            tensor.requires_grad_()
        call = torch.ops.convnn_geo.neighbor_attention
        out, weight, place = call(*("products", q, k, v, None, None, keep, 5, 0.5, 1.0, "triton"))
        exact = (weight * keep).double().unsqueeze(-1) * v[0][place.long()].double()
        torch.testing.assert_close(
            out.double(), exact.sum(-2), **(rough or {"rtol": 1e-4, "atol": 1e-5})
        )
        found = torch.autograd.grad(out.float().square().sum(), (q, k, v))
        order = weight.argsort(-1, descending=True)
        sorted_keep = keep.gather(-1, order)
        q_, k_, v_ = (tensor.float() for tensor in (q, k, v))  # C has no halves
        plain, _, _ = call(
            *("products", q_, k_, v_, None, None, sorted_keep, 5, 0.5, 1.0, "compiled")
        )
        wanted = torch.autograd.grad(plain.square().sum(), (q, k, v))
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, **(rough or {"rtol": 1e-3, "atol": 1e-4}))

    @pytest.mark.parametrize("d", [128, 256])
    @pytest.mark.parametrize("dtype", HALVES[:2])
    def test_wide_heads(self, d, dtype):
        q, k, v = on(*(torch.randn(1, 2, 19, d).to(dtype) for _ in range(3)))
        out = knn_attention(q, k, v, 4, backend="triton")
        exact = plain_attention(q.double(), k.double(), v.double(), 4)
        rough = 1e-4 if dtype == torch.float32 else 0.02
        torch.testing.assert_close(out.double(), exact, rtol=rough, atol=rough)

    @pytest.mark.parametrize("row", [512, 8])
    def test_nan_comes_after_infinity_and_before_nobody(self, monkeypatch, row):
        from convnn_geo.gpu import rows

        monkeypatch.setattr(rows, "LONGEST", row)
        q, k, v = on(torch.rand(1, 20, 16) + 1, torch.randn(1, 20, 16), torch.randn(1, 20, 16))
        k[0, 5:9], k[0, 11] = torch.nan, -torch.inf  # farther than all others
        q[0, 3, 0] = torch.nan
        call = torch.ops.convnn_geo.neighbor_attention
        for count in (9, 16, 20):
            arguments = ("products", q, k, v, None, None, None, count, 0.25, 1.0, "triton")
            place = call(*arguments)[2].long().sort(-1).values
            assert place.max() < 20
            score = (q @ k.transpose(-1, -2)).nan_to_num(-1e38, neginf=-1e37)
            order = score.sort(dim=-1, descending=True, stable=True).indices
            assert torch.equal(place, order[..., :count].sort(-1).values)

    @pytest.mark.parametrize("dtype", HALVES[:2])
    @pytest.mark.parametrize("row", [512, 8])
    def test_what_is_not_chosen_never_reaches_a_query(self, monkeypatch, row, dtype):
        from convnn_geo.gpu import rows

        monkeypatch.setattr(rows, "LONGEST", row)
        q, k, v = on(*(torch.randn(1, 20, 16).to(dtype) for _ in range(3)))
        mask = torch.ones(20, 20, dtype=torch.bool, device=DEVICE)
        mask[:, 15:], mask[4, 2:] = False, False
        v[0, 15:] = k[0, 15:] = torch.nan
        v[0, 3], v[0, 6], v[0, 7, 0] = torch.inf, -torch.inf, torch.nan
        parts = [t.requires_grad_() for t in (q, k, v)]
        out, wanted = (
            knn_attention(*parts, 5, attn_mask=mask, backend=b) for b in ("triton", "gather")
        )
        finite = wanted.isfinite()
        assert 0 < finite.sum() < finite.numel()
        rough = {} if dtype == torch.float32 else {"rtol": 0.02, "atol": 0.02}
        torch.testing.assert_close(out, wanted, equal_nan=True, **rough)
        good = finite.all(-1)
        to_q = torch.autograd.grad(out[good].sum(), parts, allow_unused=True)[0]
        assert to_q[good].isfinite().all()

    @pytest.mark.parametrize("row", [512, 8])
    def test_nan_shows_where_it_is_chosen(self, monkeypatch, row):
        from convnn_geo.gpu import rows

        monkeypatch.setattr(rows, "LONGEST", row)
        q, k, v = on(*(torch.randn(1, 20, 16) for _ in range(3)))
        k[0, 7] = torch.nan
        assert knn_attention(q, k, v, 20, backend="triton").isnan().all()
        assert knn_attention(q, k, v, 19, backend="triton").isfinite().all()
        q[0, 2, 3] = torch.nan
        assert knn_attention(q, k, v, 5, backend="triton").isnan().any(-1).nonzero().tolist() == [
            [0, 2]
        ]

    @pytest.mark.parametrize("shape", [(2, 0, 5), (0, 4, 5), (2, 4, 5)])
    def test_nothing_to_attend(self, shape):
        b, n, m = shape
        c = 0 if b and n else 8
        parts = on(torch.randn(b, n, 8), torch.randn(b, m, 8), torch.randn(b, m, c))
        parts = [t.requires_grad_() for t in parts]
        for row_count in (3, 5):
            out = knn_attention(*parts, row_count, backend="triton")
            assert out.shape == (b, n, c)
            for grad in torch.autograd.grad(out.sum(), parts):
                assert not grad.any()

    @pytest.mark.parametrize("dtype", HALVES[1:])
    def test_halves_reach_the_kernel_as_they_are(self, monkeypatch, dtype):
        from convnn_geo.gpu import attention

        seen, attend = [], attention.attend

        def spy(q, keys, value, bias, mask, keep, *rest):
            seen.append((q.dtype, keys.dtype, None if keep is None else keep.dtype))
            return attend(q, keys, value, bias, mask, keep, *rest)

        monkeypatch.setattr(attention, "attend", spy)
        q, k, v = on(*(torch.randn(1, 2, 10, 16).to(dtype) for _ in range(3)))
        knn_attention(q, k, v, 3, backend="triton", dropout_p=0.3)
        assert seen == [(dtype, dtype, torch.float32)]
        layer = ConvNNAttention(16, 2, k=3, backend="triton").to(DEVICE)
        with torch.autocast(DEVICE, torch.bfloat16):
            layer(torch.randn(2, 9, 16, device=DEVICE), need_weights=False)
        assert seen[1][:2] == (torch.bfloat16, torch.bfloat16)
        layer = ConvNNAttention(16, 2, k=3, metric="cosine", backend="triton", dtype=dtype)
        layer.to(DEVICE)(torch.randn(2, 9, 16, device=DEVICE, dtype=dtype), need_weights=False)
        assert seen[2][:2] == (torch.float32, torch.float32)

    def test_nothing_is_kept_where_nothing_learns(self):
        q, k, v = on(*(torch.randn(1, 2, 10, 16).bfloat16() for _ in range(3)))
        arguments = ("products", q, k, v, None, None, None, 3, 0.25, 1.0, "triton")
        call = torch.ops.convnn_geo.neighbor_attention
        out, weight, place = call(*arguments, False)
        assert not weight.numel() and not place.numel()
        assert torch.equal(out, call(*arguments)[0])

    def test_an_older_triton_is_refused(self, monkeypatch):
        monkeypatch.setattr(gpu, "_VERSION", (3, 4))
        assert "triton 3.4 is installed, the kernels need 3.5" in gpu.refuses(torch.device(DEVICE))

    def test_gpus_of_others_are_refused(self, monkeypatch):
        monkeypatch.setattr(torch.version, "hip", "6.4")
        assert "assembly for NVIDIA" in gpu.refuses(torch.device("cuda"))

    def test_a_temperature_that_is_no_float_is_one(self, monkeypatch):
        """Of integers Triton makes constants: kept with a form, they would serve all others."""
        from convnn_geo.gpu import calls

        seen, layer = [], ConvNNAttention(16, 2, k=3, backend="triton").to(DEVICE)
        call = calls.Rows.__call__
        monkeypatch.setattr(
            calls.Rows, "__call__", lambda self, *args: seen.append(args[-1]) or call(self, *args)
        )
        x = torch.randn(1, 9, 16, device=DEVICE)
        for temperature in (1, 0.5, 2):
            layer.weighting.temperature = temperature
            layer(x, need_weights=False)
        assert [(type(t), t) for t in seen] == [(float, 1.0), (float, 0.5), (float, 2.0)]

    def test_heads_too_wide_for_backward_are_refused(self):
        for width, reason in ((512, None), (528, "heads of 528 channels are too wide")):
            x = torch.randn(1, 9, width, device=DEVICE)
            op = ConvNNAttention(width, 1, k=3).to(DEVICE).operation(x)
            refused = TritonAttention().refuses(op)
            assert refused == reason or refused.startswith(reason)

    @pytest.mark.parametrize("current", [0, 1])
    def test_kernels_run_on_the_device_of_their_inputs(self, monkeypatch, current):
        from convnn_geo.gpu import attention, cells, centered, gradients, search, taps

        class OnASecondGpu:
            is_cuda = True

            def get_device(self):
                return 1

        entered, tensor = [], OnASecondGpu()
        monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
        monkeypatch.setattr(torch.cuda, "device_of", lambda t: entered.append(t) or nullcontext())
        seen = gpu.on_its_device(lambda first, *rest, **more: (first, rest, more, len(entered)))
        assert seen(tensor, 2, a=3) == (tensor, (2,), {"a": 3}, 1 - current)
        launching = (
            *(attention.attend, attention.alone, gradients.attend_backward, search.nearest),
            *(cells.nearest, centered.centered, taps.gather_taps, taps.gather_taps_backward),
        )
        assert {f.__code__ for f in launching} == {seen.__code__}

    def test_weights_are_those_of_gather(self):
        layer, x = ConvNNAttention(32, 2, k=5).to(DEVICE), torch.randn(2, 12, 32, device=DEVICE)
        found = []
        for layer.backend in ("triton", "gather"):
            out, weights = layer(x)
            weights.square().sum().backward()
            found.append((out, weights, layer.in_proj_weight.grad))
            layer.zero_grad()
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)

    def test_the_layer_is_the_same_by_gather(self):
        x = torch.randn(2, 20, 32, device=DEVICE)
        mixture = interpolate("squared_spatial", "scaled_dot", 0.7)
        for options in ({}, {"metric": "cosine"}, {"metric": mixture}, {"add_zero_attn": True}):
            layer = ConvNNAttention(32, 2, k=5, **options).to(DEVICE)
            found = []
            for backend in ("triton", "gather"):
                layer.backend = backend
                out = layer(x, need_weights=False)[0]
                parameters = [p for p in layer.parameters() if p.requires_grad]
                grads = torch.autograd.grad(out.square().sum(), parameters, allow_unused=True)
                same, weights = layer(x)
                loss = same.square().sum() + weights.square().sum()
                more = torch.autograd.grad(loss, parameters, allow_unused=True)
                found.append([out, weights, *(g for g in (*grads, *more) if g is not None)])
            for a, b in zip(*found, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)

    @pytest.mark.parametrize("options", [{}, {"bias": True, "masked": True, "dropped": True}])
    def test_the_operators_keep_the_rules_of_torch(self, options):
        q, k, v = on(*(torch.randn(1, 2, 6, 16) for _ in range(3)))
        bias = torch.randn(1, 2, 6, device=DEVICE) if "bias" in options else None
        mask = torch.rand(1, 1, 6, 6, device=DEVICE) < 0.8 if "masked" in options else None
        keep = torch.rand(1, 2, 6, 3, device=DEVICE) if "dropped" in options else None
        leaves = [t for t in (q, k, v, bias) if t is not None]
        for tensor in leaves:
            tensor.requires_grad_()
        arguments = ("products", q, k, v, bias, mask, keep, 3, 1.0, 1.0, "triton")
        operators = torch.ops.convnn_geo
        torch.library.opcheck(operators.neighbor_attention.default, arguments)
        plain = [t.detach() if isinstance(t, torch.Tensor) else t for t in arguments]
        out, weight, place = operators.neighbor_attention(*plain)
        back = (*plain[:4], keep, 1.0, 1.0, "triton", torch.ones_like(out), weight, place)
        for more in ((False,), (True,), (True, torch.ones_like(weight))):
            torch.library.opcheck(operators.neighbor_attention_backward.default, (*back, *more))


class TestTaps:
    pytestmark = TRITON

    @pytest.mark.parametrize(
        "c, d, groups", [(5, 7, 1), (16, 40, 1), (70, 6, 1), (8, 12, 4), (6, 6, 6), (4, 8, 4)]
    )
    @pytest.mark.parametrize("weighted", [False, True])
    def test_values_and_gradients(self, c, d, groups, weighted):
        k, n, m = 3, 37, 20
        rows, taps = torch.randn(m, c), torch.randn(k, d, c // groups)
        bias, rho = torch.randn(d), torch.rand(k, n) if weighted else None
        index = torch.randint(m, (k, n)).to(DEVICE)
        parts = [
            None if t is None else t.to(DEVICE).requires_grad_() for t in (rows, rho, taps, bias)
        ]
        rows, rho, taps, bias = parts
        out = torch.ops.convnn_geo.gather_taps(rows, index, rho, taps, bias, groups, True)
        near = rows.double()[index]
        near = near if rho is None else near * rho.double().unsqueeze(-1)
        near = near.unflatten(-1, (groups, -1))
        exact = torch.einsum("jngc,jgdc->ngd", near, taps.double().unflatten(1, (groups, -1)))
        exact = exact.flatten(1) + bias
        torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=1e-4)
        leaves, grad = [t for t in parts if t is not None], torch.randn_like(out)
        wanted = torch.autograd.grad(exact, leaves, grad.double())
        for deterministic in (False, True):
            torch.use_deterministic_algorithms(deterministic)
            try:
                found = torch.autograd.grad(out, leaves, grad, retain_graph=True)
            finally:
                torch.use_deterministic_algorithms(False)
            for a, b in zip(found, wanted, strict=True):
                torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("weighted", [False, True])
    def test_the_operators_keep_the_rules_of_torch(self, weighted):
        rows, taps, rho = on(torch.randn(9, 4), torch.randn(2, 6, 2), torch.rand(2, 7))
        index = torch.randint(9, (2, 7)).to(DEVICE)
        rho = rho if weighted else None
        for leaf in (rows, taps):
            leaf.requires_grad_()
        forward = (rows, index, rho, taps, None, 2, True)
        grad = torch.ones(7, 6, device=DEVICE)
        backward = (rows.detach(), index, rho, taps.detach(), grad, 2, [True, True])
        operators = torch.ops.convnn_geo
        torch.library.opcheck(operators.gather_taps.default, forward)
        torch.library.opcheck(operators.gather_taps_backward.default, backward)

    @pytest.mark.parametrize("groups", [1, 2, 8])
    def test_sums_in_parts_and_in_a_fixed_order(self, monkeypatch, groups):
        from convnn_geo.gpu import scatter
        from convnn_geo.gpu import taps as kernels

        monkeypatch.setattr(scatter, "_PART", 32)
        rows, taps = on(torch.randn(15, 8), torch.randn(2, 16, 8 // groups))
        index = torch.randint(-1, 15, (2, 150)).to(DEVICE)
        rho, grad = on(torch.rand(2, 150), torch.randn(150, 16))
        found = []
        for deterministic in (False, True, True):
            torch.use_deterministic_algorithms(deterministic)
            try:
                parts = (rows, index, rho, taps, grad, groups, (True, True))
                found.append(kernels.gather_taps_backward(*parts))
            finally:
                torch.use_deterministic_algorithms(False)
        for a, b, again in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)
            assert torch.equal(b, again)
        near = F.pad(rows.double(), (0, 0, 0, 1))[index] * rho.double().unsqueeze(-1)
        near = near.unflatten(-1, (groups, -1))
        exact = torch.einsum("jngc,ngd->jgdc", near, grad.double().unflatten(1, (groups, -1)))
        torch.testing.assert_close(found[0][2].double(), exact.flatten(1, 2), rtol=1e-4, atol=1e-4)

    def test_the_deterministic_backward_is_triton_s_own(self, monkeypatch):
        monkeypatch.setattr(torch.Tensor, "index_add_", waited)
        layer = ConvNN2d(8, 12, k=4, metric="cosine", backend="triton").to(DEVICE)
        x = torch.randn(2, 8, 5, 4, device=DEVICE, requires_grad=True)
        out = layer(x)
        torch.use_deterministic_algorithms(True)
        try:
            torch.autograd.grad(out.sum(), x)
        finally:
            torch.use_deterministic_algorithms(False)

    def test_no_targets(self):
        rows, taps = on(torch.randn(9, 4), torch.randn(2, 6, 4))
        for leaf in (rows, taps):
            leaf.requires_grad_()
        index = torch.zeros(2, 0, dtype=torch.long, device=DEVICE)
        out = torch.ops.convnn_geo.gather_taps(rows, index, None, taps, None, 1, True)
        assert out.shape == (0, 6)
        assert not any(g.any() for g in torch.autograd.grad(out.sum(), (rows, taps)))

    def test_the_backend_searches_as_well(self, monkeypatch):
        from convnn_geo.search import ENGINES

        layer = ConvNN2d(10, 6, k=4, metric="cosine", backend="triton").to(DEVICE)
        x = torch.randn(1, 10, 4, 4, device=DEVICE)
        assert "search             triton (as backend='triton' has it)" in explain(layer, x)
        asked, run_ = [], ENGINES["triton"].run
        monkeypatch.setattr(ENGINES["triton"], "run", lambda q: asked.append(q) or run_(q))
        layer(x)
        assert len(asked) == 1
        layer.search = "dense"
        assert "dense (asked for)" in explain(layer, x)

    @pytest.mark.parametrize("dtype", HALVES[1:])
    def test_half_precision(self, dtype):
        from convnn_geo.gpu.taps import gather_taps

        rows, taps = on(torch.randn(30, 16).to(dtype), torch.randn(3, 8, 16).to(dtype))
        index = torch.randint(-1, 30, (3, 21)).to(DEVICE)
        out = gather_taps(rows, index, None, taps, None, 1)
        near = F.pad(rows.double(), (0, 0, 0, 1))[index]
        exact = torch.einsum("jnc,jdc->nd", near, taps.double())
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), exact, rtol=0.02, atol=0.05)

    @pytest.mark.parametrize("options", [{}, {"groups": 2}, {"kernel": "separable"}])
    def test_the_layer_is_the_same_by_gather(self, options):
        layer = ConvNN2d(8, 12, k=4, metric="cosine", **options).to(DEVICE)
        x = torch.randn(2, 8, 5, 4, device=DEVICE, requires_grad=True)
        found = []
        for backend in ("triton", "gather"):
            layer.backend = backend
            out = layer(x)
            found.append([out, *torch.autograd.grad(out.square().sum(), [x, *layer.parameters()])])
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_what_can_not_run_says_why():
    op = ConvNNAttention(16, 2, k=3).operation(torch.randn(1, 8, 16))
    if DEVICE == "cpu" and not gpu.interpreted():
        with pytest.raises(ValueError, match=r"for GPUs|not installed"):
            run(op, "triton")
    assert choose(op)[0].backend != "triton"  # until it is timed on a GPU


@pytest.mark.parametrize(
    "make, reason",
    [
        (lambda: ConvNNAttention(16, 2, k=3, metric="euclidean"), "the metric is not bilinear"),
        (lambda: ConvNNAttention(16, 2, k=3).double(), "values are torch.float64"),
        (lambda: ConvNNAttention(16, 2), "neighbours are not simply the k nearest"),
    ],
)
def test_refusals(monkeypatch, make, reason):
    monkeypatch.setattr(gpu, "refuses", lambda device: None)
    layer = make()
    layer.backend = "triton"
    x = torch.randn(1, 8, 16, dtype=layer.out_proj.weight.dtype)
    with pytest.raises(ValueError, match=reason):
        explain(layer, x, need_weights=False)


class TestAutocast:
    pytestmark = TRITON
    """Layers in half precision whose distances stay in float32."""

    def found(self, layer, x, backend):
        layer.backend = backend
        with torch.autocast(DEVICE, torch.bfloat16):
            out = layer(x)
        out = out if isinstance(out, torch.Tensor) else out[0]
        parameters = [p for p in layer.parameters() if p.requires_grad]
        return out, torch.autograd.grad(out.float().square().sum(), parameters)

    @pytest.mark.parametrize("kind", ["attention", "convolution"])
    def test_a_layer_is_the_same_by_gather(self, kind):
        if kind == "attention":
            layer = ConvNNAttention(32, 2, k=5).to(DEVICE)
            x = torch.randn(2, 20, 32, device=DEVICE)
            layer.forward = functools.partial(layer.forward, need_weights=False)
        else:
            layer = ConvNN2d(8, 6, k=9, metric="cosine").to(DEVICE)
            x = torch.randn(2, 8, 6, 5, device=DEVICE)
        (out, grads), (other, others) = (self.found(layer, x, b) for b in ("triton", "gather"))
        assert out.dtype == other.dtype == torch.bfloat16
        torch.testing.assert_close(out, other, rtol=0.05, atol=0.05)
        for a, b in zip(grads, others, strict=True):
            assert a.dtype == torch.float32
            torch.testing.assert_close(a, b, rtol=0.1, atol=0.03 * float(b.abs().max()) + 1e-3)


LAYERS = {
    "convolution": lambda: ConvNN2d(10, 6, k=4, metric="cosine", backend="triton"),
    "weighted": lambda: ConvNN2d(
        10, 6, k=4, metric="cosine", weighting="softmax", backend="triton"
    ),
    "convolution by differences": lambda: ConvNN2d(3, 6, k=4, metric="euclidean", backend="triton"),
    "attention": lambda: ConvNNAttention(16, 2, k=3, backend="triton"),
    "mixed attention": lambda: ConvNNAttention(
        16, 2, k=3, metric=interpolate("squared_spatial", "scaled_dot", 0.5), backend="triton"
    ),
}


def called(layer):
    """A call of a layer on inputs of its own, forward and backward."""
    layer = layer.to(DEVICE)
    image = isinstance(layer, ConvNN2d)
    shape = (2, layer.in_channels, 5, 4) if image else (2, 20, layer.embed_dim)
    x = torch.randn(shape, device=DEVICE, requires_grad=True)
    if image:
        layer.search = "triton"

    def call():
        out = layer(x) if image else layer(x, x, x, need_weights=False)[0]
        return out, *torch.autograd.grad(out.float().square().sum(), [x, *layer.parameters()])

    return call


@pytest.mark.triton
@TRITON[1]
@pytest.mark.parametrize("name", LAYERS)
def test_the_host_never_waits_for_a_layer(name, monkeypatch):
    call = called(LAYERS[name]())
    wanted = call()
    for waiting in WAITING:
        monkeypatch.setattr(torch.Tensor, waiting, waited)
    found = call()
    monkeypatch.undo()
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.triton
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
@pytest.mark.parametrize("name", LAYERS)
def test_a_cuda_graph_replays_a_layer(name):
    call = called(LAYERS[name]())
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, and makes what is made once
        wanted = [tuple(t.detach() for t in call()) for _ in range(3)][-1]
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = call()
    for tensor in found:
        tensor.detach().zero_()
    graph.replay()
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.triton
@TRITON[1]
@pytest.mark.parametrize("name", ["convolution by differences", "attention"])
def test_one_graph_holds_a_layer(name):
    layer = LAYERS[name]().to(DEVICE)
    image = isinstance(layer, ConvNN2d)
    shape = (1, layer.in_channels, 3, 4) if image else (1, 9, layer.embed_dim)
    x = torch.randn(shape, device=DEVICE, requires_grad=True)

    def call(x):
        return layer(x) if image else layer(x, need_weights=False)[0]

    torch._dynamo.reset()
    once = torch.compile(call, backend="aot_eager", fullgraph=True)
    for a, b in zip(*(torch.autograd.grad(f(x).sum(), x) for f in (once, call)), strict=True):
        torch.testing.assert_close(a, b)


def learn(rank, folder):
    """One of two processes that share a layer: its gradient is the mean of both."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2
    )
    torch.manual_seed(0)
    layer = ConvNNAttention(8, 2, k=3, backend="triton")
    x = torch.randn(2, 1, 7, 8)
    shared = torch.nn.parallel.DistributedDataParallel(layer)
    shared(x[rank], need_weights=False)[0].square().sum().backward()
    found = layer.in_proj_weight.grad.clone()
    layer.zero_grad()
    for part in x:
        (layer(part, need_weights=False)[0].square().sum() / 2).backward()
    torch.testing.assert_close(found, layer.in_proj_weight.grad)
    torch.distributed.destroy_process_group()


@pytest.mark.triton
@pytest.mark.skipif(not gpu.interpreted(), reason="processes on the CPU, without a GPU each")
def test_processes_learn_together(tmp_path):
    torch.multiprocessing.spawn(learn, (tmp_path,), nprocs=2)
