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

from ksae.coders.activation import BatchTopK
from ksae.coders.coder import SparseCoder
from ksae.errors import UserError
from ksae.parallel import ranks as processes
from ksae.parallel.checkpoint import save_sharded
from ksae.parallel.cost import Sizes
from ksae.parallel.layout import best_replicas
from ksae.parallel.ranks import Ranks
from ksae.parallel.shard import SERVED, shard, unshard
from ksae.runs import checkpoint
from ksae.runs.activation import NAMES
from ksae.runs.config import LogConfig, RunConfig, TrainConfig
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
        UserError: a batch cannot be divided among the ranks, or they do not serve something.
    """
    R = dist.get_world_size()
    if config.train.batch_size % R:
        raise UserError(
            f"train: train.batch_size must be a multiple of the {R} processes, got"
            f" {config.train.batch_size}"
        )
    if (replicas := config.train.replicas) is not None and (replicas < 1 or R % replicas):
        raise UserError(
            f"train: train.replicas must divide the {R} processes, or be left out, got {replicas}"
        )
    served = [name for kind, name in NAMES.items() if kind in SERVED]
    if config.model.start is None and config.model.activation not in served:
        names = ", ".join(dict.fromkeys(served))
        raise UserError(
            f"train: model.activation must be one of {names} for several processes, got"
            f" {config.model.activation}"
        )
    if config.model.activation == "batch_topk" and config.train.dtype != "float32":
        raise UserError(
            "train: train.dtype must be float32 with batch_topk for several processes, got"
            f" {config.train.dtype}"
        )
    if not config.train.fused:
        raise UserError("train: train.fused must be true for several processes, got false")
    return (
        config
        if dist.get_rank() == 0
        else dataclasses.replace(config, log=LogConfig(progress=False))
    )


def part_of(model: SparseCoder, config: TrainConfig) -> SparseCoder:
    """This rank's part of a new model, in as many replicas as the configuration says or sends
    least; what is known of it to all ranks is the same."""
    R, replicas = dist.get_world_size(), config.replicas
    if replicas is None:
        sizes = Sizes(
            R,
            config.batch_size // R,
            model.d_out,
            model.d_sae,
            max(model.k, 1),
            model.W_enc.element_size(),
            prefixes=max(len(model.prefixes), 1),
            batch=isinstance(model.activation, BatchTopK),
        )
        replicas = best_replicas(sizes)
    return shard(model, replicas=replicas)


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


def all_of_them() -> Ranks:
    """The processes of the run."""
    assert dist.group.WORLD is not None
    return Ranks(dist.group.WORLD)


class RankTrainer(Trainer):
    """One rank of a run, for a model of `ksae.shard`; arguments as `Trainer`, on every rank."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self.ranks = self.model.ranks
        self.everyone: Ranks = self.ranks.everyone
        self.writes = self.ranks.leads

    def _take(self, x: Tensor, y: Tensor | None, g: Tensor | None) -> dict[str, Tensor]:
        x, y, g = (None if t is None else self.everyone.own(t) for t in (x, y, g))  # type: ignore[assignment]
        return self.train_step(x, y, grad=g)

    def _stop(self, signals: Signals) -> bool:
        """A signal to one rank is one to all: they end after the same step."""
        mine = torch.tensor([signals.received or 0], device=self.everyone.device)
        signals.received = int(self.everyone.gather(mine, "signals").max()) or None
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
            rank=self.everyone.rank,
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
