# SPDX-License-Identifier: Apache-2.0
"""Passes over latents: each latent's gradient row is formed in registers, used and forgotten.

One program a latent holds the updated columns of its row. It adds the rows of the latent's entries
in their order, takes off the part along W_i, moves m, v and the parameter, and forgets the
gradient. Segments longer than CUT entries are cut at multiples of CUT positions of `order`: other
programs sum the pieces first, into a workspace, and the latent's program adds the pieces in order.
So no sum depends on scheduling, and a latent that every token selects is spread over the device.

Bytes of an update, for each entry a row of `columns` numbers, for each parameter 24 of moments and
parameter, 2 of the 16-bit copy and 2 to read it. Flops: 2 an entry and column, 14 a parameter.
Limit: rows longer than about 8192 columns no longer fit in registers: right, but slow.
Portable Triton; run on no AMD GPU, and so far on no GPU: interpreted and compiled only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bound import norms_above
from .latent_sums import finite, value_sums

CUT = 8 if triton.knobs.runtime.interpret else 256
SHARES = 512  # of the latents, for grad_b_dec
ROWS = 16  # latents that a share adds at a time
COLUMNS = 128
REGISTERS = 96  # five numbers of each of a thread's sixteen columns


@triton.jit
def _add_entries(
    coefficients_ptr,  # [N, k]
    order_ptr,  # [N * k] int32
    rows_ptr,  # [N, columns]
    row_of_ptr,  # [N * k] int32 or None: instead of k entries a row
    scale,
    first,
    last,
    k,
    columns,
    c,
    centre,
    total,
):
    """total + the sum over entries [first, last) of scale * coefficient * (row - centre)."""
    for e in tl.range(first, last, loop_unroll_factor=2):
        at = tl.load(order_ptr + e)
        a = scale * tl.load(coefficients_ptr + at).to(tl.float32)
        n = tl.load(row_of_ptr + at) if row_of_ptr is not None else at // k
        row = rows_ptr + n.to(tl.int64) * columns
        inside = c < tl.where(a == 0, 0, columns)
        r = tl.load(row + c, inside, 0.0).to(tl.float32) - centre
        total += tl.where(inside, a * r, 0.0)
    return total


@triton.jit
def _centre(centre_ptr, c, columns, CENTRE: tl.constexpr, BLOCK: tl.constexpr):
    if CENTRE:
        return tl.load(centre_ptr + c, c < columns, 0.0).to(tl.float32)
    else:
        return tl.zeros((BLOCK,), tl.float32)


@triton.jit(do_not_specialize_on_alignment=["scale_ptr"])
def pieces_kernel(
    coefficients_ptr, offsets_ptr, order_ptr, rows_ptr, row_of_ptr,
    scale_ptr,  # [1]
    centre_ptr,  # [columns]
    pieces_ptr,  # [units, 2, columns] float32
    F, k, columns, steps,
    CENTRE: tl.constexpr, SCALED: tl.constexpr, CUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Unit u is the entries [CUT u, CUT (u + 1)). At most two long segments meet it: that of its
    first entry (slot 0) and that of its last (slot 1)."""
    unit = tl.program_id(0)
    slot = tl.program_id(1)
    begin = unit * CUT
    end = tl.minimum(begin + CUT, tl.load(offsets_ptr + F))
    if begin < end:
        entry = tl.where(slot == 0, begin, end - 1)
        low = 0  # offsets[low] <= entry < offsets[high]
        high = F
        for _ in range(steps):
            middle = (low + high) // 2
            left = tl.load(offsets_ptr + middle) <= entry
            low = tl.where(left, middle, low)
            high = tl.where(left, high, middle)
        first = tl.load(offsets_ptr + low)
        last = tl.load(offsets_ptr + low + 1)
        own = (slot == 0) | (first > begin)  # else it is the segment of slot 0
        if own & (last - first > CUT):
            c = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
            scale = 1.0
            if SCALED:
                scale = tl.load(scale_ptr)
            total = _add_entries(
                coefficients_ptr, order_ptr, rows_ptr, row_of_ptr, scale,
                tl.maximum(first, begin), tl.minimum(last, end), k, columns, c,
                _centre(centre_ptr, c, columns, CENTRE, BLOCK), tl.zeros((BLOCK,), tl.float32),
            )  # fmt: skip
            here = pieces_ptr + (2 * unit + slot).to(tl.int64) * columns
            tl.store(here + c, total, c < columns)


