"""Where a target may look, against index arithmetic written out by hand."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from convnn_geo.candidates import (
    All,
    Block,
    Causal,
    Congruent,
    Random,
    Strided,
    Subset,
    Window,
)
from convnn_geo.points import Grid, Points


def image(*size, batch=1, channels=1):
    return Points.from_image(torch.zeros(batch, channels, *size))


def on(*size):
    return Points(grid=Grid(size))


# -- windows ------------------------------------------------------------------------------------


def fold(c, length, mode):
    """Where a padding mode looks coordinate ``c`` up; None outside of zeros."""
    if mode == "zeros":
        return c if 0 <= c < length else None
    if mode == "circular":
        return c % length
    if mode == "replicate":
        return min(max(c, 0), length - 1)
    while not 0 <= c < length:
        c = -c if c < 0 else 2 * (length - 1) - c
    return c


def windows(size, kernel, stride, pads, dilation, mode):
    """Indices of a convolution's windows as nested loops, -1 outside: ``(n, w)``."""
    counts = [
        (s + sum(p) - d * (k - 1) - 1) // t + 1
        for s, p, d, k, t in zip(size, pads, dilation, kernel, stride, strict=True)
    ]
    rows = []
    for place in itertools.product(*map(range, counts)):
        row = []
        for tap in itertools.product(*map(range, kernel)):
            index = 0
            for axis, length in enumerate(size):
                at = place[axis] * stride[axis] - pads[axis][0] + tap[axis] * dilation[axis]
                at = fold(at, length, mode)
                if at is None:
                    index = -1
                    break
                index = index * length + at
            row.append(index)
        rows.append(row)
    return counts, torch.tensor(rows)


def seen(subset):
    """Indices with -1 where the mask hides."""
    if subset.mask is None:
        return subset.index
    return torch.where(subset.mask, subset.index, -1)


CASES = [
    ((5,), (3,), (1,), (1,), (1,)),
    ((9,), (4,), (2,), (3,), (2,)),
    ((6, 9), (3, 3), (1, 1), (1, 1), (1, 1)),
    ((5, 8), (2, 4), (2, 1), (0, 3), (1, 2)),
    ((7, 5), (1, 5), (3, 2), (0, 2), (2, 1)),
    ((7, 6), (2, 2), (2, 3), (1, 1), (3, 2)),
    ((4, 5, 6), (2, 3, 1), (1, 2, 3), (1, 1, 0), (2, 1, 1)),
]


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
@pytest.mark.parametrize(("size", "kernel", "stride", "padding", "dilation"), CASES, ids=str)
def test_windows_are_those_of_a_convolution(size, kernel, stride, padding, dilation, mode):
    window = Window(kernel, stride, padding, dilation, mode)
    source = on(*size)
    targets = window.targets(source.grid)
    pads = [(p, p) for p in padding]
    counts, expected = windows(size, kernel, stride, pads, dilation, mode)
    assert targets.size == tuple(counts)
    subset = window(Points(grid=targets), source)
    assert torch.equal(seen(subset), expected)
    assert subset.index.min() >= 0 and subset.index.max() < math.prod(size)
    # A target lies amid its window.
    positions = source.grid.positions()
    whole = (expected >= 0).all(-1) if mode == "zeros" else torch.zeros(len(expected)).bool()
    middle = positions[subset.index[whole]].mean(1)
    assert torch.equal(targets.positions()[whole], middle)


@pytest.mark.parametrize(("kernel", "dilation"), [(2, 1), (3, 2), (4, 3), ((2, 5), (3, 1))])
@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_same_padding_is_torchs(kernel, dilation, mode):
    conv = torch.nn.Conv2d(
        1, 1, kernel, padding="same", dilation=dilation, padding_mode=mode, bias=False
    ).double()
    x = torch.randn(1, 1, 10, 12, dtype=torch.float64)
    window = Window(kernel, padding="same", dilation=dilation, padding_mode=mode)
    source = Points.from_image(x)
    targets = window.targets(source.grid)
    assert targets.size == (10, 12)
    subset = window(Points(grid=targets), source)
    values = x.flatten()[subset.index]
    if subset.mask is not None:
        values = values * subset.mask
    found = values @ conv.weight.flatten()
    torch.testing.assert_close(found, conv(x).flatten(), atol=1e-12, rtol=0)


