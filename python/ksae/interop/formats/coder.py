# SPDX-License-Identifier: Apache-2.0
"""One description of a sparse coder that every file format reads into and writes from."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ksae.errors import UserError
from ksae.ops import accumulator


@dataclass
class Coder:
    """Weights in ksae's orientation, and what decides the output.

    `extra` holds what does not: training settings, counters, metadata; by the format they came
    from, plain values and tensors. It travels with a conversion (see `files`).
    """

    W_enc: Tensor  # [F, d]
    b_enc: Tensor  # [F]
    W_dec: Tensor  # [F, d_out]
    b_dec: Tensor  # [d_out]
    activation: str  # topk, groupmax, jumprelu, batchtopk, matryoshka, relu, gated, pursuit
    k: int | None
    centred: bool  # b_dec is subtracted from the input
    W_skip: Tensor | None = None  # [d_out, d]
    threshold: Tensor | None = None  # [F] or [], of jumprelu, batchtopk, matryoshka
    group_sizes: Tensor | None = None  # [groups], of matryoshka
    r_mag: Tensor | None = None  # [F], of gated, whose b_enc is the gate's bias
    b_mag: Tensor | None = None  # [F]
    scaled: bool = False  # selection by pre-activation times norm of the decoder row
    normalization: str = "none"  # of the input, undone on the output
    tolerance: float = 0.0  # of pursuit, whose encoder is W_dec; W_enc and b_enc are not used
    stop_on_repeat: bool = False
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[1]

    @property
    def d_out(self) -> int:
        return self.W_dec.shape[1]

    @property
    def d_sae(self) -> int:
        return self.W_enc.shape[0]

    @property
    def dtype(self) -> torch.dtype:
        return self.W_enc.dtype

    def jumps(self, target: str) -> Tensor:
        """The thresholds [F] of a JumpReLU that is the same function for use; `target` cannot hold
        one that is not set."""
        theta = self.threshold
        if self.activation == "jumprelu" and theta is not None:
            return theta.expand(self.d_sae)
        if theta is None or not float(theta) >= 0:
            raise UserError(
                f"convert: {target} cannot hold {self.activation} with threshold = -1 (not set)"
            )
        return theta.to(self.dtype).expand(self.d_sae)


def transposed(weight: Tensor, owner: str) -> Tensor:
    """A matrix of the other orientation; else an error."""
    if weight.dim() != 2:
        raise UserError(
            f"load: encoder and decoder weights of {owner} must be matrices, got the shape"
            f" {list(weight.shape)}"
        )
    return weight.T


def check(coder: Coder, owner: str) -> Coder:
    """`coder`, if its tensors fit together; else an error that names the tensor."""
    if coder.W_enc.dim() != 2 or coder.W_dec.dim() != 2:
        raise UserError(
            f"load: encoder and decoder weights of {owner} must be matrices, got shapes "
            f"{list(coder.W_enc.shape)} and {list(coder.W_dec.shape)}"
        )
    F, d, d_out = coder.d_sae, coder.d_in, coder.d_out
    shapes: dict[str, list[list[int]]] = {
        "W_dec": [[F, d_out]],
        "b_enc": [[F]],
        "b_dec": [[d_out]],
        "W_skip": [[d_out, d]],
        "threshold": [[F], []],
        "r_mag": [[F]],
        "b_mag": [[F]],
    }
    for name, wanted in shapes.items():
        tensor = getattr(coder, name)
        if tensor is not None and list(tensor.shape) not in wanted:
            raise UserError(
                f"load: {name} of {owner} must have the shape {wanted[0]} for an encoder of "
                f"{F} latents and width {d}, got {list(tensor.shape)}"
            )
    for name in ("W_enc", "b_enc", "W_dec", "b_dec", "W_skip", "r_mag", "b_mag"):
        tensor = getattr(coder, name)
        if tensor is not None and not tensor.is_floating_point():
            raise UserError(f"load: {name} of {owner} must be floating, got {tensor.dtype}")
    if coder.activation == "jumprelu" and coder.threshold is not None:
        theta = coder.threshold
        wrong = theta[~((theta >= 0) & theta.isfinite())]
        if wrong.numel():  # below 0 some libraries have a ReLU as well, others not
            raise UserError(
                f"load: threshold of {owner} must be at least 0 and finite, got {float(wrong[0])}"
            )
    if coder.centred and d != d_out:
        raise UserError(
            f"load: {owner} subtracts a decoder bias of width {d_out} from inputs of width {d}"
        )
    if coder.k is not None and not 1 <= coder.k <= F:
        raise UserError(f"load: k of {owner} must be in [1, {F}], got {coder.k}")
    return coder


def fold_center(coder: Coder) -> Coder:
    """The same function without subtracting b_dec: b_enc - W_enc b_dec. Rounds."""
    return _shifted(coder, -1)


def unfold_center(coder: Coder) -> Coder:
    """The same function that subtracts b_dec first: b_enc + W_enc b_dec. Rounds."""
    return _shifted(coder, 1)


def _shifted(coder: Coder, sign: int) -> Coder:
    """Biases of the encoder with sign * W_enc b_dec; a magnitude's is scaled by exp(r_mag)."""
    acc, b_mag = accumulator(coder.dtype), coder.b_mag
    shift = sign * (coder.W_enc.to(acc) @ coder.b_dec.to(acc))
    b_enc = (coder.b_enc.to(acc) + shift).to(coder.b_enc.dtype)
    if b_mag is not None and coder.r_mag is not None:
        b_mag = (b_mag.to(acc) + coder.r_mag.to(acc).exp() * shift).to(b_mag.dtype)
    return replace(coder, b_enc=b_enc, b_mag=b_mag, centred=sign > 0)


