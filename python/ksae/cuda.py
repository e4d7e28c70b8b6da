# SPDX-License-Identifier: Apache-2.0
"""Bridge from torch tensors to the CUDA kernels: the one place where tensors become pointers.

Each method of `Kernels` has the name, arguments and meaning of its reference; tensors come checked,
contiguous and in float32, bfloat16 or float16 (ops.py sees to it). Outputs and workspaces are
torch's; work goes to torch's current stream on the tensors' device. The products of encoding are
torch's, in chunks of rows.

Environment, read once at import: KSAE_NATIVE=0 leaves the native code out, KSAE_CHUNK_BYTES is the
memory that the scores of one chunk may take, 256 MiB if not set.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
chunk_bytes = int(os.environ.get("KSAE_CHUNK_BYTES", 256 << 20))


def _pointer(t: Tensor | None) -> int:
    return 0 if t is None else t.data_ptr()


class _Workspace:
    """Allocator for the native side; torch's caching allocator orders reuse by stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, size: int) -> int:
        self.memory = torch.empty(size + 256, dtype=torch.uint8, device=self.device)
        return (self.memory.data_ptr() + 255) & ~255


def _groups(
    coefficients: Sequence[Tensor],
    offsets: Sequence[Tensor],
    order: Sequence[Tensor],
    rows: Sequence[Tensor],
) -> list[tuple[int, int, int, int, int, int]]:
    return [
        (_pointer(f), _pointer(o), _pointer(c), _pointer(r), c.shape[1], c.numel())
        for c, f, o, r in zip(coefficients, offsets, order, rows, strict=True)
    ]


def _guard(t: Tensor) -> contextlib.AbstractContextManager[object]:
    return torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()


def _stream(t: Tensor) -> int:
    return torch.cuda.current_stream(t.device).cuda_stream if t.is_cuda else 0


def _scores(x: Tensor, W: Tensor) -> Tensor:
    """x @ W.T [rows, F] in float32, whatever torch may be allowed to do to float32 products."""
    if x.is_cuda and x.dtype != torch.float32:
        return torch.mm(x, W.T, out_dtype=torch.float32)
    return x.float() @ W.float().T


