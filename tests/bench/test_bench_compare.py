# SPDX-License-Identifier: Apache-2.0
"""`ksae bench --compare`: slow-downs are flagged, equal runs and slower machines are not."""

from __future__ import annotations

import json
import random
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

from ksae import cli
from ksae.bench.harness import clock, compare, measure, record
from ksae.bench.harness.record import Record, Row, Suite
from ksae.bench.harness.session import Session

MACHINE = {"cpu": "c", "threads": 1}
KEY = ("ops", "case", "topk", "forward")


def run_of(seed: int, *, slow: float = 1.0, machine: float = 1.0, noise: float = 0.02) -> Record:
    """Two ways, four blocks: ksae at 1 ms, torch at 3 ms, samples with one-sided noise."""
    rng = random.Random(seed)

    def blocks(seconds: float) -> list[list[float]]:
        made = []
        for _ in range(4):
            block = seconds * (1 + rng.uniform(-noise, noise))
            made.append([block * (1 + rng.expovariate(20)) for _ in range(12)])
        return made

    rows = [
        Row(*KEY, "torch.topk", blocks=blocks(3e-3 * machine)),
        Row(*KEY, "ksae", ours=True, anchor="torch.topk", blocks=blocks(1e-3 * machine * slow)),
    ]
    return Record(dict(MACHINE), "quick", suites={"ops": Suite("complete", rows=rows)})


def kinds(old: Record, new: Record) -> list[str]:
    return [v.kind for v in compare.compare(old, new).verdicts]


def test_equal_runs_are_the_same():
    wrong = [kinds(run_of(seed), run_of(seed + 1000)) for seed in range(200)]
    assert wrong == [["same"]] * 200


def test_slow_down_of_20_percent_is_flagged():
    found = [kinds(run_of(seed), run_of(seed + 1000, slow=1.2)) for seed in range(200)]
    assert found == [["slower"]] * 200


def test_speed_up_is_seen():
    assert kinds(run_of(1), run_of(2, slow=0.7)) == ["faster"]


def test_slower_machine_is_not_slower_code():
    result = compare.compare(run_of(1), run_of(2, machine=1.5))
    assert [v.kind for v in result.verdicts] == ["same"]
    assert result.drift == pytest.approx(1.5, abs=0.1)


def test_slow_down_is_seen_on_a_slower_machine():
    assert kinds(run_of(1), run_of(2, machine=1.3, slow=1.25)) == ["slower"]


def test_blocks_that_differ_too_much_are_called_noisy_not_equal():
    assert kinds(run_of(1, noise=0.3), run_of(2, noise=0.3)) == ["noisy"]


def test_rows_without_a_partner_are_counted_not_judged():
    old, new = run_of(1), run_of(2)
    new.suites["ops"].rows[1].way = "ksae other"
    result = compare.compare(old, new)
    assert not result.verdicts and len(result.gone) == 2


def test_exponent_that_grew_is_named():
    old, new = run_of(1), run_of(2)
    fit = {"op": "topk_encode", "size": "F", "exponent": 1.0, "error": 0.02}
    old.suites["scaling"] = Suite(facts={"fits": [fit]})
    new.suites["scaling"] = Suite(facts={"fits": [fit | {"exponent": 1.5}]})
    assert compare.compare(old, new).fits == ["topk_encode grows with F^1.50, before ^1.00"]
    assert not compare.compare(old, old).fits


def test_command_prints_the_verdict_and_fails_for_what_is_slower(tmp_path, capsys):
    paths = {}
    for name, run in {"old": run_of(1), "same": run_of(2), "slow": run_of(3, slow=1.2)}.items():
        paths[name] = str(tmp_path / f"{name}.json")
        run.save(Path(paths[name]))
    assert cli.run(["bench", "--compare", paths["old"], paths["same"]]) == 0
    assert "0 slower, 0 faster, 1 the same" in capsys.readouterr().out
    assert cli.run(["bench", "--compare", paths["old"], paths["slow"]]) == 1
    printed = capsys.readouterr().out
    assert "SLOWER" in printed and "1 slower" in printed


# ------------------------------------------------------------------------------------- real times


def measured(path: Path) -> Record:
    """A small product of ours and one of torch's, in four blocks, through the layer of all suites.

    Each sample is far below a time slice, so that other load on the machine leaves most whole.
    """
    x = torch.randn(32, 96)
    W = torch.randn(96, 256)
    session = Session(Record(dict(MACHINE), "tiny"), path)
    session.begin("ops", 1.0)
    rows = {
        name: session.add(Row(*KEY, name, ours=name == "ksae", anchor="torch"))
        for name in ("torch", "ksae")
    }
    for _ in range(4):
        session.block(rows, {name: lambda: torch.mm(x, W) for name in rows}, 0.25)
    session.end("complete")
    return session.record


def test_injected_slow_down_of_one_op_is_flagged_and_equal_runs_are_not(
    tmp_path, monkeypatch, threads
):
    torch.set_num_threads(1)
    first, second = (measured(tmp_path / f"{i}.json") for i in range(2))
    monkeypatch.setenv("KSAE_BENCH_SLOW", "topk:0.3")
    slow = measured(tmp_path / "slow.json")
    assert "slower" not in kinds(first, second)
    (verdict,) = compare.compare(first, slow).verdicts
    assert verdict.raw > 1.1 and verdict.anchored > 1.1


def test_slow_down_is_injected_into_the_named_op_of_ksae_only(tmp_path, monkeypatch):
    monkeypatch.setenv("KSAE_BENCH_SLOW", "topk:0.2")
    assert measure.slow_share("topk") == 0.2
    assert measure.slow_share("topk_encode") == 0.0
    now = [0.0]
    monkeypatch.setattr(clock.time, "perf_counter", lambda: now.__setitem__(0, now[0] + 1e-3)
                        or now[0])  # fmt: skip
    plain = clock.timed(lambda: None)
    assert clock.timed(lambda: None, slow=5.0) > 4 * plain


def test_saved_records_keep_times_and_lows_on_a_line_each_and_judge_the_same(tmp_path):
    old, new = run_of(1), run_of(3, slow=1.2)
    loaded = []
    for name, run in (("a", old), ("b", new)):
        run.save(tmp_path / f"{name}.json")
        loaded.append(record.load(tmp_path / f"{name}.json"))
        for row, kept in zip(run.rows, loaded[-1].rows, strict=True):
            assert kept.key == row.key and (kept.ours, kept.anchor) == (row.ours, row.anchor)
            assert kept.lows == pytest.approx(row.lows, rel=1e-6)
            assert kept.times.median == pytest.approx(row.times.median, rel=1e-6)
            assert kept.times.n == row.times.n
    (a,), (b,) = (compare.compare(*pair).verdicts for pair in ((old, new), loaded))
    assert a.kind == b.kind == "slower" and a.raw == pytest.approx(b.raw, rel=1e-5)
    again = tmp_path / "again.json"
    loaded[0].save(again)
    assert again.read_text() == (tmp_path / "a.json").read_text()
    lines = [line for line in again.read_text().splitlines() if '"lows"' in line]
    assert len(lines) == len(old.rows)


def test_records_of_schema_1_are_read(tmp_path):
    path = tmp_path / "old.json"
    row = asdict(run_of(1).rows[1])
    del row["kept"]
    suite = asdict(Suite("complete")) | {"rows": [row]}
    path.write_text(json.dumps({"schema": 1, "machine": {}, "mode": "x", "suites": {"ops": suite}}))
    (read,) = record.load(path).rows
    assert read == run_of(1).rows[1]