def fold_scale(coder: Coder) -> Coder:
    """The same function without norm scaling: decoder norms move to the encoder. Rounds."""
    acc = accumulator(coder.dtype)
    norm = coder.W_dec.to(acc).norm(dim=1, keepdim=True)  # [F, 1]
    return replace(
        coder,
        W_enc=(coder.W_enc.to(acc) * norm).to(coder.dtype),
        b_enc=(coder.b_enc.to(acc) * norm[:, 0]).to(coder.b_enc.dtype),
        W_dec=(coder.W_dec.to(acc) / norm).to(coder.W_dec.dtype),
        scaled=False,
    )


def require(
    coder: Coder,
    target: str,
    *,
    activations: tuple[str, ...] = ("topk",),
    centred: bool | None = None,
    skip: bool = False,
    square: bool = True,
    scaled: bool = False,
    normalization: tuple[str, ...] = ("none",),
    fold: bool = False,
) -> Coder:
    """`coder` as `target` can hold it, or an error that names the field and its value.

    Args:
        centred: what the target needs; None: either.
        fold: whether biases and norms may be folded, which rounds.
    """

    def refuse(name: str, value: object, hint: str = "") -> UserError:
        return UserError(f"convert: {target} cannot hold {name} = {value}{hint}")

    hint = ": --fold (fold=True) folds it into the encoder, which rounds"
    if coder.activation not in activations:
        other = (
            ""
            if "topk" not in activations or coder.activation not in ("batchtopk", "matryoshka")
            else f": --as-topk (as_topk=True) takes the {coder.k} largest of each token instead"
        )
        raise refuse("activation", coder.activation, other)
    if coder.activation == "topk" and coder.k is None:
        raise UserError(f"convert: {target} needs k, which the source lacks: give --k (k=...)")
    if coder.normalization not in normalization:
        raise refuse("input normalization", coder.normalization)
    if coder.W_skip is not None and not skip:
        raise refuse("W_skip", f"a tensor of shape {list(coder.W_skip.shape)}")
    if square and coder.d_in != coder.d_out:
        raise refuse("d_out", f"{coder.d_out} for d_in = {coder.d_in}")
    if coder.scaled and not scaled:
        if not fold:
            raise refuse("scaling by decoder norms", True, hint)
        coder = fold_scale(coder)
    if centred is not None and coder.centred != centred:
        if coder.d_in == coder.d_out and not coder.b_dec.any():  # nothing to subtract
            coder.extra.setdefault("fields", {})["centred"] = coder.centred
            return replace(coder, centred=centred)
        if not fold or (centred and coder.d_in != coder.d_out):
            raise refuse("b_dec subtracted from the input", coder.centred, hint)
        coder = unfold_center(coder) if centred else fold_center(coder)
    return coder
