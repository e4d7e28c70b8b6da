# SPDX-License-Identifier: Apache-2.0
"""The code [..., F] of a selection."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import sparse
from .base import LazyDense


def _is_rows(dim: Any, ndim: int) -> bool:
    """Whether a sum over `dim` leaves [F]."""
    return ndim == 2 and dim in (0, -2, [0], [-2], (0,), (-2,))


class Code(LazyDense):
    """values at indices (each at most once a row), zero elsewhere."""

    values_: Tensor  # [..., k]; None: all zero
    indices_: Tensor  # [..., k]
    unscaled: Tensor  # [..., k]: values before a library's scaling, where there is one

    @staticmethod
    def __new__(cls, values: Tensor, indices: Tensor, F: int) -> Code:
        code: Code = LazyDense.make(cls, torch.Size([*values.shape[:-1], F]), values, values.dtype)
        code.values_, code.indices_ = values, indices
        return code

    def build(self) -> Tensor:
        return sparse.scatter(self.values_, self.indices_, self.shape[-1])

    def needs_grad(self) -> bool:
        return self.values_.requires_grad

    def _with(self, values: Tensor) -> Code:
        return Code(values, self.indices_, self.shape[-1])

    def _each(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        """A function of one entry that keeps 0."""
        plain = not kwargs and len(args) == 1
        if not plain or (self.wants_grad() and func not in (Tensor.detach, Tensor.bool)):
            return NotImplemented
        return self._with(func(self.values_))

    def _above(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        """A comparison with a number that 0 does not pass."""
        plain = len(args) == 2 and args[0] is self and isinstance(args[1], int | float)
        strict = func in (Tensor.gt, Tensor.__gt__)
        if kwargs or not plain or args[1] < 0 or (args[1] == 0 and not strict):
            return NotImplemented
        return self._with(func(self.values_, args[1]))

    def _any(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        if self.dtype != torch.bool or kwargs.get("keepdim"):
            return NotImplemented
        count = self._sum(func, *args, **kwargs)
        return count if count is NotImplemented else count > 0

    def _mean(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        if self.dtype not in (torch.float32, torch.float64):  # a sum in half precision overflows
            return NotImplemented
        total = self._sum(func, *args, **kwargs)
        if total is NotImplemented:
            return NotImplemented
        return total / (self.numel() // max(total.numel(), 1))

    def _sum(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        kwargs = {n: v for n, v in kwargs.items() if n == "dim" or not (v is None or v is False)}
        dim = args[1] if len(args) == 2 else kwargs.pop("dim", None) if len(args) == 1 else None
        if kwargs or len(args) > 2 or self.wants_grad():
            return NotImplemented
        if dim is None:
            return self.values_.sum()
        if dim in (-1, self.dim() - 1, [-1], (-1,)):
            return self.values_.sum(-1)
        if not _is_rows(dim, self.dim()):
            return NotImplemented
        values = self.values_.long() if self.dtype == torch.bool else self.values_
        sums = values.new_zeros(self.shape[-1])
        return sums.index_add(0, self.indices_.reshape(-1), values.reshape(-1))

    def _scatter(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        """Into zeros: what a loop does with the top-k of the dead latents."""
        inplace = kwargs.pop("inplace", False)
        names = dict(zip(("self", "dim", "index", "src"), args, strict=False)) | kwargs
        src, index = names.get("src"), names.get("index")
        plain = self.values_.shape[-1] == 0 and len(names) == 4
        if not plain or not isinstance(src, Tensor) or not isinstance(index, Tensor):
            return NotImplemented
        if names["dim"] not in (-1, self.dim() - 1) or src.dtype != self.dtype:
            return NotImplemented
        if not inplace:
            return Code(src, index, self.shape[-1])
        self.values_, self.indices_ = src, index
        return self

    def _scatter_(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        return self._scatter(func, *args, **kwargs, inplace=True)

    shortcuts = {  # noqa: RUF012
        **dict.fromkeys((Tensor.bool, Tensor.float, Tensor.detach), "_each"),
        **dict.fromkeys((Tensor.abs, torch.abs, Tensor.square, torch.square), "_each"),
        **dict.fromkeys((Tensor.__gt__, Tensor.gt, Tensor.__ge__, Tensor.ge), "_above"),
        **dict.fromkeys((Tensor.any, torch.any), "_any"),
        **dict.fromkeys((Tensor.mean, torch.mean), "_mean"),
        **dict.fromkeys((Tensor.sum, torch.sum), "_sum"),
        Tensor.scatter_: "_scatter_",
        Tensor.scatter: "_scatter",
    }


def zeros(like: LazyDense) -> Code:
    """Zeros of a lazy tensor's shape, to be scattered into."""
    empty = torch.zeros(*like.shape[:-1], 0, dtype=like.dtype, device=like.device)
    return Code(empty, empty.long(), like.shape[-1])
