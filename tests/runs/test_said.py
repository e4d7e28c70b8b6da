# SPDX-License-Identifier: Apache-2.0
"""What is printed is what it says: held-out, training or other tokens, ends, divergence, dead."""

from __future__ import annotations

import dataclasses
import json
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import CONFIG, F, activations, d, k, model, records, refused, run

import ksae
from ksae import cli
from ksae.activations import ArraySource, CacheWriter
from ksae.analysis import plots
from ksae.runs import finish
from ksae.runs.config import LogConfig
from ksae.runs.origin import differences

HELD = dataclasses.replace(CONFIG, eval_tokens=10_000)
SIZES = ["--d-sae", "32", "--k", "3", "--batch-size", "64", "--steps", "6", "--threads", "1"]


def train(*args: str | Path) -> int:
    return cli.run(["train", *map(str, args), *SIZES, "--no-progress"])


@pytest.fixture()
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    np.save(tmp_path / "x.npy", activations(600).numpy())
    np.save(tmp_path / "other.npy", activations(300, seed=5).numpy())
    return tmp_path


def evaluated(capfd, *args: str | Path) -> tuple[str, str, dict[str, object]]:
    """Printed lines, warnings, and the JSON of an evaluation."""
    capfd.readouterr()
    command = ["eval", *map(str, args), "--no-progress"]
    assert cli.run(command) == 0
    out, error = capfd.readouterr()
    assert cli.run([*command, "--json"]) == 0
    return out, error, json.loads(capfd.readouterr().out)


@pytest.mark.parametrize(
    ("holdout", "more", "what"),
    [
        ("0.2", [], "120 held-out tokens"),
        ("0", [], "600 training tokens (the run held nothing out)"),
        ("0.2", ["--activations", "other.npy"], "300 tokens"),
        ("0", ["--activations", "other.npy"], "300 tokens"),
    ],
)
def test_evaluation_says_what_its_tokens_are(folder, capfd, holdout, more, what):
    assert train("--activations", "x.npy", "--out", "run", "--holdout", holdout) == 0
    said = capfd.readouterr().out
    assert ("on 120 held-out tokens:" in said) == (holdout == "0.2")
    out, _, numbers = evaluated(capfd, "run", *more)
    assert out.splitlines()[0].endswith(f", on {what}")
    assert f"{numbers['tokens']} {numbers['measured_on']}" == what


def test_held_out_tokens_are_said_and_few_are_warned_of(tmp_path, capfd):
    log = LogConfig(every=1)
    run(tmp_path / "a", HELD, holdout=ArraySource([activations(175)]), log=log)
    said = capfd.readouterr().err
    assert "data: 500 tokens to train on, 175 held out" in said
    assert "held out: 175 tokens only" in said
    run(tmp_path / "b", HELD, holdout=ArraySource([activations(2000)]), log=log)
    said = capfd.readouterr().err
    assert "2,000 held out" in said and "only" not in said
    run(tmp_path / "c", log=log)
    assert "0 held out" in capfd.readouterr().err


def test_a_dead_after_longer_than_the_run_is_said(tmp_path, capfd):
    def said(dead_after: int, folder: str, **options: object) -> bool:
        torch.manual_seed(0)
        coder = ksae.TopKSAE(d, F, k, dead_after=dead_after)
        run(tmp_path / folder, coder=coder, **options)
        return "no latent will count as dead" in capfd.readouterr().err

    tokens = CONFIG.steps * CONFIG.batch_size
    assert said(tokens, "a") and not said(tokens - 1, "b")
    assert not said(tokens, "a", resume=True)  # a finished run has nothing left


def test_the_title_of_the_picture_is_the_end_and_no_mean(tmp_path, monkeypatch):
    lines = [{"step": n, "tokens": n, "fvu": 1 / n} for n in range(1, 101)]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    titles = []
    monkeypatch.setattr(
        plots, "_save", lambda figure, path: titles.append(figure.axes[0].get_title())
    )
    plots.training_curve(tmp_path / "m.jsonl", tmp_path / "m.png")
    assert titles == ["Training: FVU 0.010 in the last batch logged"]


def test_a_run_that_diverged_ends_with_an_error_and_its_model(folder, capfd):
    assert train("--activations", "x.npy", "--out", "run", "--lr", "1000", "--warmup", "0") == 1
    said = capfd.readouterr().err.splitlines()[-1]
    assert "diverged: FVU" in said and "lower train.lr" in said
    assert ksae.load("run").d_in == d
    assert train("--activations", "x.npy", "--out", "good") == 0


def test_the_verdict_on_a_resumed_run_is_that_of_the_whole(tmp_path):
    coder = model()
    with torch.no_grad():
        coder.b_dec += 100  # is kept: far from the data, and after 20 steps still
    worse = dataclasses.replace(CONFIG, lr=0.0)
    for resume in (False, True):
        result = run(tmp_path / "a", worse, coder=coder, resume=resume)
        assert result.metrics["fvu"] > 11  # and no error: it began there


def test_what_counts_as_diverged():
    path = Path("model.safetensors")
    lines = [{"fvu": 0.9}, {"fvu": 0.5}]
    said = lambda first, logged, held: finish.check_learned(first, logged, held, path)
    assert said(0.9, lines, {"fvu": 0.8}) is None
    assert "worse than the mean" in str(said(0.9, lines, {"fvu": 1.5}))
    refused(lambda: said(0.9, lines, {"fvu": 11.0}), "diverged", str(path))
    refused(lambda: said(0.9, [{"fvu": 1e14}], {}), "1e+14")
    assert said(40.0, [{"fvu": 30.0}], {}) is None  # it learns
    assert said(0.9, lines, {"fvu": float("inf")}) is None  # one held-out row
    assert said(None, [], {}) is None


