# SPDX-License-Identifier: Apache-2.0
"""k-sparse autoencoders and transcoders as plain modules: any torch optimizer trains them."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from .. import functional, ops
from ..ops import FLOATS, accumulator
from .terms import LOSSES, squared_error, total_variance


class Output(NamedTuple):
    """What a forward pass returns. Losses are 0-d float32 (float64), None without a target."""

    recon: Tensor  # [..., d_out]
    values: Tensor  # [..., k]
    indices: Tensor  # [..., k] int64
    loss: (
        Tensor | None
    )  # to be minimised: reconstruction + auxk_alpha * auxk_loss + multi_topk_loss / 8
    fvu: Tensor | None  # share of the target's variance that is not explained
    auxk_loss: Tensor | None  # 0 if no latent is dead
    multi_topk_loss: Tensor | None  # reconstruction loss with 4k latents; 0 without multi_topk


def _dtype(owner: str, dtype: torch.dtype | str | None) -> torch.dtype:
    kind = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    kind = torch.get_default_dtype() if kind is None and dtype is None else kind
    if kind not in FLOATS:
        names = ", ".join(str(f) for f in FLOATS)
        raise TypeError(f"{owner}: dtype must be one of {names}, got {dtype}")
    return kind


class SparseCoder(nn.Module):
    """The base of `TopKSAE` and `Transcoder`: TopK encoder, linear decoder (arXiv 2406.04093).

    u = (x - b_dec if centred else x) @ W_enc.T + b_enc;  values = relu(u) at the k largest u;
    recon = sum_j values_j W_dec[indices_j] + b_dec (+ x @ W_skip.T).

    Args:
        d_in, d_out: widths of the input and of the target.
        d_sae: F, the number of latents.
        k: active latents a token, in [1, d_sae].
        skip: add a learned linear map of the input to the output.
        loss: "fvu", sum e^2 / sum (y - mean over the batch of y)^2, or "mse", the mean of e^2 over
            all elements.
        auxk_alpha: weight of AuxK, the loss that revives dead latents: the k_aux largest dead
            pre-activations predict the (detached) residual; its gradient reaches encoder and
            decoder. 0 switches it off.
        k_aux: default d_out // 2, at most d_sae.
        dead_after: a latent is dead once it has not fired (value > 0) for more than this many
            tokens.
        normalize_decoder: unit decoder rows, kept by `TrainStep`, which also removes the gradient
            along them.
        multi_topk: add the loss with 4k latents, divided by 8, so that the code also works at other
            k.
        dtype, device: of the parameters. Inputs are cast to the parameters' dtype; losses are
            float32 or float64.

    Raises:
        ValueError: a size, k, loss or weight out of range. TypeError: dtype is not floating.

    A batch of one token (or of equal tokens) has no variance: its FVU is infinite or not a number.
    In training mode `forward` counts, in `tokens_since_fired` [F], the tokens since each latent
    last fired.
    """

    centred: bool  # whether b_dec is subtracted from the input
    shares_memory = False  # with parameters of others, whose writes do not show in these

    W_enc: nn.Parameter  # [F, d_in]
    b_enc: nn.Parameter  # [F]
    W_dec: nn.Parameter  # [F, d_out]
    b_dec: nn.Parameter  # [d_out]
    W_skip: nn.Parameter | None  # [d_out, d_in]
    tokens_since_fired: Tensor  # [F] int64

    def __init__(
        self,
        d_in: int,
        d_out: int,
        d_sae: int,
        k: int,
        *,
        skip: bool,
        loss: str,
        auxk_alpha: float,
        k_aux: int | None,
        dead_after: int,
        normalize_decoder: bool,
        multi_topk: bool,
        dtype: torch.dtype | str | None,
        device: torch.device | str | None,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        for arg, size in (("d_in", d_in), ("d_out", d_out), ("d_sae", d_sae)):
            if size < 1:
                raise ValueError(f"{name}: {arg} must be at least 1, got {size}")
        if not 1 <= k <= d_sae:
            raise ValueError(f"{name}: k must be in [1, {d_sae}], the number of latents, got {k}")
        if loss not in LOSSES:
            raise ValueError(f"{name}: loss must be one of {', '.join(LOSSES)}, got {loss!r}")
        if not 0 <= auxk_alpha < float("inf"):
            raise ValueError(f"{name}: auxk_alpha must be a finite number >= 0, got {auxk_alpha}")
        if k_aux is not None and k_aux < 1:
            raise ValueError(f"{name}: k_aux must be at least 1, got {k_aux}")
        if dead_after < 0:
            raise ValueError(f"{name}: dead_after must be at least 0, got {dead_after}")
        self.d_in, self.d_out, self.d_sae, self.k, self.skip = d_in, d_out, d_sae, k, skip
        self.loss, self.auxk_alpha, self.dead_after = loss, auxk_alpha, dead_after
        self.k_aux = min(k_aux if k_aux is not None else max(d_out // 2, 1), d_sae)
        self.normalize_decoder, self.multi_topk = normalize_decoder, multi_topk
        self.k_multi = min(4 * k, d_sae)

        dtype = _dtype(name, dtype)
        like: dict[str, Any] = {"dtype": dtype, "device": device}
        rows = torch.randn(d_sae, d_in, dtype=accumulator(dtype), device=device)
        rows /= rows.norm(dim=1, keepdim=True)
        self.W_enc = nn.Parameter(rows.to(dtype))
        self.b_enc = nn.Parameter(torch.zeros(d_sae, **like))
        self.W_dec = nn.Parameter(torch.zeros(d_sae, d_out, **like))
        self.b_dec = nn.Parameter(torch.zeros(d_out, **like))
        self.W_skip = nn.Parameter(torch.zeros(d_out, d_in, **like)) if skip else None
        counts = torch.zeros(d_sae, dtype=torch.int64, device=device)
        self.register_buffer("tokens_since_fired", counts)

    def config(self) -> dict[str, Any]:
        """Class name and constructor arguments, plain values only."""
        return {
            "class": type(self).__name__,
            "d_in": self.d_in,
            "d_sae": self.d_sae,
            "k": self.k,
            "loss": self.loss,
            "auxk_alpha": self.auxk_alpha,
            "k_aux": self.k_aux,
            "dead_after": self.dead_after,
            "normalize_decoder": self.normalize_decoder,
            "multi_topk": self.multi_topk,
            "dtype": str(self.W_enc.dtype).removeprefix("torch."),
        }

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in self.config().items() if k != "class")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the module to one file; `ksae.load(path)` reads it."""
        from ..files.checkpoint import save

        save(self, path)

    @property
    def dead(self) -> Tensor:
        """[F] bool: latents that have not fired for more than `dead_after` tokens."""
        return self.tokens_since_fired > self.dead_after

    # ------------------------------------------------------------------------------------- the code

    def rows(self, arg: str, t: Tensor, d: int) -> Tensor:
        """[..., d] -> [N, d] in the parameters' dtype, checked."""
        name = type(self).__name__
        if t.dim() < 1 or t.shape[-1] != d:
            raise ValueError(f"{name}: {arg} must be of shape [..., {d}], got {list(t.shape)}")
        if not t.is_floating_point():
            raise TypeError(f"{name}: {arg} must be floating, got {t.dtype}")
        if t.device != self.W_enc.device:
            raise ValueError(f"{name}: {arg} must be on {self.W_enc.device}, got {t.device}")
        return t.to(self.W_enc.dtype).reshape(t.shape[:-1].numel(), d)

    def targets(self, x: Tensor, rows: Tensor, y: Tensor | None) -> Tensor | None:
        """The target's rows [N, d_out], None if there is no target."""
        if y is None:
            return rows if self.centred else None
        if y.shape[:-1] != x.shape[:-1]:
            want = f"of shape {[*x.shape[:-1], self.d_out]} for x of shape {list(x.shape)}"
            raise ValueError(f"{type(self).__name__}: y must be {want}, got {list(y.shape)}")
        return self.rows("y", y, self.d_out)

    def _encode(self, x: Tensor, k: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        b_dec = self.b_dec if self.centred else None
        return functional.topk_encode(x, self.W_enc, self.b_enc, k, b_dec, mask)

    def gradients(self, x: Tensor, grad: Tensor | None, training: bool) -> Tensor | None:
        """The rows [N, d_out] of a downstream gradient, for the classes that select by one."""
        if grad is not None:
            raise ValueError(
                f"{type(self).__name__}: grad must be None, for it selects without one, got a"
                " tensor: see GradTopKSAE and GradTopKTranscoder"
            )
        return None

    def select(
        self, rows: Tensor, k: int, grad: Tensor | None, W_bf16: tuple[Tensor, ...] = ()
    ) -> tuple[Tensor, Tensor]:
        """Values and indices [N, k] of the k latents that x's rows [N, d_in] choose; W_bf16: that
        of W_enc and its norms, where they are kept."""
        if not W_bf16:
            return self._encode(rows, k)
        b_dec = self.b_dec if self.centred else None
        values, indices = ops.topk_encode(rows, self.W_enc, self.b_enc, k, b_dec, None, *W_bf16)
        return values, indices

    def select_aux(
        self,
        rows: Tensor,
        k: int,
        k_aux: int,
        grad: Tensor | None,
        W_bf16: tuple[Tensor, ...] = (),
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What `select` returns, then the code [N, k_aux] of AuxK, of dead latents alone."""
        b_dec = self.b_dec if self.centred else None
        dead_and_score = (self.dead, b_dec, *self._score(grad))
        chosen: tuple[Tensor, Tensor, Tensor, Tensor] = ops.topk_encode_aux(
            rows, self.W_enc, self.b_enc, k, k_aux, *dead_and_score, *W_bf16
        )
        return chosen

    def _score(self, grad: Tensor | None) -> tuple[Any, ...]:
        """The arguments of topk_encode_aux from grad to mode."""
        return None, None, 0.0, "additive"

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The sparse code of x [..., d_in] -> values [..., k], indices [..., k] int64."""
        values, indices = self._encode(self.rows("x", x, self.d_in), self.k)
        shape = (*x.shape[:-1], self.k)
        return values.reshape(shape), indices.reshape(shape)

    def encode_dense(self, x: Tensor) -> Tensor:
        """The code of x [..., d_in] with its zeros -> [..., F]."""
        values, indices = self.encode(x)
        dense = values.new_zeros(*values.shape[:-1], self.d_sae)
        return dense.scatter(-1, indices, values)

    def decode(self, values: Tensor, indices: Tensor, x: Tensor | None = None) -> Tensor:
        """Reconstruction [..., d_out] of a code; x [..., d_in] is needed with a skip connection."""
        recon = functional.sparse_decode(values, indices, self.W_dec, self.b_dec)
        if self.W_skip is None:
            return recon
        if x is None:
            raise ValueError(
                f"{type(self).__name__}: x must be given to decode with a skip connection, got None"
            )
        return recon + nnf.linear(x.to(self.W_skip.dtype), self.W_skip)

    # ----------------------------------------------------------------------------------- the losses

    def forward(self, x: Tensor, y: Tensor | None = None, *, grad: Tensor | None = None) -> Output:
        """Reconstruct x [..., d_in] or predict y [..., d_out]; losses if there is a target."""
        rows = self.rows("x", x, self.d_in)  # [N, d_in]
        target = self.targets(x, rows, y)  # [N, d_out]
        multi = self.multi_topk and target is not None
        downstream = self.gradients(x, grad, self.training)  # [N, d_out]
        wide_values, wide_indices = self.select(rows, self.k_multi if multi else self.k, downstream)
        values, indices = wide_values[:, : self.k], wide_indices[:, : self.k]  # sorted: a prefix
        recon = self.decode(values, indices, rows)
        loss = fvu = auxk_loss = multi_topk_loss = None
        if target is not None:
            variance = total_variance(target)
            denominator = variance if self.loss == "fvu" else self._elements(target)
            error = squared_error(recon, target)
            fvu = error.detach() / variance
            loss = error / denominator
            auxk_loss = multi_topk_loss = torch.zeros_like(fvu)
            if self.auxk_alpha > 0:
                auxk_loss = self._auxk(rows, target, recon)
                loss = loss + self.auxk_alpha * auxk_loss
            if multi:
                wide = self.decode(wide_values, wide_indices, rows)
                multi_topk_loss = squared_error(wide, target) / denominator
                loss = loss + multi_topk_loss / 8
        if self.training:
            self._count(values, indices)
        lead = x.shape[:-1]
        return Output(
            recon.reshape(*lead, self.d_out),
            values.reshape(*lead, self.k),
            indices.reshape(*lead, self.k),
            loss,
            fvu,
            auxk_loss,
            multi_topk_loss,
        )

    @staticmethod
    def _elements(target: Tensor) -> int:
        return target.shape[0] * target.shape[1]

    def _auxk(self, rows: Tensor, target: Tensor, recon: Tensor) -> Tensor:
        """|ehat - t|^2 / |t - mean t|^2, t = target - recon detached, ehat of dead latents."""
        dead, k_aux = self.dead, self.k_aux
        recorded = torch.compiler.is_compiling()
        recorded |= dead.is_cuda and torch.cuda.is_current_stream_capturing()
        if not recorded:  # where it is: no branch on data, the weight below is 0
            count = int(dead.sum())
            if count == 0:
                return torch.zeros((), dtype=accumulator(recon.dtype), device=recon.device)
            k_aux = min(k_aux, count)
        values, indices = self._encode(rows, k_aux, dead)
        ehat = functional.sparse_decode(values, indices, self.W_dec)
        acc = accumulator(self.W_dec.dtype)
        t = (target.to(acc) - recon.to(acc)).detach()  # [N, d_out]
        spread = total_variance(t)
        weight = torch.where((spread > 0) & dead.any(), 1 / spread, 0)
        return squared_error(ehat, t) * weight

    @torch.no_grad()
    def _count(self, values: Tensor, indices: Tensor) -> None:
        hits = torch.zeros_like(self.tokens_since_fired)
        hits.index_add_(0, indices.reshape(-1), (values > 0).reshape(-1).to(hits.dtype))
        since = self.tokens_since_fired + values.shape[0]
        self.tokens_since_fired.copy_(torch.where(hits > 0, 0, since))


class TopKSAE(SparseCoder):
    """TopK sparse autoencoder (arXiv 2406.04093): reconstructs its input. Arguments as
    `SparseCoder`.

    Starts with random unit decoder rows, W_enc = W_dec, biases 0; see `initialize_from` for b_dec.

    Example:
        >>> import torch, ksae
        >>> sae = ksae.TopKSAE(d_in=8, d_sae=32, k=4)
        >>> sae(torch.randn(5, 8)).recon.shape
        torch.Size([5, 8])
    """

    centred = True

    def __init__(
        self,
        d_in: int,
        d_sae: int,
        k: int,
        *,
        loss: str = "fvu",
        auxk_alpha: float = 1 / 32,
        k_aux: int | None = None,
        dead_after: int = 10_000_000,
        normalize_decoder: bool = True,
        multi_topk: bool = False,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(
            d_in,
            d_in,
            d_sae,
            k,
            skip=False,
            loss=loss,
            auxk_alpha=auxk_alpha,
            k_aux=k_aux,
            dead_after=dead_after,
            normalize_decoder=normalize_decoder,
            multi_topk=multi_topk,
            dtype=dtype,
            device=device,
        )
        with torch.no_grad():
            self.W_dec.copy_(self.W_enc)


class Transcoder(SparseCoder):
    """Sparse transcoder (arXiv 2406.11944; with skip, arXiv 2501.18823): predicts y, an MLP's
    output, from x, its input.

    Arguments as `SparseCoder`. The input is not centred. Starts with random unit encoder rows and
    zeros elsewhere; see `ksae.coders.initialize` for the biases. A loss needs y.
    """

    centred = False

    def __init__(
        self,
        d_in: int,
        d_out: int,
        d_sae: int,
        k: int,
        *,
        skip: bool = False,
        loss: str = "fvu",
        auxk_alpha: float = 1 / 32,
        k_aux: int | None = None,
        dead_after: int = 10_000_000,
        normalize_decoder: bool = False,
        multi_topk: bool = False,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__(
            d_in,
            d_out,
            d_sae,
            k,
            skip=skip,
            loss=loss,
            auxk_alpha=auxk_alpha,
            k_aux=k_aux,
            dead_after=dead_after,
            normalize_decoder=normalize_decoder,
            multi_topk=multi_topk,
            dtype=dtype,
            device=device,
        )

    def config(self) -> dict[str, Any]:
        return {**super().config(), "d_out": self.d_out, "skip": self.skip}
