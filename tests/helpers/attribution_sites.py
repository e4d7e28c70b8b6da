# SPDX-License-Identifier: Apache-2.0
"""Random coders at two sites of the random language model, in float64, and a metric."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from toy_language_model import VOCABULARY, D, llama

from ksae import SAE, BatchTopK, JumpReLU, TopKSAE, Transcoder
from ksae.analysis.attribution import Site, logit_difference

F, K = 32, 4
RESID, READ, WRITE = "layers.0.resid_post", "layers.1.mlp_in", "layers.1.mlp_out"
METRIC = logit_difference(3, 4)


def model() -> Any:
    """The random language model with norms that compute in float64, as those of Llama do not."""
    made = llama().double()
    for parent in list(made.modules()):
        for name, child in list(parent.named_children()):
            if type(child).__name__ == "LlamaRMSNorm":
                norm = nn.RMSNorm(D, child.variance_epsilon)
                norm.weight = child.weight
                setattr(parent, name, norm)
    return made


def ids(seed: int = 2, B: int = 2, T: int = 7) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {"input_ids": torch.randint(1, VOCABULARY, (B, T), generator=generator)}


def coder(kind: str, seed: int = 0) -> Any:
    torch.manual_seed(seed)
    made: Any = {
        "topk": lambda: TopKSAE(D, F, K),
        "batchtopk": lambda: SAE(D, F, activation=BatchTopK(K)),
        "jumprelu": lambda: SAE(D, F, activation=JumpReLU(theta=0.3)),
        "transcoder": lambda: Transcoder(D, D, F, K, skip=True),
    }[kind]()
    with torch.no_grad():
        for parameter in (made.W_dec, made.b_dec, made.W_skip):
            if parameter is not None:
                parameter.normal_(std=0.5)
    return made.double().eval()


def two_sites() -> list[Site]:
    return [Site(coder("topk"), RESID), Site(coder("transcoder", 1), READ, WRITE)]
