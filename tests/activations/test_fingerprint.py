# SPDX-License-Identifier: Apache-2.0
"""Fingerprints: the same for the same data wherever they lie, another one for other data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from ksae.activations import ArraySource, Contexts, StreamSource, harvest, open_source

HOOK, OTHER_HOOK = "layers.0.resid_post", "layers.0.mlp_out"


def x(rows: int = 3000, d: int = 4) -> Tensor:
    return torch.randn(rows, d, generator=torch.Generator().manual_seed(0))


def of(*shards: Tensor, **options: Any) -> str:
    return ArraySource(list(shards), **options).fingerprint()


def test_of_arrays_wherever_they_lie(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", x().numpy())
    torch.save(x(), tmp_path / "b.pt")
    names = [tmp_path / "a.npy", tmp_path / "b.pt"]
    assert {of(x()), of(x()[:7], x()[7:])} == {open_source(name).fingerprint() for name in names}
    source = ArraySource([x()])
    assert source.part(0, 2000).fingerprint() == of(x()[:2000]) != source.fingerprint()


@pytest.mark.parametrize("rows", [1, 2, 1023, 1024, 1025, 3000])
def test_of_arrays_of_any_size(rows: int) -> None:
    """The first and the last row always count."""
    for row in (0, -1):
        other = x(rows)
        other[row, 1] += 1
        assert of(other) != of(x(rows))
    assert of(x(rows)) == of(x(rows))


def test_of_other_arrays() -> None:
    y, g = x(d=2), x(d=2) + 1
    replaced = x()
    replaced[1000:1100] = 0
    found = [
        of(x()),
        of(replaced),
        of(x()[:2999]),
        of(x().half()),
        of(x().bfloat16()),
        of(x(d=5)),
        of(x(), y=[y]),
        of(x(), y=[y + 1]),
        of(x(), y=[y], g=[g]),
        of(x(), y=[y], g=[y]),
        of(x(), g=[x()]),
    ]
    assert len(set(found)) == len(found)


def llama(seed: int = 0, **options: Any) -> transformers.LlamaForCausalLM:
    torch.manual_seed(seed)
    sizes = {"vocab_size": 50, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, **options)
    return transformers.LlamaForCausalLM(config).eval()


def contexts(seed: int = 0) -> Contexts:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 50, (6, 10), generator=generator, dtype=torch.int32)
    return Contexts(
        ids,
        torch.full((6,), 10, dtype=torch.int32),
        torch.arange(6, dtype=torch.int32),
        tuple(bytes([n]) for n in range(6)),
        (0, 1),
    )


def test_of_a_model_s_activations(tmp_path: Path) -> None:
    """Of what they are made from, so that other bits from another device are the same data."""
    model = llama()

    def memory(lm: Any = model, texts: Contexts | None = None, hook: str = HOOK, **o: Any) -> str:
        return harvest(lm, texts or contexts(), hook, progress=False, **o).fingerprint()

    cache = {"out_dir": tmp_path / "a", "progress": False, "shard_tokens": 20}
    same = [
        memory(),
        memory(model_name="elsewhere", batch_size=2),
        harvest(model, contexts(), HOOK, **cache).fingerprint(),
        open_source(tmp_path / "a").fingerprint(),
        StreamSource(model, contexts(), HOOK).fingerprint(),
    ]
    assert len(set(same)) == 1
    other = [
        memory(llama(1)),
        memory(texts=contexts(1)),
        memory(hook=OTHER_HOOK),
        memory(target_hook=OTHER_HOOK),
        memory(dtype=torch.bfloat16),
        memory(gradient="labels"),
        StreamSource(model, contexts(), HOOK, gradient="labels").fingerprint(),
    ]
    assert other[-1] == other[-2] and len(set(other)) == len(other) - 1
    assert same[0] not in other
    source = open_source(tmp_path / "a")
    assert isinstance(source, ArraySource)
    parts = [source.part(0, 30), source.part(30, 60), source.part(0, 31)]
    assert len({source.fingerprint(), *(part.fingerprint() for part in parts)}) == 4
