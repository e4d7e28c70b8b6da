# SPDX-License-Identifier: Apache-2.0
"""`ksae bench`: runs suites one after the other, shows and keeps what they measure."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ksae.errors import UserError, failure

from ..suites import SUITES, budget, runner
from . import figures, report
from .measure import busy, describe, machine
from .record import Record
from .session import Session

JSON = "bench.json"


def chosen(names: str | None, mode: str) -> list[str]:
    """The suites of a comma-separated list; without one, all of the mode that can run here.

    Raises:
        UserError: a name that is none.
    """
    if names is None:
        here = [n for n, s in SUITES.items() if s.device == "any" or torch.cuda.is_available()]
        return [n for n in here if mode != "quick" or not SUITES[n].only_full]
    found = [name.strip() for name in names.split(",") if name.strip()]
    for name in found:
        if name not in SUITES:
            raise UserError(f"bench: --suite must be of {', '.join(SUITES)}, got {name}")
    return found


def bench(
    suites: Sequence[str],
    out: Path,
    *,
    mode: str = "quick",
    threads: int | None = None,
    data: str = "normal",
    cache: Path = Path("bench/cache"),
    progress: bool = True,
) -> int:
    """Run `suites`, write bench.json as they go, then report.md and the pictures.

    Args:
        suites: names of SUITES.
        out: folder of the results.
        mode: quick, full, or tiny (the tests').
        threads: of every contestant; None: torch's default.
        data: "normal", "planted" or a .npy file of activations.
        cache: folder of train.npy and holdout.npy, the real activations.

    Returns:
        0; 1 if a suite failed or a result was wrong; 130 after Ctrl-C, with all that was measured.
    """
    out.mkdir(parents=True, exist_ok=True)
    if threads is not None:
        torch.set_num_threads(threads)
    threads = torch.get_num_threads()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    conditions: dict[str, Any] = {"data": data, "inputs": "hot where they fit"}
    conditions["suites"] = "" if list(suites) == chosen(None, mode) else ",".join(suites)
    if (warning := busy(threads)) is not None:
        conditions["busy"] = warning
    run = Record(machine(device=device), mode, conditions)
    session = Session(
        record=run,
        path=out / JSON,
        quick=mode != "full",
        tiny=mode == "tiny",
        threads=threads,
        device=device,
        data=data,
        cache=cache,
    )
    planned = sum(SUITES[name].seconds(mode) for name in suites)
    print(describe(run.machine))
    if warning is not None:
        print(warning)
    print(f"{mode}: {', '.join(suites)}; about {planned:.0f} s", flush=True)
    start = time.perf_counter()
    with tqdm(total=round(planned), disable=not progress, unit="s", leave=False) as bar:
        bar.bar_format = "{l_bar}{bar}| {n:.0f}/{total} s {postfix}"
        run.state = _run_all(session, suites, mode, bar)
    run.conditions["seconds"] = round(time.perf_counter() - start, 1)
    run.save(session.path)
    print(report.terminal(run))
    pictures = figures.draw(run, out)
    (out / "report.md").write_text(report.markdown(run, [p.name for p in pictures]))
    print(f"{run.conditions['seconds']:.0f} s; {session.path}, {out / 'report.md'}")
    if run.state == "interrupted":
        print("interrupted: this is what was measured until then")
        return 130
    wrong = any(row.ours and row.failure for row in run.rows)
    failed = any(suite.state.startswith("failed") for suite in run.suites.values())
    return 1 if wrong or failed else 0


def _run_all(session: Session, suites: Sequence[str], mode: str, bar: tqdm[None]) -> str:
    """The state of the whole run. Ctrl-C ends it with what there is."""
    finished = 0.0
    start = time.perf_counter()

    def show(text: str, seconds: float) -> None:
        bar.n = finished + seconds
        bar.set_postfix_str(text, refresh=False)
        bar.refresh()

    session.show = show
    for name in suites:
        seconds = SUITES[name].seconds(mode)
        late = time.perf_counter() - start - finished
        session.begin(name, budget(seconds, late))
        session.tick("starting")
        run = runner(name)
        if isinstance(run, str):
            session.note(run)
            session.end(f"left out: {run}")
            continue
        try:
            run(session)
        except KeyboardInterrupt:
            session.end("interrupted")
            return "interrupted"
        except (RuntimeError, MemoryError) as error:  # out of memory, say: the others go on
            session.end(f"failed: {failure(error)}")
        else:
            session.end("complete")
        finished += seconds
    return "complete"
