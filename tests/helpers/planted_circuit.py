# SPDX-License-Identifier: Apache-2.0
"""A model of two MLPs whose latents are known, and a circuit in it that is known.

Token "a" lights latent P of the first MLP, token "b" latent U; what P writes moves one position on;
latent Q of the second MLP is P and U; Q writes to the logit RIGHT. Every token lights other latents
too, which write to the logits of other tokens or to nothing.
"""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import Tensor, nn

from ksae import Transcoder
from ksae.analysis.attribution import Site

D, F, K, VOCABULARY = 32, 12, 6, 8
P, U, Q = 3, 7, 5
RIGHT, WRONG = 1, 2
A, B = 0, 4  # tokens
INPUTS = {"input_ids": torch.tensor([[A, B]])}


class Planted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(0)
        basis = torch.linalg.qr(torch.randn(D, D, generator=g, dtype=torch.float64))[0].float()
        words, moved = basis[:8], basis[8]
        first, second, logits = basis[9:13], basis[13:16], basis[16:24]
        read, write = torch.zeros(2, F, D), torch.zeros(2, F, D)
        bias = torch.full((2, F), -1.0)
        # the first MLP: P and U, and latents of the same tokens beside the circuit
        for latent, token, direction in (
            (P, A, first[0]), (U, B, first[1]),
            (0, A, first[2]), (1, B, first[3]), (2, A, logits[6]),
        ):  # fmt: skip
            read[0, latent], write[0, latent] = words[token], (1 + 0.1 * latent) * direction
            bias[0, latent] = -0.25
        # the second: Q is "P one position before, and U here"; others read U alone
        read[1, Q], bias[1, Q], write[1, Q] = moved + first[1], -1.5, 2 * logits[RIGHT]
        read[1, 8], bias[1, 8], write[1, 8] = first[3], -0.1, logits[7]
        read[1, 9], bias[1, 9], write[1, 9] = first[1], -0.1, second[0]
        self.embedding = nn.Embedding(VOCABULARY, D)
        self.mlps = nn.ModuleList(MLP(read[i], bias[i], write[i]) for i in range(2))
        self.unembedding = nn.Linear(D, VOCABULARY, bias=False)
        with torch.no_grad():
            self.embedding.weight.copy_(2 * words)
            self.unembedding.weight.copy_(logits)
        self.move = first[0][:, None] * moved[None, :]  # [D, D]
        self.requires_grad_(False)

    def forward(self, input_ids: Tensor) -> SimpleNamespace:
        x = self.embedding(input_ids)
        x = x + self.mlps[0](x)
        x = x + torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1] @ self.move], 1)
        x = x + self.mlps[1](x)
        return SimpleNamespace(logits=self.unembedding(x))


class MLP(nn.Module):
    def __init__(self, read: Tensor, bias: Tensor, write: Tensor) -> None:
        super().__init__()
        self.read, self.bias, self.write = read, bias, write

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.read.T + self.bias).relu() @ self.write


def sites(model: Planted) -> list[Site]:
    """Transcoders that are the MLPs."""
    made = []
    for number, mlp in enumerate(model.mlps):
        coder = Transcoder(D, D, F, K)
        with torch.no_grad():
            coder.W_enc.copy_(mlp.read)
            coder.b_enc.copy_(mlp.bias)
            coder.W_dec.copy_(mlp.write)
        made.append(Site(coder, f"mlps.{number}:in", f"mlps.{number}:out"))
    return made
