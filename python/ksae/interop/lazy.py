# SPDX-License-Identifier: Apache-2.0
"""Tensors [..., F] that exist only once somebody looks at their entries.

Other libraries hand dense codes and pre-activations from the encoder to the loss and the trainer,
which mostly take from them what the k selected entries know. A `LazyDense` is a torch.Tensor of the
right shape, dtype and device; the few operations that such loops do (top-k of the dead latents,
counting who fired) are answered from the selection, all others build the dense tensor, once, with
its gradient, and go on with that.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as nnf
from torch.utils._pytree import tree_map

from .. import functional
from . import sparse

_METADATA = {
    *(getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "layout", "ndim")),
    *(getattr(Tensor, name).__get__ for name in ("is_sparse", "is_cuda", "is_cpu", "is_meta")),
    *(getattr(Tensor, name) for name in ("size", "dim", "ndimension", "numel", "nelement")),
    *(getattr(Tensor, name) for name in ("is_floating_point", "is_complex", "__len__", "__hash__")),
    Tensor.get_device,
    torch.is_floating_point,
    torch.is_complex,
    torch.numel,
}


def _to_dense(arg: Any) -> Any:
    return arg.dense() if isinstance(arg, LazyDense) else arg


class LazyDense(Tensor):
    """A tensor with a recipe. `shortcuts` maps torch functions to methods that, called with the
    function and its arguments, may answer without the entries or return NotImplemented."""

    _dense: Tensor | None = None
    recording: bool  # whether gradients were recorded where the tensor was made
    shortcuts: dict[Any, str] = {}  # noqa: RUF012

    @staticmethod
    def make(cls: type[LazyDense], shape: torch.Size, like: Tensor, dtype: torch.dtype) -> Any:
        tensor = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=like.device)
        tensor.recording = torch.is_grad_enabled()
        return tensor

    def build(self) -> Tensor:
        raise NotImplementedError

    def needs_grad(self) -> bool:
        raise NotImplementedError

    @property
    def built(self) -> bool:
        """Whether somebody has seen, and perhaps changed, the entries."""
        return self._dense is not None

    def dense(self) -> Tensor:
        """The ordinary tensor, the same one each time."""
        if self._dense is None:
            with torch.set_grad_enabled(self.recording):
                self._dense = self.build()
        return self._dense

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        for arg in args:
            if isinstance(arg, LazyDense) and not arg.built:
                if func == Tensor.requires_grad.__get__:  # type: ignore[attr-defined]
                    return arg.recording and arg.needs_grad()
                method = arg.shortcuts.get(func)
                answer = NotImplemented
                if method is not None:
                    answer = getattr(arg, method)(func, *args, **kwargs)
                if answer is not NotImplemented:
                    return answer
        args, kwargs = tree_map(_to_dense, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Code below Python that holds the tensor itself."""
        args, kwargs = tree_map(_to_dense, (args, kwargs or {}))
        return func(*args, **kwargs)


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
        return NotImplemented if kwargs or len(args) != 1 else self._with(func(self.values_))

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
        if kwargs or len(args) > 2:
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


