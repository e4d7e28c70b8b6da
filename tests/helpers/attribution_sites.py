# SPDX-License-Identifier: Apache-2.0
"""Random coders at two sites of the random language model, in float64, and a metric."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from toy_language_model import VOCABULARY, D, llama

from ksae import SAE, BatchTopK, JumpReLU, TopKSAE, Transcoder
from ksae.analysis.attribution import Site, logit_difference

F, K, T = 32, 4, 7
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


def ids(seed: int = 2, B: int = 2, T: int = T) -> dict[str, Tensor]:
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


def by_hand(
    model: Any, sites: list[Site], keep: list[Tensor], errors: list[Tensor], other: Any
) -> float:
    """The metric with dense codes: keep [T, F] and errors [T] bool at each site."""
    handles = []
    read: list[Tensor] = []
    mlp = model.model.layers[1].mlp
    handles.append(mlp.register_forward_pre_hook(lambda _m, args: read.append(args[0])))
    for i, module in enumerate((model.model.layers[0], mlp)):

        def hook(_m: Any, _a: Any, y: Tensor, i: int = i) -> Tensor:
            sae: Any = sites[i].coder
            x = y if i == 0 else read[-1]
            code = sae.encode_dense(x)
            recon = sae.decode(*sae.encode(x), x)
            error = y - recon
            codes, others_error = (0, 0) if other is None else other[i]
            mixed = torch.where(keep[i], code, codes)
            error = torch.where(errors[i][:, None], error, others_error)
            return recon + (mixed - code) @ sae.W_dec + error

        handles.append(module.register_forward_hook(hook))
    try:
        with torch.no_grad():
            return float(METRIC(model(**ids())).sum())
    finally:
        for handle in handles:
            handle.remove()
