# SPDX-License-Identifier: Apache-2.0
"""What people read of a run: tables on the terminal, report.md, the sections of README and site.

    python -m ksae.bench.harness.report bench/results/cpu/bench.json README.md docs/benchmarks.md

writes those sections anew, from the committed result.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..gpu import report as gpu
from . import record
from .measure import UNKNOWN, table
from .record import Record, Row, groups

BEGIN, END = "<!-- bench:begin -->", "<!-- bench:end -->"  # the README's section
TABLES_BEGIN, TABLES_END = "<!-- tables:begin -->", "<!-- tables:end -->"  # the site's
RESULT = "bench/results/cpu/bench.json"  # what the sections are made from
Cells = list[list[str]]
COMPARED = ("ops", "step", "families", "quality")  # suites whose rows are ksae's and its rivals'
REFERENCE, NO_KERNEL = "reference", "ksae (the reference)"  # ways of the op suite
# What users call; every other op is a part of a step.
FOR_USERS = (
    "topk", "topk_encode", "batch_topk_encode", "threshold_encode", "grad_topk_encode",
    "sparse_decode",
)  # fmt: skip

CAPTIONS = {
    "speedup": "How many times faster the best of ksae is than torch's fastest way, each op at "
    "each shape (right of 1: ksae wins; lines: quartiles).",
    "step": "Time of one whole training step, all at the same weights and batches; lines: "
    "quartiles.",
    "scaling": "Time against one size at a time, both axes logarithmic; bands: quartiles; dashed: "
    "the floor by formula. Numbers: fitted exponent, and the expected one in brackets.",
    "quality": "Held-out FVU (share of the variance that is not explained, lower is better) "
    "against training time, at the same batches.",
    "race": "Seconds of training to one held-out FVU, all at the same batches; shorter is better.",
    "roofline": "What each kernel reaches, against its operations a byte by formula; lines: the "
    "limits of this machine, measured in the same run.",
}


def ms(seconds: float) -> str:
    return f"{seconds * 1e3:.4g}"


def megabytes(size: int | None) -> str:
    return "" if size is None else f"{size / 1e6:.1f}"


def best_rival(rows: Sequence[Row]) -> Row | None:
    """torch's fastest way of a group of the op suite; the reference counts as one."""
    ours = best_of_ours(rows)
    alone = ours is not None and ours.way == NO_KERNEL  # it would race against itself
    rivals = [r for r in rows if not r.ours and r.times and not r.extra.get("part")]
    rivals = [r for r in rivals if not (alone and r.way == REFERENCE)]
    return min(rivals, key=lambda r: r.times.median if r.times else 0, default=None)


def best_of_ours(rows: Sequence[Row]) -> Row | None:
    ours = [r for r in rows if r.ours and r.times]
    return min(ours, key=lambda r: r.times.median if r.times else 0, default=None)


def quotient(slow: Row, fast: Row) -> float:
    """Of the medians."""
    assert slow.times and fast.times
    return slow.times.median / fast.times.median


def spread(row: Row) -> str:
    """Half the range of the blocks' lower quartiles, which `--compare` works with."""
    lows = row.lows
    return f"{(max(lows) - min(lows)) / 2 / min(lows):.0%}" if len(lows) > 1 else ""


def untimed(row: Row) -> str:
    """Why a row has no time."""
    return row.failure or row.extra.get("cut") or "not timed: the run ended before"


