# SPDX-License-Identifier: Apache-2.0
"""Everything that a GPU has to answer, in one command, offline, in under nine minutes.

    python bench/gpu/run.py --out DIR

builds the package for this GPU (or lays it out without native code), takes a first look at every
op and step, measures ceilings, whole steps, ops and profiles, then runs the tests marked gpu, the
sanitizer, and measures large batches. DIR/gpu_<name>_<date>.json and .md are written anew after
each measurement, and the .log grows as things happen, so a run that is cut off loses only what it
had not yet measured. What is measured runs in a process of its own: one that dies, or hangs, loses
one section. Exits with 1 if something failed or was wrong. The package lands in build/gpu; the
environment stays as it is.

Timing: CUDA events around one call that was queued behind an idle kernel (so the host's time to
launch does not count) after L2 was overwritten; the ways of one row take turns; median and
quartiles. "wall" is the time of a step among steps as they are called, the host's time included.
Data are normal, decoder rows of unit norm. `--dry-run` runs everything but the build and the tests
on tiny shapes on the CPU, the Triton kernels in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import functools
import gc
import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if __package__:
    from ..harness.record import Record
    from ..harness.report import markdown, terminal
    from ..harness.session import Session
    from .process import UNUSABLE, end_with_parent, run, supervise
    from .report import SUITE
else:  # run as a file, maybe before ksae is installed
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    from bench.gpu.process import UNUSABLE, end_with_parent, run, supervise
    from bench.gpu.report import SUITE
    from bench.harness.record import Record
    from bench.harness.report import markdown, terminal
    from bench.harness.session import Session

    del sys.path[0]  # where a folder named kernels would shadow other packages

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "build" / "gpu"  # where the build lands
BUILD, SMOKE, TESTS, SANITIZER, SECTION = 240, 60, 150, 60, 100  # seconds at most


def cuda_tool(name: str) -> str | None:
    """Path of a program of the CUDA toolkit."""
    folders = [os.environ.get(n) for n in ("CUDA_HOME", "CUDA_PATH")] + ["/usr/local/cuda"]
    path = os.pathsep.join([os.environ.get("PATH", ""), *(f"{f}/bin" for f in folders if f)])
    return shutil.which(name, path=path)


def build(session: Session, log: Path, capability: tuple[int, int]) -> bool:
    """The package in build/gpu: with CUDA kernels, or else without. False: there is none."""
    pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps"]
    pip += ["--no-index", "--upgrade", "--target", str(PACKAGE), str(ROOT)]
    architecture = f"{capability[0]}{capability[1]}-real"
    options = {"CMAKE_CUDA_ARCHITECTURES": architecture, "PYTHONSAFEPATH": "1"}
    nvcc = cuda_tool(os.environ.get("CUDACXX", "nvcc"))
    if nvcc is None:
        session.problem("no nvcc: built without the CUDA kernels")
    for cuda in ("1", "0") if nvcc else ("0",):
        start = time.monotonic()
        options |= {"KSAE_CUDA": cuda, "CUDACXX": nvcc or ""}
        status, out = run(pip, min(BUILD, session.left()), log, **options)
        took = round(time.monotonic() - start, 1)
        session.fact("build", status=status, seconds=took, architecture=architecture, cuda=cuda)
        if status == 0:
            return True
        session.fact("build", tail=out[-3000:])
        session.problem(f"the build with KSAE_CUDA={cuda} ended with {status}")
    try:
        pure_python(PACKAGE)
    except OSError as error:
        session.problem(f"no copy of the package: {error}")
        return False
    session.fact("build", status="pure Python: Triton and torch ways alone")
    return True


def pure_python(package: Path) -> None:
    """The package without native code, laid out as the build lays it out."""
    shutil.rmtree(package / "ksae", ignore_errors=True)
    leave = shutil.ignore_patterns("*.so", "*.pyd", "__pycache__", "results")
    for source, target in ((ROOT / "python" / "ksae", "."), (ROOT / "kernels", "kernels"),
                           (ROOT / "bench", "bench")):  # fmt: skip
        into = package / "ksae" / target
        if into.is_symlink():  # of a tree that was set up for work in place
            into.unlink()
        shutil.copytree(source, into, ignore=leave, symlinks=True, dirs_exist_ok=True)


def marked() -> list[str]:
    """The files with tests marked gpu. Others may need what is not installed here."""
    marks = re.compile(r"pytest\.mark\.gpu|import .*\b(EVERY|ON_CUDA|KERNELS|GPU)\b")
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    return [str(p) for p in files if marks.search(p.read_text())]


def tests(session: Session, log: Path, environment: dict[str, str]) -> None:
    """The tests marked gpu; on many cores, for Triton compiles hundreds of kernels for them."""
    pytest = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "-rN", "-p", "no:cacheprovider"]
    pytest += ["--tb=short", "-p", "gpu.plugin", "-c", str(ROOT / "pyproject.toml"), *marked()]
    cores = len(os.sched_getaffinity(0))
    if importlib.util.find_spec("xdist") and cores > 2:
        pytest += ["-n", str(min(cores - 2, 12))]
    if importlib.util.find_spec("pytest_timeout"):  # a kernel that hangs is one test
        pytest += ["--timeout", "90", "--timeout-method", "thread"]
    paths = os.pathsep.join([environment["PYTHONPATH"], str(Path(__file__).parents[1])])
    options = {"PYTHONPATH": paths, "PYTHONSAFEPATH": "1", "OMP_NUM_THREADS": "1"}
    status, out = run(pytest, min(TESTS, session.left()), log, **options)
    failed = sorted(set(re.findall(r"^FAILED (.*)$", out, re.MULTILINE)))
    passed = len(re.findall(r"\bPASSED\b", out))
    session.fact("tests", pytest=status, passed=passed, failed=failed[:100], tail=out[-1000:])
    if status:
        first = f", the first {failed[0]}" if failed else ""
        what = f"the tests marked gpu ended with {status}"
        session.problem(f"{what}: {passed} passed, {len(failed)} failed{first}")


def sanitize(session: Session, log: Path, environment: dict[str, str]) -> None:
    """compute-sanitizer, where it is installed, on each op once."""
    sanitizer = cuda_tool("compute-sanitizer")
    for tool in ("memcheck", "racecheck"):
        if sanitizer is None:
            session.fact("tests", **{tool: "compute-sanitizer is not installed"})
            continue
        if session.left() < SANITIZER:
            session.problem(f"no time for {tool}")
            continue
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", *this(), "--smoke"]
        status, out = run(command, SANITIZER, log, **environment)
        session.fact("tests", **{tool: status, f"{tool}_tail": out[-1000:]})
        if status:
            session.problem(f"compute-sanitizer's {tool} ended with {status}")


def first_look(session: Session, log: Path, dry: bool, environment: dict[str, str]) -> None:
    """Each op and a step of each dtype, before time is spent on what a broken one would waste."""
    start = time.monotonic()
    command = [*this(), "--smoke", *(["--dry-run"] if dry else [])]
    status, out = run(command, min(SMOKE, session.left()), log, **environment)
    took = round(time.monotonic() - start, 1)
    session.fact(
        "tests", smoke=status, smoke_seconds=took, smoke_tail=out[-1000:] if status else ""
    )
    if status:
        session.problem(f"the smoke test ended with {status}")


def this() -> list[str]:
    """The command that runs this file."""
    if __package__:
        return [sys.executable, "-m", f"{__package__}.run"]
    return [sys.executable, str(Path(__file__))]


def smoke(device: str) -> None:
    """Each op once on a small shape, for compute-sanitizer."""
    import torch

    from ksae import ops, reference
    from ksae.backends.triton import Kernels
    from ksae.bench.gpu.measure import Inputs, Shape
    from ksae.bench.suites.latents import both_passes

    N, d, F, k = (33, 72, 1100, 9) if device == "cuda" else (5, 24, 140, 4)
    dead = torch.arange(F, device=device) % 10 == 0
    for dtype in (torch.float32, torch.bfloat16):
        i = Inputs(Shape("smoke", N, d, F, k), device, dtype)
        values, indices = reference.topk_encode(i.x, i.W, i.b_enc, k)
        for encode in (ops.topk_encode, Kernels().fused_topk_encode):
            got = encode(i.x, i.W, i.b_enc, k)
            same = float((indices == got[1]).float().mean())
            assert same > 0.9 and torch.allclose(values.float(), got[0].float(), atol=0.05), same
        ops.topk_encode_aux(i.x, i.W, i.b_enc, k, 2 * k, dead, None, i.x.flip(0), i.W, 0.5)
        error, _, _ = ops.sparse_residual(values, indices, i.W, i.b_dec, i.x, d)
        ops.sparse_decode_backward_values(error.to(dtype), indices, i.W)
        ops.sparse_decode_backward_weight(error.to(dtype), values, indices, F)
        both_passes(
            i.x, i.W, i.b_dec, i.values, indices, ops.group_by_latent(values, indices, F), ops
        )()
        take_steps(i)
    if device == "cuda":
        torch.cuda.synchronize()


def take_steps(i: Any) -> None:
    """A few steps, eager and on a GPU captured, with and without dead latents."""
    import torch

    from ksae.bench.gpu.steps import Recorded
    from ksae.coders import TopKSAE
    from ksae.step.train_step import TrainStep

    device = i.x.device.type
    for dead in (0, 50):
        for record in (lambda step: step, lambda step: Recorded(step, device)):
            model = TopKSAE(i.shape.d, i.shape.F, i.shape.k, dtype=i.dtype, device=device)
            model.tokens_since_fired[:dead] = model.dead_after + 1
            train = TrainStep(model)
            step = record(lambda train=train: train(i.x)["loss"])
            losses = torch.stack([step().clone() for _ in range(6)])
            assert losses.isfinite().all() and losses[-1] <= 1.2 * losses[0], losses


def open_session(path: Path, machine: dict[str, Any] | None = None) -> Session:
    """Whose numbers are on disk as they come, with their report; what it shows is printed."""
    conditions = {"command": "python bench/gpu/run.py --out DIR", "data": "normal"}
    show = lambda text, seconds: print(text, flush=True)
    report = lambda record: markdown(record, [])
    return Session(Record(machine or {}, SUITE, conditions), path, show=show, report=report)


def begin(session: Session, name: str) -> None:
    """A section begins: whatever becomes of it, it is not tried again."""
    session.show(f"{name}, {session.left():.0f} s left", session.spent())
    session.fact("sections", begun=[*session.suite.facts["sections"]["begun"], name])


# most wanted first
NAMES = ("step", "variants", "encode", "encode float32", "latents", "decode", "profile", "select")
NAMES += ("AuxK", "grad encode")
OF_SMALL = ("encode float32", "variants", "profile")  # not at the large batches


def sections(shapes: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names of what is measured, most wanted first, and of what comes after the sanitizer."""
    small = [f"{name} {shape}" for name in NAMES for shape in shapes[:2]]
    steps = [f"step {shape}" for shape in shapes[2:]]
    rest = [n for n in NAMES if n != "step" and n not in OF_SMALL]
    return ["ceilings", *small], [*steps, *(f"{n} {s}" for s in shapes[2:] for n in rest)]


