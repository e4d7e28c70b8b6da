# SPDX-License-Identifier: Apache-2.0
"""The tile of the encoder product and what a score is made of.

Every kernel that needs a score calls `scores`: the same instruction, along d in steps of BLOCK_D.
So a score's bits depend on its row and latent alone, never on the path that asked for it. Sums are
float32. The N x F matrix never exists; a tile of it lives in registers.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .bound import margins


class Operands(NamedTuple):
    """What a score is made of. None leaves a term out of the compiled kernel."""

    x: Any  # [N, d]
    w: Any  # [F, d]
    b: Any  # [F]
    N: Any
    F: Any
    d: Any
    scale: Any = None  # [F] float32, factor of the pre-activation
    mask: Any = None  # [F] int8, zero: the score is -inf
    theta: Any = None  # [F] float32: the score of a pre-activation at or below it is -inf
    g: Any = None  # [N, d_out]
    w_dec: Any = None  # [F, d_out]
    informed: Any = None  # [N] int8, zero: a row scored by its pre-activations
    d_out: Any = None
    beta: Any = None
    x_norms: Any = None  # [3, N] float32, see bound.py
    w_norms: Any = None  # [3, F] float32


class Tile(NamedTuple):
    """Shape of a program's tile and how it runs."""

    n: int
    f: int
    d: int
    warps: int
    stages: int

    def meta(self) -> dict[str, int]:
        return {
            "BLOCK_N": self.n,
            "BLOCK_F": self.f,
            "BLOCK_D": self.d,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


# By bytes of an element, and whether a second number travels beside the score (a second product, a
# bound): it takes as many registers as the score. Not measured: chosen by the arithmetic of
# accumulators in registers and stages in shared memory, and so that nothing spills.
TILES = {
    (2, False): Tile(128, 128, 64, 8, 3),
    (2, True): Tile(128, 64, 64, 8, 3),
    (4, False): Tile(64, 64, 32, 4, 3),
    (4, True): Tile(64, 64, 32, 8, 3),
}
# Four warps leave room for a second program on a multiprocessor, whose product runs while this one
# looks for what passes.
HOPPER_TILES = TILES | {
    (2, False): Tile(128, 128, 64, 4, 3),
    (2, True): Tile(128, 64, 64, 4, 3),
}
# 128 x 128 spills on sm_100: its accumulators come back from tensor memory all at once.
BLACKWELL_TILES = TILES | {(2, False): TILES[2, True]}
INTERPRETED_TILE = Tile(16, 64, 32, 4, 1)
# The interpreter's bf16 product is wrong; operands are widened there. The product is the same.
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)


def capability(x: Tensor) -> int:
    """Major number of the compute capability of x's device."""
    return torch.cuda.get_device_capability(x.device)[0]


def tile_of(x: Tensor, carries: bool = False) -> Tile:
    """The tile for operands like x."""
    if INTERPRETED.value:
        return INTERPRETED_TILE
    tiles = {9: HOPPER_TILES, 10: BLACKWELL_TILES}.get(capability(x), TILES)
    return tiles[x.element_size(), carries]


