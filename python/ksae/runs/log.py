# SPDX-License-Identifier: Apache-2.0
"""What a run says while it trains: metrics.jsonl, a progress bar, and, when asked for, TensorBoard
and Weights & Biases."""

from __future__ import annotations

import contextlib
import json
import math
import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Protocol

from tqdm import tqdm

from ksae.activations.progress import BAR, say
from ksae.errors import UserError, first_line
from ksae.files.atomic import write_atomic

BESIDE_A_BAR = ("fvu",)  # with the dead and the speed, what leaves room for a bar in 80 columns


class Sink(Protocol):
    def write(self, record: Mapping[str, float]) -> None: ...
    def held_out(self, metrics: Mapping[str, float], step: int) -> None: ...
    def close(self) -> None: ...


class RunLog:
    """The log of one run in directory `out`, from step `start` of `steps` on.

    Args:
        config: of the run, for the services that show it.
        tensorboard: write event files to `out`/tensorboard.
        wandb: name of a Weights & Biases project to log to.
        progress: show the bar on a terminal, or a line at each tenth of the run elsewhere.
    """

    def __init__(
        self,
        out: Path,
        *,
        start: int,
        steps: int,
        config: Mapping[str, Any] | None = None,
        tensorboard: bool = False,
        wandb: str | None = None,
        progress: bool = True,
    ) -> None:
        self._steps, self._progress = steps, progress
        self.path = out / "metrics.jsonl"
        self._sinks: list[Sink] = []
        if tensorboard:
            self._sinks.append(_TensorBoard(out, start))
        if wandb is not None:
            self._sinks.append(_Wandb(out, wandb, config or {}))
        keep_until(self.path, start)
        self._lines: IO[str] = self.path.open("a", encoding="utf-8")
        # disable=None: only on a terminal
        disable = None if progress else True
        self._bar: Any = tqdm(
            total=steps, initial=start, bar_format=BAR, dynamic_ncols=True, disable=disable
        )
        self._tenth = 10 * start // steps if steps else 0

    def advance(self, steps: int = 1) -> None:
        self._bar.update(steps)

    def write(self, record: Mapping[str, float]) -> None:
        """Log the metrics of one step; `record` has `step` and `tokens`."""
        try:
            self._lines.write(json.dumps(dict(record)) + "\n")
            self._lines.flush()
        except OSError as error:
            raise UserError(f"save: cannot write {self.path}: {error.strerror}") from None
        for sink in self._sinks:
            sink.write(record)
        self._bar.set_postfix_str(_summary(record, BESIDE_A_BAR), refresh=False)
        tenth = 10 * int(record["step"]) // self._steps if self._steps else 10
        if self._progress and self._bar.disable and tenth > self._tenth:
            self._tenth = tenth
            self.say(f"step {record['step']}/{self._steps}: {_summary(record)}")

    def held_out(self, metrics: Mapping[str, float], step: int) -> None:
        """Show what was measured on held-out activations in the services too."""
        for sink in self._sinks:
            sink.held_out(metrics, step)

    def end_bar(self) -> None:
        """Training is over: what follows has its own progress."""
        self._bar.close()

    def say(self, line: str) -> None:
        """Print a line above the bar, on the standard error."""
        say(line)

    def sync(self) -> None:
        """Put the lines on disk, so that a checkpoint is never ahead of its metrics."""
        try:
            os.fsync(self._lines.fileno())
        except OSError as error:
            raise UserError(f"save: cannot write {self.path}: {error.strerror}") from None

    def close(self) -> None:
        self._bar.close()
        with contextlib.suppress(OSError):  # a full disk has been reported by `write`
            self._lines.close()
        for sink in self._sinks:
            sink.close()


def keep_until(path: Path, step: int) -> None:
    """Drop the lines of `path` after `step`, and the half line that a killed run may have left."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            record = json.loads(line)
            if record["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    text = "".join(line + "\n" for line in kept).encode()
    write_atomic(path, lambda file: file.write(text))


def read(path: str | os.PathLike[str]) -> list[dict[str, float]]:
    """The records of a metrics.jsonl file."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def _summary(record: Mapping[str, float], names: Sequence[str] = ("loss", "fvu", "l0")) -> str:
    parts = [f"{name} {record[name]:.4g}" for name in names if name in record]
    if "dead" in record:
        parts.append(f"dead {record['dead']:.1%}")
    if math.isfinite(record.get("tokens_per_second", math.nan)):
        parts.append(f"{_short(record['tokens_per_second'])} tokens/s")
    return ", ".join(parts)


def _short(x: float) -> str:
    for scale, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if x >= scale:
            return f"{x / scale:.3g}{letter}"
    return f"{x:.3g}"


class _TensorBoard:
    def __init__(self, out: Path, start: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(out / "tensorboard"), purge_step=start + 1)

    def write(self, record: Mapping[str, float]) -> None:
        for name, value in record.items():
            if name != "step":
                self._writer.add_scalar(name, value, int(record["step"]))

    def held_out(self, metrics: Mapping[str, float], step: int) -> None:
        for name, value in metrics.items():
            self._writer.add_scalar(f"held_out/{name}", value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, out: Path, project: str, config: Mapping[str, Any]) -> None:
        import wandb

        name = out / "wandb_id.txt"  # a resumed run goes on under the same id
        if not name.exists():
            name.write_text(uuid.uuid4().hex[:12])
        try:
            self._run: Any = wandb.init(
                project=project,
                dir=str(out),
                config=dict(config),
                id=name.read_text(),
                resume="allow",
            )
        except Exception as error:  # of its own classes: no key, no network
            raise UserError(f"train: log.wandb cannot begin: {first_line(error)}") from None

    def write(self, record: Mapping[str, float]) -> None:
        self._run.log(dict(record), step=int(record["step"]))

    def held_out(self, metrics: Mapping[str, float], step: int) -> None:
        # In the summary: a record of this step has been sent.
        self._run.summary.update({f"held_out/{name}": value for name, value in metrics.items()})

    def close(self) -> None:
        self._run.finish()