def measure(session: Session, names: Sequence[str], dry: bool) -> int:
    """Measures sections in this process. Not 0: the device is lost, and the rest is to do."""
    import torch

    from ksae.bench.gpu import measure as measuring
    from ksae.bench.gpu import ops, steps
    from ksae.bench.gpu.measure import SHAPES, TINY, Timer

    device, dtype = ("cpu", torch.float32) if dry else ("cuda", torch.bfloat16)
    timer = Timer(device, 12)
    shapes = {shape.name: shape for shape in (TINY if dry else SHAPES)}
    for name in names:
        if session.left() < 20:
            session.problem(f"no time for {name}")
            continue
        begin(session, name)
        what, _, shape = name.rpartition(" ")
        call: Callable[[], None]
        if name == "ceilings":
            call = functools.partial(measuring.measure_ceilings, session, timer, dry)
        else:
            work = ops.SECTIONS | steps.SECTIONS
            call = functools.partial(work[what], session, timer, shapes[shape], dtype)
        try:
            call()
        except Exception as error:  # the rest can still be measured
            session.problem(f"{name}: {type(error).__name__}: {str(error)[:500]}")
        gc.collect()
        if not dry:
            try:
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
            except RuntimeError:
                return UNUSABLE
    return 0


def everything(session: Session, dry: bool, installed: bool) -> None:
    log = session.path.with_suffix(".log")
    environment = {}
    if not dry and not installed:
        import torch

        environment["PYTHONPATH"] = os.pathsep.join(
            [str(PACKAGE), *filter(None, [os.environ.get("PYTHONPATH")])]
        )
        capability = torch.cuda.get_device_capability()
        if not build(session, log, capability):
            return
    if not installed:
        first_look(session, log, dry, environment)
    small, large = sections(("B", "A") if dry else ("B", "A", "B-65536", "A-65536"))

    def command(names: Sequence[str]) -> Sequence[str]:
        options = ["--into", str(session.path), "--sections", ",".join(names)]
        return [*this(), *options, *(["--dry-run"] if dry else [])]

    supervise(session, small, command, log, SECTION, **environment)
    if not dry and not installed:
        tests(session, log, environment)
        sanitize(session, log, environment)
    supervise(session, large, command, log, SECTION, **environment)
    session.record.state = "complete"
    session.record.conditions["seconds"] = round(session.spent(), 1)
    session.end("complete")


