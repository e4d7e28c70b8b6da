# SPDX-License-Identifier: Apache-2.0
"""Gradient-aware training and evaluation, from the command line to the numbers."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import tiny_lm
import torch
from safetensors.torch import save_file

import ksae
from ksae import cli
from ksae.activations import ArraySource
from ksae.errors import UserError
from ksae.interop.load import load
from ksae.runs.config import LogConfig, TrainConfig
from ksae.runs.trainer import Trainer

D = 8
RUN = [
    *("--d-sae", "32", "--k", "3", "--batch-size", "64", "--steps", "12", "--warmup", "2"),
    *("--no-progress", "--prefetch", "0", "--init-tokens", "200", "--threads", "1"),
]
HOOK = "layers.0.resid_post"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A tiny random language model and texts for it."""
    path = tmp_path_factory.mktemp("gradients")
    tiny_lm.save(path / "lm", d=D, initializer_range=0.5)
    (path / "texts").mkdir()
    rng = np.random.default_rng(1)
    for number in range(8):
        text = " ".join(rng.choice(tiny_lm.WORDS[2:], 120))
        (path / "texts" / f"{number}.txt").write_text(text)
    return path


def command(folder: Path, out: Path, *more: str) -> list[str]:
    data = ["--model", folder / "lm", "--hook", HOOK, "--text", folder / "texts"]
    rest = ["--context", "16", "--holdout", "0.25", "--out", out, *RUN, *more]
    return ["train", *map(str, data), *map(str, rest)]


@pytest.fixture(scope="module")
def runs(folder: Path) -> Path:
    """A run with beta and one without."""
    for name, more in (("grad", ["--beta", "2"]), ("plain", [])):
        assert cli.run(command(folder, folder / name, *more)) == 0
    return folder


def said(capfd: pytest.CaptureFixture[str], *args: str | Path) -> dict[str, float]:
    capfd.readouterr()
    assert cli.run(["eval", *map(str, args), "--json", "--no-progress"]) == 0
    result: dict[str, float] = json.loads(capfd.readouterr().out)
    return result


def fails(capfd: pytest.CaptureFixture[str], *args: str | Path) -> str:
    capfd.readouterr()
    assert cli.run([str(a) for a in args]) == 1
    error = capfd.readouterr().err.strip()
    assert "\n" not in error
    return error.removeprefix("ksae: error: ")


def test_beta_trains_by_gradients_and_changes_the_result(runs: Path) -> None:
    grad, plain = (load(runs / name) for name in ("grad", "plain"))
    assert type(grad) is ksae.GradTopKSAE and type(plain) is ksae.TopKSAE
    assert (grad.beta, grad.mode, grad.grad_norm) == (2.0, "additive", "sqrt_d")
    assert not torch.equal(grad.W_dec, plain.W_dec)


def test_without_weight_the_gradient_changes_nothing(runs: Path, tmp_path: Path) -> None:
    assert cli.run(command(runs, tmp_path / "zero", "--beta", "0")) == 0
    zero, plain = (load(path) for path in (tmp_path / "zero", runs / "plain"))
    assert torch.equal(zero.W_enc, plain.W_enc) and torch.equal(zero.W_dec, plain.W_dec)


