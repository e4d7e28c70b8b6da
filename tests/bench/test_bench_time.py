# SPDX-License-Identifier: Apache-2.0
"""`ksae bench` ends in the time that it promises, and what is cut for it says so."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch

from ksae.bench import suites
from ksae.bench.harness import command, figures, record, report, shapes
from ksae.bench.harness.record import Record, Row
from ksae.bench.harness.session import Session
from ksae.bench.suites import ops as ops_suite
from ksae.bench.suites import step

ROOT = Path(__file__).parents[2]
MACHINE = {"cpu": "c", "threads": 1, "torch": "t", "ksae": "k", "revision": "r", "date": "d"}


class Sleeper:
    """A contestant of the step suite that takes a second of a clock that is not real."""

    failure, warm = None, 1.0

    def __init__(self, name, session, interrupt_at=None):
        self.name, self.session, self.interrupt_at = name, session, interrupt_at
        self.seconds = []

    def step(self, timed=True):
        if len(self.seconds) == self.interrupt_at:
            raise KeyboardInterrupt
        self.session.now += 1.0
        self.seconds.append(1.0)


class FakeSession(Session):
    now = 0.0

    def spent(self):
        return self.now

    def tick(self, text):
        pass


def rounds_of(until, latest, interrupt_at=None, quick=False):
    session = FakeSession(Record({}, "full"), Path(), quick=quick)
    both = [Sleeper("a", session), Sleeper("b", session, interrupt_at)]
    rows = {w.name: Row("step", "case", "train_step", "step", w.name) for w in both}
    try:
        step._rounds(session, both, rows, until, latest)
    except KeyboardInterrupt:
        assert interrupt_at is not None
    return session.now, rows


def test_step_fills_its_blocks_in_its_time():
    now, rows = rounds_of(until=40.0, latest=50.0)
    assert now <= 42
    assert all(len(r.blocks) == step.BLOCKS and "cut" not in r.extra for r in rows.values())


def test_step_that_is_late_takes_the_least_rounds_and_no_more():
    _, rows = rounds_of(until=1.0, latest=50.0)
    assert all(len(r.blocks) == step.LEAST and "cut" not in r.extra for r in rows.values())


def test_quick_step_fills_its_blocks_however_late():
    _, rows = rounds_of(until=-5.0, latest=math.inf, quick=True)
    assert all(len(r.blocks) == step.BLOCKS for r in rows.values())


def test_step_that_is_far_too_late_has_one_round_and_says_so():
    now, rows = rounds_of(until=-5.0, latest=-1.0)
    assert now == 2
    assert all(r.extra["cut"] == "1 of 4 blocks, cut by the time" for r in rows.values())


def test_interrupted_step_keeps_the_part_of_a_block():
    _, rows = rounds_of(until=40.0, latest=50.0, interrupt_at=2)
    assert [sum(map(len, r.blocks)) for r in rows.values()] == [3, 2]
    assert rows["b"].extra["cut"].startswith("1 of 4 blocks")


def test_shapes_that_the_run_did_not_reach_are_rows_that_say_so(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(step, "run_shape", interrupted)
    session = Session(Record({}, "full"), tmp_path / "x.json", quick=False)
    session.begin("step", 1000.0)
    with pytest.raises(KeyboardInterrupt):
        step.run(session)
    assert [row.case for row in session.suite.rows] == [str(s) for s in shapes.NAMED]
    text = report.markdown(Record(MACHINE, "full", suites={"step": session.suite}), [])
    assert text.count("not reached before the end of the run") == len(shapes.NAMED)


def test_shape_is_scaled_where_the_last_one_took_too_long():
    assert step.affordable(8e10, 100 / 8e10, 100.0) == 8e10
    assert step.affordable(8e10, 101 / 8e10, 100.0) == 4e10
    assert step.affordable(8e10, 400 / 8e10, 100.0) == 2e10


def test_further_passes_are_of_the_cases_that_fit():
    cases = [((1, 2, 3, 4), "fp32"), ((5, 6, 7, 8), "fp32"), ((9, 10, 11, 12), "fp32")]
    taken = dict(zip(cases, (1.0, 5.0, 1.0), strict=True))
    assert ops_suite.fitting(cases, taken, 7.0) == cases
    assert ops_suite.fitting(cases, taken, 6.5) == cases[:2]
    assert ops_suite.fitting(cases, taken, 2.5) == cases[:1]
    assert ops_suite.fitting(cases, taken, -1.0) == []


@pytest.mark.nightly
def test_ops_that_are_cut_by_the_time_say_so(tmp_path, monkeypatch):
    monkeypatch.setattr(ops_suite, "FULL", ops_suite.TINY)
    monkeypatch.setattr(ops_suite, "MEMORY", [])
    session = Session(Record({}, "full"), tmp_path / "x.json", quick=False)
    session.begin("ops", 0.0)  # the time is spent at once
    ops_suite.run(session)
    (title, other) = (f"N=16 d=24 F=256 k=4 {name}" for name in ("fp32", "bf16"))
    assert f"{title}: 0 of 4 passes, cut by the time" in session.suite.notes
    assert f"{other}: 0 of 4 passes, cut by the time" in session.suite.notes
    assert all(row.extra.get("cut") for row in session.suite.rows if row.case == title)


@pytest.mark.parametrize("mode", suites.MINUTES)
def test_minutes_promised_are_what_the_suites_plan(mode, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    planned = sum(suites.SUITES[name].seconds(mode) for name in command.chosen(None, mode))
    assert planned <= 60 * suites.MINUTES[mode]
    promise = f"about {suites.MINUTES[mode]} minutes"
    for file in ("README.md", "bench/README.md"):
        assert promise in (ROOT / file).read_text(), file
    help_ = (ROOT / "python/ksae/cli/bench.py").read_text()
    assert "About {full} minutes, or {quick},".format(**suites.MINUTES) in help_


def test_what_a_suite_takes_too_long_the_others_go_without():
    assert suites.budget(100, 0) == suites.budget(100, -20) == 100
    assert suites.budget(100, 30) == 70
    assert suites.budget(100, 500) == 50  # at least half of it is measured
    planned, spent = (660, 1200, 120), 0.0
    for number, seconds in enumerate(planned):
        late = spent - sum(planned[:number])
        spent += suites.budget(seconds, late) * (1.3 if number == 0 else 1)
    assert spent == sum(planned)


def test_row_that_was_cut_by_the_time_says_so():
    cut = {"cut": "1 of 4 blocks, cut by the time"}
    key = ("step", "case", "train_step", "step")
    run = Record(MACHINE, "full")
    run.suites["step"] = record.Suite(
        rows=[
            Row(*key, "ksae fp32", ours=True, blocks=[[1.0]], extra=cut),
            Row(*key, "dense torch", extra={"cut": "0 of 4 blocks, cut by the time"}),
            Row(*key, "other"),
        ]
    )
    for text in (report.terminal(run), report.markdown(run, []), report.readme_section(run)):
        assert "1 of 4 blocks, cut by the time" in text
        assert "0 of 4 blocks, cut by the time" in text
        assert "not timed: the run ended before" in text
    assert figures.steps(run) is not None
