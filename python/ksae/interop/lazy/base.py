# SPDX-License-Identifier: Apache-2.0
"""A tensor with a recipe: what it answers without its entries, and its gradient."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, get_gradient_edge
from torch.utils._pytree import tree_map

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


# What needs a place in the graph, which a lazy tensor has not: its dense one has.
_OF_THE_GRAPH = {
    Tensor.retain_grad,
    Tensor.register_hook,
    Tensor.register_post_accumulate_grad_hook,
}


def _to_dense(arg: Any) -> Any:
    return arg.dense() if isinstance(arg, LazyDense) else arg


class LazyDense(Tensor):
    """A tensor with a recipe. `shortcuts` maps torch functions to methods that, called with the
    function and its arguments, may answer without the entries or return NotImplemented."""

    _dense: Tensor | None = None
    recording: bool  # whether gradients were recorded where the tensor was made
    # What was made of it without its entries: where, and the gradient [..., F] by the one there.
    uses: list[tuple[GradientEdge, Callable[[Tensor], Tensor]]]
    shortcuts: dict[Any, str] = {}  # noqa: RUF012

    @staticmethod
    def make(cls: type[LazyDense], shape: torch.Size, like: Tensor, dtype: torch.dtype) -> Any:
        tensor = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=like.device)
        tensor.recording, tensor.uses = torch.is_grad_enabled(), []
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
            self.was_built(self._dense)
        return self._dense

    def was_built(self, dense: Tensor) -> None:
        """For a tensor that was made of another one."""

    def record(self, out: Tensor, gradient: Callable[[Tensor], Tensor]) -> None:
        """`out` was made of this tensor; `gradient` maps the one there to this tensor's share."""
        if self.recording and out.requires_grad:
            self.uses.append((get_gradient_edge(out), gradient))

    def wants_grad(self) -> bool:
        """Whether what is made of it now is to have a gradient."""
        return torch.is_grad_enabled() and self.recording and self.needs_grad()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.autograd.grad:
            return _grad(*args, **kwargs)
        lost = func in _OF_THE_GRAPH and args[0].uses
        if func is torch.autograd.backward:
            lost = any(isinstance(t, LazyDense) for t in kwargs.get("inputs") or ())
        if lost:
            raise RuntimeError(
                f"{cls.__name__}: gradients must be asked of torch.autograd.grad, or before the"
                f" tensor is used, got {func.__name__} on one that was used"
            )
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


def _grad(
    outputs: Sequence[Tensor],
    inputs: Sequence[Tensor],
    grad_outputs: Any = None,
    *,
    allow_unused: bool | None = None,
    materialize_grads: bool = False,
    **options: Any,
) -> tuple[Tensor | None, ...]:
    """`torch.autograd.grad` where some of the tensors are lazy."""
    outputs, grad_outputs = tree_map(_to_dense, (outputs, grad_outputs))
    places: list[Any] = []  # what torch is asked for
    shares: list[list[Callable[[Tensor], Tensor]]] = []  # of each input, one a place
    for t in inputs:
        uses: list[Any] = [(t, lambda g: g)]
        if isinstance(t, LazyDense):
            if not t.requires_grad:
                raise RuntimeError(
                    f"{type(t).__name__}: a tensor to differentiate by must require grad, got one"
                    " that was made without gradients"
                )
            uses = t.uses + ([(t.dense(), lambda g: g)] if t.built else [])
        places += [place for place, _ in uses]
        shares.append([gradient for _, gradient in uses])
    found: tuple[Tensor | None, ...] = ()
    if places:
        found = torch.autograd.grad(outputs, places, grad_outputs, allow_unused=True, **options)
    left, result = iter(found), []
    for number, (t, gradients) in enumerate(zip(inputs, shares, strict=True)):
        parts = [g for gradient in gradients if (g := _share(gradient, next(left))) is not None]
        if not parts and not allow_unused and not materialize_grads:
            raise RuntimeError(
                f"autograd.grad: inputs[{number}] must be a tensor that the outputs were made of,"
                " got another; allow_unused=True gives None for it"
            )
        total: Tensor | None = sum(parts[1:], parts[0]) if parts else None
        result.append(torch.zeros_like(_to_dense(t)) if materialize_grads and not parts else total)
    return tuple(result)


def _share(gradient: Callable[[Tensor], Tensor], g: Tensor | None) -> Tensor | None:
    return None if g is None else gradient(g)


def version(t: Tensor | None) -> int:
    return 0 if t is None or t.is_inference() else t._version
