# SPDX-License-Identifier: Apache-2.0
"""axe-core finds no serious fault in any page, light or dark."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import torch
from attribution_sites import METRIC, ids, two_sites
from attribution_sites import model as language_model
from chromium import needs_browser, one, open_page, press, until
from toy_language_model import HOOK, D, contexts, llama, tokenizer

from ksae import TopKSAE, Transcoder
from ksae.analysis.attribution import circuit_page, curve, edges, effects
from ksae.analysis.dashboard import build

pytestmark = [pytest.mark.nightly, needs_browser]
RUN = (
    "axe.run(document, {resultTypes: ['violations']}).then(arguments[0], e => arguments[0](`${e}`))"
)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Addresses of an SAE's and a transcoder's dashboard and of a circuit."""
    torch.manual_seed(3)
    folder, model = tmp_path_factory.mktemp("pages"), llama()
    sae, text = TopKSAE(D, 80, 4), contexts()
    made = build(sae, model, tokenizer(), text, HOOK, folder / "sae", labels={7: "a label"})
    hooks = ("layers.1.mlp_in", "layers.1.mlp_out")
    other = Transcoder(D, D, 80, 4)
    torch.nn.init.normal_(other.W_dec)
    second = build(
        other, model, tokenizer(), text, hooks[0], folder / "transcoder", target_hook=hooks[1]
    )
    lm, sites = language_model(), two_sites()
    found = effects(lm, ids(), METRIC, sites, patch=ids(5))
    nodes = found.nodes(30)
    circuit = circuit_page(
        folder / "circuit.html", found, nodes, edges(lm, ids(), METRIC, found, nodes),
        tokens=[f" word{i}" for i in range(7)], patch_tokens=[f" word{i % 3}" for i in range(7)],
        curve=curve(lm, ids(), METRIC, sites, nodes, [0, 10, 30]),
        dashboards={HOOK.replace("1", "0"): "sae/index.html"},
    )  # fmt: skip
    return {
        "index": made.page.as_uri(),
        "latent": f"{made.page.as_uri()}#/latent/7",
        "transcoder": f"{second.page.as_uri()}#/latent/5",
        "circuit": circuit.as_uri(),
    }


@pytest.fixture()
def faults(browser: Any) -> Iterator[Any]:
    """A function that returns the serious faults of the page as it is now."""
    axe = resources.files("axe_playwright_python").joinpath("axe.min.js").read_text()

    def of() -> list[str]:
        browser.execute_script(axe)
        found = browser.execute_async_script(RUN)
        assert isinstance(found, dict), found
        return [
            f"{fault['id']}: {node['html']}: {node['failureSummary']}"
            for fault in found["violations"]
            for node in fault["nodes"]
            if fault["impact"] in ("serious", "critical")
        ]

    yield of


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("name", ["index", "latent", "transcoder", "circuit"])
def test_a_page_has_no_serious_fault(
    browser: Any, faults: Any, pages: dict[str, str], name: str, theme: str
) -> None:
    open_page(browser, pages[name])
    browser.execute_script("document.documentElement.dataset.theme = arguments[0]", theme)
    assert faults() == []
    if name == "circuit":  # with a node held, and all of it as a table
        press(browser, "j")
        one(browser, "details summary").click()
        until(lambda: one(browser, "#table").is_displayed())
        assert faults() == []


def test_a_fault_is_found(browser: Any, faults: Any, tmp_path: Path) -> None:
    page = tmp_path / "x.html"
    page.write_text(
        "<html lang=en data-ready><title>x</title><body style='background: #fff'>"
        "<main><p style='color: #ddd'>pale</p><img src='data:,'><input></main>"
    )
    open_page(browser, page.as_uri())
    found = {fault.split(":")[0] for fault in faults()}
    assert {"color-contrast", "image-alt", "label"} <= found
