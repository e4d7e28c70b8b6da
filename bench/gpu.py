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
import gc
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

try:
    from .gpureport import Record, report
except ImportError:  # run as a file, maybe before ksae is installed
    from gpureport import Record, report

ROOT = Path(__file__).resolve().parents[1]
CHUNK = 8192  # rows of scores that are held at once
LR = 1e-3

Way = Callable[[], Any]


@dataclass(frozen=True)
class Shape:
    name: str
    N: int
    d: int
    F: int
    k: int


SHAPES = (
    Shape("B", 8192, 768, 24576, 32),
    Shape("A", 8192, 4096, 131072, 64),
    Shape("B-65536", 65536, 768, 24576, 32),
    Shape("A-65536", 65536, 4096, 131072, 64),
)
TINY = (Shape("B", 9, 16, 40, 4), Shape("A", 7, 24, 50, 3))


# ------------------------------------------------------------------------------ build and tests


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


# ------------------------------------------------------------------------------ timing


class Timer:
    def __init__(self, device: str, rounds: int) -> None:
        import torch

        self.device, self.rounds = device, rounds
        if device == "cuda":
            self.flush = torch.empty(256 << 20, dtype=torch.uint8, device=device)

    def __call__(self, ways: Mapping[str, Way], cold: bool = True) -> dict[str, Any]:
        """measure.Times of each way; with `cold`, L2 holds none of its inputs."""
        import torch

        from ksae.bench import measure

        if self.device != "cuda":
            taken = measure.interleave(ways, 0.0, least=2)
            return {name: measure.Times.of(samples) for name, samples in taken.items()}
        for way in ways.values():
            way()
            way()
        torch.cuda.synchronize()
        pairs: dict[str, list[Any]] = {name: [] for name in ways}
        names = list(ways)
        for turn in range(self.rounds):
            shift = turn % len(names)
            for name in names[shift:] + names[:shift]:
                if cold:
                    self.flush.zero_()
                torch.cuda._sleep(2_000_000)
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                ways[name]()
                end.record()
                pairs[name].append((start, end))
            torch.cuda.synchronize()
        return {
            name: measure.Times.of([a.elapsed_time(b) / 1e3 for a, b in taken])
            for name, taken in pairs.items()
        }


def copy_and_product(timer: Timer, tiny: bool) -> dict[str, float]:
    import torch

    source = torch.randn(2**12 if tiny else 2**28, device=timer.device)
    target = torch.empty_like(source)
    n = 64 if tiny else 8192
    a, b = (torch.randn(n, n, device=timer.device).bfloat16() for _ in range(2))
    times = timer({"copy": lambda: target.copy_(source), "product": lambda: a @ b})
    return {
        "copy": 2 * source.nbytes / times["copy"].median,
        "product": 2 * n**3 / times["product"].median,
    }


def measure_ceilings(record: Record, timer: Timer, tiny: bool) -> None:
    """Bytes/s of a copy, flop/s of a bf16 product, bytes/s of rows gathered from L2."""
    import torch

    from ksae.bench import gpurivals

    device = timer.device
    record.note("ceilings", **copy_and_product(timer, tiny))
    best = 0.0
    dtype = torch.float32 if tiny else torch.bfloat16
    for megabytes in (8, 32):
        for d in (128, 512, 2048):
            rows = 64 if tiny else (megabytes << 20) // (2 * d)
            N, k = (2, 2) if tiny else (8192, 64)
            table = torch.randn(rows, d, device=device).to(dtype)
            indices = torch.randint(rows, (N, k), device=device)
            values = torch.randn(N, k, device=device).to(dtype)
            way = lambda v=values, i=indices, t=table: gpurivals.decode(v, i, t)
            taken = timer({"gather": way}, cold=False)["gather"]
            rate = N * k * d * table.element_size() / taken.median
            record.note("ceilings", **{f"gather {megabytes} MB, d={d}": rate})
            best = max(best, rate)
    record.note("ceilings", gather=best)


# ------------------------------------------------------------------------------ ops


def add_rows(
    record: Record, shape: Shape, op: str, times: Mapping[str, Any], cost: Any, gathered: float = 0
) -> None:
    """A row a way. Fraction: of the time that ceilings allow to have taken, by formula."""
    ceilings = record.data["ceilings"]
    floor = max(cost.bytes / ceilings["copy"], cost.flops / ceilings["product"])
    floor = gathered / ceilings["gather"] if gathered else floor
    for way, taken in times.items():
        record.row(
            shape=shape.name, op=op, way=way, **asdict(taken),
            bytes=cost.bytes, flops=cost.flops, gathered=gathered, fraction=floor / taken.median,
        )  # fmt: skip