def test_missing_pictures_are_said_before_training(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(plots, "available", lambda: False)
    result = run(tmp_path / "a", log=LogConfig(every=10))
    said = capfd.readouterr().err.splitlines()
    assert said[0] == finish.NO_PICTURES and "matplotlib" in said[0] and result.plots == []


class Service:
    """A stand-in for a service, which keeps what it is told."""

    def __init__(self) -> None:
        self.summary: dict[str, float] = {}
        self.scalars: list[tuple[str, float, int]] = []
        self.closed = 0

    def log(self, record: dict[str, float], step: int) -> None:
        pass

    def finish(self) -> None:
        self.closed += 1

    def add_scalar(self, name: str, value: float, step: int) -> None:
        assert not self.closed
        self.scalars.append((name, value, step))

    close = finish


def test_services_get_the_held_out_result(tmp_path, monkeypatch):
    wandb, board = Service(), Service()
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **o: wandb))
    fake = types.SimpleNamespace(SummaryWriter=lambda *a, **o: board)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", fake)
    log = LogConfig(every=1, progress=False, tensorboard=True, wandb="project")
    result = run(tmp_path / "a", HELD, holdout=ArraySource([activations(100)]), log=log)
    assert wandb.summary["held_out/fvu"] == result.evaluation["fvu"]
    held = [s for s in board.scalars if s[0] == "held_out/fvu"]
    assert held == [("held_out/fvu", result.evaluation["fvu"], 20)]
    assert wandb.closed == board.closed == 1


# --- a wrong model of equal width


def cache(folder: Path, hook: str, fingerprint: str = "f") -> Path:
    identity = {"model": "lm", "hook": hook, "target_hook": None, "model_fingerprint": fingerprint}
    writer = CacheWriter(folder, identity)
    x = activations(600)
    numbers = torch.arange(600, dtype=torch.int32)
    rows = {"x": x, "tokens": numbers, "contexts": numbers, "positions": numbers}
    writer.append(rows, 600)
    writer.finish()
    return folder


def test_activations_of_another_layer_or_model_are_warned_of(folder, capfd):
    assert train("--activations", cache(folder / "c0", "layers.0.resid_post"), "--out", "run") == 0
    assert evaluated(capfd, "run")[1] == ""
    same = cache(folder / "c1", "layers.0.resid_post")
    assert evaluated(capfd, "run", "--activations", same)[1] == ""
    other = cache(folder / "c2", "layers.3.resid_post")
    warned = evaluated(capfd, "run", "--activations", other)[1]
    assert "warning" in warned and "layers.0.resid_post there, layers.3.resid_post here" in warned
    tuned = cache(folder / "c3", "layers.0.resid_post", "g")
    assert "weights of the language model" in evaluated(capfd, "run", "--activations", tuned)[1]
    # and where a model goes on with other activations
    command = [
        "train",
        "--from",
        "run",
        "--activations",
        str(other),
        "--out",
        "next",
        "--steps",
        "2",
    ]
    assert cli.run([*command, "--batch-size", "64", "--no-progress"]) == 0
    assert "trained on other activations" in capfd.readouterr().err


def test_a_model_in_the_folder_of_another_run_is_warned_of(folder, capfd):
    assert train("--activations", "x.npy", "--out", "a") == 0
    assert train("--activations", "other.npy", "--out", "b") == 0
    wrong = folder / "b" / "copy.safetensors"
    wrong.write_bytes((folder / "a" / "model.safetensors").read_bytes())
    assert "x.npy there" in evaluated(capfd, wrong)[1]
    assert evaluated(capfd, "b")[1] == ""


def test_what_differs_between_two_origins():
    a = {"model": "x", "hook": "h", "model_fingerprint": "1"}
    assert differences(a, a | {"model": "y"}) == []  # the same weights under another name
    assert len(differences(a, {"model": "y", "hook": "h"})) == 1
    assert len(differences(a, a | {"model_fingerprint": "2", "hook": "i"})) == 2
    assert differences({}, a) == differences(a, {}) == []


def test_a_damaged_model_is_not_evaluated(folder, capfd):
    assert train("--activations", "x.npy", "--out", "a") == 0
    broken = ksae.load("a")
    broken.W_dec.data[0, 0] = float("inf")
    broken.save("broken.safetensors")
    capfd.readouterr()
    assert cli.run(["eval", "broken.safetensors", "--activations", "x.npy"]) == 1
    said = capfd.readouterr().err
    assert "W_dec of the model broken.safetensors must be finite" in said and said.count("\n") == 1


def test_why_cross_entropy_is_left_out_is_said(folder, capfd):
    assert train("--activations", "x.npy", "--out", "a") == 0
    capfd.readouterr()
    assert cli.run(["eval", "a"]) == 0
    assert "cross-entropy is left out: a file of activations has no" in capfd.readouterr().err
    assert cli.run(["eval", "a", "--ce-tokens", "0"]) == 0
    assert "left out" not in capfd.readouterr().err
    assert records(folder / "a") and model().d_in == d
