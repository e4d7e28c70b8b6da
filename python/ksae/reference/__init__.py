# SPDX-License-Identifier: Apache-2.0
"""The meaning of every op, in plain torch, written to be read.

N tokens, d width, F latents, k active latents a token. T is the storage type (float32, bfloat16,
float16 or float64). Sums are accumulated in float32, and in float64 where T is float64. These
functions are the default kernels on every device, the oracle of the tests and the baseline of the
benchmarks; a faster kernel that differs from them is wrong.

Selection: larger first, equal scores by the smaller index, NaN before everything, -0 equal to +0.
An entry with value 0 contributes nothing to any product, even if the other factor is not finite.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .dtypes import accumulator


def _largest(score: Tensor, k: int) -> Tensor:
    """Positions [N, k] int64 of the k first columns of `score` [N, F] in the order of selection."""
    key = torch.where(
        score.isnan(), torch.nan, score + 0.0
    )  # one NaN, one zero; sort puts NaN first
    return key.sort(dim=1, descending=True, stable=True).indices[:, :k].contiguous()


def _scaled(value: Tensor, row: Tensor) -> Tensor:
    """value [N] times row [N, d], exactly zero where the value is zero."""
    value = value[:, None]
    return torch.where(value == 0, 0, value * row)


def topk(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest entries of each row. x [N, F] -> values [N, k] T, indices [N, k] int64."""
    indices = _largest(x, k)
    return x.gather(1, indices), indices


def topk_encode(
    x: Tensor,  # [N, d]
    W_enc: Tensor,  # [F, d]
    b_enc: Tensor,  # [F]
    k: int,
    b_dec: Tensor | None = None,  # [d]
    mask: Tensor | None = None,  # [F] bool, False: never selected before a True one, value 0
    W_bf16: Tensor | None = None,  # [F, d] bfloat16 copy of a float32 W_enc
    norms: Tensor | None = None,  # [3, F] float32 of `bf16_norms`, with W_bf16
) -> tuple[Tensor, Tensor]:
    """ReLU of the k largest pre-activations a row -> values [N, k] T, indices [N, k] int64.

    A kernel that screens reads W_bf16 and norms, as `row_update` writes them, where it would make
    them; they must be those of this very W_enc, and change no result. Here they are not read.
    """
    acc = accumulator(x.dtype)
    xc = x if b_dec is None else x - b_dec  # rounded to T
    u = xc.to(acc) @ W_enc.to(acc).T + b_enc.to(acc)  # [N, F]
    if mask is not None:
        u = torch.where(mask, u, -torch.inf)
    indices = _largest(u, k)
    v = u.gather(1, indices)
    return torch.where(v <= 0, 0, v).to(x.dtype), indices


def grad_topk_encode(
    x: Tensor,  # [N, d_in]
    grad: Tensor,  # [N, d_out] of the downstream loss, where the decoder writes
    W_enc: Tensor,  # [F, d_in]
    b_enc: Tensor,  # [F]
    W_dec: Tensor,  # [F, d_out]
    k: int,
    beta: float,
    mode: str = "additive",
    b_dec: Tensor | None = None,  # [d_in]
) -> tuple[Tensor, Tensor]:
    """`topk_encode` with the k largest scores instead of the k largest pre-activations.

    The score is u where u <= 0, and there only u counts; elsewhere u (1 + beta |a|), u |a| or
    u (1 + beta relu(-a)) by mode, a = <W_dec[i], grad[n]>. A row whose grad is zero or not finite,
    and with beta = 0 every row of a mode that has a beta, is scored by u. The values are
    relu(u), not the score, in the order of the score.
    """
    acc = accumulator(x.dtype)
    xc = x if b_dec is None else x - b_dec  # rounded to T
    u = xc.to(acc) @ W_enc.to(acc).T + b_enc.to(acc)  # [N, F]
    g = grad.to(acc)
    score = u
    if beta > 0 or mode == "multiplicative":
        a = g @ W_dec.to(acc).T  # [N, F]
        match mode:
            case "additive":
                score = u * (1 + beta * a.abs())
            case "multiplicative":
                score = u * a.abs()
            case "signed":
                score = u * (1 + beta * (-a).relu())
        informed = ((g != 0).any(1) & g.isfinite().all(1))[:, None]
        score = torch.where((u <= 0) | ~informed, u, score)
    indices = _largest(score, k)
    v = u.gather(1, indices)
    return torch.where(v <= 0, 0, v).to(x.dtype), indices