def test_windows_are_those_of_unfold():
    x = torch.arange(1.0, 61).view(1, 1, 6, 10)
    patches = F.unfold(x, (3, 2), dilation=(2, 3), padding=(2, 1), stride=(1, 2))[0].T
    window = Window((3, 2), (1, 2), (2, 1), (2, 3))
    source = Points.from_image(x)
    subset = window(Points(grid=window.targets(source.grid)), source)
    assert torch.equal(seen(subset) + 1, patches.long())


def test_valid_is_no_padding():
    valid = Window(3, padding="valid")
    assert valid.targets(Grid((5, 6))) == Window(3).targets(Grid((5, 6))) == Grid((3, 4), (1, 1))


def test_windows_on_a_grid_of_coarser_points():
    # The grid that a strided window leaves behind has a step of its own.
    first, second = Window(3, 2, 1), Window(2, 2)
    fine = Grid((8, 12))
    coarse = first.targets(fine)
    assert coarse == Grid((4, 6), (0, 0), (2, 2))
    targets = second.targets(coarse)
    assert targets == Grid((2, 3), (1, 1), (4, 4))
    subset = second(Points(grid=targets), Points(grid=coarse))
    _, expected = windows((4, 6), (2, 2), (2, 2), [(0, 0)] * 2, (1, 1), "zeros")
    assert torch.equal(seen(subset), expected)


def test_an_input_independent_window_is_stored_once():
    window = Window(3, padding=1)
    a = window(image(4, 5, batch=2), image(4, 5, batch=2))
    b = window(image(4, 5, batch=7), image(4, 5, batch=7))
    assert a.index.shape == (20, 9) and a.index is b.index


def test_a_window_first_seen_in_inference_mode_still_trains():
    points = image(5, 3)
    with torch.inference_mode():
        Window(3, padding=2)(points, points)
    index = Window(3, padding=2)(points, points).index
    x = torch.randn(15, requires_grad=True)
    x[index].sum().backward()
    assert x.grad is not None


def natten_start(i, length, kernel, dilation):
    """The first key of query i, after NATTEN's get_window_start (odd kernels)."""
    half = kernel // 2
    if dilation == 1:
        start = max(i - half, 0)
        return start + (length - i - half - 1 if i + half >= length else 0)
    start = i - half * dilation
    if start < 0:
        return i % dilation
    if i + half * dilation >= length:
        whole = length // dilation * dilation
        rest = length - whole
        if i % dilation < rest:
            return length - rest + i % dilation - 2 * half * dilation
        return whole + i % dilation - kernel * dilation
    return start


@pytest.mark.parametrize(("kernel", "dilation"), [(1, 1), (3, 1), (5, 1), (3, 2), (5, 3), (3, 4)])
def test_windows_shift_inward_as_nattens_do(kernel, dilation):
    for length in range(kernel * dilation, kernel * dilation + 2 * dilation + 3):
        tokens = on(length)
        subset = Window(kernel, dilation=dilation, border="shift")(tokens, tokens)
        expected = [
            [natten_start(i, length, kernel, dilation) + t * dilation for t in range(kernel)]
            for i in range(length)
        ]
        assert subset.mask is None
        assert subset.index.tolist() == expected