@triton.jit
def _gradient(
    coefficients,  # of each group; as are offsets, order, rows, row_of, pieces and ks
    offsets,
    order,
    rows,
    row_of,
    pieces,
    ks,
    scales_ptr,
    centre,
    i,
    c,
    columns,
    GROUPS: tl.constexpr,
    SCALED: tl.constexpr,
    CUT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Columns c of the gradient of latent i, before what is along W_i is taken off."""
    total = tl.zeros((BLOCK,), tl.float32)
    for g in tl.static_range(GROUPS):
        first = tl.load(offsets[g] + i)
        last = tl.load(offsets[g] + i + 1)
        if last - first <= CUT:
            scale = 1.0
            if SCALED:
                scale = tl.load(scales_ptr + g)
            total = _add_entries(
                coefficients[g], order[g], rows[g], row_of[g], scale, first, last, ks[g], columns,
                c, centre, total,
            )  # fmt: skip
        else:
            for unit in range(first // CUT, (last - 1) // CUT + 1):
                slot = tl.where(unit * CUT < first, 1, 0)
                piece = pieces[g] + (2 * unit + slot).to(tl.int64) * columns
                total += tl.load(piece + c, c < columns, 0.0)
    return total


@triton.jit
def _square_of_row(W_ptr, i, d, BLOCK_D: tl.constexpr):
    c = tl.arange(0, BLOCK_D)
    w = tl.load(W_ptr + i * d + c, c < d, 0.0).to(tl.float64)
    return tl.sum(w * w, axis=0).to(tl.float32)


@triton.jit
def _along(grad_dot_w, square):
    return tl.where(square > 0, tl.div_rn(grad_dot_w, tl.where(square > 0, square, 1.0)), 0.0)


@triton.jit
def update_kernel(
    coefficients, offsets, order, rows, row_of, pieces, ks, scales_ptr, centre_ptr,
    grad_dot_w_ptr,  # [F] float32
    W_ptr,  # [F, d] T
    master_ptr,  # [F, d] float32, with MASTER
    m_ptr, v_ptr,  # [F, d] float32
    hyper_ptr,  # [8] float32
    W_bf16_ptr,  # [F, d] bf16 or None
    norms_ptr,  # [3, F] float32 or None, with a bf16 copy and WHOLE
    F, d, columns, start,
    GROUPS: tl.constexpr, CENTRE: tl.constexpr, PROJECT: tl.constexpr, FIRST: tl.constexpr,
    MASTER: tl.constexpr, NORMALIZE: tl.constexpr, WHOLE: tl.constexpr,
    CUT: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    if finite(scales_ptr, GROUPS):
        i = tl.program_id(0).to(tl.int64)
        c = tl.arange(0, BLOCK)
        inside = c < columns
        at = i * d + start + c
        centre = _centre(centre_ptr, c, columns, CENTRE, BLOCK)
        g = _gradient(
            coefficients, offsets, order, rows, row_of, pieces, ks, scales_ptr, centre, i, c,
            columns, GROUPS, True, CUT, BLOCK,
        )  # fmt: skip
        w = tl.load(W_ptr + at, inside, 0.0).to(tl.float32)
        if PROJECT:
            along = tl.load(grad_dot_w_ptr + i)
            if FIRST:  # later slices find it divided
                along = _along(along, _square_of_row(W_ptr, i, d, BLOCK_D))
                if not WHOLE:
                    tl.store(grad_dot_w_ptr + i, along)
            g -= along * w
        g *= tl.load(hyper_ptr + 5)
        m = tl.load(hyper_ptr + 2) * tl.load(m_ptr + at, inside, 0.0)
        m += tl.load(hyper_ptr + 6) * g
        v = tl.load(hyper_ptr + 3) * tl.load(v_ptr + at, inside, 0.0)
        v += tl.load(hyper_ptr + 7) * g * g
        tl.store(m_ptr + at, m, inside)
        tl.store(v_ptr + at, v, inside)
        root = tl.div_rn(tl.sqrt_rn(v), tl.load(hyper_ptr + 1)) + tl.load(hyper_ptr + 4)
        theta = w
        if MASTER:
            theta = tl.load(master_ptr + at, inside, 0.0)
        theta -= tl.where(inside, tl.div_rn(tl.load(hyper_ptr) * m, root), 0.0)
        if NORMALIZE:
            wide = theta.to(tl.float64)
            square = tl.sum(wide * wide, axis=0)
            if not WHOLE:  # the other columns count as well
                o = tl.arange(0, BLOCK_D)
                others = (o < d) & ((o < start) | (o >= start + columns))
                if MASTER:
                    other = tl.load(master_ptr + i * d + o, others, 0.0)
                else:
                    other = tl.load(W_ptr + i * d + o, others, 0.0).to(tl.float32)
                wide_other = other.to(tl.float64)
                square += tl.sum(wide_other * wide_other, axis=0)
            norm = tl.sqrt(square).to(tl.float32)
            norm = tl.where(norm > 0, norm, 1.0)
            theta = tl.div_rn(theta, tl.zeros((BLOCK,), tl.float32) + norm)
            if not WHOLE:
                other = tl.div_rn(other, tl.zeros((BLOCK_D,), tl.float32) + norm)
                tl.store(W_ptr + i * d + o, other.to(W_ptr.dtype.element_ty), others)
                if MASTER:
                    tl.store(master_ptr + i * d + o, other, others)
                if W_bf16_ptr is not None:
                    tl.store(W_bf16_ptr + i * d + o, other.to(tl.bfloat16), others)
        tl.store(W_ptr + at, theta.to(W_ptr.dtype.element_ty), inside)
        if MASTER:
            tl.store(master_ptr + at, theta, inside)
        if W_bf16_ptr is not None:
            rounded = theta.to(tl.bfloat16)
            tl.store(W_bf16_ptr + at, rounded, inside)
            if norms_ptr is not None:
                rounded = rounded.to(tl.float32)
                lost = theta - rounded
                size, of_lost, of_rounded = norms_above(
                    tl.sum(theta * theta, axis=0), tl.sum(lost * lost, axis=0),
                    tl.sum(rounded * rounded, axis=0), d,
                )  # fmt: skip
                tl.store(norms_ptr + i, size)
                tl.store(norms_ptr + F + i, of_lost)
                tl.store(norms_ptr + 2 * F + i, of_rounded)


@triton.jit
def grad_sq_kernel(
    coefficients, offsets, order, rows, row_of, pieces, ks, scales_ptr, centre_ptr,
    grad_dot_w_ptr, W_ptr,
    out_ptr,  # [F] float64
    d, columns, start,
    GROUPS: tl.constexpr, CENTRE: tl.constexpr, PROJECT: tl.constexpr,
    CUT: tl.constexpr, BLOCK: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    square = tl.full((), 0.0, tl.float64)
    if finite(scales_ptr, GROUPS):
        c = tl.arange(0, BLOCK)
        centre = _centre(centre_ptr, c, columns, CENTRE, BLOCK)
        g = _gradient(
            coefficients, offsets, order, rows, row_of, pieces, ks, scales_ptr, centre, i, c,
            columns, GROUPS, True, CUT, BLOCK,
        )  # fmt: skip
        if PROJECT:
            along = _along(tl.load(grad_dot_w_ptr + i), _square_of_row(W_ptr, i, d, BLOCK_D))
            g -= along * tl.load(W_ptr + i * d + start + c, c < columns, 0.0).to(tl.float32)
        wide = tl.where(c < columns, g, 0.0).to(tl.float64)
        square = tl.sum(wide * wide, axis=0)
    tl.store(out_ptr + i, square)


@triton.jit
def weight_kernel(
    coefficients, offsets, order, rows, row_of, pieces, ks,
    out_ptr,  # [F, columns] T
    columns,
    CUT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    g = _gradient(
        coefficients, offsets, order, rows, row_of, pieces, ks, out_ptr,
        tl.zeros((BLOCK,), tl.float32), i, c, columns, 1, False, CUT, BLOCK,
    )  # fmt: skip
    tl.store(out_ptr + i * columns + c, g.to(out_ptr.dtype.element_ty), c < columns)


@triton.jit
def centre_kernel(
    W_ptr,  # [F, d] T
    sums_ptr,  # [F] float32
    shares_ptr,  # [shares, d] float32
    F, d, share,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """W.T @ sums over one share of the latents. Rows with sum 0 are not read."""
    first = tl.program_id(0) * share
    last = tl.minimum(first + share, F)
    c = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(first, last, ROWS):
        i = start + tl.arange(0, ROWS)
        s = tl.load(sums_ptr + i, i < last, 0.0)
        inside = (s != 0)[:, None] & (c < d)[None, :]
        w = tl.load(W_ptr + i.to(tl.int64)[:, None] * d + c[None, :], inside, 0.0).to(tl.float32)
        total += tl.where(inside, s[:, None] * w, 0.0)
    here = shares_ptr + tl.program_id(0).to(tl.int64) * d
    tl.store(here + c, tl.sum(total, axis=0), c < d)


@triton.jit
def centre_sum_kernel(
    shares_ptr, scales_ptr,
    out_ptr,  # [d] float32
    d, shares,
    GROUPS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros((COLUMNS,), tl.float32)
    if finite(scales_ptr, GROUPS):
        for s in range(shares):
            total += tl.load(shares_ptr + s * d + c, c < d, 0.0)
    tl.store(out_ptr + c, total, c < d)


class Groups:
    """Terms of the loss: codes grouped by latent, rows, and the pieces of their long segments."""

    def __init__(
        self,
        coefficients: Sequence[Tensor],  # G of [N, k_g]
        offsets: Sequence[Tensor],  # G of [F+1] int32
        order: Sequence[Tensor],  # G of [N*k_g] int32
        rows: Sequence[Tensor],  # G of [N, columns]
        scales: Tensor | None,  # [G] float32
        centre: Tensor | None,  # [columns]
        row_of: Sequence[Tensor] | None = None,  # G of [N_g*k_g] int32
    ) -> None:
        F, columns = offsets[0].numel() - 1, rows[0].shape[1]
        ks = tuple(max(c.shape[1], 1) for c in coefficients)
        of = (None,) * len(ks) if row_of is None else tuple(row_of)
        pieces = []
        block = min(512, triton.next_power_of_2(max(columns, 1)))
        for g, (c, off, o, r) in enumerate(zip(coefficients, offsets, order, rows, strict=True)):
            units = triton.cdiv(o.numel(), CUT)
            piece = torch.empty(units, 2, columns, dtype=torch.float32, device=r.device)
            pieces.append(piece)
            if piece.numel():
                pieces_kernel[units, 2, triton.cdiv(columns, block)](
                    c, off, o, r, of[g], off if scales is None else scales[g:],
                    r if centre is None else centre, piece, F, ks[g], columns, F.bit_length(),
                    CENTRE=centre is not None, SCALED=scales is not None, CUT=CUT, BLOCK=block,
                    num_warps=warps(block),
                )  # fmt: skip
        self.columns, self.count = columns, len(ks)
        self.arguments = (
            tuple(coefficients), tuple(offsets), tuple(order), tuple(rows), of, tuple(pieces), ks
        )  # fmt: skip


def warps(block: int) -> int:
    """16 numbers of a vector of `block` in a thread, until there are 16 warps."""
    return max(1, min(16, block // 512))


def blocks(columns: int, d: int) -> tuple[int, int]:
    """Of the columns that are updated, and of a whole row."""
    return triton.next_power_of_2(max(columns, 1)), triton.next_power_of_2(max(d, 1))


def centre_gradient(W: Tensor, sums: Tensor, scales: Tensor, groups: int, out: Tensor) -> None:
    """W.T @ sums, [d]; zeros where a scale is not finite."""
    F, d = W.shape
    share = triton.cdiv(F, SHARES)
    shares = triton.cdiv(F, share)
    parts = torch.empty(shares, d, dtype=torch.float32, device=W.device)
    slices = triton.cdiv(d, COLUMNS)
    centre_kernel[shares, slices](W, sums, parts, F, d, share, ROWS=ROWS, COLUMNS=COLUMNS)
    centre_sum_kernel[(slices,)](parts, scales, out, d, shares, GROUPS=groups, COLUMNS=COLUMNS)


def weight_gradient(groups: Groups, out: Tensor, value_sum: Tensor) -> None:
    """The gradient [F, columns] alone, of one group without scale, and its sum of values [F]."""
    F = out.shape[0]
    block = min(512, triton.next_power_of_2(max(groups.columns, 1)))
    values, offsets, order, *_ = groups.arguments
    weight_kernel[F, max(triton.cdiv(groups.columns, block), 1)](
        *groups.arguments, out, groups.columns, CUT=CUT, BLOCK=block, num_warps=warps(block)
    )
    value_sums(values, offsets, order, value_sum)
