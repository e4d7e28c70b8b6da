# SPDX-License-Identifier: Apache-2.0
"""A run from its configuration: the checks, the data, the model, the training."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ksae.activations import ActivationSource
from ksae.activations.progress import say
from ksae.coders.coder import SparseCoder
from ksae.parallel.ranks import Ranks
from ksae.runs import checks, ranks
from ksae.runs import config as runconfig
from ksae.runs.activation import check_fused
from ksae.runs.checkpoint import identity
from ksae.runs.config import RunConfig
from ksae.runs.data import RunData, open_data
from ksae.runs.directory import held
from ksae.runs.model import build_model, check_kind, pick_device, start_from
from ksae.runs.origin import differences, origin_of_file
from ksae.runs.resume import compare
from ksae.runs.trainer import Trainer, TrainResult


def train(
    config: RunConfig, *, resume: bool = False, restart: bool = False, allow_change: bool = False
) -> TrainResult:
    """Do the run that `config` describes, from its data to the finished model in `config.out`.

    Args: `resume`, `restart` and `allow_change` as `Trainer`.
    """
    config = runconfig.fitted(config)
    checks.check_services(config.log)
    with ranks.joined(config.train.timeout) as R:
        if R > 1:
            config = ranks.quiet(config)
        hold = ranks.held_by_one if R > 1 else held
        with hold(Path(config.out), resume, restart) as newest:  # before any harvest
            trainer = _prepare(config, newest, R, resume, restart, allow_change)
            return trainer.run_from(newest)


def _prepare(
    config: RunConfig,
    newest: Path | None,
    R: int,
    resume: bool,
    restart: bool,
    allow_change: bool,
) -> Trainer:
    """Data and model, on each of R ranks its part."""
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    device = pick_device(config.train.device)
    model: SparseCoder | None = None
    if config.model.start is not None:
        path = str(config.model.start if newest is None else newest)
        config, model = start_from(config, path, device)
        check_fused(model.activation, config, "train")
    if newest is not None:
        compare_early(config, newest, allow_change)
    data = open_run_data(config, model, ranks.all_of_them() if R > 1 else None)
    torch.manual_seed(config.train.seed)
    if model is None:
        model = build_model(config.model, data.train, dtype=config.train.dtype, device=device)
    kind = Trainer if R == 1 else ranks.RankTrainer
    trainer = kind(
        model if R == 1 else ranks.part_of(model, config.train),
        data.train,
        config.train,
        out=config.out,
        resume=resume,
        restart=restart,
        allow_change=allow_change,
        log=config.log,
        holdout=data.holdout,
        run=config,
        origin=data.origin,
    )
    if config.model.start is not None and newest is None:
        for line in differences(origin_of_file(config.model.start), data.origin):
            say(f"the model to start from was trained on other activations: {line}")
    return trainer


def open_run_data(
    config: RunConfig, model: SparseCoder | None = None, together: Ranks | None = None
) -> RunData:
    """The data of a run, refused before the harvest if they do not fit its model."""
    checks.check_needs(config)

    def fits(source: ActivationSource) -> None:
        check_kind(config.model, source)
        if model is not None:
            checks.check_widths(model, source)
        if config.model.beta is not None:
            kind = "GradTopKSAE" if config.model.kind == "sae" else "GradTopKTranscoder"
            checks.check_gradient(source, kind)

    gradient = config.model.beta is not None
    shown = config.log.progress
    return open_data(config.data, gradient=gradient, progress=shown, fits=fits, ranks=together)


def compare_early(config: RunConfig, newest: Path, allow_change: bool = False) -> None:
    """Before the data are made: what a resumed run must share and is known by now."""
    before = identity(newest)
    # an activation is compared by its fields, once the model is there
    known = [key for key, value in before["model"].items() if not isinstance(value, Mapping)]
    given = {  # as JSON has them
        key: list(value) if isinstance(value, tuple) else value
        for key, value in dataclasses.asdict(config.model).items()
    }
    now: dict[str, Any] = {
        "train": dataclasses.asdict(config.train),
        "data": dataclasses.asdict(config.data),
        "model": {key: given[key] for key in known if given.get(key) is not None},
    }
    compare(before, now, str(newest), allow_change=allow_change, partly=True)
