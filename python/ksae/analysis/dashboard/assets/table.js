// SPDX-License-Identifier: Apache-2.0
// The index: every latent in a list that is searched, filtered and sorted.
"use strict";

const table = (() => {
  const PAGE = 60; // rows that are added as the list is scrolled
  const COLUMNS = [
    ["latent", "Latent", (i) => i, 1],
    ["rate", "Rate", (i) => ksae.index.fired[i], -1],
    ["max", "Max", (i) => ksae.index.max[i], -1],
    ["norm", "Norm", (i) => ksae.index.norm[i], -1],
    ["label", "Responds to", (i) => ksae.index.labels[i] || "\uffff", 1],
  ];
  const SHOW = { all: "all latents", firing: "that fire", silent: "that are silent", labelled: "with a label" };
  const DEFAULTS = { q: "", sort: "latent", dir: "1", show: "all", rmin: "", rmax: "", nmin: "", nmax: "" };

  let state = { ...DEFAULTS };
  let found = []; // latents in their order
  let haystacks = null;
  let shown = 0;
  let body, sentinel, summary, controls, brush;

  /** The address of the list as it is. */
  function hash() {
    const set = Object.entries(state).filter(([key, value]) => value !== DEFAULTS[key]);
    return set.length ? `#/?${new URLSearchParams(set)}` : "#/";
  }

  function read(query) {
    state = { ...DEFAULTS };
    for (const [key, value] of new URLSearchParams(query)) if (key in DEFAULTS) state[key] = value;
    if (!COLUMNS.some(([name]) => name === state.sort)) state.sort = DEFAULTS.sort;
    if (!(state.show in SHOW)) state.show = DEFAULTS.show;
  }

  function haystack(i) {
    if (!haystacks) {
      const { snippet, tokens, promoted, labels } = ksae.index;
      haystacks = snippet.map((s, n) =>
        [labels[n] || "", s ? s.join("") : "", tokens[n].join(" "), promoted[n].join(" ")].join("\n").toLowerCase(),
      );
    }
    return haystacks[i];
  }

  const bound = (text) => (text.trim() === "" || !Number.isFinite(Number(text)) ? null : Number(text));

  /** Latents that pass search and filters, in order. */
  function select() {
    const { fired, norm, labels } = ksae.index;
    const words = state.q.toLowerCase().split(/\s+/).filter(Boolean);
    const [rmin, rmax, nmin, nmax] = [state.rmin, state.rmax, state.nmin, state.nmax].map(bound);
    const rate = (i) => (100 * fired[i]) / ksae.meta.tokens;
    const keep = [];
    for (let i = 0; i < ksae.meta.F; i++) {
      if (state.show === "firing" && fired[i] === 0) continue;
      if (state.show === "silent" && fired[i] > 0) continue;
      if (state.show === "labelled" && !(i in labels)) continue;
      if ((rmin !== null && rate(i) < rmin) || (rmax !== null && rate(i) > rmax)) continue;
      if ((nmin !== null && norm[i] < nmin) || (nmax !== null && norm[i] > nmax)) continue;
      if (!words.every((word) => haystack(i).includes(word) || String(i) === word)) continue;
      keep.push(i);
    }
    const [, , key] = COLUMNS.find(([name]) => name === state.sort);
    const sign = Number(state.dir);
    keep.sort((a, b) => {
      const x = key(a), y = key(b);
      return x < y ? -sign : x > y ? sign : a - b;
    });
    const exact = keep.findIndex((i) => words.length === 1 && String(i) === words[0]);
    if (exact > 0) keep.unshift(...keep.splice(exact, 1)); // a number names its latent first
    found = keep;
  }

  function row(i) {
    const { fired, max, norm, labels, snippet, tokens, promoted } = ksae.index;
    const share = fired[i] / ksae.meta.tokens;
    const least = Math.log10(1 / ksae.meta.tokens);
    const level = el("span", { class: "level rate" }, percent(share));
    level.style.setProperty("--w", `${fired[i] ? (100 * (1 - Math.log10(share) / least)).toFixed(1) : 0}%`);
    const what = el("td", { class: "what" });
    if (i in labels) what.append(el("span", { class: "label" }, labels[i]));
    if (snippet[i]) {
      const [before, token, after] = snippet[i].map(brief);
      what.append(el("span", { class: "snippet" }, before.trimStart(), /^ ./.test(token) ? " " : "", el("mark", {}, token.trim() || token), after));
    } else what.append(el("span", { class: "muted" }, "silent on this text"));
    if (tokens[i].length > 1) what.append(el("span", { class: "fires" }, tokens[i].map((t) => chip(t))));
    return el(
      "tr",
      { "data-latent": i, click: (event) => event.target.closest("a") || (location.hash = `#/latent/${i}`) },
      el("td", { class: "id" }, el("a", { href: `#/latent/${i}` }, String(i))),
      el("td", { class: "num", "data-name": "rate" }, level),
      el("td", { class: "num", "data-name": "max" }, number(max[i])),
      el("td", { class: "num", "data-name": "norm" }, number(norm[i])),
      what,
      el("td", { class: "promotes" }, promoted[i].map((t) => chip(t))),
    );
  }

  function more() {
    const next = found.slice(shown, shown + PAGE);
    body.append(...next.map(row));
    shown += next.length;
    sentinel.hidden = shown >= found.length;
  }

  /** Shows what the state selects. */
  function refresh({ keep = false, typed = null } = {}) {
    select();
    const rows = keep ? Math.max(shown, PAGE) : PAGE;
    body.replaceChildren();
    shown = 0;
    while (shown < Math.min(rows, found.length)) more();
    sentinel.hidden = shown >= found.length;
    summary.textContent =
      found.length === ksae.meta.F ? `${count(found.length)} latents` : `${count(found.length)} of ${count(ksae.meta.F)} latents`;
    body.closest("table").hidden = found.length === 0;
    for (const head of document.querySelectorAll("th[data-sort]")) {
      const mine = head.dataset.sort === state.sort;
      head.setAttribute("aria-sort", mine ? (state.dir === "1" ? "ascending" : "descending") : "none");
    }
    for (const control of controls.querySelectorAll("[name]")) {
      if (control !== typed) control.value = control.name === "order" ? `${state.sort} ${state.dir}` : state[control.name];
    }
    brush.mark();
    const address = hash();
    if (location.hash !== address) history.replaceState(null, "", address);
  }

  function change(values, typed) {
    Object.assign(state, values);
    refresh({ typed });
  }

  function sortBy(name) {
    const [, , , first] = COLUMNS.find(([column]) => column === name);
    const dir = state.sort === name ? -Number(state.dir) : first;
    change({ sort: name, dir: String(dir) });
  }

  /** Histogram of the rates on a log scale; dragging over it filters. */
  function rates() {
    const BINS = 60;
    const least = Math.log10(1 / ksae.meta.tokens);
    const place = (share) => 1 - Math.log10(share) / least; // 0 at one token, 1 at all
    const counts = new Array(BINS).fill(0);
    for (const n of ksae.index.fired) {
      if (n > 0) counts[Math.min(BINS - 1, Math.floor(place(n / ksae.meta.tokens) * BINS))]++;
    }
    const top = Math.max(1, ...counts);
    const H = 44;
    const bars = counts.map((n, b) => {
      const h = n === 0 ? 0 : Math.max(1, (n / top) * H);
      return el("rect", { x: (b * 100) / BINS, y: H - h, width: 86 / BINS, height: h });
    });
    const svg = el(
      "svg",
      { viewBox: `0 0 100 ${H}`, preserveAspectRatio: "none", role: "img", "aria-label": "Number of latents by firing rate, on a logarithmic scale" },
      bars,
    );
    const ticks = el("div", { class: "ticks", "aria-hidden": "true" });
    for (let e = Math.ceil(least); e <= 0; e++) {
      const tick = el("span", {}, `${Number((100 * 10 ** e).toPrecision(1))} %`);
      tick.style.left = `${place(10 ** e) * 100}%`;
      if (place(10 ** e) < 0.06) tick.classList.add("first");
      ticks.append(tick);
    }
    const box = el("div", { class: "rates" }, svg, ticks);
    const rateAt = (x) => {
      const area = svg.getBoundingClientRect();
      const at = Math.min(1, Math.max(0, (x - area.left) / area.width));
      return 100 * 10 ** ((1 - at) * least);
    };
    let from = null;
    svg.addEventListener("pointerdown", (event) => {
      from = event.clientX;
      svg.setPointerCapture(event.pointerId);
    });
    svg.addEventListener("pointermove", (event) => from !== null && drag(from, event.clientX));
    svg.addEventListener("pointerup", (event) => {
      if (from !== null && Math.abs(event.clientX - from) < 3) change({ rmin: "", rmax: "" });
      from = null;
    });
    svg.addEventListener("pointercancel", () => (from = null));
    function drag(a, b) {
      if (Math.abs(a - b) < 3) return;
      const ends = [rateAt(Math.min(a, b)), rateAt(Math.max(a, b))].map((v) => String(Number(v.toPrecision(2))));
      change({ rmin: ends[0], rmax: ends[1] });
    }
    box.mark = () => {
      const low = bound(state.rmin) ?? 0, high = bound(state.rmax) ?? Infinity;
      bars.forEach((b, i) => {
        const middle = 100 * 10 ** ((1 - (i + 0.5) / BINS) * least);
        b.classList.toggle("out", middle < low || middle > high);
      });
    };
    return box;
  }

  function field(name, title, attributes = {}) {
    return el("label", {}, el("span", {}, title), el("input", {
      name, value: state[name], inputmode: "decimal", size: 6, autocomplete: "off", ...attributes,
      input: (event) => change({ [name]: event.target.value }, event.target),
    }));
  }

  function makeControls() {
    const orders = COLUMNS.flatMap(([name, title]) => [
      el("option", { value: `${name} 1` }, `${title} ↑`), el("option", { value: `${name} -1` }, `${title} ↓`),
    ]);
    return el("div", { class: "controls" },
      el("input", {
        type: "search", name: "q", id: "search", placeholder: "Search label, text, token or number", value: state.q,
        "aria-label": "Search latents", autocomplete: "off", spellcheck: "false",
        input: (event) => change({ q: event.target.value }, event.target),
      }),
      el("label", { class: "order" }, el("span", {}, "Order"), el("select", {
        name: "order", change: (event) => { const [sort, dir] = event.target.value.split(" "); change({ sort, dir }); },
      }, orders)),
      el("label", {}, el("span", {}, "Show"), el("select", {
        name: "show", change: (event) => change({ show: event.target.value }),
      }, Object.entries(SHOW).map(([value, text]) => el("option", { value }, text)))),
      el("fieldset", {}, el("legend", {}, "Rate in %"), field("rmin", "from"), field("rmax", "to")),
      el("fieldset", {}, el("legend", {}, "Norm"), field("nmin", "from"), field("nmax", "to")),
      el("button", { type: "button", class: "quiet clear", click: () => change({ ...DEFAULTS, sort: state.sort, dir: state.dir }) }, "Clear"),
    );
  }

  /** The facts of the run, in a line. */
  function facts() {
    const m = ksae.meta;
    const firing = ksae.index.fired.filter((n) => n > 0).length;
    const where = m.target_hook && m.target_hook !== m.hook ? `${m.hook} → ${m.target_hook}` : m.hook;
    const items = [
      [m.kind, where], [`${m.d_in} → ${count(m.F)}${m.d_out === m.d_in ? "" : ` → ${m.d_out}`}`, `L0 ${m.l0}`],
      [`${count(m.tokens)} tokens`, `${count(m.contexts)} contexts`], [`${count(firing)} fire`, `${count(m.F - firing)} silent`],
    ];
    return el("ul", { class: "facts" }, items.map(([a, b]) => el("li", {}, el("strong", {}, a), " ", b)));
  }

  function show(view, query) {
    read(query);
    const heads = COLUMNS.map(([name, title]) => el("th", { scope: "col", "data-sort": name, class: name === "label" ? "" : "num" },
      el("button", { type: "button", click: () => sortBy(name) }, title)));
    body = el("tbody");
    sentinel = el("button", { type: "button", class: "more", click: more }, "More");
    summary = el("p", { class: "summary", role: "status" });
    controls = makeControls();
    brush = rates();
    view.replaceChildren(
      el("h1", { tabindex: "-1" }, `Latents of ${ksae.meta.title}`), facts(), controls, brush, summary,
      el("table", { class: "latents" },
        el("thead", {}, el("tr", {}, heads, el("th", { scope: "col" }, "Promotes"))), body),
      sentinel,
    );
    new IntersectionObserver((seen) => seen.some((s) => s.isIntersecting) && !sentinel.hidden && more(),
      { rootMargin: "600px" }).observe(sentinel);
    refresh({ keep: true });
    document.title = `Latents of ${ksae.meta.title}`;
  }

  /** The latent before or after one in the list as it was left; all of them if it is not in it. */
  function neighbour(latent, step) {
    if (!found.length) select();
    const at = found.indexOf(latent);
    if (at >= 0) return found[at + step];
    const next = latent + step;
    return next >= 0 && next < ksae.meta.F ? next : undefined;
  }

  /** Moves the focus by rows. */
  function move(step) {
    const links = [...body.querySelectorAll("td.id a")];
    const at = links.indexOf(document.activeElement);
    const next = links[at < 0 ? (step > 0 ? 0 : links.length - 1) : at + step];
    if (!next) return;
    next.focus();
    next.closest("tr").scrollIntoView({ block: "nearest" });
  }

  return { show, neighbour, move, hash };
})();
