"""Every metric against a double loop in float64, by one contract that each metric inherits."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import nn

from convnn_geo import metrics
from convnn_geo.candidates import Subset
from convnn_geo.encodings import Coordinates, Rotary
from convnn_geo.metrics import (
    Bilinear,
    Custom,
    Encoded,
    Feature,
    Interpolation,
    Mahalanobis,
    Metric,
    PaperMix,
    PositionBias,
    Spatial,
    interpolate,
)
from convnn_geo.points import Grid, Points
from convnn_geo.search import Query, find, knn

HALF = (torch.float16, torch.bfloat16)


def dot(u, v):
    return sum(a * b for a, b in zip(u, v, strict=True))


def minus(u, v):
    return [a - b for a, b in zip(u, v, strict=True)]


def norm(u, p=2.0):
    if p == math.inf:
        return max(abs(a) for a in u)
    return sum(abs(a) ** p for a in u) ** (1 / p)


def cosine(u, v):
    lengths = norm(u) * norm(v)
    return 1 - dot(u, v) / lengths if lengths else 1.0


def centred(u):
    return [a - sum(u) / len(u) for a in u]


class Contract:
    """A subclass supplies ``make`` and ``pair``; ``Uses`` says what the metric looks at."""

    channels = 4
    needs_grid = False
    uses_x, uses_pos = True, True
    lead = (2,)
    """Leading axes of the distances between two batches of two."""

    def make(self) -> Metric:
        raise NotImplementedError

    def pair(self, metric, target, source, i, j):
        """``d(i, j)`` of one example, from lists ``target.x[i]`` and ``target.p[i]``."""
        raise NotImplementedError

    # -- the points -------------------------------------------------------------------------

    def points(self, size=(3, 4), dtype=torch.float64, batch=2):
        x = torch.randn(batch, math.prod(size), self.channels, dtype=dtype)
        if self.needs_grid:
            return Points(x, grid=Grid(size))
        return Points(x, 3 * torch.rand(batch, math.prod(size), 2, dtype=dtype))

    @staticmethod
    def example(points, b):
        """One example, without leading axes."""
        pick = lambda t: t if t is None or t.ndim == 2 else t[b]  # noqa: E731
        mask = None if points.mask is None else points.mask[b]
        return Points(pick(points.x), pick(points.pos), mask, points.grid)

    def loop(self, metric, target, source):
        """The double loop, ``(n, m)`` or with heads in front."""

        class Lists:
            def __init__(self, points):
                self.x, self.p = points.x.tolist(), points.position.tolist()

        with torch.no_grad():
            rows, columns = Lists(target), Lists(source)
            table = [
                [self.pair(metric, rows, columns, i, j) for j in range(len(columns.x))]
                for i in range(len(rows.x))
            ]
        out = torch.tensor(table, dtype=torch.float64)
        return out if out.ndim == 2 else out.movedim(-1, 0)

    def batched_loop(self, metric, target, source):
        rows = [
            self.loop(metric, self.example(target, b), self.example(source, b)) for b in range(2)
        ]
        return torch.stack(rows) if self.lead == (2,) else rows[0]

    def close(self, a, b, atol=1e-10):
        torch.testing.assert_close(a, b.expand(a.shape), rtol=0, atol=atol)

    # -- values -----------------------------------------------------------------------------

    def test_all_distances_are_those_of_the_loop(self):
        metric, target, source = self.make(), self.points(), self.points((2, 5))
        found = metric(target, source)
        assert found.dtype == torch.float64
        self.close(found, self.batched_loop(metric, target, source))

    def test_a_point_set_without_leading_axes(self):
        metric = self.make()
        points = self.example(self.points(), 0)
        self.close(metric(points), self.loop(metric, points, points))

    def test_slabs_of_rows_chosen_pairs_and_selected_sources_agree(self):
        metric, target, source = self.make(), self.points(), self.points((2, 5))
        bound = metric.bind(target, source)
        rows = bound.rows()
        assert bound.shape == rows.shape == (*self.lead, 12, 10)
        for start in range(0, 12, 5):
            self.close(bound.rows(start, min(start + 5, 12)), rows[..., start : start + 5, :])
        index = torch.randint(10, (*self.lead, 12, 3))
        self.close(bound.at(index), rows.gather(-1, index))
        shared = torch.randint(10, (12, 3))
        expected = rows.gather(-1, shared.expand(*self.lead, 12, 3))
        self.close(bound.at(shared), expected)
        self.close(metric.pairs(target, source, shared), expected)
        for sample in (torch.tensor([[7, 0, 3]]), torch.randint(10, (*self.lead, 1, 3))):
            part = bound.select(sample)
            picked = rows.gather(-1, sample.expand(*self.lead, 12, 3))
            assert part.shape == picked.shape
            self.close(part.rows(), picked)
            self.close(part.rows(4, 9), picked[..., 4:9, :])
            among = torch.randint(3, (12, 2))
            self.close(part.at(among), picked.gather(-1, among.expand(*self.lead, 12, 2)))

    def test_parts_of_a_batch_and_of_the_targets_agree(self):
        metric, target, source = self.make(), self.points(), self.points((2, 5))
        bound = metric.bind(target, source)
        rows = bound.rows()
        part = bound.examples(1, 2)
        if part is not None and self.lead:
            self.close(part.rows(), rows[1:2])
        elif part is not None:
            self.close(part.rows(), rows)
        if bound.dimension is not None:
            index = torch.randint(12, (*self.lead, 1, 4))
            some = bound.targets(index)
            picked = rows.gather(-2, index.transpose(-1, -2).expand(*self.lead, 4, 10))
            self.close(some.rows(), picked)
            q, k = some.coordinates()
            assert q.shape[-2] == 4
            order = (q.unsqueeze(-2) - k.unsqueeze(-3)).square().sum(-1).argsort(-1)
            assert torch.equal(order, picked.argsort(-1))

    def test_forms_keep_the_order(self):
        metric, target, source = self.make(), self.points(), self.points((2, 5))
        bound = metric.bind(target, source)
        rows = bound.rows()

        def ascending(values):
            order = values.expand(rows.shape).argsort(-1)
            steps = rows.gather(-1, order).diff(dim=-1)
            return bool((steps > -1e-9).all())

        assert ascending(bound.ordering().rows())
        assert ascending(bound.sharp().rows())
        form = bound.bilinear()
        if form is not None:
            self.close(form.rows(), rows)
            self.close(form.select(torch.tensor([[1, 4]])).rows(), rows[..., [1, 4]])
        coordinates = bound.coordinates()
        if coordinates is not None:
            q, k = coordinates
            assert bound.dimension == q.shape[-1] == k.shape[-1]
            assert ascending((q.unsqueeze(-2) - k.unsqueeze(-3)).square().sum(-1))
        else:
            assert bound.dimension is None

    # -- gradients --------------------------------------------------------------------------

    def test_pairs_have_the_right_gradient(self):
        metric = self.make().double()
        target, source = self.points((2, 3)), self.points((1, 4))
        index = torch.tensor([[1, 2], [2, 3], [0, 3], [0, 1], [3, 2], [1, 0]])
        leaves = [target.x, source.x] + ([] if self.needs_grid else [target.pos, source.pos])
        parameters = list(metric.parameters())

        def distances(x_i, x_j, *rest):
            pos = (None, None) if self.needs_grid else rest[:2]
            rows = Points(x_i, pos[0], grid=target.grid)
            return metric.pairs(rows, Points(x_j, pos[1], grid=source.grid), index)

        inputs = [leaf.clone().requires_grad_() for leaf in leaves] + parameters
        assert torch.autograd.gradcheck(distances, inputs, fast_mode=False)

    def test_gradients_stay_finite_where_points_coincide(self):
        metric = self.make()
        points = self.points()
        x = torch.zeros_like(points.x).requires_grad_()
        pos = None if points.pos is None else torch.ones_like(points.pos).requires_grad_()
        same = Points(x, pos, grid=points.grid)
        out = metric(same).sum()
        leaves = [t for t in (x, pos, *metric.parameters()) if t is not None]
        if out.requires_grad:
            for grad in torch.autograd.grad(out, leaves, allow_unused=True):
                assert grad is None or (grad.isfinite().all() and grad.abs().max() < 1e6)

    # -- symmetries -------------------------------------------------------------------------

    def test_permuted_points_have_permuted_distances(self):
        metric, target, source = self.make(), self.points(), self.points((2, 5))
        if self.needs_grid:
            pytest.skip("the points' order is that of the grid")
        i, j = torch.randperm(12), torch.randperm(10)
        permuted = metric(
            Points(target.x[:, i], target.pos[:, i]), Points(source.x[:, j], source.pos[:, j])
        )
        self.close(permuted, metric(target, source)[..., i, :][..., j])

    def test_examples_do_not_see_each_other(self):
        metric, target, source = self.make(), self.points(), self.points((2, 5))
        together = metric(target, source)
        for b in range(2):
            alone = metric(self.example(target, b), self.example(source, b))
            self.close(alone, together[b] if self.lead == (2,) else together)

    @pytest.mark.parametrize("fill", [0.0, 50.0])
    def test_padding_of_a_ragged_batch_changes_nothing(self, fill):
        metric = self.make()
        if self.needs_grid:
            pytest.skip("points of a grid are all there")
        points = self.points()
        mask = torch.ones(2, 12, dtype=torch.bool)
        mask[0, 7:] = False
        hide = lambda t: torch.where(mask.unsqueeze(-1), t, fill)  # noqa: E731
        ragged = Points(hide(points.x), hide(points.pos), mask)
        small = Points(points.x[0, :7], points.pos[0, :7])
        self.close(metric(ragged)[0, :7, :7], metric(small))

    # -- search -----------------------------------------------------------------------------

    @pytest.mark.parametrize("k", [1, 3, 10])
    def test_the_nearest_are_those_of_the_loop(self, k):
        metric, target, source = self.make(), self.points(), self.points((2, 5))
        found = find(Query(target, source, metric, k), "dense")
        loop = self.batched_loop(metric, target, source)
        distance, index = loop.sort(dim=-1, stable=True)
        if found.distance.ndim < distance.ndim:  # positions alone serve all examples
            assert self.needs_grid
        self.close(found.distance, distance[..., :k])
        assert torch.equal(found.index, index[..., :k].expand(found.index.shape))

    # -- precision --------------------------------------------------------------------------

    @pytest.mark.parametrize("dtype", HALF, ids=str)
    def test_half_precision_points_are_measured_in_float32(self, dtype):
        metric = self.make()
        half = self.points(dtype=dtype)
        pos = None if half.pos is None else half.pos.float()
        full = Points(half.x.float(), pos, grid=half.grid)
        found = metric(half)
        assert found.dtype == torch.float32
        self.close(found, metric(full), 1e-6)
        index = torch.randint(12, (12, 2))
        self.close(metric.pairs(half, half, index), metric.pairs(full, full, index), 1e-6)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_autocast_lowers_nothing(self, dtype):
        metric, points = self.make(), self.points(dtype=dtype)
        expected = metric(points)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = metric(points)
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)

    # -- modules ----------------------------------------------------------------------------

    def test_copies_and_states(self):
        metric, points = self.make(), self.points()
        with torch.no_grad():
            for parameter in metric.parameters():
                parameter.copy_(torch.rand_like(parameter))
        expected = metric(points)
        assert torch.equal(copy.deepcopy(metric)(points), expected)
        again = self.make()
        again.load_state_dict(metric.state_dict())
        assert torch.equal(again(points), expected)
        assert repr(metric) == repr(copy.deepcopy(metric))


# -- positions ----------------------------------------------------------------------------------


class SpatialContract(Contract):
    norm_name, p, squared, scale = "l2", 2.0, False, None

    def make(self):
        return Spatial(self.norm_name, self.squared, self.scale)

    def pair(self, metric, target, source, i, j):
        offset = minus(target.p[i], source.p[j])
        if self.scale is not None:
            factors = self.scale if isinstance(self.scale, tuple) else (self.scale,) * 2
            offset = [o * s for o, s in zip(offset, factors, strict=True)]
        return norm(offset, self.p) ** (2 if self.squared else 1)


class TestSpatialL1(SpatialContract):
    norm_name, p = "l1", 1.0


class TestSpatialL2(SpatialContract):
    pass


class TestSpatialSquared(SpatialContract):
    squared = True


class TestSpatialChebyshev(SpatialContract):
    norm_name, p = "chebyshev", math.inf


class TestSpatialNorm3Scaled(SpatialContract):
    norm_name, p, scale = 3, 3.0, (0.5, 2.0)


class TestSpatialOneScale(SpatialContract):
    scale = 0.25


class TestSpatialOnAGrid(SpatialContract):
    needs_grid, lead = True, ()


# -- features -----------------------------------------------------------------------------------


class FeatureContract(Contract):
    kind = "euclidean"

    def make(self):
        return Feature(self.kind)

    def pair(self, metric, target, source, i, j):
        q, k = target.x[i], source.x[j]
        return {
            "euclidean": lambda: norm(minus(q, k)),
            "squared_euclidean": lambda: norm(minus(q, k)) ** 2,
            "cosine": lambda: cosine(q, k),
            "pearson": lambda: cosine(centred(q), centred(k)),
            "dot": lambda: -dot(q, k),
            "scaled_dot": lambda: -dot(q, k) / math.sqrt(len(q)),
            "manhattan": lambda: norm(minus(q, k), 1),
            "minkowski": lambda: norm(minus(q, k), 3),
        }[self.kind]()


class TestEuclidean(FeatureContract):
    pass


class TestEuclideanWide(FeatureContract):
    channels = 12


class TestSquaredEuclidean(FeatureContract):
    kind = "squared_euclidean"


class TestSquaredEuclideanWide(FeatureContract):
    kind, channels = "squared_euclidean", 12


class TestCosine(FeatureContract):
    kind = "cosine"


class TestCosineWide(FeatureContract):
    kind, channels = "cosine", 12


class TestPearson(FeatureContract):
    kind = "pearson"


class TestPearsonWide(FeatureContract):
    kind, channels = "pearson", 12


class TestDot(FeatureContract):
    kind = "dot"


class TestScaledDot(FeatureContract):
    kind, channels = "scaled_dot", 12


class TestManhattan(FeatureContract):
    kind = "manhattan"


class TestManhattanWide(FeatureContract):
    kind, channels = "manhattan", 12


class TestMinkowski(FeatureContract):
    kind = "minkowski"


class TestProjectedFeatures(Contract):
    def make(self):
        torch.manual_seed(1)
        return Feature("dot", query=nn.Linear(4, 3), key=nn.Linear(4, 3)).double()

    def pair(self, metric, target, source, i, j):
        def apply(linear, x):
            rows = zip(linear.weight.tolist(), linear.bias.tolist(), strict=True)
            return [dot(row, x) + b for row, b in rows]

        return -dot(apply(metric.query, target.x[i]), apply(metric.key, source.x[j]))

    @pytest.mark.parametrize("dtype", HALF, ids=str)
    def test_half_precision_points_are_measured_in_float32(self, dtype):
        metric = self.make().to(dtype)
        points = self.points(dtype=dtype)
        q, k = metric.query(points.x).float(), metric.key(points.x).float()
        found = metric(points)
        assert found.dtype == torch.float32
        self.close(found, -q @ k.transpose(-1, -2), 1e-6)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_autocast_lowers_nothing(self, dtype):
        metric, points = self.make().float(), self.points(dtype=dtype)
        expected = metric(Points(points.x.float(), points.pos.float()))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = metric(points)
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)


# -- learned ------------------------------------------------------------------------------------


class LearnedContract(Contract):
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_autocast_lowers_nothing(self, dtype):
        metric, points = self.make().float(), self.points(dtype=dtype)
        expected = metric(points)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = metric(points)
        assert found.dtype == torch.float32
        assert torch.equal(found, expected)

    @pytest.mark.parametrize("dtype", HALF, ids=str)
    def test_half_precision_points_are_measured_in_float32(self, dtype):
        half = self.make().to(dtype)
        points = self.points(dtype=dtype)
        pos = None if points.pos is None else points.pos.float()
        full = copy.deepcopy(half).float()(Points(points.x.float(), pos, grid=points.grid))
        found = half(points)
        assert found.dtype == torch.float32
        self.close(found, full, 1e-6)


class TestMahalanobis(LearnedContract):
    rank = None

    def make(self):
        metric = Mahalanobis(self.channels, self.rank).double()
        torch.manual_seed(2)
        nn.init.normal_(metric.factor)
        return metric

    def pair(self, metric, target, source, i, j):
        difference = minus(target.x[i], source.x[j])
        return sum(dot(row, difference) ** 2 for row in metric.factor.tolist())


class TestMahalanobisWide(TestMahalanobis):
    channels = 12


class TestMahalanobisOfRank2(TestMahalanobis):
    rank = 2


class TestBilinear(LearnedContract):
    def make(self):
        metric = Bilinear(self.channels).double()
        torch.manual_seed(2)
        nn.init.normal_(metric.weight)
        return metric

    def pair(self, metric, target, source, i, j):
        weight = metric.weight.tolist()
        return -sum(
            target.x[i][a] * weight[a][b] * source.x[j][b] for a in range(4) for b in range(4)
        )


class TestPositionBias(LearnedContract):
    needs_grid, lead, heads = True, (), None

    def make(self):
        torch.manual_seed(2)
        metric = PositionBias((4, 5), self.heads).double()
        nn.init.normal_(metric.table)
        return metric

    def pair(self, metric, target, source, i, j):
        rows, columns = (int(v) for v in minus(source.p[j], target.p[i]))
        entry = (rows + 3) * 9 + columns + 4
        found = (-metric.table[..., entry]).tolist()
        return found


class TestPositionBiasOfHeads(TestPositionBias):
    heads, lead = 3, (3,)


# -- compositions -------------------------------------------------------------------------------


class TestCustom(Contract):
    def make(self):
        return Custom(
            lambda i, j: (i.x - j.x).abs().amax(-1) + (i.pos - j.pos).square().sum(-1) / 2
        )

    def pair(self, metric, target, source, i, j):
        far = norm(minus(target.p[i], source.p[j])) ** 2 / 2
        return norm(minus(target.x[i], source.x[j]), math.inf) + far


class TestCustomOnAGrid(TestCustom):
    needs_grid = True


class TestRotary(Contract):
    channels = 8

    def make(self):
        return Encoded("dot", Rotary(base=10.0))

    def turn(self, x, p):
        out = []
        for axis in range(2):
            for f in range(2):
                channel = 4 * axis + 2 * f
                angle = p[axis] * 10 ** -(f / 2)
                number = complex(x[channel], x[channel + 1])
                turned = number * complex(math.cos(angle), math.sin(angle))
                out += [turned.real, turned.imag]
        return out

    def pair(self, metric, target, source, i, j):
        return -dot(self.turn(target.x[i], target.p[i]), self.turn(source.x[j], source.p[j]))


class TestPaperMix(Contract):
    lam = 0.3

    def make(self):
        return PaperMix(self.lam)

    def pair(self, metric, target, source, i, j):
        values = [v for row in source.x for v in row]
        mean = sum(values) / len(values)
        variance = sum((v - mean) ** 2 for v in values) / (len(values) - 1)
        far = 0.0
        for axis in range(2):
            line = [p[axis] for p in source.p]
            half = (max(line) - min(line)) / 2
            if half:
                far += ((target.p[i][axis] - source.p[j][axis]) / half) ** 2
        near = norm(minus(target.x[i], source.x[j])) ** 2 / variance
        return self.lam**2 * near + (1 - self.lam) ** 2 * far

    def test_one_channel_without_leading_axes(self):
        points = Points(torch.randn(9, 1).double(), torch.rand(9, 2).double())
        self.close(self.make()(points), self.loop(None, points, points))

    def test_constant_features_have_a_finite_gradient(self):
        x = torch.ones(1, 5, 2, requires_grad=True)
        mask = torch.tensor([[True, True, True, False, False]])
        pos = torch.rand(1, 5, 2)
        for points in (Points(x, pos), Points(x, pos, mask)):
            distance = self.make()(points)[..., :3, :3].sum() + 0 * x.sum()
            (grad,) = torch.autograd.grad(distance, x)
            assert grad.isfinite().all()


class TestPaperMixOfFeatures(TestPaperMix):
    lam = 1.0


class TestPaperMixOfPositions(TestPaperMix):
    lam = 0.0


class TestSum(Contract):
    def make(self):
        return 0.3 * Spatial() + 0.7 * Feature("cosine") + 2 * Feature("squared_euclidean")

    def pair(self, metric, target, source, i, j):
        q, k = target.x[i], source.x[j]
        near = 0.7 * cosine(q, k) + 2 * norm(minus(q, k)) ** 2
        return 0.3 * norm(minus(target.p[i], source.p[j])) + near


class TestSumOfBilinear(Contract):
    channels = 12

    def make(self):
        return 0.3 * Spatial(squared=True) + 0.7 * Feature("cosine") + 2 * Feature("scaled_dot")

    def pair(self, metric, target, source, i, j):
        q, k = target.x[i], source.x[j]
        near = 0.7 * cosine(q, k) - 2 * dot(q, k) / math.sqrt(12)
        return 0.3 * norm(minus(target.p[i], source.p[j])) ** 2 + near

    def test_it_is_one_matrix_product(self):
        bound = self.make().bind(self.points(), self.points((2, 5)))
        assert bound.bilinear() is not None


class TestSumOfSquares(Contract):
    def make(self):
        return 0.3 * Spatial(squared=True) + 0.7 * Feature("squared_euclidean")

    def pair(self, metric, target, source, i, j):
        near = 0.7 * norm(minus(target.x[i], source.x[j])) ** 2
        return 0.3 * norm(minus(target.p[i], source.p[j])) ** 2 + near

    def test_it_has_coordinates(self):
        assert self.make().bind(self.points(), self.points((2, 5))).dimension == 6


class TestWeighted(Contract):
    def make(self):
        return 0.25 * Feature("euclidean")

    def pair(self, metric, target, source, i, j):
        return 0.25 * norm(minus(target.x[i], source.x[j]))


class TestInterpolation(Contract):
    lam, learnable = 0.3, False

    def make(self):
        return interpolate(Spatial(), Feature("cosine"), self.lam, self.learnable)

    def pair(self, metric, target, source, i, j):
        far = norm(minus(target.p[i], source.p[j]))
        lam = float(metric.lam)
        return (1 - lam) * far + lam * cosine(target.x[i], source.x[j])


class TestLearnableInterpolation(TestInterpolation):
    learnable = True


# -- what is particular to one metric -----------------------------------------------------------


def cloud(n=7, c=4):
    return Points(torch.randn(2, n, c), torch.rand(2, n, 2))


@pytest.mark.parametrize("learnable", [False, True])
def test_the_ends_of_an_interpolation_are_its_parts(learnable):
    points, first, second = cloud(), Spatial("l1"), Feature("cosine")
    assert torch.equal(interpolate(first, second, 0.0, learnable)(points), first(points))
    assert torch.equal(interpolate(first, second, 1.0, learnable)(points), second(points))


def test_the_end_of_an_interpolation_does_not_look_at_the_other_part():
    positions = Points(pos=torch.rand(5, 2))
    assert interpolate("spatial", "cosine", 0.0)(positions).shape == (5, 5)
    assert interpolate("cosine", "spatial", 1.0)(positions).shape == (5, 5)


@pytest.mark.parametrize("lam", [0.0, 0.4, 1.0])
def test_a_learnable_interpolation_learns(lam):
    metric, points = interpolate("spatial", "cosine", lam, learnable=True), cloud()
    (grad,) = torch.autograd.grad(metric(points).sum(), metric.lam)
    expected = (Feature("cosine")(points) - Spatial()(points)).sum()
    torch.testing.assert_close(grad, expected)
    assert metric.learnable and not interpolate("spatial", "cosine", lam).learnable
    assert "learnable" in repr(metric)
    assert "learnable" not in repr(interpolate("spatial", Mahalanobis(4), lam))


def test_a_metric_of_weight_0_takes_no_part():
    points = Points(pos=torch.rand(5, 2))
    assert torch.equal((1 * Spatial() + 0 * Feature("cosine"))(points), Spatial()(points))
    assert torch.equal((0 * Spatial())(points), torch.zeros(5, 5))


def test_the_algebra_flattens_and_refuses():
    total = 2 * (Spatial() + 3 * Feature("dot")) + Feature("cosine")
    assert total.weights == (2.0, 6.0, 1.0)
    with pytest.raises(ValueError, match="weight of a metric"):
        -1 * Spatial()
    with pytest.raises(ValueError, match="finite"):
        math.nan * Spatial()
    with pytest.raises(TypeError):
        Spatial() * "2"
    with pytest.raises(TypeError):
        Spatial() + 1


@pytest.mark.parametrize("channels", [4, 12])
@pytest.mark.parametrize("kind", ["cosine", "pearson"])
def test_a_vector_without_direction_is_at_1_from_everything(kind, channels):
    for value in (0.0, 1e-25):
        x = torch.randn(5, channels)
        x[1] = 0.0
        x[3] = value
        points = Points(x)
        if kind == "pearson" and value:
            continue
        distance = Feature(kind)(points)
        torch.testing.assert_close(distance[[1, 3]], torch.ones(2, 5))
        torch.testing.assert_close(distance[:, [1, 3]], torch.ones(5, 2))


@pytest.mark.parametrize("channels", [4, 12])
def test_near_vectors_keep_their_order_at_low_dimension(channels):
    x = torch.full((3, channels), 1.0)
    x[1, 0], x[2, 0] = 1 + 2e-4, 1 + 1e-4
    order = Feature("squared_euclidean")(Points(x))[0].argsort(stable=True)
    assert order.tolist() == [0, 2, 1]
    if channels == 4:
        order = Feature("cosine")(Points(x))[0].argsort(stable=True)
        assert order.tolist() == [0, 2, 1]


@pytest.mark.parametrize("channels", [4, 12])
@pytest.mark.parametrize("kind", ["cosine", "pearson"])
def test_a_vector_without_direction_gets_no_gradient(kind, channels):
    x = torch.randn(5, channels)
    x[2] = 0.0 if kind == "cosine" else 0.1
    x.requires_grad_()
    (grad,) = torch.autograd.grad(Feature(kind)(Points(x)).square().sum(), x)
    assert grad.abs().max() < 100
    assert not grad[2].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "metric",
    [*map(Feature, ("euclidean", "cosine", "pearson")), Mahalanobis(12), Spatial()],
    ids=lambda metric: type(metric).__name__,
)
def test_points_searched_in_themselves_are_one_tensor(metric, dtype):
    """In half precision as well, where they are converted: once for all."""
    points = Points(torch.randn(5, 12, dtype=dtype), torch.randn(5, 2, dtype=dtype))
    bound = metric.bind(points, points)
    assert bound.q is bound.k


def test_a_constant_vector_has_no_pearson_direction():
    x = torch.randn(4, 12)
    x[1] = 0.1
    x[2] = 1e5
    distance = Feature("pearson")(Points(x))
    torch.testing.assert_close(distance[1:3], torch.ones(2, 4))


def test_one_point_of_nan_does_not_spoil_the_distances_of_others():
    x = torch.randn(6, 12)
    clean = Feature("squared_euclidean").bind(Points(x), Points(x)).bilinear().rows()
    x[5] = math.nan
    found = Feature("squared_euclidean").bind(Points(x), Points(x)).bilinear().rows()
    torch.testing.assert_close(found[:5, :5], clean[:5, :5])
    assert found[5].isnan().all() and found[:, 5].isnan().all()


@pytest.mark.parametrize("shift", [0, 1000, 2**20])
def test_the_product_form_is_exact_on_integers(shift):
    x = torch.randint(-3, 4, (50, 20)).float() + shift
    bound = Feature("squared_euclidean").bind(Points(x), Points(x))
    exact = (x.double().unsqueeze(1) - x.double()).square().sum(-1)
    assert torch.equal(bound.bilinear().rows().double(), exact)
    for start in range(0, 50, 7):
        assert torch.equal(bound.bilinear().rows(start, start + 1)[0].double(), exact[start])


def test_similarities_are_what_the_metric_negated():
    points = cloud()
    unit = torch.nn.functional.normalize(points.x, dim=-1)
    products = {
        "cosine": unit @ unit.transpose(-1, -2),
        "dot": points.x @ points.x.transpose(-1, -2),
        "euclidean": -torch.cdist(points.x, points.x),
    }
    for kind, similarity in products.items():
        bound = Feature(kind).bind(points, points)
        torch.testing.assert_close(bound.offset - bound.rows(), similarity, atol=1e-5, rtol=0)
    mixed = (0.5 * Feature("cosine") + 2 * Feature("dot")).bind(points, points)
    expected = 0.5 * products["cosine"] + 2 * products["dot"]
    torch.testing.assert_close(mixed.offset - mixed.rows(), expected, atol=1e-5, rtol=0)


def test_a_bias_is_taken_from_the_distances():
    points, bias = cloud(), torch.randn(2, 7, 7)
    inner = Feature("dot").bind(points, points)
    bound = metrics.Biased(inner, bias)
    expected = inner.rows() - bias
    torch.testing.assert_close(bound.rows(2, 5), expected[:, 2:5])
    index = torch.randint(7, (2, 7, 3))
    torch.testing.assert_close(bound.at(index), expected.gather(-1, index))
    torch.testing.assert_close(bound.at(index[0]), expected.gather(-1, index[:1].expand(2, 7, 3)))
    sample = torch.tensor([[5, 2]])
    torch.testing.assert_close(bound.select(sample).rows(1), expected[:, 1:, [5, 2]])
    row = metrics.Biased(inner, bias[:, :1])
    torch.testing.assert_close(row.rows(2, 5), (inner.rows() - bias[:, :1])[:, 2:5])


def test_a_rotary_product_sees_offsets_alone():
    x = torch.randn(1, 6, 8).double()
    pos = torch.rand(1, 6, 2).double()
    metric = Encoded("dot", Rotary())
    moved = metric(Points(x, pos + 17.0))
    torch.testing.assert_close(moved, metric(Points(x, pos)))


def test_an_encoded_metric_keeps_its_parameters():
    encoding = nn.Linear(4, 4)
    metric = Encoded("dot", lambda points: points.with_x(encoding(points.x)))
    assert not list(metric.parameters())
    assert len(list(Encoded("dot", Coordinates()).children())) == 2


def test_a_position_bias_refuses_what_its_table_lacks():
    metric = PositionBias((3, 3))
    with pytest.raises(ValueError, match="up to"):
        metric(Points.from_image(torch.zeros(1, 1, 3, 4)))
    with pytest.raises(ValueError, match="2 axes"):
        metric(Points.from_tokens(torch.zeros(1, 3, 1)))
    with pytest.raises(ValueError, match="grid"):
        metric(Points(torch.zeros(3, 1), torch.zeros(3, 2)))


def test_a_position_bias_gives_each_head_its_own_pairs():
    metric = PositionBias((2, 3), heads=2)
    points = Points.from_image(torch.zeros(1, 1, 2, 3))
    rows = metric(points)
    index = torch.randint(6, (5, 2, 6, 3))
    bound = metric.bind(points, points)
    torch.testing.assert_close(bound.at(index), rows.expand(5, 2, 6, 6).gather(-1, index))


@pytest.mark.parametrize("heads", [None, 2])
def test_a_position_bias_serves_a_sample_an_example(heads):
    metric = PositionBias((2, 3), heads)
    points = Points.from_image(torch.zeros(2, 1, 2, 3))
    rows = metric(points).expand(2, 6, 6)
    sample = torch.tensor([[[0, 4]], [[1, 5]]])
    part = metric.bind(points, points).select(sample)
    assert part.shape == (2, 6, 2)
    torch.testing.assert_close(part.rows(), rows.gather(-1, sample.expand(2, 6, 2)))
    found = find(Query(points, points, metric, 1, Subset(sample)))
    torch.testing.assert_close(found.distance, part.rows().amin(-1, keepdim=True))


def test_a_custom_product_is_not_lowered_by_autocast():
    metric = Custom(lambda i, j: -(i.x.unsqueeze(-2) @ j.x.unsqueeze(-1))[..., 0, 0])
    points, index = Points(torch.randn(9, 16)), torch.randint(9, (9, 3))
    expected = metric.pairs(points, points, index)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = metric.pairs(points, points, index)
    assert found.dtype == torch.float32 and torch.equal(found, expected)


def test_names_resolve():
    for name in metrics.metric_names():
        assert isinstance(metrics.as_metric(name), Metric)
    for name in ("cosine", "euclidean", "scaled_dot", "spatial", "paper_mix"):
        assert name in metrics.metric_names()
    assert isinstance(metrics.as_metric(Spatial), Spatial)
    metric = Spatial()
    assert metrics.as_metric(metric) is metric
    with pytest.raises(ValueError, match=r"cosine.*spatial"):
        metrics.as_metric("cosinus")
    metrics.register_metric("mine", lambda: Spatial("l1"))
    try:
        assert metrics.as_metric("mine").p == 1
        for taken in ("mine", "cosine"):
            with pytest.raises(ValueError, match=f"got '{taken}'; choose another.*mine, "):
                metrics.register_metric(taken, lambda: Spatial("chebyshev"))
        assert metrics.as_metric("mine").p == 1
        assert metrics.as_metric("cosine").kind == "cosine"
    finally:
        metrics.base._RESOLVER.pop("mine")


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: Feature("cosinus"), ValueError, "squared_euclidean"),
        (lambda: Feature("minkowski", p=0.5), ValueError, "at least 1"),
        (lambda: Spatial("l3"), ValueError, "chebyshev"),
        (lambda: Spatial("l1", squared=True), ValueError, "L2"),
        (lambda: Spatial(scale=0), ValueError, "greater than 0"),
        (lambda: Spatial(scale=(1.0, -1.0)), ValueError, "greater than 0"),
        (lambda: Mahalanobis(0), ValueError, "at least 1"),
        (lambda: Mahalanobis(4, 0), ValueError, "at least 1"),
        (lambda: Bilinear(2, 0), ValueError, "at least 1"),
        (lambda: PositionBias(0), ValueError, "at least 1"),
        (lambda: PaperMix(1.5), ValueError, r"\[0, 1\]"),
        (lambda: Interpolation("spatial", "cosine", 2.0), ValueError, r"\[0, 1\]"),
        (lambda: interpolate("spatial", "cosinus"), ValueError, "unknown metric"),
        (lambda: Custom("euclidean"), TypeError, "function"),
        (lambda: metrics.Sum([Spatial()], []), ValueError, "one weight"),
        (lambda: Feature()(Points(pos=torch.zeros(2, 2))), ValueError, "features"),
        (lambda: Spatial()(Points(torch.zeros(2, 2))), ValueError, "positions"),
        (
            lambda: Feature()(Points(torch.zeros(2, 2)), Points(torch.zeros(2, 3))),
            ValueError,
            "channels",
        ),
        (
            lambda: Spatial()(Points(pos=torch.zeros(2, 2)), Points(pos=torch.zeros(2, 3))),
            ValueError,
            "axes",
        ),
        (lambda: Spatial(scale=(1.0, 2.0))(Points(pos=torch.zeros(2, 3))), ValueError, "factors"),
    ],
)
def test_bad_metrics_are_refused(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_the_same_code_may_be_registered_again():
    def make():
        return Spatial("l1")

    metrics.register_metric("made-here", make)
    try:
        metrics.register_metric("made-here", make)  # a cell that is run once more
        with pytest.raises(ValueError, match="expected a new name of a metric"):
            metrics.register_metric("made-here", Spatial)
    finally:
        del metrics.base._RESOLVER["made-here"]


def test_distances_are_not_subtracted():
    with pytest.raises(TypeError, match="weights that are not negative"):
        Spatial() - Feature("cosine")


def test_transforms_of_every_norm():
    """Which know of no results that are written over."""
    x = torch.randn(3, 12, 2)
    for name in ("chebyshev", "euclidean", "manhattan", "spatial"):
        found = torch.func.vmap(lambda p, n=name: knn(p, k=3, metric=n, check=False).index)(x)
        assert torch.equal(found, knn(x, k=3, metric=name).index)


@pytest.mark.parametrize("name", ["euclidean", "manhattan", "minkowski"])
def test_forward_mode_where_points_coincide(name):
    """As in reverse mode: a distance of 0 has no slope."""
    x, metric = torch.randn(6, 3), metrics.as_metric(name)
    index = knn(x, k=3).index

    def distance(points):
        return metric.pairs(Points(points), Points(points), index)

    forward, reverse = torch.func.jacfwd(distance)(x), torch.func.jacrev(distance)(x)
    assert (distance(x)[:, 0] == 0).all()
    torch.testing.assert_close(forward, reverse)
