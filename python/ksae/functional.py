# SPDX-License-Identifier: Apache-2.0
"""The public ops: any leading dimensions and strides, autograd, autocast, vmap, compile."""

from __future__ import annotations

import torch
from torch import Tensor

from . import ops
from .ops import accumulator


def _rows(t: Tensor) -> Tensor:
    """[..., n] -> contiguous [N, n]."""
    if t.dim() == 2:
        return t.contiguous()
    return (t.flatten(0, -2) if t.dim() > 2 else t.reshape(1, -1)).contiguous()


def _leading(out: Tensor, like: Tensor) -> Tensor:
    """[N, n] -> [..., n] with the leading dimensions of `like`."""
    return out if like.dim() == 2 else out.reshape(*like.shape[:-1], out.shape[1])


def topk(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest entries of each row, exactly and in a fixed order.

    Args:
        x: [..., F] float32, bfloat16, float16 or float64.
        k: in [1, F].

    Returns:
        values [..., k], x's own entries; indices [..., k] int64.

    Raises:
        ValueError: k outside [1, F]. TypeError: x is not of a floating type above.

    Numerics: larger first, equal entries by the smaller index, NaN before everything, -0 equal to
    +0; the same bits on every run and for every thread count. The gradient goes to the selected
    entries.

    Example:
        >>> import torch, ksae
        >>> ksae.topk(torch.tensor([1.0, 3.0, 3.0, 2.0]), 2)
        (tensor([3., 3.]), tensor([1, 2]))
    """
    values, indices = ops.topk(_rows(x), k)
    return _leading(values, x), _leading(indices, x)


def topk_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    b_dec: Tensor | None = None,
    mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """ReLU of the k largest pre-activations u = (x - b_dec) @ W_enc.T + b_enc, without the N x F
    matrix.

    The encoder of the TopK sparse autoencoder (arXiv 2406.04093).

    Args:
        x: [..., d] float32, bfloat16, float16 or float64; the other floating arguments are of the
            same dtype.
        W_enc: [F, d], one row a latent.
        b_enc: [F].
        k: in [1, F].
        b_dec: [d], subtracted from x first (the difference is rounded to x's dtype).
        mask: [F] bool; latents that are False are never preferred to a True one, and have value 0.

    Returns:
        values [..., k] >= 0, sorted by u; indices [..., k] int64. A slot whose u is <= 0 has value
        0 and keeps its index.

    Raises:
        ValueError: shapes that do not fit, k outside [1, F]. TypeError: dtypes that differ.

    Numerics: u is accumulated and compared in float32 whatever the dtype (float64 for float64), on
    CUDA too and never in TF32, even where torch.backends.cuda.matmul allows it: 10 bits of mantissa
    would choose other latents; order and determinism as `topk`. Gradients for x, W_enc, b_enc and
    b_dec flow through the slots with value > 0, none through the selection. Under autocast the
    floating inputs are cast to the autocast dtype.

    Example:
        >>> import torch, ksae
        >>> ksae.topk_encode(torch.tensor([1.0, 2.0]), torch.eye(2), torch.zeros(2), 1)
        (tensor([2.]), tensor([1]))
    """
    values, indices = ops.topk_encode(
        _rows(x),
        W_enc.contiguous(),
        b_enc.contiguous(),
        k,
        None if b_dec is None else b_dec.contiguous(),
        None if mask is None else mask.contiguous(),
    )
    return _leading(values, x), _leading(indices, x)


def grad_topk_encode(
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
    """`topk_encode` whose selection knows what each latent does to a downstream loss.

    The encoder of gradient SAEs (arXiv 2411.10397). With u as in `topk_encode` and
    a_i = <W_dec[i], grad>, the k largest scores s win; where u <= 0, s = u, elsewhere

        additive        s = u (1 + beta |a|)
        multiplicative  s = u |a|, the limit of a large beta, which it ignores
        signed          s = u (1 + beta relu(-a)): only latents that lower the loss are favoured

    Args:
        x: [..., d_in] float32, bfloat16, float16 or float64; the other floating arguments are of
            the same dtype.
        grad: [..., d_out], gradient of the downstream loss where the decoder writes; detached. A
            row of it that is zero or has an entry that is not finite is selected by u.
        W_enc: [F, d_in], one row a latent.
        b_enc: [F].
        W_dec: [F, d_out].
        k: in [1, F].
        beta: a finite number >= 0; with unit rows in W_dec it matters from about
            sqrt(d_out) / |grad| on. 0 is `topk_encode`, bit for bit, except in multiplicative mode.
        mode: "additive", "multiplicative" or "signed".
        b_dec: [d_in], subtracted from x first (the difference is rounded to x's dtype).

    Returns:
        values [..., k] >= 0, relu(u) and not the score; indices [..., k] int64; both sorted by the
        score.

    Raises:
        ValueError: shapes that do not fit, k, beta or mode out of range, grad that requires a
        gradient. TypeError: dtypes that differ.

    Numerics: u, a and s are float32 whatever the dtype (float64 for float64), and never TF32, as in
    `topk_encode`; order and determinism as `topk`. The selection is fixed for the gradients, which
    are those of `topk_encode`: nothing flows through the score, neither to grad nor to W_dec. Under
    autocast the floating inputs are cast to the autocast dtype.

    Example:
        >>> import torch, ksae
        >>> W, b = torch.eye(2), torch.zeros(2)
        >>> x, grad = torch.tensor([1.0, 2.0]), torch.tensor([3.0, 0.0])
        >>> ksae.grad_topk_encode(x, grad, W, b, W, 1, beta=1.0)
        (tensor([1.]), tensor([0]))
    """
    if grad.requires_grad:
        raise ValueError(
            "grad_topk_encode: grad must be detached, for nothing flows through the score,"
            " got a tensor that requires grad"
        )
    if grad.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"grad_topk_encode: grad must be of shape {[*x.shape[:-1], W_dec.shape[-1]]} for x of"
            f" shape {list(x.shape)}, got {list(grad.shape)}"
        )
    values, indices = ops.grad_topk_encode(
        _rows(x),
        _rows(grad),
        W_enc.contiguous(),
        b_enc.contiguous(),
        W_dec.contiguous(),
        k,
        beta,
        mode,
        None if b_dec is None else b_dec.contiguous(),
    )
    return _leading(values, x), _leading(indices, x)


def batch_topk_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    k: int,
    b_dec: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """ReLU of the N*k largest pre-activations u = (x - b_dec) @ W_enc.T + b_enc of all N rows
    together, without the N x F matrix: k a row on average, and no limit for any row.

    The encoder of a BatchTopK sparse autoencoder in training (arXiv 2412.06410).

    Args:
        x: [..., d] float32, bfloat16, float16 or float64; the other floating arguments are of the
            same dtype. Leading dimensions are rows, N in all.
        W_enc: [F, d], one row a latent.
        b_enc: [F].
        k: in [1, F].
        b_dec: [d], subtracted from x first (the difference is rounded to x's dtype).

    Returns:
        values [N*k] >= 0; indices [N*k] int64, ascending in each row; row_offsets [N + 1] int64:
        row n has the entries row_offsets[n] to row_offsets[n + 1] - 1. An entry whose u is <= 0 has
        value 0 and keeps its index. `sparse_decode` takes the three.

    Raises:
        ValueError: shapes that do not fit, k outside [1, F], or more than 2^31 - 4096 entries.
        TypeError: dtypes that differ.

    Numerics: as `topk_encode`; of equal u the earlier row wins, then the smaller index; NaN before
    everything. Gradients for x, W_enc, b_enc and b_dec flow through the entries with value > 0,
    none through the selection. Under autocast the floating inputs are cast to the autocast dtype.

    Example:
        >>> import torch, ksae
        >>> x = torch.tensor([[1.0, 3.0], [0.5, 2.0]])
        >>> ksae.batch_topk_encode(x, torch.eye(2), torch.zeros(2), 1)
        (tensor([3., 2.]), tensor([1, 1]), tensor([0, 1, 2]))
    """
    encoded: tuple[Tensor, Tensor, Tensor] = ops.batch_topk_encode(
        _rows(x),
        W_enc.contiguous(),
        b_enc.contiguous(),
        k,
        None if b_dec is None else b_dec.contiguous(),
    )
    return encoded


def threshold_encode(
    x: Tensor,
    W_enc: Tensor,
    b_enc: Tensor,
    theta: Tensor | float,
    b_dec: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The pre-activations u = (x - b_dec) @ W_enc.T + b_enc above their latent's threshold: a code
    with a variable number of entries a row.

    The encoder of a JumpReLU sparse autoencoder (arXiv 2407.14435) with the thresholds as they are;
    with theta = 0 it is ReLU.

    Args:
        x: [..., d] float32, bfloat16, float16 or float64; the other floating arguments are of the
            same dtype. Leading dimensions are rows, N in all.
        W_enc: [F, d], one row a latent.
        b_enc: [F].
        theta: [F], of x's dtype or float32 (float64 for float64), or one number for all latents.
            Below 0 it lets negative pre-activations through.
        b_dec: [d], subtracted from x first (the difference is rounded to x's dtype).

    Returns:
        values [E]; latents [E] int64, ascending in each row; row_offsets [N + 1] int64: row n has
        the entries row_offsets[n] to row_offsets[n + 1] - 1. `sparse_decode` takes the three.

    Raises:
        ValueError: shapes that do not fit, or more than 2^31 - 4096 entries. TypeError: dtypes
            that differ.

    Numerics: u is accumulated in float32 whatever the dtype (float64 for float64) and compared, as
    theta is, before it is rounded; NaN is not above; the same bits on every run and for every
    thread count. Gradients for x, W_enc, b_enc and b_dec flow through the entries, none through
    the selection: theta gets none. Under autocast the floating inputs are cast to the autocast
    dtype. The number of entries depends on the data: on a GPU the call waits for it.

    Example:
        >>> import torch, ksae
        >>> ksae.threshold_encode(torch.tensor([[1.0, 3.0]]), torch.eye(2), torch.zeros(2), 2.0)
        (tensor([3.]), tensor([1]), tensor([0, 1]))
    """
    if not isinstance(theta, Tensor):
        theta = torch.full((W_enc.shape[0],), theta, dtype=accumulator(x.dtype), device=x.device)
    encoded: tuple[Tensor, Tensor, Tensor] = ops.threshold_encode(
        _rows(x),
        W_enc.contiguous(),
        b_enc.contiguous(),
        theta.contiguous(),
        None if b_dec is None else b_dec.contiguous(),
    )
    return encoded


def sparse_decode(
    values: Tensor,
    indices: Tensor,
    W_dec: Tensor,
    b_dec: Tensor | None = None,
    row_offsets: Tensor | None = None,
) -> Tensor:
    """Sum over j of values[..., j] * W_dec[indices[..., j]], plus b_dec: the decoder of a sparse
    code.

    Args:
        values: [..., k] float32, bfloat16, float16 or float64; the other floating arguments are of
            the same dtype. With row_offsets [E].
        indices: of the shape of values, int64 or int32 in [0, F); repeats add up.
        W_dec: [F, d], one row a latent.
        b_dec: [d].
        row_offsets: [N + 1] int64, for rows with as many entries as they like: row n has the
            entries row_offsets[n] to row_offsets[n + 1] - 1, as `threshold_encode` returns them.

    Returns:
        [..., d]; with row_offsets [N, d].

    Raises:
        ValueError: shapes that do not fit; on the CPU also an index outside [0, F), and row offsets
            that do not rise from 0 to E. TypeError: dtypes that differ.

    Numerics: accumulated in float32 (float64 for float64), rounded once. An entry with value 0 adds
    nothing, even if its row of W_dec is not finite. Gradients for values, W_dec and b_dec, in a
    fixed order of summation. Under autocast the floating inputs are cast to the autocast dtype.

    Example:
        >>> import torch, ksae
        >>> ksae.sparse_decode(torch.tensor([2.0]), torch.tensor([1]), torch.eye(3))
        tensor([0., 2., 0.])
    """
    if indices.shape != values.shape:
        raise ValueError(
            f"sparse_decode: indices must be of the shape of values {list(values.shape)},"
            f" got {list(indices.shape)}"
        )
    bias = None if b_dec is None else b_dec.contiguous()
    if row_offsets is not None:
        if values.dim() != 1:
            raise ValueError(
                "sparse_decode: values must be of shape [E] with row_offsets, got"
                f" {list(values.shape)}"
            )
        rows = row_offsets.contiguous()
        recon: Tensor = ops.sparse_decode(
            values[:, None], indices[:, None], W_dec.contiguous(), bias, rows
        )
        return recon
    out = ops.sparse_decode(_rows(values), _rows(indices), W_dec.contiguous(), bias)
    return _leading(out, values)
