// SPDX-License-Identifier: Apache-2.0
// The circuit as a drawing: a row a site, the first at the bottom, a column a position, the metric on top.
"use strict";

const graph = (() => {
  const HIGH = 25; // of a node
  const GAP = 8;
  const ROW = { least: 58, most: 104 }; // between rows, for the edges
  const SIDE = 10; // of a column
  const TALL = 470; // what the drawing fills if it can
  const SMALL = 0.72; // the least scale

  const short = (text, length) => (text.length > length ? `${text.slice(0, length - 1)}…` : text);

  /** What a node is called where there is little room. */
  function name(node) {
    if (node.latent === null) return "error";
    return node.label ? short(node.label, 15) : String(node.latent);
  }

  /** Nodes by cell, and the columns that are shown: all of a short text, else those with nodes. */
  function cellsOf(data) {
    const cells = new Map(); // "site,position" -> numbers of nodes
    data.nodes.forEach((node, i) => {
      const key = `${node.site},${node.position}`;
      if (!cells.has(key)) cells.set(key, []);
      cells.get(key).push(i);
    });
    const used = new Set(data.nodes.map((node) => node.position));
    const all = data.tokens.map((_, i) => i);
    const columns = used.has(null) ? [null] : all.filter((i) => used.has(i) || all.length <= 12);
    return { cells, columns };
  }

  /** Widths of the columns with so many nodes in a line. */
  function widths(data, { cells, columns }, wide, limit) {
    return columns.map((place) => {
      const most = Math.max(0, ...data.sites.map((_, site) => Math.min(limit, cells.get(`${site},${place}`)?.length ?? 0)));
      const texts = place === null ? [""] : [data.tokens[place], data.others?.[place] ?? ""];
      const text = 8.4 * Math.min(16, Math.max(...texts.map((t) => visible(t).length))) + 16;
      return Math.max(most * (wide + GAP) - GAP, text, 44) + 2 * SIDE;
    });
  }

  /** Places of nodes, rows and columns for a width that there is. */
  function layout(data, room) {
    const wide = data.nodes.some((node) => node.label) ? 122 : 62;
    const grid = cellsOf(data);
    const { cells, columns } = grid;
    const sum = (list) => list.reduce((a, b) => a + b, 0);
    let limit = columns[0] === null ? Math.max(1, Math.floor(room / (wide + GAP))) : 6;
    while (limit > 1 && sum(widths(data, grid, wide, limit)) > room) limit -= 1;
    const natural = widths(data, grid, wide, limit);
    const total = sum(natural);
    const full = Math.max(total, Math.min(room, 2 * total));
    const stretch = (full - total) / columns.length;
    const left = [];
    natural.reduce((x, w, i) => ((left[i] = x), x + w + stretch), 0);
    const middle = new Map(columns.map((place, i) => [place, left[i] + (natural[i] + stretch) / 2]));
    const lines = (site, place) => Math.ceil((cells.get(`${site},${place}`)?.length ?? 0) / limit);
    const tall = data.sites.map((_, site) => Math.max(1, ...columns.map((place) => lines(site, place))));
    const spare = (TALL - sum(tall) * (HIGH + GAP)) / data.sites.length;
    const between = Math.min(ROW.most, Math.max(ROW.least, spare));
    const places = []; // of each node
    const rows = [];
    let y = 22 + HIGH + between; // below the metric
    for (let site = data.sites.length - 1; site >= 0; site--) {
      rows[site] = { y, height: tall[site] * (HIGH + GAP) - GAP };
      for (const place of columns) {
        const list = cells.get(`${site},${place}`) || [];
        const empty = (tall[site] - lines(site, place)) / 2; // a cell stands in the middle of its row
        list.forEach((i, n) => {
          const line = Math.floor(n / limit);
          const inLine = Math.min(limit, list.length - line * limit);
          const x = middle.get(place) + ((n % limit) - (inLine - 1) / 2) * (wide + GAP);
          places[i] = { x, y: y + (line + empty) * (HIGH + GAP) + HIGH / 2, width: wide };
        });
      }
      y += rows[site].height + between;
    }
    const metric = { x: full / 2, y: 22 + HIGH / 2, width: Math.min(full - 8, 8 * data.metric.length + 40) };
    const scale = Math.max(SMALL, Math.min(1, room / full));
    return { places, rows, columns, middle, metric, scale, width: full, bottom: y - between + 26, column: (i) => natural[i] + stretch };
  }

  function edge(from, to, weight, largest) {
    const y1 = from.y - HIGH / 2;
    const y2 = to.y + HIGH / 2;
    const bend = Math.max(18, (y1 - y2) / 2);
    const share = Math.abs(weight) / largest;
    const path = el("path", {
      class: `edge ${weight > 0 ? "plus" : "minus"}`,
      d: `M${from.x.toFixed(1)} ${y1.toFixed(1)}C${from.x.toFixed(1)} ${(y1 - bend).toFixed(1)} ${to.x.toFixed(1)} ${(y2 + bend).toFixed(1)} ${to.x.toFixed(1)} ${y2.toFixed(1)}`,
      "stroke-width": (0.7 + 5.3 * share).toFixed(2),
    });
    path.dataset.opacity = (0.3 + 0.55 * Math.sqrt(share)).toFixed(2);
    return path;
  }

  function pill(place, attributes, text) {
    const half = place.width / 2;
    return el(
      "g",
      { ...attributes, transform: `translate(${place.x.toFixed(1)} ${place.y.toFixed(1)})` },
      el("rect", { x: -half, y: -HIGH / 2, width: place.width, height: HIGH, rx: 7 }),
      el("text", { y: 0.5 }, text),
    );
  }

  /** The drawing; `spoken(i)` says what a node is, `tip(i)` shows it. Node -1 is the metric. */
  function draw(data, width, { spoken, tip }) {
    const at = layout(data, width);
    const largest = Math.max(...data.nodes.map((node) => Math.abs(node.effect)), 1e-30);
    const height = at.bottom + (at.columns[0] === null ? 4 : data.others ? 66 : 46);
    const back = [];
    at.rows.forEach((row, site) => {
      back.push(el("rect", { class: "row", x: 0, y: row.y - 9, width: at.width, height: row.height + 18, rx: 8 }));
      back.push(el("text", { class: "row-name", x: 6, y: row.y - 14 }, data.sites[site].name));
    });
    at.columns.forEach((place) => {
      if (place === null) return;
      const x = at.middle.get(place);
      back.push(el("line", { class: "column", x1: x, x2: x, y1: at.rows[data.sites.length - 1].y - 9, y2: at.bottom - 4 }));
    });
    const front = [];
    at.columns.forEach((place, i) => {
      if (place === null) return;
      const x = at.middle.get(place);
      const room = Math.max(3, Math.floor((at.column(i) - 14) / 8.2));
      const token = short(visible(data.tokens[place]) || "∅", room);
      const other = data.others?.[place];
      const differs = other !== undefined && other !== data.tokens[place];
      const half = Math.min(at.column(i) / 2 - 3, 4.3 * token.length + 9);
      front.push(el("rect", { class: differs ? "token-box differs" : "token-box", x: x - half, y: at.bottom - 2, width: 2 * half, height: 24, rx: 5 }));
      front.push(el("text", { class: "token", x, y: at.bottom + 15 }, token));
      if (differs) front.push(el("text", { class: "token other", x, y: at.bottom + 38 }, short(visible(other), room)));
      front.push(el("text", { class: "place", x, y: height - 4 }, String(place)));
    });
    const strongest = Math.max(...data.edges.map((e) => Math.abs(e[2])), 1e-30);
    const edges = data.edges.map(([from, to, weight]) => edge(at.places[from], to < 0 ? at.metric : at.places[to], weight, strongest));
    const nodes = data.nodes.map((node, i) => {
      const sign = node.effect > 0 ? "plus" : "minus";
      const kind = `node ${sign}${node.latent === null ? " error" : ""}`;
      const g = pill(at.places[i], { class: kind, "data-node": i, "data-tip": tip(i), role: "button", tabindex: "-1", "aria-label": spoken(i), "aria-pressed": "false" }, name(node));
      g.style.setProperty("--w", `${(12 + 88 * Math.sqrt(Math.abs(node.effect) / largest)).toFixed(0)}%`);
      return g;
    });
    const metric = pill(at.metric, { class: "node metric", "data-node": -1, role: "button", tabindex: "-1", "aria-label": spoken(-1), "aria-pressed": "false" }, short(data.metric, Math.floor((at.metric.width - 16) / 7.6)));
    const svg = el(
      "svg",
      { class: "circuit", width: at.width * at.scale, height: height * at.scale, viewBox: `0 0 ${at.width} ${height}`, role: "group", "aria-label": "Nodes of the circuit, linked by edges" },
      back,
      el("g", { "aria-hidden": "true" }, edges),
      nodes,
      metric,
      front,
    );
    return { svg, edges, nodes: [...nodes, metric], places: [...at.places, at.metric] };
  }

  return { draw, name };
})();
