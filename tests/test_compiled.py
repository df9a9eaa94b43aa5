"""What is in C against plain sums in float64: search, attention over the nearest, taps."""

import math
import platform
import shutil
from functools import reduce

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from convnn_geo import compiled
from convnn_geo.compiled import build
from convnn_geo.lowering import choose, explain, run
from convnn_geo.metrics.chosen import of_pairs
from convnn_geo.nn import ConvNN2d, ConvNNAttention
from convnn_geo.nn.functional import knn_attention
from convnn_geo.search import knn
from convnn_geo.search.problem import Problem
from convnn_geo.search.windows import among_all

pytestmark = pytest.mark.skipif(compiled.library() is None, reason="no C compiler")

KINDS = ("points", "angles", "products")


@pytest.fixture(scope="module", params=["", "-mno-avx512f", "-mno-avx"])
def processor(request):
    """The library as it is built for this processor, and for those with shorter vectors."""
    if not request.param:
        yield build.library()
        return
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("flags of x86")
    compiler = [shutil.which("cc"), request.param]
    found = build._compiled(compiler, (*build._FLAGS, "-march=native", "-fopenmp"))
    build.declare(found)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "library", lambda: found)
        yield found


def distances(kind, q, keys, bias=None, scale=1.0):
    few = kind != "products" and q.shape[-1] <= 8  # which are compared in float32, axis by axis
    q, keys = (q, keys) if few else (q.double(), keys.double())
    if kind == "products":
        values = -scale * (q @ keys.transpose(-1, -2))
        return values if bias is None else values + bias.double().unsqueeze(-2)
    squares = (q.unsqueeze(-2) - keys.unsqueeze(-3)).square()
    values = reduce(torch.add, squares.unbind(-1)) if few else squares.sum(-1)
    if kind == "points":
        return values
    zero = (q.norm(dim=-1) < 0.5).unsqueeze(-1) | (keys.norm(dim=-1) < 0.5).unsqueeze(-2)
    return (values / 2).masked_fill(zero, 1.0)


def expected(kind, q, keys, k, bias=None, scale=1.0, mask=None, own=None, less=None):
    values = distances(kind, q, keys, bias, scale)
    values = (values if less is None else values - less.double()).float()
    if mask is not None:
        values = values.masked_fill(~mask, torch.inf)
    if own is not None:
        columns = torch.arange(keys.shape[-2])
        values = values.masked_fill(columns == own.unsqueeze(-1), torch.inf)
    best, place = values.sort(dim=-1, stable=True)
    return best[..., :k], place[..., :k]


def points(kind, *shape):
    x = torch.randn(*shape)
    if kind == "angles":
        x = F.normalize(x, dim=-1)
        x[..., ::5, :] = 0.0
    return x


def is_nearest(kind, q, keys, k, **options):
    best, place = expected(kind, q, keys, k, **options)
    values, found = compiled.products_nearest(kind, q, keys, k, **options)
    assert torch.equal(found, place)
    torch.testing.assert_close(values, best, rtol=1e-6, atol=1e-7)
    _, rough = compiled.products_nearest(kind, q, keys, k, exact=False, **options)
    assert torch.equal(rough, place)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "n, m, d, k", [(1, 1, 9, 1), (30, 70, 1, 9), (60, 200, 3, 9), (7, 31, 12, 5), (50, 300, 33, 9)]
)
def test_the_nearest_by_products(processor, kind, n, m, d, k):
    is_nearest(kind, points(kind, 2, n, d), points(kind, 2, m, d), k)
    is_nearest(kind, points(kind, n, d), points(kind, m, d), min(m, 256))


@pytest.mark.parametrize("kind", KINDS)
def test_ties_go_to_the_lowest_index(processor, kind):
    lattice = torch.randint(3, (2, 200, 10)).float()
    q = F.normalize(lattice, dim=-1) if kind == "angles" else lattice
    is_nearest(kind, q, q, 9)
    same = q[:, :1].expand(2, 200, 10)
    is_nearest(kind, same, same, 20)


def test_far_from_the_origin_and_close_together(processor):
    x = torch.randn(100, 24)
    is_nearest("points", x + 1e6, x + 1e6, 9)
    is_nearest("points", x * 1e-12, x * 1e-12, 9)
    is_nearest("points", x * 1e9, x * 1e9, 9)
    near = 1 + torch.randint(4, (60, 16)) * torch.finfo(torch.float32).eps
    is_nearest("points", near, near, 9)


@pytest.mark.parametrize("kind", ["points", "products"])
@pytest.mark.parametrize("factor", [5.0, 100.0, 1e4, 1e8])
@pytest.mark.parametrize("d, k", [(3, 5), (20, 5), (20, 120)])
def test_a_few_far_longer_than_the_rest(processor, kind, factor, d, k):
    """Whom all but a few look past, or, of products, many choose."""
    x = torch.randn(2, 260, d)
    x[:, [3, 70]] *= factor  # one of them twice, but for its last bits
    x[:, 71] = x[:, 70] * (1 + 1e-7 * torch.randint(-2, 3, (2, d)))
    x[1, 200] = x[1, 3]
    bias = torch.randn(2, 260) if kind == "products" else None
    mask = torch.rand(2, 260, 260) < 0.7
    is_nearest(kind, x, x, k, bias=bias, scale=0.3)
    is_nearest(kind, x[:, :50], x, k, bias=bias, scale=0.3, mask=mask[:, :50])
    is_nearest(kind, x, x, k, bias=bias, scale=0.3, own=torch.arange(260))
    spread = x * torch.rand(2, 260, 1) ** -4  # no few, but ever fewer
    is_nearest(kind, spread, spread, k, bias=bias, scale=0.3)


