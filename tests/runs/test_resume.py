# SPDX-License-Identifier: Apache-2.0
"""Going on with a run: what it needs, what it may change, and from where."""

from __future__ import annotations

import copy
import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import CONFIG, F, activations, assert_same_run, d, k, model, records, refused, run

import ksae
from ksae import cli
from ksae.activations import ArraySource
from ksae.runs import checkpoint
from ksae.runs import config as runconfig
from ksae.runs.config import TrainConfig
from ksae.runs.resume import CHANGEABLE, FREE, compare

LONGER = dataclasses.replace(CONFIG, steps=30)


@pytest.mark.parametrize("damage", ["none left", "all cut"])
def test_without_a_usable_checkpoint_it_is_an_error_and_the_metrics_stay(tmp_path, damage):
    run(tmp_path / "a")
    for path in (tmp_path / "a" / "checkpoints").iterdir():
        path.unlink() if damage == "none left" else path.write_bytes(path.read_bytes()[:-100])
    before = (tmp_path / "a" / "metrics.jsonl").read_bytes()
    refused(lambda: run(tmp_path / "a", resume=True), "usable checkpoint", "restart")
    assert (tmp_path / "a" / "metrics.jsonl").read_bytes() == before
    run(tmp_path / "a", restart=True)
    run(tmp_path / "b")
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_restart_drops_a_finished_run_and_a_failed_restart_does_not(tmp_path):
    run(tmp_path / "a")
    kept = sorted(p.name for p in (tmp_path / "a").iterdir())
    bad = model()
    bad.W_enc.data[0] = float("nan")
    refused(lambda: run(tmp_path / "a", coder=bad, restart=True), "W_enc")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == kept
    run(tmp_path / "a", dataclasses.replace(CONFIG, seed=1), restart=True)
    run(tmp_path / "b", dataclasses.replace(CONFIG, seed=1))
    assert_same_run(tmp_path / "a", tmp_path / "b")
    refused(lambda: run(tmp_path / "a", restart=True, resume=True), "choose one")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    refused(lambda: run(tmp_path / "other", restart=True), "new folder")
    assert (tmp_path / "other" / "thesis.tex").exists()


def test_a_finished_run_is_extended(tmp_path, capfd):
    run(tmp_path / "a")
    refused(lambda: run(tmp_path / "a", LONGER, resume=True), "train.steps must be 20", "got 30")
    result = run(tmp_path / "a", LONGER, resume=True, allow_change=True)
    assert result.steps == 30 and [line["step"] for line in records(tmp_path / "a")] == list(
        range(1, 31)
    )
    assert "train.steps: 20 -> 30 after step 20" in capfd.readouterr().err
    # the first 20 steps are those of the first run, the rest has the longer run's rates
    run(tmp_path / "b", LONGER)
    rates = [line["lr"] for line in records(tmp_path / "a")]
    assert rates[20:] == [line["lr"] for line in records(tmp_path / "b")][20:]
    # and it can be gone on with as it now is
    run(tmp_path / "a", LONGER, resume=True)


def test_another_learning_rate_from_here_on(tmp_path):
    stopped = dataclasses.replace(CONFIG, decay=0.0)
    run(tmp_path / "a", stopped)
    changed = dataclasses.replace(stopped, steps=25, lr=1e-4)
    refused(lambda: run(tmp_path / "a", changed, resume=True), "train.lr", "--allow-change")
    run(tmp_path / "a", changed, resume=True, allow_change=True)
    assert [line["lr"] for line in records(tmp_path / "a")][19:] == [3e-3, *[1e-4] * 5]


def test_what_does_not_fit_the_state_cannot_be_changed(tmp_path):
    run(tmp_path / "a")
    for change in ({"seed": 1}, {"batch_size": 32}, {"init_tokens": 7}):
        config = dataclasses.replace(CONFIG, **change)
        refused(lambda c=config: run(tmp_path / "a", c, resume=True, allow_change=True), *change)
    other = ksae.TopKSAE(8, 32, 4, dead_after=300)
    refused(lambda: run(tmp_path / "a", coder=other, resume=True, allow_change=True), "model.k")
    short = dataclasses.replace(CONFIG, steps=10)
    refused(
        lambda: run(tmp_path / "a", short, resume=True, allow_change=True),
        "train.steps must be at least the 20 steps done, got 10",
    )


def test_every_changeable_setting_exists():
    known = {key for key, *_ in runconfig.describe()}
    assert known >= CHANGEABLE and known >= FREE and not CHANGEABLE & FREE
    assert {f"train.{f.name}" for f in dataclasses.fields(TrainConfig)} & CHANGEABLE


