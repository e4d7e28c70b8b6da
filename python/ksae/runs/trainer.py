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
import json
import math
import time
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ksae.activations import ActivationSource, prefetch
from ksae.activations.transfer import Readback, staged
from ksae.analysis import plots
from ksae.analysis.evaluate import evaluate
from ksae.coders.coder import SparseCoder
from ksae.coders.file import save
from ksae.coders.initialize import initialize_from
from ksae.errors import UserError
from ksae.files import container
from ksae.files.atomic import clean, write_atomic
from ksae.runs import checkpoint
from ksae.runs import config as runconfig
from ksae.runs import log as runlog
from ksae.runs.config import LogConfig, RunConfig, TrainConfig, total_steps, warmup_steps
from ksae.runs.data import build_model, open_data, pick_device
from ksae.runs.directory import compare, open_directory
from ksae.runs.log import RunLog
from ksae.runs.signals import Interrupted, Signals
from ksae.step.schedule import learning_rate
from ksae.step.train_step import TrainStep

_FINITE = ("loss", "grad_norm")  # a step of which one is not is not taken
_Batch = tuple[Tensor, "Tensor | None", "Tensor | None"]  # x, y and the gradient, each [N, d]


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


class Trainer:
    """Trains `model` on `source` into the directory `out`.

    Args:
        model: a TopKSAE, or a Transcoder for a source with targets; trained in place, on its own
            device.
        source: gives the batches; its widths must be those of the model.
        config: lengths, rates and so on. Its dtype, device, seed of the weights and threads are for
            `train`, which makes the model; here the model is what it is.
        out: new or empty; with `resume`, the directory of the run to go on with.
        resume: go on from the newest whole checkpoint.
        holdout: held-out activations, measured at the end.
        run: the whole configuration, written to run.yaml; its data are part of what a resumed run
            must share with the run it goes on with.
    """

    def __init__(
        self,
        model: SparseCoder,
        source: ActivationSource,
        config: TrainConfig | None = None,
        *,
        out: str | Path,
        resume: bool = False,
        log: LogConfig | None = None,
        holdout: ActivationSource | None = None,
        run: RunConfig | None = None,
    ) -> None:
        self.model, self.source, self.holdout = model, source, holdout
        self.config = config or TrainConfig()
        self.log_config = log or LogConfig()
        self.out, self.resume = Path(out), resume
        self.run_config = run
        self.steps, self.warmup = total_steps(self.config), warmup_steps(self.config)
        self.identity: dict[str, Any] = {
            "model": model.config(),
            "train": {**dataclasses.asdict(self.config), "warmup": self.warmup},
            "source": {"tokens": source.num_tokens},
        }
        if run is not None:
            self.identity["data"] = dataclasses.asdict(run.data)
        self.step = 0  # steps done
        self._parameter = next(model.parameters())
        _check_widths(model, source)
        if holdout is not None:
            _check_widths(model, holdout)
        self._needs_gradient = model.needs_gradient
        if self._needs_gradient and not source.has_gradient:
            raise UserError(
                f"train: {source.name} must have gradients for a {type(model).__name__}, got none: "
                "harvest them with the activations, or leave out model.beta"
            )
        config = self.config
        self.train_step = TrainStep(
            model,
            lr=config.lr,
            betas=(config.beta1, config.beta2),
            eps=config.eps,
            clip_norm=config.clip_norm,
            clip=config.clip,
            fused=config.fused,
        )

    def run(self) -> TrainResult:
        """Train to the end. Raises Interrupted after SIGINT or SIGTERM, UserError on bad input."""
        open_directory(self.out, self.resume)
        for directory in (self.out, self._checkpoints):
            clean(directory)
        with Signals() as signals, contextlib.ExitStack() as stack:
            newest = checkpoint.latest(self._checkpoints)
            if newest is not None:
                self._restore(newest)
            if self.run_config is not None:
                runconfig.write(self.run_config, self.out / "run.yaml")
            log = RunLog(
                self.out,
                start=self.step,
                steps=self.steps,
                config=self.identity,
                tensorboard=self.log_config.tensorboard,
                wandb=self.log_config.wandb,
                progress=self.log_config.progress,
            )
            stack.callback(log.close)
            if self.step > 0:
                log.say(f"{self.out}: going on after step {self.step} of {self.steps}")
            if newest is None:
                self._initialize()
            self._loop(log, signals, saved=newest is not None)
        return self._finish(log)

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
        batches = self._batches(self.step)
        clock = _Clock(self.tokens)
        with contextlib.closing(batches):
            while self.step < self.steps and signals.received is None:
                x, y, g = self._next(batches)
                rate = learning_rate(
                    self.step,
                    lr=config.lr,
                    steps=self.steps,
                    warmup=self.warmup,
                    decay=config.decay,
                    shape=config.decay_shape,
                )
                self.train_step.lr = rate
                metrics = self.train_step(x, y, grad=g)
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
            raise Interrupted(
                signals.received, self.step, checkpoint.step_path(self._checkpoints, self.step)
            )
        if not saved:  # a run of no steps
            self._save(log)

    def _next(self, batches: Iterator[_Batch]) -> _Batch:
        try:
            x, y, g = next(batches)
        except StopIteration:
            raise UserError(
                f"train: {self.source.name} ended before step {self.step + 1} of {self.steps}: "
                "it must give batches without end"
            ) from None
        if len(x) == 0:
            raise UserError(
                f"train: {self.source.name} gave an empty batch at step {self.step + 1}"
            )
        g = None if g is None else g.to(self._parameter.device, non_blocking=True)
        return self._place(x), None if y is None else self._place(y), g

    def _place(self, x: Tensor) -> Tensor:
        return x.to(self._parameter.device, self._parameter.dtype, non_blocking=True)

    def _staged(self, batch: _Batch) -> _Batch:
        """In the thread that fetches batches ahead, if there is one."""
        x, y, g = batch
        device, dtype = self._parameter.device, self._parameter.dtype
        return (
            staged(x, device, dtype),
            None if y is None else staged(y, device, dtype),
            # a gradient is scaled before it is rounded to the parameters' dtype
            None if g is None else staged(g, device),
        )

    def _batches(self, start: int) -> Generator[_Batch, None, None]:
        """The source's stream, as a generator that can be closed."""
        config = self.config
        place = {"seed": config.seed, "start_step": start}
        stream: Iterator[_Batch]
        if self._needs_gradient:
            stream = self.source.gradient_batches(config.batch_size, **place)
        else:
            plain = self.source.batches(config.batch_size, **place)
            stream = ((x, y, None) for x, y in plain)
        stream = (self._staged(batch) for batch in stream)
        if config.prefetch == 0:
            yield from stream
            return
        with prefetch(stream, config.prefetch) as ahead:
            yield from ahead

    def _initialize(self) -> None:
        """Set the first biases from the first batches; a resumed run has them in its checkpoint."""
        wanted = self.config.init_tokens
        if self.source.num_tokens is not None:
            wanted = min(wanted, self.source.num_tokens)
        if wanted == 0:
            return
        xs: list[Tensor] = []
        ys: list[Tensor] = []
        with contextlib.closing(self._batches(0)) as batches:
            while sum(map(len, xs)) < wanted:
                x, y, _ = self._next(batches)
                xs.append(x)
                if y is not None:
                    ys.append(y)
        x = torch.cat(xs)[:wanted]  # [N, d_in]
        y = torch.cat(ys)[:wanted] if ys else None  # [N, d_out]
        for t in (x, y):
            if t is not None and not bool(t.isfinite().all()):
                raise UserError(self._bad_activations("the first batches"))
        initialize_from(self.model, x, y)

    def _is_logged(self, step: int) -> bool:
        return step % self.log_config.every == 0 or step == self.steps

    def _wanted(self, metrics: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """What the host has to know of the step that was just taken."""
        if self._is_logged(self.step):
            return metrics
        return {name: metrics[name] for name in _FINITE if name in metrics}

    def _record(
        self, step: int, metrics: Readback, rate: float, log: RunLog, clock: _Clock
    ) -> None:
        """Refuse a loss or gradient that is not finite; log the step if it is one to log."""
        numbers = metrics.get()
        for name in _FINITE:
            # TrainStep has left everything as it was before this step.
            value = numbers.get(name, 0.0)
            if not math.isfinite(value):
                raise UserError(self._explain(step, name, value))
        if not self._is_logged(step):
            return
        tokens = step * self.config.batch_size
        record: dict[str, float] = {"step": step, "tokens": tokens, **numbers}
        record |= {"lr": rate, **clock.read(tokens)}
        log.write(record)

    def _explain(self, step: int, name: str, value: float) -> str:
        # The stream is a function of the step: the batch can be read again.
        with contextlib.closing(self._batches(step - 1)) as batches:
            x, y, _ = self._next(batches)
        if not all(bool(t.isfinite().all()) for t in (x, y) if t is not None):
            return self._bad_activations(f"step {step}")
        kept = checkpoint.latest(self._checkpoints)
        what = f"; the checkpoint {kept} is kept" if kept else ""
        return f"train: {name} must be finite, got {value} at step {step}: lower train.lr{what}"

    def _bad_activations(self, where: str) -> str:
        kind = str(self._parameter.dtype).removeprefix("torch.")
        return (
            f"train: activations of {self.source.name} must be finite in {kind}, "
            f"got NaN or inf at {where}"
        )

    def _save(self, log: RunLog) -> None:
        for name, parameter in self.model.named_parameters():
            # The last update can overflow without any loss having shown it yet.
            if not bool(parameter.isfinite().all()):
                raise UserError(
                    f"train: {name} must be finite after step {self.step}, got NaN or inf: "
                    "lower train.lr; no checkpoint was overwritten"
                )
        log.sync()
        state = {"step": self.step, "rng": torch.get_rng_state()}
        path = checkpoint.step_path(self._checkpoints, self.step)
        extra = {"identity": self.identity}
        checkpoint.save_training(path, self.model, self.train_step, state, extra)
        checkpoint.prune(self._checkpoints, self.config.keep_last)

    def _restore(self, path: Path) -> None:
        before = container.read_header(path)["extra"]["identity"]
        compare(before, self.identity, str(path))
        state = checkpoint.load_training(path, self.model, self.train_step)
        self.step = state["step"]
        torch.set_rng_state(state["rng"])

    def _finish(self, log: RunLog) -> TrainResult:
        model_path = self.out / "model.safetensors"
        save(self.model, model_path, {"identity": self.identity})
        lines = runlog.read(log.path)
        metrics: dict[str, float] = {}
        pictures: list[Path] = []
        frequency: Tensor | None = None
        if self.holdout is not None and self.config.eval_tokens > 0:
            stream = self.holdout.sweep(self.config.batch_size)
            result = evaluate(
                self.model,
                (x if y is None else (x, y) for x, y in stream),
                max_tokens=self.config.eval_tokens,
            )
            metrics, frequency = result.metrics, result.frequency
            text = json.dumps({"step": self.step, "tokens": result.tokens, **metrics}, indent=1)
            write_atomic(
                self.out / "evaluation.json", lambda file: file.write(text.encode() + b"\n")
            )
        if not plots.available():
            log.say("plots are left out: matplotlib is not installed (pip install matplotlib)")
        else:
            if lines:
                pictures.append(self.out / "training.png")
                plots.training_curve(log.path, pictures[-1])
            if frequency is not None:
                pictures.append(self.out / "latents.png")
                plots.latent_frequency(frequency, pictures[-1], tokens=result.tokens)
        return TrainResult(
            model=self.model,
            steps=self.step,
            tokens=self.tokens,
            metrics=lines[-1] if lines else {},
            evaluation=metrics,
            out=self.out,
            model_path=model_path,
            plots=pictures,
        )


def train(config: RunConfig, *, resume: bool = False) -> TrainResult:
    """Do the run that `config` describes, from its data to the finished model in `config.out`."""
    config = runconfig.fitted(config)
    open_directory(Path(config.out), resume)  # before any harvest
    if config.train.threads is not None:
        torch.set_num_threads(config.train.threads)
    device = pick_device(config.train.device)
    gradient = config.model.beta is not None
    data = open_data(config.data, gradient=gradient, progress=config.log.progress)
    torch.manual_seed(config.train.seed)
    model = build_model(config.model, data.train, dtype=config.train.dtype, device=device)
    trainer = Trainer(
        model,
        data.train,
        config.train,
        out=config.out,
        resume=resume,
        log=config.log,
        holdout=data.holdout,
        run=config,
    )
    return trainer.run()


def _check_widths(model: SparseCoder, source: ActivationSource) -> None:
    if source.d_in != model.d_in:
        raise UserError(
            f"train: {source.name} must have the model's width d_in = {model.d_in}, "
            f"got {source.d_in}"
        )
    if source.d_out is None:
        if not model.centred:
            raise UserError(f"train: {source.name} must have targets for a transcoder, got none")
    elif source.d_out != model.d_out:
        raise UserError(
            f"train: targets of {source.name} must have the model's width d_out = {model.d_out}, "
            f"got {source.d_out}"
        )


class _Clock:
    """Speed since the last reading."""

    def __init__(self, tokens: int) -> None:
        self._time, self._tokens = time.perf_counter(), tokens

    def read(self, tokens: int) -> dict[str, float]:
        now = time.perf_counter()
        rate = (tokens - self._tokens) / max(now - self._time, 1e-9)
        self._time, self._tokens = now, tokens
        return {"tokens_per_second": round(rate, 1)}