def check(record: Record, what: str, got: Any, want: Any, tolerance: float) -> None:
    error = float((got.float() - want.float()).norm() / want.float().norm().clamp_min(1e-30))
    if not error <= tolerance:
        record.problem(f"{what}: relative error {error:.3g}, at most {tolerance} was expected")


class Inputs:
    """A batch, weights and code of one shape, on the device."""

    def __init__(self, shape: Shape, device: str, dtype: Any) -> None:
        import torch

        from ksae import ops

        torch.manual_seed(0)
        self.shape, self.dtype = shape, dtype
        self.x = torch.randn(shape.N, shape.d, device=device).to(dtype)
        W = torch.randn(shape.F, shape.d, device=device)
        self.W = torch.nn.functional.normalize(W).to(dtype)
        self.b_enc, self.b_dec = (
            torch.zeros(n, device=device, dtype=dtype) for n in (shape.F, shape.d)
        )
        self.values, self.indices = ops.topk_encode(self.x, self.W, self.b_enc, shape.k)

    def product(self) -> None:
        """The encoder's product and nothing else."""
        for part in self.x.split(CHUNK):
            part @ self.W.T


def measure_ops(record: Record, timer: Timer, shape: Shape, dtype: Any) -> None:
    import torch

    from ksae import gpu, ops
    from ksae.bench import costs, gpurivals
    from ksae.triton import Kernels

    portable = Kernels()
    N, d, F, k = shape.N, shape.d, shape.F, shape.k
    s = torch.empty(0, dtype=dtype).element_size()
    i = Inputs(shape, timer.device, dtype)
    for kind, wide in (("", dtype), (" float32", torch.float32)):
        measure_select(record, timer, i, f"select{kind}", (i.x[:CHUNK] @ i.W.T).to(wide))

    def dense_encode() -> None:
        for part in i.x.split(CHUNK):
            torch.addmm(i.b_enc, part, i.W.T).topk(k)

    tokens = (i.x, i.W, i.b_enc, k)
    with_product = gpu.cuda.kernels or portable
    ways = {
        "ksae": lambda: ops.topk_encode(*tokens),
        "fused Triton": lambda: portable.fused_topk_encode(*tokens),
        "product + select": lambda: with_product.topk_encode(*tokens),
        "product alone": i.product,
        "cuBLAS + torch.topk": dense_encode,
    }
    for way in list(ways)[1:3]:
        check(record, f"{way} {shape.name}", ways[way]()[0], i.values, 1e-2)
    times = timer(ways)
    add_rows(record, shape, "encode + select", times, costs.topk_encode(N, d, F, k, s))
    grad, dead, k_aux = i.x.flip(0), torch.arange(F, device=timer.device) % 10 == 0, min(d, F) // 2
    ways = {
        "ksae": lambda: ops.grad_topk_encode(i.x, grad, i.W, i.b_enc, i.W, k, 0.5),
        "Triton": lambda: portable.grad_topk_encode(i.x, grad, i.W, i.b_enc, i.W, k, 0.5),
        "products alone": lambda: (i.product(), i.product()),
    }
    cost = costs.grad_topk_encode(N, d, F, k, s)
    add_rows(record, shape, "grad encode + select", timer(ways), cost)
    ways = {
        "ksae": lambda: ops.topk_encode_aux(i.x, i.W, i.b_enc, k, k_aux, dead),
        "Triton": lambda: portable.topk_encode_aux(i.x, i.W, i.b_enc, k, k_aux, dead),
        "fused Triton": lambda: portable.fused_topk_encode_aux(*tokens, k_aux, dead),
        "product + select": lambda: with_product.topk_encode_aux(*tokens, k_aux, dead),
        "encoded twice": lambda: (
            ops.topk_encode(i.x, i.W, i.b_enc, k),
            ops.topk_encode(i.x, i.W, i.b_enc, k_aux, None, dead),
        ),
    }
    cost = costs.topk_encode_aux(N, d, F, k, k_aux, s)
    aux_times = timer(ways)
    add_rows(record, shape, "encode + AuxK", aux_times, cost)
    note_choice(record, timer.device, shape, dtype, times, aux_times)

    want = ops.sparse_decode(i.values, i.indices, i.W)
    check(record, f"decode {shape.name}", gpurivals.decode(i.values, i.indices, i.W), want, 1e-2)
    got = portable.sparse_decode(i.values, i.indices, i.W)
    check(record, f"Triton decode {shape.name}", got, want, 1e-2)
    bag = torch.nn.functional.embedding_bag
    ways = {
        "ksae": lambda: ops.sparse_decode(i.values, i.indices, i.W),
        "Triton": lambda: portable.sparse_decode(i.values, i.indices, i.W),
        "Triton gather": lambda: gpurivals.decode(i.values, i.indices, i.W),
        "embedding_bag": lambda: bag(i.indices, i.W, mode="sum", per_sample_weights=i.values),
    }
    cost = costs.sparse_decode(N, d, F, k, s)
    add_rows(record, shape, "decode", timer(ways), cost, gathered=N * k * d * s)

    ways = {"ksae": lambda: ops.group_by_latent(i.values, i.indices, F),
            "Triton": lambda: portable.group_by_latent(i.values, i.indices, F),
            "stable sort": lambda: i.indices.reshape(-1).sort(stable=True)}  # fmt: skip
    add_rows(record, shape, "group", timer(ways), costs.group_by_latent(N, F, k, s))

    code = (i.values, i.indices, i.W, i.b_dec, i.x, d)
    residual = lambda: ops.sparse_residual(*code)
    ways = {"ksae": residual, "Triton": lambda: portable.sparse_residual(*code)}
    for got, want in zip(ways["Triton"](), residual(), strict=True):
        check(record, f"Triton residual {shape.name}", got, want, 1e-4)
    cost = costs.sparse_residual(N, d, F, k, s)
    add_rows(record, shape, "residual", timer(ways), cost, gathered=N * k * d * s)

    cost = costs.latent_sums(N, F, k, s) + costs.row_update(N, d, F, k, s, row=s)
    cost += costs.row_update(N, d, F, k, s, coefficient=s)
    ways = {"ksae": latent_pass(i, residual(), ops), "Triton": latent_pass(i, residual(), portable)}
    got, want = (way() for way in reversed(ways.values()))
    check(record, f"Triton latent pass {shape.name}", got - i.W, want - i.W, 1e-2)
    add_rows(record, shape, "latent pass", timer(ways), cost)