def ops_table(rows: Sequence[Row]) -> tuple[list[str], Cells]:
    header = ["op", "way", "ms", "quartiles", "spread", "time / ksae", "peak MB", ""]
    cells: Cells = []
    for (_, _, op, mode), members in groups(list(rows)).items():
        best = best_of_ours(members)
        for row in members:
            name = f"({row.way})" if row.extra.get("part") else row.way
            if not row.times:
                cells.append([f"{op} {mode}", name, *[""] * 5, untimed(row)])
                continue
            t = row.times
            ratio = quotient(row, best) if best else None
            rival = not row.ours and not row.extra.get("part")
            itself = best is not None and best.way == NO_KERNEL and row.way == REFERENCE
            rival = rival and not itself
            loses = "ksae LOSES" if rival and ratio is not None and ratio < 1 else ""
            loses = "no faster kernel here" if row.way == NO_KERNEL else loses
            remark = "; ".join(filter(None, (loses, row.extra.get("cut"))))
            cells.append(
                [
                    f"{op} {mode}",
                    name,
                    ms(t.median),
                    f"{ms(t.q1)}-{ms(t.q3)}",
                    spread(row),
                    "" if ratio is None else f"{ratio:.2f}",
                    megabytes(row.peak),
                    remark,
                ]
            )
    return header, cells


def step_table(rows: Sequence[Row]) -> tuple[list[str], Cells]:
    header = ["contestant", "version", "ms", "quartiles", "spread", "time / ksae", "extra MB"]
    header += ["of floor", "remark"]
    base = next((r for r in rows if r.ours and r.times), None)  # in float32
    cells: Cells = []
    for row in rows:
        version = str(row.extra.get("version") or "")
        if not row.times:
            cells.append([row.way, version, *[""] * 6, untimed(row)])
            continue
        t = row.times
        ratio = quotient(row, base) if base else None
        note = str(row.extra.get("note") or "")
        loses = "ksae LOSES" if not row.ours and ratio is not None and ratio < 1 else note
        remark = "; ".join(filter(None, (loses, row.extra.get("cut"))))
        cells.append(
            [
                row.way,
                version,
                ms(t.median),
                f"{ms(t.q1)}-{ms(t.q3)}",
                spread(row),
                "" if ratio is None else f"{ratio:.2f}",
                megabytes(row.peak),
                f"{row.floor / t.median:.0%}" if row.floor else "",
                remark,
            ]
        )
    return header, cells


def scaling_table(run: Record) -> tuple[list[str], Cells]:
    header = ["op", "over", "exponent", "standard error", "expected", ""]
    cells = [
        [
            f["op"],
            f["size"],
            f"{f['exponent']:.2f}",
            f"{f['error']:.2f}",
            f"{f['expected']:.2f}",
            "above the formula" if f["too_fast"] else "",
        ]
        for f in run.suites["scaling"].facts.get("fits", [])
    ]
    return header, cells


def quality_table(rows: Sequence[Row]) -> tuple[list[str], Cells]:
    header = ["contestant", "version", "FVU held out", "dead", "s to target", "ms a step", "remark"]
    cells: Cells = []
    for row in rows:
        version = str(row.extra.get("version") or "")
        if "fvu" not in row.extra or not row.times:
            cells.append([row.way, version, *[""] * 4, row.failure or "not finished"])
            continue
        reached = row.extra.get("seconds_to_target")
        cells.append(
            [
                row.way,
                version,
                f"{row.extra['fvu']:.4f}",
                f"{row.extra['dead']:.1%}",
                "not reached" if reached is None else f"{reached:.2f}",
                ms(row.times.median),
                str(row.extra.get("note") or ""),
            ]
        )
    return header, cells


def roofline_table(rows: Sequence[Row]) -> tuple[list[str], Cells]:
    header = ["op", "dtype", "way", "ms", "GB/s", "GFLOP/s", "flop / byte", "of limit"]
    cells: Cells = []
    for row in rows:
        if row.times and row.bytes and row.floor:
            t = row.times.median
            flops = row.flops or 0
            rates = [f"{row.bytes / t / 1e9:.1f}", f"{flops / t / 1e9:.1f}"]
            rates += [f"{flops / row.bytes:.1f}", f"{row.floor / t:.0%}"]
            cells.append([row.op, row.dtype, row.way, ms(t), *rates])
    return header, cells


