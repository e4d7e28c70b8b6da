# SPDX-License-Identifier: Apache-2.0
"""Encoding on GPUs by torch's product in chunks of rows, each with an exact selection after it.

Whose selection it is, CUDA's or Triton's, a subclass says.

Scores of a chunk take 1 GiB, or so much more as CHUNK_ROWS rows need: each chunk reads W_enc once
more and costs two launches, and with fewer rows a selection does not fill the device. Where half of
the free memory is less, which 256 MiB do not ask, rows are halved until they fit. Two products take
twice that: chunks have the same rows then, so that a row without a gradient gives topk_encode's
bits.

Environment, read once at import: KSAE_CHUNK_BYTES is the memory that the scores of one chunk may
take, in place of all this.
"""

from __future__ import annotations

import importlib.util
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from .. import env
from ..reference.encode import refuse_entries
from .bridge import guard

chunk_bytes = int(env.read("KSAE_CHUNK_BYTES") or 0)  # 0: as many as is wise
CHUNK_BYTES, SMALL_CHUNK, CHUNK_ROWS = 1 << 30, 256 << 20, 2048
MAX_SCREENED = 1024
_free: dict[torch.device, int] = {}


def tf32_allowed() -> bool:
    """Whether torch may multiply float32 on CUDA as TF32, by whichever of its two settings."""
    return torch.backends.cuda.matmul.fp32_precision not in ("none", "ieee")


def product(a: Tensor, b: Tensor) -> Tensor:
    """a [M, K] @ b [K, N] in float32, of any dtype of both; never TF32, nor rounded between.

    The process's settings stay as they are: where they allow TF32, a Triton kernel multiplies.
    """
    if a.dtype == torch.float64:
        return a @ b
    if a.is_cuda and a.dtype == b.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    a, b = a.float(), b.float()
    if a.is_cuda and tf32_allowed():
        return _without_tf32(a, b)
    return torch.mm(a, b)


def _without_tf32(a: Tensor, b: Tensor) -> Tensor:
    if importlib.util.find_spec("triton") is None:
        raise RuntimeError(
            "ksae: float32 products must be of float32 accuracy, got a process that allows TF32 and"
            " has no Triton to multiply with: torch.set_float32_matmul_precision('highest'), or"
            " install triton"
        )
    from ..kernels.product import float32_product

    with guard(a):
        return float32_product(a, b)


