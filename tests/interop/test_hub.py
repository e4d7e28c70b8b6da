# SPDX-License-Identifier: Apache-2.0
"""The Hub, with a local folder in its place: what is asked of it, what is refused."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from training import assert_same_coder

import ksae
from ksae.cli import run
from ksae.errors import UserError
from ksae.interop import convert, hub, sparsify


class FakeHub:
    """`huggingface_hub` with repositories that are folders."""

    def __init__(self, root: Path) -> None:
        self.root, self.extra, self.fetched = root, [], []
        self.revisions: set[str | None] = set()
        self.HfApi = lambda: self

    def list_repo_files(self, repo: str, revision: str | None = None) -> list[str]:
        folder = self.root / repo
        if not folder.is_dir():
            raise OSError(f"404: {repo}")
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        return [str(p.relative_to(folder)) for p in files] + self.extra

    def hf_hub_download(self, repo: str, name: str, revision: str | None = None) -> str:
        self.fetched.append(name)
        self.revisions.add(revision)
        return str(self.root / repo / name)

    def create_repo(self, repo: str, private: bool, exist_ok: bool) -> None:
        (self.root / repo).mkdir(parents=True, exist_ok=exist_ok)

    def upload_folder(
        self, repo_id: str, folder_path: str, path_in_repo: str | None, commit_message: str
    ) -> None:
        target = self.root / repo_id / (path_in_repo or "")
        shutil.copytree(folder_path, target, dirs_exist_ok=True)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    monkeypatch.chdir(tmp_path)
    fake = FakeHub(tmp_path / "hub")
    module = SimpleNamespace(HfApi=fake.HfApi, hf_hub_download=fake.hf_hub_download)
    monkeypatch.setitem(sys.modules, "huggingface_hub", module)  # type: ignore[arg-type]
    return fake


FORMATS = ["ksae", "sparsify", "saelens", "dictionary-learning", "openai", "nvidia"]


@pytest.mark.parametrize("folder", ["", "layers.9"], ids=["top", "folder"])
@pytest.mark.parametrize("to", FORMATS)
def test_save_and_load(fake: FakeHub, to: str, folder: str) -> None:
    model = ksae.TopKSAE(6, 10, 3, auxk_alpha=0.25)
    name = hub.save(model, "someone/coder", to=to, folder=folder)
    assert name == "someone/coder" + (f"/{folder}" if folder else "")
    loaded = ksae.load(name)
    assert_same_coder(loaded, model)


def test_save_and_load_of_arrays(fake: FakeHub) -> None:
    model = ksae.Transcoder(6, 6, 10, activation=ksae.JumpReLU())
    name = hub.save(model, "someone/coder", to="gemma-scope", folder="layer_20/width_16k")
    assert "someone/coder/layer_20/width_16k/params.npz" in map(
        str, (p.relative_to(fake.root) for p in fake.root.rglob("*.npz"))
    )
    loaded = ksae.load(name)
    assert loaded.config() == model.config()
    assert torch.equal(loaded.log_threshold, model.log_threshold)


def test_only_what_is_needed_is_fetched(fake: FakeHub) -> None:
    model = ksae.TopKSAE(6, 10, 3)
    for folder in ("layers.1", "layers.2"):
        hub.save(model, "someone/coder", to="sparsify", folder=folder)
    (fake.root / "someone/coder/layers.1/notes.txt").write_text("x")
    ksae.load("someone/coder/layers.1")
    assert fake.fetched
    assert all(n.startswith("layers.1/") and not n.endswith(".txt") for n in fake.fetched)


def test_one_file(fake: FakeHub) -> None:
    hub.save(ksae.TopKSAE(6, 10, 3), "someone/coder")
    assert ksae.load("hf://someone/coder/model.safetensors").k == 3


def test_sparsify_from_the_hub(fake: FakeHub, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def snapshot(repo: str, allow_patterns: str | None = None) -> str:
        asked.append(allow_patterns)
        return str(fake.root / repo)

    monkeypatch.setattr(sys.modules["huggingface_hub"], "snapshot_download", snapshot, False)
    model = ksae.TopKSAE(6, 10, 3)
    for folder in ("layers.10", "layers.9", "embed"):
        hub.save(model, "someone/coder", to="sparsify", folder=folder)
    coder = sparsify.SparseCoder.load_from_hub("someone/coder", "layers.9")
    assert torch.equal(coder.encoder.weight, model.W_enc) and coder.cfg.k == 3
    many = sparsify.SparseCoder.load_many("someone/coder", pattern="layers.*")
    assert list(many) == ["layers.9", "layers.10"] and asked == ["layers.9/*", "layers.*/*"]
    with pytest.raises(FileNotFoundError, match="SparseCoder: hookpoint must be given"):
        sparsify.SparseCoder.load_from_hub("someone/coder")
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match="huggingface_hub must be installed"):
        sparsify.SparseCoder.load_from_hub("someone/coder")


def test_path_traversal_is_refused(fake: FakeHub) -> None:
    hub.save(ksae.TopKSAE(6, 10, 3), "someone/coder")
    for name in ("someone/coder/../x", "someone/coder/a//b", "someone/coder/..", "hf://a/b/./c"):
        with pytest.raises(UserError, match="must stay inside its repository"):
            ksae.load(name)
    for name in ("../evil.safetensors", "a/../../evil.json", "/etc/evil.json", "a\\evil.json"):
        fake.extra, fake.fetched = [name], []
        with pytest.raises(UserError, match="must stay inside its repository"):
            ksae.load("someone/coder")
        assert fake.fetched == []
    with pytest.raises(UserError, match="must stay inside"):
        hub.save(ksae.TopKSAE(6, 10, 3), "someone/coder", folder="../other")
    with pytest.raises(UserError, match="owner/name"):
        hub.save(ksae.TopKSAE(6, 10, 3), "someone/../coder")


def test_side_files_cannot_name_a_path(fake: FakeHub, tmp_path: Path) -> None:
    model = ksae.Transcoder(6, 6, 10, 3)
    model.save("a.safetensors")
    _, coder = convert.read("a.safetensors")
    coder.extra["circuit-tracer"] = {"file": "../../evil.safetensors"}
    written = convert.write(coder, tmp_path / "c" / "d", "circuit-tracer")
    assert written == tmp_path / "c" / "d" / "evil.safetensors"


def test_local_paths_are_not_ids(fake: FakeHub) -> None:
    Path("runs").mkdir()
    for name in ("runs/x", "x.safetensors", "some/x.safetensors", "/a/b", "./a/b", "a"):
        assert not hub.is_id(name), name
    assert not hub.is_id(Path("someone/coder"))
    assert hub.is_id("someone/coder") and hub.is_id("hf://runs/x")
    with pytest.raises(UserError, match="no such file"):
        ksae.load("runs/x")


def test_errors_are_one_line(fake: FakeHub, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["convert", "no/body", "out", "--to", "sparsify"]) == 1
    assert "cannot list no/body on the Hub: 404: no/body" in capsys.readouterr().err
    (fake.root / "no/body").mkdir(parents=True)
    with pytest.raises(UserError, match="no weights file in its top folder"):
        ksae.load("no/body")


def test_the_commands_take_an_id_and_a_revision(
    fake: FakeHub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub.save(ksae.TopKSAE(6, 10, 3), "someone/coder", folder="layers.9")
    name = "someone/coder/layers.9"
    np.save("x.npy", torch.randn(70, 6).numpy())
    on_rows = ["--activations", "x.npy", "--tokens", "64", "--no-progress"]
    assert run(["eval", name, "--revision", "v2", *on_rows]) == 0
    assert "TopKSAE 6 -> 10, k = 3, on 64 tokens" in capsys.readouterr().out
    assert run(["convert", name, "out", "--to", "sparsify", "--revision", "v2"]) == 0
    made: list[Any] = []

    def dashboard(coder: Any, config: Any, out: Path, **options: Any) -> None:
        made.append((coder.d_sae, options["title"]))

    monkeypatch.setattr("ksae.runs.dashboard.dashboard", dashboard)
    monkeypatch.setattr("ksae.runs.dashboard.summary", lambda made: "done")
    of_text = ["--model", "m", "--hook", "layers.0.resid_post", "--text", "t.txt"]
    assert run(["dashboard", name, "--revision", "v2", "--out", "pages", *of_text]) == 0
    assert made == [(10, name)] and fake.revisions == {"v2"}
    for command in (["eval"], ["dashboard", "--out", "pages"]):
        assert run([*command, "no/body"]) == 1
        assert "cannot list no/body on the Hub: 404: no/body" in capsys.readouterr().err
        assert run([*command, "x.npy", "--revision", "v2"]) == 1
        assert "revision must be None for the local path x.npy" in capsys.readouterr().err


def test_without_huggingface_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="pip install huggingface_hub"):
        ksae.load("someone/coder")