@pytest.mark.parametrize("partly", [False, True])
def test_a_decoder_rate_that_means_the_same_is_the_same(partly):
    """Runs of before there was the setting had the rate 1, which transcoders have by default."""
    transcoder, sae = ({"class": c, "normalize_decoder": c == "SAE"} for c in ("Transcoder", "SAE"))
    asked = {"train": {"decoder_lr": None}}
    for of, given, rate in ((transcoder, None, 1.0), (sae, 3.0, None), (transcoder, 1.0, None)):
        before = {"model": of, "train": {"decoder_lr": given}}
        now = {"train": {"decoder_lr": rate}}
        compare(before, now if partly else now | {"model": of}, "x", partly=partly)
    old = {"model": transcoder, "train": {}}
    compare(old, asked if partly else asked | {"model": transcoder}, "x", partly=partly)
    old = {"model": sae, "train": {}}
    now = asked if partly else asked | {"model": sae}
    refused(lambda: compare(old, now, "x", partly=partly), "must be 1.0", "got 3.0")


def test_an_old_run_of_a_transcoder_is_resumed(tmp_path, monkeypatch):
    """One whose checkpoints say nothing of the decoder's rate."""
    x = activations()
    torch.manual_seed(0)
    start = ksae.Transcoder(d, d, F, k)
    again = lambda **more: run(
        tmp_path / "a", dataclasses.replace(CONFIG, decay=0.0, **more.pop("config", {})),
        ArraySource([x], [x.roll(1, 1)]), copy.deepcopy(start), **more,
    )  # fmt: skip
    again()
    identity = checkpoint.identity

    def old(path):
        settings = identity(path)
        del settings["train"]["decoder_lr"]
        return settings

    monkeypatch.setattr(checkpoint, "identity", old)
    assert again(resume=True, config={"steps": 25}).steps == 25


@pytest.fixture()
def folder(tmp_path, monkeypatch) -> Path:
    """A run that was made with relative names, in the folder `here`."""
    here = tmp_path / "here"
    here.mkdir()
    np.save(here / "x.npy", activations(3000).numpy())
    monkeypatch.chdir(here)
    words = "--activations x.npy --out run --d-sae 32 --k 3 --steps 6 --batch-size 64 --holdout 0.2"
    assert cli.run(["train", *words.split(), "--no-progress", "--threads", "1"]) == 0
    monkeypatch.chdir(tmp_path)
    return here


def test_a_run_is_not_tied_to_the_current_directory(folder, capfd):
    saved = runconfig.read(folder / "run" / "run.yaml")
    assert saved.out == str(folder / "run") and saved.data.activations == str(folder / "x.npy")
    assert cli.run(["eval", "here/run", "--no-progress"]) == 0
    assert "held-out tokens" in capfd.readouterr().out
    assert cli.run(["train", "--resume", "--out", "here/run"]) == 0
    assert (
        cli.run(["train", "--resume", "--allow-change", "--steps", "8", "--out", "here/run"]) == 0
    )
    assert "trained 8 steps" in capfd.readouterr().out
    assert sorted(p.name for p in Path().iterdir()) == ["here"]  # nothing written elsewhere
    assert (folder / "run" / "run_step_00000006.yaml").is_file()
    assert runconfig.read(folder / "run" / "run_step_00000006.yaml").train.steps == 6
    assert runconfig.read(folder / "run" / "run.yaml").train.steps == 8


def test_a_moved_run_and_moved_data_are_gone_on_with(folder, tmp_path, capfd):
    shutil.move(folder / "run", tmp_path / "moved")
    assert cli.run(["train", "--resume", "--out", "moved"]) == 0
    assert not (folder / "run").exists()
    shutil.move(folder / "x.npy", tmp_path / "x.npy")
    capfd.readouterr()
    command = ["train", "--resume", "--out", "moved", "--activations", "x.npy"]
    assert cli.run(command) == 1
    said = capfd.readouterr().err
    assert "data.activations must be" in said and "--allow-change" in said
    assert cli.run([*command, "--allow-change"]) == 0


def test_names_on_a_hub_and_of_the_package_stay_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pydoc").touch()
    config = runconfig.from_dict({"data": {"model": "org/name", "hook": "h", "text": "pydoc"}})
    fitted = runconfig.fitted(config)
    assert (fitted.data.model, fitted.data.text) == ("org/name", "pydoc")
    (tmp_path / "org").mkdir()
    (tmp_path / "org" / "name").mkdir()
    assert runconfig.fitted(config).data.model == str(tmp_path / "org" / "name")
    assert runconfig.fitted(fitted) == runconfig.fitted(config)