def threads_table(rows: Sequence[Row]) -> tuple[list[str], Cells]:
    header = ["op", "", "alone, ms", "in turns, ms", "in turns / alone"]
    cells: Cells = []
    for (_, case, op, _), members in groups(list(rows)).items():
        timed = {r.way: r for r in members if r.times}
        if len(timed) == 2:
            alone, turns = timed["alone"], timed["in turns"]
            medians = [ms(r.times.median) for r in (alone, turns) if r.times]
            cells.append([op, case, *medians, f"{quotient(turns, alone):.2f}"])
    return header, cells


def sections(run: Record) -> list[tuple[str, list[str], list[tuple[str, list[str], Cells]]]]:
    """Title, notes, and tables (title, header, cells) of each suite that ran."""
    found = []
    for name, suite in run.suites.items():
        notes = [*suite.notes, *(f"PROBLEM: {problem}" for problem in suite.problems)]
        if suite.state != "complete":
            notes.append(suite.state)
        tables = []
        by_case: dict[str, list[Row]] = {}
        for row in suite.rows:
            by_case.setdefault(row.case, []).append(row)
        if name == "ops":
            for said, wanted in (("", True), ("Internal ops, ", False)):
                for case, rows in by_case.items():
                    chosen = [r for r in rows if (r.op in FOR_USERS) == wanted]
                    tables.append((said + case, *ops_table(chosen)))
        elif name == gpu.SUITE:
            notes, tables = [*gpu.notes(suite), *notes], gpu.tables(suite)
        elif name in ("step", "families"):
            tables = [(case, *step_table(rows)) for case, rows in by_case.items()]
        elif name == "scaling":
            tables = [("Exponents", *scaling_table(run))]
        elif name == "quality":
            target = suite.facts.get("target_fvu")
            if target is not None:
                notes.append(f"target: FVU {target:.4f}, 1.1 times what dense torch ends with")
            tables = [(case, *quality_table(rows)) for case, rows in by_case.items()]
        elif name == "roofline":
            tables = [("Kernels", *roofline_table(suite.rows))]
        elif name == "threads":
            loaded = ", ".join(suite.facts.get("runtimes", []))
            notes.append(f"OpenMP runtimes loaded: {loaded or 'none'}")
            tables = [("Ops of torch and ksae beside each other", *threads_table(suite.rows))]
        found.append((f"{name} ({suite.seconds:.0f} s)", notes, tables))
    return found


def terminal(run: Record) -> str:
    """All tables as aligned text."""
    lines = []
    for title, notes, tables in sections(run):
        lines += ["", title, *(f"  {note}" for note in notes)]
        for case, header, cells in tables:
            if cells:
                lines += ["", case, table(header, cells)]
    lines += ["", *losing(run)]
    return "\n".join(lines)


def _faster_rivals(run: Record) -> Iterator[tuple[Row, Row, float]]:
    """The best of ksae, a faster rival, and how many times faster; of each thing ksae loses."""
    for suite, case, op, mode in groups(run.rows):
        if suite not in COMPARED:
            continue
        members = [r for r in run.rows if r.group == (suite, case, op, mode)]
        ours, rival = best_of_ours(members), best_rival(members)
        if ours and rival and quotient(rival, ours) < 1:
            yield ours, rival, 1 / quotient(rival, ours)


def losing(run: Record) -> list[str]:
    """Where torch or a peer is faster, or a result was wrong; a line each."""
    lines = [
        f"{r.suite}: {r.op} {r.mode} at {r.case}: {r.way} takes 1/{times:.2f} of ksae's time"
        for _, r, times in _faster_rivals(run)
    ]
    lines += [f"{r.suite}: {r.op} at {r.case}: {r.way}: {r.failure}" for r in run.rows if _wrong(r)]
    if not lines and not run.suites.keys() & {*COMPARED}:
        return []
    head = "Where ksae loses:" if lines else "No row in which ksae loses."
    return [head, *(f"- {line}" for line in lines)]


