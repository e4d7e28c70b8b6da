# SPDX-License-Identifier: Apache-2.0
"""Coders and batches of the tests with ranks: those of `training`, and other codes and losses."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from training import CASES as TOPK
from training import F, batch, build

import ksae
from ksae.coders.coder import SparseCoder

WIDTHS = [7, 30, 31, F]
DEAD = {"k_aux": 8, "dead": 3, "auxk_alpha": 1.0}
CLIP = {"clip_norm": 0.05}
BATCH, JUMP = ksae.BatchTopK(5), ksae.JumpReLU(0.1, bandwidth=0.4, theta=0.7)
MORE: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "abs": ("sae", {"activation": ksae.AbsTopK(5), "multi_topk": True, **DEAD}, CLIP),
    "abs, saelens": ("skip", {"activation": ksae.AbsTopK(5), "auxk": "saelens", **DEAD}, {}),
    "batch": ("sae", {"activation": BATCH}, {}),
    "batch, dead": (
        "sae",
        {"activation": ksae.BatchTopK(5, threshold="saelens"), **DEAD},
        CLIP,
    ),
    "batch, transcoder": ("skip", {"activation": BATCH, "loss": "mse"}, CLIP),
    "jump": ("sae", {"activation": JUMP}, {}),
    "jump, dead": (
        "sae",
        {"activation": ksae.JumpReLU(0.1, "target_l0", 9.0, 0.4, 0.7), **DEAD},
        CLIP,
    ),
    "prefixes": ("sae", {"prefixes": WIDTHS}, CLIP),
    "prefixes, dead": (
        "skip",
        {"prefixes": [0, 2, 50, F], "multi_topk": True, "loss": "mse", **DEAD},
        CLIP,
    ),
    "prefixes, batch": (
        "sae",
        {"activation": BATCH, "prefixes": WIDTHS, "prefix_weights": "sum", **DEAD},
        {},
    ),
    "openai": ("sae", {"auxk": "openai", **DEAD}, CLIP),
    "sparsify": ("sae", {"auxk": "sparsify", **DEAD}, CLIP),
    "saelens": ("sae", {"auxk": "saelens", **DEAD, "k_aux": 30}, CLIP),
    "batch_topk": ("sae", {"auxk": "batch_topk", **DEAD}, CLIP),
    "batch_topk, prefixes, batch": (
        "sae",
        {"auxk": "batch_topk", "activation": BATCH, "prefixes": WIDTHS, **DEAD},
        CLIP,
    ),
    "jump, linear": (
        "sae",
        {"activation": ksae.JumpReLU(0.1, bandwidth=0.4, theta=0.7, parametrization="linear")},
        CLIP,
    ),
}
CASES = TOPK | MORE


def make(case: str) -> SparseCoder:
    if case == "gradient":
        model = ksae.GradTopKSAE(17, 97, 5, beta=0.5, grad_norm="rms", k_aux=8)
        model.tokens_since_fired[::4] = model.dead_after + 1
        return model
    kind, settings, _ = CASES[case]
    settings = dict(settings)
    every, activation = settings.pop("dead", None), settings.pop("activation", None)
    model = build(kind, torch.float32, **settings)
    if activation is not None:
        same, whole = model.state_dict(), (model.d_in, model.d_sae, activation)
        if kind == "sae":
            model = ksae.SAE(*whole, **settings)
        else:
            options = {"activation": activation, "skip": kind == "skip", **settings}
            model = ksae.Transcoder(model.d_in, model.d_out, model.d_sae, **options)
        model.load_state_dict(same, strict=False)
    if every:
        model.tokens_since_fired[::every] = model.dead_after + 1
    return model


def rows(case: str, t: int) -> list[Tensor]:
    """The batch of step t: tokens that divide by 2, 3 and 4."""
    return [b[:60] for b in batch(CASES[case][0], seed=10 + 2 * t)]
