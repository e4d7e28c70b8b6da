// SPDX-License-Identifier: Apache-2.0
// Which view is shown, keys, and light or dark.
"use strict";

(() => {
  const view = document.getElementById("view");
  let latent = null; // of the page shown; null: the list
  let scrolled = 0; // where the list was left

  async function route(event) {
    tip.hide();
    const address = location.hash.slice(1) || "/";
    const match = /^\/latent\/(\d+)$/.exec(address);
    if (event && latent === null) scrolled = lastScroll;
    try {
      if (match) {
        latent = Number(match[1]);
        await page.show(view, latent);
        scrollTo(0, 0);
      } else if (address.startsWith("/")) {
        page.leave();
        const back = latent;
        latent = null;
        table.show(view, address.split("?")[1] || "");
        scrollTo(0, back === null ? 0 : scrolled);
        const row = back === null ? null : view.querySelector(`tr[data-latent="${back}"] a`);
        if (row) return row.focus({ preventScroll: true });
      } else return; // the link to the content
    } catch (error) {
      view.replaceChildren(el("h1", { tabindex: "-1" }, "Cannot show this"), el("p", { class: "note" }, error.message));
    }
    if (event) view.querySelector("h1")?.focus({ preventScroll: true });
  }

  let lastScroll = 0;
  addEventListener("scroll", () => { if (latent === null) lastScroll = scrollY; }, { passive: true });

  function open(next) {
    if (next !== undefined) location.hash = `#/latent/${next}`;
  }

  function flip() {
    const root = document.documentElement;
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    try { localStorage.setItem("ksae-theme", root.dataset.theme); } catch { /* a page may store nothing */ }
  }

  function keys(event) {
    const dialog = document.getElementById("keys");
    if (event.ctrlKey || event.metaKey || event.altKey || dialog.open) return;
    const typing = event.target.matches("input, select, textarea");
    if (event.key === "Escape") {
      if (typing) event.target.blur();
      else if (latent !== null) location.hash = table.hash();
      return;
    }
    if (typing) return;
    const actions = {
      "/": () => { if (latent !== null) location.hash = table.hash(); setTimeout(() => document.getElementById("search")?.focus(), 0); },
      j: () => (latent === null ? table.move(1) : open(table.neighbour(latent, 1))),
      k: () => (latent === null ? table.move(-1) : open(table.neighbour(latent, -1))),
      t: flip,
      "?": () => dialog.showModal(),
    };
    if (actions[event.key]) {
      event.preventDefault();
      actions[event.key]();
    }
  }

  async function start() {
    try {
      const theme = localStorage.getItem("ksae-theme");
      if (theme) document.documentElement.dataset.theme = theme;
    } catch { /* a page may store nothing */ }
    tip.start();
    document.getElementById("theme").addEventListener("click", flip);
    document.getElementById("help").addEventListener("click", () => document.getElementById("keys").showModal());
    addEventListener("keydown", keys);
    addEventListener("hashchange", route);
    try {
      [ksae.meta, ksae.index] = await Promise.all([ksae.load("meta"), ksae.load("index")]);
    } catch (error) {
      view.replaceChildren(el("p", { class: "note" }, `${error.message}: this folder is not complete.`));
      return;
    }
    document.getElementById("title").textContent = ksae.meta.title;
    document.getElementById("where").textContent = ksae.meta.hook;
    await route();
    document.documentElement.dataset.ready = "";
    performance.mark("ready");
  }

  start();
})();