def losing_in_short(run: Record) -> list[str]:
    """The same with a line an op: at how many shapes, and where most."""
    found: dict[tuple[str, str], list[tuple[float, Row]]] = {}
    for ours, rival, times in _faster_rivals(run):
        found.setdefault((ours.op, ours.mode), []).append((times, rival))
    lines = []
    for (op, mode), each in found.items():
        shapes = len({r.case for r in run.rows if (r.op, r.mode) == (op, mode)})
        times, rival = max(each, key=lambda pair: pair[0])
        lines.append(
            f"- {op} {mode}: at {len(each)} of {shapes} shapes and types, most at {rival.case},"
            f" where {rival.way} is {times:.1f} times faster"
        )
    return ["Where ksae loses:", *lines] if lines else ["No row in which ksae loses."]


def _wrong(row: Row) -> bool:
    return row.failure is not None and ("differs" in row.failure or row.ours)


def markdown(run: Record, pictures: Sequence[str]) -> str:
    """report.md: conditions, how to reproduce, tables, pictures with captions, losing rows."""
    lines = ["# ksae bench: " + run.mode, "", conditions(run), ""]
    lines += ["```sh", reproduce(run), "```", ""]
    lines += ["Times are medians of interleaved samples, with quartiles; spread is half the range "]
    lines[-1] += "of the lower quartiles of blocks that lie apart in time."
    for title, notes, tables in sections(run):
        name = title.split()[0]
        lines += ["", f"## {title}", "", *(f"- {note}" for note in notes)]
        for picture in pictures:
            stem = picture.removesuffix(".png")
            if _belongs(stem, name):
                caption = CAPTIONS[stem.split("-")[0]]
                lines += ["", f"![{caption}]({picture})", "", f"*{caption}*"]
        for case, header, cells in tables:
            if cells:
                lines += ["", f"### {case}", "", *_markdown_table(header, cells)]
    for head, *rows in filter(None, [losing(run)]):
        lines += ["", "## " + head.rstrip(":."), "", *rows]
    return "\n".join(lines).rstrip() + "\n"


def _belongs(picture: str, suite: str) -> bool:
    stem = picture.split("-")[0]
    return {"speedup": "ops", "race": "quality"}.get(stem, stem) == suite


def _markdown_table(header: list[str], cells: Cells) -> list[str]:
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    return lines + ["| " + " | ".join(c.replace("|", "\\|") for c in row) + " |" for row in cells]


def conditions(run: Record) -> str:
    """Hardware, versions, threads, data and revision in a sentence."""
    m = run.machine
    if "cpu" not in m:  # of a run that was cut off before it knew
        return ", ".join(f"{name} {value}" for name, value in m.items())
    where = f"{m['gpu']}; " if "gpu" in m else ""
    isa = f", {m['isa']}" if m.get("isa") else ""
    known = m.get("revision", UNKNOWN) != UNKNOWN  # an installed package has none
    revision = f" at revision `{m['revision']}`" if known else ""
    return (
        f"{where}{m['cpu']}{isa}, {m['threads']} thread{'s' * (m['threads'] != 1)}, "
        f"torch {m['torch']}, ksae {m['ksae']}{revision}, {m['date']}; "
        f"data: {run.conditions.get('data', 'normal')}; "
        f"{run.conditions.get('seconds', 0):.0f} s, {run.state}."
        + (f" {run.conditions['busy']}" if run.conditions.get("busy") else "")
    )


def reproduce(run: Record) -> str:
    if "command" in run.conditions:
        return str(run.conditions["command"])
    suites = run.conditions.get("suites", ",".join(run.suites))
    chosen = f" --suite {suites}" if suites else ""
    return f"ksae bench --{run.mode} --threads {run.machine['threads']}{chosen} --out bench-results"


