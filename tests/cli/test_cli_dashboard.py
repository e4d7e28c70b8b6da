# SPDX-License-Identifier: Apache-2.0
"""`ksae dashboard`: from a run, from options, and one line for each mistake."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from toy_language_model import HOOK, D, llama, texts, tokenizer

from ksae import TopKSAE, cli

F, K = 32, 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A language model in `lm`, a text, and a run in `run`."""
    folder = tmp_path_factory.mktemp("dashboards")
    llama().save_pretrained(folder / "lm")
    llama().model.save_pretrained(folder / "headless")
    for name in ("lm", "headless"):
        tokenizer().save_pretrained(folder / name)
    (folder / "text.txt").write_text("\n===\n".join(texts()))
    config = f"""
model: {{d_sae: {F}, k: {K}}}
data:
  model: {folder / "lm"}
  hook: {HOOK}
  text: {folder / "text.txt"}
  separator: "==="
  context: 24
  holdout: 0.2
train: {{steps: 10, batch_size: 64, warmup: 2, init_tokens: 64}}
"""
    (folder / "config.yaml").write_text(config)
    run = ["train", str(folder / "config.yaml"), "--out", str(folder / "run"), "--no-progress"]
    assert cli.run(run) == 0
    TopKSAE(D, F, K).save(folder / "lone.safetensors")
    TopKSAE(D + 1, F, K).save(folder / "wide.safetensors")
    return folder


def fails(capfd, *args: object) -> str:
    """The message of a command that must fail: one line, no traceback."""
    capfd.readouterr()
    assert cli.run([str(a) for a in args]) == 1
    lines = [
        line for line in capfd.readouterr().err.splitlines() if line.startswith("ksae: error: ")
    ]
    assert len(lines) == 1
    return lines[0].removeprefix("ksae: error: ")


def test_the_dashboard_of_a_run(folder: Path, tmp_path: Path, capfd) -> None:
    labels = tmp_path / "labels.json"
    labels.write_text(json.dumps({"1": "first"}))
    exports = ["--neuronpedia", str(tmp_path / "np"), "--saedashboard", str(tmp_path / "sd")]
    out = tmp_path / "pages"
    args = ["dashboard", str(folder / "run"), "--out", str(out), "--labels", str(labels)]
    assert cli.run(args + exports) == 0
    assert (tmp_path / "np" / "lm" / "1-ksae" / "explanations" / "batch-0.jsonl.gz").is_file()
    assert (tmp_path / "sd" / "batch-0.json").is_file()
    printed = capfd.readouterr().out.splitlines()
    assert printed[-1] == f"open      {out / 'index.html'}"
    assert (out / "index.html").is_file()
    meta = (out / "data" / "meta.js").read_text()
    assert '"title":"run"' in meta and '"length":24' in meta
    assert '"labels":{"1":"first"}' in (out / "data" / "index.js").read_text()


def test_the_dashboard_of_a_file(folder: Path, tmp_path: Path) -> None:
    args = ["dashboard", folder / "lone.safetensors", "--out", tmp_path / "d", "--hook", HOOK]
    args += ["--model", folder / "headless", "--text", folder / "text.txt", "--tokens", 40]
    assert cli.run([str(a) for a in args]) == 0
    assert "no unembedding" in (tmp_path / "d" / "data" / "meta.js").read_text()


def test_mistakes_are_one_line(folder: Path, tmp_path: Path, capfd) -> None:
    run, out = folder / "run", tmp_path / "d"
    lone = folder / "lone.safetensors"
    assert "--model must be given" in fails(capfd, "dashboard", lone, "--out", out)
    labels = tmp_path / "labels.json"
    labels.write_text('{"32": "none"}')
    message = fails(capfd, "dashboard", run, "--out", out, "--labels", labels)
    assert "a latent must be in [0, 32), got '32'" in message
    assert not out.exists()
    message = fails(capfd, "dashboard", folder / "none", "--out", out)
    assert "none" in message
    lm = ["--model", folder / "lm", "--text", folder / "text.txt"]
    message = fails(
        capfd, "dashboard", folder / "wide.safetensors", "--out", out, *lm, "--hook", HOOK
    )
    assert f"{HOOK} must have the coder's width d_in = 17, got 16" in message
    message = fails(capfd, "dashboard", run, "--out", out, "--hook", "layers.7.resid_post")
    assert "layers.{0..1}" in message
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    message = fails(capfd, "dashboard", run, "--out", tmp_path / "full")
    assert "must be a new folder or a dashboard" in message
