# SPDX-License-Identifier: Apache-2.0
"""`ksae demo` as a newcomer runs it, but for the length of the training."""

from __future__ import annotations

import io
import json
import os
from contextlib import redirect_stdout
from pathlib import Path
from typing import NamedTuple

import pytest
from chromium import needs_browser, open_page, start

from ksae import cli

F, K = 4608, 32  # as they are by default


class Demo(NamedTuple):
    folder: Path
    printed: list[str]
    seconds: float  # of all processors


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    """Of a coder of full size, trained for a fiftieth of the time."""
    out = tmp_path_factory.mktemp("runs") / "demo"
    args = ["demo", "--out", str(out), "--tokens", "20000", "--d-sae", str(F), "--k", str(K)]
    before, printed = os.times(), io.StringIO()
    with redirect_stdout(printed):
        assert cli.run([*args, "--latents", "1"]) == 0
    after = os.times()
    return Demo(out, printed.getvalue().splitlines(), sum(after[:4]) - sum(before[:4]))


@pytest.mark.nightly
def test_the_demo_ends_with_a_dashboard(demo: Demo) -> None:
    """In less than two minutes of two cores, training and all, and less than 60 MB."""
    page = demo.folder / "dashboard" / "index.html"
    assert f"dashboard {page}: open it in a browser" in demo.printed
    text = (demo.folder / "dashboard" / "data" / "meta.js").read_text()
    meta = json.loads(text[len('ksae.put("meta",') : -len(");\n")])
    assert meta["F"] == F and meta["hook"] == "layers.9.resid_post" and meta["tokens"] > 90_000
    size = sum(p.stat().st_size for p in (demo.folder / "dashboard").rglob("*") if p.is_file())
    assert 1e6 < size < 60e6
    assert demo.seconds < 240


@pytest.mark.nightly
@needs_browser
def test_its_first_page_is_there_at_once(demo: Demo, tmp_path: Path) -> None:
    """From the disk, within a second of the browser's own clock: the best of five, for a machine
    may have other things to do."""
    browser = start(tmp_path)
    try:
        ready = "return performance.getEntriesByName('ready')[0].startTime"
        milliseconds = []
        for _ in range(5):
            open_page(browser, (demo.folder / "dashboard" / "index.html").as_uri())
            milliseconds.append(browser.execute_script(ready))
        assert browser.execute_script("return ksae.index.fired.length") == F
        assert browser.get_log("browser") == []
    finally:
        browser.quit()
    assert min(milliseconds) < 1000


def test_a_folder_of_something_else_is_refused_at_once(tmp_path: Path, capfd) -> None:
    (tmp_path / "dashboard").mkdir()
    (tmp_path / "dashboard" / "mine.txt").write_text("x")
    assert cli.run(["demo", "--out", str(tmp_path)]) == 1
    assert "must be a new folder or a dashboard" in capfd.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["dashboard"]
