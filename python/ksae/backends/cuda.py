# SPDX-License-Identifier: Apache-2.0
"""Bridge from torch tensors to the CUDA kernels: the one place where tensors become pointers.

Each method of `Kernels` has the name and meaning of its reference and names the arguments that it
serves; with others that are optional, the reference serves the call. An op that states its native
parameters itself has no method (bridge.py). Tensors come checked, contiguous and in float32,
bfloat16 or float16 (ksae.ops sees to it). Outputs and workspaces are torch's; work goes to torch's
current stream on the tensors' device.

Environment, read once at import: KSAE_NATIVE=0 leaves the native code out.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from .. import env
from ..reference.dtypes import MODES
from ..reference.group import rows_of
from . import bridge
from .bridge import DTYPES, guard, pointer
from .cuda_screen import Screened
from .driver import why_not_by_version
from .product import Encode, Screen

OLDEST = (8, 0)  # compute capability
_known: set[torch.device] = set()  # devices that have it


class _Workspace:
    """Allocator for the native side; torch's caching allocator orders reuse by stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def __call__(self, size: int) -> int:
        self.memory = torch.empty(size + 256, dtype=torch.uint8, device=self.device)
        return (self.memory.data_ptr() + 255) & ~255


def _entries(code: Tensor, table: Tensor | None) -> int | tuple[int]:
    """Entries a row, or their row offsets or rows, as the native side takes them."""
    return code.shape[1] if table is None else (pointer(table),)


def _stream(t: Tensor) -> int:
    return torch.cuda.current_stream(t.device).cuda_stream if t.is_cuda else 0


