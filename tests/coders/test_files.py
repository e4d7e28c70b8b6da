# SPDX-License-Identifier: Apache-2.0
"""Files written before coders were split into activations and topologies read as they did then."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import ksae
from ksae.coders import file as model_file
from ksae.coders.coder import SparseCoder
from ksae.files import container
from ksae.runs import checkpoint

FIXTURES = Path(__file__).parent / "fixtures"
EXPECTED: dict[str, dict[str, Any]] = json.loads((FIXTURES / "expected.json").read_text())
TRAINING = "step_00000003"
MODELS = sorted(EXPECTED.keys() - {TRAINING})


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def sha256(t: Tensor) -> str:
    return hashlib.sha256(t.contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()


def check(model: SparseCoder, want: dict[str, Any]) -> None:
    assert model.config() == want["config"]
    assert type(model).__name__ == want["config"]["class"]
    state = model.state_dict()
    assert {n: str(t.dtype) for n, t in state.items()} == want["dtype"]
    assert {n: sha256(t) for n, t in state.items()} == want["sha256"]
    out = model.eval()(randn(5, 6, seed=99), randn(5, model.d_out, seed=98))
    parts = (out.recon, out.values, out.indices, out.loss)
    sums = [float(t.detach().double().sum()) for t in parts]
    assert sums == pytest.approx(want["output"], rel=1e-5, abs=1e-5)


@pytest.mark.parametrize("name", MODELS)
def test_a_model_reads_as_it_was_written(name: str) -> None:
    check(model_file.load_own(FIXTURES / f"{name}.safetensors"), EXPECTED[name])


@pytest.mark.parametrize("name", MODELS)
def test_a_model_is_written_as_it_was(name: str, tmp_path: Path) -> None:
    old = FIXTURES / f"{name}.safetensors"
    ksae.load(old).save(tmp_path / "again.safetensors")
    ours, theirs = (container.read_header(p) for p in (tmp_path / "again.safetensors", old))
    assert ours["config"] == theirs["config"] and ours["class"] == theirs["class"]
    check(ksae.load(tmp_path / "again.safetensors"), EXPECTED[name])


def test_a_training_checkpoint_goes_on_as_it_did() -> None:
    path = FIXTURES / f"{TRAINING}.safetensors"
    model = model_file.load_own(path).train()
    step = ksae.TrainStep(model, 1e-2, clip_norm=1.0)
    trainer = checkpoint.load_training(path, model, step)
    assert trainer["step"] == 3 and torch.equal(trainer["order"], torch.arange(4))
    metrics = step(randn(7, 6, seed=3), grad=randn(7, 6, seed=53))
    want = EXPECTED[TRAINING]["next"]
    assert {n: float(t) for n, t in metrics.items()} == pytest.approx(want, rel=1e-5)
    assert model.config() == EXPECTED[TRAINING]["config"]
