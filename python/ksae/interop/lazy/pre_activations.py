# SPDX-License-Identifier: Apache-2.0
"""The pre-activations [..., F] of an encoder."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as nnf

from ... import functional
from .. import sparse
from .base import LazyDense, version
from .code import zeros


class PreActivations(LazyDense):
    """u = ((x - b_dec) @ W_enc.T + b_enc) * scale, after a ReLU if `relu`."""

    x: Tensor  # [..., d]
    weights: tuple[Tensor, Tensor, Tensor | None]  # W_enc [F, d], b_enc [F], b_dec [d]
    scale: Tensor | None  # [F]
    rectified: bool
    mask: Tensor | None  # [F]; False: -inf
    versions: list[int]  # of the weights
    origin: PreActivations | None = None  # what it is a part of

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
        cast = sparse.autocast_dtype(x.device.type)
        if cast is not None and W_enc.dtype != torch.float64:
            dtype = cast
        u: PreActivations = LazyDense.make(cls, shape, x, dtype or W_enc.dtype)
        u.x, u.weights, u.scale, u.rectified, u.mask = x, (W_enc, b_enc, b_dec), scale, relu, mask
        u.versions = u.read_versions()
        return u

    def read_versions(self) -> list[int]:
        return [version(t) for t in self.weights]

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
        other.origin = self
        return other

    def was_built(self, dense: Tensor) -> None:
        mask = self.mask
        if self.origin is not None and mask is not None:
            self.origin.record(dense, lambda g: torch.where(mask, g, 0))

    def selected(self, values: Tensor, indices: Tensor, *, relu: bool) -> None:
        """values [..., k] at indices, without the scale, were made of this tensor, by a ReLU or as
        they are."""
        F, scale = self.shape[-1], self.scale
        passes = values.detach() > 0 if relu else None

        def gradient(g: Tensor) -> Tensor:
            g = g if scale is None else g / scale[indices]
            g = g if passes is None else torch.where(passes, g, 0)
            return sparse.scatter(g, indices.expand(g.shape), F)

        whole: PreActivations | None = self
        while whole is not None:
            whole.record(values, gradient)
            whole = whole.origin

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
        return self._lead(code, relu=not self.rectified)

    def signed_topk(self, k: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """u without ReLU and scale, indices [..., k], selected with the scale."""
        W_enc, b_enc, b_dec = self._current()
        mask = self.mask if mask is None else mask
        with torch.set_grad_enabled(self.recording):
            x = sparse.flat(self.x)
            code = sparse.signed_topk(x, W_enc, b_enc, k, b_dec, mask, self.scale)
        return self._lead(code, relu=False)

    def _lead(self, code: tuple[Tensor, Tensor], *, relu: bool) -> tuple[Tensor, Tensor]:
        shape = (*self.shape[:-1], code[0].shape[-1])
        values, indices = code[0].reshape(shape), code[1].reshape(shape)
        self.selected(values, indices, relu=relu)
        return values, indices

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