@pytest.mark.parametrize("more", [["--stream"], ["--cache", "cache"], ["--gradient", "entropy"]])
def test_ways_to_gather(runs: Path, tmp_path: Path, monkeypatch, more: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.run(command(runs, tmp_path / "run", "--beta", "2", *more)) == 0
    assert (tmp_path / "run" / "model.safetensors").exists()
    if more[0] == "--cache":  # the same rows, from disk
        meta = json.loads(Path("cache/train/meta.json").read_text())
        assert meta["identity"]["gradient"] == "labels"


def test_evaluation_reports_both_selections(runs: Path, capfd) -> None:
    got = said(capfd, runs / "grad", "--steering", "2")
    for name in ("fvu", "l0", "dead", "ce_sae", "kl_sae", "ce_increase"):
        assert np.isfinite(got[name]) and np.isfinite(got[f"{name}_oracle"])
    assert got["fvu_oracle"] != got["fvu"] and got["ce_sae_oracle"] != got["ce_sae"]
    shifts = [value for name, value in got.items() if name.startswith("steering_")]
    assert shifts and min(shifts) > 0
    plain = said(capfd, runs / "plain")
    assert not any(name.endswith("_oracle") or "steering" in name for name in plain)
    pair = said(capfd, runs / "grad", "--steering", "4", "--against", runs / "plain")
    assert pair["steering"] > 0 and pair["steering_against"] > 0
    same = said(capfd, runs / "grad", "--steering", "4", "--against", runs / "grad")
    assert same["steering"] == same["steering_against"]


def test_what_is_printed_says_that_labels_were_used(runs: Path, capfd) -> None:
    capfd.readouterr()
    assert cli.run(["eval", str(runs / "grad"), "--steering", "2", "--no-progress"]) == 0
    text = capfd.readouterr().out
    before, _, after = text.partition("uses labels (oracle)")
    assert "FVU" in before and "FVU" in after and "recovered share" in after
    assert "steering" in after


def test_a_transcoder_selects_by_the_gradient_at_its_output(runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "coder"
    more = ["--kind", "transcoder", "--target-hook", "layers.1.mlp_out", "--beta", "2"]
    line = command(runs, out, *more)
    line[line.index(HOOK)] = "layers.1.mlp_in"
    assert cli.run(line) == 0
    assert type(load(out)) is ksae.GradTopKTranscoder


def test_a_resumed_run_goes_on_with_its_gradients(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(500, D, generator=g) for _ in range(2))
    config = TrainConfig(
        batch_size=64,
        steps=12,
        warmup=2,
        decay=0.0,
        checkpoint_every=5,
        init_tokens=0,
        prefetch=0,
        threads=1,
    )

    def run(out: str, steps: int, resume: bool = False) -> ksae.SparseCoder:
        torch.manual_seed(0)
        sae = ksae.GradTopKSAE(D, 32, 3, beta=2.0, grad_norm="rms")
        trainer = Trainer(
            sae,
            ArraySource([x], None, [grad]),
            config,
            out=tmp_path / out,
            resume=resume,
            log=LogConfig(progress=False),
        )
        trainer.steps = steps
        trainer.run()
        return sae

    whole = run("whole", 12)
    run("cut", 7)
    resumed = run("cut", 12, resume=True)
    for (name, a), b in zip(whole.state_dict().items(), resumed.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_activation_files_with_gradients(tmp_path: Path, capfd) -> None:
    g = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(500, D, generator=g) for _ in range(2))
    save_file({"x": x, "g": grad}, tmp_path / "pairs.safetensors")
    save_file({"x": x}, tmp_path / "x.safetensors")
    data = ["--activations", str(tmp_path / "pairs.safetensors")]
    assert cli.run(["train", *data, "--beta", "1", "--out", str(tmp_path / "run"), *RUN]) == 0
    got = said(capfd, tmp_path / "run")
    assert got["fvu_oracle"] != got["fvu"]
    data = ["--activations", str(tmp_path / "x.safetensors")]
    message = fails(capfd, "train", *data, "--beta", "1", "--out", tmp_path / "no", *RUN)
    assert "must have gradients for a GradTopKSAE, got none" in message
    message = fails(capfd, "eval", tmp_path / "run", "--steering", "2")
    assert "--steering needs a language model" in message
    assert "--steering must be given" in fails(
        capfd, "eval", tmp_path / "run", "--against", tmp_path / "run"
    )


@pytest.mark.parametrize("beta", ["-1", "inf"])
def test_bad_beta(runs: Path, tmp_path: Path, capfd, beta: str) -> None:
    message = fails(capfd, *command(runs, tmp_path / "no", "--beta", beta))
    assert "model.beta must be" in message and not os.path.exists(tmp_path / "no")


def test_an_encoder_model_has_no_loss(runs: Path, tmp_path: Path, capfd) -> None:
    import transformers

    config = transformers.BertConfig(
        vocab_size=11,
        hidden_size=D,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    transformers.AutoTokenizer.from_pretrained(runs / "lm").save_pretrained(tmp_path / "bert")
    line = command(runs, tmp_path / "no", "--beta", "1")
    line[line.index(str(runs / "lm"))] = str(tmp_path / "bert")
    assert "no language model head" in fails(capfd, *line)
    with pytest.raises(UserError, match="must have gradients"):
        Trainer(
            ksae.GradTopKSAE(D, 16, 2),
            ArraySource([torch.randn(9, D)]),
            out=tmp_path / "none",
        )
