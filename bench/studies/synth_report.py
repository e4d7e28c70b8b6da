# SPDX-License-Identifier: Apache-2.0
"""The table and the plot of the study on SynthSAEBench-16k, beside the published numbers."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from ..harness import figures

METRICS = ("f1", "mcc", "explained_variance", "uniqueness", "dead")
TITLES = ("F1", "MCC", "explained variance", "uniqueness", "dead latents")
PLACE = ("activation", "lr", "samples", "library")
# F=4096, L0=25, 200 M samples of batches of 1024, lr 3e-4; SAELens' documentation
PUBLISHED = {
    "batch_topk": (0.7316, 0.7574, 0.7923, 0.9837),
    "matryoshka": (0.8793, 0.7927, 0.7792, 0.9987),
}


def groups(record: dict[str, Any]) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    """Rows by activation, rate, samples and library, one a seed, in that order."""
    found: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    rows = [row for row in record["rows"] if "failure" not in row]
    for row in sorted(rows, key=lambda row: tuple(row[name] for name in PLACE)):
        found.setdefault(tuple(row[name] for name in PLACE), []).append(row)
    return found


def compared(record: dict[str, Any]) -> list[tuple[Any, ...]]:
    """Places of the table: for each library the samples at which another has a row too, and its
    last."""
    places = list(groups(record))
    kept = []
    for place in places:
        beside = [p for p in places if p[:3] == place[:3] and p != place]
        last = max(p[2] for p in places if (p[0], p[1], p[3]) == (place[0], place[1], place[3]))
        if beside or place[2] == last:
            kept.append(place)
    return kept


def _cell(values: list[float], digits: int = 4, percent: bool = False) -> str:
    """The mean, and from two seeds on the half width of half the range."""
    mean = statistics.fmean(values)
    text = f"{mean:.1%}" if percent else f"{mean:.{digits}f}"
    if len(values) > 1:
        half = (max(values) - min(values)) / 2
        text += f" ± {half:.1%}" if percent else f" ± {half:.{digits}f}"
    return text


def table(record: dict[str, Any]) -> str:
    """Markdown: means over seeds, ± half the range over them."""
    header = ["activation", "lr", "samples", "library", "seeds", *TITLES]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    found = groups(record)
    for place in compared(record):
        rows = found[place]
        activation, lr, samples, library = place
        first = [activation, f"{lr:g}", f"{samples:,}", library]
        seeds = ", ".join(str(row["seed"]) for row in rows)
        numbers = [_cell([row[m] for row in rows], percent=m == "dead") for m in METRICS]
        lines.append("| " + " | ".join([*first, seeds, *numbers]) + " |")
    for activation, those in PUBLISHED.items():
        cells = [activation, "0.0003", "200,000,000", "published", "", *map(str, those), ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write(record: dict[str, Any], out: Path) -> None:
    """synth_study.md and, with matplotlib, synth_study.png."""
    settings = ", ".join(f"{name} {value}" for name, value in record["settings"].items())
    text = [
        "# SynthSAEBench-16k",
        "",
        f"Metrics by the benchmark's definitions on held-out samples; {settings}. Means over the "
        "seeds, ± half their range.",
        "",
        table(record),
        "",
    ]
    failed = [row for row in record["rows"] if "failure" in row]
    if failed:
        lines = (
            f"- {row['library']} {row['activation']} lr {row['lr']:g} seed {row['seed']}: "
            f"{row['failure']}"
            for row in failed
        )
        text += ["Not measured:", "", *lines, ""]
    (out / "synth_study.md").write_text("\n".join(text))
    print("\n".join(text))
    plot(record, out)


def plot(record: dict[str, Any], out: Path) -> None:
    """Each metric over the samples: a panel for each activation, a curve for each library."""
    if (pyplot := figures.pyplot()) is None:
        return

    found = groups(record)
    activations = list(dict.fromkeys(place[0] for place in found))
    if not activations:
        return
    curves = list(dict.fromkeys((place[3], place[1]) for place in found))
    shown = METRICS[:3]
    figure, axes = pyplot.subplots(
        len(shown), len(activations), squeeze=False, sharex="col", layout="constrained",
        figsize=(4.2 * len(activations), 2.6 * len(shown)),
    )  # fmt: skip
    for column, activation in enumerate(activations):
        for metric, axis in zip(shown, axes[:, column], strict=True):
            for number, (library, lr) in enumerate(curves):
                points = [
                    (place[2], statistics.fmean(row[metric] for row in rows))
                    for place, rows in found.items()
                    if (place[0], place[1], place[3]) == (activation, lr, library)
                ]
                if points:
                    label = f"{library}, lr {lr:g}"
                    axis.plot(*zip(*points, strict=True), color=f"C{number}", label=label)
            axis.set(ylabel=TITLES[METRICS.index(metric)])
        axes[0, column].set(title=activation)
        axes[-1, column].set(xlabel="samples", xscale="log")
        axes[0, column].legend(frameon=False, fontsize="small")
    figure.savefig(out / "synth_study.png", dpi=110)
    pyplot.close(figure)