@triton.jit
def _product(
    x_ptr,  # [*, d]
    w_ptr,  # [*, d]
    rows,  # [BLOCK_N], of x
    f,  # [BLOCK_F], of w
    d,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    acc = tl.zeros((BLOCK_N, BLOCK_F), tl.float32)
    c = tl.arange(0, BLOCK_D)
    x_rows = x_ptr + rows.to(tl.int64)[:, None] * d
    w_rows = w_ptr + f.to(tl.int64)[None, :] * d
    for start in range(0, d, BLOCK_D):
        inside = start + c < d
        x = tl.load(x_rows + (start + c)[None, :], inside[None, :], 0.0)
        w = tl.load(w_rows + (start + c)[:, None], inside[:, None], 0.0)
        if INTERPRETED:
            x = x.to(tl.float32)
            w = w.to(tl.float32)
        acc = tl.dot(x, w, acc, input_precision="ieee")
    return acc


@triton.jit
def scores(
    op,  # Operands
    rows,  # [BLOCK_N]
    f,  # [BLOCK_F]
    SCORE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Score and carried value [BLOCK_N, BLOCK_F] float32 of a tile.

    SCORE: "plain" both are the pre-activation u; "abs" |u|, u; a mode of grad_topk_encode: its
    score, u; "screen" an upper and a lower bound of u (see bound.py).
    Rows and latents beyond N and F are those at the end: what is loaded exists, and the caller
    drops the result.
    """
    rows = tl.minimum(rows, op.N - 1)
    f = tl.minimum(f, op.F - 1)
    u = _product(op.x, op.w, rows, f, op.d, BLOCK_N, BLOCK_F, BLOCK_D)
    b = tl.load(op.b + f).to(tl.float32)
    u += b[None, :]
    if op.scale is not None:
        u *= tl.load(op.scale + f)[None, :]
    s = u
    if SCORE == "abs":
        s = tl.abs(u)
    elif SCORE == "screen":
        m = margins(op, rows, f, b)
        s = u + m
        low = u - m
        u = tl.where(low == low, low, float("-inf"))
    elif SCORE != "plain":
        a = _product(op.g, op.w_dec, rows, f, op.d_out, BLOCK_N, BLOCK_F, BLOCK_D)
        if SCORE == "additive":
            height = 1 + op.beta * tl.abs(a)
        elif SCORE == "multiplicative":
            height = tl.abs(a)
        else:
            height = 1 + op.beta * tl.where(a > 0, 0.0, -a)  # a NaN stays
        informed = tl.load(op.informed + rows) != 0
        s = tl.where((u <= 0) | (informed == 0)[:, None], u, u * height)
    if op.theta is not None:
        s = tl.where(u <= tl.load(op.theta + f)[None, :], float("-inf"), s)
    if op.mask is not None:
        living = (tl.load(op.mask + f) != 0)[None, :]
        s = tl.where(living, s, float("-inf"))
        if SCORE == "screen":
            u = tl.where(living, u, float("-inf"))
    return s, u


@triton.jit
def float32_kernel(
    a_ptr,  # [M, K] float32
    b_ptr,  # [K, N] float32
    out_ptr,  # [M, N] float32
    M, N, K, a_row, a_column, b_row, b_column,
    BLOCK_N: tl.constexpr, BLOCK_F: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    columns = tl.cdiv(N, BLOCK_F)
    pid = tl.program_id(0)
    rows = (pid // columns * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    f = (pid % columns * BLOCK_F + tl.arange(0, BLOCK_F)).to(tl.int64)
    acc = tl.zeros((BLOCK_N, BLOCK_F), tl.float32)
    c = tl.arange(0, BLOCK_D).to(tl.int64)
    for start in range(0, K, BLOCK_D):
        inside = start + c < K
        a_here = rows[:, None] * a_row + (start + c)[None, :] * a_column
        b_here = (start + c)[:, None] * b_row + f[None, :] * b_column
        a = tl.load(a_ptr + a_here, (rows < M)[:, None] & inside[None, :], 0.0)
        b = tl.load(b_ptr + b_here, inside[:, None] & (f < N)[None, :], 0.0)
        acc = tl.dot(a, b, acc, input_precision="ieee")
    here = out_ptr + rows[:, None] * N + f[None, :]
    tl.store(here, acc, (rows < M)[:, None] & (f < N)[None, :])


def float32_product(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] @ b [K, N], both float32 with any strides, in float32: never TF32, whatever torch is
    allowed."""
    (M, K), N = a.shape, b.shape[1]
    out = a.new_empty(M, N)
    tile = tile_of(a, carries=True)  # eight warps: four spill for the strides
    if M and N:
        float32_kernel[(triton.cdiv(M, tile.n) * triton.cdiv(N, tile.f),)](
            a, b, out, M, N, K, *a.stride(), *b.stride(), **tile.meta()
        )
    return out
