"""Neighbourhoods as arrays and as edges: two forms of one thing."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch_geometric import EdgeIndex

from convnn_geo.candidates import Window
from convnn_geo.neighborhood import Neighborhood, edge_rank
from convnn_geo.points import Points
from convnn_geo.search import knn

quick = settings(deadline=None, max_examples=60, derandomize=True)


@st.composite
def neighborhoods(draw, leads=((), (1,), (3,), (2, 2))):
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    lead = draw(st.sampled_from(leads))
    n, k, m = draw(st.integers(0, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 6))
    index = torch.randint(m, (*lead, n, k), generator=generator)
    mask = torch.rand(*lead, n, k, generator=generator) < draw(st.sampled_from([0.0, 0.5, 1.0]))
    distance = torch.rand(*lead, n, k, generator=generator)
    return Neighborhood(index, m, distance, draw(st.sampled_from([None, mask])))


def flat(hood):
    """The neighbourhood of a batch as that of one graph, its sources numbered through."""
    n, k = hood.index.shape[-2:]
    index = hood.index.reshape(math.prod(hood.index.shape[:-2]), n, k)
    start = torch.arange(len(index)) * hood.num_sources
    index = (index + start[:, None, None]).flatten(0, 1)
    mask = torch.ones_like(index, dtype=torch.bool)
    if hood.mask is not None:
        mask = hood.mask.expand(hood.index.shape).reshape(index.shape)
    return index, mask, len(start) * hood.num_sources


@quick
@given(neighborhoods(), st.integers(0, 2**31))
def test_arrays_and_edges_are_lossless(hood, seed):
    index, mask, m = flat(hood)
    distance = hood.distance.reshape(index.shape)
    edge_index, rank, slot = hood.edges()
    assert torch.equal(torch.stack(hood.to_edge_index()[:1])[0], edge_index)
    assert edge_index.shape[1] == int(mask.sum())
    # in PyG's order: by target, then rank
    order = edge_index[1] * hood.k + rank
    assert (order.diff() > 0).all()
    assert torch.equal(order, slot)
    EdgeIndex(edge_index, sparse_size=(m, len(index)), sort_order="col").validate()
    # and back, from edges in any order
    shuffle = torch.randperm(len(slot), generator=torch.Generator().manual_seed(seed))
    back = Neighborhood.from_edge_index(
        edge_index[:, shuffle],
        len(index),
        m,
        rank[shuffle],
        distance.flatten()[slot][shuffle],
        k=hood.k,
    )
    assert back.num_sources == m and back.k == hood.k and back.num_targets == len(index)
    assert (back.mask is None) == bool(mask.all())
    assert torch.equal(back.index[mask], index[mask])
    assert torch.equal(back.distance[mask], distance[mask])
    assert (back.distance[~mask] == torch.inf).all()
    if back.mask is not None:
        assert torch.equal(back.mask, mask)


@quick
@given(neighborhoods())
def test_raster_is_by_source_with_empty_slots_last(hood):
    raster = hood.raster()
    shape = hood.index.shape
    mask = torch.ones(shape, dtype=torch.bool) if hood.mask is None else hood.mask
    for found, source, kept, far in zip(
        raster.index.flatten(0, -2),
        hood.index.flatten(0, -2),
        mask.flatten(0, -2),
        raster.distance.flatten(0, -2),
        strict=True,
    ):
        count = int(kept.sum())
        expected = sorted(source[kept].tolist())
        assert found[:count].tolist() == expected
        assert far.numel() == hood.k
    if hood.mask is not None:
        assert torch.equal(raster.mask.sum(-1), mask.sum(-1))
        assert (raster.mask.int().diff(dim=-1) <= 0).all()
    lists = (hood.index, hood.distance, mask)
    pairs = zip(*(t.flatten(0, -2).tolist() for t in lists), strict=True)
    lists = (raster.index, raster.distance, mask if raster.mask is None else raster.mask)
    again = zip(*(t.flatten(0, -2).tolist() for t in lists), strict=True)
    for before, after in zip(pairs, again, strict=True):
        assert sorted(zip(*before, strict=True)) == sorted(zip(*after, strict=True))


def test_raster_of_shared_indices_with_a_mask_an_example():
    hood = Neighborhood(
        torch.tensor([[3, 1, 2]]), 4, mask=torch.tensor([[[True, False, True]], [[True] * 3]])
    )
    raster = hood.raster()
    assert raster.index.tolist() == [[[2, 3, 1]], [[1, 2, 3]]]
    assert raster.mask.tolist() == [[[True, True, False]], [[True] * 3]]


def test_raster_among_candidates_follows_their_order():
    index = torch.tensor([[[0, 4, 3], [4, 1, 7]]])
    mask = torch.tensor([[[True, True, True], [False, True, True]]])
    among = torch.tensor([[3, 4, 0, 3], [7, 4, 1, 1]])
    raster = Neighborhood(index, 8, mask=mask).raster(among)
    assert raster.index.tolist() == [[[3, 4, 0], [7, 1, 4]]]
    assert raster.mask.tolist() == [[[True] * 3, [True, True, False]]]


def test_raster_among_ascending_candidates_is_by_source_for_all_others_too():
    hood = Neighborhood(torch.tensor([[5, 8, 2], [3, 2, 8], [9, 8, 2]]), 10)
    among = torch.tensor([[2, 4, 8]]).expand(3, 3)
    assert hood.raster(among).index.tolist() == [[2, 5, 8], [2, 3, 8], [2, 8, 9]]


def test_expand_makes_views():
    hood = Neighborhood(torch.tensor([[0, 1]]), 2, torch.zeros(1, 2), torch.ones(1, 2).bool())
    wide = hood.expand(3, 5)
    assert wide.index.shape == wide.distance.shape == wide.mask.shape == (3, 5, 1, 2)
    assert wide.index.data_ptr() == hood.index.data_ptr()
    edge_index, rank = wide.to_edge_index()
    assert edge_index.shape == (2, 30) and rank.tolist() == [0, 1] * 15
    assert edge_index[1].tolist() == [i for i in range(15) for _ in range(2)]


def test_a_masked_window_of_a_batch_as_edges():
    points = Points.from_tokens(torch.zeros(2, 3, 1))
    subset = Window(3, padding=1)(points, points)
    edge_index, rank = Neighborhood(subset.index, 3, mask=subset.mask).expand(2).to_edge_index()
    one = [(0, 0, 1), (1, 0, 2), (0, 1, 0), (1, 1, 1), (2, 1, 2), (1, 2, 0), (2, 2, 1)]
    expected = one + [(s + 3, t + 3, r) for s, t, r in one]
    assert list(zip(*edge_index.tolist(), rank.tolist(), strict=True)) == expected


def test_a_mask_of_more_axes_than_the_index_makes_edges_of_all_examples():
    index = torch.tensor([[0, 1], [1, 0]])
    mask = torch.tensor([[[True, False], [True, True]], [[False, False], [False, True]]])
    edge_index, rank = Neighborhood(index, 2, mask=mask).to_edge_index()
    assert edge_index.tolist() == [[0, 1, 0, 2], [0, 1, 1, 3]]
    assert rank.tolist() == [0, 0, 1, 1]


def test_ragged_neighbours_as_edges_of_pyg():
    batch = torch.tensor([0, 0, 0, 2, 2])
    x = torch.tensor([[0.0], [1.0], [3.0], [0.0], [5.0]])
    hood = knn(x, x, 2, batch, batch)
    edge_index, rank = hood.to_edge_index()
    expected = [[0, 1, 1, 0, 2, 1, 3, 4, 4, 3], [0, 0, 1, 1, 2, 2, 3, 3, 4, 4]]
    assert edge_index.tolist() == expected
    assert rank.tolist() == [0, 1] * 5
    EdgeIndex(edge_index, sparse_size=(5, 5), sort_order="col").validate()
    back = Neighborhood.from_edge_index(edge_index, 5, 5, rank, hood.distance.flatten())
    assert torch.equal(back.index, hood.index) and torch.equal(back.distance, hood.distance)


@quick
@given(st.integers(0, 2**31), st.integers(0, 12), st.booleans())
def test_ranks_are_by_distance_then_source_or_by_appearance(seed, count, near):
    generator = torch.Generator().manual_seed(seed)
    edges = torch.randint(4, (2, count), generator=generator)
    distance = torch.randint(3, (count,), generator=generator).float() if near else None
    rank = edge_rank(edges, distance)
    for target in range(4):
        own = (edges[1] == target).nonzero().flatten().tolist()
        if near:
            own.sort(key=lambda e: (distance[e].item(), edges[0, e].item(), e))
        assert rank[own].tolist() == list(range(len(own)))


def test_moving_keeps_everything():
    hood = Neighborhood(torch.arange(3).expand(2, 3), 3, torch.zeros(2, 3), None, complete=True)
    moved = hood.to("meta")
    assert moved.complete and moved.index.is_meta and moved.distance.is_meta and moved.mask is None
    assert moved.num_sources == 3


@pytest.mark.parametrize(
    ("call", "match"),
    [
        (lambda e: Neighborhood.from_edge_index(e, 2, 3, k=1), "rank 1, but there are only 1"),
        (lambda e: Neighborhood.from_edge_index(e, 2, 3, k=0), "at least 1"),
        (lambda e: Neighborhood.from_edge_index(e, 1, 3), "targets are numbered from 0 to 1"),
        (lambda e: Neighborhood.from_edge_index(e, 2, 2), "sources are numbered from 0 to 2"),
        (lambda e: Neighborhood.from_edge_index(e - 1, 2, 3), "numbered from -1"),
        (lambda e: Neighborhood.from_edge_index(e[0], 2, 3), r"\(2, E\)|2 dimensions"),
        (lambda e: Neighborhood.from_edge_index(e.T, 2, 3), r"\(2, E\)"),
        (lambda e: Neighborhood.from_edge_index(e.int(), 2, 3), "int64"),
        (lambda e: Neighborhood.from_edge_index(e, 2, 3, e[0, :2]), "a rank for each of 3"),
        (
            lambda e: Neighborhood.from_edge_index(e, 2, 3, distance=torch.zeros(2)),
            "a distance for each of 3",
        ),
        (
            lambda e: Neighborhood.from_edge_index(e, 2, 3, torch.zeros(3).long()),
            "same rank",
        ),
    ],
)
def test_bad_edges_are_refused(call, match):
    with pytest.raises(ValueError, match=match):
        call(torch.tensor([[0, 2, 1], [0, 1, 1]]))


def test_no_edges():
    hood = Neighborhood.from_edge_index(torch.zeros(2, 0, dtype=torch.long), 2, 3, k=2)
    assert hood.index.shape == (2, 2) and not hood.mask.any()
    assert hood.to_edge_index()[0].shape == (2, 0)
    hood = Neighborhood.from_edge_index(torch.zeros(2, 0, dtype=torch.long), 2, 3)
    assert hood.k == 0
    assert hood.to_edge_index()[0].shape == (2, 0)
