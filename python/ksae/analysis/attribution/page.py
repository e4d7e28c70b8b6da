# SPDX-License-Identifier: Apache-2.0
"""A circuit as one page of HTML: a graph of its nodes and edges, opened from the disk."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib import resources
from os import PathLike
from pathlib import Path
from typing import Any

from ksae.analysis.attribution.edges import Edge
from ksae.analysis.attribution.effects import Effects
from ksae.analysis.attribution.faithfulness import Point
from ksae.analysis.attribution.nodes import Node, check_nodes
from ksae.errors import UserError
from ksae.files.atomic import write_atomic

DASHBOARD = "ksae.analysis.dashboard"  # its style and pieces of pages are these pages' too
STYLES = ((DASHBOARD, "style.css"), (__package__, "circuit.css"))
SCRIPTS = ((DASHBOARD, "widgets.js"), (__package__, "graph.js"), (__package__, "circuit.js"))


def circuit_page(
    path: str | PathLike[str],
    found: Effects,
    nodes: Sequence[Node],
    edges: Sequence[Edge],
    *,
    tokens: Sequence[str] = (),
    patch_tokens: Sequence[str] | None = None,
    metric: str = "metric",
    title: str = "Circuit",
    curve: Sequence[Point] | None = None,
    labels: Mapping[str, Mapping[int, str]] | None = None,
    dashboards: Mapping[str, str] | None = None,
) -> Path:
    """Write a page that shows a circuit: a row a site, a column a position, the metric on top.

    The page is one file that loads nothing else, so it can be sent as it is. Numbers in it are
    contributions: what the metric loses when the node is changed, the negative of an effect.

    Args:
        path: the file, in a folder that is made if need be.
        found, nodes, edges: see `effects` and `edges`, whose weights are of the metric. Edges that
            have an end outside of the nodes are left out.
        tokens: the text of each position; needed if nodes have positions.
        patch_tokens: those of the other input.
        metric, title: in words.
        curve: shown beside the graph, see `curve`.
        labels: latent -> text for sites by name.
        dashboards: for sites by name, where the index.html of the coder's dashboard is, relative to
            the page: latents link to their pages there.

    Returns:
        The path.

    Raises:
        UserError: no nodes, nodes that do not exist, a position without a token, labels or
            dashboards of no site, or a file that cannot be written.
    """
    check_nodes(nodes, [site.coder.d_sae for site in found.sites])
    if not nodes:
        raise UserError("circuit_page: nodes must have at least one, got none")
    last = max((n.position for n in nodes if n.position is not None), default=-1)
    if last >= len(tokens):
        raise UserError(
            f"circuit_page: tokens must have one for position {last}, got {len(tokens)} tokens"
        )
    names = [site.name for site in found.sites]
    for argument, given in (("labels", labels), ("dashboards", dashboards)):
        for name in given or {}:
            if name not in names:
                raise UserError(
                    f"circuit_page: {argument} must be of sites {', '.join(names)}, got {name}"
                )
    number = {node.key: i for i, node in enumerate(nodes)}
    lines = [
        [number[e.source.key], -1 if e.target is None else number[e.target.key], _digits(-e.weight)]
        for e in edges
        if e.source.key in number and (e.target is None or e.target.key in number)
    ]
    data = {
        "title": title,
        "metric": metric,
        "clean": _digits(found.clean),
        "patch": None if found.patch is None else _digits(found.patch),
        "tokens": list(tokens),
        "others": None if patch_tokens is None else list(patch_tokens),
        "sites": [{"name": n, "dashboard": (dashboards or {}).get(n)} for n in names],
        "nodes": [_node(node, names[node.site], labels or {}) for node in nodes],
        "edges": lines,
        "curve": [[p.nodes, _digits(p.faithfulness), _digits(p.completeness)] for p in curve]
        if curve
        else None,
    }
    out = Path(path)
    write_atomic(out, lambda file: file.write(_page(data)))
    return out


def _node(node: Node, site: str, labels: Mapping[str, Mapping[int, str]]) -> dict[str, Any]:
    label = None if node.latent is None else labels.get(site, {}).get(node.latent)
    return {
        "site": node.site,
        "position": node.position,
        "latent": node.latent,
        "label": label,
        "effect": _digits(-node.effect),
        "activation": None if node.activation is None else _digits(node.activation),
        "patched": None if node.patched is None else _digits(node.patched),
    }


def _digits(value: float) -> float:
    return float(f"{value:.5g}")


def _page(data: dict[str, Any]) -> bytes:
    try:
        text = json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except ValueError:
        raise UserError("circuit_page: numbers must be finite, got NaN or infinity") from None
    parts = {
        "/*STYLE*/": "\n".join(_asset(*name) for name in STYLES),
        "/*DATA*/": text.replace("<", "\\u003c"),  # no end of the script, no comment begins in it
        "/*SCRIPT*/": "\n".join(_asset(*name) for name in SCRIPTS),
    }
    page, rest = "", _asset(__package__, "circuit.html")
    for mark, part in parts.items():  # in the order of the page
        before, _, rest = rest.partition(mark)
        page += before + part
    return (page + rest).encode("utf-8", "replace")


def _asset(package: str, name: str) -> str:
    return resources.files(package).joinpath("assets", name).read_text(encoding="utf-8")