def test_products_of_what_has_no_square(processor):
    torch.manual_seed(0)
    for _ in range(20):  # nearly orthogonal: rounding is all there is
        q, keys = torch.randn(1, 16) * 1e-24, torch.randn(12, 16)
        direction = q.double() / q.double().norm()
        keys = (keys.double() - (keys.double() @ direction.T) * direction).float() * 1e18
        is_nearest("products", q, keys, 4)
        index = torch.arange(12)[None]
        _, places, _ = compiled.windows_nearest("products", q, keys, 4, index)
        assert torch.equal(places, expected("products", q, keys, 4)[1])


@pytest.mark.parametrize("backend", ["auto", "gather"])
def test_masks_of_floats_at_their_ends(backend):
    q, k, v = torch.randn(3, 1, 5, 16)
    plain = knn_attention(q, k, v, 3, backend=backend)
    for value, where in ((torch.nan, slice(None)), (torch.inf, slice(None)), (torch.inf, 2)):
        mask = torch.zeros(5, 5)
        mask[1, where] = value
        out = knn_attention(q, k, v, 3, mask, backend=backend)
        assert out[0, 1].isnan().all()
        torch.testing.assert_close(out[0, [0, 2, 3, 4]], plain[0, [0, 2, 3, 4]])
    closed = torch.rand(5, 5) < 0.4
    wanted = knn_attention(q, k, v, 3, torch.zeros(5, 5).masked_fill(closed, -torch.inf))
    few = closed.sum(-1) <= 2  # elsewhere less is left open than is asked for
    for value in (-1e4, -1e9):
        out = knn_attention(q, k, v, 3, torch.zeros(5, 5).masked_fill(closed, value))
        torch.testing.assert_close(out[0, few], wanted[0, few])
    q, k, less = torch.zeros(1, 1, 9), torch.eye(9)[None], torch.arange(9.0)[None] * 1e-9
    found = knn_attention(
        q, k, torch.arange(9.0).view(1, 9, 1), 1, less, metric="cosine", backend=backend
    )
    assert found.item() == 0  # as far as float32 tells, all are as far


def test_keys_far_longer_than_the_rest_are_attended_to(processor):
    q, keys, value = torch.randn(3, 2, 3, 130, 16).unbind(0)
    keys[:, :, [0, 64]] *= 30
    given_ = ("products", q, keys, value, None, None, None, 9, 0.25, 1.0, "compiled", True, None)
    out, *_ = torch.ops.convnn_geo.neighbor_attention(*given_)
    torch.testing.assert_close(out.double(), by_hand(*given_[:-1], less=None), rtol=1e-5, atol=1e-5)


def test_bias_scale_mask_and_the_point_itself(processor):
    q, keys, bias = torch.randn(3, 20, 12), torch.randn(3, 40, 12), torch.randn(3, 40)
    is_nearest("products", q, keys, 6, bias=bias, scale=0.3)
    is_nearest("products", q, keys, 6, bias=bias[:1], scale=-2.0)
    mask = torch.rand(3, 20, 40) < 0.2
    mask[0, 3] = False
    for part in (mask, mask[0], mask[:, :1], mask[:1, :1]):
        is_nearest("products", q, keys, 12, mask=part)
        is_nearest("points", q, keys, 12, mask=part)
    is_nearest("points", keys, keys, 7, own=torch.arange(40))
    is_nearest("points", keys, keys, 7, own=torch.full((40,), -1))


def test_a_scale_that_no_float32_holds(processor):
    x = torch.randint(9, (300, 3)) * torch.rand(300, 1).round(decimals=1)
    is_nearest("products", x, x, 9, scale=3**-0.5)


def test_heads_may_be_strided_shared_and_broadcast(processor):
    packed = torch.randn(2, 30, 4 * 16).unflatten(-1, (4, 16)).transpose(1, 2)
    is_nearest("products", packed, packed, 5)
    is_nearest("products", packed, packed[:1, :1], 5)
    is_nearest("products", packed[0, 0], packed, 5)
    is_nearest("points", torch.randn(16, 30).t(), packed, 5)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 40), st.integers(1, 150), st.integers(1, 40), st.data())
def test_the_nearest_of_any_size(n, m, d, data):
    k = data.draw(st.integers(1, min(m, 256)))
    kind = data.draw(st.sampled_from(KINDS))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    q, keys = points(kind, n, d), points(kind, m, d)
    if data.draw(st.booleans()):
        q, keys = q.round(decimals=0), keys.round(decimals=0)
        if kind == "angles":
            q, keys = F.normalize(q, dim=-1), F.normalize(keys, dim=-1)
    is_nearest(kind, q, keys, k)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf, 3e38])
