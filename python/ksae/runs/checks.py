# SPDX-License-Identifier: Apache-2.0
"""What is checked before the first long piece of work: services, sizes, numbers."""

from __future__ import annotations

from importlib import import_module

import torch
from torch import Tensor

from ksae.activations import ActivationSource, ArraySource
from ksae.coders.coder import SparseCoder
from ksae.errors import UserError
from ksae.runs.config import LogConfig, RunConfig


def check_services(config: LogConfig) -> None:
    """Refuse services whose package is not installed, or cannot be imported."""
    modules = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb"}
    for name, module in modules.items():
        if getattr(config, name):
            try:
                import_module(module)
            except ImportError:
                raise UserError(
                    f"train: log.{name} needs the package {name}: pip install {name}"
                ) from None


def check_needs(config: RunConfig) -> None:
    """Refuse a kind of model that the data named in the configuration cannot train."""
    data, kind = config.data, config.model.kind
    if data.activations is None and data.model is not None:
        if kind == "transcoder" and data.target_hook is None:
            raise UserError("train: data.target_hook must be given for a transcoder, got none")
        if kind == "sae" and data.target_hook is not None:
            raise UserError(
                "train: data.target_hook must be left out for model.kind = sae, "
                f"got {data.target_hook!r}"
            )


def check_widths(model: SparseCoder, source: ActivationSource, command: str = "train") -> None:
    """Refuse a source whose rows are not what the model reads and predicts."""
    if source.d_in != model.d_in:
        raise UserError(
            f"{command}: {source.name} must have the model's width d_in = {model.d_in}, "
            f"got {source.d_in}"
        )
    if source.d_out is None:
        if not model.centred:
            raise UserError(
                f"{command}: {source.name} must have targets for a transcoder, got none"
            )
    elif source.d_out != model.d_out:
        raise UserError(
            f"{command}: targets of {source.name} must have the model's width "
            f"d_out = {model.d_out}, got {source.d_out}"
        )


def check_gradient(source: ActivationSource, kind: str) -> None:
    """Refuse a source without gradients for a `kind` of model that selects by them."""
    if not source.has_gradient:
        raise UserError(
            f"train: {source.name} must have gradients for a {kind}, got none: "
            "harvest them with the activations, or leave out model.beta"
        )


def check_parameters(model: SparseCoder, command: str = "train", where: str = "") -> None:
    """Refuse a model with a parameter that is not finite."""
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise UserError(
                f"{command}: {name} of the model{where} must be finite, got NaN or inf: "
                "its file may be damaged"
            )


def check_rows(source: ActivationSource, tokens: int, dtype: torch.dtype) -> None:
    """Refuse a source of which one of the first `tokens` rows is not finite in `dtype`. Rows that a
    language model has yet to make are checked as it makes them."""
    if not isinstance(source, ArraySource):
        return
    left = tokens
    for x, y in source.sweep(4096):  # which looks at the rows as they are stored
        if not finite_in(dtype, x[:left], y):
            raise UserError(not_finite(source, dtype, "the held-out part"))
        left -= len(x)
        if left <= 0:
            return


def finite_in(dtype: torch.dtype, *rows: Tensor | None) -> bool:
    """Whether all entries are finite once they are cast to `dtype`."""
    return all(bool(t.to(dtype).isfinite().all()) for t in rows if t is not None)


def not_finite(source: ActivationSource, dtype: torch.dtype, where: str) -> str:
    kind = str(dtype).removeprefix("torch.")
    return (
        f"train: activations of {source.name} must be finite in {kind}, got NaN or inf at {where}"
    )


def without_variance(model: SparseCoder, target: Tensor) -> Tensor:
    """Whether all targets [N, d_out] are equal and the loss divides by their variance, [] bool."""
    equal = (target == target[:1]).all()
    return equal if model.loss == "fvu" else torch.zeros_like(equal)


def no_variance(source: ActivationSource, where: str) -> str:
    return (
        f"train: activations of {source.name} must differ from each other, got equal rows "
        f"at {where}: the loss divides by their variance"
    )