def _scores(x: Tensor, W: Tensor) -> Tensor:
    """x @ W.T [rows, F] in float32, never TF32."""
    try:
        return product(x, W.T)
    except torch.OutOfMemoryError as error:
        rows, F = len(x), len(W)
        smaller = max(rows // 2, 1)
        raise torch.OutOfMemoryError(
            f"encode: the scores of a chunk [{rows}, {F}] take {4 * rows * F} bytes on {x.device},"
            f" which are not free: KSAE_CHUNK_BYTES={4 * smaller * F} makes chunks of {smaller}"
            f" rows ({str(error).splitlines()[0]})"
        ) from error


def _largest_places(u: Tensor, E: int) -> Tensor:
    """Ascending places of the E largest of u [M], of equal ones the first; all if M <= E."""
    if len(u) <= E:
        return torch.arange(len(u), device=u.device)
    bar = u.topk(E).values[-1]  # NaN is largest
    level = (u == bar) | (u.isnan() & bar.isnan())
    above = ~(u <= bar) & ~bar.isnan()
    chosen = above | (level & (level.cumsum(0) <= E - above.sum()))
    return chosen.nonzero()[:, 0]


def _rows_of_chunk(N: int, F: int, device: torch.device | None = None) -> int:
    """Rows whose scores are held at once. Chunks are about equally long: a last one of two rows
    would cost the launches of a whole one. Full tiles of the product, where there is room."""
    most = max((chunk_bytes or CHUNK_BYTES) // (4 * F), 1)
    if not chunk_bytes:
        most = max(min(N, max(most, CHUNK_ROWS)), 1)
        if device is not None and device.type == "cuda" and 4 * F * most > SMALL_CHUNK:
            room = _free_memory(device) // 2
            while most > 1 and 4 * F * most > room:
                most //= 2
    chunks = max(-(-N // most), 1)
    even = -(-N // chunks)
    return max(min(most, -(-even // 128) * 128), 1)


def _free_memory(device: torch.device) -> int:
    """Bytes that torch can still allocate: the device's, and what it holds and does not use. While
    a graph is captured, what was free when the question was last asked."""
    if not torch.cuda.is_current_stream_capturing():
        held = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        _free[device] = int(torch.cuda.mem_get_info(device)[0]) + held
    return _free.get(device, CHUNK_BYTES)


def pays(k: int, F: int) -> bool:
    """Whether it pays to screen for k of F: 2 k float32 scores a row, which are gathers at the rate
    of the memory, must cost less than F at the rate of float32 products. On H100 and H200 by their
    ceilings up to F / 46; no more than a block sorts."""
    return k <= MAX_SCREENED and 64 * k <= F


class _Downstream(NamedTuple):
    """What a gradient-aware score adds to the pre-activations."""

    grad: Tensor  # [N, d_out]
    W_dec: Tensor  # [F, d_out]
    beta: float
    mode: str

    @property
    def counts(self) -> bool:
        """Whether the scores differ from the pre-activations."""
        return self.beta > 0 or self.mode == "multiplicative"


class Screen(Protocol):
    """The selection of one screened encode, whose bf16 product comes in chunks of rows."""

    def select(self, scores: Tensor, first: int) -> None:
        """Take in scores [rows, F] float32, without biases, of the rows from `first` on."""

    def result(self) -> tuple[Tensor, Tensor]:
        """Values [N, k] float32 and indices [N, k] int64, when all scores were taken in."""

    def redone(self) -> Tensor:
        """After that: the rows that had no proof and were scored in full, in any order."""


class Encode(ABC):
    """The ops that encode. Names, arguments and meaning are the reference's. Those that begin with
    `screened_` screen float32 with bf16 products; the others screen nothing, and do not read bf16
    copies."""

    @abstractmethod
    def _select(
        self,
        scores: Tensor,  # [rows, F] T or float32
        k: int,
        values: Tensor,  # [rows, k] T, written
        indices: Tensor,  # [rows, k] int64, written
        bias: Tensor | None = None,  # [F] T
        columns: Tensor | None = None,  # of _list_columns
        relu: bool = False,
        second: Tensor | None = None,  # [rows, F] as scores
        mode: str | None = None,
        beta: float = 0.0,
        informed: Tensor | None = None,  # [rows] bool: False: second does not count
    ) -> None:
        """The k largest of each row."""

    @abstractmethod
    def _list_columns(self, mask: Tensor) -> Tensor:
        """mask [F] bool in the form in which `_select` takes it."""

    @abstractmethod
    def bf16_copy(self, W: Tensor) -> tuple[Tensor, Tensor]:
        """Of rows W [F, d] float32 a copy in bfloat16 and [3, F] float32 what bounds its error."""

    @abstractmethod
    def _screen(
        self,
        x: Tensor,  # [N, d] float32, centred
        W_enc: Tensor,  # [F, d] float32
        b_enc: Tensor,  # [F] float32
        x_norms: Tensor,  # [3, N] of bf16_copy
        w_norms: Tensor,  # [3, F] of bf16_copy
        k: int,
        mask: Tensor | None,  # [F] bool
        capacity: int = 0,  # latents of a row that are scored before it counts as one without proof
    ) -> Screen:
        """How chunks of scores become the float32 selection."""

    def _encode(
        self,
        x: Tensor,  # [N, d]
        W_enc: Tensor,  # [F, d]
        b_enc: Tensor,  # [F]
        b_dec: Tensor | None,  # [d]
        wanted: Sequence[tuple[int, Tensor | None]],  # k and mask [F] of each selection
        downstream: _Downstream | None = None,  # of the first selection
    ) -> list[Tensor]:
        """Values [N, k] and indices [N, k] of each selection; all share one product."""
        N, F = x.shape[0], W_enc.shape[0]
        out = [x.new_empty(N, k, dtype=T) for k, _ in wanted for T in (x.dtype, torch.int64)]
        columns = [None if mask is None else self._list_columns(mask) for _, mask in wanted]
        xc = x if b_dec is None else x - b_dec
        informed = None
        if downstream is not None and not downstream.counts:
            downstream = None
        if downstream is not None:
            g = downstream.grad
            informed = (g != 0).any(1) & g.isfinite().all(1)  # [N]
        rows = _rows_of_chunk(N, F, x.device)
        for n in range(0, N, rows):
            part = slice(n, n + rows)
            scores, second = _scores(xc[part], W_enc), None
            score: dict[str, Any] = {}
            if downstream is not None and informed is not None:
                second = _scores(downstream.grad[part], downstream.W_dec)
                score = {"mode": downstream.mode, "beta": downstream.beta}
                score |= {"second": second, "informed": informed[part]}
            for i, (k, _) in enumerate(wanted):
                values, indices = out[2 * i][part], out[2 * i + 1][part]
                own = score if i == 0 else {}
                self._select(scores, k, values, indices, b_enc, columns[i], True, **own)
            del scores, second, score, own  # before the next chunk's: one at a time
        return out

    def topk(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        values = x.new_empty(x.shape[0], k)
        indices = x.new_empty(x.shape[0], k, dtype=torch.int64)
        self._select(x, k, values, indices)
        return values, indices

    def topk_encode(
        self,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        k: int,
        b_dec: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        values, indices = self._encode(x, W_enc, b_enc, b_dec, [(k, mask)])
        return values, indices

    def screened_topk_encode(
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
        """`topk_encode` of float32 at the price of a bf16 product and 2 k float32 scores a row."""
        values, indices = self._screened(x, W_enc, b_enc, b_dec, [(k, mask)], W_bf16, norms)
        return values, indices

    def _screened(
        self,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        b_dec: Tensor | None,
        wanted: Sequence[tuple[int, Tensor | None]],
        W_bf16: Tensor | None,
        norms: Tensor | None,
    ) -> list[Tensor]:
        """As `_encode`, with one product of bf16 copies for all selections."""
        N = x.shape[0]
        if N == 0:
            return [x.new_empty(0, k, dtype=T) for k, _ in wanted for T in (x.dtype, torch.int64)]
        if W_bf16 is None or norms is None:
            W_bf16, norms = self.bf16_copy(W_enc)
        xc = x if b_dec is None else x - b_dec
        rounded, x_norms = self.bf16_copy(xc)
        with guard(x):
            screens = [self._screen(xc, W_enc, b_enc, x_norms, norms, *of) for of in wanted]
            rows = _rows_of_chunk(N, len(W_enc), x.device)
            for n in range(0, N, rows):
                scores = _scores(rounded[n : n + rows], W_bf16)
                for screen in screens:
                    screen.select(scores, n)
                del scores  # before the next chunk's: one at a time
            return [t for screen in screens for t in screen.result()]

    def screened_topk_encode_aux(
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
        """`topk_encode_aux`, each selection of pre-activations screened where so few are chosen
        that it pays; both share the product then."""
        graded, few = grad is not None and W_dec is not None, pays(k_aux, W_enc.shape[0])
        wanted = [(k, None)] * (not graded) + [(k_aux, dead)] * few
        found = self._screened(x, W_enc, b_enc, b_dec, wanted, W_bf16, norms) if wanted else []
        if grad is not None and W_dec is not None:
            by_score = self.grad_topk_encode(x, grad, W_enc, b_enc, W_dec, k, beta, mode, b_dec)
            found = [*by_score, *found]
        if not few:
            found += self.topk_encode(x, W_enc, b_enc, k_aux, b_dec, dead)
        values, indices, aux_values, aux_indices = found
        return values, indices, aux_values, aux_indices

    def grad_topk_encode(
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
        downstream = _Downstream(grad, W_dec, beta, mode)
        values, indices = self._encode(x, W_enc, b_enc, b_dec, [(k, None)], downstream)
        return values, indices

    def topk_encode_aux(
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
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        downstream = None
        if grad is not None and W_dec is not None:
            downstream = _Downstream(grad, W_dec, beta, mode)
        wanted = [(k, None), (k_aux, dead)]
        values, indices, *aux = self._encode(x, W_enc, b_enc, b_dec, wanted, downstream)
        return values, indices, aux[0], aux[1]

    def batch_topk_encode(
        self, x: Tensor, W_enc: Tensor, b_enc: Tensor, k: int, b_dec: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The best so far of one chunk of rows after the other; waits for the device at each."""
        (N, _), F = x.shape, W_enc.shape[0]
        xc, bias = x if b_dec is None else x - b_dec, b_enc.float()
        best = torch.empty(0, device=x.device)
        places = torch.empty(0, dtype=torch.int64, device=x.device)  # n * F + i, ascending
        rows = _rows_of_chunk(N, F, x.device)
        for n in range(0, N, rows):
            u = _scores(xc[n : n + rows], W_enc).add_(bias).reshape(-1)
            at = _largest_places(u, N * k)
            u, at = torch.cat([best, u[at]]), torch.cat([places, n * F + at])
            kept = _largest_places(u, N * k)
            best, places = u[kept], at[kept]
        row_offsets = torch.zeros(N + 1, dtype=torch.int64, device=x.device)
        row_offsets[1:] = torch.searchsorted(places, F * torch.arange(1, N + 1, device=x.device))
        return torch.where(best <= 0, 0, best).to(x.dtype), places % F, row_offsets

    def threshold_encode(
        self, x: Tensor, W_enc: Tensor, b_enc: Tensor, theta: Tensor, b_dec: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Waits for the device once a chunk of rows, whose number of entries it has to know."""
        xc = x if b_dec is None else x - b_dec
        bias, bar = b_enc.float(), theta.float()
        counts = [torch.zeros(1, dtype=torch.int64, device=x.device)]
        values, latents = [x.new_empty(0)], [counts[0][:0]]
        rows = _rows_of_chunk(x.shape[0], W_enc.shape[0], x.device)
        for n in range(0, x.shape[0], rows):
            u = _scores(xc[n : n + rows], W_enc).add_(bias)
            chosen = u > bar
            at = chosen.nonzero(as_tuple=True)
            counts.append(chosen.sum(1))
            values.append(u[at].to(x.dtype))
            latents.append(at[1])
        refuse_entries(sum(map(len, latents)))
        return torch.cat(values), torch.cat(latents), torch.cat(counts).cumsum(0)
