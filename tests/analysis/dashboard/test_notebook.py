# SPDX-License-Identifier: Apache-2.0
"""One latent as a notebook shows it."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from toy_language_model import HOOK, D, contexts, llama, tokenizer

from ksae import TopKSAE
from ksae.analysis.dashboard import build
from ksae.errors import UserError

F = 40


def coder() -> TopKSAE:
    torch.manual_seed(3)
    return TopKSAE(D, F, 3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("notebook") / "pages"
    labels = dict.fromkeys(range(F), "<script>alert(1)</script>")
    build(coder(), llama(), tokenizer(), contexts(), HOOK, out, labels=labels)
    return out


class Text(HTMLParser):
    """The text of HTML, and the tags that it has."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.tags.add(tag)

    def handle_data(self, data: str) -> None:
        self.text += data


def test_a_latent_is_shown_as_text_and_as_html(folder: Path) -> None:
    sae = coder()
    seen = ""
    for latent in range(F):
        view = sae.show(latent, folder, contexts=3)
        html = Text(view._repr_html_())
        assert html.tags <= {"div", "b", "span", "code"}
        assert f"Latent {latent}: <script>alert(1)</script>" in html.text
        assert len(repr(view).splitlines()) == 1 + min(3, view.record["top"])
        if view.record["top"]:
            assert f"{view.record['max']:.4g}" in html.text and "«" in repr(view)
        seen += html.text
    assert "<b>bold</b>" in seen


def test_mistakes(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"latent must be in \[0, 40\), got 40"):
        coder().show(F, folder)
    with pytest.raises(UserError, match="must be of a coder with 8 latents, got 40"):
        TopKSAE(D, 8, 3).show(1, folder)
    with pytest.raises(UserError, match="must be a dashboard"):
        coder().show(1, tmp_path)
