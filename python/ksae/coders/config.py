# SPDX-License-Identifier: Apache-2.0
"""The options of a coder, checked in one place."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Sequence
from dataclasses import InitVar, dataclass
from typing import Any, TypedDict

import torch

from ..ops import FLOATS
from .auxk import AUXK
from .terms import LOSSES, PREFIX_WEIGHTS


class Options(TypedDict, total=False):
    """Keyword arguments of every coder; meanings and defaults at `Config`."""

    loss: str
    auxk_alpha: float
    k_aux: int | None
    dead_after: int
    normalize_decoder: bool
    auxk: str
    multi_topk: bool
    multi_k: Sequence[int] | None
    multi_weights: float | Sequence[float]
    prefixes: Sequence[int] | None
    prefix_weights: str | Sequence[float]
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
        auxk: the library whose AuxK it is, `ksae.coders.auxk.AUXK`: "dictionary_learning" (error
            over the residual's variance), "openai" (b_dec gets a gradient too), "sparsify" (over
            the target's variance), "saelens" and "batch_topk" (mean over all elements).
        k_aux: default d_out // 2, at most d_sae.
        dead_after: a latent is dead once it has not fired (value not 0) for more than this many
            tokens.
        normalize_decoder: unit decoder rows, kept by `TrainStep`, which also removes the gradient
            along them. With an optimizer of torch two methods do, or `ksae.UnitRows`.
        multi_topk: add the loss with 4k latents, divided by 8, so that the code also works at other
            k.
        multi_k, multi_weights: the same for a list of k in [1, d_sae], each times its weight, one
            for all or one each.
        prefixes: numbers of latents, rising, the last d_sae: the reconstruction's loss is a
            weighted sum of the losses of reconstructions by the first so many latents alone
            (Matryoshka, arXiv 2503.17547). 0 stands for the bias alone.
        prefix_weights: what each counts: "mean", 1/P each of P prefixes (as matryoshka_sae, which
            has the prefix 0); "sum", 1 each (as SAELens); "dictionary_learning", 1/P^2 each; or
            numbers above 0.

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
    auxk: str = "dictionary_learning"
    multi_topk: bool = False
    multi_k: Sequence[int] | None = None
    multi_weights: float | Sequence[float] = 1 / 8
    prefixes: Sequence[int] | None = None
    prefix_weights: str | Sequence[float] = "mean"

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
        if self.auxk not in AUXK:
            raise ValueError(f"{owner}: auxk must be one of {', '.join(AUXK)}, got {self.auxk!r}")
        for name in ("skip", "normalize_decoder", "multi_topk"):
            self._set(name, bool(getattr(self, name)))
        self._check_multi(owner)
        self._check_prefixes(owner)

    def _check_multi(self, owner: str) -> None:
        ks = tuple(integers(owner, "multi_k", self.multi_k))
        if len(set(ks)) < len(ks) or not all(1 <= k <= self.d_sae for k in ks):
            want = f"different numbers in [1, {self.d_sae}]"
            raise ValueError(f"{owner}: multi_k must be {want}, got {list(ks)}")
        if self.multi_topk and ks:
            raise ValueError(f"{owner}: multi_k must be None with multi_topk, got {list(ks)}")
        self._set("multi_k", ks)
        one = isinstance(self.multi_weights, int | float)
        weights = (self.multi_weights,) * len(ks) if one else self.multi_weights
        self._set("multi_weights", positive(owner, "multi_weights", weights, len(ks), "multi_k"))

    def _check_prefixes(self, owner: str) -> None:
        widths = integers(owner, "prefixes", self.prefixes)
        rise = all(a < b for a, b in itertools.pairwise([-1, *widths]))
        if widths and not (rise and widths[-1] == self.d_sae):
            want = f"rise from 0 or more to d_sae = {self.d_sae}"
            raise ValueError(f"{owner}: prefixes must {want}, got {widths}")
        self._set("prefixes", tuple(widths))
        weights = self.prefix_weights
        if isinstance(weights, str):
            if weights not in PREFIX_WEIGHTS:
                names = ", ".join(PREFIX_WEIGHTS)
                raise ValueError(
                    f"{owner}: prefix_weights must be one of {names}, or numbers, got {weights!r}"
                )
            return
        weights = positive(owner, "prefix_weights", weights, len(widths), "prefixes")
        self._set("prefix_weights", weights)

    def rarer(self) -> dict[str, Any]:
        """Options that files leave out where they are as by default, plain values only."""
        options: dict[str, Any] = {}
        if self.auxk != "dictionary_learning":
            options["auxk"] = self.auxk
        if self.multi_k:
            weights: Any = self.multi_weights
            options |= {"multi_k": list(self.multi_k), "multi_weights": list(weights)}
        if self.prefixes:
            named = self.prefix_weights
            options["prefixes"] = list(self.prefixes)
            options["prefix_weights"] = named if isinstance(named, str) else list(named)
        return options

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


def integers(owner: str, arg: str, values: Any) -> list[int]:
    """Values as ints; None: none.

    Raises:
        TypeError: values is no list, or of something else.
    """
    if values is None:
        return []
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise TypeError(f"{owner}: {arg} must be a list of integers, got {values!r}")
    return [integer(owner, arg, value) for value in values]


def positive(owner: str, arg: str, values: Any, count: int, of: str) -> tuple[float, ...]:
    """Values as floats, one for each of `count`.

    Raises:
        ValueError: they are not finite, not above 0, or more or fewer.
    """
    weights = tuple(float(value) for value in values)
    if len(weights) != count or not all(0 < w < float("inf") for w in weights):
        raise ValueError(
            f"{owner}: {arg} must be {count} finite numbers above 0, one for each of {of}, got"
            f" {list(weights)}"
        )
    return weights


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
