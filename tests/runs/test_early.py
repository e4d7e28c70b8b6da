# SPDX-License-Identifier: Apache-2.0
"""What can fail early fails before the first long piece of work, and leaves nothing behind."""

from __future__ import annotations

import dataclasses
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import CONFIG, QUIET, activations, d, k, model, refused, run

import ksae
from ksae import cli
from ksae.activations import ArraySource
from ksae.errors import UserError
from ksae.runs import config as runconfig
from ksae.runs import data as rundata
from ksae.runs import demo, finish
from ksae.runs.config import LogConfig
from ksae.runs.directory import open_directory
from ksae.runs.start import train

HELD = dataclasses.replace(CONFIG, eval_tokens=10_000)


class Late(Exception):
    """The long work began."""


@pytest.fixture()
def no_harvest(monkeypatch):
    """A language model and a text that are at once there, and a harvest that must not begin."""
    lm = types.SimpleNamespace(model=torch.nn.Linear(1, 1), tokenizer=None, name="lm")
    contexts = types.SimpleNamespace(
        split=lambda share: (contexts, contexts), num_tokens=9, documents=torch.zeros(1)
    )
    shown = types.SimpleNamespace(name="probe", d_in=d, d_out=None, has_gradient=False)
    monkeypatch.setattr(rundata, "load_model", lambda *a, **o: lm)
    monkeypatch.setattr(rundata, "read_text", lambda *a: contexts)
    monkeypatch.setattr(rundata, "probe", lambda *a: shown)

    def late(*args: object, **options: object) -> None:
        raise Late

    monkeypatch.setattr(rundata, "harvest", late)


def lm_config(out: Path, **changes: object) -> runconfig.RunConfig:
    config = runconfig.from_dict(
        {
            "out": str(out),
            "model": {"d_sae": 32, "k": k},
            "data": {"model": "lm", "hook": "layers.0.resid_post", "text": "pydoc"},
            "train": {"steps": 3, "device": "cpu"},
            "log": {"progress": False},
        }
    )
    return runconfig.override(config, changes)


def test_the_harvest_would_begin(tmp_path, no_harvest):
    """Otherwise the tests below could not fail."""
    with pytest.raises(Late):
        train(lm_config(tmp_path / "a"))
    assert not (tmp_path / "a").exists()


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_service_that_is_missing_is_said_before_the_harvest(
    tmp_path, no_harvest, monkeypatch, name
):
    for module in ("wandb", "torch.utils.tensorboard", "tensorboard"):
        monkeypatch.setitem(sys.modules, module, None)
    value = True if name == "tensorboard" else "project"
    config = lm_config(tmp_path / "deep" / "a", **{f"log.{name}": value})
    refused(lambda: train(config), f"log.{name} needs the package {name}", "pip install")
    assert not (tmp_path / "deep").exists()
    log = dataclasses.replace(QUIET, **{name: value})
    refused(lambda: run(tmp_path / "b", log=log), f"log.{name}")
    assert not (tmp_path / "b").exists()


def test_kinds_widths_and_gradients_are_checked_before_the_harvest(tmp_path, no_harvest):
    ksae.TopKSAE(d + 1, 32, k).save(tmp_path / "wide.safetensors")
    for changes, words in (
        ({"model.kind": "transcoder"}, ["data.target_hook must be given"]),
        ({"data.target_hook": "layers.0.mlp_out"}, ["data.target_hook must be left out"]),
        ({"model.beta": 1.0}, ["must have gradients for a GradTopKSAE"]),
        ({"train.device": "abacus"}, ["abacus"]),
        (
            {"model.start": str(tmp_path / "wide.safetensors"), "model.d_sae": 4096, "model.k": 32},
            [f"d_in = {d + 1}", f"got {d}"],
        ),
    ):
        config = lm_config(tmp_path / "new", **changes)
        refused(lambda config=config: train(config), *words)
        assert not (tmp_path / "new").exists()


def test_a_resumed_run_is_compared_before_the_harvest(tmp_path, no_harvest):
    run(tmp_path / "a")
    changed = lm_config(tmp_path / "a", **{"train.lr": 0.5})
    refused(lambda: train(changed, resume=True), "resume: ", "step_00000020")


