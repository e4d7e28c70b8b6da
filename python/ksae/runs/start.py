# SPDX-License-Identifier: Apache-2.0
"""A run from its configuration: the checks, the data, the model, the training."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch

from ksae.activations import ActivationSource
from ksae.activations.progress import say
from ksae.coders.coder import SparseCoder
from ksae.files import container
from ksae.runs import checks
from ksae.runs import config as runconfig
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
    out = Path(config.out)
    with held(out, resume, restart) as newest:  # before any harvest
        if config.train.threads is not None:
            torch.set_num_threads(config.train.threads)
        device = pick_device(config.train.device)
        model: SparseCoder | None = None
        if config.model.start is not None:
            path = str(config.model.start if newest is None else newest)
            config, model = start_from(config, path, device)
        if newest is not None:
            compare_early(config, newest, allow_change)
        data = open_run_data(config, model)
        torch.manual_seed(config.train.seed)
        if model is None:
            model = build_model(config.model, data.train, dtype=config.train.dtype, device=device)
        trainer = Trainer(
            model,
            data.train,
            config.train,
            out=out,
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
        return trainer.run_from(newest)


def open_run_data(config: RunConfig, model: SparseCoder | None = None) -> RunData:
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
    return open_data(config.data, gradient=gradient, progress=config.log.progress, fits=fits)


def compare_early(config: RunConfig, newest: Path, allow_change: bool = False) -> None:
    """Before the data are made: what a resumed run must share and is known by now."""
    before = container.read_header(newest)["extra"]["identity"]
    known = {key: before["model"].get(key) for key in before["model"]}
    given = dataclasses.asdict(config.model)
    now: dict[str, Any] = {
        "train": dataclasses.asdict(config.train),
        "data": dataclasses.asdict(config.data),
        "model": {key: given[key] for key in known if given.get(key) is not None},
    }
    compare(before, now, str(newest), allow_change=allow_change, partly=True)