def note_choice(
    record: Record, device: str, shape: Shape, dtype: Any, times: Any, aux_times: Any
) -> None:
    """The row for the table of python/ksae/gpu.py that these times give."""
    import torch

    from ksae import gpu

    names = {"fused": "fused Triton", "product": "product + select"}
    way, aux = (min(names, key=lambda way: of[names[way]].median) for of in (times, aux_times))
    fused, product = (times[name].median * 1e3 for name in names.values())
    generation = gpu.generation(torch.device("cuda")) if device == "cuda" else "dry run"
    said = f"{record.data['machine'].get('gpu')}, N={shape.N}, k={shape.k}, {dtype}: fused"
    said += f" {fused:.4g} ms, product {product:.4g} ms, {time.strftime('%Y-%m-%d')}"
    fused, product = (aux_times[name].median * 1e3 for name in names.values())
    said += f"; with AuxK {fused:.4g} and {product:.4g} ms"
    row = gpu.Row(generation, shape.d, shape.F, way, said, aux)
    record.note("choice", **{shape.name: repr(row)})


def measure_select(record: Record, timer: Timer, i: Inputs, op: str, scores: Any) -> None:
    from ksae import ops
    from ksae.bench import costs
    from ksae.triton import Kernels

    k, portable = i.shape.k, Kernels()
    want = scores.topk(k)[0]
    for served, name in ((ops, op), (portable, f"Triton {op}")):
        check(record, f"{name} {i.shape.name}", served.topk(scores, k)[0], want, 0)
    ways = {
        "ksae": lambda: ops.topk(scores, k),
        "Triton": lambda: portable.topk(scores, k),
        "torch.topk": lambda: scores.topk(k),
    }
    cost = costs.topk(*scores.shape, k, scores.element_size())
    add_rows(record, i.shape, op, timer(ways), cost)


def latent_pass(i: Inputs, residual: Any, served: Any) -> Way:
    """Gradients, projection, Adam and unit rows of both matrices, as `served` computes them."""
    import torch

    from ksae import ops

    error, _, grads = residual
    wide = torch.float32
    masters = [None if i.dtype == wide else i.W.float() for _ in range(2)]
    W_enc, W_dec = i.W.clone(), i.W.clone()
    moments = [torch.zeros(i.W.shape, device=i.W.device, dtype=wide) for _ in range(4)]
    hyper = torch.tensor([1e-4, 0.03, 0.9, 0.999, 1e-8, 1.0, 0.1, 0.001], device=i.W.device)
    grad_b_dec = torch.empty(i.shape.d, device=i.W.device)
    scale = torch.full((1,), 1e-6, device=i.W.device)
    offsets, order = ([t] for t in ops.group_by_latent(i.values, i.indices, i.shape.F))

    def call() -> Any:
        b_enc, along = served.latent_sums([i.values], [grads], offsets, order, scale)
        encoder = ([grads], offsets, order, [i.x], scale, i.b_dec, None, b_enc, W_enc, masters[0])
        served.row_update(*encoder, moments[0], moments[1], hyper, grad_b_dec, 0, False)
        decoder = ([i.values], offsets, order, [error], scale, None, along, None, W_dec, masters[1])
        served.row_update(*decoder, moments[2], moments[3], hyper, None, 0, True)
        return W_dec

    return call


