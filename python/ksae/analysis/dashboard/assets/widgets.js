// SPDX-License-Identifier: Apache-2.0
// Pieces of pages. All text goes in as text nodes: nothing that a model or a user wrote is markup.
"use strict";

/** An element; attributes with a function are listeners, null ones are left out. */
function el(tag, attributes = {}, ...children) {
  const svg = ["svg", "rect", "path", "line", "text", "g"].includes(tag);
  const node = svg
    ? document.createElementNS("http://www.w3.org/2000/svg", tag)
    : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (typeof value === "function") node.addEventListener(name, value);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined));
  return node;
}

const COUNT = new Intl.NumberFormat("en");
const count = (value) => COUNT.format(value);

/** Three digits, as 0.123, 1.23, 12.3, 123 and 12,345. */
function number(value) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  const text = size >= 100 ? count(Math.round(size)) : size === 0 || size >= 0.001 ? size.toPrecision(3) : size.toExponential(1);
  return value < 0 ? `−${text}` : size === 0 ? "0" : text;
}

/** A share as a percentage. */
function percent(share) {
  if (share === 0) return "0 %";
  const value = 100 * share;
  return `${value >= 99.95 ? "100" : value < 0.0005 ? value.toExponential(1) : number(value)} %`;
}

/** How a token is shown: line breaks as a sign, long runs of blanks by their number. */
function visible(text) {
  return text
    .replace(/\r\n|\r|\n/g, "⏎")
    .replace(/\t/g, "⇥")
    .replace(/ {4,}/g, (run) => `␣${run.length}`);
}

/** The same in short, for the list. */
const brief = (text) => text.replace(/\s*[\r\n]\s*/g, " ⏎ ").replace(/\s{2,}/g, " ");

/** A token on its own, as in a list: blanks at its ends are seen. */
function chip(text, attributes = {}) {
  const shown = visible(text).replace(/^ +| +$/g, (run) => "·".repeat(run.length));
  return el("code", { class: "chip", ...attributes }, shown === "" ? "∅" : shown);
}

/** The tokens of a context with the latent's activations as colour. */
function passage(context, largest) {
  const [, start, peak, tokens, flat] = context;
  const acts = new Map();
  for (let i = 0; i < flat.length; i += 2) acts.set(flat[i], flat[i + 1]);
  const line = el("span", { class: "passage" });
  tokens.forEach((token, i) => {
    const value = acts.get(i) || 0;
    const text = ksae.tokens[token];
    const shown = visible(text);
    const node = el("span", { class: "t", "data-p": start + i, "data-v": value });
    node.dataset.t = text;
    if (value > 0) {
      // the blank before a word belongs to its token, but is not coloured: a line may break there
      const word = shown.trimStart() === "" ? shown : shown.trimStart();
      const inner = el("span", { class: i === peak ? "on peak" : "on" }, word);
      inner.style.setProperty("--a", Math.max(0.08, Math.min(1, value / largest)).toFixed(3));
      node.append(shown.slice(0, shown.length - word.length), inner);
    } else node.append(shown);
    if ((shown !== text && text.trim() === "") || ksae.meta.special.includes(token)) node.classList.add("blank");
    line.append(node);
    if (/\n\s*$/.test(text)) line.append(el("wbr"));
  });
  return line;
}

/** A histogram: bars with their range and count on hover. */
function histogram([width, counts], { height = 72, label }) {
  const top = Math.max(...counts);
  const step = 100 / Math.max(counts.length, 1);
  const bars = counts.map((n, i) =>
    el(
      "rect",
      {
        x: i * step,
        y: height - (n === 0 ? 0 : Math.max(1.5, (n / top) * height)),
        width: Math.max(0.2, step * 0.86),
        height: n === 0 ? 0 : Math.max(1.5, (n / top) * height),
        "data-tip": `${number(i * width)} to ${number((i + 1) * width)}: ${count(n)}`,
      },
    ),
  );
  return el(
    "svg",
    { class: "histogram", viewBox: `0 0 100 ${height}`, preserveAspectRatio: "none", role: "img", "aria-label": label },
    bars,
  );
}

/** A number with a bar behind it, as a share of the largest. */
function bar(value, largest, kind = "") {
  const node = el("span", { class: `level ${kind}` }, number(value));
  node.style.setProperty("--w", `${Math.min(100, Math.max(0, (100 * value) / largest || 0)).toFixed(1)}%`);
  return node;
}

/** Shows the value of what the pointer is on. */
const tip = (() => {
  let box;

  function text(node) {
    if (node.dataset.tip) return node.dataset.tip;
    if (node.dataset.p === undefined) return null;
    const value = Number(node.dataset.v);
    return `${JSON.stringify(node.dataset.t)}  ${number(value)}  ·  token ${node.dataset.p}`;
  }

  function show(event) {
    const target = event.target instanceof Element ? event.target.closest("[data-p], [data-tip]") : null;
    const message = target && text(target);
    if (!message) {
      box.hidden = true;
      return;
    }
    box.textContent = message;
    box.hidden = false;
    const at = target.getClientRects()[0] || target.getBoundingClientRect();
    const left = Math.min(Math.max(6, at.left), innerWidth - box.offsetWidth - 6);
    const above = at.top - box.offsetHeight - 6;
    box.style.left = `${Math.max(6, left)}px`;
    box.style.top = `${above > 4 ? above : at.bottom + 6}px`;
  }

  function start() {
    box = document.getElementById("tip");
    document.addEventListener("pointerover", show);
    document.addEventListener("click", show); // a finger does not hover
    document.addEventListener("scroll", () => (box.hidden = true), { passive: true });
  }

  return { start, hide: () => (box.hidden = true) };
})();
