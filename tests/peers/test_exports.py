# SPDX-License-Identifier: Apache-2.0
"""Exports read by the importers themselves: SAEDashboard's classes and delphi's loader.

Neuronpedia's importer is in no package; its client reads answers of the server, not rows to import.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from delphi.config import ConstructorConfig, SamplerConfig
from delphi.latents import LatentDataset
from sae_dashboard.neuronpedia.neuronpedia_dashboard import NeuronpediaDashboardBatch
from toy_language_model import HOOK, D, contexts, llama, tokenizer

from ksae import TopKSAE
from ksae.activations import capture
from ksae.analysis.dashboard import build
from ksae.analysis.exports import delphi, saedashboard

F, K = 40, 3
LABELS = {3: "three", 39: "<b>last</b>"}


def coder() -> TopKSAE:
    torch.manual_seed(3)
    return TopKSAE(D, F, K)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("exports") / "pages"
    build(coder(), llama(), tokenizer(), contexts(), HOOK, out, labels=LABELS, title="toy")
    return out


def test_batches_are_saedashboards_own(folder: Path, tmp_path: Path) -> None:
    """Its classes read a batch and write the same."""
    number = saedashboard(folder, tmp_path, model="toy")
    seen = 0
    for i in range(number):
        data = json.loads((tmp_path / f"batch-{i}.json").read_text())
        batch = NeuronpediaDashboardBatch(**data)
        assert batch.to_dict() == data
        for feature in batch.features:
            assert feature.feature_index == seen
            assert all(max(a.values) > 0 for a in feature.activations)
            seen += 1
    assert seen == F


@pytest.mark.parametrize("splits", [1, 3])
def test_caches_are_read_by_delphis_loader(tmp_path: Path, splits: int) -> None:
    text = contexts()
    delphi(coder(), llama(), text, HOOK, tmp_path, model_name="toy", splits=splits)
    data = LatentDataset(
        tmp_path, SamplerConfig(), ConstructorConfig(), tokenizer(), modules=[HOOK]
    )
    assert torch.equal(data.tokens, text.ids.long())
    dense = torch.zeros(*text.ids.shape, F)
    for buffer in data.buffers:
        for found in buffer:
            where, values = found.activation_data
            assert found.latent.module_name == HOOK
            assert (where[:, 2] == found.latent.latent_index).all()
            dense[tuple(where.T)] = values.float()
    inputs = {"input_ids": text.ids.long(), "attention_mask": text.attended().long()}
    with torch.no_grad():
        expected = coder().encode_dense(capture(llama(), [HOOK], inputs)[HOOK])
    expected = expected * text.mask().unsqueeze(-1)
    torch.testing.assert_close(dense, expected, rtol=1e-3, atol=1e-5)