# ------------------------------------------------------------------------------ steps


def measure_step(record: Record, timer: Timer, shape: Shape, dtype: Any) -> None:
    """Each contestant alone, for memory, with the encoder's product between its steps."""
    import torch

    from ksae.bench import costs, gpurivals
    from ksae.modules import TopKSAE
    from ksae.step import TrainStep

    N, d, F, k = shape.N, shape.d, shape.F, shape.k
    inputs = Inputs(shape, timer.device, dtype)

    def ours() -> Way:
        model = TopKSAE(d, F, k, dtype=dtype, device=timer.device)
        with torch.no_grad():
            for p, start in ((model.W_enc, inputs.W), (model.W_dec, inputs.W)):
                p.copy_(start)
            model.b_enc.zero_(), model.b_dec.zero_()
        step = TrainStep(model, lr=LR)
        return lambda: step(inputs.x)["loss"]

    contestants = {
        "ksae": ours,
        "Triton decoder": lambda: partial_step(gpurivals.Triton(inputs.W, k, dtype, LR), inputs.x),
        "dense torch": lambda: partial_step(gpurivals.Dense(inputs.W, k, dtype, LR), inputs.x),
    }
    cost = sum(costs.train_step(N, d, F, k, inputs.x.element_size()).values(), costs.Cost())
    first = None
    for name, make in contestants.items():
        if record.left() < 20:
            record.problem(f"no time for step {shape.name} of {name}")
            return
        step = loss = None
        try:
            step = make()
            step()
            step()
            before = memory(reset=True)
            loss = float(step())  # of the third step: gradients and Adam are in it
            extra = memory() - before
            first = loss if first is None else first
            if abs(loss - first) > 0.005 * abs(first):
                record.problem(f"step {shape.name} of {name}: loss {loss:.5g}, ksae's {first:.5g}")
            times = timer({name: step, "product alone": inputs.product})
            ratio = times[name].median / times.pop("product alone").median
            add_rows(record, shape, "step", times, cost)
            record.data["rows"][-1] |= {"products": ratio, "extra_bytes": extra, "loss": loss}
        except torch.OutOfMemoryError:
            record.row(shape=shape.name, op="step", way=name, note="out of memory")
        del step
        gc.collect()
        if timer.device == "cuda":
            torch.cuda.empty_cache()


def partial_step(rival: Any, x: Any) -> Way:
    return lambda: rival.step(x)


def memory(reset: bool = False) -> int:
    """Bytes allocated on the GPU: now, with `reset`; else the most since then."""
    import torch

    if not torch.cuda.is_available():
        return 0
    if reset:
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    return torch.cuda.max_memory_allocated()


# ------------------------------------------------------------------------------ main


def smoke(device: str) -> None:
    """Each op once on a small shape, for compute-sanitizer."""
    import torch

    from ksae import reference

    for dtype in (torch.float32, torch.bfloat16):
        i = Inputs(Shape("smoke", 33, 72, 1100, 9), device, dtype)
        values, indices = reference.topk_encode(i.x, i.W, i.b_enc, 9)
        same = float((indices == i.indices).float().mean())
        assert same > 0.9 and torch.allclose(values.float(), i.values.float(), atol=0.05), same
        from ksae import ops

        dead = torch.arange(1100, device=device) % 10 == 0
        ops.topk_encode_aux(i.x, i.W, i.b_enc, 9, 20, dead, None, i.x.flip(0), i.W, 0.5)
        latent_pass(i, ops.sparse_residual(i.values, i.indices, i.W, i.b_dec, i.x, 72), ops)()
    if device == "cuda":
        torch.cuda.synchronize()


def sections(record: Record, dry: bool, installed: bool) -> None:
    import torch

    from ksae.bench import measure

    device, shapes = ("cpu", TINY) if dry else ("cuda", SHAPES)
    dtype = torch.float32 if dry else torch.bfloat16
    if not dry and not installed:
        build(record, torch.cuda.get_device_capability())
        tests(record)
    from ksae import ops

    record.note("machine", **measure.machine(data="normal"), cuda=str(torch.version.cuda))
    record.note("machine", serving=json.dumps(ops.serving()))
    timer = Timer(device, 12)
    work: list[tuple[str, Way]] = [("ceilings", lambda: measure_ceilings(record, timer, dry))]
    for measured in (measure_ops, measure_step):  # most wanted first
        for shape in shapes[:2]:
            name = f"{measured.__name__} {shape.name}"
            work.append((name, lambda m=measured, s=shape: m(record, timer, s, dtype)))
    for shape in shapes[2:]:
        for measured in (measure_step, measure_ops):
            name = f"{measured.__name__} {shape.name}"
            work.append((name, lambda m=measured, s=shape: m(record, timer, s, dtype)))
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
