# SPDX-License-Identifier: Apache-2.0
"""sae-lens in the study on SynthSAEBench: it goes on as if it had not been stopped, and what the
study measures of its weights is what sae-lens measures."""

from __future__ import annotations

import pytest
import torch
from sae_lens.synthetic import evals

from ksae.activations.synthetic import SyntheticSource, World, WorldConfig
from ksae.bench.studies import synth

WORLD = WorldConfig(
    features=60, d=16, most=0.5, least=0.02, roots=4, branching=3, depth=2, rank=3,
    correlation=0.3, steps=5, seed=1,
)  # fmt: skip


@pytest.mark.parametrize("activation", synth.ACTIVATIONS)
def test_its_state_and_its_metrics(activation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, size in {"WIDTH": 24, "L0": 3, "BATCH": 64, "PREFIXES": (8, 24)}.items():
        monkeypatch.setattr(synth, name, size)
    source = SyntheticSource(World(WORLD), held_out=256)
    cell = synth.Cell("sae-lens", activation, 3e-3, 0)
    batches = [x for _, (x, _) in zip(range(8), source.batches(64), strict=False)]
    whole, first, second = (synth.SaeLens(cell, 16, batches[0]) for _ in range(3))
    for x in batches:
        whole.step(x)
    for x in batches[:4]:
        first.step(x)
    second.load(first.state())
    for x in batches[4:]:
        second.step(x)
    for name, weight in whole.weights().items():
        assert torch.equal(weight, second.weights()[name]), name
    got = synth.measure(whole.weights(), activation, source)
    decoder, directions = whole.sae.W_dec.detach(), source.world.directions
    code, truth = [], []
    for draw in source.draws(64):
        with torch.no_grad():
            code.append(whole.sae.encode(source.world.activations(draw)))
        zeros = torch.zeros(len(draw.values), 60)
        truth.append(zeros.scatter_add(1, draw.indices.long(), draw.values))
    want = evals.compute_classification_metrics(
        torch.cat(code), torch.cat(truth), decoder, directions
    )
    assert got["f1"] == pytest.approx(want.f1_score, rel=1e-4)
    mcc = evals.mean_correlation_coefficient(decoder, directions)
    assert got["mcc"] == pytest.approx(mcc, rel=1e-4)
    assert got["l0"] == pytest.approx(float((torch.cat(code) != 0).sum(1).float().mean()), rel=1e-6)
