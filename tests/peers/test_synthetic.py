# SPDX-License-Identifier: Apache-2.0
"""ksae.activations.synthetic beside the reference implementation of SynthSAEBench in SAELens."""

from __future__ import annotations

import itertools

import pytest
import torch
from sae_lens.synthetic import (
    FoldedNormalMagnitudeConfig,
    HierarchyConfig,
    LinearMagnitudeConfig,
    LowRankCorrelationConfig,
    SyntheticModel,
    SyntheticModelConfig,
    ZipfianFiringProbabilityConfig,
    evals,
)
from sae_lens.synthetic.feature_dictionary import orthogonalize_embeddings

from ksae.activations.synthetic import World, WorldConfig, _spread_out
from ksae.analysis.ground_truth import Matches, mean_correlation

FEATURES, D, RANK, ROWS = 400, 48, 5, 60_000
OURS = WorldConfig(
    features=FEATURES, d=D, roots=6, branching=4, depth=3, rank=RANK, correlation=0.2, steps=0
)


@pytest.fixture(scope="module")
def pair():
    """The reference's model, and a world with the numbers that it drew."""
    model = SyntheticModel(
        SyntheticModelConfig(
            num_features=FEATURES,
            hidden_dim=D,
            firing_probability=ZipfianFiringProbabilityConfig(
                exponent=0.5, max_prob=0.4, min_prob=5e-4
            ),
            hierarchy=HierarchyConfig(
                total_root_nodes=6,
                branching_factor=4,
                max_depth=3,
                mutually_exclusive_portion=1.0,
                compensate_probabilities=True,
                scale_children_by_parent=True,
            ),
            correlation=LowRankCorrelationConfig(rank=RANK, correlation_scale=0.2),
            mean_firing_magnitudes=LinearMagnitudeConfig(start=5.0, end=4.0),
            std_firing_magnitudes=FoldedNormalMagnitudeConfig(mean=0.5, std=0.5),
            bias=0.5,
            seed=42,
        )
    )
    world, theirs = World(OURS), model.activation_generator
    world.std = theirs.std_firing_magnitudes
    world.factor, world._own = theirs.low_rank_correlation
    world.directions, world.bias = (
        t.detach() for t in (model.feature_dict.feature_vectors, model.feature_dict.bias)
    )
    return model, world


def test_what_is_not_drawn_is_the_same(pair) -> None:
    model, world = pair
    theirs = model.activation_generator
    torch.testing.assert_close(world.probability, theirs.firing_probabilities)
    torch.testing.assert_close(world.mean, theirs.mean_firing_magnitudes)
    parents = {}
    for root in model.hierarchy.roots:
        stack = [root]
        while stack:
            node = stack.pop()
            parents |= {child.feature_index: node.feature_index for child in node.children}
            stack += node.children
    ours = {i: int(p) for i, p in enumerate(world.parent) if p >= 0}
    assert ours == parents


def test_what_is_drawn_has_the_same_distribution(pair) -> None:
    """Frequencies, values, pairs and the number of features a row."""
    model, world = pair
    torch.manual_seed(0)
    theirs = torch.cat([model.activation_generator.sample(5000) for _ in range(ROWS // 5000)])
    draw = world.draw(ROWS, torch.Generator().manual_seed(1))
    ours = torch.zeros(ROWS, FEATURES).scatter_add(1, draw.indices.long(), draw.values)
    pairs = list(itertools.combinations(range(0, 120, 7), 2))
    statistics = {
        "frequency": lambda t: (t > 0).float(),
        "value": lambda t: t,
        "square": lambda t: t.square(),
        "pair": lambda t: torch.stack([((t[:, [i, j]] > 0).all(1)).float() for i, j in pairs], 1),
        "count": lambda t: (t > 0).sum(1, keepdim=True).float(),
        "count squared": lambda t: (t > 0).sum(1, keepdim=True).float().square(),
    }
    for name, of in statistics.items():
        a, b = of(ours), of(theirs)
        error = ((a.var(0) + b.var(0)) / ROWS).sqrt() + 1e-6
        assert ((a.mean(0) - b.mean(0)).abs() < 5 * error).all(), name


def test_activations_are_theirs(pair) -> None:
    model, world = pair
    draw = world.draw(300, torch.Generator().manual_seed(2))
    values = torch.zeros(300, FEATURES).scatter_add(1, draw.indices.long(), draw.values)
    want = model.feature_dict(values).detach()
    torch.testing.assert_close(world.activations(draw), want, rtol=1e-5, atol=1e-5)


def test_directions_spread_out_as_theirs() -> None:
    torch.manual_seed(0)
    start = torch.randn(100, 12)
    want = orthogonalize_embeddings(start, num_steps=20, lr=3e-3, chunk_size=32)
    torch.testing.assert_close(_spread_out(start, 20, 3e-3), want, rtol=1e-3, atol=1e-4)


def test_metrics_are_theirs(pair) -> None:
    """Of the same codes of a coder with random weights, some of whose latents are dead."""
    _, world = pair
    torch.manual_seed(3)
    decoder = world.directions[::7] + 0.1 * torch.randn(len(world.directions[::7]), D)
    decoder[1] = decoder[0]
    F = len(decoder)
    values, indices = (torch.randn(2000, 5) - 0.5).relu(), torch.rand(2000, F).argsort(1)[:, :5]
    indices[indices == 3] = 4  # latent 3 is dead
    values[:, 1:][indices[:, 1:] == 4] = 0  # so that no latent is there twice
    draw = world.draw(2000, torch.Generator().manual_seed(4))
    matches = Matches(decoder, world.directions)
    for a, b in ((0, 700), (700, 2000)):
        matches.update(values[a:b], indices[a:b], draw.values[a:b], draw.indices[a:b])
    got = matches.results()
    code = torch.zeros(2000, F).scatter_add(1, indices, values)
    truth = torch.zeros(2000, FEATURES).scatter_add(1, draw.indices.long(), draw.values)
    want = evals.compute_classification_metrics(code, truth, decoder, world.directions)
    for ours, theirs in (("f1", "f1_score"), ("precision", "precision"), ("recall", "recall")):
        assert got[ours] == pytest.approx(getattr(want, theirs), rel=1e-5), ours
    unique = evals.feature_uniqueness(decoder, world.directions)
    assert got["uniqueness"] == pytest.approx(unique)
    mcc = evals.mean_correlation_coefficient(decoder, world.directions)
    assert mean_correlation(decoder, world.directions) == pytest.approx(mcc, rel=1e-5)
    assert got["true_l0"] == pytest.approx(float((truth > 0).sum(1).float().mean()))
