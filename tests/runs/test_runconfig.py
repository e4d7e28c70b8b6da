# SPDX-License-Identifier: Apache-2.0
"""The configuration of a run, and the learning-rate schedule."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from ksae.errors import UserError
from ksae.runs import config as runconfig
from ksae.runs.config import RunConfig, from_dict, override
from ksae.runs.model_config import ModelConfig
from ksae.step.schedule import learning_rate


def test_a_written_file_is_complete_and_reads_back(tmp_path):
    config = override(
        RunConfig(), ["model.k=7", "train.lr=1e-5", "train.eps=1e-12", "data.hook=layers.1.mlp_in"]
    )
    path = tmp_path / "run.yaml"
    runconfig.write(config, path)
    assert runconfig.read(path) == config
    text = path.read_text()
    for key, *_ in runconfig.describe():
        assert key.split(".")[-1] + ":" in text
    assert config.train.lr == 1e-5 and config.model.k == 7  # 1e-5 is text to YAML 1.1


def test_what_a_file_leaves_out_has_its_default(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("model: {d_sae: 64, k: 4}\ntrain:\n  tokens: 1e6\ndata:\n")
    config = runconfig.read(path)
    assert config.model == ModelConfig(d_sae=64, k=4)
    assert config.train.tokens == 1_000_000 and isinstance(config.train.tokens, int)
    assert config.data == runconfig.DataConfig()
    path.write_text("")
    assert runconfig.read(path) == RunConfig()
    assert runconfig.total_steps(config.train) == 489  # rounded up to whole batches


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"modle": {}}, ["unknown key modle", "model", "train"]),
        ({"train": {"learning_rate": 1}}, ["train.learning_rate", "valid keys", "lr"]),
        ({"train": {"lr": "fast"}}, ["train.lr", "a number", "'fast'"]),
        ({"train": {"lr": float("nan")}}, ["train.lr", "a number"]),
        ({"train": {"lr": float("inf")}}, ["train.lr", "finite"]),
        ({"train": {"lr": -1}}, ["train.lr", "at least 0"]),
        ({"train": {"steps": 1.5}}, ["train.steps", "a whole number", "1.5"]),
        ({"train": {"steps": True}}, ["train.steps", "a whole number"]),
        ({"train": {"fused": "yes, please"}}, ["train.fused", "true or false"]),
        ({"train": {"lr": None}}, ["train.lr", "a number", "None"]),
        ({"train": {"steps": 50, "warmup": 100}}, ["train.warmup", "50", "got 100"]),
        ({"train": {"decay": 1.5}}, ["train.decay", "[0, 1]"]),
        ({"train": {"beta2": 1}}, ["train.beta2", "below 1"]),
        ({"train": {"clip_norm": 0}}, ["train.clip_norm", "null"]),
        ({"train": {"eps": 0}}, ["train.eps", "above 0"]),
        ({"model": {"kind": "vae"}}, ["model.kind", "'sae' or 'transcoder'", "'vae'"]),
        ({"model": {"k": 0}}, ["model.k", "at least 1", "got 0"]),
        ({"model": {"d_sae": 16, "k": 17}}, ["model.k", "model.d_sae = 16", "17"]),
        ({"model": {"skip": True}}, ["model.skip", "sae"]),
        ({"model": 3}, ["model", "keys with values", "3"]),
        ([1], ["the file", "[1]"]),
        ({"data": {"holdout": 1}}, ["data.holdout", "below 1"]),
        ({"data": {"activations": 5}}, ["data.activations", "a text", "5"]),
        ({"data": {"stream": True, "cache": "x"}}, ["data.cache", "data.stream"]),
    ],
    ids=lambda case: None if isinstance(case, list) else str(case),
)
def test_mistakes_are_one_line_that_names_the_key(content, words):
    with pytest.raises(UserError) as caught:
        from_dict(content, "run.yaml")
    message = str(caught.value)
    assert "\n" not in message and message.startswith("run.yaml: ")
    for word in words:
        assert word in message


def test_files_and_settings_that_cannot_be_read(tmp_path):
    path = tmp_path / "run.yaml"
    for content in (b"a: [1", b"\xff\xfe\x00", b"- 1"):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"run\.yaml") as caught:
            runconfig.read(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="cannot read"):
        runconfig.read(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="key=value"):
        override(RunConfig(), ["train.lr"])
    with pytest.raises(UserError, match=r"unknown key train\.learning"):
        override(RunConfig(), {"train.learning": 1})
    with pytest.raises(UserError, match=r"out has no keys|unknown key out\.x"):
        override(RunConfig(), {"out.x": 1})


def test_every_key_has_a_type_and_a_help():
    rows = runconfig.describe()
    names = {key for key, *_ in rows}
    assert "out" in names and "train.lr" in names
    assert ("model.k", "int", 32, "active latents per token") in rows
    assert not [key for key, kind, _, help in rows if not (kind and help)]
    leaves = sum(
        len(dataclasses.fields(getattr(RunConfig(), section)))
        for section in ("model", "data", "train", "log")
    )
    assert len(rows) == len(names) == leaves + 1


@pytest.mark.parametrize("shape", ["linear", "cosine"])
def test_the_schedule_rises_stays_and_falls(shape):
    rate = lambda t, steps=100: learning_rate(
        t, lr=2.0, steps=steps, warmup=10, decay=0.3, shape=shape
    )
    rates = [rate(t) for t in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == 2.0
    assert set(rates[9:70]) == {2.0}
    assert all(a > b > 0 for a, b in itertools.pairwise(rates[69:]))
    assert rate(100) == pytest.approx(0)  # the step after the last
    assert learning_rate(5, lr=3.0, steps=6) == 3.0
    with pytest.raises(ValueError, match="shape"):
        learning_rate(0, lr=1.0, steps=1, shape="square")
