# SPDX-License-Identifier: Apache-2.0
"""Small runs, and what they must leave."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import ksae
from ksae import cli
from ksae.activations import ActivationSource, ArraySource
from ksae.errors import UserError
from ksae.runs import checkpoint
from ksae.runs import log as runlog
from ksae.runs.config import LogConfig, TrainConfig
from ksae.runs.trainer import Trainer, TrainResult

d, F, k = 8, 32, 3
CONFIG = TrainConfig(
    batch_size=64,
    steps=20,
    lr=3e-3,
    warmup=5,
    decay=0.3,
    checkpoint_every=7,
    init_tokens=200,
    prefetch=0,
    threads=1,
    eval_tokens=0,
)
QUIET = LogConfig(every=1, progress=False)


def activations(n: int = 500, seed: int = 0) -> Tensor:
    """Sparse combinations of 16 directions, off centre."""
    g = torch.Generator().manual_seed(seed)
    codes = torch.rand(n, 16, generator=g) * (torch.rand(n, 16, generator=g) < 0.2)
    return codes @ torch.randn(16, d, generator=g) + 2.0


def model(**options: object) -> ksae.TopKSAE:
    torch.manual_seed(0)
    return ksae.TopKSAE(d, F, k, dead_after=300, **options)


def run(
    out: Path,
    config: TrainConfig = CONFIG,
    source: ActivationSource | None = None,
    coder: ksae.SparseCoder | None = None,
    **options: object,
) -> TrainResult:
    source = source or ArraySource([activations()])
    return Trainer(coder or model(), source, config, out=out, **{"log": QUIET, **options}).run()


def records(out: Path) -> list[dict[str, float]]:
    """The logged metrics without the speed, the one thing that may differ."""
    lines = runlog.read(out / "metrics.jsonl")
    return [{n: v for n, v in line.items() if n != "tokens_per_second"} for line in lines]


def assert_same_run(a: Path, b: Path) -> None:
    assert records(a) == records(b)
    last = [max((out / "checkpoints").iterdir()) for out in (a, b)]
    # Model, moments, masters, step, random state: all bytes of the checkpoint.
    assert last[0].name == last[1].name and last[0].read_bytes() == last[1].read_bytes()
    assert (a / "model.safetensors").read_bytes() == (b / "model.safetensors").read_bytes()


def assert_resumes(command: Callable[[str], list[str]], folder: Path) -> list[dict[str, float]]:
    """`ksae train` with the arguments for a folder's name, of 20 steps with a checkpoint each 7:
    a run that ends after step 14 and is resumed is the whole run; its logged metrics."""
    for out in ("a", "b"):
        assert cli.run(["train", *command(out)]) == 0
    checkpoint.step_path(folder / "b" / "checkpoints", 20).unlink()  # as if killed after step 14
    assert cli.run(["train", "--out", str(folder / "b"), "--resume", "--no-progress"]) == 0
    lines, again = (records(folder / out) for out in ("a", "b"))
    assert lines == again
    whole, resumed = (ksae.load(folder / out).state_dict() for out in ("a", "b"))
    assert whole.keys() == resumed.keys()
    for name, t in whole.items():
        assert torch.equal(resumed[name], t), name
    return lines


def refused(call: object, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        call()
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value), caught.value
