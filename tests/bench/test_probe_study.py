# SPDX-License-Identifier: Apache-2.0
"""The probing of docstrings: its texts, their split, and the table, on a tiny language model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import ksae
from ksae.errors import UserError


@pytest.fixture()
def study(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The study with activations that have a direction for each class instead of a model's."""
    from ksae.bench.studies import probe

    def activations(_lm: Any, texts: list[str], _hook: str, length: int) -> list[torch.Tensor]:
        found = []
        for text in texts:
            generator = torch.Generator().manual_seed(len(text))
            x = 0.1 * torch.randn(min(length, 1 + len(text) % 7), 8, generator=generator)
            x[:, 0 if text.startswith("logging") else 1] += 1
            found.append(x)
        return found

    monkeypatch.setattr(probe, "CLASSES", ("logging", "json"))
    texts = {name: [f"{name} {'.' * i}" for i in range(30)] for name in probe.CLASSES}
    monkeypatch.setattr(probe, "docstrings", texts.__getitem__)
    monkeypatch.setattr(probe, "activations", activations)
    monkeypatch.setattr(probe, "load_model", lambda *_, **__: None)
    return probe


def test_docstrings_are_those_of_the_package() -> None:
    from ksae.bench.studies.probe import docstrings

    found = docstrings("json")
    assert len(found) == len(set(found)) > 5 and found == docstrings("json")
    assert any(text.startswith("Deserialize ``s``") for text in found)
    assert all(len(text) >= 40 for text in found)


def test_texts_are_split_evenly_and_never_shared(study: Any) -> None:
    texts = {"a": [f"a{i}" for i in range(9)], "b": [f"b{i}" for i in range(30)]}
    train, test = study.split(texts, 20, seed=0)
    assert [len(part) for part in (*train.values(), *test.values())] == [6, 6, 3, 3]
    for name, all_of_it in texts.items():
        assert not set(train[name]) & set(test[name])
        assert set(train[name]) | set(test[name]) <= set(all_of_it)
    with pytest.raises(UserError, match="b has 2 docstrings, 3 are needed"):
        study.split({"a": ["x"] * 5, "b": ["y", "z"]}, 20, seed=0)


def test_a_table_of_coders_beside_the_activations(
    study: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sae = ksae.TopKSAE(8, 16, 2)
    with torch.no_grad():
        sae.W_enc.zero_()
        sae.W_enc[3, 0], sae.W_enc[7, 1] = 1, 1  # a latent for each direction
    sae.save(tmp_path / "sae.safetensors")
    command = [str(tmp_path / "sae.safetensors"), "--hook", "layers.9.resid_post", "--ks", "1"]
    assert study.main([*command, "--threads", "1"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-4] == "| | k=1 | all |" and "logging" not in lines[-1]
    scores = [float(line.split("|")[2]) for line in lines[-2:]]
    assert "activations" in lines[-2] and "sae.safetensors" in lines[-1]
    assert all(0.8 < score <= 1 for score in scores)
