# SPDX-License-Identifier: Apache-2.0
"""The circuit of an answer: a small language model learns that a verb agrees with its noun,
transcoders stand for its MLPs, and attribution finds the latents that the answer comes from.

python examples/circuit.py
"""

from __future__ import annotations

import torch
import transformers

import ksae
from ksae.activations import capture
from ksae.analysis.attribution import (
    Site,
    circuit_page,
    curve,
    edges,
    effects,
    logit_difference,
)

SINGULAR, PLURAL = ["cat", "dog", "key", "tree"], ["cats", "dogs", "keys", "trees"]
FILLERS, VERBS = ["old", "near", "by", "the"], ["is", "are"]
WORDS = [*SINGULAR, *PLURAL, *FILLERS, *VERBS]
LENGTH, D, F, K = 5, 32, 128, 8


def sentences(count: int) -> torch.Tensor:
    """A noun, fillers, and the verb that fits: token ids [count, LENGTH]."""
    ids = torch.randint(8, 12, (count, LENGTH))
    ids[:, 0] = torch.randint(0, 8, (count,))
    ids[:, -1] = 12 + (ids[:, 0] >= 4).long()
    return ids


def language_model() -> transformers.LlamaForCausalLM:
    """Two layers, trained until they agree."""
    config = transformers.LlamaConfig(
        vocab_size=len(WORDS),
        hidden_size=D,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        bos_token_id=None,  # every token has nodes
        eos_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(200):
        ids = sentences(64)
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval().requires_grad_(False)


def transcoders(model: transformers.LlamaForCausalLM) -> list[Site]:
    """Of both MLPs: from what an MLP reads to what it writes."""
    hooks = [(f"layers.{i}.mlp_in", f"layers.{i}.mlp_out") for i in range(2)]
    coders = [ksae.Transcoder(D, D, F, K) for _ in hooks]
    steps = [ksae.TrainStep(coder, lr=3e-3) for coder in coders]
    for number in range(400):
        acts = capture(
            model, [name for pair in hooks for name in pair], {"input_ids": sentences(64)}
        )
        for layer, ((reads, writes), step) in enumerate(zip(hooks, steps, strict=True)):
            x, y = (acts[name].flatten(0, 1) for name in (reads, writes))
            metrics = step(x, y)
            if number in (0, 399):
                print(f"layer {layer}, step {number + 1:3d}: FVU {float(metrics['fvu']):.3f}")
    return [Site(c, reads, writes) for c, (reads, writes) in zip(coders, hooks, strict=True)]


def main() -> None:
    torch.manual_seed(0)
    model = language_model()
    sites = transcoders(model)
    # Which latents does "are" instead of "is" come from?
    words = ["keys", "by", "the", "old"]
    others = ["key", *words[1:]]
    clean, patch = (
        {"input_ids": torch.tensor([[WORDS.index(w) for w in t]])} for t in (words, others)
    )
    metric = logit_difference(WORDS.index("are"), WORDS.index("is"))
    found = effects(model, clean, metric, sites, patch=patch, steps=10)
    print(f"are less is: {found.clean:.2f} after {words[0]}, {found.patch:.2f} after {others[0]}")
    nodes = found.nodes()
    points = curve(model, clean, metric, sites, nodes, [0, 2, 5, 10, 20, len(nodes)], patch=patch)
    for point in points:
        shares = f"{point.faithfulness:6.1%} alone, {point.completeness:6.1%} without them"
        print(f"{point.nodes:3d} nodes: {shares}")
    links = edges(model, clean, metric, found, nodes[:20], frozen=True)
    page = circuit_page(
        "circuit.html",
        found,
        nodes[:20],
        links,
        tokens=words,
        patch_tokens=others,
        metric="logit of are less that of is",
        title="Agreement of verb and noun",
        curve=points,
    )
    print(f"{page}: open it in a browser")


if __name__ == "__main__":
    main()
