# SPDX-License-Identifier: Apache-2.0
"""`ksae bench`: every suite at tiny shapes, what it leaves, and what it says of other libraries."""

from __future__ import annotations

import itertools
import json
import re
from pathlib import Path

import pytest
import torch

from ksae import cli, ops
from ksae.bench import suites
from ksae.bench.contestants import workers
from ksae.bench.harness import clock, command, costs, figures, measure, record, report, shapes
from ksae.bench.harness.record import Record, Row
from ksae.bench.harness.session import Session
from ksae.bench.suites import ops as ops_suite
from ksae.bench.suites import scaling
from ksae.bench.suites.case import Case
from ksae.bench.suites.opcases import problems

ROOT = Path(__file__).parents[2]
CPU_SUITES = [name for name, spec in suites.SUITES.items() if spec.device == "any"]
MACHINE = {"cpu": "c", "threads": 1, "torch": "t", "ksae": "k", "revision": "r", "date": "d"}
NO_PEERS = dict.fromkeys(workers.MODULES, "module_that_is_not_there")
PNG = b"\x89PNG\r\n\x1a\n"


def test_help_names_every_suite(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", "--help"]) == 0
    said = capsys.readouterr().out
    listed = re.search(r"Comma-separated: ([\w,\s]+?)\n +--", said)
    assert listed and re.findall(r"\w+", listed[1]) == list(suites.SUITES)


@pytest.fixture(autouse=True)
def one_thread(threads):
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """All suites of the CPU, once: the folder and the record."""
    out = tmp_path_factory.mktemp("bench")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(workers, "MODULES", NO_PEERS)
        code = command.bench(CPU_SUITES, out, mode="tiny", threads=1, progress=False)
    assert code == 0
    return out, record.load(out / command.JSON)


@pytest.mark.nightly
def test_every_suite_is_complete_and_has_rows(tiny):
    _, run = tiny
    assert run.state == "complete"
    for name in CPU_SUITES:
        assert run.suites[name].state == "complete"
        assert any(row.times for row in run.suites[name].rows), name


@pytest.mark.nightly
def test_record_names_machine_versions_threads_data_and_revision(tiny):
    _, run = tiny
    for key in ("cpu", "threads", "torch", "ksae", "revision", "date", "isa"):
        assert run.machine[key] is not None or key == "isa", key
    assert run.machine["threads"] == 1
    assert run.conditions["data"] == "normal"


@pytest.mark.nightly
def test_ops_have_a_row_for_each_op_and_implementation_with_time_and_memory(tiny):
    _, run = tiny
    rows = run.suites["ops"].rows
    assert {row.op for row in rows if row.ours and row.times} == set(ops.serving())
    assert {row.mode for row in rows} == {"forward", "backward"}
    assert {row.way for row in rows} >= {"reference", "torch.topk", "embedding_bag"}
    assert all(row.peak is not None for row in rows if row.times)
    assert all(len(row.lows) == 1 for row in rows if row.times)


def test_peer_that_is_missing_is_a_row_that_says_so(monkeypatch):
    monkeypatch.setattr(workers.importlib.util, "find_spec", lambda name: None)
    worker = workers.Worker.start("eai-sparsify", workers.Task(1, 1, 1, 1, "normal", 1e-3, 1))
    assert worker.failure == "not installed: pip install eai-sparsify"
    worker.ready(1)
    worker.stop()
    row = Row("step", "case", "train_step", "step", "eai-sparsify", failure=worker.failure)
    run = Record(MACHINE, "quick", suites={"step": record.Suite(rows=[row])})
    assert "not installed: pip install eai-sparsify" in report.markdown(run, [])


@pytest.mark.nightly
def test_peer_that_breaks_is_a_row_that_says_so(tmp_path, monkeypatch):
    from ksae.bench.suites import quality

    def broken(*_):
        raise AttributeError("module 'peer' has no attribute 'SAE'")

    monkeypatch.setitem(quality.WAYS, "overcomplete", broken)
    monkeypatch.setattr(quality, "missing", lambda name: None if name == "overcomplete" else "no")
    session = Session(Record({}, "tiny"), tmp_path / "x.json", tiny=True)
    session.begin("quality", 1.0)
    quality.run(session)
    (row,) = [r for r in session.suite.rows if r.way == "overcomplete"]
    assert row.failure == "AttributeError: module 'peer' has no attribute 'SAE'"


@pytest.mark.nightly
def test_process_that_dies_is_a_row_that_says_so(monkeypatch):
    task = workers.Task(4, 4, 16, 0, "normal", 1e-3, 1)  # k = 0 is refused
    worker = workers.Worker.start("ksae fp32", task)
    worker.ready(120)
    worker.stop()
    assert worker.failure is not None and "k must be" in worker.failure


@pytest.mark.nightly
def test_interrupt_keeps_what_was_measured(tmp_path, monkeypatch):
    def interrupted(session):
        row = Row("scaling", "case", "op", "forward", "ksae", blocks=[[1.0, 2.0]])
        row.shape, row.extra = {"N": 1}, {"sweep": "N"}
        session.add(row)
        raise KeyboardInterrupt

    runner = suites.runner
    monkeypatch.setattr(workers, "MODULES", NO_PEERS)
    monkeypatch.setattr(
        command, "runner", lambda name: interrupted if name == "scaling" else runner(name)
    )
    names = ["quality", "scaling", "roofline"]
    code = command.bench(names, tmp_path, mode="tiny", threads=1, progress=False)
    assert code == 130
    run = record.load(tmp_path / command.JSON)
    assert run.state == run.suites["scaling"].state == "interrupted"
    times = run.suites["scaling"].rows[0].times
    assert (times.median, times.n) == (1.5, 2)
    assert run.suites["quality"].state == "complete"
    assert "roofline" not in run.suites
    assert (tmp_path / "report.md").exists()


def test_peer_that_fails_at_import_is_a_row_that_says_so(tmp_path, monkeypatch):
    (tmp_path / "sparsify.py").write_text("raise RuntimeError('built for another torch')")
    monkeypatch.syspath_prepend(tmp_path)
    worker = workers.Worker.start("eai-sparsify", workers.Task(4, 4, 16, 2, "normal", 1e-3, 1))
    worker.ready(120)
    worker.stop()
    assert worker.failure == "RuntimeError: built for another torch"


def test_result_that_is_wrong_has_no_time(tmp_path, monkeypatch):
    right = ops.topk

    def wrong(x, k):
        values, indices = right(x, k)
        return values + 1, indices

    monkeypatch.setattr(ops_suite.ops, "topk", wrong)
    session = Session(Record({}, "tiny"), tmp_path / "x.json", tiny=True)
    session.begin("ops", 1.0)
    case = Case(*ops_suite.TINY[0], "fp32", "normal")
    problem = next(p for p in problems(case) if p.op == "topk")
    ops_suite._visit(session, problem, case, {}, 0.0)
    bad = [row for row in session.suite.rows if row.ours]
    assert bad and all("differs from the reference" in row.failure for row in bad)
    assert not any(row.times for row in bad)


@pytest.mark.nightly
def test_pictures_are_drawn_and_the_report_shows_them_with_captions(tiny):
    out, run = tiny
    text = (out / "report.md").read_text()
    for name, caption in report.CAPTIONS.items():
        assert (out / f"{name}.png").read_bytes().startswith(PNG)
        assert f"]({name}.png)" in text and f"*{caption}*" in text
    assert run.machine["cpu"] in text and f"ksae {run.machine['ksae']}" in text
    revision = run.machine["revision"]  # an installed package has none
    assert (f"at revision `{revision}`" in text) == (revision != measure.UNKNOWN)
    assert "ksae bench --tiny" in text


def test_numbers_at_axes_do_not_overlap():
    key = ("N=1 d=2 F=3 k=1 fp32", "op", "forward")
    wide = [Row("ops", *key, "torch", blocks=[[9.0, 9.0]])]
    wide += [Row("ops", *key, "ksae", ours=True, blocks=[[3e-3, 3e-3]])]
    lost = ("N=1 d=2 F=3 k=1 fp32", "other", "forward")
    wide += [Row("ops", *lost, "torch", blocks=[[1.0, 1.0]])]
    wide += [Row("ops", *lost, "ksae", ours=True, blocks=[[9.0, 9.0]])]
    curve = [[1, 0.3, 0.7, 0.0], [2, 1.2, 0.65, 0.0]]
    narrow = [Row("quality", "case", "train", "train", "ksae", True, extra={"curve": curve})]
    narrow[0].blocks = [[1.0]]
    run = Record(MACHINE, "quick")
    run.suites = {"ops": record.Suite(rows=wide), "quality": record.Suite(rows=narrow)}
    for picture in (figures.speedup(run), figures.quality(run)):
        picture.canvas.draw()
        for axes in picture.axes:
            for axis, side in ((axes.xaxis, "x"), (axes.yaxis, "y")):
                low, high = sorted(axis.get_view_interval())
                shown = [t.label1 for t in axis.get_major_ticks() if low <= t.get_loc() <= high]
                boxes = [label.get_window_extent() for label in shown if label.get_text()]
                assert len(boxes) > 1
                ends = sorted((getattr(b, side + "0"), getattr(b, side + "1")) for b in boxes)
                assert all(a[1] < b[0] for a, b in itertools.pairwise(ends))


def test_report_shows_rows_in_which_ksae_loses():
    fast, slow = [[1.0, 1.0]], [[2.0, 2.0]]
    key = ("ops", "N=1 d=2 F=3 k=1 fp32", "topk", "forward")
    run = Record(MACHINE, "quick")
    run.suites["ops"] = record.Suite(
        rows=[Row(*key, "torch.topk", blocks=fast), Row(*key, "ksae x", ours=True, blocks=slow)]
    )
    line = "ops: topk forward at N=1 d=2 F=3 k=1 fp32: torch.topk takes 1/2.00 of ksae's time"
    assert line in report.losing(run)[1]
    assert line in report.markdown(run, []) and line in report.terminal(run)
    assert "ksae LOSES" in report.terminal(run)


@pytest.mark.nightly
def row_of(op: str, way: str, seconds: float, **more) -> Row:
    case = "N=1 d=2 F=3 k=1 fp32"
    return Row("ops", case, op, "forward", way, blocks=[[seconds, seconds]], **more)


def run_of(*rows: Row, **machine) -> Record:
    suite = record.Suite("complete", rows=list(rows))
    return Record(MACHINE | machine, "quick", suites={"ops": suite})


def test_op_without_a_kernel_is_no_loss_to_itself():
    ours = row_of("topk", report.NO_KERNEL, 2.0, ours=True)
    run = run_of(row_of("topk", report.REFERENCE, 1.0), ours)
    assert report.losing(run) == ["No row in which ksae loses."]
    assert "LOSES" not in report.terminal(run)
    assert "no faster kernel here" in report.terminal(run)
    assert figures.speedup(run) is None
    run = run_of(*run.rows, row_of("topk", "torch.topk", 1.5))
    assert len(report.losing(run)) == 2 and "torch.topk" in report.losing(run)[1]


def test_ops_that_users_call_come_before_internal_ones():
    run = run_of(
        row_of("row_update", "ksae", 1.0, ours=True), row_of("row_update", "torch", 2.0),
        row_of("topk", "ksae", 1.0, ours=True), row_of("topk", "torch", 2.0),
    )  # fmt: skip
    ((_, _, tables),) = report.sections(run)
    assert [title for title, _, _ in tables] == [
        "N=1 d=2 F=3 k=1 fp32",
        "Internal ops, N=1 d=2 F=3 k=1 fp32",
    ]
    assert [{cells[0] for cells in rows} for _, _, rows in tables] == [
        {"topk forward"},
        {"row_update forward"},
    ]
    labels = [t.get_text() for t in figures.speedup(run).axes[0].get_yticklabels()]
    assert labels == ["topk", "row_update"]


def test_times_faster_are_points_on_a_labelled_log_axis():
    run = run_of(row_of("topk", "ksae", 1.0, ours=True), row_of("topk", "torch", 19.0))
    (axes,) = figures.speedup(run).axes
    assert axes.get_xscale() == "log" and not axes.patches  # no bar
    assert any(list(line.get_xdata()) == [19.0] for line in axes.lines)
    assert "19" in [text.get_text() for text in axes.texts]


def test_legend_of_the_roofline_has_an_entry_for_each_op():
    rows = [
        Row("roofline", "case", op, "forward", "ksae", dtype=dtype, blocks=[[1.0]], bytes=1.0,
            flops=9.0, floor=0.5)
        for op in ("a", "b") for dtype in ("fp32", "bf16")
    ]  # fmt: skip
    run = Record(MACHINE, "quick", suites={"roofline": record.Suite(rows=rows)})
    (axes,) = figures.roofline(run).axes
    _, labels = axes.get_legend_handles_labels()
    assert labels == ["a (50%, 50%)", "b (50%, 50%)"]


def test_installed_package_is_named_by_its_version():
    rows = row_of("topk", "ksae", 1.0, ours=True), row_of("topk", "torch", 2.0)
    run = run_of(*rows, ksae="1.2.3", revision=measure.UNKNOWN)
    assert "ksae 1.2.3, d;" in report.conditions(run)
    assert figures.speedup(run).get_supxlabel().endswith("ksae 1.2.3")
    assert "ksae 1.2.3 at revision `r`" in report.conditions(run_of(*rows, ksae="1.2.3"))


@pytest.mark.parametrize(("load", "threads", "says"), [(0.3, 2, False), (1.6, 2, True),
                                                       (1.2, 1, False)])  # fmt: skip
def test_busy_machine_is_told(monkeypatch, load, threads, says):
    monkeypatch.setattr(measure.os, "getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr(measure.os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    warning = measure.busy(threads)
    assert (warning is not None) == says
    if warning:
        assert warning.startswith("Busy: load average 1.6 on 2 cores")
        run = run_of()
        run.conditions["busy"] = warning
        assert warning in report.markdown(run, [])


def test_readme_section_is_written_between_its_markers(tiny):
    _, run = tiny
    readme = f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n"
    once = report.rewrite(readme, run, "x/bench.json")
    assert once.startswith(f"before\n{report.BEGIN}\n") and once.endswith(f"{report.END}\nafter\n")
    assert "old" not in once and "ksae bench --tiny" in once and "x/bench.json" in once
    assert report.rewrite(once, run, "x/bench.json") == once
    with pytest.raises(ValueError, match="must have <!-- bench:begin -->"):
        report.rewrite("none", run)


@pytest.mark.parametrize(
    ("file", "begin", "end"),
    [
        ("README.md", report.BEGIN, report.END),
        ("docs/benchmarks.md", report.TABLES_BEGIN, report.TABLES_END),
    ],
)
def test_section_is_that_of_the_committed_result_that_it_names(file, begin, end):
    text = (ROOT / file).read_text()
    section = text.split(begin)[1].split(end)[0]
    path = re.search(r"bench/results/[\w./-]+\.json", section)[0]
    run = record.load(ROOT / path)
    assert report.rewrite(text, run, path) == text
    timed = [r for r in run.suites["step"].rows if r.times and r.case in section]
    assert timed and all(
        f"{r.times.median * 1e3:.4g}" in section for r in timed if r.way in section
    )
    for picture in re.findall(r"\]\((?:\.\./)?(bench/results/[\w./-]+\.png)\)", section):
        assert (ROOT / picture).is_file()


def test_site_section_has_the_losing_rows(tiny):
    _, run = tiny
    once = report.rewrite(f"{report.TABLES_BEGIN}{report.TABLES_END}", run, "x/bench.json")
    assert "One training step" in once and ("Where ksae loses" in once or "No row" in once)


# ------------------------------------------------------------------------------------ arithmetic


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_fit_finds_the_exponent_and_its_error(power):
    sizes = [1, 2, 4, 8, 16]
    exact = scaling.fit(sizes, [3 * s**power for s in sizes])
    assert exact.exponent == pytest.approx(power) and exact.error == pytest.approx(0, abs=1e-9)
    noise = [1.1, 0.9, 1.1, 0.9, 1.1]
    noisy = scaling.fit(sizes, [n * s**power for n, s in zip(noise, sizes, strict=True)])
    assert noisy.error > 0.01
    assert abs(noisy.exponent - power) < 3 * noisy.error


def test_growth_beyond_the_formula_is_marked():
    rows = [
        Row("scaling", str(F), "encode", "over F", "ksae", blocks=[[F**1.5]], shape={"F": F},
            extra={"sweep": "F", "growth": float(F)})
        for F in (8, 16, 32, 64)
    ]  # fmt: skip
    (fit,) = scaling.fits(rows)
    assert fit["exponent"] == 1.5 and fit["expected"] == 1.0 and fit["too_fast"]


def test_shapes_are_scaled_to_memory_and_time_and_say_how():
    gpt2 = shapes.NAMED[0]
    assert shapes.scaled(gpt2, 1, 10**12, 1e15).scaling == "as it is"
    small = shapes.scaled(gpt2, 10, 2 * 10**9, 1e10)
    assert shapes.memory_of(small, 10) <= 2 * 10**9 and 2 * small.N * small.d * small.F <= 1e10
    assert (small.d, small.k) == (gpt2.d, gpt2.k)
    assert small.scaling == "F 24576 -> 6144 for 2.0 GB, N 2048 -> 1024 for time"


def test_costs_count_each_tensor_once():
    assert costs.topk(2, 10, 3).bytes == 2 * 10 * 4 + 2 * 3 * (4 + 8)
    encode = costs.topk_encode(2, 5, 10, 3)
    assert encode.flops == 2 * 2 * 5 * 10
    assert encode.bytes == 4 * (2 * 5 + 10 * 5 + 10 + 5) + 2 * 3 * 12


def test_interleave_takes_turns():
    order = []
    ways = {name: (lambda name=name: order.append(name)) for name in "ab"}
    taken = clock.interleave(ways, 0.0, least=2, most=2)
    assert [len(t) for t in taken.values()] == [2, 2]
    assert {"a", "b"} == set(order)


# ---------------------------------------------------------------------------------- command line


def test_unknown_suite_is_one_line(capsys):
    assert cli.run(["bench", "--suite", "ops,nothing"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("ksae: error: bench: --suite must be of ops, step")
    assert error.rstrip().endswith("got nothing")


@pytest.mark.parametrize("text", ["{", '{"schema": 0}', "[]"])
def test_file_that_is_no_record_is_one_line(tmp_path, capsys, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    assert cli.run(["bench", "--compare", str(path), str(path)]) == 1
    assert f"ksae: error: bench: {path} must be" in capsys.readouterr().err


def test_suite_for_a_gpu_is_left_out_without_one(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert command.bench(["gpu"], tmp_path, mode="tiny", progress=False) == 0
    written = json.loads((tmp_path / command.JSON).read_text())
    assert written["suites"]["gpu"]["state"] == "left out: needs a CUDA device"
    assert "gpu" not in command.chosen(None, "quick")
