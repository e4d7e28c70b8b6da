# SPDX-License-Identifier: Apache-2.0
"""Pictures of a run: speed-up bars, steps, scaling lines, quality curves, roofline."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ksae.analysis import plots

from .measure import UNKNOWN
from .record import Record, Row, groups
from .report import FOR_USERS, best_of_ours, best_rival, quotient

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, GRID = "#333333", "#dddddd"
MANY_DECADES, FEW_DECADES = 3.0, 0.7  # of an axis: one number a decade, or evenly spread ones
# Told apart with colour-blind eyes too (Okabe and Ito), ksae's own in blues.
OURS = ["#0b6fb8", "#56b4e9", "#004a80"]
OTHERS = ["#d1600a", "#2a8a4a", "#cc79a7", "#8c6d1f", "#777777", "#b22222", "#444444"]


def pyplot() -> Any:
    """matplotlib.pyplot without a display; None, and a line that says so, if it is not there."""
    if not plots.available():
        print("no pictures: matplotlib is not installed")
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw(run: Record, out: Path) -> list[Path]:
    """Write all pictures that the run has data for; none without matplotlib."""
    if not plots.available():
        return []
    made = []
    pictures: dict[str, Callable[[Record], Figure | None]] = {
        "speedup": speedup,
        "step": steps,
        "scaling": scaling,
        "quality": quality,
        "race": race,
        "roofline": roofline,
    }
    for name, picture in pictures.items():
        figure = picture(run)
        if figure is not None:
            figure.savefig(out / f"{name}.png", metadata={"Software": None})
            made.append(out / f"{name}.png")
    return made


def _figure(
    rows: int, columns: int, width: float, height: float
) -> tuple[Figure, list[list[Axes]]]:
    # The object interface with Agg: no display, and the backend of the user's own code stays.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(rows, columns, squeeze=False).tolist()
    for line in axes:
        for a in line:
            a.spines[["top", "right"]].set_visible(False)
            a.grid(True, which="major", color=GRID, lw=0.7)
            a.set_axisbelow(True)
            a.tick_params(colors=INK)
    return figure, axes


def _caption(figure: Figure, run: Record, text: str) -> None:
    m = run.machine
    threads = f"{m.get('threads')} thread" + ("s" if m.get("threads") != 1 else "")
    where = f"{m.get('cpu')}, {threads}, torch {m.get('torch')}"
    which = m["ksae"] if m.get("revision", UNKNOWN) == UNKNOWN else m["revision"]
    figure.supxlabel(f"{text}\n{where}, ksae {which}", fontsize=8, color=INK)


def _log_ticks(axes: Axes, which: str = "x") -> None:
    """A logarithmic axis in plain numbers, as many as fit; after all data and margins."""
    from matplotlib.ticker import FuncFormatter, Locator, LogLocator, MaxNLocator, NullFormatter

    (axes.set_xscale if which == "x" else axes.set_yscale)("log")
    low, high = axes.get_xlim() if which == "x" else axes.get_ylim()
    axis = axes.xaxis if which == "x" else axes.yaxis
    decades = math.log10(high / low)
    locator: Locator = LogLocator(subs=(1,) if decades > MANY_DECADES else (1, 2, 5))
    if decades < FEW_DECADES:
        locator = MaxNLocator(6)
    axis.set_major_locator(locator)
    axis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:,.6g}"))
    axis.set_minor_formatter(NullFormatter())


def _legend(figure: Figure, axes: Axes, columns: int = 3) -> None:
    """One for all panels, above them, where it hides nothing."""
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=columns, fontsize=9)


def _rows(run: Record, suite: str) -> list[Row]:
    return [r for r in run.suites[suite].rows if r.times] if suite in run.suites else []


def speedup(run: Record) -> Figure | None:
    """A point for each op, mode and dtype at each shape: torch's fastest over ksae's fastest.

    Points, for a bar on a logarithmic axis has no length that means anything. The ops that users
    call come first.
    """
    bars: dict[str, list[tuple[str, float, float, float, str]]] = {}
    for (_, case, op, mode), members in groups(_rows(run, "ops")).items():
        ours, rival = best_of_ours(members), best_rival(members)
        if ours is None or rival is None or not ours.times or not rival.times:
            continue
        ratio = quotient(rival, ours)
        low, high = rival.times.q1 / ours.times.q3, rival.times.q3 / ours.times.q1
        label = op if mode == "forward" else f"{op}, {mode}"
        shape = case.rpartition(" ")[0]
        bars.setdefault(shape, []).append((label, ratio, low, high, ours.dtype))
    for line in bars.values():
        line.sort(key=lambda b: b[0].split(",")[0] not in FOR_USERS)
    if not bars:
        return None
    tallest = max(len({b[0] for b in line}) for line in bars.values())
    columns = min(2, len(bars))
    rows = -(-len(bars) // columns)
    figure, axes = _figure(rows, columns, 6.5 * columns, 1.6 + 0.34 * tallest * rows)
    flat = [a for line in axes for a in line]
    for a in flat[len(bars) :]:
        a.set_visible(False)
    for a, (shape, line) in zip(flat, bars.items(), strict=False):
        labels = list(dict.fromkeys(b[0] for b in line))
        for number, dtype in enumerate(("fp32", "bf16")):
            mine = [b for b in line if b[4] == dtype]
            at = [labels.index(b[0]) + (number - 0.5) * 0.38 for b in mine]
            values = [b[1] for b in mine]
            errors = [[v - min(b[2], v) for b, v in zip(mine, values, strict=True)]]
            errors.append([max(b[3], v) - v for b, v in zip(mine, values, strict=True)])
            a.errorbar(
                values, at, xerr=errors, fmt="os"[number], color=OTHERS[0] if number else OURS[0],
                ecolor=INK, elinewidth=0.8, ms=5, label=dtype,
            )  # fmt: skip
            for y, v, below, above in zip(at, values, *errors, strict=True):
                end, side, align = (v + above, 6, "left") if v >= 1 else (v - below, -6, "right")
                a.annotate(
                    _short(v), (end, y), (side, 0), textcoords="offset points", fontsize=7,
                    ha=align, va="center_baseline",
                )  # fmt: skip
        a.axvline(1, color="#b22222", lw=1.2, ls="--", label="as fast as torch")
        a.margins(x=0.1)
        _log_ticks(a)
        a.set_yticks(range(len(labels)), labels, fontsize=8)
        a.invert_yaxis()
        a.set_title(shape, fontsize=10)
        a.set_xlabel("times faster than torch's fastest way (log scale)")
    _legend(figure, flat[0])
    text = "torch's median over ksae's; lines: quartiles. Right of the dashed line ksae wins."
    _caption(figure, run, text)
    return figure


def _short(value: float) -> str:
    """Two or three digits, never an exponent."""
    return f"{value:,.0f}" if value >= 10 else f"{value:.2g}"


def steps(run: Record) -> Figure | None:
    """A bar for each contestant at each shape."""
    if not _rows(run, "step"):
        return None
    cases = groups([r for r in run.suites["step"].rows if r.way != "all"])
    columns = min(2, len(cases))
    rows = -(-len(cases) // columns)
    tallest = max(map(len, cases.values()))
    figure, axes = _figure(rows, columns, 7 * columns, (1.3 + 0.33 * tallest) * rows)
    flat = [a for line in axes for a in line]
    for a in flat[len(cases) :]:
        a.set_visible(False)
    for a, ((_, case, _, _), members) in zip(flat, cases.items(), strict=False):
        for y, row in enumerate(members):
            t = row.times
            if t is None:  # a contestant that is missing or broken has a line that says so
                why = (row.failure or row.extra.get("cut") or "not timed")[:60]
                a.text(0.01, y, why, transform=a.get_yaxis_transform(), fontsize=7, va="center")
                continue
            error = [[(t.median - t.q1) * 1e3], [(t.q3 - t.median) * 1e3]]
            color = OURS[0] if row.ours else OTHERS[0]
            a.barh(y, t.median * 1e3, 0.7, xerr=error, color=color, ecolor=INK)
            a.annotate(
                _short(t.median * 1e3), (t.q3 * 1e3, y), (4, -3), textcoords="offset points",
                fontsize=8,
            )  # fmt: skip
        for color, label in ((OURS[0], "ksae"), (OTHERS[0], "others")):
            a.plot([], [], "s", color=color, label=label)
        a.margins(x=0.12)
        _log_ticks(a)
        a.set_yticks(range(len(members)), [r.way for r in members], fontsize=8)
        a.set_ylim(len(members) - 0.4, -0.6)
        a.set_title(case, fontsize=10)
        a.set_xlabel("one training step (ms, log scale)")
    _legend(figure, flat[0])
    _caption(
        figure, run, "Same weights and batches; medians of interleaved steps; lines: quartiles."
    )
    return figure


def scaling(run: Record) -> Figure | None:
    """A panel for each size that is swept, a line for each op."""
    rows = _rows(run, "scaling")
    if not rows:
        return None
    fits = {(f["op"], f["size"]): f for f in run.suites["scaling"].facts.get("fits", [])}
    sizes = list(dict.fromkeys(r.extra["sweep"] for r in rows))
    figure, axes = _figure(2, 2, 12, 8.5)
    meaning = {"N": "tokens", "d": "width", "F": "latents", "k": "active latents a token"}
    for a, size in zip([a for line in axes for a in line], sizes, strict=False):
        mine = [r for r in rows if r.extra["sweep"] == size]
        for number, op in enumerate(dict.fromkeys(r.op for r in mine)):
            points = sorted((r for r in mine if r.op == op), key=lambda r: r.shape[size])
            xs = [r.shape[size] for r in points]
            times = [r.times for r in points if r.times]
            fit = fits.get((op, size))
            label = op
            if fit is not None:
                label += f": {fit['exponent']:.2f} ({fit['expected']:.2f})"
            color = [OURS[0], OTHERS[0], OTHERS[1]][number % 3]
            a.plot(
                xs, [t.median * 1e3 for t in times], "o-", color=color, label=label, lw=1.8, ms=4
            )
            band = [t.q1 * 1e3 for t in times], [t.q3 * 1e3 for t in times]
            a.fill_between(xs, *band, color=color, alpha=0.2, lw=0)
            a.plot(xs, [(r.floor or 0) * 1e3 for r in points], "--", color=color, lw=1)
        a.set_xscale("log", base=2)
        _log_ticks(a, "y")
        a.set_xticks(sorted({r.shape[size] for r in mine}))
        a.xaxis.set_major_formatter(lambda x, _: f"{x:g}")
        a.set_xlabel(f"{size} ({meaning[size]}), log scale")
        a.set_ylabel("time (ms), log scale")
        a.legend(
            frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3,
            title="fitted exponent (expected)", title_fontsize=8, columnspacing=1.2,
        )  # fmt: skip
    note = run.suites["scaling"].notes
    base = note[0] if note else ""
    _caption(figure, run, f"Medians, bands: quartiles, dashed: floor by formula; {base}.")
    return figure


def quality(run: Record) -> Figure | None:
    """Held-out FVU against seconds of training."""
    rows = [r for r in _rows(run, "quality") if r.extra.get("curve")]
    if not rows:
        return None
    figure, ((a,),) = _figure(1, 1, 10, 5)
    ours = others = 0
    for row in rows:
        if row.ours:
            color, ours = OURS[ours % len(OURS)], ours + 1
        else:
            color, others = OTHERS[others % len(OTHERS)], others + 1
        seconds = [point[1] for point in row.extra["curve"]]
        fvu = [point[2] for point in row.extra["curve"]]
        a.plot(seconds, fvu, "o-" if row.ours else "s--", color=color, label=row.way, ms=3, lw=1.6)
    target = run.suites["quality"].facts.get("target_fvu")
    if target:
        a.axhline(target, color=INK, lw=0.8, ls=":", label=f"target {target:.3f}")
    _log_ticks(a)
    _log_ticks(a, "y")
    a.set_xlabel("training time (s, log scale; steps only)")
    a.set_ylabel("held-out FVU (unexplained variance, log scale)")
    a.legend(frameon=False, fontsize=8, loc="center left", bbox_to_anchor=(1.0, 0.5))
    note = run.suites["quality"].notes
    _caption(figure, run, note[0] if note else "")
    return figure


def race(run: Record) -> Figure | None:
    """A bar for each contestant: seconds of training to the target FVU."""
    rows = [r for r in _rows(run, "quality") if r.extra.get("seconds_to_target") is not None]
    target = run.suites["quality"].facts.get("target_fvu") if rows else None
    if target is None:
        return None
    rows.sort(key=lambda r: r.extra["seconds_to_target"])
    figure, ((a,),) = _figure(1, 1, 8.5, 1.3 + 0.32 * len(rows))
    base = next((r for r in rows if r.way == "ksae fp32"), rows[0])
    for y, row in enumerate(rows):
        seconds = row.extra["seconds_to_target"]
        a.barh(y, seconds, 0.72, color=OURS[0] if row.ours else "#9aa5ad")
        times = f"  ({seconds / base.extra['seconds_to_target']:.1f} times {base.way})"
        times = "" if row.ours else times
        a.annotate(
            f"{seconds:.1f} s{times}", (seconds, y), (5, 0), textcoords="offset points",
            fontsize=9, va="center_baseline", color=INK,
        )  # fmt: skip
    a.set_yticks(range(len(rows)), [r.way for r in rows], fontsize=10)
    a.invert_yaxis()
    a.grid(False, axis="y")
    a.set_xlim(0, 1.35 * max(r.extra["seconds_to_target"] for r in rows))
    a.set_xlabel(f"seconds of training to a held-out FVU of {target:.3f}")
    note = run.suites["quality"].notes
    _caption(figure, run, note[0] if note else "")
    return figure


def roofline(run: Record) -> Figure | None:
    """GFLOP/s against flop/byte, under the roofs measured in the run."""
    rows = [r for r in _rows(run, "roofline") if r.flops and r.bytes]
    if not rows:
        return None
    ceilings: dict[str, Any] = run.suites["roofline"].facts.get("ceilings", {})
    figure, ((a,),) = _figure(1, 1, 9.5, 6)
    xs = [r.flops / r.bytes for r in rows if r.flops and r.bytes]
    left, right = min(xs) / 3, max(max(xs) * 3, 300)
    roofs = {
        "mm_bf16": "torch.mm, bf16",
        "own_fp32": "own product, fp32",
        "mm_fp32": "torch.mm, fp32",
    }
    if ceilings:
        copy = ceilings["copy"]
        for number, (key, label) in enumerate(roofs.items()):
            if ceilings.get(key):
                ridge = ceilings[key] / copy
                a.plot(
                    [left, ridge, right], [left * copy / 1e9, *[ceilings[key] / 1e9] * 2],
                    color=[INK, "#777777", "#aaaaaa"][number], lw=1.5,
                    label=f"{label}: {ceilings[key] / 1e9:.0f} GFLOP/s",
                )  # fmt: skip
        a.plot([], [], " ", label=f"slope, a copy: {copy / 1e9:.1f} GB/s")
    ops = list(dict.fromkeys(r.op for r in rows))
    marks = "osD^vPX*<>hp"
    shares: dict[str, list[str]] = {op: [] for op in ops}
    for row in rows:
        if row.times and row.floor:
            shares[row.op].append(f"{row.floor / row.times.median:.0%}")
    labels = {op: f"{op} ({', '.join(each)})" if each else op for op, each in shares.items()}
    for row in rows:
        t = row.times
        assert t is not None and row.flops and row.bytes
        number = ops.index(row.op)
        fp32 = row.dtype == "fp32"
        a.plot(
            row.flops / row.bytes, row.flops / t.median / 1e9, marks[number % len(marks)],
            color=(OURS + OTHERS)[number % 10], ms=8, fillstyle="full" if fp32 else "none",
            label=labels.pop(row.op, None),
        )  # fmt: skip
    _log_ticks(a)
    _log_ticks(a, "y")
    a.set_xlabel("operations a byte by formula (flop / byte, log scale)")
    a.set_ylabel("reached (GFLOP/s, log scale)")
    a.legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5))
    case = statistics.mode([r.case.rpartition(" ")[0] for r in rows])
    text = (
        f"{case}; filled: fp32, open: bf16; in brackets: share of the limit of each\n"
        "(above 100%: inputs came from a cache). "
        "Ops without arithmetic are in the table alone."
    )
    _caption(figure, run, text)
    return figure