@pytest.mark.parametrize("kernel", [2, 4])
def test_even_windows_shift_inward_too(kernel):
    tokens = on(7)
    index = Window(kernel, border="shift")(tokens, tokens).index
    expected = [min(max(i - kernel // 2, 0), 7 - kernel) for i in range(7)]
    assert index[:, 0].tolist() == expected
    assert (index.diff(dim=-1) == 1).all()


def test_windows_shift_on_each_axis_apart():
    points = image(5, 8)
    index = Window((3, 5), dilation=(1, 1), border="shift")(points, points).index
    for i, (row, column) in enumerate(itertools.product(range(5), range(8))):
        r, c = natten_start(row, 5, 3, 1), natten_start(column, 8, 5, 1)
        assert index[i].tolist() == [
            (r + a) * 8 + c + b for a, b in itertools.product(range(3), range(5))
        ]


@pytest.mark.parametrize(("kernel", "dilation"), [(3, 1), (2, 1), (3, 3), (4, 2)])
def test_causal_windows_end_at_the_target(kernel, dilation):
    tokens = on(9)
    found = seen(Window(kernel, dilation=dilation, border="causal")(tokens, tokens))
    for i in range(9):
        taps = [i - dilation * (kernel - 1 - t) for t in range(kernel)]
        assert found[i].tolist() == [t if t >= 0 else -1 for t in taps]


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (lambda: Window(0), "kernel_size.*at least 1"),
        (lambda: Window(3, stride=0), "stride.*at least 1"),
        (lambda: Window(3, padding=-1), "padding.*at least 0"),
        (lambda: Window(3, dilation=0), "dilation.*at least 1"),
        (lambda: Window(3, padding="full"), "same, valid"),
        (lambda: Window(3, padding_mode="mirror"), "zeros, reflect, replicate, circular"),
        (lambda: Window(3, border="wrap"), "pad, shift, causal"),
        (lambda: Window(3, 2, padding="same"), "no stride"),
        (lambda: Window(3, padding=1, border="shift"), "neither stride nor padding"),
        (lambda: Window(3, 2, border="causal"), "neither stride nor padding"),
        (lambda: Window((3, 3)).targets(Grid((9,))), "kernel_size: expected 1"),
        (lambda: Window(5).targets(Grid((4, 9))), "does not fit"),
        (lambda: Window(3, border="shift")(on(2), on(2)), "at least 3 points"),
        (lambda: Window(3, dilation=3, border="shift")(on(8), on(8)), "at least 9 points"),
        (lambda: Window(2)(on(4), on(4)), "centres"),
        (lambda: Window(3)(Points(torch.zeros(3, 1)), on(3)), "grid"),
    ],
)
def test_bad_windows_are_refused(make, match):
    with pytest.raises(ValueError, match=match):
        make()


@pytest.mark.parametrize(("mode", "padding"), [("reflect", 4), ("circular", 5)])
def test_padding_beyond_the_image_is_refused_as_torch_does(mode, padding):
    window = Window(3, padding=padding, padding_mode=mode)
    source = on(4)
    with pytest.raises(ValueError, match=mode):
        window(Points(grid=window.targets(source.grid)), source)
    with pytest.raises(RuntimeError):
        F.pad(torch.zeros(1, 1, 4), (padding, padding), mode=mode)


# -- patterns -----------------------------------------------------------------------------------


def test_all_and_causal():
    assert All()(on(3), on(4)) == Subset(None, None)
    mask = Causal()(on(3), on(5)).mask
    assert mask.tolist() == [[j <= i for j in range(5)] for i in range(3)]


def swin(size, block, shift):
    """Which pairs Swin lets attend: roll, cut into windows, mask regions that wrapped."""
    h, w = size
    region = torch.zeros(h, w)
    count = 0
    for rows in (slice(0, -block), slice(-block, -shift), slice(-shift, None)):
        for columns in (slice(0, -block), slice(-block, -shift), slice(-shift, None)):
            if shift:
                region[rows, columns] = count
                count += 1
    number = torch.roll(torch.arange(h * w).view(h, w), (-shift, -shift), (0, 1))
    allowed = torch.zeros(h * w, h * w, dtype=torch.bool)
    for r in range(0, h, block):
        for c in range(0, w, block):
            members = number[r : r + block, c : c + block].flatten()
            regions = region[r : r + block, c : c + block].flatten()
            for i, a in zip(members, regions, strict=True):
                for j, b in zip(members, regions, strict=True):
                    allowed[i, j] = a == b
    return allowed


@pytest.mark.parametrize(
    ("size", "block", "shift"),
    [((4, 6), 2, 0), ((4, 6), 2, 1), ((8, 4), 4, 2), ((6, 9), 3, 1), ((6, 6), 3, 2)],
)
def test_blocks_are_swins_windows(size, block, shift):
    points = image(*size)
    assert torch.equal(Block(block, shift)(points, points).mask, swin(size, block, shift))


def test_blocks_that_do_not_divide_the_image():
    points = image(3, 5)
    mask = Block((2, 3), (1, 0))(points, points).mask
    for i, (a, b) in enumerate(itertools.product(range(3), range(5))):
        for j, (c, d) in enumerate(itertools.product(range(3), range(5))):
            same = (a - 1) // 2 == (c - 1) // 2 and b // 3 == d // 3
            assert mask[i, j] == same


@pytest.mark.parametrize("size", [(9,), (4, 5)])
def test_congruent_points_are_multiples_of_the_stride_away(size):
    points = on(*size)
    mask = Congruent(3)(points, points).mask
    p = points.position.long().tolist()
    for i, j in itertools.product(range(len(p)), repeat=2):
        expected = all((a - b) % 3 == 0 for a, b in zip(p[i], p[j], strict=True))
        assert mask[i, j] == expected


# -- samples ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(5, 9), (12, 4), (7,), (3, 4, 6)])
def test_strided_is_an_even_lattice_in_raster_order(size):
    for r in range(1, min(size) + 1):
        index = Strided(r)(on(*size), on(*size)).index
        assert index.shape == (1, r ** len(size))
        lines = [[a * (s - 1) // max(r - 1, 1) for a in range(r)] for s in size]
        expected = []
        for place in itertools.product(*lines):
            number = 0
            for coordinate, length in zip(place, size, strict=True):
                number = number * length + coordinate
            expected.append(number)
        assert index[0].tolist() == expected == sorted(set(expected))


def test_strided_reaches_every_corner_of_a_padded_image():
    source = Points.from_image(torch.zeros(1, 1, 4, 6)).pad(((1, 1), (2, 2)))
    index = Strided(2)(source, source).index
    assert source.position[index[0]].tolist() == [[-1, -2], [-1, 7], [4, -2], [4, 7]]


def test_random_draws_without_replacement():
    points = image(5, 6, batch=3)
    for per_example in (False, True):
        for training in (False, True):
            index = Random(11, per_example=per_example).train(training)(points, points).index
            assert index.shape == ((3, 1, 11) if per_example else (1, 11))
            assert (index.diff(dim=-1) > 0).all()
            assert index.min() >= 0 and index.max() < 30
    assert torch.equal(Random(30)(points, points).index, torch.arange(30)[None])


def test_random_is_fixed_in_eval_and_follows_the_seed_in_training():
    points = image(8, 9)

    def draw(module):
        return module(points, points).index.tolist()

    fixed = Random(10, seed=3).eval()
    first = draw(fixed)
    torch.manual_seed(99)
    assert draw(fixed) == first == draw(Random(10, seed=3).eval())
    assert draw(Random(10, seed=4).eval()) != first
    state = torch.get_rng_state()
    draw(fixed)
    assert torch.equal(torch.get_rng_state(), state)
    for randomness in ("error", "same", "different"):  # what vmap does with draws
        mapped = torch.vmap(lambda x: fixed(points, points).index + x, randomness=randomness)
        assert (mapped(torch.zeros(2, dtype=torch.long)) == torch.tensor(first)).all()
    moving = Random(10, seed=3).train()
    torch.manual_seed(0)
    a, b = draw(moving), draw(moving)
    torch.manual_seed(0)
    assert (draw(moving), draw(moving)) == (a, b)
    assert a != b


def test_random_examples_differ_where_asked():
    points = image(8, 9, batch=4)
    index = Random(5, per_example=True).eval()(points, points).index
    assert len({tuple(row) for row in index[:, 0].tolist()}) > 1


def test_random_reaches_every_source():
    points = on(10)
    sampler = Random(3)
    drawn = torch.cat([sampler(points, points).index for _ in range(300)]).flatten()
    counts = drawn.bincount(minlength=10)
    assert counts.min() > 60 and counts.max() < 120  # 90 on average, deviation 8


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda: Strided(0), "at least 1"),
        (lambda: Strided(4)(on(5, 3), on(5, 3)), "shortest axis"),
        (lambda: Strided(2)(on(3), Points(torch.zeros(3, 1))), "grid"),
        (lambda: Random(0), "at least 1"),
        (lambda: Random(5)(on(4), on(4)), "5 candidates asked of 4"),
        (lambda: Random(5, seed=-1), "at least 0"),
        (lambda: Block(0), "at least 1"),
        (lambda: Block((2, 2))(on(4), on(4)), "expected 1 integers"),
        (lambda: Block(2)(Points(torch.zeros(3, 1)), on(3)), "grid"),
        (lambda: Congruent(0), "at least 1"),
        (lambda: Congruent(2)(on(3), Points(torch.zeros(3, 1))), "grid"),
    ],
)
def test_bad_patterns_are_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call()


