# SPDX-License-Identifier: Apache-2.0
"""The page of a circuit in a real browser, from the disk."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from attribution_sites import METRIC, WRITE, ids, two_sites
from attribution_sites import model as language_model
from chromium import all_of, needs_browser, one, open_page, press, until

from ksae.analysis.attribution import circuit_page, curve, edges, effects

pytestmark = [pytest.mark.nightly, needs_browser]
EVIL = "<script>document.title='hacked'</script>"
TOKENS = [" The", " keys", EVIL, "\n", " to", "", "<img src=x onerror=document.title='hacked'>"]
ENTER, ESCAPE, TAB = "\ue007", "\ue00c", "\ue004"
LEFT, UP, RIGHT, DOWN = "\ue012", "\ue013", "\ue014", "\ue015"


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> str:
    model, sites = language_model(), two_sites()
    found = effects(model, ids(), METRIC, sites)
    nodes = found.nodes(30)
    links = edges(model, ids(), METRIC, found, nodes)
    points = curve(model, ids(), METRIC, sites, found.nodes(), [0, 10, 30, 1000])
    latent = next(n.latent for n in nodes if n.site == 1 and n.latent is not None)
    out = circuit_page(
        tmp_path_factory.mktemp("circuit") / "x.html", found, nodes, links, tokens=TOKENS,
        patch_tokens=[*TOKENS[:1], " key", *TOKENS[2:]], metric=f"logit of {EVIL}", title=EVIL,
        curve=points, labels={WRITE: {latent: f"{EVIL} a label"}},
        dashboards={WRITE: "pages/index.html"},
    )  # fmt: skip
    return out.as_uri()


@pytest.fixture()
def opened(browser: Any, page: str) -> Iterator[Any]:
    """The page, freshly opened; the test ends without a message in the console."""
    open_page(browser, page)
    yield browser
    assert browser.get_log("browser") == []


def script(browser: Any, code: str, *args: Any) -> Any:
    return browser.execute_script(f"return {code}", *args)


def data(browser: Any) -> Any:
    return script(browser, "JSON.parse(document.getElementById('data').textContent)")


def visible_edges(browser: Any) -> int:
    count = "[...document.querySelectorAll('.edge')].filter(e => +e.style.opacity > 0.1).length"
    return int(script(browser, count))


def held(browser: Any) -> int | None:
    found = all_of(browser, ".node.held")
    return int(found[0].get_attribute("data-node")) if found else None


def test_all_nodes_and_edges_are_drawn(opened: Any) -> None:
    circuit = data(opened)
    assert len(all_of(opened, ".node")) == len(circuit["nodes"]) + 1
    assert len(all_of(opened, ".edge")) == len(circuit["edges"]) > 20
    boxes = script(
        opened,
        "[...document.querySelectorAll('.node')].map(n => {"
        "const b = n.getBoundingClientRect(); return [b.left, b.right, b.top, b.bottom]})",
    )
    for i, a in enumerate(boxes):  # none on another
        for b in boxes[:i]:
            assert a[0] >= b[1] or b[0] >= a[1] or a[2] >= b[3] or b[2] >= a[3]
    rows = [r.text for r in all_of(opened, ".row-name")]
    assert rows == [site["name"] for site in circuit["sites"]]
    assert one(opened, ".side h2").text == "Strongest nodes"
    assert len(all_of(opened, ".curve .dot1")) == 4


def test_a_node_shows_what_it_is_linked_to(opened: Any) -> None:
    circuit = data(opened)
    node = max(range(len(circuit["nodes"])), key=lambda i: sum(e[0] == i for e in circuit["edges"]))
    one(opened, f".node[data-node='{node}']").click()
    assert held(opened) == node
    mine = [e for e in circuit["edges"] if node in e[:2]]
    assert len(all_of(opened, ".side .links li")) == min(12, len(mine))
    near = {int(n.get_attribute("data-node")) for n in all_of(opened, ".node.near")}
    assert near == {node} | {e[0] for e in mine} | {e[1] for e in mine}
    first = one(opened, ".side .links button")
    weights = sorted((abs(e[2]) for e in mine if e[0] == node), reverse=True)
    target = next(e[1] for e in mine if e[0] == node and abs(e[2]) == weights[0])
    first.click()
    assert held(opened) == target
    one(opened, ".scroll").click()  # on nothing
    assert held(opened) is None and one(opened, ".side h2").text == "Strongest nodes"


def test_a_latent_links_to_its_dashboard(opened: Any) -> None:
    circuit = data(opened)
    for i, node in enumerate(circuit["nodes"]):
        if node["latent"] is None:
            continue
        one(opened, f".node[data-node='{i}']").click()
        links = [a.get_attribute("href") for a in all_of(opened, ".side a")]
        if node["site"] == 0:
            assert links == []
        else:
            assert len(links) == 1 and links[0].endswith(
                f"pages/index.html#/latent/{node['latent']}"
            )


def test_the_slider_shows_the_strongest_edges(opened: Any) -> None:
    total = len(data(opened)["edges"])
    slider = one(opened, "#strongest")
    set_to = "arguments[0].value = arguments[1]; arguments[0].dispatchEvent(new Event('input'))"
    for shown in (0, 3, total):
        opened.execute_script(set_to, slider, shown)
        assert visible_edges(opened) == shown
        assert one(opened, "#shown").text == f"{shown} of {total}"


def test_keys(opened: Any) -> None:
    circuit = data(opened)
    order = sorted(range(len(circuit["nodes"])), key=lambda i: -abs(circuit["nodes"][i]["effect"]))
    press(opened, "j")
    assert held(opened) == order[0]
    press(opened, "j")
    assert held(opened) == order[1]
    press(opened, "k")
    assert held(opened) == order[0]
    seen = {held(opened)}
    for key in (DOWN, LEFT, LEFT, RIGHT, *[UP] * 15):
        press(opened, key)
        seen.add(held(opened))
        focused = opened.switch_to.active_element.get_attribute("data-node")
        assert int(focused) == held(opened)
    assert held(opened) == -1 and len(seen) > 3  # the metric is on top
    press(opened, ENTER)
    assert held(opened) is None
    press(opened, ENTER)
    assert held(opened) == -1
    press(opened, ESCAPE)
    assert held(opened) is None
    assert len(all_of(opened, ".node[tabindex='0']")) == 1  # one stop of the Tab key
    press(opened, "?")
    assert one(opened, "dialog").is_displayed()
    press(opened, ESCAPE)
    assert not one(opened, "dialog").is_displayed()


def test_hovering_says_what_a_node_is(opened: Any) -> None:
    from selenium.webdriver import ActionChains

    node = one(opened, ".node[data-node='0']")
    ActionChains(opened).move_to_element(node).perform()
    tip = until(lambda: [t for t in all_of(opened, "#tip") if t.is_displayed()])[0].text
    assert "contribution" in tip and "layers." in tip
    assert all_of(opened, ".picked") and held(opened) is None


def test_light_dark_and_phone(opened: Any) -> None:
    colour = "getComputedStyle(document.body).backgroundColor"
    before = script(opened, colour)
    press(opened, "t")
    assert script(opened, colour) != before
    one(opened, "#theme").click()
    assert script(opened, colour) == before
    size = {"width": 380, "height": 800, "deviceScaleFactor": 2, "mobile": True}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    until(lambda: script(opened, "document.documentElement.clientWidth") == 380)
    assert script(opened, "document.documentElement.scrollWidth <= 380")
    opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_markup_in_text_is_shown_as_it_is(opened: Any) -> None:
    assert opened.title == EVIL and one(opened, "h1").text == f"logit of {EVIL}"
    one(opened, "details summary").click()
    assert EVIL in one(opened, "#table").text and f"{EVIL} a label" in one(opened, "#table").text
    for i in range(len(data(opened)["nodes"])):
        one(opened, f".node[data-node='{i}']").click()
    assert not all_of(opened, "main script, main img") and opened.title == EVIL
