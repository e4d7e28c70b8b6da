# SPDX-License-Identifier: Apache-2.0
"""Tensors [..., F] that exist only once somebody looks at their entries.

Other libraries hand dense codes and pre-activations from the encoder to the loss and the trainer,
which mostly take from them what the k selected entries know. A `LazyDense` is a torch.Tensor of the
right shape, dtype and device; the few operations that such loops do (top-k of the dead latents,
counting who fired) are answered from the selection, all others build the dense tensor, once, with
its gradient, and go on with that. `torch.autograd.grad` with respect to a lazy tensor puts the
gradient together from what was made of it.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as nnf

from .. import sparse
from .base import LazyDense, version
from .code import Code, zeros
from .coo import coo, values_of
from .pre_activations import PreActivations

plain = sparse.plain

__all__ = [
    "Code",
    "LazyDense",
    "PreActivations",
    "code",
    "coo",
    "decoded",
    "dense",
    "known",
    "plain",
    "pre_activations",
    "selected",
    "values_of",
    "zeros",
]


def code(values: Tensor, indices: Tensor, F: int) -> Tensor:
    """The code [..., F], lazily; dense where a graph is being compiled."""
    if plain():
        return sparse.scatter(values, indices, F)
    return Code(values, indices, F)


def pre_activations(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, b_dec: Tensor | None = None, *, relu: bool
) -> Tensor:
    """The pre-activations [..., F], lazily; dense where a graph is being compiled."""
    if not plain():
        return PreActivations(x, W_enc, b_enc, b_dec, relu=relu)
    u = nnf.linear(x if b_dec is None else x - b_dec, W_enc, b_enc)
    return u.relu() if relu else u


def selected(u: Tensor, values: Tensor, indices: Tensor) -> None:
    """values [..., k] at indices, without the ReLU, if u has had none."""
    if isinstance(u, PreActivations):
        u.selected(values, indices, relu=not u.rectified)


def decoded(f: Tensor, out: Tensor, W_dec: Tensor, scale: Tensor | None = None) -> Tensor:
    """`out`, which is f @ W_dec [F, d] (f / scale [F], if given) and perhaps a constant."""
    if isinstance(f, Code):
        before, kind = version(W_dec), f.dtype

        def gradient(g: Tensor) -> Tensor:
            if before != version(W_dec):
                raise RuntimeError(
                    "Code: gradients must be asked for before the weights change, got weights that"
                    " an optimizer has updated since"
                )
            share = (g.to(W_dec.dtype) @ W_dec.T).to(kind)
            return share if scale is None else share / scale

        f.record(out, gradient)
    return out


def known(f: Tensor) -> tuple[Tensor, Tensor] | None:
    """values, indices of a code that nobody has looked into; None for any other tensor."""
    return (f.values_, f.indices_) if isinstance(f, Code) and not f.built else None


def dense(t: Tensor) -> Tensor:
    """t itself, or the entries of a lazy one."""
    return t.dense() if isinstance(t, LazyDense) else t
