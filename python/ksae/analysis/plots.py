# SPDX-License-Identifier: Apache-2.0
"""Pictures of a run: training curve and latent frequencies. matplotlib is imported to draw one."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ksae.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GRID = "#333333", "#dddddd"
BLUE, ORANGE, GREEN = "#0b6fb8", "#d1600a", "#2a8a4a"  # told apart with colour-blind eyes too


def available() -> bool:
    """Whether matplotlib is installed."""
    from importlib.util import find_spec

    return find_spec("matplotlib") is not None


def check_picture(path: str | Path) -> None:
    """Refuse a picture that cannot be drawn to `path`, before what it shows is measured.

    Raises:
        UserError: matplotlib is missing or knows no such kind of file, or the folder is none.
    """
    if not available():
        raise UserError('pictures need matplotlib: pip install "ksae[plots]"')
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    path, kinds = Path(path), FigureCanvasAgg.get_supported_filetypes()
    if path.suffix[1:].lower() not in kinds:
        raise UserError(f"{path}: must be a picture, as .png, got {path.suffix or 'no suffix'}")
    if path.is_dir() or any(p.exists() and not p.is_dir() for p in path.parents):
        raise UserError(f"{path}: must be a file in a folder, which it is not")


def training_curve(metrics_path: str | Path, png_path: str | Path) -> None:
    """Draws FVU, and dead latents and L0 below it, against tokens.

    Args:
        metrics_path: the JSON lines of a run; lines without `fvu` are passed over.
        png_path: the picture to write.
    """
    rows = [row for row in _json_lines(metrics_path) if _finite(row, "fvu")]
    if not rows:
        raise ValueError(f"training_curve: {metrics_path} must have a line with `fvu`, got none")
    unit = "tokens" if all("tokens" in row for row in rows) else "step"
    scale, prefix = _unit([float(row[unit]) for row in rows])
    figure, (top, bottom) = _figure(rows=2, height=5.6, ratios=(2, 1))

    t = [float(row[unit]) / scale for row in rows]
    fvu = [float(row["fvu"]) for row in rows]
    noisy = len(rows) > 40
    top.plot(t, fvu, color=BLUE, lw=1, alpha=0.35 if noisy else 1, label="each logged batch")
    if noisy:
        top.plot(t, _smooth(fvu), color=BLUE, lw=2, label="running mean")
        top.legend(frameon=False)
    top.set_yscale("log")
    _plain_log_ticks(top, wide=max(fvu) > 20 * min(fvu))
    top.set_ylabel("FVU (unexplained variance)")
    top.set_title(f"Training: FVU {fvu[-1]:.3f} in the last batch logged")

    lines = []
    dead = [(s, 100 * float(row["dead"])) for s, row in zip(t, rows, strict=True) if "dead" in row]
    if dead:
        lines += bottom.plot(
            *zip(*dead, strict=True), color=ORANGE, lw=1.8, label="dead latents, %"
        )
    bottom.set_ylabel("dead latents (%)", color=ORANGE)
    bottom.set_ylim(bottom=0, top=max(1.0, 1.1 * max((y for _, y in dead), default=0)))
    l0 = [(s, float(row["l0"])) for s, row in zip(t, rows, strict=True) if "l0" in row]
    if l0:
        right = bottom.twinx()
        right.spines[["top", "left"]].set_visible(False)
        lines += right.plot(*zip(*l0, strict=True), color=GREEN, lw=1.8, ls="--", label="L0")
        right.set_ylabel("L0 (latents a token)", color=GREEN)
        right.set_ylim(0, 1.15 * max(y for _, y in l0))
    bottom.set_xlabel(f"training {unit}" + (f" ({prefix})" if prefix else ""))
    _save(figure, png_path)


def latent_frequency(frequency: Tensor, png_path: str | Path, *, tokens: int | None = None) -> None:
    """Draws the histogram of log10 of how often latents fire, and states how many never did.

    Args:
        frequency: share of tokens on which each latent fired, [F].
        png_path: the picture to write.
        tokens: how many tokens the shares were measured on, for the caption.
    """
    frequency = frequency.detach().double().cpu().flatten()  # [F]
    F = len(frequency)
    if F == 0:
        raise ValueError("latent_frequency: frequency must have at least one latent, got none")
    alive = frequency[frequency > 0]
    dead = F - len(alive)
    figure, (axes,) = _figure(rows=1, height=3.8)
    on = f" on {tokens:,} tokens" if tokens else ""
    axes.set_title(f"How often latents fire: {dead:,} of {F:,} ({dead / F:.1%}) never fired{on}")
    axes.set_xlabel("firing frequency (share of tokens, log scale)")
    axes.set_ylabel("latents")
    if len(alive):
        logs = alive.log10()
        low = min(math.floor(float(logs.min()) * 4) / 4, -0.5)
        edges = torch.linspace(low, 0, 4 * round(-4 * low) // 4 + 1)  # four bars a decade
        axes.hist(logs.tolist(), bins=edges.tolist(), color=BLUE, edgecolor="white", lw=0.5)
        median = float(logs.median())
        axes.axvline(median, color=ORANGE, ls="--", lw=1.6)
        axes.annotate(
            f"median of the living: {_percent(10**median)}",
            (median, 0.97),
            xycoords=("data", "axes fraction"),
            xytext=(6, 0),
            textcoords="offset points",
            va="top",
            color=ORANGE,
        )
        ticks = range(math.ceil(low), 1)
        axes.set_xticks(list(ticks), [_percent(10.0**t) for t in ticks])
        axes.set_xlim(low, 0)
        axes.margins(y=0.15)  # room for the note above the bars
    else:
        axes.set_xticks([])
    _save(figure, png_path)


def _figure(rows: int, height: float, ratios: Sequence[float] = (1,)) -> tuple[Figure, list[Axes]]:
    # The object interface with Agg: no display, and the backend of the user's own code stays.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, 1, sharex=True, squeeze=False, height_ratios=ratios)[:, 0].tolist()
    for a in axes:
        a.spines[["top", "right"]].set_visible(False)
        a.grid(True, which="major", color=GRID, lw=0.7)
        a.set_axisbelow(True)
        a.tick_params(colors=INK)
    return figure, axes


def _save(figure: Figure, path: str | Path) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})  # same run, same file


def _plain_log_ticks(axes: Axes, wide: bool) -> None:
    """0.2, 0.5 instead of 2 x 10^-1, and more labels where the range is under a decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if wide else (1, 1.5, 2, 3, 4, 5, 7)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _percent(share: float) -> str:
    return f"{100 * share:.2g}%" if share < 0.995 else "100%"


def _unit(values: Sequence[float]) -> tuple[float, str]:
    top = max(values)
    return next(
        ((s, p) for s, p in ((1e9, "billions"), (1e6, "millions"), (1e3, "thousands")) if top >= s),
        (1.0, ""),
    )


def _smooth(values: Sequence[float]) -> list[float]:
    """Mean over a centred window of about 1/20 of the run, shorter at its ends."""
    half = max(1, len(values) // 40)
    out = []
    for i in range(len(values)):
        reach = min(half, i, len(values) - 1 - i)
        window = values[i - reach : i + reach + 1]
        out.append(sum(window) / len(window))
    return out


def _finite(row: Mapping[str, Any], key: str) -> bool:
    return isinstance(row.get(key), (int, float)) and math.isfinite(row[key])


def _json_lines(path: str | Path) -> list[dict[str, Any]]:
    rows = []
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        if line.strip():
            try:
                rows.append(json.loads(line))
            except json.JSONDecodeError as error:
                raise ValueError(f"training_curve: {path} line {number} must be JSON") from error
    return rows