def topk_encode_aux(
    x: Tensor,  # [N, d_in]
    W_enc: Tensor,  # [F, d_in]
    b_enc: Tensor,  # [F]
    k: int,
    k_aux: int,
    dead: Tensor,  # [F] bool
    b_dec: Tensor | None = None,  # [d_in]
    grad: Tensor | None = None,  # [N, d_out]
    W_dec: Tensor | None = None,  # [F, d_out]
    beta: float = 0.0,
    mode: str = "additive",
    W_bf16: Tensor | None = None,  # [F, d] bfloat16, as `topk_encode`
    norms: Tensor | None = None,  # [3, F] float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The selection of a training step and that of AuxK, which share a product.

    Values and indices [N, k] of `topk_encode`, or of `grad_topk_encode` where grad and W_dec are
    given; then those [N, k_aux] of `topk_encode` with the mask `dead`.
    """
    if grad is None or W_dec is None:
        chosen = topk_encode(x, W_enc, b_enc, k, b_dec)
    else:
        chosen = grad_topk_encode(x, grad, W_enc, b_enc, W_dec, k, beta, mode, b_dec)
    return (*chosen, *topk_encode(x, W_enc, b_enc, k_aux, b_dec, dead))


def _decode(values: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    """Unrounded sum over j of values[:, j] * W_dec[indices[:, j]]: [N, d], accumulated."""
    acc = accumulator(values.dtype)
    out = torch.zeros(values.shape[0], W_dec.shape[1], dtype=acc, device=W_dec.device)
    for v, i in zip(values.unbind(1), indices.unbind(1), strict=True):
        out += _scaled(v.to(acc), W_dec[i].to(acc))
    return out


def sparse_decode(
    values: Tensor,  # [N, k]
    indices: Tensor,  # [N, k] int64 or int32
    W_dec: Tensor,  # [F, d]
    b_dec: Tensor | None = None,  # [d]
) -> Tensor:
    """Weighted sum of decoder rows, plus the bias -> [N, d] T."""
    out = _decode(values, indices, W_dec)
    if b_dec is not None:
        out += b_dec
    return out.to(values.dtype)


def sparse_decode_backward_values(grad: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
    """<grad[n], W_dec[indices[n, j]]> of grad [N, d], indices [N, k], W_dec [F, d] -> [N, k] T."""
    acc = accumulator(grad.dtype)
    g = grad.to(acc)
    out = torch.empty(indices.shape, dtype=grad.dtype, device=grad.device)
    for j, i in enumerate(indices.unbind(1)):
        out[:, j] = (g * W_dec[i].to(acc)).sum(1)
    return out


def sparse_decode_backward_weight(
    grad: Tensor,  # [N, d]
    values: Tensor,  # [N, k]
    indices: Tensor,  # [N, k]
    F: int,
) -> tuple[Tensor, Tensor]:
    """Sum of value * grad[n], and of value, over the entries of a latent -> [F, d], [F] T."""
    acc = accumulator(grad.dtype)
    g, v = grad.to(acc), values.to(acc)
    grad_W = torch.zeros(F, grad.shape[1], dtype=acc, device=grad.device)
    value_sum = torch.zeros(F, dtype=acc, device=grad.device)
    for v_j, i in zip(v.unbind(1), indices.unbind(1), strict=True):
        grad_W.index_add_(0, i, _scaled(v_j, g))
        value_sum.index_add_(0, i, v_j)
    return grad_W.to(grad.dtype), value_sum.to(grad.dtype)


def group_by_latent(values: Tensor, indices: Tensor, F: int) -> tuple[Tensor, Tensor]:
    """Entries [N, k] with value != 0, grouped by latent (CSC), in flat order n*k+j within a latent.

    Returns offsets [F+1] int32 and order [N*k] int32: the flat positions of latent i are
    order[offsets[i]:offsets[i+1]]; the unused tail of order is -1.
    """
    used = values.reshape(-1) != 0  # NaN counts
    latent = torch.where(used, indices.reshape(-1).long(), F)
    latent, order = latent.sort(stable=True)
    bounds = torch.arange(F + 1, device=values.device)
    offsets = torch.searchsorted(latent, bounds).int()
    return offsets, torch.where(latent < F, order, -1).int()


def _ungroup(offsets: Tensor, order: Tensor, shape: torch.Size) -> Tensor:
    """Inverse of group_by_latent: indices [N, k] int64, 0 for the entries that it left out."""
    entry = torch.arange(order.numel(), dtype=torch.int32, device=order.device)
    latent = torch.searchsorted(offsets, entry, right=True) - 1
    spare = order.numel()  # one more slot takes the unused tail
    indices = torch.zeros(spare + 1, dtype=torch.int64, device=order.device)
    position = torch.where(order >= 0, order.long(), spare)
    return indices.scatter_(0, position, latent)[:spare].reshape(shape)


def sparse_residual(
    values: Tensor,  # [N, k]
    indices: Tensor,  # [N, k]
    W_dec: Tensor,  # [F, d]
    b_dec: Tensor | None,  # [d]
    target: Tensor,  # [N, d] T or the accumulator's type
    columns: int,
    column_sums: Tensor | None = None,  # [d] float32, written: sum of the residual over the tokens
) -> tuple[Tensor, Tensor, Tensor]:
    """The residual, reconstruction minus target, not rounded to T.

    Returns its first columns [N, columns] float32, its row sums of squares [N] float64, and its
    products with the chosen rows of W_dec [N, k] float32, which are the gradient of the values
    before scaling (0 where the value is 0).
    """
    acc = accumulator(values.dtype)
    residual = sparse_residual_slice(values, indices, W_dec, b_dec, target, 0, W_dec.shape[1])
    grads = sparse_decode_backward_values(residual, indices, W_dec.to(acc))
    grads = torch.where(values == 0, 0, grads)
    if column_sums is not None:
        column_sums.copy_(residual.sum(0))
    return residual[:, :columns].contiguous(), residual.double().square().sum(1), grads


def sparse_residual_slice(
    values: Tensor,  # [N, k]
    indices: Tensor,  # [N, k]
    W_dec: Tensor,  # [F, d]
    b_dec: Tensor | None,  # [d]
    target: Tensor,  # [N, d] T or the accumulator's type
    start: int,
    stop: int,
) -> Tensor:
    """Columns [start, stop) of the residual of `sparse_residual`: [N, stop - start] float32."""
    recon = _decode(values, indices, W_dec[:, start:stop])
    if b_dec is not None:
        recon = recon + b_dec[start:stop]
    return recon - target[:, start:stop]


def latent_sums(
    values: Sequence[Tensor],  # G of [N, k_g] T
    grads: Sequence[Tensor],  # G of [N, k_g] float32, from sparse_residual
    offsets: Sequence[Tensor],  # G of [F+1] int32, from group_by_latent
    order: Sequence[Tensor],  # G of [N*k_g] int32
    scales: Tensor,  # [G] float32
) -> tuple[Tensor, Tensor]:
    """Two sums over the groups and entries of a latent, [F] float32 each.

    Of scale * grad, which is the gradient of b_enc, and of scale * value * grad, which is
    <dW_dec[i], W_dec[i]>. Zeros if a scale is not finite.
    """
    F = offsets[0].numel() - 1
    bias = torch.zeros(F, dtype=torch.float64, device=scales.device)
    grad_dot_w = torch.zeros_like(bias)
    if bool(scales.isfinite().all()):
        for v, g, off, o, scale in zip(values, grads, offsets, order, scales, strict=True):
            latent = _ungroup(off, o, v.shape).reshape(-1)
            product = scale * g.double()
            bias.index_add_(0, latent, torch.where(v == 0, 0, product).reshape(-1))
            grad_dot_w.index_add_(0, latent, torch.where(v == 0, 0, v * product).reshape(-1))
    return bias.to(scales.dtype), grad_dot_w.to(scales.dtype)


def _row_gradient(
    coefficients: Sequence[Tensor],
    offsets: Sequence[Tensor],
    order: Sequence[Tensor],
    rows: Sequence[Tensor],
    scales: Tensor,
    centre: Tensor | None,
    along: Tensor | None,
    W: Tensor,
    start: int,
) -> Tensor:
    """Gradient of columns [start, start + columns) of W: [F, columns] in the accumulator's type."""
    acc, F = scales.dtype, W.shape[0]
    gradient = torch.zeros(F, rows[0].shape[1], dtype=acc, device=W.device)
    for c, off, o, r, scale in zip(coefficients, offsets, order, rows, scales, strict=True):
        row = r.to(acc) if centre is None else r.to(acc) - centre.to(acc)
        gradient += sparse_decode_backward_weight(
            row, scale * c.to(acc), _ungroup(off, o, c.shape), F
        )[0]
    if along is not None:
        gradient -= along[:, None] * W[:, start : start + gradient.shape[1]].to(acc)
    return gradient


def _along(grad_dot_w: Tensor | None, W: Tensor) -> Tensor | None:
    """The gradient along each row in units of the row: grad_dot_w / |W[i]|^2, 0 for a zero row."""
    if grad_dot_w is None:
        return None
    square = W.to(grad_dot_w.dtype).square().sum(1)
    return torch.where(square > 0, grad_dot_w / square, 0)


def row_grad_sq(
    coefficients: Sequence[Tensor],
    offsets: Sequence[Tensor],
    order: Sequence[Tensor],
    rows: Sequence[Tensor],
    scales: Tensor,
    centre: Tensor | None,
    grad_dot_w: Tensor | None,
    W: Tensor,
    start: int,
) -> Tensor:
    """Row sums of squares of the gradient of `row_update`, before grad_scale: [F] float64.

    Zeros if a scale is not finite.
    """
    if not bool(scales.isfinite().all()):
        return torch.zeros(W.shape[0], dtype=torch.float64, device=W.device)
    along = _along(grad_dot_w, W)
    gradient = _row_gradient(coefficients, offsets, order, rows, scales, centre, along, W, start)
    return gradient.double().square().sum(1)


def row_update(
    # G of [N, k_g]: for the encoder the values' gradients float32, for the decoder the values T
    coefficients: Sequence[Tensor],
    offsets: Sequence[Tensor],  # G of [F+1] int32, from group_by_latent
    order: Sequence[Tensor],  # G of [N*k_g] int32
    # G of [N, columns]: for the encoder x T, for the decoder columns of the residual float32
    rows: Sequence[Tensor],
    scales: Tensor,  # [G] float32: dL/drecon = scale * residual
    centre: Tensor | None,  # [columns] T, subtracted from rows (encoder)
    # [F] float32, <gradient, W[i]> over all columns, 0 without entries; None: no projection
    grad_dot_w: Tensor | None,
    grad_b_enc: Tensor | None,  # [F] float32, with grad_b_dec, 0 without entries
    W: Tensor,  # [F, d] T, written in columns [start, start + columns)
    master: Tensor | None,  # [F, d] float32 where T is not float32
    m: Tensor,  # [F, d] float32
    v: Tensor,  # [F, d] float32
    # [8] float32: lr/bc1, sqrt(bc2), beta1, beta2, eps, grad_scale, 1 - beta1, 1 - beta2
    hyper: Tensor,
    grad_b_dec: Tensor | None,  # [d] float32, written: W.T @ grad_b_enc with W as it was
    start: int,
    normalize: bool,
    W_bf16: Tensor | None = None,  # [F, d] bfloat16 copy of a float32 W, written with it
    # [2] int64, seed and step: W (without a master), m and v are bfloat16, rounded stochastically
    rng_state: Tensor | None = None,
    norms: Tensor | None = None,  # [3, F] float32 of `bf16_norms`, written with a bf16 copy
) -> None:
    """Gradient, projection and Adam of the rows of one matrix, in place; then, if asked, unit rows.

    gradient_i = sum over groups and entries of scale * coefficient * (row_n - centre), less
    grad_dot_w_i / |W_i|^2 W_i. W_i is the row of T that the forward used, not its master. A latent
    without an entry has gradient 0 and still moves (dense Adam). Where the columns are a slice, the
    slice that starts at 0 comes first and divides `grad_dot_w` by |W_i|^2 in place: later slices
    see W half updated. A scale that is not finite writes nothing but zeros into grad_b_dec.

    With rng_state, m, v and W are rounded by draws 0, 1 and 2 of `stochastic_bfloat16`, and unit
    rows, which are taken of the rounded W, by draw 3. Norms need all columns of W in one call.
    """
    if not bool(scales.isfinite().all()):
        if grad_b_dec is not None:
            grad_b_dec.zero_()
        return
    along = _along(grad_dot_w, W) if start == 0 else grad_dot_w
    if (
        grad_dot_w is not None
        and along is not None
        and start == 0
        and rows[0].shape[1] < W.shape[1]
    ):
        grad_dot_w.copy_(along)
    g = _row_gradient(coefficients, offsets, order, rows, scales, centre, along, W, start)
    if grad_b_dec is not None and grad_b_enc is not None:
        grad_b_dec.copy_(W.to(scales.dtype).T @ grad_b_enc)
    theta = W if master is None else master
    part = slice(start, start + g.shape[1])
    # 1 - beta2 comes rounded from float64: in float32 it would be off by 1e-5
    step, root_bc2, b1, b2, eps, grad_scale, rest1, rest2 = hyper
    g = g * grad_scale
    m_new = b1 * m[:, part].to(g.dtype) + rest1 * g
    v_new = b2 * v[:, part].to(g.dtype) + rest2 * g * g
    moved = theta[:, part].to(g.dtype) - step * m_new / (v_new.sqrt() / root_bc2 + eps)
    rounded = [m_new, v_new, moved]
    if rng_state is not None:
        rounded = [stochastic_bfloat16(t, rng_state, i, start) for i, t in enumerate(rounded)]
    m[:, part], v[:, part], theta[:, part] = rounded
    if normalize:
        norm = theta.double().norm(dim=1, keepdim=True).to(g.dtype)
        unit = theta / torch.where(norm > 0, norm, 1)
        theta.copy_(unit if rng_state is None else stochastic_bfloat16(unit, rng_state, 3, 0))
    if master is not None:
        W.copy_(master)
    if W_bf16 is not None:
        W_bf16.copy_(W)
        if norms is not None:
            norms.copy_(bf16_norms(W, W_bf16))


def bf16_norms(W: Tensor, W_bf16: Tensor) -> Tensor:
    """Upper bounds [3, F] float32 of the norms of the rows of W [F, d] float32, of what its copy in
    bfloat16 lost and of the copy; an encode may screen by them.

    A kernel's bounds are others: at most 1 + 2^-16 + d 2^-22 times the norm, plus sqrt(d) 2^-62.
    The three of a row are infinite where it has a NaN or the first is above 2^60: a float32 sum of
    squares might overflow.
    """
    wide, copy = W.double(), W_bf16.double()
    norms = torch.stack([t.norm(dim=1) for t in (wide, wide - copy, copy)])
    bounds = norms * (1 + 2.0**-18) + 2.0**-126  # and then rounded to float32
    return torch.where(bounds[0] <= 2.0**60, bounds, torch.inf).float()


def stochastic_bfloat16(x: Tensor, rng_state: Tensor, draw: int, start: int) -> Tensor:
    """x [F, columns] float32 at columns [start, start + columns) of a matrix, rounded to a bfloat16
    neighbour, away from zero with the probability of the share that lies below x.

    The 16 bits that are added before the last 16 are cut off are those of `draw`, 0 to 3, of the
    seed and step in rng_state [2] int64. Infinities and NaN stay.
    """
    row = torch.arange(x.shape[0], device=x.device)[:, None]
    column = torch.arange(start, start + x.shape[1], device=x.device)
    words = _philox((column // 4, row, rng_state[1] & _WORD, draw // 2), rng_state[0])
    low, high = words[2 * (draw % 2) : 2 * (draw % 2) + 2]
    bits = torch.where(column % 4 < 2, low, high) >> 16 * (column % 2) & 0xFFFF
    cut = (x.contiguous().view(torch.int32) + bits.int()) >> 16 << 16  # [F, columns]
    return torch.where(x.isfinite(), cut.view(torch.float32), x).bfloat16()


_WORD = 0xFFFFFFFF


def _philox(counter: Sequence[Tensor | int], key: Tensor) -> list[Tensor]:
    """Four words of 32 bits, in int64, of Philox4x32-10 (Salmon et al., SC 2011)."""
    zero = torch.zeros_like(key)
    c0, c1, c2, c3 = (c + zero for c in counter)
    k0, k1 = key & _WORD, key >> 32 & _WORD
    for _ in range(10):
        a, b = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # the lower 64 bits, which is all of them
        c0, c1, c2, c3 = (
            (b >> 32 & _WORD) ^ c1 ^ k0,
            b & _WORD,
            (a >> 32 & _WORD) ^ c3 ^ k1,
            a & _WORD,
        )
        k0, k1 = k0 + 0x9E3779B9 & _WORD, k1 + 0xBB67AE85 & _WORD
    return [c0, c1, c2, c3]


# What follows is a handful of torch calls on few numbers, which a GPU would start one by one.


def total_variance(y: Tensor) -> Tensor:
    """sum (y - mean over the batch of y)^2: y [N, d] T -> [] float32; the denominator of the FVU.

    Centred before squaring: activations have dimensions whose mean is far larger than their spread.
    """
    acc = accumulator(y.dtype)
    pieces = torch.split(y, 512)  # a training step has no room for a second [N, d]
    mean = torch.stack([rows.sum(0, dtype=acc) for rows in pieces]).sum(0) / len(y)  # [d]
    norms = torch.cat([torch.linalg.vector_norm(rows - mean, dim=1) for rows in pieces])  # [N]
    return norms.double().square().sum().to(acc)


def loss_terms(
    sq_errors: Sequence[Tensor],  # G of [N] float64, from sparse_residual
    denominators: Sequence[Tensor],  # G of [] float32
    shares: Sequence[float],  # G: what each term counts in the loss
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The terms of a loss: error / denominator each, where error is the sum of sq_errors.

    Returns:
        errors [G], terms [G], loss [] and scales [G], float32: loss = sum of shares * terms, and
        dloss/drecon = scales * residual in each term. A term after the first whose denominator is
        not positive counts nothing: it has nothing to predict.
    """
    below = torch.stack(list(denominators))
    weights = 1 / below
    weights[1:] = torch.where(below[1:] > 0, weights[1:], 0)
    errors = torch.stack([e.sum() for e in sq_errors]).to(below.dtype)
    terms = errors * weights
    share = torch.tensor(shares, dtype=below.dtype, device=below.device)
    return errors, terms, (share * terms).sum(), 2 * share * weights


def adam_scalars(
    loss: Tensor,  # [] float32
    norm: Tensor | None,  # [] float32: of all gradients, with clip_norm
    clip_norm: float | None,
    scales: Tensor,  # [G] float32
    lr: Tensor,  # [] float64
    t: Tensor,  # [] float64: steps taken before this one
    constants: Tensor,  # [3] float64: beta1, beta2, eps
) -> tuple[Tensor, Tensor, Tensor]:
    """The numbers of one step of Adam, without a look at the loss from outside of the device.

    Returns:
        hyper [8] float32: what `row_update` wants; [] bool whether the step is taken: loss and norm
        are finite; scales [G] float32: as they were, or NaN for a step that is not taken.
    """
    taken, grad_scale = loss.isfinite(), torch.ones_like(loss)
    if norm is not None and clip_norm is not None:
        taken = taken & norm.isfinite()
        grad_scale = (clip_norm / (norm + 1e-6)).clamp(max=1)
    betas, eps = constants[:2], constants[2:]
    bc1, bc2 = (1 - betas ** (t + 1)).unbind()
    first = torch.stack([lr / bc1, bc2.sqrt()])
    hyper = torch.cat([first, betas, eps, grad_scale.double()[None], 1 - betas])
    return hyper.to(scales.dtype), taken, torch.where(taken, scales, torch.nan)


def vector_update(
    grads: Sequence[Tensor],  # G of p's shape, float32
    scales: Tensor | None,  # [G] float32
    minus: Tensor | None,  # of p's shape, float32
    taken: Tensor,  # [] bool: nothing is written if it is False
    hyper: Tensor,  # [8] float32, as in row_update
    p: Tensor,  # [...] T
    master: Tensor | None,  # of p's shape, float32, where T is not float32
    m: Tensor,  # of p's shape, float32
    v: Tensor,  # of p's shape, float32
) -> None:
    """Adam of one dense parameter, in place. Its gradient: sum of scales * grads, less `minus`."""
    factors: Sequence[Tensor | int] = [1] * len(grads) if scales is None else scales.unbind()
    g = sum((s * t for s, t in zip(factors[1:], grads[1:], strict=True)), factors[0] * grads[0])
    if minus is not None:
        g = g - minus
    step, root_bc2, b1, b2, eps, grad_scale, rest1, rest2 = hyper
    theta = p if master is None else master
    g = g * grad_scale
    m_new = b1 * m + rest1 * g
    v_new = b2 * v + rest2 * g * g
    moved = theta - step * m_new / (v_new.sqrt() / root_bc2 + eps)
    for old, new in ((m, m_new), (v, v_new), (theta, moved)):
        old.copy_(torch.where(taken, new, old))
    if master is not None:
        p.copy_(torch.where(taken, master.to(p.dtype), p))
