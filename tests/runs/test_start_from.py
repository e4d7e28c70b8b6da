# SPDX-License-Identifier: Apache-2.0
"""A model that was loaded or trained before keeps its parameters; new ones get first biases."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import CONFIG, F, activations, d, k, model, refused, run

import ksae
from ksae import cli
from ksae.activations import ArraySource
from ksae.coders.initialize import is_new
from ksae.runs import config as runconfig

NO_STEPS = dataclasses.replace(CONFIG, steps=0, warmup=0)


def same(a: ksae.SparseCoder, b: ksae.SparseCoder) -> bool:
    return all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


def trained(folder: Path) -> ksae.SparseCoder:
    return ksae.load(run(folder, dataclasses.replace(CONFIG, steps=5)).model_path)


def test_a_loaded_model_keeps_its_parameters(tmp_path):
    before = trained(tmp_path / "a")
    shifted = ArraySource([activations() + 5])
    after = run(tmp_path / "b", NO_STEPS, shifted, ksae.load(tmp_path / "a")).model
    assert before.b_dec.any() and same(before, after)


def test_a_model_trained_in_this_process_keeps_its_parameters(tmp_path):
    coder = model()
    step = ksae.TrainStep(coder)
    step(activations())
    kept = {name: p.clone() for name, p in coder.named_parameters()}
    run(tmp_path / "a", NO_STEPS, coder=coder)
    assert all(torch.equal(p, kept[name]) for name, p in coder.named_parameters())


def test_weights_set_by_hand_and_no_biases_are_kept(tmp_path):
    """As of a library whose coders have no b_dec."""
    coder = model()
    with torch.no_grad():
        coder.W_dec.copy_(coder.W_dec.roll(1, 0))
    run(tmp_path / "a", NO_STEPS, coder=coder)
    assert not coder.b_dec.any()


@pytest.mark.parametrize("skip", [False, True])
def test_a_loaded_transcoder_keeps_its_parameters(tmp_path, skip):
    x = activations()
    source = ArraySource([x], [x.roll(1, 1)])
    torch.manual_seed(0)
    new = ksae.Transcoder(d, d, F, k, skip=skip)
    assert is_new(new)
    run(tmp_path / "a", dataclasses.replace(CONFIG, steps=5), source, new)
    before = ksae.load(tmp_path / "a")
    assert not is_new(before) and before.b_enc.any()
    shifted = ArraySource([x + 5], [x.roll(1, 1) + 5])
    assert same(before, run(tmp_path / "b", NO_STEPS, shifted, ksae.load(tmp_path / "a")).model)


def test_new_models_are_new_in_every_dtype():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert is_new(ksae.TopKSAE(d, F, k, dtype=dtype))
        assert is_new(ksae.GradTopKSAE(d, F, k, dtype=dtype))
        assert is_new(ksae.Transcoder(d, d + 1, F, k, skip=True, dtype=dtype))


@pytest.fixture()
def data(tmp_path) -> list[str]:
    np.save(tmp_path / "x.npy", activations(2000).numpy())
    np.save(tmp_path / "y.npy", activations(2000).numpy() + 5)
    return ["--steps", "5", "--batch-size", "64", "--no-progress", "--threads", "1"]


def train(tmp_path: Path, data: list[str], *args: str) -> int:
    return cli.run(["train", *args, *data])


def test_the_command_line_starts_from_a_model(tmp_path, data, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = ["--activations", "x.npy", "--d-sae", "32", "--k", "3", "--out", "a"]
    assert train(tmp_path, data, *first) == 0
    again = ["--from", "a", "--activations", "y.npy", "--out", "b", "--lr", "0"]
    assert train(tmp_path, data, *again) == 0
    for p, q in zip(ksae.load("a").parameters(), ksae.load("b").parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=0)  # unit rows are rounded anew
    saved = runconfig.read(tmp_path / "b" / "run.yaml")
    assert (saved.model.d_sae, saved.model.k) == (32, 3)
    assert saved.model.start == str(tmp_path / "a")
    # it resumes without the model that it started from
    (tmp_path / "a").rename(tmp_path / "gone")
    assert cli.run(["train", "--resume", "--out", "b"]) == 0
    assert cli.run(["train", "--resume", "--out", "b", "--allow-change", "--steps", "7"]) == 0
    capfd.readouterr()


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--from", "a", "--k", "3"], ["--k", "left out", "--from"]),
        (["--from", "none.safetensors"], ["no such file", "none.safetensors"]),
        (["--from", "cut.safetensors"], ["truncated"]),
        (["--from", "bad.safetensors"], ["W_enc", "bad.safetensors", "finite", "damaged"]),
        (["--from", "a", "--activations", "narrow.npy"], ["d_in = 8", "got 7"]),
        (["CONFIG", "--from", "a"], ["model.d_sae must be 32", "got 64"]),
    ],
)
def test_models_to_start_from_that_do_not_fit(tmp_path, data, capfd, monkeypatch, more, words):
    monkeypatch.chdir(tmp_path)
    assert (
        train(tmp_path, data, "--activations", "x.npy", "--d-sae", "32", "--k", "3", "--out", "a")
        == 0
    )
    whole = (tmp_path / "a" / "model.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[:-100])
    broken = ksae.load("a")
    with torch.no_grad():
        broken.W_enc[2, 3] = float("nan")
    broken.save(tmp_path / "bad.safetensors")
    np.save(tmp_path / "narrow.npy", activations().numpy()[:, 1:])
    (tmp_path / "CONFIG").write_text("model: {d_sae: 64}\n")
    data_of = [] if "--activations" in more else ["--activations", "x.npy"]
    capfd.readouterr()
    assert train(tmp_path, data, *more, *data_of, "--out", "new") == 1
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and all(word in said for word in words), said
    assert not (tmp_path / "new").exists()


def test_training_options_are_the_new_runs(tmp_path):
    np.save(tmp_path / "x.npy", activations(2000).numpy())
    ksae.TopKSAE(d, F, k, loss="mse", auxk_alpha=0.5).save(tmp_path / "old.safetensors")
    config = runconfig.from_dict(
        {
            "out": str(tmp_path / "new"),
            "model": {"start": str(tmp_path / "old.safetensors"), "auxk_alpha": 0.25},
            "data": {"activations": str(tmp_path / "x.npy")},
            "train": {"steps": 3, "batch_size": 64, "threads": 1},
            "log": {"progress": False},
        }
    )
    from ksae.runs.start import train as start

    made = start(config).model
    assert (made.d_sae, made.k, made.loss, made.auxk_alpha) == (F, k, "fvu", 0.25)
    config = runconfig.override(config, {"model.k": k + 1, "out": str(tmp_path / "other")})
    refused(lambda: start(config), f"model.k must be {k}")