def describe(session: Session, dry: bool) -> None:
    """What serves here, as the package says it that is measured."""
    import torch

    from ksae import ops
    from ksae.backends import cuda
    from ksae.bench.harness import measure

    package = str(Path(cuda.__file__).parent)
    more = {"cuda": str(torch.version.cuda), "serving": ops.serving(), "package": package}
    session.record.machine |= measure.machine() | more
    session.save()
    if not dry and cuda.kernels is None:
        session.problem(f"the CUDA kernels do not serve: {cuda.reason}")


def interpret() -> None:
    """Triton's interpreter, from its import on."""
    os.environ["TRITON_INTERPRET"] = "1"
    if (ROOT / "tests" / "helpers" / "triton_sort.py").exists():  # in the repository: it is faster
        sys.path.insert(0, str(ROOT / "tests" / "helpers"))
        import triton_sort

        triton_sort.tl.sort = triton_sort.numpy_sort


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--minutes", type=float, default=8.5, help="of all together")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--installed", action="store_true", help="measure: no build, no tests")
    parser.add_argument("--smoke", action="store_true", help="each op once, and no results")
    parser.add_argument("--sections", help=argparse.SUPPRESS)  # of the process that measures
    parser.add_argument("--into", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    dry = arguments.dry_run
    if dry:
        interpret()
    if arguments.sections:
        end_with_parent()
        session = open_session(arguments.into)
        session.resume()
        if "serving" not in session.record.machine:
            describe(session, dry)
        return measure(session, arguments.sections.split(","), dry)
    if arguments.smoke:
        smoke("cpu" if dry else "cuda")
        return 0
    if arguments.out is None:
        parser.error("--out DIR is needed")
    import torch

    if not dry and not torch.cuda.is_available():
        parser.error("no CUDA device that torch can use; --dry-run works without one")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # and what was started ends as well
    gpu = "dry-run" if dry else torch.cuda.get_device_name()
    name = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    path = arguments.out / f"gpu_{name}_{time.strftime('%Y-%m-%d')}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    machine = {"gpu": gpu}
    if smi := None if dry else shutil.which("nvidia-smi"):
        facts = "driver_version,clocks.max.sm,clocks.max.mem,power.limit"
        query = [smi, f"--query-gpu={facts}", "--format=csv,noheader"]
        done = subprocess.run(query, capture_output=True, text=True, timeout=20)
        machine[facts] = done.stdout.strip()
    session = open_session(path, machine)
    session.begin(SUITE, 60 * arguments.minutes)
    session.fact("sections", begun=[])
    everything(session, dry, arguments.installed)
    print(terminal(session.record))
    return 1 if session.suite.problems else 0


if __name__ == "__main__":
    sys.exit(main())
