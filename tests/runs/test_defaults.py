# SPDX-License-Identifier: Apache-2.0
"""Defaults that fit the length of the run."""

from __future__ import annotations

import numpy as np
import pytest

from ksae import cli
from ksae.runs import config as runconfig
from ksae.runs.config import RunConfig, TrainConfig, override, warmup_steps


@pytest.mark.parametrize(("steps", "warmup"), [(0, 0), (9, 0), (60, 6), (1000, 100), (10**6, 100)])
def test_warmup_scales_with_the_run(steps: int, warmup: int):
    assert warmup_steps(TrainConfig(steps=steps)) == warmup
    assert warmup_steps(TrainConfig(steps=steps, warmup=3)) == 3


def test_dead_after_fits_the_run():
    short = override(RunConfig(), ["train.steps=100", "train.batch_size=64"])
    assert runconfig.fitted(short).model.dead_after == 1600
    assert runconfig.fitted(RunConfig()).model.dead_after == 10_000 * 2048 // 4
    long = override(RunConfig(), ["train.tokens=1e9"])
    assert runconfig.fitted(long).model.dead_after == 10_000_000
    given = override(RunConfig(), ["model.dead_after=7"])
    assert runconfig.fitted(given).model.dead_after == 7


def test_steps_60_trains_without_other_options(tmp_path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).standard_normal((300, 6), np.float32))
    arguments = ["--activations", tmp_path / "x.npy", "--out", tmp_path / "run", "--steps", "60"]
    small = ["--d-sae", "16", "--k", "2", "--batch-size", "32", "--no-progress"]
    assert cli.run([*map(str, ["train", *arguments, *small])]) == 0
    saved = runconfig.read(tmp_path / "run" / "run.yaml")
    assert (saved.train.warmup, saved.model.dead_after) == (6, 60 * 32 // 4)
