// SPDX-License-Identifier: Apache-2.0
// Data, loaded on demand: each file is a script that calls ksae.put, since a page opened from a disk
// may load scripts but no other files.
"use strict";

const ksae = (() => {
  const waiting = new Map(); // name -> {promise, resolve}

  function entry(name) {
    if (!waiting.has(name)) {
      const made = {};
      made.promise = new Promise((resolve, reject) => Object.assign(made, { resolve, reject }));
      waiting.set(name, made);
    }
    return waiting.get(name);
  }

  /** Called by the data files. */
  function put(name, value) {
    entry(name).resolve(value);
  }

  /** A promise of the value of data/NAME.js. */
  function load(name) {
    const made = entry(name);
    if (!made.asked) {
      made.asked = true;
      const script = document.createElement("script");
      script.charset = "utf-8";
      script.src = `data/${name}.js`;
      script.onerror = () => {
        waiting.delete(name); // so that it can be tried again
        made.reject(new Error(`cannot load data/${name}.js`));
      };
      document.head.append(script);
    }
    return made.promise;
  }

  /** The record of a latent. */
  async function latent(number) {
    const chunk = Math.floor(number / ksae.meta.chunk);
    const records = await load(`latents/${chunk}`);
    return records[number - chunk * ksae.meta.chunk];
  }

  return { put, load, latent, meta: null, index: null, tokens: null };
})();
