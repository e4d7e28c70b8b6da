// SPDX-License-Identifier: Apache-2.0
// The page of one latent.
"use strict";

const page = (() => {
  let asked = 0; // only the page asked for last is shown

  function facts(data) {
    const share = data.fired / ksae.meta.tokens;
    const items = [
      ["fires on", `${percent(share)} of tokens`, count(data.fired)],
      ["mean when active", number(data.mean)],
      ["largest", number(data.fired ? data.max : null)],
      ["decoder norm", number(data.decoder_norm)],
      ["encoder norm", number(data.encoder_norm)],
      ["encoder bias", number(data.bias)],
    ];
    if (data.cosine !== undefined) items.push(["cos(encoder, decoder)", number(data.cosine)]);
    return el("dl", { class: "stats" }, items.map(([name, value, extra]) =>
      el("div", {}, el("dt", {}, name), el("dd", {}, value, extra ? el("small", {}, ` ${extra}`) : null))));
  }

  function rows(contexts, largest) {
    return el("ol", { class: "contexts" }, contexts.map((context) => {
      let value = null; // of the firing token; the list alternates place and value
      for (let i = 0; i < context[4].length; i += 2) if (context[4][i] === context[2]) value = context[4][i + 1];
      return el("li", {},
        el("span", { class: "value", "data-tip": `context ${context[0]}, token ${context[1] + context[2]}` }, number(value)),
        passage(context, largest));
    }));
  }

  function contexts(data) {
    const parts = [];
    if (data.fired === 0) {
      return [el("p", { class: "note" }, `This latent is silent on all ${count(ksae.meta.tokens)} tokens of the text.`)];
    }
    const top = data.contexts.slice(0, data.top);
    parts.push(el("section", { "aria-labelledby": "h-top" },
      el("h2", { id: "h-top" }, "Strongest contexts"), rows(top, data.max)));
    if (data.bands.length) {
      const names = ["Strongest quarter", "Second quarter", "Third quarter", "Weakest quarter"];
      parts.push(el("section", { "aria-labelledby": "h-bands" },
        el("h2", { id: "h-bands" }, "Across its range"),
        data.bands.map(([low, high, which], i) => [
          el("h3", {}, names[i], " ", el("small", {}, `of sampled firings, ${number(low)} to ${number(high)}`)),
          rows(which.map((n) => data.contexts[n]), data.max)])));
    }
    if (data.random.length && data.fired > data.top) {
      parts.push(el("section", { "aria-labelledby": "h-random" },
        el("h2", { id: "h-random" }, "Random firings"),
        rows(data.random.map((n) => data.contexts[n]), data.max)));
    }
    return parts;
  }

  function tokenList(title, [tokens, values], kind) {
    const largest = Math.max(...values.map(Math.abs));
    return el("div", {}, el("h3", {}, title), el("ul", { class: `lens ${kind}` }, tokens.map((token, i) =>
      el("li", {}, chip(ksae.tokens[token]), bar2(values[i], largest, kind)))));
  }

  function bar2(value, largest, kind) {
    const node = bar(Math.abs(value), largest, kind);
    node.firstChild.textContent = value.toFixed(2).replace("-", "−");
    return node;
  }

  function lens(data) {
    if (!data.promoted) {
      return el("section", {}, el("h2", {}, "Logit lens"), el("p", { class: "muted" }, `None: ${ksae.meta.no_lens}.`));
    }
    return el("section", {}, el("h2", {}, ksae.meta.transcoder ? "Writes: logit lens" : "Logit lens"),
      el("div", { class: "two" }, tokenList("Promoted", data.promoted, "plus"), tokenList("Demoted", data.demoted, "minus")));
  }

  function reads(data) {
    if (!data.reads) return null;
    return el("section", {}, el("h2", {}, "Reads: nearest token embeddings"),
      el("div", { class: "two" }, tokenList("Cosine with the encoder", data.reads, "plus")));
  }

  function short(latent) {
    const label = ksae.index.labels[latent];
    if (label) return el("span", { class: "label" }, label);
    const tokens = ksae.index.tokens[latent].slice(0, 3);
    return el("span", { class: "fires" }, tokens.length ? tokens.map((t) => chip(t)) : el("span", { class: "muted" }, "silent"));
  }

  function neighbours(title, [latents, values], note) {
    if (!latents.length) return el("section", { class: "near" }, el("h2", {}, title), el("p", { class: "muted" }, "None."));
    return el("section", { class: "near" }, el("h2", {}, title), note ? el("p", { class: "muted" }, note) : null,
      el("ul", { class: "neighbours" }, latents.map((other, i) => el("li", {},
        el("a", { href: `#/latent/${other}` }, String(other)), bar(Math.max(0, values[i]), 1), short(other)))));
  }

  function distribution(data) {
    const [width, counts] = data.histogram;
    if (!counts.length) return null;
    return el("section", {}, el("h2", {}, "Activations"),
      histogram(data.histogram, { label: `Histogram of ${count(data.fired)} activations between 0 and ${number(data.max)}` }),
      el("div", { class: "ends", "aria-hidden": "true" }, el("span", {}, "0"), el("span", {}, number(counts.length * width))));
  }

  function step(latent, by, text, key) {
    const other = table.neighbour(latent, by);
    const attributes = { class: "step", title: `${text} of the list (${key})` };
    if (other === undefined) return el("span", { ...attributes, "aria-hidden": "true" }, by < 0 ? "‹" : "›");
    return el("a", { ...attributes, href: `#/latent/${other}`, "aria-label": `${text}: ${other}` }, by < 0 ? "‹" : "›");
  }

  async function show(view, latent) {
    const turn = ++asked;
    if (!Number.isInteger(latent) || latent < 0 || latent >= ksae.meta.F) {
      view.replaceChildren(el("h1", { tabindex: "-1" }, "No such latent"),
        el("p", { class: "note" }, `Latents are 0 to ${ksae.meta.F - 1}. `, el("a", { href: "#/" }, "All latents")));
      return;
    }
    const [data, tokens] = await Promise.all([ksae.latent(latent), ksae.load("tokens")]);
    if (turn !== asked) return;
    ksae.tokens = tokens;
    const label = ksae.index.labels[latent];
    view.replaceChildren(
      el("nav", { class: "crumbs", "aria-label": "List" }, el("a", { href: table.hash() }, "← All latents"),
        el("span", { class: "space" }), step(latent, -1, "Previous", "k"), step(latent, 1, "Next", "j")),
      el("h1", { tabindex: "-1" }, `Latent ${latent}`, label ? el("span", { class: "label" }, label) : null),
      facts(data),
      el("div", { class: "columns" },
        el("div", { class: "texts" }, contexts(data)),
        el("div", { class: "side" }, distribution(data), lens(data), reads(data),
          neighbours("Fire together", data.together, `tokens with both, of tokens with either`),
          neighbours("Nearest decoders", data.decoder, "cosine"),
          neighbours("Nearest encoders", data.encoder, "cosine"))),
    );
    document.title = `Latent ${latent} · ${ksae.meta.title}`;
  }

  return { show, leave: () => asked++ };
})();
