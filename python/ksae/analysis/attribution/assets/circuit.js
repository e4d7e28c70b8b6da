// SPDX-License-Identifier: Apache-2.0
// What is shown of the circuit: which edges, the node that is looked at, keys, and light or dark.
"use strict";

(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const side = document.getElementById("side");
  const slider = document.getElementById("strongest");
  const order = data.nodes.map((_, i) => i).sort((a, b) => Math.abs(data.nodes[b].effect) - Math.abs(data.nodes[a].effect));
  const rank = new Map(); // of an edge, by strength
  data.edges.map((_, i) => i).sort((a, b) => Math.abs(data.edges[b][2]) - Math.abs(data.edges[a][2])).forEach((i, n) => rank.set(i, n));
  let drawn = null;
  let held = null; // the node that was chosen, -1 the metric, null none
  let hovered = null;
  let current = -1; // the node that the Tab key goes to

  const kind = (value) => (value > 0 ? "plus" : "minus");
  const place = (node) => (node.position === null ? "" : ` on ${JSON.stringify(data.tokens[node.position])}`);

  function title(i) {
    if (i < 0) return data.metric;
    const node = data.nodes[i];
    return node.latent === null ? `Error of ${data.sites[node.site].name}` : `Latent ${node.latent}`;
  }

  function spoken(i) {
    if (i < 0) return `The metric, ${data.metric}: ${number(data.clean)}`;
    const node = data.nodes[i];
    const label = node.label ? `, ${node.label}` : "";
    return `${title(i)}${label}, ${data.sites[node.site].name}${place(node)}, contribution ${number(node.effect)}`;
  }

  function brief(i) {
    const node = data.nodes[i];
    const label = node.label ? `  ${node.label}` : "";
    return `${title(i)}${label}  ·  ${data.sites[node.site].name}${place(node)}  ·  contribution ${number(node.effect)}`;
  }

  function draw() {
    const box = document.getElementById("scroll");
    const focused = box.contains(document.activeElement);
    drawn = graph.draw(data, box.clientWidth - 2, { spoken, tip: brief });
    box.replaceChildren(drawn.svg);
    update();
    if (focused) element(current).focus({ preventScroll: true });
  }

  const element = (i) => drawn.nodes[i < 0 ? data.nodes.length : i];

  /** Edges and nodes as they are seen now. */
  function update() {
    const look = hovered ?? held;
    const shown = Number(slider.value);
    const near = new Set([look]);
    let visible = 0;
    drawn.edges.forEach((path, i) => {
      const [from, to] = data.edges[i];
      const mine = look !== null && (from === look || to === look);
      const on = rank.get(i) < shown || mine;
      if (mine) near.add(from === look ? to : from);
      if (on) visible += 1;
      path.style.opacity = !on ? 0 : look === null ? path.dataset.opacity : mine ? 0.95 : 0.04;
    });
    drawn.svg.classList.toggle("picked", look !== null);
    drawn.nodes.forEach((g) => {
      const i = Number(g.dataset.node);
      g.classList.toggle("near", near.has(i));
      g.classList.toggle("held", i === held);
      g.setAttribute("aria-pressed", i === held);
      g.setAttribute("tabindex", i === current ? "0" : "-1");
    });
    document.getElementById("shown").textContent = `${count(Math.min(shown, data.edges.length))} of ${count(data.edges.length)}`;
    slider.setAttribute("aria-valuetext", `the ${shown} strongest of ${data.edges.length}`);
  }

  // ------------------------------------------------------------------------------------- the panel

  function links(heading, list) {
    if (list.length === 0) return null;
    const largest = Math.max(...list.map(([, weight]) => Math.abs(weight)));
    const items = list.slice(0, 12).map(([i, weight]) => {
      const node = i < 0 ? null : data.nodes[i];
      const text = node === null ? data.metric : `${graph.name(node)}${place(node)} · ${data.sites[node.site].name.replace(/^layers\./, "")}`;
      return el("li", {}, el("button", { type: "button", click: () => hold(i, true), title: spoken(i) }, text), bar(weight, largest, kind(weight)));
    });
    items.forEach((item, n) => item.lastChild.style.setProperty("--w", `${((100 * Math.abs(list[n][1])) / largest).toFixed(1)}%`));
    const more = list.length > items.length ? el("p", { class: "muted" }, `and ${list.length - items.length} more`) : null;
    return el("div", {}, el("h3", {}, heading), el("ul", { class: "links" }, items), more);
  }

  function pairs(rows) {
    return el("dl", { class: "pairs" }, rows.filter((row) => row).map(([name, ...value]) => [el("dt", {}, name), el("dd", {}, value)]));
  }

  const strongest = (list) => list.sort((a, b) => Math.abs(b[1]) - Math.abs(a[1]));

  function panel() {
    const i = held;
    if (i === null) return overview();
    const into = strongest(data.edges.filter((e) => e[1] === i).map((e) => [e[0], e[2]]));
    const out = strongest(data.edges.filter((e) => e[0] === i).map((e) => [e[1], e[2]]));
    const parts = [el("h2", {}, title(i))];
    if (i < 0) {
      parts.push(pairs([["value", number(data.clean)], data.patch === null ? null : ["patched", number(data.patch)]]));
    } else {
      const node = data.nodes[i];
      const site = data.sites[node.site];
      if (node.label) parts.push(el("p", { class: "label" }, node.label));
      parts.push(
        pairs([
          ["site", site.name],
          node.position === null ? null : ["token", chip(data.tokens[node.position]), ` at ${node.position}`],
          node.activation === null ? null : ["activation", number(node.activation)],
          node.patched === null ? null : [data.patch === null ? "set to" : "other text", number(node.patched)],
          ["contribution", number(node.effect)],
        ]),
      );
      if (site.dashboard && node.latent !== null) {
        parts.push(el("p", {}, el("a", { href: `${site.dashboard}#/latent/${node.latent}` }, "Page of the latent")));
      }
    }
    parts.push(links("Acts on", out), links("Comes from", into));
    side.replaceChildren(el("section", {}, parts));
  }

  function overview() {
    const best = order.slice(0, 10).map((i) => [i, data.nodes[i].effect]);
    const other = data.nodes.some((node) => node.patched) ? "set to its mean" : "set to zero";
    const about = data.patch === null ? other : "changed to those of the other text";
    const curve = data.curve ? el("section", {}, el("h2", {}, "Circuits of the strongest nodes"), plot(data.curve)) : null;
    side.replaceChildren(
      ...[
        el("section", {}, el("h2", {}, "Strongest nodes"), el("p", { class: "muted" }, `A contribution is what the metric loses when the node is ${about}. An edge is the part of it that goes through the later node first.`), links("Contribution", best)),
        curve,
      ].filter((part) => part),
    );
  }

  /** Faithfulness and completeness by the number of nodes. */
  function plot(points) {
    const [W, H, left, low] = [300, 150, 30, 18];
    const values = points.flatMap((p) => [p[1], p[2]]);
    const [bottom, top] = [Math.min(0, ...values), Math.max(1, ...values)];
    const most = Math.max(...points.map((p) => p[0]), 1);
    const x = (n) => left + ((W - left - 8) * n) / most;
    const y = (v) => 6 + (H - low - 10) * (1 - (v - bottom) / (top - bottom));
    const line = (at) => points.map((p, i) => `${i ? "L" : "M"}${x(p[0]).toFixed(1)} ${y(p[at]).toFixed(1)}`).join("");
    const ticks = [0, 1].map((v) => [el("line", { class: "axis", x1: left, x2: W - 8, y1: y(v), y2: y(v) }), el("text", { x: left - 6, y: y(v) + 4, "text-anchor": "end" }, String(v))]);
    const said = points.map((p) => `${p[0]} nodes: faithfulness ${number(p[1])}, completeness ${number(p[2])}`);
    const dots = points.map((p, i) => [1, 2].map((at) => el("rect", { class: `dot${at}`, x: x(p[0]) - 3, y: y(p[at]) - 3, width: 6, height: 6, rx: 3, "data-tip": said[i] })));
    const svg = el("svg", { class: "curve", viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": said.join("; ") }, ticks, el("path", { class: "two", d: line(2) }), el("path", { class: "one", d: line(1) }), dots, el("text", { x: left, y: H - 2 }, String(points[0][0])), el("text", { x: W - 8, y: H - 2, "text-anchor": "end" }, `${most} nodes`));
    return [svg, el("p", { class: "lines" }, el("span", {}, "circuit alone"), el("span", { class: "second" }, "all without it"))];
  }

  function table() {
    const head = el("tr", {}, ["node", "site", "token", "activation", "contribution"].map((t, n) => el("th", { scope: "col", class: n > 2 ? "num" : null }, t)));
    const rows = order.map((i) => {
      const node = data.nodes[i];
      return el("tr", {}, el("td", {}, title(i), node.label ? [" ", el("span", { class: "label" }, node.label)] : null), el("td", {}, data.sites[node.site].name), el("td", {}, node.position === null ? "all" : [chip(data.tokens[node.position]), ` ${node.position}`]), el("td", { class: "num" }, number(node.activation)), el("td", { class: "num" }, number(node.effect)));
    });
    document.getElementById("table").replaceChildren(el("thead", {}, head), el("tbody", {}, rows));
  }

  // ------------------------------------------------------------------------------- what is looked at

  function hold(i, focus = false) {
    held = i;
    hovered = null;
    if (i !== null) current = i;
    update();
    panel();
    if (focus && i !== null) {
      element(i).focus({ preventScroll: true });
      element(i).scrollIntoView({ block: "nearest", inline: "nearest" });
    }
  }

  /** The nearest node in a direction, by how far it is along and aside. */
  function towards([dx, dy]) {
    const from = drawn.places[current < 0 ? data.nodes.length : current];
    let best = null;
    drawn.places.forEach((to, n) => {
      const [x, y] = [to.x - from.x, to.y - from.y];
      const along = x * dx + y * dy;
      if (along < 2) return;
      const aside = Math.abs(x * dy) + Math.abs(y * dx);
      const cost = along + (dx ? 6 : 1.5) * aside;
      if (best === null || cost < best.cost) best = { cost, n };
    });
    if (best !== null) hold(best.n === data.nodes.length ? -1 : best.n, true);
  }

  function step(by) {
    const at = held === null || held < 0 ? -1 : order.indexOf(held);
    const next = order[Math.min(order.length - 1, Math.max(0, at + by))];
    if (next !== undefined) hold(next, true);
  }

  function flip() {
    const root = document.documentElement;
    const dark = root.dataset.theme ? root.dataset.theme === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
    root.dataset.theme = dark ? "light" : "dark";
    try { localStorage.setItem("ksae-theme", root.dataset.theme); } catch { /* a page may store nothing */ }
  }

  const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

  function keys(event) {
    const dialog = document.getElementById("keys");
    if (event.ctrlKey || event.metaKey || event.altKey || dialog.open || event.target.matches("input")) return;
    const node = event.target instanceof Element ? event.target.closest("[data-node]") : null;
    const actions = {
      Escape: () => hold(null),
      j: () => step(1),
      k: () => step(-1),
      t: flip,
      "?": () => dialog.showModal(),
    };
    if (node && ARROWS[event.key]) actions[event.key] = () => towards(ARROWS[event.key]);
    if (node && (event.key === "Enter" || event.key === " ")) actions[event.key] = () => toggle(Number(node.dataset.node));
    if (actions[event.key]) {
      event.preventDefault();
      actions[event.key]();
    }
  }

  const toggle = (i) => (held === i ? hold(null) : hold(i, true));

  function pointer(event) {
    const node = event.target instanceof Element ? event.target.closest("[data-node]") : null;
    const next = node ? Number(node.dataset.node) : null;
    if (next !== hovered) {
      hovered = next;
      update();
    }
  }

  function start() {
    try {
      const theme = localStorage.getItem("ksae-theme");
      if (theme) document.documentElement.dataset.theme = theme;
    } catch { /* a page may store nothing */ }
    document.title = data.title;
    document.getElementById("title").textContent = data.title;
    document.getElementById("what").textContent = data.metric;
    const fact = (value, text) => el("li", {}, el("strong", {}, value), ` ${text}`);
    const facts = [fact(number(data.clean), "on the text")];
    if (data.patch !== null) facts.push(fact(number(data.patch), "on the other text"));
    facts.push(fact(count(data.nodes.length), "nodes"), fact(count(data.edges.length), "edges"));
    if (data.curve) facts.push(fact(percent(data.curve[data.curve.length - 1][1]), `of the metric by ${count(data.curve[data.curve.length - 1][0])} nodes alone`));
    document.getElementById("facts").replaceChildren(...facts);
    slider.max = data.edges.length;
    slider.value = Math.min(data.edges.length, 120);
    slider.addEventListener("input", update);
    document.getElementById("theme").addEventListener("click", flip);
    document.getElementById("help").addEventListener("click", () => document.getElementById("keys").showModal());
    addEventListener("keydown", keys);
    const box = document.getElementById("scroll");
    box.addEventListener("pointerover", pointer);
    box.addEventListener("pointerleave", pointer);
    box.addEventListener("click", (event) => {
      const node = event.target instanceof Element ? event.target.closest("[data-node]") : null;
      if (node) toggle(Number(node.dataset.node));
      else hold(null);
    });
    if (order.length) current = order[0];
    tip.start();
    let width = 0;
    new ResizeObserver(() => {
      if (box.clientWidth !== width) {
        width = box.clientWidth;
        draw();
      }
    }).observe(box);
    draw();
    panel();
    table();
    const first = element(current).getBoundingClientRect(); // the strongest node is in sight
    box.scrollLeft = Math.max(0, first.right - box.getBoundingClientRect().left - box.clientWidth + 40);
    document.documentElement.dataset.ready = "";
  }

  start();
})();