@pytest.mark.parametrize("where", ["q", "keys", "bias"])
def test_what_is_not_finite_is_not_served(bad, where):
    parts = {"q": torch.randn(20, 12), "keys": torch.randn(30, 12), "bias": torch.randn(30)}
    parts[where][7] = bad
    if where == "bias" and bad == 3e38:
        parts["q"] *= 1e38
    found = compiled.products_nearest(
        "products", parts["q"], parts["keys"], 3, bias=parts["bias"], scale=1.0
    )
    assert found is None


def test_what_is_not_served():
    x = torch.randn(200, 12)
    assert compiled.products_nearest("points", x.double(), x.double(), 3) is None
    assert compiled.products_nearest("points", x.half(), x.half(), 3) is None
    assert compiled.products_nearest("points", x.repeat(2, 1), x.repeat(2, 1), 257) is None
    assert compiled.products_nearest("points", x[:0], x, 3) is None
    assert compiled.products_nearest("points", x.to("meta"), x.to("meta"), 3) is None


def test_dense_gives_the_same_with_and_without(monkeypatch):
    x = torch.randn(2, 150, 24)
    x[:, 50:60] = x[:, :10]
    for metric in ("euclidean", "cosine", "dot", "squared_euclidean", "pearson"):
        found = knn(x, k=9, metric=metric, backend="dense")
        with monkeypatch.context() as patch:
            patch.setattr(build, "library", lambda: None)
            plain = knn(x, k=9, metric=metric, backend="dense")
        assert torch.equal(found.index, plain.index)
        torch.testing.assert_close(found.distance, plain.distance, rtol=1e-6, atol=1e-6)


# -- attention ------------------------------------------------------------------------------


def by_hand(kind, q, keys, value, bias, mask, keep, k, scale, temperature, *_, less):
    """In float64, with gradient: a softmax over the chosen alone."""
    place = expected(kind, q, keys, k, bias, scale, mask, less=less)[1]
    score = -distances(kind, q, keys, bias, scale)
    score = (score if less is None else score + less) / temperature
    if mask is not None:
        score = score.masked_fill(~mask, -torch.inf)
    score = score.gather(-1, place.expand(*score.shape[:-1], k))
    empty = (score == -torch.inf).all(-1, keepdim=True)
    weight = score.masked_fill(empty, 0.0).softmax(-1).masked_fill(empty, 0.0)
    weight = weight if keep is None else weight * keep
    lead = torch.broadcast_shapes(weight.shape[:-2], value.shape[:-2])
    rows = value.double().expand(*lead, *value.shape[-2:]).unsqueeze(-3)
    index = place.expand(*lead, *place.shape[-2:]).unsqueeze(-1)
    shape = (*lead, q.shape[-2], *value.shape[-2:])
    near = rows.expand(shape).gather(-2, index.expand(*index.shape[:-1], value.shape[-1]))
    return (weight.unsqueeze(-1) * near).sum(-2)


def windows(n, m, width):
    """Candidates of each target, none twice, in any order, and a mask that leaves some none."""
    index = torch.stack([torch.randperm(m)[:width] for _ in range(n)])
    mask = torch.rand(n, width) < 0.7
    mask[0] = False
    return index, mask


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize(
    "d, width, k", [(3, 20, 5), (33, 20, 5), (16, 200, 9), (24, 9, 9), (9, 140, 128), (9, 300, 256)]
)
@pytest.mark.parametrize("near", [False, True])
def test_the_nearest_of_ones_own_candidates(processor, kind, masked, d, width, k, near):
    torch.manual_seed(0)
    m = max(50, width)
    q, keys = points(kind, 2, 30, d), points(kind, 2, m, d)
    if near:  # told apart by the last bits alone, or not at all
        keys = keys[:, :1] * (1 + 1e-7 * torch.randint(-2, 3, keys.shape))
    bias = torch.randn(2, m) if kind == "products" and not near else None
    index, mask = windows(30, m, width)
    mask, own = (mask, index[:, 1].clone()) if masked else (None, None)
    open_ = torch.zeros(30, m, dtype=torch.bool)
    open_.scatter_(1, index, True if mask is None else mask)
    best, place = expected(kind, q, keys, k, bias, 0.3, open_, own)
    found = compiled.windows_nearest(kind, q, keys, k, index, mask, bias, 0.3, own)
    values, places, kept = found
    assert torch.equal(kept, best < torch.inf)
    assert torch.equal(places[kept], place[kept])
    torch.testing.assert_close(values, best, rtol=1e-5, atol=1e-5)
    nearest = places[..., :1].where(kept[..., :1], 0)
    assert (places == nearest).masked_fill(kept, True).all()