class Kernels:
    """The ops as the extension `module` computes them: `ksae._cuda`, or its emulation in tests."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module

    def _select(self, scores: Tensor, k: int, values: Tensor, indices: Tensor, bias: Tensor | None,
                mask: Tensor | None, relu: bool) -> None:  # fmt: skip
        rows, F = scores.shape
        with _guard(scores):
            self.module.select(
                rows, F, k, _DTYPES[scores.dtype], _DTYPES[values.dtype], _pointer(scores), 0, 0,
                0.0, _pointer(bias), 0, _pointer(mask), relu, _pointer(values), _pointer(indices),
                _Workspace(scores.device), _stream(scores),
            )  # fmt: skip

    def topk(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        values = x.new_empty(x.shape[0], k)
        indices = x.new_empty(x.shape[0], k, dtype=torch.int64)
        self._select(x, k, values, indices, None, None, False)
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
        N, F = x.shape[0], W_enc.shape[0]
        values, indices = x.new_empty(N, k), x.new_empty(N, k, dtype=torch.int64)
        xc = x if b_dec is None else x - b_dec
        rows = max(chunk_bytes // (4 * F), 1)
        for n in range(0, N, rows):
            part = slice(n, n + rows)
            scores = _scores(xc[part], W_enc)
            self._select(scores, k, values[part], indices[part], b_enc, mask, True)
            del scores  # before the next chunk's: one at a time
        return values, indices

    def sparse_decode(
        self, values: Tensor, indices: Tensor, W_dec: Tensor, b_dec: Tensor | None = None
    ) -> Tensor:
        (N, k), (F, d) = values.shape, W_dec.shape
        out = values.new_empty(N, d)
        with _guard(values):
            self.module.sparse_decode(
                N, d, F, k, _DTYPES[values.dtype], _pointer(values), _pointer(indices),
                indices.element_size(), _pointer(W_dec), _pointer(b_dec), _pointer(out),
                _stream(values),
            )  # fmt: skip
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
    ) -> tuple[Tensor, Tensor, Tensor]:
        square = target.new_empty(values.shape[0], dtype=torch.float64)
        grads = target.new_empty(values.shape, dtype=torch.float32)
        code = (values, indices, W_dec, b_dec, target)
        residual = self._residual(*code, 0, columns, square, grads, column_sums)
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
    ) -> Tensor:
        return self._residual(values, indices, W_dec, b_dec, target, start, stop, None, None, None)

    def _residual(
        self,
        values: Tensor,
        indices: Tensor,
        W_dec: Tensor,
        b_dec: Tensor | None,
        target: Tensor,
        start: int,
        stop: int,
        sq_error: Tensor | None,
        grad_values: Tensor | None,
        column_sums: Tensor | None,
    ) -> Tensor:
        (N, k), (F, d) = values.shape, W_dec.shape
        residual = target.new_empty(N, stop - start, dtype=torch.float32)
        with _guard(values):
            self.module.sparse_residual(
                N, d, F, k, _DTYPES[values.dtype], _pointer(values), _pointer(indices),
                indices.element_size(), _pointer(W_dec), _pointer(b_dec), _pointer(target),
                target.dtype == torch.float32, start, stop - start, _pointer(residual),
                _pointer(sq_error), _pointer(grad_values), _pointer(column_sums),
                _Workspace(values.device),
                _stream(values),
            )  # fmt: skip
        return residual

    def sparse_decode_backward_values(self, grad: Tensor, indices: Tensor, W_dec: Tensor) -> Tensor:
        (N, k), (F, d) = indices.shape, W_dec.shape
        out = grad.new_empty(N, k)
        with _guard(grad):
            self.module.sparse_decode_backward_values(
                N, d, F, k, _DTYPES[grad.dtype], _pointer(grad), _pointer(indices),
                indices.element_size(), _pointer(W_dec), _pointer(out), _stream(grad),
            )  # fmt: skip
        return out

    def group_by_latent(self, values: Tensor, indices: Tensor, F: int) -> tuple[Tensor, Tensor]:
        N, k = values.shape
        offsets = values.new_empty(F + 1, dtype=torch.int32)
        order = values.new_empty(N * k, dtype=torch.int32)
        with _guard(values):
            self.module.group_by_latent(
                N, F, k, _DTYPES[values.dtype], _pointer(values), _pointer(indices),
                indices.element_size(), _pointer(offsets), _pointer(order),
                _Workspace(values.device), _stream(values),
            )  # fmt: skip
        return offsets, order

    def sparse_decode_backward_weight(
        self, grad: Tensor, values: Tensor, indices: Tensor, F: int
    ) -> tuple[Tensor, Tensor]:
        (N, d), k = grad.shape, values.shape[1]
        grad_W, value_sum = grad.new_empty(F, d), grad.new_empty(F)
        offsets, order = self.group_by_latent(values, indices, F)
        with _guard(grad):
            self.module.sparse_decode_backward_weight(
                N, d, F, k, _DTYPES[grad.dtype], _pointer(grad), _pointer(values),
                _pointer(offsets), _pointer(order), _pointer(grad_W), _pointer(value_sum),
                _Workspace(grad.device), _stream(grad),
            )  # fmt: skip
        return grad_W, value_sum

    def latent_sums(
        self,
        values: Sequence[Tensor],
        grads: Sequence[Tensor],
        offsets: Sequence[Tensor],
        order: Sequence[Tensor],
        scales: Tensor,
    ) -> tuple[Tensor, Tensor]:
        F = offsets[0].numel() - 1
        grad_b_enc, parallel = scales.new_empty(F), scales.new_empty(F)
        with _guard(scales):
            self.module.latent_sums(
                F, _DTYPES[values[0].dtype], _groups(values, offsets, order, grads),
                _pointer(scales), _pointer(grad_b_enc), _pointer(parallel),
                _Workspace(scales.device), _stream(scales),
            )  # fmt: skip
        return grad_b_enc, parallel

    def row_grad_sq(
        self,
        coefficients: Sequence[Tensor],
        offsets: Sequence[Tensor],
        order: Sequence[Tensor],
        rows: Sequence[Tensor],
        scales: Tensor,
        centre: Tensor | None,
        parallel: Tensor | None,
        W: Tensor,
        start: int,
    ) -> Tensor:
        F, d = W.shape
        grad_sq = scales.new_empty(F, dtype=torch.float64)
        with _guard(W):
            self.module.row_grad_sq(
                F, d, start, rows[0].shape[1], _DTYPES[W.dtype], rows[0].dtype == W.dtype,
                _groups(coefficients, offsets, order, rows), _pointer(scales), _pointer(centre),
                _pointer(parallel), _pointer(W), _pointer(grad_sq), _Workspace(W.device),
                _stream(W),
            )  # fmt: skip
        return grad_sq

    def row_update(
        self,
        coefficients: Sequence[Tensor],
        offsets: Sequence[Tensor],
        order: Sequence[Tensor],
        rows: Sequence[Tensor],
        scales: Tensor,
        centre: Tensor | None,
        parallel: Tensor | None,
        grad_b_enc: Tensor | None,
        W: Tensor,
        master: Tensor | None,
        m: Tensor,
        v: Tensor,
        hyper: Tensor,
        grad_b_dec: Tensor | None,
        start: int,
        normalize: bool,
        shadow: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> None:
        F, d = W.shape
        with _guard(W):
            self.module.row_update(
                F, d, start, rows[0].shape[1], _DTYPES[W.dtype], rows[0].dtype == W.dtype,
                _groups(coefficients, offsets, order, rows), _pointer(scales), _pointer(centre),
                _pointer(parallel), _pointer(grad_b_enc), _pointer(grad_b_dec), _pointer(W),
                _pointer(master), _pointer(m), _pointer(v), _pointer(hyper), normalize,
                _pointer(shadow), _pointer(noise), _Workspace(W.device), _stream(W),
            )  # fmt: skip


def _load() -> tuple[Kernels | None, str]:
    """The kernels, or why there are none. Asks the driver for a device, but opens none."""
    if os.environ.get("KSAE_NATIVE", "1") == "0":
        return None, "left out by KSAE_NATIVE=0"
    try:
        from . import _cuda
    except ImportError as error:
        return None, f"not importable: {error}"
    if torch.version.cuda is None:
        return None, f"torch {torch.__version__} is built without CUDA"
    try:
        devices = _cuda.device_count()
    except RuntimeError as error:
        return None, str(error)
    return (Kernels(_cuda), "") if devices else (None, "no CUDA device")


kernels, reason = _load()
