# SPDX-License-Identifier: Apache-2.0
"""Everything that a GPU has to answer, in one command, offline, in under nine minutes.

    python bench/gpu.py --out DIR

builds the package for this GPU, runs the tests marked gpu, and measures ceilings, ops and whole
steps. DIR/gpu_<name>_<date>.json and .md are written anew after each measurement, so a run that is
cut off loses only what it had not yet measured. Exits with 1 if something failed or was wrong.

Timing: CUDA events around one call that was queued behind an idle kernel (so the host's time to
launch does not count) after L2 was overwritten; the ways of one row take turns; median and
quartiles. Data are normal, decoder rows of unit norm. `--dry-run` runs everything but the build and
the tests on tiny shapes on the CPU, the Triton kernels in Triton's interpreter.
"""

from __future__ import annotations

import argparse
import functools
import gc
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

try:
    from .gpureport import Record, report
except ImportError:  # run as a file, maybe before ksae is installed
    from gpureport import Record, report

ROOT = Path(__file__).resolve().parents[1]


def run(record: Record, command: list[str], seconds: float, **environment: str) -> tuple[int, str]:
    """Exit status (124 if it ran out of time) and the end of the output."""
    seconds = max(min(seconds, record.left() - 60), 1)
    try:
        done = subprocess.run(
            command, cwd=ROOT, env=os.environ | environment, timeout=seconds,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        out = error.stdout or b""
        return 124, (out if isinstance(out, str) else out.decode(errors="replace"))[-3000:]
    return done.returncode, done.stdout[-3000:]


def build(record: Record, capability: tuple[int, int]) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "."]
    start = time.monotonic()
    architecture = f"{capability[0]}{capability[1]}-real"
    status, out = run(record, pip, 240, CMAKE_CUDA_ARCHITECTURES=architecture, KSAE_CUDA="1")
    took = round(time.monotonic() - start, 1)
    record.note("build", status=status, seconds=took, architecture=architecture, tail=out)
    if status:
        record.problem(f"the build ended with {status}")


def tests(record: Record) -> None:
    pytest = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-x", "tests"]
    status, out = run(record, pytest, 120)
    record.note("tests", pytest=status, tail=out)
    if status:
        record.problem(f"the tests marked gpu ended with {status}")
    sanitizer = shutil.which("compute-sanitizer")
    for tool in ("memcheck", "racecheck"):
        if sanitizer is None:
            record.note("tests", **{tool: "compute-sanitizer is not installed"})
            continue
        command = [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable]
        status, out = run(record, [*command, str(Path(__file__)), "--smoke"], 45)
        record.note("tests", **{tool: status, f"{tool}_tail": out[-1000:]})
        if status:
            record.problem(f"compute-sanitizer's {tool} ended with {status}")


def smoke(device: str) -> None:
    """Each op once on a small shape, for compute-sanitizer."""
    import torch

    from ksae import ops, reference
    from ksae.bench.gpumeasure import Inputs, Shape
    from ksae.bench.gpuops import latent_pass

    for dtype in (torch.float32, torch.bfloat16):
        i = Inputs(Shape("smoke", 33, 72, 1100, 9), device, dtype)
        values, indices = reference.topk_encode(i.x, i.W, i.b_enc, 9)
        same = float((indices == i.indices).float().mean())
        assert same > 0.9 and torch.allclose(values.float(), i.values.float(), atol=0.05), same
        dead = torch.arange(1100, device=device) % 10 == 0
        ops.topk_encode_aux(i.x, i.W, i.b_enc, 9, 20, dead, None, i.x.flip(0), i.W, 0.5)
        latent_pass(i, i.indices, ops)()
    if device == "cuda":
        torch.cuda.synchronize()


def sections(record: Record, dry: bool, installed: bool) -> None:
    import torch

    device, dtype = ("cpu", torch.float32) if dry else ("cuda", torch.bfloat16)
    if not dry and not installed:
        build(record, torch.cuda.get_device_capability())
        tests(record)
    # what is measured is the package as it is installed now
    from ksae import ops
    from ksae.bench import measure
    from ksae.bench.gpumeasure import SHAPES, TINY, Timer, measure_ceilings
    from ksae.bench.gpuops import measure_ops
    from ksae.bench.gpusteps import measure_step

    shapes = TINY if dry else SHAPES
    record.note("machine", **measure.machine(data="normal"), cuda=str(torch.version.cuda))
    record.note("machine", serving=json.dumps(ops.serving()))
    timer = Timer(device, 12)
    work: list[tuple[str, Callable[[], None]]] = [
        ("ceilings", lambda: measure_ceilings(record, timer, dry))
    ]
    wanted = [(m, shape) for m in (measure_ops, measure_step) for shape in shapes[:2]]
    wanted += [(m, shape) for shape in shapes[2:] for m in (measure_step, measure_ops)]
    for measured, shape in wanted:  # most wanted first
        call = functools.partial(measured, record, timer, shape, dtype)
        work.append((f"{measured.__name__} {shape.name}", call))
    for name, call in work:
        if record.left() < 20:
            record.problem(f"no time for {name}")
            continue
        print(f"{name}, {record.left():.0f} s left", flush=True)
        try:
            call()
        except Exception as error:  # the rest can still be measured
            record.problem(f"{name}: {type(error).__name__}: {str(error)[:500]}")
        gc.collect()
        if not dry:
            torch.cuda.empty_cache()
    record.data["finished"] = True
    record.save()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--minutes", type=float, default=8.5, help="of all together")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--installed", action="store_true", help="measure: no build, no tests")
    parser.add_argument("--smoke", action="store_true", help="each op once, and no results")
    arguments = parser.parse_args()
    if arguments.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"
        if (ROOT / "tests" / "triton_sort.py").exists():  # in the repository: it is faster
            sys.path.insert(0, str(ROOT / "tests"))
            import triton_sort

            triton_sort.tl.sort = triton_sort.numpy_sort
    import torch

    if not arguments.dry_run and not torch.cuda.is_available():
        parser.error("no CUDA device that torch can use; --dry-run works without one")
    if arguments.smoke:
        smoke("cpu" if arguments.dry_run else "cuda")
        return 0
    if arguments.out is None:
        parser.error("--out DIR is needed")
    gpu = "dry-run" if arguments.dry_run else torch.cuda.get_device_name()
    name = re.sub(r"[^a-z0-9]+", "-", gpu.lower()).strip("-")
    record = Record(arguments.out, name, arguments.minutes)
    record.note("machine", gpu=gpu)
    sections(record, arguments.dry_run, arguments.installed)
    print(report(record.data))
    return 1 if record.data["problems"] else 0


if __name__ == "__main__":
    sys.exit(main())
