# SPDX-License-Identifier: Apache-2.0
"""The command line: what it prints, what it leaves, and one line of error for each mistake.

Most tests call `ksae.cli.run`, which is `main` without the exit; those about signals start one.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny_lm
import torch
import yaml

import ksae
from ksae import cli
from ksae.cli import train
from ksae.runs import config as runconfig

D, ROWS = 12, 600
RUN = [
    "--steps",
    "12",
    "--batch-size",
    "64",
    "--warmup",
    "2",
    "--d-sae",
    "32",
    "--k",
    "4",
    "--no-progress",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder with good and bad activations, and a finished run in `run`."""
    folder = tmp_path_factory.mktemp("cli")
    rng = np.random.default_rng(0)
    x = rng.standard_normal((ROWS, D)).astype(np.float32)
    np.save(folder / "x.npy", x)
    np.save(folder / "narrow.npy", x[:, 1:])
    np.save(folder / "empty.npy", x[:0])
    np.save(folder / "flat.npy", x[0])
    np.save(folder / "words.npy", np.array(["a", "b"]))
    bad = x.copy()
    bad[100, 3] = np.nan
    np.save(folder / "nan.npy", bad)
    (folder / "foreign.safetensors").write_bytes(b"this is not a model")
    (folder / "broken.yaml").write_text("train: [1, 2")
    assert (
        cli.run(
            ["train", "--activations", str(folder / "x.npy"), "--out", str(folder / "run"), *RUN]
        )
        == 0
    )
    whole = (folder / "run" / "model.safetensors").read_bytes()
    (folder / "cut.safetensors").write_bytes(whole[: len(whole) // 2])
    return folder


@pytest.fixture()
def lm_folder(tmp_path) -> Path:
    """A tiny random language model with a tokenizer, saved as Hugging Face does."""
    path = tiny_lm.save(tmp_path / "lm", d=D)
    rng = np.random.default_rng(1)
    for number in range(8):
        text = " ".join(rng.choice(tiny_lm.WORDS[2:], 120))
        (tmp_path / f"text{number}.txt").write_text(text)
    return path


def last(*args: str | Path) -> list[str]:
    """The arguments with only the last of an option that is there twice."""
    words, kept = [str(a) for a in args], []
    for at, word in enumerate(words):
        value = at > 0 and words[at - 1].startswith("--") and not word.startswith("--")
        owner = words[at - 1] if value else word
        if not (owner.startswith("--") and owner in words[at + 1 - value + 1 :]):
            kept.append(word)
    return kept


def fails(capfd, *args: str | Path, code: int = 1) -> str:
    """The message of a command that must fail: one line, no traceback."""
    capfd.readouterr()
    assert cli.run([str(a) for a in args]) == code
    error = capfd.readouterr().err
    lines = [line for line in error.splitlines() if line.strip()]
    assert len(lines) == 1, error
    assert lines[0].startswith("ksae: error: ")
    return lines[0].removeprefix("ksae: error: ")


def start(*args: str | Path, **options) -> subprocess.Popen:
    command = [sys.executable, "-c", "from ksae.cli import main; main()", *map(str, args)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    # the tests may have been told where ksae is by sys.path only
    environment["PYTHONPATH"] = os.pathsep.join(
        [str(Path(ksae.__file__).parents[1]), os.environ.get("PYTHONPATH", "")]
    )
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **options,
    )


# --- what it says


@pytest.mark.parametrize("command", [[], ["demo"], ["train"], ["eval"], ["dashboard"], ["config"]])
def test_help(capfd, command: list[str]):
    assert cli.run([*command, "--help"]) == 0
    out = capfd.readouterr().out
    assert "Usage: ksae" in out
    if not command:
        assert all(name in out for name in ("demo", "train", "eval", "dashboard", "config"))


def test_train_has_every_setting_as_an_option_with_help_and_default(capfd, monkeypatch):
    monkeypatch.setenv("COLUMNS", "240")
    assert cli.run(["train", "--help"]) == 0
    out = re.sub(r"\s+", " ", capfd.readouterr().out)
    assert len(set(train.OPTIONS.values())) == len(train.OPTIONS)
    for key, _, default, text in runconfig.describe():
        flag = train.flag_of(key)
        assert flag in out, key
        assert text, f"{key} has no help"
        assert text[1:] in out, key
        if default is not None and not isinstance(default, bool):
            assert (
                f"[default: {default:g}]" in out
                if isinstance(default, float)
                else str(default) in out
            )


def test_config(capfd):
    assert cli.run(["config"]) == 0
    assert "torch" in capfd.readouterr().out
    assert cli.run(["config", "--json"]) == 0
    shown = json.loads(capfd.readouterr().out)
    assert shown["ops"] and shown["torch"]


# --- from end to end


def test_train_leaves_model_metrics_config_and_pictures(folder: Path):
    out = folder / "run"
    for name in (
        "model.safetensors",
        "metrics.jsonl",
        "run.yaml",
        "evaluation.json",
        "training.png",
        "latents.png",
    ):
        assert (out / name).stat().st_size > 0, name
    saved = yaml.safe_load((out / "run.yaml").read_text())
    assert saved["model"]["d_sae"] == 32 and saved["train"]["steps"] == 12
    assert ksae.load(out / "model.safetensors").d_in == D


def test_options_override_the_config_file(folder: Path, tmp_path, capfd):
    config = tmp_path / "run.yaml"
    config.write_text(
        f"data: {{activations: {folder / 'x.npy'}, holdout: 0}}\n"
        "model: {d_sae: 16, k: 2}\n"
        "train: {steps: 3, batch_size: 32, warmup: 0, clip_norm: 1.0}\n"
    )
    assert cli.run(
        ["train", str(config), "--k", "3", "--lr", "1e-3", "--clip-norm", "null", "--no-fused",
         "--out", str(tmp_path / "out")]
    ) == 0  # fmt: skip
    saved = runconfig.read(tmp_path / "out" / "run.yaml")
    assert (saved.model.d_sae, saved.model.k) == (16, 3)
    assert (saved.train.steps, saved.train.lr, saved.train.fused) == (3, 1e-3, False)
    assert saved.train.clip_norm is None
    assert "trained 3 steps" in capfd.readouterr().out


def test_eval_of_a_run_measures_what_it_held_out(folder: Path, capfd):
    capfd.readouterr()
    assert cli.run(["eval", str(folder / "run"), "--json"]) == 0
    got = json.loads(capfd.readouterr().out)
    own = json.loads((folder / "run" / "evaluation.json").read_text())
    assert got["tokens"] == own["tokens"] == 30
    assert got["fvu"] == pytest.approx(own["fvu"], rel=1e-6)


def test_eval_of_a_file_on_other_data_with_a_picture(folder: Path, tmp_path, capfd):
    copy, picture = tmp_path / "copy.safetensors", tmp_path / "f.png"
    copy.write_bytes((folder / "run" / "model.safetensors").read_bytes())
    command = [
        "eval",
        copy,
        "--activations",
        folder / "x.npy",
        "--tokens",
        "100",
        "--plot",
        picture,
    ]
    assert cli.run([str(a) for a in command]) == 0
    out = capfd.readouterr().out
    assert "FVU" in out and "100 tokens" in out and picture.stat().st_size > 5000


def test_resume_of_a_stopped_run_gives_the_bits_of_a_whole_one(folder: Path, tmp_path, capfd):
    out = tmp_path / "run"
    slow = ["--checkpoint-every", "1", "--steps", "100000", "--warmup", "2", "--decay", "0"]
    command = ["train", "--activations", folder / "x.npy", "--out", out, *RUN, *slow]
    for signum in (signal.SIGINT, signal.SIGTERM):
        process = start(*last(*command), *(["--resume"] if out.exists() else []))
        before = count(out)
        while count(out) < before + 2:
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        process.send_signal(signum)
        _, error = process.communicate(timeout=60)
        assert process.returncode == 128 + signum
        assert "Traceback" not in error and "--resume" in error.splitlines()[-1]
    stopped = max((out / "checkpoints").iterdir())
    steps = int(re.findall(r"\d+", stopped.name)[0])
    whole = tmp_path / "whole"
    assert cli.run(last(*command[:3], "--out", whole, *RUN, *slow, "--steps", str(steps))) == 0
    a, b = ksae.load(stopped), ksae.load(whole)
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    # the rest of the settings come from run.yaml
    capfd.readouterr()
    assert cli.run(["train", "--out", str(out), "--resume", "--steps", str(steps + 3)]) == 0
    assert f"trained {steps + 3:,} steps" in capfd.readouterr().out


def count(out: Path) -> int:
    """Steps of the newest checkpoint."""
    names = [p.name for p in (out / "checkpoints").glob("step_*.safetensors")]
    return max((int(re.findall(r"\d+", name)[0]) for name in names), default=0)


def test_token_ids_excluded_tokens_and_the_models_dtype(lm_folder: Path, tmp_path, capfd):
    rng = np.random.default_rng(1)
    rows = [[0, *map(int, rng.integers(2, 11, 120))] for _ in range(8)]  # each begins with BOS
    text, cache, out = tmp_path / "ids.jsonl", tmp_path / "cache", tmp_path / "run"
    text.write_text("".join(json.dumps({"input_ids": row}) + "\n" for row in rows))
    data = {"model": lm_folder, "hook": "layers.0.resid_post", "text": text, "cache": cache}
    data |= {"field": "input_ids", "exclude": "the 3", "model-dtype": "bfloat16", "out": out}

    def options(**changes: Path) -> list[str]:
        return [str(w) for key, value in (data | changes).items() for w in (f"--{key}", value)]

    assert cli.run(["train", *options(), *RUN]) == 0, capfd.readouterr().err
    meta = json.loads((cache / "train" / "meta.json").read_text())["identity"]
    kept = [[token for token in row if token > 3] for row in rows]
    assert meta["dtype"] == "bfloat16"
    assert meta["tokens"] in [sum(map(len, kept)) - len(row) for row in kept]  # one is held out
    capfd.readouterr()
    assert cli.run(["eval", str(out), "--json", "--no-progress"]) == 0
    assert json.loads(capfd.readouterr().out)["tokens"] in map(len, kept)
    for name, value, said in [
        ("exclude", "giraffe", "exclude must name tokens of the tokenizer"),
        ("model-revision", "v2", "revision must be None"),
        ("model-dtype", "int8", "dtype must be"),
    ]:
        assert said in fails(capfd, "eval", out, f"--{name}", value)
    ids = [{"input_ids": [11, *row]} for row in rows]
    text.write_text("".join(json.dumps(row) + "\n" for row in ids))
    elsewhere = options(out=tmp_path / "other", cache=tmp_path / "new")
    said = fails(capfd, "train", *elsewhere, *RUN)
    assert "token ids must be below the model's vocabulary of 11, got 11" in said


def test_language_model_from_training_to_cross_entropy(lm_folder: Path, tmp_path, capfd):
    text, out = tmp_path / "texts", tmp_path / "run"
    text.mkdir()
    for file in tmp_path.glob("text*.txt"):
        file.rename(text / file.name)
    data = [
        "--model",
        lm_folder,
        "--hook",
        "layers.0.resid_post",
        "--text",
        text,
        "--context",
        "16",
    ]
    command = ["train", *data, "--holdout", "0.25", "--out", out, *RUN]
    assert cli.run([str(a) for a in command]) == 0
    capfd.readouterr()
    assert cli.run(["eval", str(out), "--json", "--no-progress"]) == 0
    got = json.loads(capfd.readouterr().out)
    assert got["tokens"] == 2 * 120  # two held-out documents, without the BOS of each context
    assert got["ce_tokens"] == got["tokens"]
    assert got["ce_clean"] > 0 and got["ce_sae"] > 0 and got["kl_zero"] > 0
    bad = [a if a != "layers.0.resid_post" else "layers.7.resid_post" for a in data]
    assert "layers.7.resid_post" in fails(capfd, "train", *bad, "--out", tmp_path / "no", *RUN)


# --- what it refuses

BAD_TRAINING = {
    "k above d_sae": (["--k", "33"], r"k must be .*32.*33"),
    "k of zero": (["--k", "0"], r"k must be at least 1, got 0"),
    "no number": (["--lr", "fast"], r"lr must be a number, got 'fast'"),
    "unknown choice": (["--loss", "l1"], r"loss must be 'fvu' or 'mse', got 'l1'"),
    "NaN": (["--activations", "nan.npy"], r"nan\.npy.*finite|finite.*nan\.npy|nan\.npy.*row 100"),
    "no rows": (["--activations", "empty.npy"], r"at least one row"),
    "one dimension": (["--activations", "flat.npy"], r"shape \[N, d\], got \[12\]"),
    "no numbers": (["--activations", "words.npy"], r"words\.npy"),
    "no file": (["--activations", "none.npy"], r"none\.npy: no such file"),
    "foreign file": (["--activations", "foreign.safetensors"], r"foreign\.safetensors"),
    "no targets": (["--kind", "transcoder"], r"targets"),
    "both kinds of data": (["--model", "smollm2-135m"], r"data\.model must be left out"),
    "unknown device": (["--device", "abacus"], r"abacus"),
}


@pytest.mark.parametrize(("args", "message"), BAD_TRAINING.values(), ids=BAD_TRAINING.keys())
def test_bad_training(folder: Path, tmp_path, capfd, monkeypatch, args: list[str], message: str):
    monkeypatch.chdir(folder)
    command = last("train", "--activations", "x.npy", "--out", tmp_path / "out", *RUN, *args)
    said = fails(capfd, *command)
    assert re.search(message, said), said
    assert not (tmp_path / "out" / "model.safetensors").exists()


def test_bad_configuration(folder: Path, tmp_path, capfd):
    assert "YAML" in fails(capfd, "train", folder / "broken.yaml")
    assert "no.yaml" in fails(capfd, "train", tmp_path / "no.yaml")
    (tmp_path / "typo.yaml").write_text("train: {step: 3}\n")
    assert "unknown key train.step" in fails(capfd, "train", tmp_path / "typo.yaml")
    assert "data.model must be given" in fails(capfd, "train", "--out", tmp_path / "out")
    data = ["--activations", folder / "x.npy"]
    assert "new folder" in fails(capfd, "train", *data, "--out", folder / "run", *RUN)
    assert "to resume" in fails(
        capfd, "train", *data, "--out", tmp_path / "never", *RUN, "--resume"
    )
    changed = fails(capfd, "train", "--out", folder / "run", "--resume", "--lr", "0.5")
    assert re.search(r"train\.lr must be .*got 0\.5", changed)


def test_unknown_language_model_and_text(folder: Path, lm_folder: Path, tmp_path, capfd):
    data = ["--hook", "layers.0.resid_post", "--out", tmp_path / "out", *RUN]
    text = ["--text", tmp_path / "text0.txt"]
    assert "no such folder" in fails(capfd, "train", "--model", tmp_path / "nowhere", *text, *data)
    said = fails(capfd, "train", "--model", lm_folder, "--text", tmp_path / "none.txt", *data)
    assert "none.txt: no such file" in said


def test_bad_evaluation(folder: Path, tmp_path, capfd):
    x = ["--activations", folder / "x.npy"]
    assert "no such file" in fails(capfd, "eval", tmp_path / "none.safetensors", *x)
    assert "truncated" in fails(capfd, "eval", folder / "cut.safetensors", *x)
    assert "safetensors" in fails(capfd, "eval", folder / "foreign.safetensors", *x)
    narrow = fails(capfd, "eval", folder / "run", "--activations", folder / "narrow.npy")
    assert "width d_in = 12, got 11" in narrow
    assert "finite" in fails(capfd, "eval", folder / "run", "--activations", folder / "nan.npy")
    copy = tmp_path / "copy.safetensors"
    copy.write_bytes((folder / "run" / "model.safetensors").read_bytes())
    assert "name the data" in fails(capfd, "eval", copy)


def test_wrong_usage(capfd):
    assert "No such option: --bogus" in fails(capfd, "train", "--bogus", code=2)
    assert "No such command 'tarin'" in fails(capfd, "tarin", code=2)
    assert "--tokens" in fails(capfd, "demo", "--tokens", "0", code=2)


def test_a_mistake_in_a_process_of_its_own(folder: Path):
    process = start("eval", folder / "cut.safetensors", "--activations", folder / "x.npy")
    out, error = process.communicate(timeout=60)
    assert process.returncode == 1 and out == ""
    assert error.startswith("ksae: error: ") and error.count("\n") == 1


def test_debug_shows_the_traceback(folder: Path, monkeypatch):
    monkeypatch.setenv("KSAE_DEBUG", "1")
    with pytest.raises(ksae.errors.UserError):
        cli.run(["eval", str(folder / "cut.safetensors"), "--activations", "x.npy"])
