# SPDX-License-Identifier: Apache-2.0
"""Metrics against ground truth: small cases by hand, and a coder that knows the features."""

from __future__ import annotations

import importlib.util
import math

import pytest
import torch

import ksae
from ksae.activations.synthetic import SyntheticSource, World, WorldConfig
from ksae.analysis.ground_truth import DEFINITIONS, Matches, compare_with_truth, mean_correlation
from ksae.errors import UserError


def test_counts_by_hand() -> None:
    directions = torch.eye(3)
    # latents 0 and 1 stand for feature 0 (the sign does not matter), latent 2 for feature 2
    decoder = torch.tensor([[2.0, 0.1, 0.0], [-1.0, 0.0, 0.5], [0.0, 0.0, 1.0]])
    matches = Matches(decoder, directions)
    assert matches.feature.tolist() == [0, 0, 2]
    matches.update(
        torch.tensor([[1.0, 2.0], [1.0, 0.0]]),  # fires 0 and 2; 0 (latent 1 has the value 0)
        torch.tensor([[0, 2], [0, 1]], dtype=torch.int32),
        torch.tensor([[3.0, 1.0], [1.0, 0.0]]),  # features 0 and 1; 2 (0 has the value 0)
        torch.tensor([[0, 1], [2, 0]], dtype=torch.int32),
    )
    matches.update(
        torch.tensor([[1.0]]), torch.tensor([[0]]), torch.tensor([[1.0]]), torch.tensor([[0]])
    )
    got = matches.results()
    # latent 0: fires 3 times, twice with feature 0, which fires twice; latent 2: never right
    assert got["precision"] == pytest.approx((2 / 3) / 3)
    assert got["recall"] == pytest.approx(1 / 3)
    assert got["f1"] == pytest.approx((2 * (2 / 3) / (2 / 3 + 1)) / 3)
    assert got["uniqueness"] == pytest.approx(2 / 3) and got["true_l0"] == pytest.approx(4 / 3)
    with pytest.raises(ValueError, match="at least one row"):
        Matches(decoder, directions).results()


def test_negative_values_of_a_code_fire() -> None:
    """As of AbsTopK: the latent stands for the feature that it finds, whichever its sign."""
    matches = Matches(torch.eye(2), torch.eye(2))
    code = torch.tensor([[-1.0, 2.0], [-3.0, 0.0]]), torch.tensor([[0, 1], [0, 1]])
    matches.update(*code, torch.tensor([[1.0, 1.0], [1.0, 0.0]]), torch.tensor([[0, 1], [0, 1]]))
    got = matches.results()
    assert got["precision"] == got["recall"] == got["f1"] == 1.0


def test_a_coder_that_knows_the_features() -> None:
    """Orthogonal directions, unit values apart from noise: the encoder reads off each feature."""
    world = World(
        WorldConfig(features=24, d=24, most=0.3, least=0.1, roots=0, rank=1, correlation=0.0,
                    steps=0, spread=(0.0, 0.0), bias=0.0)
    )  # fmt: skip
    world.directions = torch.linalg.qr(torch.randn(24, 24))[0]
    source = SyntheticSource(world, held_out=3000)
    sae = ksae.TopKSAE(24, 24, 24)
    with torch.no_grad():
        sae.W_enc.copy_(world.directions)
        sae.W_dec.copy_(world.directions)
        sae.b_enc.fill_(-1e-3)  # values are at least 4: rounding does not fire
        sae.b_dec.zero_()
    got = compare_with_truth(sae, source, batch_size=512)
    assert got.keys() == DEFINITIONS.keys()
    for name in ("f1", "precision", "recall", "uniqueness"):
        assert got[name] == pytest.approx(1.0), name
    assert got["explained_variance"] > 0.999 and got["dead"] == 0
    assert got["l0"] == pytest.approx(got["true_l0"])
    assert got["true_l0"] == pytest.approx(float(world.frequency.sum()), rel=0.05)
    with torch.no_grad():
        sae.W_dec.copy_(world.directions.roll(1, 0))  # each latent stands for its neighbour
    wrong = compare_with_truth(sae, source, batch_size=512)
    assert wrong["uniqueness"] == 1 and wrong["f1"] < 0.5
    with pytest.raises(ValueError, match="widths must be 24, got 8 and 8"):
        compare_with_truth(ksae.TopKSAE(8, 16, 2), source)


def test_a_code_with_a_number_of_entries_of_each_row() -> None:
    """BatchTopK's counts are those of the same code written out."""
    world = World(WorldConfig(features=40, d=12, roots=4, depth=1, rank=2, steps=0, least=0.05))
    source = SyntheticSource(world, held_out=300)
    torch.manual_seed(0)
    sae = ksae.SAE(12, 20, ksae.BatchTopK(3)).eval()
    got = compare_with_truth(sae, source, batch_size=300)
    assert got["l0"] == pytest.approx(3.0)
    (draw,) = source.draws(300)
    dense = sae(world.activations(draw)).code.dense(20)
    matches = Matches(sae.W_dec, world.directions)
    indices = torch.arange(20).expand(300, 20)
    matches.update(dense, indices, draw.values, draw.indices)
    for name, value in matches.results().items():
        assert got[name] == pytest.approx(value), name
    assert 0 < got["f1"] < 1


def test_the_mean_correlation_pairs_each_once(monkeypatch: pytest.MonkeyPatch) -> None:
    if importlib.util.find_spec("scipy") is None:
        with pytest.raises(UserError, match="pip install scipy"):
            mean_correlation(torch.eye(2), torch.eye(2))
        return
    a = math.cos(0.1), math.sin(0.1)
    decoder = torch.tensor([[1.0, 0.0], list(a)])  # both nearest to the first direction
    assert mean_correlation(decoder, torch.eye(2)) == pytest.approx((1 + math.sin(0.1)) / 2)
    assert mean_correlation(-decoder[:1] * 3, torch.eye(2)) == pytest.approx(1.0)
