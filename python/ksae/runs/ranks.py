# SPDX-License-Identifier: Apache-2.0
"""A run of several processes, which torchrun starts: each holds a part of the latents and takes its
part of every batch; rank 0 alone writes, besides the parts of checkpoints.

A step is that of one process on the same batch, so a run goes on with any number of processes.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ksae.errors import UserError
from ksae.parallel import ranks as processes
from ksae.parallel.checkpoint import save_sharded
from ksae.parallel.shard import unshard
from ksae.parallel.shards import Shards
from ksae.runs import checkpoint
from ksae.runs.config import LogConfig, RunConfig
from ksae.runs.directory import held
from ksae.runs.log import RunLog
from ksae.runs.signals import Signals
from ksae.runs.trainer import Trainer, TrainResult


@contextlib.contextmanager
def joined(timeout: float) -> Iterator[int]:
    """Joined with the processes that torchrun has started: their number, 1 without it."""
    if not processes.set_up(timeout):
        yield 1
        return
    try:
        yield dist.get_world_size()
    finally:
        dist.destroy_process_group()


def quiet(config: RunConfig) -> RunConfig:
    """The configuration of a rank: rank 0 alone logs.

    Raises:
        UserError: a batch cannot be divided among the ranks.
    """
    R = dist.get_world_size()
    if config.train.batch_size % R:
        raise UserError(
            f"train: train.batch_size must be a multiple of the {R} processes, got"
            f" {config.train.batch_size}"
        )
    if not config.train.fused:
        raise UserError("train: train.fused must be true for several processes, got false")
    return (
        config
        if dist.get_rank() == 0
        else dataclasses.replace(config, log=LogConfig(progress=False))
    )


@contextlib.contextmanager
def held_by_one(out: Path, resume: bool, restart: bool) -> Iterator[Path | None]:
    """`held` by rank 0 for all: the checkpoint to go on from, or the same error on every rank."""
    told: list[Any] = [None, None]
    with contextlib.ExitStack() as stack:
        try:
            if dist.get_rank() == 0:
                told[0] = stack.enter_context(held(out, resume, restart))
        except UserError as error:
            told[1] = str(error)
        dist.broadcast_object_list(told, src=0)
        if told[1] is not None:
            raise UserError(told[1])
        yield told[0]


@contextlib.contextmanager
def one_after_the_other(wanted: bool) -> Iterator[None]:
    """Rank 0 does the block before the others do, which find what it has kept on disk."""
    if wanted and dist.get_rank() > 0:
        dist.barrier()
    yield
    if wanted and dist.get_rank() == 0:
        dist.barrier()


class RankTrainer(Trainer):
    """One rank of a run, for a model of `ksae.shard`; arguments as `Trainer`, on every rank."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        assert isinstance(self.model.ranks, Shards)
        self.ranks = self.model.ranks
        self.writes = self.ranks.rank == 0

    def _take(self, x: Tensor, y: Tensor | None, g: Tensor | None) -> dict[str, Tensor]:
        x, y, g = (None if t is None else self.ranks.own(t) for t in (x, y, g))  # type: ignore[assignment]
        return self.train_step(x, y, grad=g)

    def _stop(self, signals: Signals) -> bool:
        """A signal to one rank is one to all: they end after the same step."""
        mine = torch.tensor([signals.received or 0], device=self.ranks.device)
        signals.received = int(self.ranks.gather(mine, "signals").max()) or None
        return super()._stop(signals)

    def _begin(self, newest: Path | None) -> RunLog:
        return super()._begin(newest) if self.writes else Silent()

    def _checkpoint_path(self) -> Path:
        return super()._checkpoint_path().with_suffix("")

    def _save(self, log: RunLog) -> None:
        try:
            self._check_finite()
            log.sync()
        except UserError as error:
            self.ranks.refuse("save", error)
            raise
        state = {"identity": self.identity, "step": self.step, "first_fvu": self._first_fvu}
        save_sharded(self._checkpoint_path(), self.model, self.train_step, state)
        if self.writes:
            checkpoint.prune(self._checkpoints, self.config.keep_last)

    def _finish(self, log: RunLog) -> TrainResult:
        """Rank 0 holds the whole model from here on, and measures it."""
        whole = unshard(self.model)
        if whole is not None:
            self.model = whole
            return super()._finish(log)
        return TrainResult(
            model=self.model,
            steps=self.step,
            tokens=self.tokens,
            metrics={},
            evaluation={},
            out=self.out,
            model_path=self.out / "model.safetensors",
            plots=[],
            rank=self.ranks.rank,
        )


class Silent(RunLog):
    """The log of a rank that writes none."""

    def __init__(self) -> None:
        pass

    def advance(self, steps: int = 1) -> None:
        pass

    def write(self, record: Mapping[str, float]) -> None:
        pass

    def end_bar(self) -> None:
        pass

    def say(self, line: str) -> None:
        pass

    def sync(self) -> None:
        pass

    def close(self) -> None:
        pass