def test_sizes_that_the_demo_cannot_have_are_said_before_its_harvest(tmp_path, monkeypatch):
    def late(*args: object, **options: object) -> None:
        raise Late

    monkeypatch.setattr(demo, "open_run_data", late)
    refused(lambda: demo.demo(tmp_path / "a", d_sae=8, k=32), "model.k", "model.d_sae = 8", "32")
    assert not (tmp_path / "a").exists()
    with pytest.raises(Late):
        demo.demo(tmp_path / "a", d_sae=64, k=32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_bad_row_in_the_held_out_part_is_said_before_training(tmp_path, dtype):
    held = activations(100, seed=1)
    held[70, 2] = float("nan") if dtype == torch.float32 else 1e6  # which float16 cannot hold
    coder = ksae.TopKSAE(d, 32, k, dtype=dtype)
    source = ArraySource([activations()])
    refused(lambda: run(tmp_path / "a", HELD, source, coder, holdout=ArraySource([held])), "finite")
    assert not (tmp_path / "a").exists()
    few = dataclasses.replace(HELD, eval_tokens=70)  # the bad row is not measured
    if dtype == torch.float16:
        held[70, 2] = 0
        assert run(tmp_path / "a", few, source, coder, holdout=ArraySource([held])).evaluation


def test_a_start_that_fails_leaves_nothing_and_the_folder_can_be_used(tmp_path):
    out = tmp_path / "deep" / "a"
    bad = activations()
    bad[3] = float("inf")
    for init_tokens in (200, 0):  # while the biases are set, and at the first steps
        config = dataclasses.replace(CONFIG, init_tokens=init_tokens, steps=9)
        quiet = LogConfig(every=100, progress=False)
        refused(lambda c=config, q=quiet: run(out, c, ArraySource([bad]), log=q), "finite")
        assert not out.exists(), list(out.iterdir())
    assert run(out).steps == 20
    (tmp_path / "mine").mkdir()
    refused(lambda: run(tmp_path / "mine", CONFIG, ArraySource([bad]), log=quiet), "finite")
    assert list((tmp_path / "mine").iterdir()) == []  # a folder that was there stays


def test_a_service_that_does_not_begin_leaves_nothing(tmp_path, monkeypatch):
    def init(**options: object) -> None:
        raise ConnectionError("no key\nfor wandb")

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    log = LogConfig(progress=False, wandb="project")
    refused(lambda: run(tmp_path / "a", log=log), "log.wandb cannot begin: no key")
    assert not (tmp_path / "a").exists()


def test_the_model_is_saved_and_said_if_its_evaluation_fails(tmp_path, monkeypatch):
    def fail(*args: object, **options: object) -> None:
        raise RuntimeError("out of memory\nin evaluation")

    monkeypatch.setattr(finish, "evaluate", fail)
    held = ArraySource([activations(100)])
    path = tmp_path / "a" / "model.safetensors"
    refused(lambda: run(tmp_path / "a", HELD, holdout=held), "is saved", str(path), "out of memory")
    assert ksae.load(path).d_in == d
    monkeypatch.undo()
    assert run(tmp_path / "a", HELD, holdout=held, resume=True).evaluation


def test_a_damaged_model_is_named_and_not_the_learning_rate(tmp_path):
    for name in ("W_enc", "b_dec"):
        coder = model()
        with torch.no_grad():
            getattr(coder, name).view(-1)[0] = float("nan")
        with pytest.raises(UserError, match=f"{name} of the model must be finite") as caught:
            run(tmp_path / "a", coder=coder)
        assert "lr" not in str(caught.value) and not (tmp_path / "a").exists()


@pytest.mark.parametrize("init_tokens", [200, 0])
def test_constant_data_are_named_and_not_the_learning_rate(tmp_path, init_tokens, capfd):
    source = ArraySource([torch.full((300, d), 0.1)])
    config = dataclasses.replace(CONFIG, init_tokens=init_tokens)
    with pytest.raises(UserError, match="must differ from each other, got") as caught:
        run(tmp_path / "a", config, source)
    assert "lr" not in str(caught.value) and "equal rows" in str(caught.value)
    assert capfd.readouterr().err == ""


def test_a_cache_of_the_run_is_kept_when_a_start_fails(tmp_path):
    """`drop` deletes what a run writes, and nothing else."""
    from ksae.runs.directory import drop

    run(tmp_path / "a")
    (tmp_path / "a" / "notes.txt").write_text("mine")
    (tmp_path / "a" / "cache").mkdir()
    drop(tmp_path / "a")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["cache", "notes.txt"]
    refused(lambda: open_directory(tmp_path / "a", restart=True), "new folder", "other files")
    np.save(tmp_path / "x.npy", np.zeros(3))


def test_a_picture_that_cannot_be_drawn_is_said_before_the_evaluation(tmp_path, capfd, monkeypatch):
    run(tmp_path / "a")
    np.save(tmp_path / "x.npy", activations().numpy())

    def late(*args: object, **options: object) -> None:
        raise Late

    monkeypatch.setattr("ksae.runs.measured.measure", late)
    command = ["eval", str(tmp_path / "a"), "--activations", str(tmp_path / "x.npy"), "--plot"]
    for name, words in (("f.abc", "got .abc"), ("f", "no suffix"), ("x.npy/f.png", "in a folder")):
        assert cli.run([*command, str(tmp_path / name)]) == 1
        assert words in capfd.readouterr().err
    with pytest.raises(Late):
        cli.run([*command, str(tmp_path / "new" / "f.png")])
    monkeypatch.setattr("ksae.analysis.plots.available", lambda: False)
    assert cli.run([*command, str(tmp_path / "f.png")]) == 1
    assert "matplotlib" in capfd.readouterr().err
