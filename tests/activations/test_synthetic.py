# SPDX-License-Identifier: Apache-2.0
"""Sparse draws of synthetic features against dense ones, written out from the definition."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
from torch import Tensor

from ksae.activations.synthetic import (
    SyntheticSource,
    World,
    WorldConfig,
    _compensation,
    _skip,
    _spread_out,
)

SMALL = WorldConfig(
    features=60, d=16, most=0.5, least=0.02, roots=4, branching=3, depth=2, rank=3,
    correlation=0.3, steps=5, seed=1,
)  # fmt: skip
ROWS = 40_000


def dense(world: World, rows: int, seed: int) -> Tensor:
    """Values [rows, features] by a normal number for each entry, then parents, then siblings."""
    c = world.config
    torch.manual_seed(seed)
    own = (1 - world.factor.square().sum(1)).sqrt()
    z = torch.randn(rows, c.rank) @ world.factor.T + own * torch.randn(rows, c.features)
    fires = z > torch.distributions.Normal(0, 1).icdf(1 - world.probability)
    value = fires * (world.mean + world.std * torch.randn(rows, c.features)).relu()
    for feature in range(c.features):  # parents come before their children
        parent = int(world.parent[feature])
        if parent >= 0:
            value[:, feature] *= value[:, parent] / world.mean[parent]
        group = world.children[feature]
        group = group[group >= 0]
        if len(group):
            lot = torch.where(value[:, group] > 0, torch.rand(rows, len(group)), -1.0)
            lost = torch.arange(len(group)) != lot.argmax(1, keepdim=True)
            value[:, group] = torch.where(lost, 0.0, value[:, group])
    return value


def full(world: World, rows: int, seed: int) -> Tensor:
    draw = world.draw(rows, torch.Generator().manual_seed(seed))
    zeros = torch.zeros(rows, world.config.features)
    return zeros.scatter_add(1, draw.indices.long(), draw.values)


def assert_same_mean(a: Tensor, b: Tensor, name: str) -> None:
    """Columns of two samples [rows, n]: no mean differs by more than chance, 5 sigma, allows."""
    error = (a.var(0) / len(a) + b.var(0) / len(b)).sqrt() + 1e-9
    far = ((a.mean(0) - b.mean(0)) / error).abs()
    assert far.max() < 5, f"{name}: column {int(far.argmax())} is {far.max():.1f} sigma away"


@pytest.mark.parametrize(
    "change",
    [{}, {"correlation": 0.0}, {"depth": 0}, {"most": 0.02, "least": 0.002}, {"roots": 25}],
    ids=["all", "no correlation", "no trees", "rare", "trees cut off"],
)
def test_sparse_draws_have_the_distribution_of_dense_ones(change: dict[str, float]) -> None:
    """Frequencies, values, their squares, and how often any two features fire together."""
    world = World(dataclasses.replace(SMALL, **change))  # type: ignore[arg-type]
    a, b = full(world, ROWS, seed=3), dense(world, ROWS, seed=4)
    assert_same_mean((a > 0).float(), (b > 0).float(), "frequency")
    assert_same_mean(a, b, "value")
    assert_same_mean(a.square(), b.square(), "square")
    pairs = list(itertools.combinations(range(0, 60, 3), 2))
    both = lambda t: torch.stack([((t[:, i] > 0) & (t[:, j] > 0)).float() for i, j in pairs], 1)
    assert_same_mean(both(a), both(b), "pair")
    count = lambda t: (t > 0).sum(1, keepdim=True).float()
    assert_same_mean(count(a), count(b), "count")
    assert_same_mean(count(a).square(), count(b).square(), "count squared")


def test_parents_siblings_and_correlation() -> None:
    world = World(SMALL)
    value = full(world, ROWS, seed=5)
    fires = value > 0
    for feature in range(SMALL.features):
        if (parent := int(world.parent[feature])) >= 0:
            assert fires[fires[:, feature], parent].all(), "a child without its parent"
        group = world.children[feature]
        assert (fires[:, group[group >= 0]].sum(1) <= 1).all(), "siblings together"
    assert [int((world.parent == p).sum()) for p in (0, 3, 15, 16)] == [3, 3, 3, 0]
    free = (world.parent < 0).nonzero()[:, 0]
    frequency = fires[:, free].float().mean(0)
    expected = world.frequency[free]
    far = (frequency - expected) / (expected * (1 - expected) / ROWS).sqrt()
    assert far.abs().max() < 5
    # of those with more of the factor in common more fire together than chance has it
    cosine = world.factor[free] @ world.factor[free].T
    i, j = divmod(int(cosine.fill_diagonal_(0).argmax()), len(free))
    together = (fires[:, free[i]] & fires[:, free[j]]).float().mean()
    assert together > 1.1 * frequency[i] * frequency[j]


def test_children_fire_about_as_often_as_they_are_meant_to() -> None:
    world = World(dataclasses.replace(SMALL, correlation=0.0))
    wanted, parent = world.frequency, world.parent
    fires = (full(world, ROWS, seed=6) > 0).float().mean(0)
    child = (parent >= 0) & (world.probability < 1)
    assert child.any() and (fires[child] / wanted[child] - 1).abs().max() < 0.35
    children = torch.tensor([[1, 2], [-1, -1], [-1, -1]])
    factors = _compensation(torch.tensor([0.5, 0.2, 0.1]), children)
    torch.testing.assert_close(factors, torch.tensor([1.0, 2 * (1 + 0.2), 2 * (1 + 0.4)]))


@pytest.mark.parametrize("p", [1 / 64, 0.5])
def test_skipping_is_a_coin_at_every_place(p: float) -> None:
    generator = torch.Generator().manual_seed(0)
    hits, runs = torch.zeros(50), 4000
    for _ in range(runs):
        at = _skip(50, p, generator)
        assert (at.diff() > 0).all() and (len(at) == 0 or (at[0] >= 0 and at[-1] < 50))
        hits[at] += 1
    assert ((hits / runs - p).abs() < 5 * math.sqrt(p * (1 - p) / runs)).all()
    assert len(_skip(0, p, generator)) == 0


def test_activations_are_sums_of_directions() -> None:
    world = World(SMALL)
    draw = world.draw(500, torch.Generator().manual_seed(0))
    value = torch.zeros(500, SMALL.features).scatter_add(1, draw.indices.long(), draw.values)
    want = value @ world.directions + world.bias
    torch.testing.assert_close(world.activations(draw), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(world.bias.norm(), torch.tensor(0.5))
    assert world.draw(0, torch.Generator()).values.shape[0] == 0


def test_directions_spread_out_as_autograd_has_it() -> None:
    """Two steps of Adam on the loss written out over all pairs, then unit rows."""
    torch.manual_seed(0)
    w = torch.nn.functional.normalize(torch.randn(12, 5, dtype=torch.float64), dim=1)
    p = w.clone().requires_grad_()
    optimizer = torch.optim.Adam([p], lr=0.02)
    for _ in range(2):
        dots = p @ p.T
        own = dots.diagonal()
        loss = dots.square().sum() - own.square().sum() + 12 * (own - 1).square().sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    want = torch.nn.functional.normalize(p.detach(), dim=1)
    got = _spread_out(w, 2, 0.02)
    torch.testing.assert_close(got, want)
    overlap = lambda t: (t @ t.T).fill_diagonal_(0).square().sum()
    assert overlap(_spread_out(w, 40, 0.02)) < 0.9 * overlap(w)


def test_a_source_depends_on_seed_and_step_only() -> None:
    source = SyntheticSource(World(SMALL), held_out=70)
    take = lambda **how: [x for x, _ in itertools.islice(source.batches(32, **how), 4)]
    straight, late = take(seed=3), take(seed=3, start_step=2)
    assert torch.equal(straight[2], late[0]) and torch.equal(straight[3], late[1])
    assert not torch.equal(straight[0], straight[1])
    assert not torch.equal(straight[0], take(seed=4)[0])
    swept = [x for x, _ in source.sweep(32)]
    assert [len(x) for x in swept] == [32, 32, 6]
    for x, draw in zip(swept, source.draws(32), strict=True):
        assert torch.equal(x, source.world.activations(draw))
    assert (source.d_in, source.d_out, source.num_tokens) == (16, None, None)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"features": 0}, "features must be >= 1, got 0"),
        ({"depth": -1}, "depth must be >= 0, got -1"),
        ({"least": 0.9}, "0 < least <= most <= 1 must hold, got 0.9 and 0.5"),
        ({"correlation": -1.0}, "correlation must be >= 0"),
    ],
)
def test_messages(change: dict[str, float], words: str) -> None:
    with pytest.raises(ValueError, match=f"WorldConfig: {words}"):
        dataclasses.replace(SMALL, **change)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="SyntheticSource: held_out must be >= 1, got 0"):
        SyntheticSource(World(dataclasses.replace(SMALL, steps=0)), held_out=0)
