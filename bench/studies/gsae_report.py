# SPDX-License-Identifier: Apache-2.0
"""The table and the plots of the study of gradient SAEs: paired differences over seeds."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..harness import figures

TOPK = "topk"
# column -> (key, key of TopK, whether the difference is relative)
COLUMNS = {
    "CE increase": ("ce_increase", "ce_increase", True),
    "KL": ("kl_sae", "kl_sae", True),
    "FVU": ("fvu", "fvu", True),
    "dead": ("dead", "dead", False),
    "steering": ("steering", "steering_topk", True),
    "CE increase, oracle": ("ce_increase_oracle", "ce_increase", True),
}
# two-sided 95 % points of Student's t by degrees of freedom
T95 = (math.inf, 12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)


def interval(values: list[float]) -> tuple[float, float]:
    """Mean and half width of its 95 % t-interval; infinite for one value."""
    n = len(values)
    mean = sum(values) / n
    if n == 1:
        return mean, math.inf
    t = T95[n - 1] if n <= len(T95) else 1.96 + 2.4 / (n - 1)
    spread = sum((v - mean) ** 2 for v in values) / (n - 1)
    return mean, t * math.sqrt(spread / n)


def line(unit: dict[str, Any]) -> str:
    """One unit, for the log."""
    parts = [f"{unit['site']} k={unit['k']} seed={unit['seed']}"]
    for name, m in unit["models"].items():
        parts.append(
            f"{name}: CE +{m['ce_increase']:.4f} KL {m['kl_sae']:.4f} FVU {m['fvu']:.4f} "
            f"dead {m['dead']:.3f} steering {m.get('steering', math.nan):.4f}"
        )
    seconds = unit["seconds_training"] + unit["seconds_measuring"]
    return "; ".join([*parts, f"{seconds:.0f} s"])


def groups(record: dict[str, Any]) -> list[tuple[str, int, str, list[dict[str, Any]]]]:
    """(site, k, model, its units) in order of the table."""
    units = record["units"]
    found = []
    for site, k in sorted({(u["site"], u["k"]) for u in units}, key=lambda p: (p[0] != "resid", p)):
        here = [u for u in units if (u["site"], u["k"]) == (site, k)]
        names = {name for u in here for name in u["models"]}
        for name in sorted(names, key=lambda n: -1 if n == TOPK else float(n.split()[1])):
            found.append((site, k, name, [u for u in here if name in u["models"]]))
    return found


def _cell(values: list[float], show: Callable[[float], str]) -> str:
    mean, half = interval(values)
    return show(mean) + (f" ± {show(half).lstrip('+')}" if math.isfinite(half) else "")


def table(record: dict[str, Any]) -> str:
    """Markdown: TopK's values, and for each g-SAE the paired difference over seeds."""
    header = ["site", "k", "model", *COLUMNS]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for site, k, name, units in groups(record):
        cells = [site, str(k), name if name == TOPK else f"g-SAE {name}"]
        cells += [_difference(units, name, *column) for column in COLUMNS.values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _difference(
    units: list[dict[str, Any]], name: str, key: str, against: str, relative: bool
) -> str:
    if name == TOPK:
        if key.endswith("_oracle"):
            return ""
        # TopK's steering depends on the latents it is matched with; that with the first g-SAE
        of = [list(u["models"].values())[against.endswith("_topk")] for u in units]
        show = (lambda v: f"{v:.4f}") if relative else (lambda v: f"{v:.1%}")
        return _cell([m[against] for m in of], show)
    mine = [u["models"][name][key] for u in units]
    base = [u["models"][name if against.endswith("_topk") else TOPK][against] for u in units]
    if relative:
        return _cell([m / b - 1 for m, b in zip(mine, base, strict=True)], lambda v: f"{v:+.1%}")
    points = [100 * (m - b) for m, b in zip(mine, base, strict=True)]
    return _cell(points, lambda v: f"{v:+.1f}") + " points"


def write(record: dict[str, Any], out: Path, missing: int = 0) -> None:
    """gsae_study.md and, with matplotlib, the two plots."""
    seeds = sorted({u["seed"] for u in record["units"]})
    settings = ", ".join(f"{name} {value}" for name, value in record["settings"].items())
    text = [
        "# TopK against gradient-aware TopK on SmolLM2-135M, layer 9",
        "",
        f"Seeds {', '.join(map(str, seeds))}; {settings}; gradients scaled to sqrt(d) a token.",
        "",
        "TopK: mean over seeds. g-SAE: mean paired difference to TopK of the same seed, relative "
        "except for dead latents. ± is the half width of the 95 % t-interval over seeds. Selection "
        "without gradients but in the last column, which uses labels (oracle).",
        "",
        table(record),
        "",
    ]
    if missing:
        text[2] += f" PARTIAL: {missing} units are missing."
    (out / "gsae_study.md").write_text("\n".join(text))
    print("\n".join(text))
    plots(record, out)


def plots(record: dict[str, Any], out: Path) -> None:
    """CE increase against k and FVU against k, means with intervals."""
    if (pyplot := figures.pyplot()) is None:
        return
    from matplotlib.ticker import ScalarFormatter

    found = groups(record)
    sites = list(dict.fromkeys(site for site, *_ in found))
    labels = {"ce_increase": "CE increase (nats a token)", "fvu": "FVU (unexplained variance)"}
    for key, label in labels.items():
        figure, axes = pyplot.subplots(
            1, len(sites), figsize=(4.4 * len(sites), 3.8), squeeze=False, layout="constrained"
        )
        for axis, site in zip(axes[0], sites, strict=True):
            for name in dict.fromkeys(n for s, _, n, _ in found if s == site):
                rows = [(k, units) for s, k, n, units in found if (s, n) == (site, name)]
                points = [interval([u["models"][name][key] for u in units]) for _, units in rows]
                half = [h if math.isfinite(h) else 0.0 for _, h in points]
                means = [m for m, _ in points]
                label_ = "TopK" if name == TOPK else f"g-SAE, {name}"
                # Side by side, so that neither's interval hides the other's.
                ks = [k * (0.98 if name == TOPK else 1.02) for k, _ in rows]
                axis.errorbar(ks, means, half, label=label_, capsize=3, marker="o")
            axis.set(title=f"layer 9, {site}", xlabel="k", ylabel=label, xscale="log")
            axis.set_xticks(sorted({k for s, k, _, _ in found if s == site}))
            axis.get_xaxis().set_major_formatter(ScalarFormatter())
            axis.minorticks_off()
            axis.set_ylim(bottom=min(0.0, axis.get_ylim()[0]))
        lines = axes[0][0].get_legend_handles_labels()
        figure.legend(*lines, loc="outside upper center", ncols=len(lines[0]), frameon=False)
        seeds = sorted({len(units) for *_, units in found})
        figure.supxlabel(
            f"Means over {' or '.join(map(str, seeds))} seeds; bars: 95 % t-intervals over seeds",
            fontsize=8,
        )
        figure.savefig(out / f"gsae_study_{key}.png", dpi=120)
        pyplot.close(figure)