def readme_section(run: Record, path: str = RESULT) -> str:
    """What stands between the README's markers: one picture, one table, where it was measured."""
    folder = Path(path).parent
    lines = []
    if any(r.extra.get("curve") for r in run.rows if r.suite == "quality"):
        lines += [f"![{CAPTIONS['race']}]({folder / 'race.png'})", ""]
    lines += [*_markdown_table(*race_table(run)), "", f"Measured on {conditions(run)}"]
    lines += [f"`{reproduce(run)}` repeats it; the numbers are in [`{path}`]({path})."]
    return "\n".join(lines)


def race_table(run: Record) -> tuple[list[str], Cells]:
    """A row a contestant: seconds to the target FVU, milliseconds and memory of one step at the
    first shape of the step suite."""
    quality, step = run.suites.get("quality"), run.suites.get("step")
    target = quality.facts.get("target_fvu") if quality else None
    at = step.rows[0].case if step and step.rows else "no shape"
    steps = {r.way: r for r in step.rows if r.case == at} if step else {}
    raced = {r.way: r for r in quality.rows} if quality else {}
    goal = "the target FVU" if target is None else f"FVU {target:.3f}"
    header = ["", f"s to {goal}", f"ms a step, {at}", "extra MB of that step"]
    cells: Cells = []
    for way in raced or steps:
        reached = raced[way].extra.get("seconds_to_target") if way in raced else None
        row = steps.get(way)
        time = ms(row.times.median) if row and row.times else "not measured"
        seconds = "not reached" if reached is None else f"{reached:.1f}"
        cut = "" if row is None else row.extra.get("cut") or ("" if row.times else untimed(row))
        cells.append([way, seconds, time, megabytes(row.peak) if row else "", cut])
    if any(line[-1] for line in cells):
        return [*header, "remark"], cells
    return header, [line[:-1] for line in cells]


def tables_section(run: Record, path: str = RESULT) -> str:
    """What stands between the site's markers: the whole step, and where ksae loses."""
    folder = Path("..", path).parent  # the page stands in docs/
    lines = [conditions(run), f"From [`{path}`](../{path}); all of it, with losing rows and the"]
    lines[-1] += f" other plots: [report]({folder / 'report.md'}). Reproduce:"
    lines += ["", "```sh", reproduce(run), "```", ""]
    rows = [r for r in run.rows if r.suite == "step"]
    for case, members in list(_by_case(rows).items())[:2]:
        lines += [
            f"One training step (forward, backward, projection, Adam, unit norm), {case}:",
            "",
        ]
        lines += [*_markdown_table(*_short(members)), ""]
    lines += [f"![{CAPTIONS['step']}]({folder / 'step.png'})", ""]
    head, *losses = losing_in_short(run)
    return "\n".join([*lines, head, "", *losses]).rstrip()


def _by_case(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.case, []).append(row)
    return found


def _short(rows: Sequence[Row]) -> tuple[list[str], Cells]:
    """Contestant, ms, times ksae, extra memory."""
    header, cells = step_table(rows)
    wanted = ("contestant", "ms", "time / ksae", "extra MB", "remark")
    keep = [header.index(name) for name in wanted]
    return [header[i] for i in keep], [[row[i] for i in keep] for row in cells]


def rewrite(text: str, run: Record, path: str = RESULT) -> str:
    """`text` with its section made anew: the README's, or that of the site.

    Raises:
        ValueError: it has no markers.
    """
    begin, end, section = BEGIN, END, readme_section
    if TABLES_BEGIN in text:
        begin, end, section = TABLES_BEGIN, TABLES_END, tables_section
    if begin not in text or end not in text:
        raise ValueError(f"report: the file must have {begin} and {end}, got neither or one")
    head, tail = text.split(begin)[0], text.split(end)[1]
    return f"{head}{begin}\n{section(run, path)}\n{end}{tail}"


if __name__ == "__main__":
    result, *targets = sys.argv[1:]
    for target in map(Path, targets):
        target.write_text(rewrite(target.read_text(), record.load(result), result))
