# SPDX-License-Identifier: Apache-2.0
"""Runs with other activations than TopK: train, resume, evaluate, start from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import assert_resumes

import ksae
from ksae import cli
from ksae.activations import ArraySource
from ksae.errors import UserError
from ksae.runs import config as runconfig
from ksae.runs import start
from ksae.runs.config import TrainConfig
from ksae.runs.trainer import Trainer

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
    lines = assert_resumes(lambda out: arguments(tmp_path, out, activation), tmp_path)
    model = ksae.load(tmp_path / "a")
    found_in = model.activation
    if activation == "batch_topk":
        assert found_in == ksae.BatchTopK(2) and model.threshold > 0
        assert lines[-1]["l0"] == pytest.approx(2)
    elif activation == "gated":
        assert found_in == ksae.Gated(0.01) and model.r_mag.any()
    elif activation == "abs_topk":
        assert found_in == ksae.AbsTopK(2) and lines[-1]["l0"] == 2
    elif activation == "pursuit":
        assert found_in == ksae.MatchingPursuit(3) and 1 < lines[-1]["l0"] <= 3
    elif activation == "group_max":
        assert found_in == ksae.GroupMax(4) and 3 < lines[-1]["l0"] <= 4
    elif activation == "norm_topk":
        assert found_in == ksae.NormTopK(2)
        assert [round(line["l0"]) for line in lines] == [4, 2]  # of steps 10 and 20
    elif activation == "relu":
        assert found_in == ksae.ReLU(0.01, p_end=0.5, p_steps=(2, 15))
        assert model.anneal[0] == 20
    else:
        assert isinstance(found_in, ksae.JumpReLU) and found_in.target == 3
        assert "fvu_8" in lines[-1]
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
        ("batch_topk", ["--multi-topk"], "model.multi_topk must be false with batch_topk, got"),
        ("jump_relu", ["--multi-k", "3"], "model.multi_k must be null with jump_relu, got"),
        ("abs_topk", ["--multi-k", "3,40"], "model.multi_k must be different numbers in [1, 32]"),
        ("abs_topk", ["--prefixes", "8,4096"], "model.prefixes must rise from 0 or more to"),
    ],
)
def test_what_an_activation_cannot_have_is_refused_from_a_model_too(
    activation: str, more: list[str], message: str, tmp_path: Path, capsys: Any
) -> None:
    made = arguments(tmp_path, "a", activation)
    assert cli.run(["train", *made]) == 0
    capsys.readouterr()
    start = ["train", "--from", str(tmp_path / "a"), "--activations", str(tmp_path / "x.npy")]
    start += ["--steps", "3", "--batch-size", "32", "--no-progress", "--out", str(tmp_path / "b")]
    assert cli.run([*start, *more]) == 1
    said = capsys.readouterr().err
    assert said.startswith("ksae: error: train: ") and message in said
    assert not (tmp_path / "b").exists()


def test_prefixes_and_k_of_a_model_to_start_from(tmp_path: Path) -> None:
    """Widths of its own, not of the default; fewer latents than the default k."""
    ksae.SAE(6, 16, ksae.JumpReLU()).save(tmp_path / "m.safetensors")
    made = ["train", *arguments(tmp_path, "z", "abs_topk")]
    assert cli.run(made) == 0
    start = ["train", "--from", str(tmp_path / "m.safetensors"), "--activations"]
    start += [str(tmp_path / "x.npy"), "--batch-size", "32", "--no-progress", "--prefixes", "4,16"]
    assert cli.run([*start, "--steps", "3", "--out", str(tmp_path / "b")]) == 0
    config = runconfig.read(tmp_path / "b" / "run.yaml").model
    assert (config.k, config.d_sae, config.prefixes) == (16, 16, (4, 16))
    assert ksae.load(tmp_path / "b").prefixes == (4, 16)


@pytest.mark.parametrize(
    ("activation", "made", "asked", "given"),
    [
        ("jump_relu", {"l0": 3}, {"l0": 3}, {"l0-weight": 0.5}),
        ("relu", {"l1": 0.02, "p-end": 0.5, "p-steps": "2,15"}, {"l1": 0.02}, {"l1": 0.03}),
        ("gated", {"l1": 0.02}, {"l1": 0.02}, {"no-decoder-norm": None}),
        (
            "batch_topk",
            {"threshold": "saelens"},
            {"threshold": "saelens"},
            {"threshold": "running"},
        ),
    ],
)
def test_start_from_takes_the_objective_of_the_activation(
    activation: str, made: dict[str, Any], asked: dict[str, Any], given: dict[str, Any],
    tmp_path: Path, capsys: Any,
) -> None:  # fmt: skip
    assert cli.run(["train", *arguments(tmp_path, "a", activation, **made)]) == 0
    start = ["train", "--from", str(tmp_path / "a"), "--activations", str(tmp_path / "x.npy")]
    start += ["--steps", "3", "--batch-size", "32", "--no-progress", "--out"]
    assert cli.run([*start, str(tmp_path / "b")]) == 0
    config = runconfig.read(tmp_path / "b" / "run.yaml").model
    assert all(getattr(config, name) == value for name, value in asked.items())
    assert ksae.load(tmp_path / "b").activation == ksae.load(tmp_path / "a").activation
    option, value = next(iter(given.items()))
    words = [f"--{option}", *([] if value is None else [str(value)])]
    assert cli.run([*start, str(tmp_path / "c"), *words]) == 1
    assert "must be left out with --from" in capsys.readouterr().err


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
        ("group_max", {"k-start": 8}, "train.k_start must be null with group_max, got 8"),
    ],
)
def test_messages(
    tmp_path: Path, capsys: Any, activation: str, more: dict[str, Any], message: str
) -> None:
    assert cli.run(["train", *arguments(tmp_path, "a", activation, **more)]) != 0
    assert message in capsys.readouterr().err
    assert not (tmp_path / "a").exists()


def test_each_k_of_a_schedule_is_checked_before_training(tmp_path: Path, capsys: Any) -> None:
    """Also of a model to start from, and where both ends are good."""
    coder = ksae.SAE(6, 32, ksae.GroupMax(4))
    coder.save(tmp_path / "start.safetensors")
    given = arguments(tmp_path, "a", "topk", **{"k-start": 8, "k-steps": 9})
    for option in ("--activation", "--d-sae"):
        del given[given.index(option) : given.index(option) + 2]
    want = "train.k_start must divide 32, the number of latents, got 5"
    assert cli.run(["train", "--from", str(tmp_path / "start.safetensors"), *given]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and want in said
    assert not (tmp_path / "a").exists()
    config = TrainConfig(steps=9, k_start=8, threads=1)
    with pytest.raises(UserError, match=want):
        Trainer(coder, ArraySource([torch.randn(400, 6)]), config, out=tmp_path / "a").run()
    assert not (tmp_path / "a").exists()


def unread(*args: object, **options: object) -> None:
    raise AssertionError("a model or data were read")


FUSED = [
    ("jump_relu", {"auxk": "batch_topk"}, "JumpReLU and auxk='batch_topk'"),
    ("gated", {"auxk": "batch_topk"}, "Gated and auxk='batch_topk'"),
    ("pursuit", {}, "MatchingPursuit of steps that see each other"),
]


@pytest.mark.parametrize(("activation", "more", "got"), FUSED)
def test_what_the_fused_step_does_not_serve(
    tmp_path: Path,
    capsys: Any,
    monkeypatch: Any,
    activation: str,
    more: dict[str, Any],
    got: str,
) -> None:
    """One sentence before a model or data are read; with the model to start from, before data."""
    given = [w for w in arguments(tmp_path, "a", activation, **more) if w != "--no-fused"]
    monkeypatch.setattr(start, "open_data", unread)
    with monkeypatch.context() as earlier:
        earlier.setattr(start, "_prepare", unread)
        assert cli.run(["train", *given]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"train.fused must be false with {got}, got true" in said
    kinds = {
        "jump_relu": ksae.JumpReLU(),
        "gated": ksae.Gated(),
        "pursuit": ksae.MatchingPursuit(3),
    }
    ksae.SAE(6, 32, kinds[activation]).save(tmp_path / "start.safetensors")
    options = {
        "from": tmp_path / "start.safetensors", "activations": tmp_path / "x.npy",
        "out": tmp_path / "a", **more,
    }  # fmt: skip
    assert cli.run(["train", *(str(w) for n, v in options.items() for w in (f"--{n}", v))]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"train.fused must be false with {got}, got true" in said
    assert not (tmp_path / "a").exists()
