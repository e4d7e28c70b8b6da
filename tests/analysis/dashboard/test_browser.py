# SPDX-License-Identifier: Apache-2.0
"""The pages in a real browser, from the disk: list, search, a latent, its neighbours."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from chromium import all_of, needs_browser, one, open_page, press, until
from toy_language_model import HOOK, D, contexts, llama, tokenizer

from ksae import TopKSAE
from ksae.analysis.dashboard import build

pytestmark = [pytest.mark.nightly, needs_browser]
F = 200
LABEL = "<script>document.title='hacked'</script> a label"


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> str:
    torch.manual_seed(3)
    out = tmp_path_factory.mktemp("pages") / "toy"
    sae = TopKSAE(D, F, 4)
    with torch.no_grad():
        sae.W_dec *= torch.linspace(0.5, 2, F).unsqueeze(1)
    made = build(sae, llama(), tokenizer(), contexts(), HOOK, out, labels={7: LABEL}, title="toy")
    return made.page.as_uri()


@pytest.fixture()
def opened(browser: Any, page: str) -> Iterator[Any]:
    """The list, freshly opened; the test ends without a message in the console."""
    open_page(browser, page)
    yield browser
    assert browser.get_log("browser") == []


def title_is(browser: Any, text: str) -> None:
    script = "return document.querySelector('h1')?.textContent.startsWith(arguments[0])"
    until(lambda: browser.execute_script(script, text))


def listed(browser: Any) -> list[int]:
    return browser.execute_script(  # type: ignore[no-any-return]
        "return [...document.querySelectorAll('tr[data-latent]')].map(r => +r.dataset.latent)"
    )


def test_the_list_sorts_filters_and_searches(opened: Any) -> None:
    assert one(opened, ".summary").text == f"{F} latents"
    assert listed(opened)[:3] == [0, 1, 2]
    fired = opened.execute_script("return ksae.index.fired")
    one(opened, "th[data-sort=rate] button").click()
    assert one(opened, "th[data-sort=rate]").get_attribute("aria-sort") == "descending"
    order = sorted(range(F), key=lambda i: (-fired[i], i))
    assert listed(opened) == order[: len(listed(opened))]
    one(opened, "th[data-sort=norm] button").click()
    assert listed(opened)[:2] == [F - 1, F - 2]

    one(opened, "[name=nmin]").send_keys("1.9")
    norms = opened.execute_script("return ksae.index.norm")
    kept = sum(n >= 1.9 for n in norms)
    assert one(opened, ".summary").text == f"{kept} of {F} latents"
    one(opened, ".clear").click()
    one(opened, "[name=show] option[value=silent]").click()
    assert len(listed(opened)) == min(60, fired.count(0))
    one(opened, ".clear").click()

    one(opened, "#search").send_keys("a label")
    assert listed(opened) == [7]
    assert one(opened, "td .label").text == LABEL
    assert "q=a+label" in opened.current_url
    opened.execute_script("document.querySelector('.clear').click()")
    word = next(t for t in opened.execute_script("return ksae.index.tokens.flat()") if "word" in t)
    one(opened, "#search").send_keys(word)
    tokens = opened.execute_script("return ksae.index.tokens")
    assert {i for i in range(F) if word in tokens[i]} <= set(listed(opened)) or len(
        listed(opened)
    ) >= 60
    one(opened, "#search").clear()
    one(opened, "#search").send_keys("no such thing")
    assert one(opened, ".summary").text == f"0 of {F} latents" and listed(opened) == []


def test_the_list_grows_as_it_is_scrolled(opened: Any) -> None:
    first = len(listed(opened))
    assert first < F
    opened.execute_script("scrollTo(0, document.body.scrollHeight)")
    until(lambda: len(listed(opened)) > first)


def test_dragging_over_the_rates_filters(opened: Any) -> None:
    from selenium.webdriver import ActionChains

    box = one(opened, ".rates svg")
    half = box.size["width"] // 2
    drag = ActionChains(opened).move_to_element_with_offset(box, 0, 0)
    drag.click_and_hold().move_by_offset(half - 30, 0).release().perform()
    assert one(opened, "[name=rmin]").get_attribute("value") != ""
    assert 0 < len(listed(opened)) < F
    assert all_of(opened, ".rates rect.out")


def test_a_latent_and_its_neighbours(opened: Any) -> None:
    one(opened, "th[data-sort=rate] button").click()
    latent = listed(opened)[0]
    one(opened, f"tr[data-latent='{latent}'] td.what").click()
    title_is(opened, f"Latent {latent}")
    record = opened.execute_script(
        "return ksae.latent(Number(location.hash.split('/').pop())).then(r => r)"
    )
    assert len(all_of(opened, "section[aria-labelledby=h-top] li")) == record["top"]
    assert len(all_of(opened, "section[aria-labelledby=h-bands] ol")) == 4
    assert all_of(opened, "section[aria-labelledby=h-random] li")
    assert [len(lens.find_elements("css selector", "li")) for lens in all_of(opened, ".lens")] == [
        10,
        10,
    ]
    assert one(opened, ".stats").text.count("norm") == 2
    sections = [s.text.splitlines()[0] for s in all_of(opened, ".side section")]
    assert sections == [
        "Activations",
        "Logit lens",
        "Fire together",
        "Nearest decoders",
        "Nearest encoders",
    ]
    near = all_of(opened, ".near a")
    other = near[0].text
    assert int(other) == record["together"][0][0]
    near[0].click()
    title_is(opened, f"Latent {other}")
    opened.back()
    title_is(opened, f"Latent {latent}")


def test_hovering_shows_the_value(opened: Any) -> None:
    from selenium.webdriver import ActionChains

    opened.execute_script(
        "location.hash = '#/latent/' + ksae.index.fired.indexOf(Math.max(...ksae.index.fired))"
    )
    until(lambda: all_of(opened, ".passage"))
    token = one(opened, ".t:has(.peak)")
    ActionChains(opened).move_to_element(token).perform()
    tip = until(lambda: [t for t in all_of(opened, "#tip") if t.is_displayed()])[0].text
    value = float(token.get_attribute("data-v"))
    assert f"{value:.3g}" in tip and f"token {token.get_attribute('data-p')}" in tip
    red = opened.execute_script(
        "return getComputedStyle(arguments[0]).backgroundColor", one(token, ".peak")
    )
    assert "0, 0, 0, 0" not in red


def test_keys(opened: Any) -> None:
    press(opened, "/")
    until(lambda: opened.switch_to.active_element.get_attribute("id") == "search")
    opened.switch_to.active_element.send_keys("\ue00c")  # escape
    press(opened, "j")
    press(opened, "j")
    assert opened.switch_to.active_element.text == "1"
    opened.switch_to.active_element.send_keys("\ue007")  # enter
    title_is(opened, "Latent 1")
    press(opened, "j")
    title_is(opened, "Latent 2")
    press(opened, "k")
    title_is(opened, "Latent 1")
    press(opened, "\ue00c")
    title_is(opened, "Latents of toy")
    assert opened.switch_to.active_element.text == "1"  # where it was left
    press(opened, "?")
    assert one(opened, "dialog").is_displayed()
    press(opened, "\ue00c")
    assert not one(opened, "dialog").is_displayed()


def test_light_dark_and_phone(opened: Any) -> None:
    colour = "return getComputedStyle(document.body).backgroundColor"
    before = opened.execute_script(colour)
    press(opened, "t")
    after = opened.execute_script(colour)
    assert before != after
    one(opened, "#theme").click()
    assert opened.execute_script(colour) == before
    size = {"width": 380, "height": 800, "deviceScaleFactor": 2, "mobile": True}
    opened.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    for address in ("#/", "#/latent/7"):
        opened.execute_script("location.hash = arguments[0]", address)
        title_is(opened, "Latents of toy" if address == "#/" else "Latent 7")
        assert opened.execute_script("return document.documentElement.scrollWidth <= 380")
    opened.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def test_markup_in_text_and_labels_is_shown_as_it_is(opened: Any) -> None:
    opened.execute_script("window.alerted = false; window.alert = () => (window.alerted = true)")
    opened.execute_script("location.hash = '#/latent/7'")
    title_is(opened, "Latent 7")
    assert one(opened, "h1 .label").text == LABEL
    seen = set()
    for latent in range(0, F, 10):
        opened.execute_script("location.hash = arguments[0]", f"#/latent/{latent}")
        title_is(opened, f"Latent {latent}")
        seen |= {
            t.strip()
            for t in opened.execute_script(
                "return [...document.querySelectorAll('.t')].map(t => t.dataset.t)"
            )
        }
        assert not all_of(opened, "main script, main img, main b, main iframe")
    assert "<script>alert(1)</script>" in seen
    assert not opened.execute_script("return window.alerted") and "hacked" not in opened.title


def test_a_latent_that_does_not_exist(opened: Any) -> None:
    opened.execute_script("location.hash = '#/latent/99999'")
    title_is(opened, "No such latent")


def test_a_silent_latent(opened: Any) -> None:
    silent = opened.execute_script("return ksae.index.fired.indexOf(0)")
    assert silent >= 0
    opened.execute_script("location.hash = arguments[0]", f"#/latent/{silent}")
    title_is(opened, f"Latent {silent}")
    assert "silent on all" in one(opened, ".texts").text
