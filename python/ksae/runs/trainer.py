# SPDX-License-Identifier: Apache-2.0
"""The training loop: batches, learning rate, metrics, checkpoints, and an orderly end.

A run lives in one directory: run.yaml, metrics.jsonl, checkpoints/step_*.safetensors, and at its
end model.safetensors, evaluation.json and two pictures. Batch, learning rate and logged metrics of
step t are functions of the configuration and t, and a checkpoint holds all other state, so a
resumed run has the bits of an uninterrupted one (on a CPU, with as many threads).
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ksae.activations import ActivationSource
from ksae.activations.transfer import Readback
from ksae.analysis import plots
from ksae.coders.coder import SparseCoder
from ksae.coders.file import save
from ksae.coders.initialize import initialize_from, is_new
from ksae.errors import UserError, first_line
from ksae.files.atomic import clean
from ksae.runs import checkpoint, checks, finish, schedules
from ksae.runs import config as runconfig
from ksae.runs import log as runlog
from ksae.runs.batches import Batches
from ksae.runs.config import (
    LogConfig,
    RunConfig,
    TrainConfig,
    k_steps,
    total_steps,
    warmup_steps,
)
from ksae.runs.directory import drop, held
from ksae.runs.log import RunLog
from ksae.runs.resume import compare
from ksae.runs.signals import Interrupted, Signals
from ksae.runs.steps import Steps
from ksae.step.train_step import TrainStep

_FINITE = ("loss", "grad_norm")  # a step of which one is not is not taken
_EQUAL = "equal_rows"  # of the first batch, read with its metrics
ENOUGH_TOKENS = 2000  # of held-out ones, below which a run says that its evaluation is rough


@dataclass(frozen=True)
class TrainResult:
    """What a finished run left."""

    model: SparseCoder
    steps: int
    tokens: int
    metrics: dict[str, float]  # of the last logged step
    evaluation: dict[str, float]  # on held-out activations; empty without any
    out: Path
    model_path: Path
    plots: list[Path]
    held_out_tokens: int = 0  # that the evaluation is of
    rank: int = 0  # of a run of several processes, whose results are on rank 0


class Trainer:
    """Trains `model` on `source` into the directory `out`.

    Args:
        model: a TopKSAE, or a Transcoder for a source with targets; trained in place, on its own
            device. The first biases of a new one are set from the data; one that was loaded or
            trained before keeps its parameters.
        source: gives the batches; its widths must be those of the model.
        config: lengths, rates and so on. Its dtype, device, seed of the weights and threads are for
            `train`, which makes the model; here the model is what it is.
        out: new or empty; with `resume`, the directory of the run to go on with.
        resume: go on from the newest whole checkpoint, which must be there unless `out` is empty.
        restart: start over in the directory of a run, and drop what it left.
        allow_change: a resumed run may have another learning rate, length and so on
            (`ksae.runs.resume.CHANGEABLE`) from here on.
        holdout: held-out activations, measured at the end.
        run: the whole configuration, written to run.yaml; its data are part of what a resumed run
            must share with the run it goes on with.
        origin: which language model and hooks the activations are of, for the model's file.
    """

    def __init__(
        self,
        model: SparseCoder,
        source: ActivationSource,
        config: TrainConfig | None = None,
        *,
        out: str | Path,
        resume: bool = False,
        restart: bool = False,
        allow_change: bool = False,
        log: LogConfig | None = None,
        holdout: ActivationSource | None = None,
        run: RunConfig | None = None,
        origin: Mapping[str, str] | None = None,
    ) -> None:
        self.model, self.source, self.holdout = model, source, holdout
        self.config = config or TrainConfig()
        self.log_config = log or LogConfig()
        self.out, self.resume, self.restart = Path(out), resume, restart
        self.allow_change = allow_change
        self.run_config = run
        self.steps, self.warmup = total_steps(self.config), warmup_steps(self.config)
        self.identity: dict[str, Any] = {
            "model": model.config(),
            "train": {
                **dataclasses.asdict(self.config),
                "warmup": self.warmup,
                "k_steps": k_steps(self.config),
            },
            "source": {"tokens": source.num_tokens, "values": source.fingerprint()},
        }
        if run is not None:
            self.identity["data"] = dataclasses.asdict(run.data)
            self.identity["start"] = run.model.start
        if origin:
            self.identity["origin"] = dict(origin)
        self.step = 0  # steps done
        self.writes = True  # besides checkpoints
        self._parameter = next(model.parameters())
        self._remarks: list[str] = []  # said once all has been checked
        self._first_fvu: float | None = None  # before the first step
        checks.check_services(self.log_config)
        checks.check_parameters(model)
        self._since_fired = int(model.tokens_since_fired.max())
        checks.check_widths(model, source)
        if holdout is not None:
            checks.check_widths(model, holdout)
        self._batches = Batches(model, source, self.config)
        if model.needs_gradient:
            checks.check_gradient(source, type(model).__name__)
        config = self.config
        self.train_step = TrainStep(
            model,
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            clip_norm=config.clip_norm,
            clip=config.clip,
            decoder_lr=config.decoder_lr,
            fused=config.fused,
        )
        schedules.check(self.train_step, config)
        self._steps = Steps(self.train_step, config.graph)

    def run(self) -> TrainResult:
        """Train to the end. Raises Interrupted after SIGINT or SIGTERM, UserError on bad input;
        what fails before the first line of metrics leaves nothing in a new directory."""
        with held(self.out, self.resume, self.restart) as newest:
            return self.run_from(newest)

    def run_from(self, newest: Path | None) -> TrainResult:
        """`run` from a checkpoint, or from the first step, in a directory that is held already."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings("ignore", "TrainStep: a step was not taken")  # an error says it
            with Signals() as signals:
                if newest is not None:
                    self._restore(newest)
                self._check_start()
                if newest is None:
                    self._initialize()
                    if self.restart and self.writes:
                        drop(self.out)
                    stack.push(self._drop_if_nothing)
                log = self._begin(newest)
                stack.callback(log.close)
                self._loop(log, signals, saved=newest is not None)
            log.end_bar()
            return self._finish(log)

    def _check_start(self) -> None:
        """What would otherwise end the run late."""
        if self.steps < self.step:
            raise UserError(
                f"resume: train.steps must be at least the {self.step} steps done, got {self.steps}"
            )
        config, log = self.config, self.log_config
        left = (self.steps - self.step) * config.batch_size
        if self.step == 0 and 0 < left <= self.model.dead_after - self._since_fired:
            self._remarks.append(
                f"dead_after is {self.model.dead_after:,} tokens, which this run of {left:,} does "
                "not reach: no latent will count as dead, nor be revived"
            )
        if not plots.available():
            self._remarks.append(finish.NO_PICTURES)
        if self.holdout is not None and config.eval_tokens > 0:
            checks.check_rows(self.holdout, config.eval_tokens, self._parameter.dtype)
            held = self.holdout.num_tokens
            if held is not None and held < ENOUGH_TOKENS:
                self._remarks.append(
                    f"held out: {held:,} tokens only, too few for more than a rough evaluation; "
                    "raise data.holdout or give more data"
                )
        if log.progress:
            held = None if self.holdout is None else self.holdout.num_tokens
            what = f"data: {_count(self.source.num_tokens)} tokens to train on"
            self._remarks.append(f"{what}, {0 if self.holdout is None else _count(held)} held out")

    def _begin(self, newest: Path | None) -> RunLog:
        """Write the first files of the run; from here on the directory is a run's."""
        for directory in (self.out, self._checkpoints):
            clean(directory)
        log = RunLog(
            self.out,
            start=self.step,
            steps=self.steps,
            config=self.identity,
            tensorboard=self.log_config.tensorboard,
            wandb=self.log_config.wandb,
            progress=self.log_config.progress,
        )
        if self.run_config is not None:
            runconfig.write(self.run_config, self.out / "run.yaml")
        for remark in self._remarks:
            log.say(remark)
        if newest is not None:
            log.say(f"{self.out}: going on after step {self.step} of {self.steps}")
        return log

    def _drop_if_nothing(self, kind: object, *error: object) -> None:
        """After a failure before the first line of metrics and the first checkpoint."""
        if not self.writes:
            return
        lines = self.out / "metrics.jsonl"
        empty = not lines.is_file() or lines.stat().st_size == 0
        if kind is not None and empty and checkpoint.latest(self._checkpoints) is None:
            drop(self.out)

    @property
    def tokens(self) -> int:
        """Tokens trained on."""
        return self.step * self.config.batch_size

    @property
    def _checkpoints(self) -> Path:
        return self.out / "checkpoints"

    def _loop(self, log: RunLog, signals: Signals, saved: bool) -> None:
        config, model = self.config, self.model
        model.train()
        # Metrics are read one step late, so that on a GPU the next step is already queued while the
        # host waits.
        waiting: tuple[int, Readback, float] | None = None
        batches = self._batches.stream(self.step)
        clock, first = _Clock(self.tokens), self.step
        with contextlib.closing(batches):
            while self.step < self.steps and not self._stop(signals):
                try:
                    x, y, g = self._batches.next(batches, self.step)
                except UserError as error:
                    if waiting is not None:
                        self._record(*waiting, log, clock)
                    raise self._kept(error, log, saved) from None
                rate = schedules.follow(self.train_step, config, self.step)
                metrics = self._take(x, y, g)
                self._steps.tell(log.say)
                if self.step == first:
                    metrics[_EQUAL] = checks.without_variance(model, x if y is None else y)
                self.step += 1
                saved = False
                if waiting is not None:
                    self._record(*waiting, log, clock)
                waiting = self.step, Readback(self._wanted(metrics)), rate
                if self.step % config.checkpoint_every == 0 or self.step == self.steps:
                    self._record(*waiting, log, clock)
                    waiting = None
                    self._save(log)
                    saved = True
                log.advance()
        if waiting is not None:
            self._record(*waiting, log, clock)
        if signals.received is not None:
            if not saved:
                self._save(log)
            raise Interrupted(signals.received, self.step, self._checkpoint_path())
        if not saved:  # a run of no steps
            self._save(log)

    def _kept(self, error: UserError, log: RunLog, saved: bool) -> UserError:
        """The data end the run: its steps so far are saved, and the error says so."""
        if self.step < self.log_config.every:  # no line of metrics yet
            return error
        if not saved:
            self._save(log)
        path = self._checkpoint_path()
        return UserError(f"{error}; the {self.step} steps so far are saved, to be resumed: {path}")

    def _take(self, x: Tensor, y: Tensor | None, g: Tensor | None) -> dict[str, Tensor]:
        return self._steps(x, y, grad=g)

    def _stop(self, signals: Signals) -> bool:
        return signals.received is not None

    def _initialize(self) -> None:
        """Set the first biases of a new model from the first batches."""
        wanted = self.config.init_tokens
        if self.source.num_tokens is not None:
            wanted = min(wanted, self.source.num_tokens)
        if wanted == 0 or not is_new(self.model):
            return
        x, y = self._batches.first(wanted)  # [N, d_in], [N, d_out]
        dtype = self._parameter.dtype
        if not checks.finite_in(dtype, x, y):
            raise UserError(checks.not_finite(self.source, dtype, "the first batches"))
        if bool(checks.without_variance(self.model, x if y is None else y)):
            raise UserError(checks.no_variance(self.source, "the first batches"))
        initialize_from(self.model, x, y, encoder_scale=self.config.encoder_scale)

    def _is_logged(self, step: int) -> bool:
        return step % self.log_config.every == 0 or step == self.steps

    def _wanted(self, metrics: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What the host has to know of the step that was just taken."""
        if self._is_logged(self.step) or _EQUAL in metrics:
            return metrics
        return {name: metrics[name] for name in _FINITE if name in metrics}

    def _record(
        self, step: int, metrics: Readback, rate: float, log: RunLog, clock: _Clock
    ) -> None:
        """Refuse a loss or gradient that is not finite; log the step if it is one to log."""
        numbers = metrics.get()
        if numbers.pop(_EQUAL, 0.0):
            raise UserError(checks.no_variance(self.source, f"step {step}"))
        for name in _FINITE:
            # TrainStep has left everything as it was before this step.
            value = numbers.get(name, 0.0)
            if not math.isfinite(value):
                raise UserError(self._explain(step, name, value))
        if step == 1:
            self._first_fvu = numbers.get("fvu")
        if not self._is_logged(step):
            return
        tokens = step * self.config.batch_size
        record: dict[str, float] = {"step": step, "tokens": tokens, **numbers}
        record |= {"lr": rate, **clock.read(tokens)}
        log.write(record)

    def _explain(self, step: int, name: str, value: float) -> str:
        # The stream is a function of the step: the batch can be read again.
        x, y, _ = self._batches.at(step - 1)
        dtype = self._parameter.dtype
        if not checks.finite_in(dtype, x, y):
            return checks.not_finite(self.source, dtype, f"step {step}")
        if bool(checks.without_variance(self.model, x if y is None else y)):
            return checks.no_variance(self.source, f"step {step}")
        kept = checkpoint.latest(self._checkpoints)
        what = f"; the checkpoint {kept} is kept" if kept else ""
        return f"train: {name} must be finite, got {value} at step {step}: lower train.lr{what}"

    def _checkpoint_path(self) -> Path:
        return checkpoint.step_path(self._checkpoints, self.step)

    def _check_finite(self) -> None:
        for name, parameter in self.model.named_parameters():
            # The last update can overflow without any loss having shown it yet.
            if not bool(parameter.isfinite().all()):
                raise UserError(
                    f"train: {name} must be finite after step {self.step}, got NaN or inf: "
                    "lower train.lr; no checkpoint was overwritten"
                )

    def _save(self, log: RunLog) -> None:
        self._check_finite()
        log.sync()
        state = {"step": self.step, "rng": torch.get_rng_state(), "first_fvu": self._first_fvu}
        extra = {"identity": self.identity}
        path = self._checkpoint_path()
        checkpoint.save_training(path, self.model, self.train_step, state, extra)
        checkpoint.prune(self._checkpoints, self.config.keep_last)

    def _restore(self, path: Path) -> None:
        before = checkpoint.identity(path)
        changed = compare(before, self.identity, str(path), allow_change=self.allow_change)
        state = checkpoint.load_training(path, self.model, self.train_step)
        self.step, self._first_fvu = state["step"], state.get("first_fvu")
        if "rng" in state:
            torch.set_rng_state(state["rng"])
        for key, (old, new) in changed.items():
            self._remarks.append(f"{key}: {old} -> {new} after step {self.step}")
        written = self.out / "run.yaml"
        if changed and self.writes and written.is_file():  # what the steps so far were taken with
            os.replace(written, self.out / f"run_step_{self.step:08d}.yaml")

    def _finish(self, log: RunLog) -> TrainResult:
        model_path = self.out / "model.safetensors"
        save(self.model, model_path, {"identity": self.identity})
        lines, result = runlog.read(log.path), None
        try:
            if self.holdout is not None and self.config.eval_tokens > 0:
                shown = self.log_config.progress
                result = finish.measure_held_out(
                    self.model, self.holdout, self.config, self.out, self.step, shown
                )
                log.held_out(result.metrics, self.step)
            pictures = finish.draw(self.out, log.path, bool(lines), result)
        except KeyboardInterrupt:
            log.say(f"the model is saved: {model_path}")
            raise
        except Exception as error:
            raise UserError(
                f"train: the model is saved, {model_path}, but its evaluation failed: "
                f"{first_line(error)}"
            ) from error
        metrics = {} if result is None else result.metrics
        remark = finish.check_learned(self._first_fvu, lines, metrics, model_path)
        if remark is not None:
            log.say(remark)
        return TrainResult(
            model=self.model,
            steps=self.step,
            tokens=self.tokens,
            metrics=lines[-1] if lines else {},
            evaluation=metrics,
            out=self.out,
            model_path=model_path,
            plots=pictures,
            held_out_tokens=0 if result is None else result.tokens,
        )


def _count(tokens: int | None) -> str:
    return "an unknown number of" if tokens is None else f"{tokens:,}"


class _Clock:
    """Speed since the last reading."""

    def __init__(self, tokens: int) -> None:
        self._time, self._tokens = time.perf_counter(), tokens

    def read(self, tokens: int) -> dict[str, float]:
        now = time.perf_counter()
        rate = (tokens - self._tokens) / max(now - self._time, 1e-9)
        self._time, self._tokens = now, tokens
        return {"tokens_per_second": round(rate, 1)}