@pytest.mark.parametrize("size", [(7, 9), (9, 14)], ids=["among all", "in windows"])
@pytest.mark.parametrize("mode", ["zeros", "circular", "reflect"])
@pytest.mark.parametrize("metric", ["cosine", "euclidean", "dot", "spatial"])
@pytest.mark.parametrize("options", [{}, {"self_point": "excluded"}, {"order": "rank"}])
def test_layers_choose_in_their_windows_without_a_compiler_too(
    monkeypatch, size, mode, metric, options
):
    layer = ConvNN2d(12, 5, 3, padding=1, k=4, metric=metric, padding_mode=mode, **options)
    x = torch.randint(3, (2, 12, *size)).float().requires_grad_()
    found = []
    for compile_ in (True, False):
        if not compile_:
            monkeypatch.setattr(build, "library", lambda: None)
        out = layer(x)
        (grad,) = torch.autograd.grad(out.square().sum(), x)
        found.append((layer.operation(x).neighborhood(), out, grad))
    (one, *results), (other, *wanted) = found
    masks = [torch.ones_like(h.index).bool() if h.mask is None else h.mask for h in (one, other)]
    assert torch.equal(*masks)
    assert torch.equal(one.index[masks[0]], other.index[masks[0]])
    for a, b in zip(results, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("m", [40, 400], ids=["among all", "in windows"])
@pytest.mark.parametrize("twice", [False, True])
def test_candidates_of_ones_own_however_many(monkeypatch, m, twice):
    """A few, or so many that all are looked at; some named twice are two, as by torch."""
    torch.manual_seed(0)
    q, keys = torch.randint(3, (2, 30, 12)).float(), torch.randint(3, (2, m, 12)).float()
    index, mask = windows(30, m, 9)
    if twice:
        index[:, 1], mask[:, :2] = index[:, 0], True
    rest = ("points", q, keys, None, None, 1.0, False, False, 4, index, mask, index[:, 2], 2**20)
    found = torch.ops.convnn_geo.nearest_in_windows(*rest)
    monkeypatch.setattr(build, "library", lambda: None)
    wanted = torch.ops.convnn_geo.nearest_in_windows(*rest)
    kept = wanted[2]
    assert torch.equal(found[2], kept) and torch.equal(found[1][kept], wanted[1][kept])
    torch.testing.assert_close(found[0][kept], wanted[0][kept])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e20, 4e18])
def test_a_source_that_no_window_tells_apart(processor, kind, bad):
    """It spoils the rounding of all, and their neighbours no more than it must."""
    q, (index, mask) = points(kind, 1, 90, 20), windows(90, 90, 9)
    q[0, 40, 3] = bad
    _, places, kept = compiled.windows_nearest(kind, q, q, 4, index, mask, None, 0.3, None)
    assert torch.equal(kept.sum(-1)[0], mask.sum(-1).clamp_max(4))
    near = (places[0].unsqueeze(-1) == index.unsqueeze(1)) & mask.unsqueeze(1)
    assert (near.any(-1) | ~kept[0]).all()
    fine = ((index != 40) | ~mask).all(-1) & (torch.arange(90) != 40)
    open_ = torch.zeros(90, 90, dtype=torch.bool)
    open_[torch.arange(90).unsqueeze(1).expand(90, 9)[mask], index[mask]] = True
    _, place = expected(kind, q, q, 4, None, 0.3, open_, None)
    kept &= fine.unsqueeze(-1)
    assert torch.equal(places[kept], place[kept])


def test_distances_at_the_end_of_what_float32_holds(processor):
    q, index = torch.zeros(1, 90, 32), windows(90, 90, 9)[0]
    keys = torch.full((1, 90, 32), (0.99999 * torch.finfo(torch.float32).max / 32) ** 0.5)
    _, places, kept = compiled.windows_nearest("points", q, keys, 4, index)
    assert kept.all() and torch.equal(places[0], index.sort(-1).values[:, :4])


def test_windows_on_a_gpu_are_no_matter_of_this():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        q = torch.empty(1, 64, 16, device="cuda")
        index = torch.empty(64, 9, dtype=torch.long, device="cuda")
        problem = Problem("points", q, q, None, 1.0, torch.float32)
        assert among_all(problem, 4, index, None, None, 2**23) is None


def test_candidates_in_32_bits():
    x = torch.randn(1, 400, 16)
    index = windows(400, 400, 12)[0]
    wide = ("points", x, x, None, None, 1.0, False, False, 4, index, None, None, 2**23)
    for a, b in zip(
        torch.ops.convnn_geo.nearest_in_windows(*wide),
        torch.ops.convnn_geo.nearest_in_windows(*wide[:9], index.int(), *wide[10:]),
        strict=True,
    ):
        assert torch.equal(a, b)
    assert compiled.windows_nearest("points", x, x, 4, index.int()) is None


def test_leading_axes_that_share_what_others_do_not():
    """Copies would have to be made, of all pairs' masks even."""
    q = torch.randn(4, 3, 2, 20, 16)
    for k, mask in ((q, torch.randn(1, 3, 1, 20, 20)), (q[:, :1], None), (q[:1, :1], None)):
        served = k.shape[1] == 1 and k.shape[0] == 1
        given_ = ("products", q, k, k, None, None, None, 5, 0.4, 0.7, mask)
        assert (compiled.attention(*given_) is not None) == served
        found = knn_attention(q, k, k, 5, mask)
        wide = k.expand(4, 3, 2, 20, 16)
        wanted = knn_attention(q, wide, wide, 5, mask, backend="gather")
        torch.testing.assert_close(found, wanted)


def test_the_operator_for_windows_keeps_the_rules_of_torch():
    x, (index, mask) = torch.randn(2, 30, 12), windows(30, 30, 9)
    for points_, at, own in (
        (x, index, None),
        (x, index[None], torch.arange(30)),
        (x[0], index, None),
        (x[0], index[None], None),
        (x, index.expand(2, 30, 9), None),
    ):
        given_ = (
            "points",
            points_,
            points_,
            None,
            None,
            1.0,
            False,
            False,
            4,
            at,
            mask,
            own,
            2**20,
        )
        torch.library.opcheck(torch.ops.convnn_geo.nearest_in_windows.default, given_)