class Kernels(Encode):
    """The ops as the extension `module` computes them: `ksae._cuda`, or its emulation in tests."""

    def __init__(self, module: ModuleType) -> None:
        self.module = module

    def kernel(self, spec: Any) -> Callable[..., Any] | None:
        """The op of `spec` (ksae.ops.spec.Spec); None where there is no kernel."""
        fields = getattr(self.module, "fields", {}).get(spec.name)
        if fields is None:
            return getattr(self, spec.name, None)
        known = {"guard": guard, "Workspace": _Workspace, "stream": _stream}
        run = "with guard(like): call({values}, Workspace(like.device), stream(like))"
        return bridge.native(spec, fields, getattr(self.module, spec.name), run, known)

    def _select(
        self,
        scores: Tensor,  # [rows, F] T or float32
        k: int,
        values: Tensor,  # [rows, k] T, written
        indices: Tensor,  # [rows, k] int64, written
        bias: Tensor | None = None,  # [F] T
        columns: Tensor | None = None,  # [F + 1] of _list_columns
        relu: bool = False,
        second: Tensor | None = None,  # [rows, F] as scores
        mode: str | None = None,
        beta: float = 0.0,
        informed: Tensor | None = None,  # [rows] bool: False: second does not count
    ) -> None:
        rows, F = scores.shape
        number = 0 if mode is None else 1 + MODES.index(mode)
        with guard(scores):
            self.module.select(
                rows, F, k, DTYPES[scores.dtype], DTYPES[values.dtype], pointer(scores),
                pointer(second), number, beta, pointer(informed), pointer(bias), 0,
                pointer(columns), relu, pointer(values), pointer(indices),
                _Workspace(scores.device), _stream(scores),
            )  # fmt: skip

    def _list_columns(self, mask: Tensor) -> Tensor:
        """The positions of True in mask [F], ascending, and in the last of [F + 1] their number."""
        columns = mask.new_empty(mask.numel() + 1, dtype=torch.int32)
        with guard(mask):
            self.module.list_columns(mask.numel(), pointer(mask), pointer(columns), _stream(mask))
        return columns

    def bf16_copy(self, W: Tensor) -> tuple[Tensor, Tensor]:
        rows, d = W.shape
        W, copy = W.contiguous(), W.new_empty(rows, d, dtype=torch.bfloat16)
        norms = W.new_empty(3, rows)
        with guard(W):
            self.module.bf16_copy(rows, d, pointer(W), pointer(copy), pointer(norms), _stream(W))
        return copy, norms

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
    ) -> Screen:
        queue = (_Workspace(x.device), _stream(x))
        return Screened(self.module, *queue, x, W_enc, b_enc, x_norms, w_norms, k, mask, capacity)

    def sparse_decode(
        self,
        values: Tensor,
        indices: Tensor,
        W_dec: Tensor,
        b_dec: Tensor | None = None,
        row_offsets: Tensor | None = None,
        partial: bool = False,
    ) -> Tensor:
        N = len(values) if row_offsets is None else row_offsets.numel() - 1
        (F, d), k = W_dec.shape, _entries(values, row_offsets)
        out = values.new_empty(N, d, dtype=torch.float32 if partial else values.dtype)
        with guard(values):
            self.module.sparse_decode(
                N, d, F, k, DTYPES[values.dtype], pointer(values), pointer(indices),
                indices.element_size(), pointer(W_dec), pointer(b_dec), pointer(out), partial,
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
        row_offsets: Tensor | None = None,
        rounded: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        square = target.new_empty(target.shape[0], dtype=torch.float64)
        grads = target.new_empty(values.shape, dtype=torch.float32)
        code = (values, indices, W_dec, b_dec, target)
        sums = (square, grads, column_sums, rounded)
        residual = self._residual(*code, 0, columns, row_offsets, *sums)
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
        code = (values, indices, W_dec, b_dec, target)
        return self._residual(*code, start, stop, row_offsets, None, None, None, None)

    def _residual(
        self,
        values: Tensor,
        indices: Tensor,
        W_dec: Tensor,
        b_dec: Tensor | None,
        target: Tensor,
        start: int,
        stop: int,
        row_offsets: Tensor | None,
        sq_error: Tensor | None,
        grad_values: Tensor | None,
        column_sums: Tensor | None,
        rounded: Tensor | None,
    ) -> Tensor:
        N, k, (F, d) = len(target), _entries(values, row_offsets), W_dec.shape
        residual = target.new_empty(N, stop - start, dtype=torch.float32)
        with guard(values):
            self.module.sparse_residual(
                N, d, F, k, DTYPES[values.dtype], pointer(values), pointer(indices),
                indices.element_size(), pointer(W_dec), pointer(b_dec), pointer(target),
                target.dtype == torch.float32, start, stop - start, pointer(residual),
                pointer(sq_error), pointer(grad_values), pointer(column_sums), pointer(rounded),
                _Workspace(values.device), _stream(values),
            )  # fmt: skip
        return residual

    def sparse_decode_backward_values(
        self, grad: Tensor, indices: Tensor, W_dec: Tensor, row_offsets: Tensor | None = None
    ) -> Tensor:
        N, (F, d) = len(indices), W_dec.shape
        row_of = None if row_offsets is None else rows_of(row_offsets, N)
        out = grad.new_empty(indices.shape)
        with guard(grad):
            self.module.sparse_decode_backward_values(
                N, d, F, _entries(indices, row_of), DTYPES[W_dec.dtype], pointer(grad),
                pointer(indices), indices.element_size(), pointer(W_dec), pointer(out),
                grad.dtype != W_dec.dtype, _stream(grad),
            )  # fmt: skip
        return out

    def group_by_latent(self, values: Tensor, indices: Tensor, F: int) -> tuple[Tensor, Tensor]:
        N, k = values.shape
        offsets = values.new_empty(F + 1, dtype=torch.int32)
        order = values.new_empty(N * k, dtype=torch.int32)
        with guard(values):
            self.module.group_by_latent(
                N, F, k, DTYPES[values.dtype], pointer(values), pointer(indices),
                indices.element_size(), pointer(offsets), pointer(order),
                _Workspace(values.device), _stream(values),
            )  # fmt: skip
        return offsets, order

    def sparse_decode_backward_weight(
        self,
        grad: Tensor,
        values: Tensor,
        indices: Tensor,
        F: int,
        row_offsets: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        N, d = len(values), grad.shape[1]
        row_of = None if row_offsets is None else rows_of(row_offsets, N)
        grad_W, value_sum = grad.new_empty(F, d), grad.new_empty(F)
        offsets, order = self.group_by_latent(values, indices, F)
        with guard(grad):
            self.module.sparse_decode_backward_weight(
                N, d, F, _entries(values, row_of), DTYPES[grad.dtype], pointer(grad),
                pointer(values), pointer(offsets), pointer(order), pointer(grad_W),
                pointer(value_sum), _Workspace(grad.device), _stream(grad),
            )  # fmt: skip
        return grad_W, value_sum

    def total_variance(self, y: Tensor) -> Tensor:
        N, d = y.shape
        variance = y.new_empty((), dtype=torch.float32)
        with guard(y):
            self.module.total_variance(
                N, d, DTYPES[y.dtype], pointer(y), pointer(variance), _Workspace(y.device),
                _stream(y),
            )  # fmt: skip
        return variance

    def loss_terms(
        self, sq_errors: Sequence[Tensor], denominators: Sequence[Tensor], shares: Sequence[float]
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        first = denominators[0]
        errors, terms, scales = (first.new_empty(len(shares)) for _ in range(3))
        loss = torch.empty_like(first)
        given = [
            (e.numel(), pointer(e), pointer(d), share)
            for e, d, share in zip(sq_errors, denominators, shares, strict=True)
        ]
        out = (pointer(errors), pointer(terms), pointer(loss), pointer(scales))
        with guard(first):
            self.module.loss_terms(given, *out, _stream(first))
        return errors, terms, loss, scales

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
        hyper, of_decoder = loss.new_empty(8), loss.new_empty(8)
        taken_scales = torch.empty_like(scales)
        taken = loss.new_empty((), dtype=torch.bool)
        with guard(loss):
            self.module.adam_scalars(
                pointer(loss), pointer(norm), clip_norm or 0, pointer(scales), scales.numel(),
                pointer(lr), pointer(t), pointer(constants), decoder_lr, always, pointer(hyper),
                pointer(taken), pointer(taken_scales), pointer(of_decoder), _stream(loss),
            )  # fmt: skip
        return hyper, taken, taken_scales, of_decoder

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
        with guard(p):
            self.module.vector_update(
                p.numel(), DTYPES[p.dtype], [pointer(g) for g in grads], pointer(scales),
                pointer(minus), pointer(taken), pointer(hyper), pointer(p), pointer(master),
                pointer(m), pointer(v), _stream(p),
            )  # fmt: skip


def _require(op: str, arg: str, device: torch.device) -> None:
    """The GPU is one that the kernels are compiled for; asked once a device."""
    if device not in _known:
        capability = torch.cuda.get_device_capability(device)
        if capability < OLDEST:
            name = f"{device} ({torch.cuda.get_device_name(device)}, {_dotted(capability)})"
            raise RuntimeError(
                f"{op}: {arg} must be on a GPU of compute capability {_dotted(OLDEST)} or newer,"
                f" got {name}"
            )
        _known.add(device)


def _dotted(capability: tuple[int, int]) -> str:
    return f"{capability[0]}.{capability[1]}"


def served(op: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The op by `function`, for GPUs that it can run on; a failed launch names the op."""

    @functools.wraps(function)
    def run(**args: Any) -> Any:
        for arg, t in args.items():
            first = t[0] if isinstance(t, list | tuple) and t else t
            if isinstance(first, Tensor) and first.is_cuda:
                _require(op, arg, first.device)
                break
        try:
            return function(**args)
        except RuntimeError as error:
            if ": CUDA error " not in str(error) or str(error).startswith(f"{op} "):
                raise
            raise RuntimeError(f"{op}: {error}") from error

    return run


def _load() -> tuple[Kernels | None, str]:
    """The kernels, or why there are none."""
    if env.read("KSAE_NATIVE") == "0":
        return None, "left out by KSAE_NATIVE=0"
    try:
        from .. import _cuda
    except ImportError as error:
        return None, f"not importable: {error}"
    if torch.version.cuda is None:
        return None, f"torch {torch.__version__} is built without CUDA"
    reason = why_not_by_version(_cuda)
    return (None if reason else Kernels(_cuda), reason)


kernels, reason = _load()
