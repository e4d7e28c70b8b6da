# SPDX-License-Identifier: Apache-2.0
"""Transcoders: a coder that predicts an output from an input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ..activation import Activation, GradTopK, TopK
from ..activation.grad_topk import GradOptions
from ..coder import SparseCoder
from ..config import Options
from ..registry import register

if TYPE_CHECKING:
    from typing_extensions import Unpack


@register(TopK)
class Transcoder(SparseCoder):
    """Sparse transcoder (arXiv 2406.11944; with skip, arXiv 2501.18823): predicts y, an MLP's
    output, from x, its input.

    The input is not centred. Starts with random unit encoder rows and zeros elsewhere; see
    `ksae.coders.initialize` for the biases. A loss needs y.

    Args:
        d_in, d_out: widths of x and y.
        d_sae: F, the number of latents.
        k: active latents a token, short for activation=TopK(k).
        activation: as of `SAE`; one of k and activation is given.
        skip: add a learned linear map of the input to the output.
        options: as `SparseCoder`, but normalize_decoder is False by default.
    """

    topology = "transcoder"
    centred = False

    def __init__(
        self,
        d_in: int,
        d_out: int,
        d_sae: int,
        k: int | None = None,
        *,
        activation: Activation | Mapping[str, Any] | None = None,
        skip: bool = False,
        **options: Unpack[Options],
    ) -> None:
        if (k is None) == (activation is None):
            got = "neither" if k is None else "both"
            name = type(self).__name__
            raise TypeError(f"{name}: k or activation must be given, one of the two, got {got}")
        options.setdefault("normalize_decoder", False)
        chosen = TopK(k) if activation is None else activation  # type: ignore[arg-type]
        super().__init__(d_in, d_out, d_sae, chosen, skip=skip, **options)

    def config(self) -> dict[str, Any]:
        return {**super().config(), "d_out": self.d_out, "skip": self.skip}


@register(GradTopK)
class GradTopKTranscoder(GradOptions, Transcoder):
    """`Transcoder` with `GradTopK(k, beta, mode, grad_norm)`: grad [..., d_out] is the gradient of
    the downstream loss at the output that it predicts. Options as `GradTopKSAE` and `Transcoder`.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        d_sae: int,
        k: int,
        *,
        beta: float = 1.0,
        mode: str = "additive",
        grad_norm: str = "sqrt_d",
        skip: bool = False,
        **options: Unpack[Options],
    ) -> None:
        activation = GradTopK(k, beta, mode, grad_norm)
        super().__init__(d_in, d_out, d_sae, activation=activation, skip=skip, **options)
