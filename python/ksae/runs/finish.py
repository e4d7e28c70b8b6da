# SPDX-License-Identifier: Apache-2.0
"""The end of a run: what was held out is measured, pictures are drawn, a divergence is said."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from ksae.activations import ActivationSource
from ksae.activations.progress import Progress
from ksae.analysis import plots
from ksae.analysis.evaluate import Evaluation, evaluate
from ksae.coders.coder import SparseCoder
from ksae.errors import UserError
from ksae.files.atomic import write_atomic
from ksae.runs.config import TrainConfig

NO_PICTURES = 'no pictures: they need matplotlib (pip install "ksae[plots]")'
DIVERGED = 10.0  # times the larger of FVU 1, that of the mean, and the first one


def measure_held_out(
    model: SparseCoder,
    holdout: ActivationSource,
    config: TrainConfig,
    out: Path,
    step: int,
    progress: bool,
) -> Evaluation:
    """The model on what was held out, which evaluation.json keeps too."""
    tokens = min(config.eval_tokens, holdout.num_tokens or config.eval_tokens)
    with Progress(tokens, "evaluation", shown=progress) as shown:
        stream = shown.over(holdout.sweep(min(config.batch_size, 2048)))
        result = evaluate(
            model, (x if y is None else (x, y) for x, y in stream), max_tokens=config.eval_tokens
        )
    content = {"step": step, "tokens": result.tokens, **result.metrics}
    text = json.dumps(content, indent=1) + "\n"
    write_atomic(out / "evaluation.json", lambda file: file.write(text.encode()))
    return result


def draw(out: Path, metrics_path: Path, logged: bool, result: Evaluation | None) -> list[Path]:
    """The pictures of a run, where matplotlib is installed."""
    pictures: list[Path] = []
    if not plots.available():
        return pictures
    if logged:
        pictures.append(out / "training.png")
        plots.training_curve(metrics_path, pictures[-1])
    if result is not None:
        pictures.append(out / "latents.png")
        plots.latent_frequency(result.frequency, pictures[-1], tokens=result.tokens)
    return pictures


def check_learned(
    first: float | None,
    lines: Sequence[Mapping[str, float]],
    held_out: Mapping[str, float],
    model_path: Path,
) -> str | None:
    """A remark on a run that ended worse than the mean of its targets; None for any other.

    Args:
        first: FVU before the first step; None if no step was taken.
        lines: the metrics that were logged.
        held_out: the metrics on held-out activations.

    Raises:
        UserError: it diverged.
    """
    first = 1.0 if first is None else first
    last = held_out.get("fvu", math.nan)
    if not math.isfinite(last):  # equal rows have no variance
        last = lines[-1].get("fvu", math.nan) if lines else math.nan
    if not math.isfinite(last) or not math.isfinite(first):
        return None
    if last > DIVERGED * max(1.0, first):
        raise UserError(
            f"train: the run diverged: FVU {last:.3g} at its end, where the mean of the targets "
            f"has 1: lower train.lr; the model is kept in {model_path}"
        )
    if last > max(1.0, first):
        return (
            f"FVU {last:.3g} at the end of the run: worse than the mean of the targets, which has "
            "1; a lower train.lr may help"
        )
    return None
