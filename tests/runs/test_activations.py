# SPDX-License-Identifier: Apache-2.0
"""Runs with other activations than TopK: train, resume, evaluate, start from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ksae
from ksae import cli
from ksae.runs import checkpoint
from ksae.runs import log as runlog

CASES: dict[str, dict[str, Any]] = {
    "batch_topk": {"k": 2, "threshold": "running", "dead-after": 40},
    "jump_relu": {"l0": 3, "l0-weight": 0.1, "theta": 0.5, "bandwidth": 0.5, "prefixes": "8,32"},
    "relu": {"l1": 0.01, "p-end": 0.5, "p-steps": "2,15", "dead-after": 40},
    "gated": {"l1": 0.01, "penalty-warmup": 15},
    "norm_topk": {"k": 2, "k-start": 9, "k-steps": 12},
    "abs_topk": {"k": 2, "dead-after": 40},
    "group_max": {"k": 4},
    "pursuit": {"k": 3},
}


def arguments(tmp_path: Path, out: str, activation: str, **more: Any) -> list[str]:
    data = tmp_path / "x.npy"
    if not data.exists():
        np.save(data, np.random.default_rng(0).standard_normal((400, 6), np.float32))
    options = {
        "activations": data, "out": tmp_path / out, "d-sae": 32, "batch-size": 32, "steps": 20,
        "checkpoint-every": 7, "threads": 1, "lr": 3e-3, "activation": activation,
        **CASES.get(activation, {}), **more,
    }  # fmt: skip
    flags = ["--no-progress", *(["--no-fused"] if activation == "pursuit" else [])]
    return [*(str(w) for n, v in options.items() for w in (f"--{n}", v)), *flags]


@pytest.mark.parametrize("activation", CASES)
def test_train_and_resume(tmp_path: Path, activation: str) -> None:
    for out in ("a", "b"):
        assert cli.run(["train", *arguments(tmp_path, out, activation)]) == 0
    checkpoint.step_path(tmp_path / "b" / "checkpoints", 20).unlink()  # as if killed after step 14
    assert cli.run(["train", "--out", str(tmp_path / "b"), "--resume", "--no-progress"]) == 0
    lines = []
    for out in ("a", "b"):
        found = runlog.read(tmp_path / out / "metrics.jsonl")
        lines.append([{n: v for n, v in r.items() if n != "tokens_per_second"} for r in found])
    assert lines[0] == lines[1]
    models = [ksae.load(tmp_path / out) for out in ("a", "b")]
    for name, t in models[0].state_dict().items():
        assert torch.equal(models[1].state_dict()[name], t), name
    found_in = models[0].activation
    if activation == "batch_topk":
        assert found_in == ksae.BatchTopK(2) and models[0].threshold > 0
        assert lines[0][-1]["l0"] == pytest.approx(2)
    elif activation == "gated":
        assert found_in == ksae.Gated(0.01) and models[0].r_mag.any()
    elif activation == "abs_topk":
        assert found_in == ksae.AbsTopK(2) and lines[0][-1]["l0"] == 2
    elif activation == "pursuit":
        assert found_in == ksae.MatchingPursuit(3) and 1 < lines[0][-1]["l0"] <= 3
    elif activation == "group_max":
        assert found_in == ksae.GroupMax(4) and 3 < lines[0][-1]["l0"] <= 4
    elif activation == "norm_topk":
        assert found_in == ksae.NormTopK(2)
        assert [round(line["l0"]) for line in lines[0]] == [4, 2]  # of steps 10 and 20
    elif activation == "relu":
        assert found_in == ksae.ReLU(0.01, p_end=0.5, p_steps=(2, 15))
        assert models[0].anneal[0] == 20
    else:
        assert isinstance(found_in, ksae.JumpReLU) and found_in.target == 3
        assert "fvu_8" in lines[0][-1]
    evaluation = json.loads((tmp_path / "a" / "evaluation.json").read_text())
    assert evaluation["l0"] > 0


def test_start_from_a_run(tmp_path: Path) -> None:
    assert cli.run(["train", *arguments(tmp_path, "a", "batch_topk")]) == 0
    data = tmp_path / "x.npy"
    start = [
        "train", "--from", str(tmp_path / "a"), "--activations", str(data), "--steps", "3",
        "--batch-size", "32", "--out", str(tmp_path / "c"), "--no-progress",
    ]  # fmt: skip
    assert cli.run(start) == 0
    assert ksae.load(tmp_path / "c").activation == ksae.BatchTopK(2)


def test_start_from_thresholds_that_are_learned_themselves(tmp_path: Path, capsys: Any) -> None:
    linear = arguments(tmp_path, "a", "jump_relu", parametrization="linear")
    assert cli.run(["train", *linear]) == 0
    made = ksae.load(tmp_path / "a")
    assert made.activation.parametrization == "linear" and "theta" in made.state_dict()
    start = ["train", "--from", str(tmp_path / "a"), "--activations", str(tmp_path / "x.npy")]
    start += ["--steps", "3", "--batch-size", "32", "--no-progress", "--out"]
    assert cli.run([*start, str(tmp_path / "c")]) == 0
    went_on = ksae.load(tmp_path / "c")
    assert went_on.activation == made.activation and not torch.equal(went_on.theta, made.theta)
    assert cli.run(["train", *arguments(tmp_path, "b", "jump_relu")]) == 0
    start[2] = str(tmp_path / "b")
    assert cli.run([*start, str(tmp_path / "d"), "--parametrization", "linear"]) != 0
    assert "--parametrization must be left out with --from" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("activation", "more", "message"),
    [
        ("batch_topk", {"multi-k": "[3]"}, "model.multi_k must be null with batch_topk"),
        ("jump_relu", {"theta": 0}, "model.theta must be a finite number above 0, got 0"),
        ("jump_relu", {"l0-weight": -1}, "model.l0_weight must be a finite number >= 0"),
        ("relu", {"l1": -1}, "model.l1 must be a finite number >= 0, got -1"),
        ("gated", {"l1": -1}, "model.l1 must be a finite number >= 0, got -1"),
        ("relu", {"k-start": 9}, "train.k_start must be null with relu, got 9"),
        ("topk", {"k-start": 33}, "train.k_start must be in [1, 32], got 33"),
        ("topk", {"k-steps": 3}, "train.k_steps must be null without train.k_start, got 3"),
        ("topk", {"penalty-warmup": 3}, "train.penalty_warmup must be 0 with topk, got 3"),
        ("group_max", {"k": 5}, "model.k must divide 32, the number of latents, got 5"),
        ("group_max", {"multi-k": "[3]"}, "model.multi_k must be null with group_max"),
        ("pursuit", {"multi-k": "[3]"}, "model.multi_k must be null with pursuit"),
        ("relu", {"p-end": 2}, "model.p_end must be in (0, 1) or None, got 2"),
        ("relu", {"multi-k": "[3]"}, "model.multi_k must be null with relu"),
        ("jump_relu", {"beta": 1}, "model.beta must be null with jump_relu, got 1"),
    ],
)
def test_messages(
    tmp_path: Path, capsys: Any, activation: str, more: dict[str, Any], message: str
) -> None:
    assert cli.run(["train", *arguments(tmp_path, "a", activation, **more)]) != 0
    assert message in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
