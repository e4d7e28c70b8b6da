# SPDX-License-Identifier: Apache-2.0
"""`ksae demo` as a newcomer runs it, but for the length of the training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from ksae import cli


@pytest.mark.nightly
def test_the_demo_ends_with_a_dashboard(tmp_path: Path, capfd) -> None:
    out = tmp_path / "demo"
    args = ["demo", "--out", str(out), "--tokens", "20000", "--d-sae", "256", "--k", "8"]
    assert cli.run([*args, "--latents", "1"]) == 0
    page = out / "dashboard" / "index.html"
    assert f"dashboard {page}: open it in a browser" in capfd.readouterr().out.splitlines()
    text = (out / "dashboard" / "data" / "meta.js").read_text()
    meta = json.loads(text[len('ksae.put("meta",') : -len(");\n")])
    assert meta["F"] == 256 and meta["hook"] == "layers.9.resid_post" and meta["tokens"] > 90_000
    assert sum(p.stat().st_size for p in (out / "dashboard").rglob("*.js")) < 60e6


def test_a_folder_of_something_else_is_refused_at_once(tmp_path: Path, capfd) -> None:
    (tmp_path / "dashboard").mkdir()
    (tmp_path / "dashboard" / "mine.txt").write_text("x")
    assert cli.run(["demo", "--out", str(tmp_path)]) == 1
    assert "must be a new folder or a dashboard" in capfd.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["dashboard"]