CASES = {
    "heads": ((2, 3, 17, 16), (2, 3, 29, 16), (2, 3, 29, 16), {}),
    "wide values": ((1, 2, 9, 8), (1, 2, 40, 8), (1, 2, 40, 70), {}),
    "one head": ((21, 12), (33, 12), (33, 5), {}),
    "windows": ((2, 3, 2, 9, 8), (2, 3, 2, 13, 8), (2, 3, 2, 13, 8), {"keep": (2, 3, 2, 9, 5)}),
    "windows that share": (
        *((2, 1, 4, 17, 16), (1, 3, 1, 29, 16), (2, 3, 4, 29, 16)),
        {"mask": (2, 1, 1, 17, 29), "less": (4, 17, 29)},
    ),
    "shared keys": ((2, 3, 17, 16), (1, 1, 29, 16), (2, 1, 29, 16), {}),
    "bias": ((2, 3, 17, 16), (2, 3, 29, 16), (2, 3, 29, 16), {"bias": (2, 1, 29)}),
    "mask": ((2, 3, 17, 16), (2, 3, 29, 16), (2, 3, 29, 16), {"mask": (2, 1, 17, 29)}),
    "keep": ((2, 3, 17, 16), (2, 3, 29, 16), (2, 3, 29, 16), {"keep": (2, 3, 17, 5)}),
    "less": ((2, 3, 17, 16), (2, 3, 29, 16), (2, 3, 29, 16), {"less": (2, 3, 17, 29)}),
    "less alike": ((2, 3, 17, 12), (2, 3, 29, 12), (2, 3, 29, 12), {"less": (3, 17, 29)}),
    "less of keys": (
        *((2, 3, 17, 8), (2, 3, 29, 8), (2, 3, 29, 8)),
        {"less": (2, 1, 1, 29), "mask": (17, 29), "keep": (2, 3, 17, 5)},
    ),
    "one key": ((2, 1, 4, 16), (2, 1, 1, 16), (2, 1, 1, 16), {"k": 1}),
    "all keys": ((1, 2, 9, 12), (1, 2, 11, 12), (1, 2, 11, 12), {"k": 11}),
    "most keys": ((1, 2, 9, 12), (1, 2, 150, 12), (1, 2, 150, 12), {"k": 130}),
    "many keys": ((1, 2, 9, 5), (1, 2, 500, 5), (1, 2, 500, 5), {"k": 256}),
}


def arguments(kind, case):
    q_shape, key_shape, value_shape, options = CASES[case]
    q, keys, value = points(kind, *q_shape), points(kind, *key_shape), torch.randn(value_shape)
    bias = torch.randn(options["bias"]) if "bias" in options and kind == "products" else None
    mask = torch.rand(options["mask"]) < 0.4 if "mask" in options else None
    if mask is not None:
        mask[..., 0, :] = False
    keep = (torch.rand(options["keep"]) < 0.5) * 2.0 if "keep" in options else None
    less = torch.randn(options["less"]) if "less" in options else None
    count = options.get("k", 5)
    return kind, q, keys, value, bias, mask, keep, count, 0.4, 0.7, "compiled", True, less


def check_attention(kind, case):
    given_ = arguments(kind, case)
    kind, q, keys, value, bias, *rest = given_
    leaves = [t for t in (q, keys, value, bias, rest[-1]) if t is not None]
    for leaf in leaves:
        leaf.requires_grad_()
    out, weight, _ = torch.ops.convnn_geo.neighbor_attention(*given_)
    exact = by_hand(*given_[:-1], less=given_[-1])
    torch.testing.assert_close(out.double(), exact, rtol=1e-5, atol=1e-5)
    if rest[0] is None:
        assert weight.sum(-1).sub(1).abs().max() < 1e-5
    grad = torch.randn_like(out)
    found = torch.autograd.grad(out, leaves, grad)
    # Angles measure halves of squared differences: the gradient of vectors taken by themselves.
    wanted = torch.autograd.grad(exact, leaves, grad.double())
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_attention_over_the_nearest(processor, kind, case):
    check_attention(kind, case)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_attention_over_the_nearest_without_a_compiler(monkeypatch, kind, case):
    monkeypatch.setattr(build, "library", lambda: None)
    check_attention(kind, case)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_attention_in_half_precision(processor, dtype):
    """As in float32, and what comes out is rounded."""
    halves = [t.requires_grad_() for t in torch.randn(3, 2, 3, 17, 16).to(dtype)]
    wide = [t.detach().float().requires_grad_() for t in halves]
    rest = (None, None, None, 5, 0.4, 0.7, "compiled")
    found, exact = (
        torch.ops.convnn_geo.neighbor_attention("products", *given_, *rest)
        for given_ in (halves, wide)
    )
    assert found[0].dtype == dtype and found[0].stride() == exact[0].stride()
    assert torch.equal(found[0], exact[0].to(dtype)) and torch.equal(found[1], exact[1])
    grad = torch.randn_like(found[0])
    exact = torch.autograd.grad(exact[0], wide, grad.float())
    for a, b in zip(torch.autograd.grad(found[0], halves, grad), exact, strict=True):
        assert a.dtype == dtype and torch.equal(a, b.to(dtype))
    op = torch.ops.convnn_geo.neighbor_attention.default
    torch.library.opcheck(op, ("products", *halves, *rest))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_layer_in_half_precision_attends_in_one_operator(dtype):
    layer, x = ConvNNAttention(32, 2, k=5, dtype=dtype), torch.randn(2, 20, 32).to(dtype)
    assert "runs by: neighbor_attention" in explain(layer, x, need_weights=False)
    out = layer(x, need_weights=False)[0]
    wanted = layer.float()(x.float(), need_weights=False)[0]
    torch.testing.assert_close(out, wanted.to(dtype), rtol=0.02, atol=0.02)


