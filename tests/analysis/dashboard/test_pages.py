# SPDX-License-Identifier: Apache-2.0
"""What a dashboard's files say, and what is refused."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from toy_language_model import HOOK, MARKUP, D, contexts, llama, tokenizer

from ksae import TopKSAE, Transcoder
from ksae.activations import tokenize
from ksae.analysis.dashboard import Options, build, read_labels
from ksae.analysis.dashboard.folder import ASSETS, PAGE
from ksae.analysis.dashboard.survey import Window
from ksae.errors import UserError

F, K = 40, 3


def coder() -> TopKSAE:
    torch.manual_seed(3)
    return TopKSAE(D, F, K)


def read(out: Path, name: str) -> Any:
    """The value of a data file, whose one call has JSON as arguments."""
    text = (out / "data" / f"{name}.js").read_text(encoding="utf-8")
    assert text.startswith("ksae.put(") and text.endswith(");\n")
    said, value = json.loads(f"[{text[len('ksae.put(') : -len(');' + chr(10))]}]")
    assert said == name
    return value


def make(out: Path, sae: Any = None, model: Any = None, **options: Any) -> Any:
    return build(
        sae or coder(), model or llama(), tokenizer(), contexts(), HOOK, out, title="toy", **options
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("dashboard") / "toy"
    labels = {3: "<script>alert(3)</script> & more", 39: "last"}
    made = make(out, labels=labels, options=Options(top=5, window=Window(6, 4)))
    assert made.page == out / PAGE and made.latents == F and 0 < made.fired <= F
    assert made.bytes == sum(f.stat().st_size for f in out.rglob("*") if f.is_file())
    return out


def test_the_folder_is_whole_and_names_no_network(folder: Path) -> None:
    names = {p.name for p in folder.iterdir()}
    assert names == {PAGE, "data", *ASSETS}
    for asset in (PAGE, *ASSETS):
        text = (folder / asset).read_text().replace("http://www.w3.org/2000/svg", "")
        assert "http" not in text and "//cdn" not in text and "fetch(" not in text
        assert "innerHTML" not in text and "insertAdjacentHTML" not in text


def test_records_say_what_the_coder_is(folder: Path) -> None:
    meta, index, tokens = (read(folder, name) for name in ("meta", "index", "tokens"))
    sae = coder()
    assert (meta["F"], meta["hook"], meta["no_lens"]) == (F, HOOK, None)
    assert sum(index["fired"]) == pytest.approx(meta["l0"] * meta["tokens"], rel=1e-2)
    records = read(folder, "latents/0") + read(folder, "latents/1")
    assert len(records) == F == len(index["norm"])
    for latent, record in enumerate(records):
        assert record["fired"] == index["fired"][latent]
        assert record["decoder_norm"] == pytest.approx(
            float(sae.W_dec[latent].detach().norm()), rel=1e-3
        )
        assert sum(record["histogram"][1]) == record["fired"]
        assert (record["fired"] > 0) <= record["top"] <= min(5, len(record["contexts"]))
        assert len(record["promoted"][0]) == len(record["demoted"][1]) == 10
        for number, start, peak, shown, flat in record["contexts"]:
            row = contexts().ids[number].tolist()[start : start + len(shown)]
            names = tokenizer().convert_ids_to_tokens(row)
            assert [tokens[t].strip() for t in shown] == names
            values = dict(zip(flat[::2], flat[1::2], strict=True))
            assert values[peak] > 0 and all(0 <= i < len(shown) for i in values)
        if record["contexts"]:
            first = record["contexts"][0]
            assert dict(zip(first[4][::2], first[4][1::2], strict=True))[first[2]] == record["max"]
            assert "".join(index["snippet"][latent]) in "".join(tokens[t] for t in first[3])
        shown = [i for band in record["bands"] for i in band[2]] + record["random"]
        assert all(0 <= i < len(record["contexts"]) for i in shown)


def test_text_and_labels_are_data_and_not_markup(folder: Path) -> None:
    tokens = {t.strip() for t in read(folder, "tokens")}
    assert set(MARKUP) <= tokens
    assert read(folder, "index")["labels"] == {
        "3": "<script>alert(3)</script> & more",
        "39": "last",
    }
    for path in (folder / "data").rglob("*.js"):
        assert b"<" not in path.read_bytes()  # no tag can end the script that the file is


def test_a_text_shorter_than_the_window(tmp_path: Path) -> None:
    short = tokenize(["word1 word2", "a"], tokenizer(), length=24)
    made = build(coder(), llama(), tokenizer(), short, HOOK, tmp_path / "d")
    assert made.tokens == 3
    records = read(tmp_path / "d", "latents/0")
    assert any(r["fired"] == 0 and r["contexts"] == [] and r["mean"] is None for r in records)
    assert all(len(c[3]) <= 3 for r in records for c in r["contexts"])
    assert all(r["bands"] == [] for r in records)


def test_a_model_without_unembedding_has_pages_without_lens(tmp_path: Path) -> None:
    build(coder(), llama().model, tokenizer(), contexts(), HOOK, tmp_path / "d")
    assert "no unembedding" in read(tmp_path / "d", "meta")["no_lens"]
    assert "promoted" not in read(tmp_path / "d", "latents/0")[0]
    assert read(tmp_path / "d", "index")["promoted"][0] == []


def test_a_transcoder_has_two_sides(tmp_path: Path) -> None:
    torch.manual_seed(0)
    sae = Transcoder(D, D, F, K)
    with torch.no_grad():
        sae.W_dec.normal_()
    text = contexts()
    out = tmp_path / "d"
    build(sae, llama(), tokenizer(), text, "layers.1.mlp_in", out, target_hook="layers.1.mlp_out")
    meta, record = read(out, "meta"), read(out, "latents/0")[0]
    assert meta["transcoder"] and meta["target_hook"] == "layers.1.mlp_out"
    assert meta["no_lens"] is None and len(record["reads"][0]) == 10
    assert record["decoder"] != record["encoder"]


def test_a_dashboard_is_written_anew_and_nothing_else_is_touched(tmp_path: Path) -> None:
    out = tmp_path / "d"
    make(out)
    (out / "data" / "latents" / "77.js").write_text("stale")
    make(out)
    assert sorted(p.name for p in (out / "data" / "latents").iterdir()) == ["0.js", "1.js"]
    (out / "mine.txt").write_text("keep")
    with pytest.raises(UserError, match=r"new folder or a dashboard, got .*mine\.txt"):
        make(out)
    assert (out / PAGE).is_file() and (out / "mine.txt").read_text() == "keep"
    with pytest.raises(UserError, match="got the file"):
        make(out / "mine.txt")


def test_a_failed_run_leaves_the_earlier_dashboard(tmp_path: Path) -> None:
    make(tmp_path / "d")
    before = {path: path.read_bytes() for path in (tmp_path / "d").rglob("*.*")}
    with pytest.raises(UserError, match="width d_in = 8"):
        make(tmp_path / "d", sae=TopKSAE(8, F, K))
    assert before == {path: path.read_bytes() for path in (tmp_path / "d").rglob("*.*")}


def test_a_run_stopped_while_it_writes_leaves_no_page(tmp_path: Path, monkeypatch) -> None:
    make(tmp_path / "d")

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules[build.__module__], "index_columns", stop)
    with pytest.raises(KeyboardInterrupt):
        make(tmp_path / "d")
    assert not (tmp_path / "d" / PAGE).exists()
    monkeypatch.undo()
    make(tmp_path / "d")
    assert (tmp_path / "d" / PAGE).exists()


@pytest.mark.parametrize("latent", [-1, F])
def test_labels_of_latents_that_do_not_exist(tmp_path: Path, latent: int) -> None:
    with pytest.raises(UserError, match=rf"a latent must be in \[0, {F}\), got {latent}"):
        make(tmp_path / "d", labels={latent: "x"})
    assert not (tmp_path / "d").exists()


def test_labels_are_read(tmp_path: Path) -> None:
    path = tmp_path / "labels.json"
    path.write_text(json.dumps({"3": "one\n line", "0": "zero"}))
    assert read_labels(path, F) == {3: "one line", 0: "zero"}
    path.write_text(json.dumps([{"index": "7", "description": "seven", "modelId": "m"}]))
    assert read_labels(path, F) == {7: "seven"}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("3", "must be an object of latent: label, got int"),
        ('["x"]', "must have index and description"),
        ('{"40": "x"}', r"a latent must be in \[0, 40\), got '40'"),
        ('{"-1": "x"}', r"must be in \[0, 40\), got '-1'"),
        ('{"²": "x"}', r"must be in \[0, 40\)"),
        ('{"3": 4}', "the label of latent 3 must be text, got int"),
    ],
)
def test_bad_labels(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "labels.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=message):
        read_labels(path, F)
    with pytest.raises(UserError, match="cannot read"):
        read_labels(tmp_path / "none.json", F)
