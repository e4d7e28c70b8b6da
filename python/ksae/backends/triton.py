# SPDX-License-Identifier: Apache-2.0
"""Bridge from torch tensors to the Triton kernels: outputs, workspaces, order of launches.

Each method of `Kernels` has the name and meaning of its reference and names the arguments that it
serves; with others that are optional, the reference serves the call. Tensors come checked,
contiguous and in float32, bfloat16 or float16 (ksae.ops sees to it). Triton and the kernels are
imported by the first call; work goes to torch's current stream, and nothing waits for the device.
Run on no AMD GPU, and so far on no GPU: interpreted and compiled only.

The first call of a kind compiles its kernels; Triton keeps them on disk (TRITON_CACHE_DIR), where
the next process finds them in tenths of a second. Nothing is tuned at run time: dtype and GPU
generation choose a tile (kernels/product.py). Seconds of one core of an AMD EPYC (Zen 5) to compile
for sm_90 in bfloat16: fused encode 3.0, gradient-aware 3.7, screened float32 4.7, selection of
stored scores 1.2 for k = 64 and 3.3 for k = 2048, the rest of a fused training step 3.0 (processor
time, the least of three).

Environment, read once at import: KSAE_TRITON=0 leaves the Triton kernels out.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

from .. import env
from ..reference.group import rows_of
from . import product as products
from .bridge import guard
from .latents import Latents


class Kernels(products.Encode, Latents):
    """The ops in Triton."""

    def _select(
        self,
        scores: Tensor,  # [rows, F]
        k: int,
        values: Tensor,  # [rows, k], written
        indices: Tensor,  # [rows, k] int64, written
        bias: Tensor | None = None,  # [F]
        columns: Tensor | None = None,  # [F] bool of _list_columns
        relu: bool = False,
        second: Tensor | None = None,  # [rows, F] float32
        mode: str | None = None,
        beta: float = 0.0,
        informed: Tensor | None = None,  # [rows] bool
    ) -> None:
        from ..kernels.topk import select

        with guard(scores):
            select(
                scores, k, values, indices, bias=bias, mask=columns, relu=relu, second=second,
                informed=informed, mode=mode or "plain", beta=beta,
            )  # fmt: skip

    def _list_columns(self, mask: Tensor) -> Tensor:
        return mask  # which `_select` takes as it is

    def bf16_copy(self, W: Tensor) -> tuple[Tensor, Tensor]:
        from ..kernels import screen

        with guard(W):
            return screen.bf16_copy(W)

    def _screen(
        self,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        x_norms: Tensor,
        w_norms: Tensor,
        k: int,
        mask: Tensor | None,
        capacity: int = 0,
    ) -> products.Screen:
        from ..kernels.screen_stored import Screen

        return Screen(x, W_enc, b_enc, x_norms, w_norms, k, mask, capacity)

    def fused_topk_encode(
        self,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        k: int,
        b_dec: Tensor | None = None,
        mask: Tensor | None = None,
        W_bf16: Tensor | None = None,
        norms: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`topk_encode` without the N x F scores; float32 is screened in bfloat16."""
        from ..kernels import gate, screen
        from ..kernels import topk_encode as encode

        if k > gate.MAX_K:
            return self.topk_encode(x, W_enc, b_enc, k, b_dec, mask)
        with guard(x):
            if x.dtype != torch.float32:
                return encode.topk_encode(x, W_enc, b_enc, k, b_dec, mask)
            kept = None if W_bf16 is None or norms is None else screen.Bf16Copy(W_bf16, norms)
            return screen.screened_topk_encode(x, W_enc, b_enc, k, b_dec, mask, of_W=kept)

    def fused_grad_topk_encode(
        self,
        x: Tensor,
        grad: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        k: int,
        beta: float,
        mode: str = "additive",
        b_dec: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """`grad_topk_encode` without the scores."""
        from ..kernels import gate
        from ..kernels import grad_topk_encode as grad_encode

        if k > gate.MAX_K:
            return self.grad_topk_encode(x, grad, W_enc, b_enc, W_dec, k, beta, mode, b_dec)
        with guard(x):
            return grad_encode.grad_topk_encode(x, grad, W_enc, b_enc, W_dec, k, beta, mode, b_dec)

    def fused_topk_encode_aux(
        self,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        k: int,
        k_aux: int,
        dead: Tensor,
        b_dec: Tensor | None = None,
        grad: Tensor | None = None,
        W_dec: Tensor | None = None,
        beta: float = 0.0,
        mode: str = "additive",
        W_bf16: Tensor | None = None,
        norms: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """`topk_encode_aux` without the scores, for a second product of x and W_enc."""
        from ..kernels import gate

        if max(k, k_aux) > gate.MAX_K:
            rest = (b_dec, grad, W_dec, beta, mode)
            return self.topk_encode_aux(x, W_enc, b_enc, k, k_aux, dead, *rest)
        if grad is None or W_dec is None:
            chosen = self.fused_topk_encode(x, W_enc, b_enc, k, b_dec, None, W_bf16, norms)
        else:
            score = (k, beta, mode, b_dec)
            chosen = self.fused_grad_topk_encode(x, grad, W_enc, b_enc, W_dec, *score)
        of_dead = (k_aux, b_dec, dead, W_bf16, norms)
        return (*chosen, *self.fused_topk_encode(x, W_enc, b_enc, *of_dead))

    def sparse_decode(
        self,
        values: Tensor,
        indices: Tensor,
        W_dec: Tensor,
        b_dec: Tensor | None = None,
        row_offsets: Tensor | None = None,
        partial: bool = False,
    ) -> Tensor:
        from ..kernels.sparse_decode import decode

        d = W_dec.shape[1]
        N = len(values) if row_offsets is None else row_offsets.numel() - 1
        out = values.new_empty(N, d, dtype=torch.float32 if partial else values.dtype)
        with guard(values):
            decode(values, indices, W_dec, b_dec, None, 0, d, out, row_offsets)
        return out

    def sparse_residual(
        self,
        values: Tensor,
        indices: Tensor,
        W_dec: Tensor,
        b_dec: Tensor | None,
        target: Tensor,
        columns: int,
        column_sums: Tensor | None = None,
        row_offsets: Tensor | None = None,
        rounded: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        from ..kernels import sparse_decode as decode

        N, d = target.shape
        residual = target.new_empty(N, columns, dtype=torch.float32)
        square = target.new_empty(N, dtype=torch.float64)
        grads = target.new_empty(values.shape, dtype=torch.float32)
        held = products.chunk_bytes or products.SMALL_CHUNK
        chunk = max(held // (4 * max(d, 1)), 1)
        with guard(values):
            decode.sparse_residual(
                values, indices, W_dec, b_dec, target, residual, square, grads, chunk,
                row_offsets, _rows_of(row_offsets, values), rounded,
            )  # fmt: skip
        if column_sums is not None:
            torch.sum(residual, 0, out=column_sums[:columns])
            if columns < d:
                code = (values, indices, W_dec, b_dec, target)
                rest = self.sparse_residual_slice(*code, columns, d, row_offsets)
                torch.sum(rest, 0, out=column_sums[columns:])
        return residual, square, grads

    def sparse_residual_slice(
        self,
        values: Tensor,
        indices: Tensor,
        W_dec: Tensor,
        b_dec: Tensor | None,
        target: Tensor,
        start: int,
        stop: int,
        row_offsets: Tensor | None = None,
    ) -> Tensor:
        from ..kernels.sparse_decode import decode

        residual = target.new_empty(target.shape[0], stop - start, dtype=torch.float32)
        with guard(values):
            decode(values, indices, W_dec, b_dec, target, start, stop, residual, row_offsets)
        return residual

    def sparse_decode_backward_values(
        self, grad: Tensor, indices: Tensor, W_dec: Tensor, row_offsets: Tensor | None = None
    ) -> Tensor:
        from ..kernels.sparse_decode import value_products

        out = grad.new_empty(indices.shape)
        with guard(grad):
            value_products(grad, None, indices, W_dec, out, _rows_of(row_offsets, indices))
        return out

    def sparse_decode_backward_weight(
        self,
        grad: Tensor,
        values: Tensor,
        indices: Tensor,
        F: int,
        row_offsets: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        from ..kernels.row_pass import Groups, weight_gradient

        offsets, order = self.group_by_latent(values, indices, F)
        grad_W, value_sum = grad.new_empty(F, grad.shape[1]), grad.new_empty(F)
        with guard(grad):
            of = None if row_offsets is None else [rows_of(row_offsets, len(values))]
            groups = Groups([values], [offsets], [order], [grad], None, None, of)
            weight_gradient(groups, grad_W, value_sum)
        return grad_W, value_sum

    def total_variance(self, y: Tensor) -> Tensor:
        from ..kernels.total_variance import total_variance

        with guard(y):
            return total_variance(y)

    def loss_terms(
        self, sq_errors: Sequence[Tensor], denominators: Sequence[Tensor], shares: Sequence[float]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        from ..kernels.loss_terms import loss_terms

        with guard(denominators[0]):
            return loss_terms(sq_errors, denominators, shares)

    def adam_scalars(
        self,
        loss: Tensor,
        norm: Tensor | None,
        clip_norm: float | None,
        scales: Tensor,
        lr: Tensor,
        t: Tensor,
        constants: Tensor,
        decoder_lr: float = 1.0,
        always: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        from ..kernels.adam_scalars import adam_scalars

        with guard(loss):
            rates = (lr, t, constants, decoder_lr, always)
            return adam_scalars(loss, norm, clip_norm, scales, *rates)

    def count_tokens(
        self,
        loss: Tensor,
        taken: Tensor,
        offsets: Tensor,
        since: Tensor,
        t: Tensor,
        tokens: int,
        dead_after: int,
        within: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        from ..kernels.count_tokens import count_tokens

        with guard(loss):
            return count_tokens(loss, taken, offsets, since, t, tokens, dead_after, within)

    def vector_update(
        self,
        grads: Sequence[Tensor],
        scales: Tensor | None,
        minus: Tensor | None,
        taken: Tensor,
        hyper: Tensor,
        p: Tensor,
        master: Tensor | None,
        m: Tensor,
        v: Tensor,
    ) -> None:
        from ..kernels.vector_update import vector_update

        with guard(p):
            vector_update(grads, scales, minus, taken, hyper, p, master, m, v)


def _rows_of(row_offsets: Tensor | None, code: Tensor) -> Tensor | None:
    """The row of each entry of a code [E, 1]; None for one of k a row."""
    return None if row_offsets is None else rows_of(row_offsets, len(code))


def takes(k: int) -> bool:
    """Whether the encodes without the scores select so many."""
    from ..kernels.gate import MAX_K

    return k <= MAX_K


def _load() -> tuple[Kernels | None, str]:
    """The kernels, or why there are none. Imports nothing: triton is heavy."""
    if env.read("KSAE_TRITON") == "0":
        return None, "left out by KSAE_TRITON=0"
    if importlib.util.find_spec("triton") is None:
        return None, "triton is not installed"
    if torch.version.cuda is None and torch.version.hip is None:
        return None, f"torch {torch.__version__} is built for no GPU"
    return Kernels(), ""


kernels, reason = _load()