def test_attention_weights_that_vanish(processor):
    q = torch.tensor([[[100.0] + [0.0] * 11]])
    keys = torch.zeros(1, 6, 12)
    keys[0, :, 0] = torch.tensor([1.0, 0.9, 0.5, 0.0, -1.0, -1e4])
    value = torch.eye(6)[None]
    out, weight, _ = torch.ops.convnn_geo.neighbor_attention(
        *("products", q, keys, value, None, None, None, 6, 1.0, 1.0, "compiled")
    )
    wanted = (q @ keys.transpose(-1, -2)).softmax(-1)
    torch.testing.assert_close(out, wanted, rtol=1e-6, atol=1e-30)
    assert weight[..., -1].item() == 0


@pytest.mark.parametrize("case", ["bias", "less alike"])
def test_attention_operators_keep_the_rules_of_torch(case):
    given_ = arguments("products", case)
    for leaf in (*given_[1:5], given_[-1]):
        if leaf is not None:
            leaf.requires_grad_()
    torch.library.opcheck(torch.ops.convnn_geo.neighbor_attention.default, given_)
    kind, q, keys, value, _, _, keep, _, scale, temperature, engine, _, _ = given_
    out, weight, place = torch.ops.convnn_geo.neighbor_attention(*given_)
    back = (kind, q, keys, value, keep, scale, temperature, engine)
    back = (*back, torch.ones_like(out), weight, place)
    back = tuple(t.detach() if isinstance(t, torch.Tensor) else t for t in back)
    for more in ((), (True, torch.ones_like(weight).detach()), (False, None, True)):
        torch.library.opcheck(
            torch.ops.convnn_geo.neighbor_attention_backward.default, (*back, *more)
        )


LAYERS = {
    "plain": {},
    "cosine": {"metric": "cosine"},
    "squared": {"metric": "squared_euclidean"},
    "dropout": {"dropout": 0.3},
    "extra keys": {"add_bias_kv": True, "add_zero_attn": True},
}


