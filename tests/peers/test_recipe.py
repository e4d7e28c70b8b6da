# SPDX-License-Identifier: Apache-2.0
"""The steps of sae-lens and dictionary-learning in the study of recipes."""

from __future__ import annotations

import pytest
import torch
from tiny_study import BATCH, STEPS, tiny_study


@pytest.mark.parametrize("name", ["sae-lens", "dictionary-learning"])
def test_a_peer_moves_at_the_rate_that_is_set(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    study = tiny_study(monkeypatch)
    assert study.missing(name) is None
    train, held = study.rows_of()
    cell = study.Cell("resid", 24, 4, 0, STEPS, 3e-3, name)
    assert 0 < study.run(cell, train, held, BATCH)["fvu"] < 1
    peer = study.Peer(study.start_of(24, train, 0), cell)
    before = {key: value.clone() for key, value in peer.weights().items()}
    peer.step(train[:BATCH], 0.0)
    assert all(
        torch.allclose(value, before[key], atol=1e-6) for key, value in peer.weights().items()
    )
    peer.step(train[:BATCH], 3e-3)
    assert not torch.allclose(peer.weights()["W_enc"], before["W_enc"], atol=1e-4)
