# SPDX-License-Identifier: Apache-2.0
"""What changes from step to step of a run: the learning rate, k and the weight of a penalty."""

from __future__ import annotations

from ksae.errors import UserError
from ksae.runs.config import TrainConfig, k_steps, total_steps, warmup_steps
from ksae.step.schedule import annealed_k, learning_rate, penalty_share
from ksae.step.train_step import TrainStep


def check(step: TrainStep, config: TrainConfig) -> None:
    """Refuse a schedule of something that the model has not.

    Raises:
        UserError: its activation has no k or no penalty, or not such a k.
    """
    activation = step.model.activation
    kind, start = type(activation).__name__, config.k_start
    if start is not None:
        try:
            for k in range(min(start, step.model.k), max(start, step.model.k) + 1):
                step.k = k
        except ValueError as error:
            reason = str(error).removeprefix("TrainStep: k ")
            raise UserError(f"train: train.k_start {reason}") from None
        step.k = None
    if config.penalty_warmup and not activation.penalized:
        got = config.penalty_warmup
        raise UserError(f"train: train.penalty_warmup must be 0 with {kind}, got {got}")


def follow(step: TrainStep, config: TrainConfig, t: int) -> float:
    """Prepare step t (0-based); returns its learning rate."""
    step.lr = learning_rate(
        t,
        lr=config.lr,
        steps=total_steps(config),
        warmup=warmup_steps(config),
        decay=config.decay,
        shape=config.decay_shape,
    )
    anneal = k_steps(config)
    if config.k_start is not None and anneal is not None:
        step.k = annealed_k(t, k=step.model.k, start=config.k_start, steps=anneal)
    if config.penalty_warmup:
        step.penalty = penalty_share(t, warmup=config.penalty_warmup)
    return step.lr
