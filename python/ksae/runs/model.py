# SPDX-License-Identifier: Apache-2.0
"""The model of a run: a new one, or one that goes on from another's parameters."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from ksae.activations import ActivationSource
from ksae.coders import (
    SAE,
    GradTopKSAE,
    GradTopKTranscoder,
    SparseCoder,
    TopKSAE,
    Transcoder,
)
from ksae.errors import UserError, first_line
from ksae.interop.load import load
from ksae.runs.activation import NAMES, activation_of, check_activation, objective_of
from ksae.runs.checks import check_parameters
from ksae.runs.config import RunConfig, check_lists
from ksae.runs.model_config import ModelConfig

# Of a model to start from: what it computes, and the objective of its activation. How it is trained
# otherwise is said anew.
TAKEN = (
    "kind", "d_sae", "k", "activation", "skip", "beta", "mode", "grad_norm",
    "threshold", "l0", "l0_weight", "theta", "parametrization", "bandwidth",
    "l1", "decoder_norm", "p_end", "p_steps",
)  # fmt: skip


def build_model(
    config: ModelConfig,
    source: ActivationSource,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
) -> SparseCoder:
    """A new model of the widths of `source`."""
    options: dict[str, Any] = {
        "loss": config.loss,
        "auxk_alpha": config.auxk_alpha,
        "k_aux": config.k_aux,
        "auxk": config.auxk,
        "multi_topk": config.multi_topk,
        "multi_k": config.multi_k,
        "prefixes": config.prefixes,
        "prefix_weights": config.prefix_weights,
        "dtype": dtype,
        "device": device,
    }
    if config.dead_after is not None:
        options["dead_after"] = config.dead_after
    if config.normalize_decoder is not None:
        options["normalize_decoder"] = config.normalize_decoder
    if config.beta is not None:
        options |= {"beta": config.beta, "mode": config.mode, "grad_norm": config.grad_norm}
    check_kind(config, source)
    if config.activation != "topk":
        activation = activation_of(config)
        if config.kind == "sae":
            return SAE(source.d_in, config.d_sae, activation, **options)
        assert source.d_out is not None
        options |= {"activation": activation, "skip": config.skip}
        return Transcoder(source.d_in, source.d_out, config.d_sae, **options)
    if config.kind == "sae":
        sae = TopKSAE if config.beta is None else GradTopKSAE
        return sae(source.d_in, config.d_sae, config.k, **options)
    assert source.d_out is not None
    coder = Transcoder if config.beta is None else GradTopKTranscoder
    return coder(source.d_in, source.d_out, config.d_sae, config.k, skip=config.skip, **options)


def check_kind(config: ModelConfig, source: ActivationSource) -> None:
    """Refuse a source that has targets or has none against the kind of the model, or no gradient
    where it selects by one."""
    if config.kind == "sae" and source.d_out is not None:
        raise UserError(
            f"train: {source.name} must have no targets for model.kind = sae, "
            f"got targets of width {source.d_out}"
        )
    if config.kind == "transcoder" and source.d_out is None:
        raise UserError(
            f"train: {source.name} must have targets for model.kind = transcoder: "
            "give data.targets or data.target_hook"
        )


def start_from(
    config: RunConfig, path: str, device: torch.device | str | None
) -> tuple[RunConfig, SparseCoder]:
    """The model at `path` with the training options of `config`, and `config` with what is taken
    from it.

    Raises:
        UserError: `config` says otherwise, or a parameter is not finite.
    """
    model = load(path, device=device, dtype=getattr(torch, config.train.dtype))
    check_parameters(model, where=f" {path}")
    options = model.activation.options()
    sizes: dict[str, Any] = {
        "kind": "sae" if model.topology == "sae" else "transcoder",
        "d_sae": model.d_sae,
        "k": model.k or min(config.model.k, model.d_sae),
        "activation": NAMES[type(model.activation)],
        "skip": model.skip,
        **{key: options[key] for key in ("beta", "mode", "grad_norm") if key in options},
        **objective_of(model.activation),
    }
    default, given = ModelConfig(), config.model
    for key in TAKEN:
        value = sizes.setdefault(key, getattr(default, key))
        if getattr(given, key) not in (getattr(default, key), value):
            raise UserError(
                f"train: model.{key} must be {value!r}, that of the model to start from, or left "
                f"out, got {getattr(given, key)!r}"
            )
    taken = dataclasses.replace(given, **sizes)
    check_activation(taken, "train")
    check_lists(taken, "train")
    keep = model.settings
    model.settings = dataclasses.replace(
        keep,
        owner=type(model).__name__,
        loss=given.loss,
        auxk_alpha=given.auxk_alpha,
        auxk=given.auxk,
        multi_topk=given.multi_topk,
        multi_k=given.multi_k,
        multi_weights=1 / 8,
        prefixes=keep.prefixes if given.prefixes is None else given.prefixes,
        prefix_weights=keep.prefix_weights if given.prefixes is None else given.prefix_weights,
        k_aux=keep.k_aux if given.k_aux is None else given.k_aux,
        dead_after=keep.dead_after if given.dead_after is None else given.dead_after,
        normalize_decoder=(
            keep.normalize_decoder if given.normalize_decoder is None else given.normalize_decoder
        ),
    )
    return dataclasses.replace(config, model=taken), model


def pick_device(name: str | None) -> torch.device:
    """The device named, else a GPU if there is one."""
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise UserError(
            f"train: train.device {name!r} cannot be used: {first_line(error)}"
        ) from None
    return device
