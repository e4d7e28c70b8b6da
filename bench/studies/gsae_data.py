# SPDX-License-Identifier: Apache-2.0
"""What the study of gradient SAEs trains on: activations of two sites with one gradient for both.

The MLP's output is added to the residual stream, so the gradient of the loss at the one is that at
the other: one forward and one backward pass make the pairs of both sites.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ksae.activations import (
    PYDOC,
    SMOLLM2,
    ArraySource,
    Contexts,
    documents,
    harvest,
    load_model,
    tokenize,
)

LAYER = 9
SITES = {"resid": f"layers.{LAYER}.resid_post", "mlp": f"layers.{LAYER}.mlp_out"}
HELD_OUT = 0.1


@dataclass(frozen=True)
class Pairs:
    """Rows of one site: x [rows, d], g [rows, d] float32."""

    x: Tensor
    g: Tensor


@dataclass(frozen=True)
class StudyData:
    train: dict[str, Pairs]  # by site
    held: dict[str, Pairs]
    model: nn.Module
    contexts: Contexts  # held out


def load(cache: Path, tokens: int | None, batch_size: int = 8) -> StudyData:
    """The model, the held-out text and the pairs, harvested into `cache` where they are not there:
    in bfloat16, as gradients have the range for."""
    lm = load_model(SMOLLM2, offline=True)
    contexts = tokenize(documents(PYDOC), lm.tokenizer, max_tokens=tokens)
    parts = dict(zip(("train", "held"), contexts.split(HELD_OUT), strict=True))
    pairs: dict[str, dict[str, Pairs]] = {}
    for name, part in parts.items():
        source = harvest(
            lm.model,
            part,
            SITES["mlp"],
            cache / name,
            target_hook=SITES["resid"],
            gradient="labels",
            batch_size=batch_size,
            dtype=torch.bfloat16,
            shard_tokens=4096,
            model_name=SMOLLM2,
        )
        pairs[name] = _pairs(source)
    return StudyData(pairs["train"], pairs["held"], lm.model, parts["held"])


def _pairs(source: ArraySource) -> dict[str, Pairs]:
    mlp, resid, g = (
        torch.cat([t.float() for t in column])
        for column in zip(*source.gradient_sweep(4096), strict=True)
    )
    return {"resid": Pairs(resid, g), "mlp": Pairs(mlp, g)}
