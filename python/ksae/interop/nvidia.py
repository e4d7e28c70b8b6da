# SPDX-License-Identifier: Apache-2.0
"""NVIDIA BioNeMo's TopKSAE on ksae's kernels: `from ksae.interop.nvidia import TopKSAE`.

The recipe is no package that can be required; the surface is its own. What differs: `post_step`
gives each latent a unit decoder (not each row of the [d, F] weight), AuxK without standardisation
aims at the residual (not at residual + pre_bias), and both values of `decoder_impl` mean the same
kernels, with the losses and counters of "dense". `compat=True` brings the first two back.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import functional
from ..coders.code import recomputes
from . import lazy, sparse

_EPS = 1e-8
_IMPLS = ("dense", "triton")
Info = dict[str, Tensor]  # "mu" and "std" [N, 1] of each token; empty without standardisation


class TopKSAE(nn.Module):
    """BioNeMo's TopKSAE.

    Args:
        input_dim: d. hidden_dim: F. top_k: active latents a token.
        normalize_input: standardise each token and undo it on the output.
        auxk: dead latents that predict the residual, all that are dead where these are fewer; None
            for none. auxk_coef: the loss's weight.
        dead_tokens_threshold: a latent is dead once it was silent (value <= 1e-3) for more tokens.
        aggregate_loss: losses are ratios of the batch instead of the mean of the tokens' ratios.
        dead_count_global: count the tokens of all ranks of torch.distributed.
        init_encoder_from_decoder: the encoder starts as the transposed decoder.
        init_pre_bias: what a trainer asks before it calls `init_pre_bias_from_data`.
        decoder_impl: "dense" or "triton".
        compat: the original's `normalize_decoder` and AuxK target.

    Raises:
        ValueError: top_k, auxk or decoder_impl out of range.
    """

    stats_last_nonzero: Tensor  # [F] int64: tokens since it fired

    def __init__(
        self,
        input_dim: int,
        hidden_dim: int,
        top_k: int,
        normalize_input: bool = True,
        auxk: int | None = None,
        auxk_coef: float = 1 / 32,
        dead_tokens_threshold: int = 10_000_000,
        aggregate_loss: bool = False,
        dead_count_global: bool = False,
        init_encoder_from_decoder: bool = True,
        init_pre_bias: bool = True,
        decoder_impl: str = "dense",
        *,
        compat: bool = False,
    ) -> None:
        super().__init__()
        if not 1 <= top_k <= hidden_dim:
            raise ValueError(
                f"TopKSAE: top_k must be in [1, {hidden_dim}], the number of latents, got {top_k}"
            )
        if auxk is not None and auxk < 1:
            raise ValueError(f"TopKSAE: auxk must be at least 1, got {auxk}")
        if decoder_impl not in _IMPLS:
            names = " or ".join(map(repr, _IMPLS))
            raise ValueError(f"TopKSAE: decoder_impl must be {names}, got {decoder_impl!r}")
        self.input_dim, self.hidden_dim, self.top_k = input_dim, hidden_dim, top_k
        self.normalize_input, self.auxk, self.auxk_coef = normalize_input, auxk, auxk_coef
        self.dead_tokens_threshold, self.aggregate_loss = dead_tokens_threshold, aggregate_loss
        self.dead_count_global, self.init_pre_bias = dead_count_global, init_pre_bias
        self.decoder_impl, self.compat = decoder_impl, compat
        self.pre_bias = nn.Parameter(torch.zeros(input_dim))
        self.encoder = nn.Linear(input_dim, hidden_dim, bias=False)
        self.latent_bias = nn.Parameter(torch.zeros(hidden_dim))
        self.decoder = nn.Linear(hidden_dim, input_dim, bias=False)
        self.decoder.weight = sparse.transposed(self.decoder.weight)
        if init_encoder_from_decoder:
            self.encoder.weight.data = self.decoder.weight.data.T.clone()
        self.register_buffer("stats_last_nonzero", torch.zeros(hidden_dim, dtype=torch.long))

    def _prepare(self, x: Tensor) -> tuple[Tensor, Info]:
        """x as the encoder reads it, and what undoes that."""
        if not self.normalize_input:
            return x, {}
        mu, std = x.mean(dim=-1, keepdim=True), x.std(dim=-1, keepdim=True) + _EPS
        return (x - mu) / std, {"mu": mu, "std": std}

    def _code(self, x: Tensor, k: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """values, indices [..., k] of a prepared x."""
        W_enc, b_enc = self.encoder.weight, self.latent_bias
        return functional.topk_encode(x, W_enc, b_enc, k, self.pre_bias, mask)

    def _decode(self, code: tuple[Tensor, Tensor], bias: Tensor | None) -> Tensor:
        return sparse.decode(*code, sparse.latent_rows(self.decoder.weight), bias)

    def _pre_act(self, prepared: Tensor) -> Tensor:
        weights = self.encoder.weight, self.latent_bias, self.pre_bias
        return lazy.pre_activations(prepared, *weights, relu=False)

    def encode_pre_act(self, x: Tensor) -> tuple[Tensor, Info]:
        """Pre-activations [..., F] of x [..., d], computed when read, and what undoes the
        standardisation."""
        prepared, info = self._prepare(x)
        return self._pre_act(prepared), info

    def encode(self, x: Tensor) -> Tensor:
        """The dense code [..., F] of x [..., d]."""
        return sparse.scatter(*self._code(self._prepare(x)[0], self.top_k), self.hidden_dim)

    def decode(self, codes: Tensor, info: Info | None = None) -> Tensor:
        """Reconstruction [..., d] of a code [..., F], standardised unless `info` undoes it."""
        recon = self._linear(codes, self.pre_bias)
        return recon * info["std"] + info["mu"] if info else recon

    def decode_without_bias(self, codes: Tensor) -> Tensor:
        """The decoder's product [..., d] of a code [..., F], without pre_bias."""
        return self._linear(codes, None)

    def _linear(self, codes: Tensor, bias: Tensor | None) -> Tensor:
        code, rows = lazy.known(codes), sparse.latent_rows(self.decoder.weight)
        if code is None:
            return nn.functional.linear(codes, self.decoder.weight, bias)
        return lazy.decoded(codes, self._decode(code, bias), rows)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Reconstruction [..., d] and code [..., F], which is lazy, of x [..., d]."""
        out = self.forward_with_aux(x)
        return out["recon"], out["codes"]

    def forward_with_aux(self, x: Tensor) -> dict[str, Any]:
        """recon [..., d]; codes and pre_act [..., F], lazy; top_k_indices [..., k]; norm_info, what
        undoes the standardisation of x [..., d]."""
        prepared, info = self._prepare(x)
        values, indices = self._code(prepared, self.top_k)
        codes = lazy.code(values, indices, self.hidden_dim)
        pre_act = self._pre_act(prepared)
        lazy.selected(pre_act, values, indices)
        return {
            "recon": self.decode(codes, info),
            "codes": codes,
            "pre_act": pre_act,
            "top_k_indices": indices,
            "norm_info": info,
        }

    def loss(self, x: Tensor, **kwargs: Any) -> dict[str, Tensor]:
        """Losses and statistics of x [N, d]; counts who fired.

        Returns:
            total (to be minimised), fvu, sparsity (mean L0), mse, variance_explained, dead_pct and,
            with auxk, aux.
        """
        prepared, info = self._prepare(x)
        values, indices = self._code(prepared, self.top_k)
        inner = self._decode((values, indices), self.pre_bias)  # [N, d], standardised
        recon = inner * info["std"] + info["mu"] if info else inner
        if not recomputes():
            self._count(values.detach(), indices)
        total = self._ratio(recon - x, x - self.pre_bias)
        seen, e = x.detach(), (recon - x).detach()
        unexplained = torch.var(e, dim=0).sum() / (torch.var(seen, dim=0).sum() + _EPS)
        dead = self.stats_last_nonzero > self.dead_tokens_threshold
        result = {
            "fvu": unexplained,
            "sparsity": (values != 0).sum(-1).float().mean(),
            "mse": e.pow(2).mean(),
            "variance_explained": 1 - unexplained,
            "dead_pct": dead.float().mean() * 100,
        }
        if self.auxk is not None:
            result["aux"] = self._auxk(prepared, prepared.detach() - inner.detach(), dead)
            total = total + self.auxk_coef * result["aux"]
        return {"total": total, **result}

    def _ratio(self, e: Tensor, scale: Tensor) -> Tensor:
        """Squared error over squared scale, of each token or of the batch."""
        if self.aggregate_loss:
            return e.pow(2).mean() / (scale.pow(2).mean() + _EPS)
        return (e.pow(2).mean(dim=-1) / (scale.pow(2).mean(dim=-1) + _EPS)).mean()

    def _auxk(self, prepared: Tensor, residual: Tensor, dead: Tensor) -> Tensor:
        """The auxk largest dead latents predict the residual."""
        assert self.auxk is not None
        count = int(dead.sum())
        if count == 0:
            return prepared.new_tensor(0.0)
        if self.compat and not self.normalize_input and not self.aggregate_loss:
            residual = residual + self.pre_bias.detach()
        code = self._code(prepared, min(self.auxk, count), dead)
        return self._ratio(self._decode(code, None) - residual, residual)

    def _count(self, values: Tensor, indices: Tensor) -> None:
        """Tokens since each latent fired."""
        ranks, group = 1, torch.distributed
        if self.dead_count_global and group.is_available() and group.is_initialized():
            ranks = group.get_world_size()
        silent = torch.ones_like(self.stats_last_nonzero)
        silent.index_add_(0, indices.flatten(), -(values.abs() > 1e-3).flatten().long())
        count = (self.stats_last_nonzero + values.shape[0] * ranks) * (silent > 0)
        self.stats_last_nonzero.copy_(count)

    @torch.no_grad()
    def normalize_decoder(self) -> None:
        """Decoders of length 1."""
        weight = self.decoder.weight
        weight.data = nn.functional.normalize(weight.data, dim=1 if self.compat else 0)

    def post_step(self) -> None:
        """After each step of the optimizer."""
        self.normalize_decoder()

    @torch.no_grad()
    def init_pre_bias_from_data(self, data: Tensor, max_iter: int = 100, eps: float = 1e-6) -> None:
        """pre_bias = the geometric median of data [N, d], by Weiszfeld's iteration."""
        points, _ = self._prepare(data.float())
        median = points.mean(dim=0)
        for _ in range(max_iter):
            weights = 1 / (points - median).norm(dim=1, keepdim=True).clamp(min=_EPS)  # [N, 1]
            moved = (points * weights).sum(dim=0) / weights.sum()
            if (moved - median).norm() < eps:
                break
            median = moved
        self.pre_bias.copy_(median)

    def _get_config(self) -> dict[str, Any]:
        """The arguments that a checkpoint's `model_config` holds."""
        names = ["input_dim", "hidden_dim", "top_k", "normalize_input", "auxk", "auxk_coef"]
        names += ["dead_tokens_threshold", "aggregate_loss", "dead_count_global"]
        return {name: getattr(self, name) for name in names}
