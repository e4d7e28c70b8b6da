# SPDX-License-Identifier: Apache-2.0
"""The table and the plot of the study of recipes: means over seeds, and the best rate of each."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

from ..harness import figures

KEY = ("site", "F", "k", "seed", "steps", "lr", "recipe")  # the fields of a cell, in order
GROUP = ("site", "F", "k", "steps", "recipe", "lr")


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in KEY)


def line(row: dict[str, Any]) -> str:
    """One cell, for the log."""
    place = f"{row['site']} F={row['F']} k={row['k']} seed={row['seed']} steps={row['steps']}"
    result = row.get("failure") or (
        f"FVU {row['fvu']:.4f} dead {row['dead']:.1%} in {row['seconds']:.0f} s"
    )
    return f"{place} lr={row['lr']:g} {row['recipe']}: {result}"


def means(record: dict[str, Any]) -> dict[tuple[Any, ...], dict[str, Any]]:
    """By site, F, k, steps, recipe and rate: mean FVU and dead share, and the seeds they are of."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in record["cells"]:
        if "failure" not in row:
            groups[tuple(row[name] for name in GROUP)].append(row)
    found = {}
    for group, rows in groups.items():
        numbers = {key: sum(row[key] for row in rows) / len(rows) for key in ("fvu", "dead")}
        found[group] = numbers | {"seeds": sorted(row["seed"] for row in rows)}
    return found


def table(record: dict[str, Any]) -> str:
    """Markdown: a row for each site, F, k, length and recipe, a column for each rate."""
    found = means(record)
    rates = sorted({group[-1] for group in found})
    header = ["site", "F", "k", "steps", "recipe", "seeds", *(f"lr {rate:g}" for rate in rates)]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for place in dict.fromkeys(group[:-1] for group in found):
        here = {rate: found[(*place, rate)] for rate in rates if (*place, rate) in found}
        best = min(here, key=lambda rate: here[rate]["fvu"])
        seeds = sorted({seed for m in here.values() for seed in m["seeds"]})
        cells = []
        for rate in rates:
            if rate not in here:
                cells.append("")
                continue
            m = here[rate]
            fvu = f"**{m['fvu']:.4f}**" if rate == best and len(here) > 1 else f"{m['fvu']:.4f}"
            few = f", of {len(m['seeds'])}" if m["seeds"] != seeds else ""
            cells.append(f"{fvu} ({m['dead']:.1%}{few})")
        site, F, k, steps, recipe = place
        first = [site, str(F), str(k), str(steps), recipe, ", ".join(map(str, seeds))]
        lines.append("| " + " | ".join([*first, *cells]) + " |")
    return "\n".join(lines)


def write(record: dict[str, Any], out: Path) -> None:
    """recipe_study.md and, with matplotlib, recipe_study.png."""
    settings = ", ".join(
        f"{name} {value}" for name, value in record["settings"].items() if value is not None
    )
    text = [
        "# Recipes of training on SmolLM2-135M, layer 9 (minilm: all-MiniLM-L6-v2, layer 3)",
        "",
        f"Held-out FVU (share of latents that never fire on the held-out rows); {settings}. Means "
        "over the seeds of the row, or over as many of them as a cell says; bold: the best rate "
        "of a row.",
        "",
        table(record),
        "",
    ]
    failed = [line(row) for row in record["cells"] if "failure" in row]
    if failed:
        text += ["Not measured:", "", *(f"- {reason}" for reason in failed), ""]
    (out / "recipe_study.md").write_text("\n".join(text))
    print("\n".join(text))
    plot(record, out)


def plot(record: dict[str, Any], out: Path) -> None:
    """FVU against dead latents: a curve over the rates for each recipe, a panel for each place."""
    if (pyplot := figures.pyplot()) is None:
        return
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    found = means(record)
    places = list(dict.fromkeys(group[:4] for group in found))
    if not places:
        return
    recipes = list(dict.fromkeys(group[4] for group in found))
    columns = min(3, len(places))
    rows = -(-len(places) // columns)
    figure, axes = pyplot.subplots(
        rows, columns, figsize=(4.4 * columns, 3.6 * rows + 1.2), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for axis in axes.flat[len(places) :]:
        axis.axis("off")
    handles: dict[str, Any] = {}  # one legend for all
    for axis, place in zip(axes.flat, places, strict=False):
        for number, recipe in enumerate(recipes):
            points = [m for group, m in sorted(found.items()) if group[:5] == (*place, recipe)]
            if points:
                dead, fvu = ([m[key] for m in points] for key in ("dead", "fvu"))
                turn = number // 10 % 4  # colours come again after ten
                look = {"color": f"C{number % 10}", "marker": "osv^"[turn]}
                look["linestyle"] = ("-", "--", ":", "-.")[turn]
                handles[recipe] = axis.plot(dead, fvu, label=recipe, **look)[0]
        site, F, k, steps = place
        axis.set(title=f"{site}, F={F}, k={k}, {steps} steps", xlabel="dead latents", ylabel="FVU")
        axis.xaxis.set_major_locator(MaxNLocator(4))
        axis.xaxis.set_major_formatter(PercentFormatter(1.0))
    figure.legend(
        handles=list(handles.values()), loc="outside lower center", ncols=4, frameon=False
    )
    figure.savefig(out / "recipe_study.png", dpi=110)
    pyplot.close(figure)
