# SPDX-License-Identifier: Apache-2.0
"""The data and the model of a run, made from its configuration."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ksae.activations import (
    ActivationSource,
    ArraySource,
    Contexts,
    LanguageModel,
    StreamSource,
    documents,
    harvest,
    load_model,
    open_source,
    tokenize,
)
from ksae.coders import GradTopKSAE, GradTopKTranscoder, SparseCoder, TopKSAE, Transcoder
from ksae.errors import UserError, first_line
from ksae.runs.config import DataConfig, ModelConfig


@dataclass(frozen=True)
class RunData:
    """The sources of a run; the last two are there where a language model makes the activations."""

    train: ActivationSource
    holdout: ActivationSource | None
    language_model: LanguageModel | None = None
    holdout_contexts: Contexts | None = None


def open_data(config: DataConfig, *, gradient: bool = False, progress: bool = True) -> RunData:
    """Open files of activations, or harvest them from a language model over a text.

    Held out is a share of the documents, or the last rows of a file. Which ones does not depend
    on the run's seed, so that runs can be compared. `gradient` harvests the gradients of
    `config.gradient` too; a file has them or has not.
    """
    if config.activations is not None:
        for key in ("model", "hook", "text", "exclude", "model_revision"):
            if getattr(config, key) is not None:
                raise UserError(
                    f"train: data.{key} must be left out where data.activations is given, "
                    f"got {getattr(config, key)!r}"
                )
        return _open_files(config)
    for key in ("model", "hook", "text"):
        if getattr(config, key) is None:
            raise UserError(
                f"train: data.{key} must be given, or a file as data.activations, got neither"
            )
    return _harvest(config, gradient, progress)


def _open_files(config: DataConfig) -> RunData:
    source = open_source(config.activations, config.targets)
    assert isinstance(source, ArraySource)  # files and cache folders always are
    if config.holdout == 0:
        return RunData(source, None)
    rows = source.num_tokens
    held = max(1, round(config.holdout * rows))
    if held >= rows:
        raise UserError(
            f"train: {source.name} must have more than {held} rows to hold out "
            f"data.holdout = {config.holdout}, got {rows}"
        )
    return RunData(source.part(0, rows - held), source.part(rows - held, rows))


def _harvest(config: DataConfig, gradient: bool, progress: bool) -> RunData:
    assert config.model is not None and config.hook is not None
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lm = load_model(
        config.model, device=device, dtype=config.model_dtype, revision=config.model_revision
    )
    contexts = tokenize(
        documents(config.text, field=config.field, separator=config.separator),
        lm.tokenizer,
        length=config.context,
        bos=config.bos,
        max_tokens=config.max_tokens,
        exclude=config.exclude or (),
    )
    held: Contexts | None = None
    if config.holdout > 0:
        contexts, held = contexts.split(config.holdout)
    loss = config.gradient if gradient else None

    def rows(part: Contexts, name: str) -> ActivationSource:
        assert config.hook is not None
        if config.stream:
            return StreamSource(
                lm.model, part, config.hook, target_hook=config.target_hook, gradient=loss
            )
        return harvest(
            lm.model,
            part,
            config.hook,
            None if config.cache is None else Path(config.cache) / name,
            target_hook=config.target_hook,
            gradient=loss,
            progress=progress,
            model_name=config.model,
        )

    return RunData(
        rows(contexts, "train"), None if held is None else rows(held, "holdout"), lm, held
    )


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
        "multi_topk": config.multi_topk,
        "dtype": dtype,
        "device": device,
    }
    if config.dead_after is not None:
        options["dead_after"] = config.dead_after
    if config.normalize_decoder is not None:
        options["normalize_decoder"] = config.normalize_decoder
    if config.beta is not None:
        options |= {"beta": config.beta, "mode": config.mode, "grad_norm": config.grad_norm}
    if config.kind == "sae":
        if source.d_out is not None:
            raise UserError(
                f"train: {source.name} must have no targets for model.kind = sae, "
                f"got targets of width {source.d_out}"
            )
        sae = TopKSAE if config.beta is None else GradTopKSAE
        return sae(source.d_in, config.d_sae, config.k, **options)
    if source.d_out is None:
        raise UserError(
            f"train: {source.name} must have targets for model.kind = transcoder: "
            "give data.targets or data.target_hook"
        )
    coder = Transcoder if config.beta is None else GradTopKTranscoder
    return coder(source.d_in, source.d_out, config.d_sae, config.k, skip=config.skip, **options)


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
