# SPDX-License-Identifier: Apache-2.0
"""Adam of a dense parameter: biases, and the matrix of a skip connection.

Bytes a number: 4 a gradient, 16 of moments, 8 of float32 parameters (10 to 12 with a master).
Portable Triton; run on no AMD GPU, and so far on no GPU: interpreted and compiled only.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 512


@triton.jit
def vector_kernel(
    grads,  # GRADS of [size] float32
    scales_ptr,  # [GRADS] or None
    minus_ptr,  # [size] or None
    taken_ptr,  # [] int8
    hyper_ptr,  # [8]
    p_ptr,  # [size] T
    master_ptr,  # [size] float32 or None
    m_ptr, v_ptr,  # [size] float32
    size,
    GRADS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    if tl.load(taken_ptr) != 0:
        i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
        inside = i < size
        g = tl.zeros((BLOCK,), tl.float32)
        for n in tl.static_range(GRADS):
            scale = 1.0
            if scales_ptr is not None:
                scale = tl.load(scales_ptr + n)
            g += scale * tl.load(grads[n] + i, inside, 0.0)
        if minus_ptr is not None:
            g -= tl.load(minus_ptr + i, inside, 0.0)
        g *= tl.load(hyper_ptr + 5)
        m = tl.load(hyper_ptr + 2) * tl.load(m_ptr + i, inside, 0.0) + tl.load(hyper_ptr + 6) * g
        v = tl.load(hyper_ptr + 3) * tl.load(v_ptr + i, inside, 0.0)
        v += tl.load(hyper_ptr + 7) * g * g
        root = tl.div_rn(tl.sqrt_rn(v), tl.load(hyper_ptr + 1)) + tl.load(hyper_ptr + 4)
        if master_ptr is not None:
            theta = tl.load(master_ptr + i, inside, 0.0)
        else:
            theta = tl.load(p_ptr + i, inside, 0.0).to(tl.float32)
        theta -= tl.div_rn(tl.load(hyper_ptr) * m, root)
        tl.store(m_ptr + i, m, inside)
        tl.store(v_ptr + i, v, inside)
        tl.store(p_ptr + i, theta.to(p_ptr.dtype.element_ty), inside)
        if master_ptr is not None:
            tl.store(master_ptr + i, theta, inside)


def vector_update(
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
    """As the reference, in place."""
    size = p.numel()
    if size:
        vector_kernel[(triton.cdiv(size, BLOCK),)](
            tuple(grads), scales, minus, taken.view(torch.int8), hyper, p, master, m, v, size,
            GRADS=len(grads), BLOCK=BLOCK,
        )  # fmt: skip