class PreActivations(LazyDense):
    """u = ((x - b_dec) @ W_enc.T + b_enc) * scale, after a ReLU if `relu`."""

    x: Tensor  # [..., d]
    weights: tuple[Tensor, Tensor, Tensor | None]  # W_enc [F, d], b_enc [F], b_dec [d]
    scale: Tensor | None  # [F]
    rectified: bool
    mask: Tensor | None  # [F]; False: -inf
    versions: list[int]  # of the weights

    @staticmethod
    def __new__(
        cls,
        x: Tensor,
        W_enc: Tensor,
        b_enc: Tensor,
        b_dec: Tensor | None = None,
        *,
        relu: bool,
        scale: Tensor | None = None,
        mask: Tensor | None = None,
        dtype: torch.dtype | None = None,
    ) -> PreActivations:
        shape = torch.Size([*x.shape[:-1], W_enc.shape[0]])
        kind = x.device.type
        if torch.is_autocast_enabled(kind) and W_enc.dtype != torch.float64:
            dtype = torch.get_autocast_dtype(kind)
        u: PreActivations = LazyDense.make(cls, shape, x, dtype or W_enc.dtype)
        u.x, u.weights, u.scale, u.rectified, u.mask = x, (W_enc, b_enc, b_dec), scale, relu, mask
        u.versions = u.read_versions()
        return u

    def read_versions(self) -> list[int]:
        return [0 if t is None or t.is_inference() else t._version for t in self.weights]

    def _current(self) -> tuple[Tensor, Tensor, Tensor | None]:
        """The weights, if they are still those of the forward pass."""
        if self.read_versions() != self.versions:
            raise RuntimeError(
                "PreActivations: entries must be read before the weights change, got weights that"
                " an optimizer has updated since"
            )
        return self.weights

    def build(self) -> Tensor:
        W_enc, b_enc, b_dec = self._current()
        u = nnf.linear(self.x if b_dec is None else self.x - b_dec, W_enc, b_enc)
        u = u if self.scale is None else u * self.scale
        u = u.relu() if self.rectified else u
        u = u.to(self.dtype)
        return u if self.mask is None else torch.where(self.mask, u, -torch.inf)

    def needs_grad(self) -> bool:
        return any(t is not None and t.requires_grad for t in (self.x, *self.weights))

    def _where(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        """where(mask, u, -inf): the candidates of AuxK."""
        if kwargs or len(args) != 3 or args[1] is not self or self.mask is not None:
            return NotImplemented
        mask, _, other = args
        low = isinstance(other, float) and other == -math.inf
        if not low or mask.dtype != torch.bool or mask.numel() != self.shape[-1]:
            return NotImplemented
        if mask.shape[-1] != self.shape[-1]:
            return NotImplemented
        return self._with(mask.reshape(-1))

    def _with(self, mask: Tensor | None) -> PreActivations:
        W_enc, b_enc, b_dec = self.weights
        other = PreActivations(
            self.x,
            W_enc,
            b_enc,
            b_dec,
            relu=self.rectified,
            scale=self.scale,
            mask=mask,
            dtype=self.dtype,
        )
        other.recording, other.versions = self.recording, self.versions
        return other

    def _topk(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        names = dict(zip(("self", "k", "dim", "largest", "sorted"), args, strict=False)) | kwargs
        k, dim = names.get("k"), names.get("dim", -1)
        plain = dim in (-1, self.dim() - 1) and names.get("largest", True) and "out" not in names
        if not plain or not isinstance(k, int | Tensor) or not 1 <= int(k) <= self.shape[-1]:
            return NotImplemented
        return torch.return_types.topk(self.topk_of(int(k)))

    def topk_of(self, k: int) -> tuple[Tensor, Tensor]:
        """Values and indices [..., k] of the k largest, without the dense tensor.

        More than the mask leaves: the rest has value 0 (signed: u) instead of -inf.
        """
        values, indices = self.rectified_topk(k) if self.rectified else self.signed_topk(k)
        return values if self.scale is None else values * self.scale[indices], indices

    def rectified_topk(self, k: int) -> tuple[Tensor, Tensor]:
        """relu(u) without the scale, indices [..., k], selected with the scale."""
        W_enc, b_enc, b_dec = self._current()
        x, scale, mask = sparse.flat(self.x), self.scale, self.mask
        with torch.set_grad_enabled(self.recording):
            if scale is None:
                code = functional.topk_encode(x, W_enc, b_enc, k, b_dec, mask)
            else:
                code = sparse.scaled_topk(x, W_enc, b_enc, scale, k, b_dec, mask)
        return self._lead(code)

    def signed_topk(self, k: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """u without ReLU and scale, indices [..., k], selected with the scale."""
        W_enc, b_enc, b_dec = self._current()
        mask = self.mask if mask is None else mask
        with torch.set_grad_enabled(self.recording):
            x = sparse.flat(self.x)
            return self._lead(sparse.signed_topk(x, W_enc, b_enc, k, b_dec, mask, self.scale))

    def _lead(self, code: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        values, indices = code
        shape = (*self.shape[:-1], values.shape[-1])
        return values.reshape(shape), indices.reshape(shape)

    def _zeros(self, func: Any, *args: Any, **kwargs: Any) -> Any:
        return NotImplemented if kwargs else zeros(self)

    def _detach(self, func: Any, *args: Any) -> Any:
        other = self._with(self.mask)
        other.recording = False
        return other

    shortcuts = {  # noqa: RUF012
        torch.where: "_where",
        torch.topk: "_topk",
        Tensor.topk: "_topk",
        torch.zeros_like: "_zeros",
        Tensor.detach: "_detach",
    }


def code(values: Tensor, indices: Tensor, F: int) -> Tensor:
    """The code [..., F], lazily; dense where a graph is being compiled."""
    if torch.compiler.is_compiling():
        return sparse.scatter(values, indices, F)
    return Code(values, indices, F)


def known(f: Tensor) -> tuple[Tensor, Tensor] | None:
    """values, indices of a code that nobody has looked into; None for any other tensor."""
    return (f.values_, f.indices_) if isinstance(f, Code) and not f.built else None


def dense(t: Tensor) -> Tensor:
    """t itself, or the entries of a lazy one."""
    return t.dense() if isinstance(t, LazyDense) else t