# -- both ---------------------------------------------------------------------------------------


def pairs(subset, n, m):
    """The pairs ``(n, m)`` that a subset allows."""
    allowed = torch.ones(n, m, dtype=torch.bool)
    if subset.index is not None:
        index = subset.index.expand(n, -1)
        mask = torch.ones_like(index, dtype=torch.bool)
        if subset.mask is not None:
            mask = subset.mask.expand(n, -1)
        allowed = torch.zeros(n, m, dtype=torch.bool)
        for i in range(n):
            allowed[i, index[i][mask[i]]] = True
    elif subset.mask is not None:
        allowed = allowed & subset.mask
    return allowed


PATTERNS = [All(), Causal(), Block(2), Congruent(2), Window(3, padding=1), Strided(3), Random(5)]


@pytest.mark.parametrize("first", PATTERNS, ids=repr)
@pytest.mark.parametrize("second", PATTERNS, ids=repr)
def test_both_allow_what_each_allows(first, second):
    points = image(4, 3)
    named = (Window, Strided, Random)
    first, second = first.eval(), second.eval()
    if isinstance(first, named) and isinstance(second, named):
        with pytest.raises(ValueError, match="at most one side"):
            (first & second)(points, points)
        return
    found = pairs((first & second)(points, points), 12, 12)
    expected = pairs(first(points, points), 12, 12) & pairs(second(points, points), 12, 12)
    assert torch.equal(found, expected)


def test_a_mask_of_sources_restricts_every_kind_of_subset():
    points = image(4, 3, batch=2)
    mask = torch.rand(2, 1, 12) < 0.5
    for pattern in PATTERNS:
        subset = pattern.eval()(points, points)
        restricted = subset.restrict(mask)
        for b in range(2):
            part = restricted.mask[b] if restricted.mask.ndim == 3 else restricted.mask
            found = pairs(Subset(restricted.index, part), 12, 12)
            assert torch.equal(found, pairs(subset, 12, 12) & mask[b])
        assert subset.restrict(None) is subset


def test_only_candidates_combine():
    with pytest.raises(TypeError):
        All() & 3


def test_random_draws_real_points_of_ragged_clouds_first():
    mask = torch.arange(20) < torch.tensor([20, 6])[:, None]
    source = Points(torch.randn(2, 20, 3), mask=mask)
    for training in (True, False):
        index = Random(6).train(training)(source, source).index
        assert index.shape == (2, 1, 6)
        assert index[1, 0].tolist() == list(range(6))
