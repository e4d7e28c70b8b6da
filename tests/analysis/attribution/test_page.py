# SPDX-License-Identifier: Apache-2.0
"""The file of a circuit page."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from attribution_sites import METRIC, RESID, WRITE, ids, two_sites
from attribution_sites import model as language_model

from ksae.analysis.attribution import Effects, Node, circuit_page, curve, edges, effects
from ksae.errors import UserError

TOKENS = [f" word{i}" for i in range(7)]


@pytest.fixture(scope="module")
def found() -> Effects:
    return effects(language_model(), ids(), METRIC, two_sites(), patch=ids(5))


def data(path: Path) -> Any:
    match = re.search(r'<script id="data" type="application/json">(.*?)</script>', path.read_text())
    assert match is not None
    return json.loads(match[1])


def test_the_data_are_those_of_the_circuit(found: Effects, tmp_path: Path) -> None:
    nodes = found.nodes(12)
    links = edges(language_model(), ids(), METRIC, found, found.nodes(20))
    points = curve(language_model(), ids(), METRIC, found.sites, nodes, [0, 12], patch=ids(5))
    labels = {WRITE: {n.latent: "a label" for n in nodes if n.site == 1 and n.latent is not None}}
    out = circuit_page(
        tmp_path / "new" / "x.html", found, nodes, links, tokens=TOKENS, curve=points,
        labels=labels, dashboards={RESID: "pages/index.html"}, metric="m", title="t",
    )  # fmt: skip
    assert out == tmp_path / "new" / "x.html"
    got = data(out)
    assert (got["title"], got["metric"], got["tokens"]) == ("t", "m", TOKENS)
    assert got["clean"] == pytest.approx(found.clean, rel=1e-4)
    assert got["patch"] == pytest.approx(found.patch, rel=1e-4)
    assert got["sites"] == [
        {"name": RESID, "dashboard": "pages/index.html"},
        {"name": WRITE, "dashboard": None},
    ]
    for node, mine in zip(nodes, got["nodes"], strict=True):
        assert (mine["site"], mine["position"], mine["latent"]) == (
            node.site, node.position, node.latent,
        )  # fmt: skip
        assert mine["effect"] == pytest.approx(-node.effect, rel=1e-4)
        assert (mine["label"] == "a label") == (node.site == 1 and node.latent is not None)
    keys = {node.key for node in nodes}
    inside = [
        e for e in links if e.source.key in keys and (e.target is None or e.target.key in keys)
    ]
    assert 0 < len(inside) < len(links)
    for edge, (source, target, weight) in zip(inside, got["edges"], strict=True):
        assert nodes[source] == edge.source
        assert (nodes[target] if target >= 0 else None) == edge.target
        assert weight == pytest.approx(-edge.weight, rel=1e-4)
    assert [p[0] for p in got["curve"]] == [0, 12]


def test_it_is_one_file_and_text_is_text(found: Effects, tmp_path: Path) -> None:
    """Also text that looks like the marks of the page's own parts."""
    evil = "</script><script>alert(1)</script><!-- /*STYLE*/ /*SCRIPT*/ /*DATA*/"
    nodes = found.nodes(3)
    out = circuit_page(
        tmp_path / "x.html", found, nodes, [], tokens=[evil] * 7, title=evil, metric=evil
    )
    text = out.read_text()
    assert data(out)["tokens"] == [evil] * 7
    assert text.count("</script>") == 2 and "<!-- /*" not in text and "alert(1)</script" not in text
    assert not re.search(r'(src|href)="(?!data:,|#)', text) and "@import" not in text
    assert text.count("const graph =") == 1 and text.count("--for-line:") == 1


def test_mistakes(found: Effects, tmp_path: Path) -> None:
    nodes, out = found.nodes(3), tmp_path / "x.html"
    with pytest.raises(UserError, match="nodes must have at least one, got none"):
        circuit_page(out, found, [], [])
    with pytest.raises(UserError, match="tokens must have one for position 6, got 2 tokens"):
        circuit_page(out, found, [Node(0, 6, 1)], [], tokens=["a", "b"])
    with pytest.raises(UserError, match=r"site must be in \[0, 2\), got 2"):
        circuit_page(out, found, [Node(2, 0, 1)], [], tokens=TOKENS)
    for argument in ("labels", "dashboards"):
        given: Any = {argument: {"layers.5.mlp_out": {}}}
        with pytest.raises(UserError, match=f"{argument} must be of sites .*, got layers.5"):
            circuit_page(out, found, nodes, [], tokens=TOKENS, **given)
    with pytest.raises(UserError, match="must be finite"):
        circuit_page(out, found, [Node(0, 0, 1, float("nan"))], [], tokens=TOKENS)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write"):
        circuit_page(tmp_path / "file" / "x.html", found, nodes, [], tokens=TOKENS)
    assert not out.exists()
