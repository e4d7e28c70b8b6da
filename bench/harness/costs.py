# SPDX-License-Identifier: Apache-2.0
"""What each op must move and compute, by formula, and the ceilings of this machine, by measuring;
the passes over latents: ../suites/latents.py.

Bytes count each tensor of an op once: read once, written once, both for what is updated in place.
Rows that are gathered count once for each row that is touched. An op's fraction of its ceiling is
max(bytes / copy bandwidth, flops / product rate) over the time taken; inputs that stay in a cache
can be faster than that.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

F32, I32, I64 = 4, 4, 8


@dataclass(frozen=True)
class Cost:
    bytes: float = 0
    flops: float = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.bytes + other.bytes, self.flops + other.flops)

    def seconds(self, ceilings: Ceilings, product: float) -> float:
        """The floor of the time, with `product` flop/s for the arithmetic."""
        return max(self.bytes / ceilings.copy, self.flops / product)


def touched(N: int, F: int, k: int) -> float:
    """Expected number of latents chosen at least once if all are equally likely."""
    return F * (1 - (1 - k / F) ** N)


def topk(N: int, F: int, k: int, s: int = F32) -> Cost:
    return Cost(N * F * s + N * k * (s + I64))


def topk_encode(N: int, d: int, F: int, k: int, s: int = F32) -> Cost:
    return Cost((N * d + F * d + F + d) * s + N * k * (s + I64), 2 * N * F * d)


def grad_topk_encode(N: int, d: int, F: int, k: int, s: int = F32) -> Cost:
    """Both products in full; pruning leaves a part of the second out."""
    return topk_encode(N, d, F, k, s) + Cost((N * d + F * d) * s, 2 * N * F * d)


def topk_encode_aux(N: int, d: int, F: int, k: int, k_aux: int, s: int = F32) -> Cost:
    """Two selections from one product."""
    return topk_encode(N, d, F, k, s) + Cost(N * k_aux * (s + I64) + F)


def sparse_decode(N: int, d: int, F: int, k: int, s: int = F32) -> Cost:
    read = N * k * (s + I64) + (touched(N, F, k) * d + d) * s
    return Cost(read + N * d * s, 2 * N * k * d)


def sparse_residual(N: int, d: int, F: int, k: int, s: int = F32) -> Cost:
    """Residual, its row sums of squares, and the gradient of the values."""
    read = N * k * (s + I64) + (touched(N, F, k) * d + d + N * d) * s
    written = N * d * F32 + N * 8 + N * k * F32
    return Cost(read + written, 4 * N * k * d + 3 * N * d)


def residual_slice(N: int, d: int, F: int, k: int, columns: int, s: int = F32) -> Cost:
    """`columns` of d columns of the residual."""
    read = N * k * (s + I64) + (touched(N, F, k) + 1 + N) * columns * s
    return Cost(read + N * columns * F32, 2 * N * k * columns + N * columns)


def prefix_residual(N: int, d: int, F: int, k: int, prefixes: int, s: int = F32) -> Cost:
    """The residuals of all prefixes, their row sums of squares, and the gradient of the values."""
    plain = sparse_residual(N, d, F, k, s)
    more = (prefixes - 1) * N
    return plain + Cost(more * (d * F32 + 8), 4 * more * d)


def prefix_slice(N: int, d: int, F: int, k: int, prefixes: int, columns: int, s: int = F32) -> Cost:
    """`columns` of d columns of the residuals of all prefixes."""
    more = (prefixes - 1) * N * columns
    return residual_slice(N, d, F, k, columns, s) + Cost(more * F32, 2 * more)


def topk_backward(N: int, F: int, k: int, s: int = F32) -> Cost:
    """The gradient of the scores is a matrix of zeros with k entries a row."""
    return Cost(N * k * (s + I64) + N * F * s)


def topk_encode_backward(N: int, d: int, F: int, k: int, s: int = F32) -> Cost:
    """Gradients of x, both biases and W_enc from those of the values."""
    return backward_values(N, d, F, k, s) + backward_weight(N, d, F, k, s) + Cost(d * s, N * d)


def backward_values(N: int, d: int, F: int, k: int, s: int = F32) -> Cost:
    read = N * d * s + N * k * I64 + touched(N, F, k) * d * s
    return Cost(read + N * k * s, 2 * N * k * d)


def backward_weight(N: int, d: int, F: int, k: int, s: int = F32) -> Cost:
    return Cost(N * d * s + N * k * (s + I64) + (F * d + F) * s, 2 * N * k * d)


def group_by_latent(N: int, F: int, k: int, s: int = F32) -> Cost:
    return Cost(N * k * (s + I64) + (F + 1) * I32 + N * k * I32)


def adam(parameters: float, s: int = F32) -> Cost:
    """Parameter (or master) and two moments read and written, a rounded copy written."""
    return Cost(parameters * (6 * F32 + (0 if s == F32 else s)), 12 * parameters)


def total_variance(N: int, d: int, s: int = F32) -> Cost:
    return Cost(N * d * s + F32, 4 * N * d)


def loss_terms(N: int, terms: int = 1) -> Cost:
    """Squared errors of each token, and a few numbers a term."""
    return Cost(terms * (N * 8 + 4 * F32) + F32, terms * N)


def adam_scalars(scales: int = 1) -> Cost:
    return Cost((2 + 8 + 2 * scales) * F32 + 5 * 8 + 1, 20)


def count_tokens(F: int) -> Cost:
    return Cost(F * 16 + (F + 1) * 4 + 2 * F32 + 8, 3 * F)


def vector_update(size: float, s: int = F32) -> Cost:
    """One gradient, and Adam."""
    return Cost(size * F32) + adam(size, s)


def growth(op: str, N: int, d: int, F: int, k: int) -> Cost:
    """What the time of a part of a step grows with, every gathered row counted each time.

    encode ~ N d F; decode ~ N k d; the rest, which gathers N k rows for the residual, the values'
    gradient and both weights' gradients and moves both matrices with their moments, ~ N k d + F d.
    """
    gathered = N * k * d * F32
    if op == "topk_encode":
        return Cost(0, 2 * N * d * F)
    if op == "sparse_decode":
        return Cost(gathered + N * d * F32)
    return Cost(4 * gathered) + adam(2 * F * d)


@dataclass(frozen=True)
class Ceilings:
    """bytes/s of a large copy, read + written; flop/s of torch.mm; of our own fp32 product if there
    is an entry to it (native.encode_product)."""

    copy: float
    mm_fp32: float
    mm_bf16: float
    own_fp32: float | None

    def product(self, dtype: torch.dtype, screened: bool = False) -> float:
        """What an encoder in `dtype` can hope for; a screened one computes its scores in bf16."""
        if dtype == torch.float32 and not screened:
            return max(self.mm_fp32, self.own_fp32 or 0)
        return max(self.mm_bf16, self.mm_fp32)

    def __str__(self) -> str:
        own = "no entry" if self.own_fp32 is None else f"{self.own_fp32 / 1e9:.0f} GFLOP/s"
        return (
            f"ceilings here: copy {self.copy / 1e9:.1f} GB/s read + written, torch.mm "
            f"{self.mm_fp32 / 1e9:.0f} GFLOP/s fp32 and {self.mm_bf16 / 1e9:.0f} bf16, "
            f"own fp32 microkernel {own}"
        )


def ceilings(
    N: int = 2048, d: int = 768, F: int = 24576, rounds: int = 5, copied: int = 2**26
) -> Ceilings:
    """Measured now, the best of `rounds`: run it beside the timings it explains.

    `copied`: floats of the copy; the default's 256 MB are far beyond any cache.
    """
    from ksae.backends import cpu as native

    source = torch.randn(copied)
    target = torch.zeros_like(source)
    copy = 2 * source.nbytes / _best(lambda: target.copy_(source), rounds)
    flops = 2 * N * d * F
    x, W = torch.randn(N, d), torch.randn(F, d)

    def product(dtype: torch.dtype) -> float:
        a, b, out = x.to(dtype), W.to(dtype), torch.zeros(N, F, dtype=dtype)
        return flops / _best(lambda: torch.mm(a, b.T, out=out), rounds)

    own = None
    if native.available():
        own = flops / _best(lambda: native.encode_product(x, W, screen=False), rounds)
    return Ceilings(copy, product(torch.float32), product(torch.bfloat16), own)


def _best(call: Callable[[], object], rounds: int) -> float:
    call()
    taken = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        taken.append(time.perf_counter() - start)
    return min(taken)
