# SPDX-License-Identifier: Apache-2.0
"""The options of a coder, checked in one place."""

from __future__ import annotations

import operator
from dataclasses import InitVar, dataclass
from typing import Any, TypedDict

import torch

from ..ops import FLOATS
from .terms import LOSSES


class Options(TypedDict, total=False):
    """Keyword arguments of every coder; meanings and defaults at `Config`."""

    loss: str
    auxk_alpha: float
    k_aux: int | None
    dead_after: int
    normalize_decoder: bool
    multi_topk: bool
    dtype: torch.dtype | str | None
    device: torch.device | str | None


@dataclass(frozen=True)
class Config:
    """Sizes and training options of a coder, without its activation.

    Args:
        owner: class that messages name.
        d_in, d_out: widths of the input and of the target.
        d_sae: F, the number of latents.
        skip: add a learned linear map of the input to the output.
        loss: "fvu", sum e^2 / sum (y - mean over the batch of y)^2, or "mse", the mean of e^2 over
            all elements.
        auxk_alpha: weight of AuxK, the loss that revives dead latents: the k_aux largest dead
            pre-activations predict the (detached) residual; its gradient reaches encoder and
            decoder. 0 switches it off.
        k_aux: default d_out // 2, at most d_sae.
        dead_after: a latent is dead once it has not fired (value > 0) for more than this many
            tokens.
        normalize_decoder: unit decoder rows, kept by `TrainStep`, which also removes the gradient
            along them. With an optimizer of torch two methods do, or `ksae.UnitRows`.
        multi_topk: add the loss with 4k latents, divided by 8, so that the code also works at other
            k.

    Raises:
        ValueError: a size, loss or weight out of range. TypeError: a size is no integer.
    """

    owner: InitVar[str]
    d_in: int
    d_out: int
    d_sae: int
    skip: bool = False
    loss: str = "fvu"
    auxk_alpha: float = 1 / 32
    k_aux: int | None = None
    dead_after: int = 10_000_000
    normalize_decoder: bool = True
    multi_topk: bool = False

    def __post_init__(self, owner: str) -> None:
        for name in ("d_in", "d_out", "d_sae"):
            size = self._set(name, integer(owner, name, getattr(self, name)))
            if size < 1:
                raise ValueError(f"{owner}: {name} must be at least 1, got {size}")
        if self.loss not in LOSSES:
            raise ValueError(f"{owner}: loss must be one of {', '.join(LOSSES)}, got {self.loss!r}")
        if not 0 <= self.auxk_alpha < float("inf"):
            raise ValueError(
                f"{owner}: auxk_alpha must be a finite number >= 0, got {self.auxk_alpha}"
            )
        self._set("auxk_alpha", float(self.auxk_alpha))
        k_aux = max(self.d_out // 2, 1) if self.k_aux is None else self.k_aux
        k_aux = integer(owner, "k_aux", k_aux)
        if k_aux < 1:
            raise ValueError(f"{owner}: k_aux must be at least 1, got {k_aux}")
        self._set("k_aux", min(k_aux, self.d_sae))
        dead_after = self._set("dead_after", integer(owner, "dead_after", self.dead_after))
        if dead_after < 0:
            raise ValueError(f"{owner}: dead_after must be at least 0, got {dead_after}")
        for name in ("skip", "normalize_decoder", "multi_topk"):
            self._set(name, bool(getattr(self, name)))

    def _set(self, name: str, value: Any) -> Any:
        object.__setattr__(self, name, value)
        return value


def integer(owner: str, arg: str, value: Any) -> int:
    """value as an int, which JSON can hold: integers of numpy too.

    Raises:
        TypeError: value is no integer.
    """
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{owner}: {arg} must be an integer, got {value!r}") from None


def floating(owner: str, dtype: torch.dtype | str | None) -> torch.dtype:
    """The dtype of that name, or torch's default.

    Raises:
        TypeError: it is not one that kernels compute in.
    """
    kind = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    kind = torch.get_default_dtype() if kind is None and dtype is None else kind
    if kind not in FLOATS:
        names = ", ".join(str(f) for f in FLOATS)
        raise TypeError(f"{owner}: dtype must be one of {names}, got {dtype}")
    return kind
