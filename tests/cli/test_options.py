# SPDX-License-Identifier: Apache-2.0
"""Options that take what a user has: one text file, separators as typed, the folder of a cache; and
help that can be read in 80 columns."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import tiny_lm
import torch

import ksae
from ksae import cli
from ksae.activations import Contexts, open_source
from ksae.errors import UserError
from ksae.runs import config as runconfig
from ksae.runs.data import hold_out

RUN = ["--d-sae", "32", "--k", "3", "--steps", "4", "--batch-size", "64", "--threads", "1"]
RUN += ["--context", "16", "--no-progress"]
HOOK = "layers.0.resid_post"


@pytest.fixture(scope="module")
def lm(tmp_path_factory) -> Path:
    return tiny_lm.save(tmp_path_factory.mktemp("lm"))


@pytest.fixture()
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def train(lm: Path, *args: str) -> int:
    return cli.run(["train", "--model", str(lm), "--hook", HOOK, *args, *RUN])


def evaluated(capfd, *args: str) -> dict[str, object]:
    capfd.readouterr()
    assert cli.run(["eval", *args, "--json", "--no-progress"]) == 0
    result: dict[str, object] = json.loads(capfd.readouterr().out)
    return result


# --- text


def test_one_plain_text_file_is_enough(lm, folder, capfd):
    (folder / "book.txt").write_text(tiny_lm.text(600))
    assert train(lm, "--text", "book.txt", "--out", "run", "--holdout", "0.1") == 0
    got = evaluated(capfd, "run")
    assert got["measured_on"] == "held-out tokens" and got["tokens"] == 60  # 4 of 40 contexts


def one_document(count: int, documents: int = 1) -> Contexts:
    made = tiny_lm.contexts(count)
    numbers = torch.arange(count, dtype=torch.int32) % documents
    return Contexts(made.ids, made.lengths, numbers, (b"same",) * documents, (0,))


def test_one_document_is_divided_at_its_end_and_no_context_is_in_both():
    whole = one_document(50)
    train_part, held = whole.split(0.1)
    assert torch.equal(torch.cat([train_part.ids, held.ids]), whole.ids) and len(held) == 5
    assert len(one_document(2).split(0.01)[1]) == len(one_document(2).split(0.99)[1]) == 1
    for bad in (one_document(1), one_document(4, documents=2)):  # copies cannot be kept apart
        with pytest.raises(UserError, match="2 different documents, got 1"):
            bad.split(0.1)


@pytest.mark.parametrize("typed", [r"\n\n", "\n\n"])
def test_a_separator_is_taken_as_it_is_typed_in_a_shell(lm, folder, typed):
    (folder / "t.txt").write_text("\n\n".join(tiny_lm.text(40, seed) for seed in range(10)))
    assert (
        train(lm, "--text", "t.txt", "--separator", typed, "--out", "run", "--holdout", "0.2") == 0
    )
    saved = runconfig.read(folder / "run" / "run.yaml")
    assert saved.data.separator == "\n\n"
    meta = json.loads((folder / "run" / "evaluation.json").read_text())
    assert meta["tokens"] == 2 * 40  # two of ten documents


def test_separators_in_files_and_of_evaluations(folder):
    for text in (r"separator: '\n\n'", r'separator: "\n\n"'):
        (folder / "c.yaml").write_text(f"data: {{{text}}}\n")
        config = runconfig.read(folder / "c.yaml")
        assert config.data.separator == "\n\n"
        runconfig.write(config, folder / "again.yaml")
        assert runconfig.read(folder / "again.yaml") == config
    with pytest.raises(UserError, match=r"data\.separator must be null or some text"):
        runconfig.from_dict({"data": {"separator": ""}})


def test_text_divided_otherwise_is_not_called_held_out(lm, folder, capfd):
    (folder / "t.txt").write_text("\n".join(tiny_lm.text(40, seed) for seed in range(10)))
    assert train(lm, "--text", "t.txt", "--separator", r"\n", "--out", "run") == 0
    assert evaluated(capfd, "run")["measured_on"] == "held-out tokens"
    got = evaluated(capfd, "run", "--separator", "cat")
    assert got["measured_on"] == "tokens"


def test_held_out_contexts_that_quote_the_training_text_are_left_out(lm, folder, capfd):
    quote = tiny_lm.text(60, seed=99)
    texts = [tiny_lm.text(45, seed) for seed in range(9)] + [tiny_lm.text(15, 50) + " " + quote]
    texts += [quote + " dog"] * 3
    (folder / "t.txt").write_text("\n".join(texts))
    more = ["--text", "t.txt", "--separator", r"\n", "--holdout", "0.4"]
    more[1] = str(folder / "t.txt")
    from ksae.activations import documents, load_model, tokenize

    model = load_model(lm)
    made = tokenize(documents(folder / "t.txt", separator="\n"), model.tokenizer, length=32)
    plain = runconfig.DataConfig(holdout=0.4)
    both = [hold_out(c, made) for c in (plain, runconfig.DataConfig(holdout=0.4, unquoted=True))]
    (train_part, every, none_out), (again, fresh, share) = both
    assert torch.equal(train_part.ids, again.ids) and none_out == 0 < share < 1
    kept, whole = int(fresh.mask().sum()), int(every.mask().sum())
    assert share == pytest.approx(1 - kept / whole)
    # training and a later evaluation measure the same tokens
    assert train(lm, *more, "--unquoted", "--context", "32", "--out", "run") == 2  # given twice
    capfd.readouterr()
    rest = [word for word in RUN if word not in ("--context", "16")]
    command = ["train", "--model", str(lm), "--hook", HOOK, *more, "--unquoted", "--context", "32"]
    assert cli.run([*command, "--out", "run", *rest]) == 0
    own = json.loads((folder / "run" / "evaluation.json").read_text())
    got = evaluated(capfd, "run")
    assert own["tokens"] == got["tokens"] == kept
    assert own["fvu"] == pytest.approx(got["fvu"], rel=1e-6)


# --- the folder of a cache


def test_the_folder_given_as_cache_can_be_given_as_activations(lm, folder, capfd):
    texts = folder / "texts"
    texts.mkdir()
    for number in range(8):
        (texts / f"{number}.txt").write_text(tiny_lm.text(120, number))
    assert train(lm, "--text", "texts", "--holdout", "0.25", "--cache", "kept", "--out", "a") == 0
    again = ["--activations", "kept", "--out", "b", *RUN]
    assert cli.run(["train", *again]) == 0
    own = [json.loads((folder / n / "evaluation.json").read_text()) for n in ("a", "b")]
    assert own[0] == own[1] and own[0]["tokens"] == 240
    a, b = ksae.load(folder / "a"), ksae.load(folder / "b")
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert evaluated(capfd, "b")["tokens"] == 240
    got = evaluated(capfd, "a", "--activations", "kept")
    assert got["fvu"] == pytest.approx(own[0]["fvu"], rel=1e-6)
    with pytest.raises(UserError, match="open its folder train or holdout"):
        open_source(folder / "kept")
    assert open_source(folder / "kept" / "train").num_tokens == 720
    np.save(folder / "y.npy", np.zeros((720, 12), np.float32))
    capfd.readouterr()
    assert cli.run(["train", *again[:2], "--targets", "y.npy", "--out", "c", *RUN]) == 1
    assert "targets must be left out" in capfd.readouterr().err


# --- encoders


def test_an_encoder_says_why_it_has_no_cross_entropy(folder, capfd):
    encoder = tiny_lm.save(folder / "bert", encoder=True)
    (folder / "t.txt").write_text(tiny_lm.text(600))
    hook = ["--hook", "layers.0.resid_post", "--text", "t.txt", "--out", "run"]
    assert cli.run(["train", "--model", str(encoder), *hook, *RUN]) == 0
    capfd.readouterr()
    assert cli.run(["eval", "run", "--steering", "1"]) == 0
    said = capfd.readouterr().err
    for name in ("cross-entropy", "steering"):
        assert f"{name} is left out: {encoder} is an encoder without a head" in said


def test_harvest_evaluation_and_cross_entropy_say_each_tenth(lm, folder, capfd):
    (folder / "t.txt").write_text(tiny_lm.text(4000))
    loud = [word for word in RUN if word != "--no-progress"]
    data = ["--model", str(lm), "--hook", HOOK, "--text", "t.txt", "--holdout", "0.5"]
    assert cli.run(["train", *data, "--out", "run", *loud]) == 0
    said = capfd.readouterr().err
    assert len(re.findall(rf"^harvest {HOOK}: ", said, re.M)) >= 16  # of two parts
    assert len(re.findall(r"^evaluation: ", said, re.M)) == 10
    assert "text: " in said and "tokens to train on" in said
    assert cli.run(["eval", "run", "--batch-size", "64"]) == 0
    said = capfd.readouterr().err
    for work in ("harvest", "evaluation", "cross-entropy"):
        assert re.search(rf"^{work}.*: [\d,]+/[\d,]+ tokens$", said, re.M), work


# --- help


@pytest.mark.parametrize(
    "command", ["train", "eval", "dashboard", "convert", "config", "demo", "bench"]
)
@pytest.mark.parametrize("columns", [80, 120])
def test_help_fits_and_has_two_columns(capfd, monkeypatch, command, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    assert cli.run([command, "--help"]) == 0
    lines = capfd.readouterr().out.splitlines()
    assert max(map(len, lines)) <= columns
    right = [line.startswith(" " * 26) or line[24:26] == "  " < line[26:27] for line in lines]
    assert sum(right) > 0
    for n in range(1, len(lines)):  # no line is broken where the next word had room
        if right[n - 1] and lines[n].startswith(" " * 26):
            word = lines[n].split()[0]
            assert len(lines[n - 1]) + 1 + len(word) > min(columns, 100), lines[n - 1]


def test_help_names_matplotlib_and_every_panel(capfd):
    for command in ("train", "eval"):
        assert cli.run([command, "--help"]) == 0
        assert "matplotlib" in capfd.readouterr().out
    assert cli.run(["train", "--help"]) == 0
    out = capfd.readouterr().out
    assert [out.index(f"\n{name}:") for name in ("Run", "Model", "Data", "Training", "Log")]
