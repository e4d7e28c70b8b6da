# SPDX-License-Identifier: Apache-2.0
"""Files that are missing, damaged or hidden: errors that name them, never an errno alone."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import ksae
from ksae.activations import documents
from ksae.cli import run
from ksae.errors import UserError
from ksae.interop import circuit_tracer, convert, hub
from ksae.interop.dictionary_learning import AutoEncoderTopK
from ksae.interop.sparsify import SparseCoder, SparseCoderConfig

D, F, K = 6, 10, 3


def many(root: Path) -> None:
    """Two coders, and what git, the Hub's client and notebooks leave beside them."""
    for name in ("layers.10", "layers.9"):
        SparseCoder(D, SparseCoderConfig(num_latents=F, k=K)).save_to_disk(root / name)
    for hidden in (".git", ".cache", ".ipynb_checkpoints/layers.9"):
        SparseCoder(D, SparseCoderConfig(num_latents=F, k=K)).save_to_disk(root / hidden)
    (root / "logs").mkdir()
    (root / "notes.txt").write_text("x")


def test_load_many_takes_folders_that_hold_a_coder(tmp_path: Path) -> None:
    many(tmp_path)
    assert list(SparseCoder.load_many(str(tmp_path), local=True)) == ["layers.9", "layers.10"]
    found = SparseCoder.load_many(str(tmp_path), local=True, pattern="layers.?")
    assert list(found) == ["layers.9"]
    (tmp_path / "layers.9" / "sae.safetensors").unlink()  # half a coder is not passed over
    with pytest.raises(UserError, match=r"no such file: .*layers\.9/sae\.safetensors"):
        SparseCoder.load_many(str(tmp_path), local=True)
    with pytest.raises(UserError, match=r"must have folders named mlp\.\* with cfg\.json and sae"):
        SparseCoder.load_many(str(tmp_path), local=True, pattern="mlp.*")
    with pytest.raises(UserError, match=r"no such folder: .*gone"):
        SparseCoder.load_many(str(tmp_path / "gone"), local=True)


DAMAGES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no folder": (lambda p: p.rename(p.with_name("moved")), r"cannot read .*cfg\.json: No such"),
    "no config": (lambda p: (p / "cfg.json").unlink(), r"cannot read .*cfg\.json: No such"),
    "no JSON": (lambda p: (p / "cfg.json").write_text("{"), r"cfg\.json must be JSON"),
    "a list": (lambda p: (p / "cfg.json").write_text("[]"), "cfg.json must hold keys with values"),
    "no d_in": (lambda p: (p / "cfg.json").write_text("{}"), "d_in in the config of .*, got None"),
    "no weights": (lambda p: (p / "sae.safetensors").unlink(), r"no such file: .*sae\.safetens"),
    "no safetensors": (lambda p: (p / "sae.safetensors").write_text("x"), r"cannot read .*sae\.s"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_load_from_disk_names_the_file(name: str, tmp_path: Path) -> None:
    SparseCoder(D, SparseCoderConfig(num_latents=F, k=K)).save_to_disk(tmp_path / "a")
    damage, message = DAMAGES[name]
    damage(tmp_path / "a")
    with pytest.raises(UserError, match=message):
        SparseCoder.load_from_disk(tmp_path / "a")


LOADERS: dict[str, Callable[[Path], Any]] = {
    "circuit-tracer": lambda path: circuit_tracer.load_transcoder(path, 0),
    "dictionary-learning": AutoEncoderTopK.from_pretrained,
    "ksae": ksae.load,
    "convert": convert.read,
}


@pytest.mark.parametrize("name", LOADERS)
def test_every_loader_names_a_missing_file(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"(no such file|cannot read).*gone\.safetensors"):
        LOADERS[name](tmp_path / "gone.safetensors")


def test_loaders_name_a_damaged_file(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").write_text("x")
    with pytest.raises(UserError, match=r"cannot read .*a\.safetensors"):
        circuit_tracer.load_transcoder(tmp_path / "a.safetensors", 0)
    torch.save([1], tmp_path / "ae.pt")
    with pytest.raises(UserError, match=r"ae\.pt must hold a dict, got list"):
        AutoEncoderTopK.from_pretrained(tmp_path / "ae.pt")


def test_hidden_files_are_no_part_of_a_model_or_a_corpus(tmp_path: Path) -> None:
    ksae.TopKSAE(D, F, K).save(tmp_path / "m" / "model.safetensors")
    convert.convert(tmp_path / "m", tmp_path / "s", "sparsify")
    whole = (tmp_path / "s" / "sae.safetensors").read_bytes()
    (tmp_path / "s" / "._sae.safetensors").write_bytes(whole)  # a second one, by its suffix
    (tmp_path / "s" / ".cfg.json").write_text('{"d_in": 3}')
    assert ksae.load(tmp_path / "s").k == K
    corpus = tmp_path / "corpus"
    (corpus / ".ipynb_checkpoints").mkdir(parents=True)
    for name in ("a.txt", ".hidden.txt", ".ipynb_checkpoints/a-checkpoint.txt"):
        (corpus / name).write_text(name)
    assert list(documents(corpus)) == ["a.txt"]


class Offline:
    """The Hub, where nothing is found."""

    def list_repo_files(self, repo: str, revision: str | None = None) -> list[str]:
        raise OSError(f"404: {repo}")


@pytest.fixture
def offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(HfApi=Offline))  # type: ignore[arg-type]


def test_a_mistyped_path_is_told_of_as_one(offline: None, tmp_path: Path) -> None:
    both = (
        "no file or folder run/x/model.safetensors is here, and cannot list run/x on the Hub: 404"
    )
    with pytest.raises(UserError, match=both):
        ksae.load("run/x/model.safetensors")
    (tmp_path / "runs").mkdir()  # of a path that begins here nothing is asked on the Hub
    with pytest.raises(
        UserError, match=r"no such file: runs/x/m \(on the Hub it would be hf://run"
    ):
        ksae.load("runs/x/m")
    with pytest.raises(UserError, match=r"^load: cannot list run/x on the Hub: 404"):
        ksae.load("hf://run/x")
    with pytest.raises(UserError, match="revision must be None for the local path runs, got 'v1'"):
        ksae.load("runs", revision="v1")


def test_a_mistyped_path_without_the_hubs_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    assert run(["convert", "run/x", "out", "--to", "ksae"]) == 1
    said = capsys.readouterr().err
    assert "no file or folder run/x is here" in said and "pip install huggingface_hub" in said
    with pytest.raises(UserError, match=r"^hub: the Hugging Face Hub needs"):
        hub.download("hf://run/x")


def test_circuit_tracers_device_of_none_is_its_default(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert circuit_tracer.default_device() == torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert circuit_tracer.default_device() == torch.device("cpu")
    monkeypatch.setattr(circuit_tracer, "default_device", lambda: torch.device("meta"))
    made = circuit_tracer.SingleLayerTranscoder(D, F, circuit_tracer.TopK(K), 0)
    assert made.device.type == "meta"
    made = circuit_tracer.SingleLayerTranscoder(D, F, circuit_tracer.TopK(K), 0, device="cpu")  # type: ignore[arg-type]
    assert made.device.type == "cpu"
    asked: list[str] = []

    def opened(path: Any, framework: str, device: str) -> Any:
        asked.append(device)
        raise OSError("seen")

    monkeypatch.setattr(circuit_tracer, "safe_open", opened)
    (tmp_path / "a").write_text("")
    with pytest.raises(UserError, match="seen"):
        circuit_tracer.load_transcoder(tmp_path / "a", 0)
    assert asked == ["meta"]