@pytest.mark.parametrize("weighed", [False, True])
@pytest.mark.parametrize("options", LAYERS.values(), ids=LAYERS)
@pytest.mark.parametrize("masked", [False, True, "by floats"])
def test_the_layer_is_the_same_by_gather(options, masked, weighed):
    torch.manual_seed(0)
    layer = ConvNNAttention(48, 3, k=7, **options)
    x = torch.randn(2, 33, 48, requires_grad=True)
    call = {"need_weights": weighed}
    if masked:
        call["attn_mask"] = torch.rand(33, 33) < 0.5
        call["key_padding_mask"] = torch.arange(33).expand(2, 33) > torch.tensor([[20], [32]])
    leaves = [x, *layer.parameters()]
    if masked == "by floats":
        scores = torch.randn(6, 33, 33).masked_fill(call["attn_mask"], -torch.inf)
        call["attn_mask"] = scores.requires_grad_()
        leaves.append(scores)
    found = []
    for backend in ("compiled", "gather"):
        layer.backend = backend
        torch.manual_seed(3)
        out, weights = layer(x, **call)
        loss, results = out.square().sum(), [out]
        if weighed:
            assert "runs by: " + ("neighbor_attention" if backend == "compiled" else "gather") in (
                explain(layer, x, **call)
            )
            loss, results = loss + weights.square().sum(), [out, weights]
        found.append([*results, *torch.autograd.grad(loss, leaves)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("added", [False, True])
def test_weights_have_gradients_of_any_order(added):
    layer, found = ConvNNAttention(16, 2, k=4), []
    x = torch.randn(1, 9, 16, requires_grad=True)
    mask = torch.randn(9, 9, requires_grad=True) if added else None
    leaves = [x] if mask is None else [x, mask]
    for backend in ("compiled", "gather"):
        layer.backend = backend
        for loss in (
            lambda out, weights: weights.square().sum(),  # of weights alone
            lambda out, weights: (out.sum(-1) * weights.sum(-1)).square().sum() + weights.std(),
        ):
            out = layer(x, attn_mask=mask)
            slopes = torch.autograd.grad(loss(*out), leaves, create_graph=True)
            again = torch.autograd.grad(sum(s.square().sum() for s in slopes), leaves)
            found.append([*slopes, *again])
    for one, other in zip(found[:2], found[2:], strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


def test_weights_are_traced():
    layer = ConvNNAttention(16, 2, k=4, backend="compiled")
    x = torch.randn(2, 9, 16, requires_grad=True)
    found = []
    for call in (layer, torch.compile(layer, fullgraph=True, backend="aot_eager")):
        out, weights = call(x)
        loss = out.square().sum() + weights.square().sum()
        found.append([out, weights, *torch.autograd.grad(loss, [x, *layer.parameters()])])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_the_layer_attends_causally():
    layer = ConvNNAttention(16, 2, k=4)
    x = torch.randn(1, 12, 16)
    wanted = layer(x, need_weights=True, is_causal=True)[0]
    torch.testing.assert_close(layer(x, need_weights=False, is_causal=True)[0], wanted)


def test_a_nan_reaches_the_output_of_who_holds_it():
    layer = ConvNNAttention(16, 2, k=4)
    x = torch.randn(1, 12, 16)
    x[0, 5, 3] = torch.nan
    from convnn_geo.checks import checking

    with checking(False):
        out = layer(x, need_weights=False)[0]
    assert out[0, 5].isnan().all()


def test_the_layer_compiles_whole():
    layer = ConvNNAttention(16, 2, k=4, backend="compiled")
    x = torch.randn(2, 12, 16)
    fast = torch.compile(lambda t: layer(t, need_weights=False)[0], fullgraph=True, backend="eager")
    torch.testing.assert_close(fast(x), layer(x, need_weights=False)[0])


REFUSALS = {
    "the kernel is Taps": {"kernel": "standard"},
    "neighbours are not simply": {"self_point": "first"},
    "the metric is neither": {"metric": "euclidean"},
    "k=258 is over 256": {"k": 258},
}


@pytest.mark.parametrize("reason", REFUSALS)
def test_why_it_refuses(reason):
    layer = ConvNNAttention(32, 2, **{"k": 9, **REFUSALS[reason]})
    text = explain(layer, torch.randn(1, 260, 32), need_weights=False)
    assert f"neighbor_attention refused: {reason}" in text
    with pytest.raises(ValueError, match=reason):
        run(layer.operation(torch.randn(1, 260, 32)), "compiled")


def test_why_it_refuses_without_a_compiler(monkeypatch):
    monkeypatch.setattr(compiled, "library", lambda: None)
    op = ConvNNAttention(32, 2, k=9).operation(torch.randn(1, 20, 32))
    assert choose(op)[0].name == "gather"


# -- taps -----------------------------------------------------------------------------------


@pytest.mark.parametrize("n, k, c, d", [(1, 1, 1, 1), (9, 3, 5, 7), (70, 9, 16, 33), (8, 2, 3, 64)])
@pytest.mark.parametrize("weighted", [False, True])
def test_taps_on_gathered_rows(processor, n, k, c, d, weighted):
    rows, index = torch.randn(40, c), torch.randint(40, (k, n))
    taps, bias = torch.randn(k, d, c), torch.randn(d) if weighted else None
    rho = torch.rand(n, k).t() if weighted else None
    found = compiled.gather_taps(rows, index, rho, taps, bias)
    near = rows.double()[index]
    near = near if rho is None else near * rho.unsqueeze(-1)
    exact = torch.einsum("jnc,jdc->nd", near, taps.double())
    exact = exact if bias is None else exact + bias
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n, k, c", [(1, 1, 2), (9, 3, 5), (70, 9, 33), (8, 2, 64)])
@pytest.mark.parametrize("weighted", [False, True])
def test_depthwise_taps_on_gathered_rows(processor, n, k, c, weighted):
    rows, index = torch.randn(40, c), torch.randint(40, (n, k)).t()
    taps, bias = torch.randn(k, c, 1), torch.randn(c) if weighted else None
    rho = torch.rand(k, n) if weighted else None
    found = compiled.gather_taps(rows, index, rho, taps, bias, c)
    near = rows.double()[index] * taps.double().squeeze(-1).unsqueeze(1)
    near = near if rho is None else near * rho.unsqueeze(-1)
    exact = near.sum(0) if bias is None else near.sum(0) + bias
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("groups, weighted", [(1, False), (1, True), (2, True)])
def test_the_operator_of_taps_keeps_the_rules_of_torch(groups, weighted, dtype):
    rows, index = torch.randn(9, 4, dtype=dtype), torch.randint(9, (3, 7))
    taps, bias = torch.randn(3, 6, 4 // groups, dtype=dtype), torch.randn(6, dtype=dtype)
    rho = torch.rand(3, 7, dtype=dtype) if weighted else None
    leaves = [t.requires_grad_() for t in (rows, rho, taps, bias) if t is not None]
    given_ = (rows, index, rho, taps, bias, groups, False)
    torch.library.opcheck(torch.ops.convnn_geo.gather_taps.default, given_)
    if dtype == torch.float64:

        def run(*parts):
            rest = list(parts)
            x, weights = rest.pop(0), rest.pop(0) if weighted else None
            return torch.ops.convnn_geo.gather_taps(x, index, weights, *rest, groups, False)

        assert torch.autograd.gradcheck(run, leaves)
        assert torch.autograd.gradgradcheck(run, leaves)


def pairs_by_copies(kind, q, keys, index):
    near = torch.take_along_dim(
        keys.unsqueeze(-3), index.expand(*q.shape[:-1], -1).unsqueeze(-1), -2
    )
    q = q.unsqueeze(-2)
    return (q * near).sum(-1) if kind == "products" else (q - near).square().sum(-1)


@pytest.mark.parametrize("kind", ["products", "squares"])
@pytest.mark.parametrize("shape", [(7, 5), (1, 9, 33), (2, 3, 8, 16), (5, 6, 1)])
@pytest.mark.parametrize("k, shared", [(1, False), (4, False), (4, True), (0, False)])
def test_chosen_pairs_and_their_gradients(processor, kind, shape, k, shared):
    *lead, n, d = shape
    q, keys = torch.randn(shape), torch.randn(*lead, 11, d)
    index = torch.randint(0, 11, (n, k) if shared else (*lead, n, k))
    assert compiled.serves_pairs(q, keys, index)
    exact = pairs_by_copies(kind, q.double(), keys.double(), index)
    double = compiled.pairs(kind, q, keys, index, double=True)
    torch.testing.assert_close(double, exact, rtol=1e-13, atol=1e-13)
    assert torch.equal(compiled.pairs(kind, q, keys, index), double.float())
    leaves = [t.double().requires_grad_() for t in (q, keys)]
    grad = torch.randn(*lead, n, k)
    out = pairs_by_copies(kind, *leaves, index)
    wanted = torch.autograd.grad(out, leaves, grad.double())
    found = compiled.pairs_gradients(kind, q, keys, index, grad, (True, True))
    for one, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-5, atol=1e-5)
    assert compiled.pairs_gradients(kind, q, keys, index, grad, (True, False))[1] is None


@pytest.mark.parametrize("kind", ["products", "squares"])
def test_chosen_pairs_learn_twice(kind):
    q, keys, index = torch.randn(2, 6, 9), torch.randn(2, 8, 9), torch.randint(0, 8, (2, 6, 3))
    leaves, found = [q.requires_grad_(), keys.requires_grad_()], []
    for function in (of_pairs, pairs_by_copies):
        out = function(kind, *leaves, index)
        first = torch.autograd.grad(out.square().sum(), leaves, create_graph=True)
        found.append([*first, *torch.autograd.grad(sum(t.square().sum() for t in first), leaves)])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    tied = {}  # sources that hang on the targets, or are these
    for function in (of_pairs, pairs_by_copies):
        out = function(kind, q, torch.cat([q * q, q[:, :2]], 1), index).square().sum()
        out = out + function(kind, q, q, index.clamp_max(5)).square().sum()
        (first,) = torch.autograd.grad(out, q, create_graph=True)
        tied[function] = first, torch.autograd.grad(first.square().sum(), q)[0]
    for one, other in zip(*tied.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)
    out, grads = of_pairs(kind, q, keys, index), torch.randn(3, 2, 6, 3)
    batched = torch.autograd.grad(out, leaves, grads, is_grads_batched=True, retain_graph=True)
    for one, other in zip(batched, torch.autograd.grad(out, leaves, grads[1]), strict=True):
        torch.testing.assert_close(one[1], other)
    alone = torch.autograd.grad(of_pairs(kind, q.detach(), keys, index).sum(), keys)[0]
    torch.testing.assert_close(
        alone, torch.autograd.grad(pairs_by_copies(kind, q, keys, index).sum(), keys)[0]
    )


@pytest.mark.parametrize("wrong", [-1, 8])
def test_chosen_pairs_are_pairs(wrong):
    q, keys, index = torch.randn(6, 9), torch.randn(8, 9), torch.zeros(6, 3, dtype=torch.long)
    index[4, 1] = wrong
    with pytest.raises(IndexError, match="from 0 to 7"):
        compiled.pairs("products", q, keys, index)


def test_chosen_pairs_that_are_not_served():
    q, keys, index = torch.randn(2, 6, 9), torch.randn(2, 8, 9), torch.zeros(2, 6, 3).long()
    for parts in (
        (q.double(), keys.double(), index),
        (q, keys[0], index),  # which all share
        (q, keys, index[:1]),
        (q, keys, index.int()),
        (q.half(), keys.half(), index),
        (q[:, :0], keys, index[:, :0]),
    ):
        assert not compiled.serves_pairs(*parts)
    found = of_pairs("products", q, keys[0], index)  # whatever is, is right
    torch.testing.assert_close(found, (q * keys[0, 0]).sum(-1, keepdim=True).expand(2, 6, 3))


def test_taps_that_are_not_served():
    rows, index, taps = torch.randn(4, 3), torch.zeros(2, 5, dtype=torch.long), torch.randn(2, 6, 3)
    assert compiled.gather_taps(rows.double(), index, None, taps.double(), None) is None
    assert compiled.gather_taps(rows, index[:, :0], None, taps, None) is None
    assert compiled.gather_taps(rows, index, None, torch.randn(2, 6, 1), None, 3) is None


def test_the_layer_is_the_same_without(monkeypatch):
    layer = ConvNN2d(6, 40, k=5, metric="cosine")
    x = torch.randn(2, 6, 9, 7)
    found = layer(x)
    monkeypatch.setattr(build, "library", lambda: None)
    torch.testing.assert_close(layer(x), found, rtol=1e-5, atol=1e-5)


def test_a_few_products_wake_no_thread(monkeypatch):
    from convnn_geo.compiled import build

    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert [build.threads(n) for n in (0, 2**20 - 1, 2**20, 2**40)] == [1, 1, 4, 4]
