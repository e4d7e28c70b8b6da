# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels on a GPU: numbers, determinism, streams, CUDA graphs, devices, errors.

Left out of a run where torch sees no GPU; test_cuda_kernels.py runs the same kernels
everywhere, in emulation.
"""

from __future__ import annotations

import copy
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from alignment import begin_anywhere
from bf16_copies import assert_kept
from cases import DTYPES, assert_close, assert_same, code, dtype_id, randn
from torch import Tensor

import ksae
from ksae import ops, reference
from ksae.activations import ArraySource
from ksae.activations.transfer import Readback
from ksae.backends import cuda, triton
from ksae.backends import product as products
from ksae.backends import serving as gpu
from ksae.runs.config import LogConfig, TrainConfig
from ksae.runs.trainer import Trainer

pytestmark = pytest.mark.gpu


dtypes = pytest.mark.parametrize("T", DTYPES, ids=dtype_id)


def test_the_kernels_are_what_serves() -> None:
    assert cuda.kernels is not None, cuda.reason
    served = {op: devices["cuda"] for op, devices in ops.serving().items()}
    encoding = {op for op in served if "encode" in op}  # may be Triton's, as the table says
    assert all(served[op] == "native" for op in served.keys() - encoding)
    assert "reference" not in served.values()


@dtypes
def test_many_rows_and_long_rows(T: torch.dtype) -> None:
    """Sizes that the emulator is too slow for."""
    for shape, k in (((4096, 24576), 32), ((300, 131072), 64), ((7, 131071), 4096)):
        x = torch.randn(*shape, device="cuda").to(T)
        got, want = ops.topk(x, k), reference.topk(x, k)
        assert_same("values", got[0], want[0])
        assert_same("indices", got[1], want[1])


@dtypes
@pytest.mark.parametrize("offset", [1, 2, 4, 8])
def test_rows_that_begin_anywhere(T: torch.dtype, offset: int) -> None:
    begin_anywhere(ops, T, offset, "cuda")


def model(dtype: torch.dtype) -> ksae.TopKSAE:
    torch.manual_seed(0)
    sae = ksae.TopKSAE(96, 1024, 16, k_aux=24, dead_after=3000).to("cuda", dtype)
    sae.tokens_since_fired[::5] = 3001
    return sae


def state(step: ksae.TrainStep) -> list[Tensor]:
    return [
        *step.model.parameters(),
        step.model.tokens_since_fired,
        *step.state_dict().values(),
    ]


@dtypes
def test_two_runs_give_the_same_bits(T: torch.dtype) -> None:
    x = randn(5, 700, 96, seed=1).to("cuda", T)
    states = []
    for _ in range(2):
        step = ksae.TrainStep(model(T), lr=1e-3)
        for rows in x:
            step(rows)
        states.append(state(step))
    assert all(torch.equal(a, b) for a, b in zip(*states, strict=True))


def test_bfloat16_moments_give_the_same_bits_twice() -> None:
    x = randn(5, 700, 96, seed=1).to("cuda", torch.bfloat16)
    steps = [ksae.TrainStep(model(torch.bfloat16), moments="bfloat16") for _ in range(2)]
    losses = [[step(rows)["loss"] for rows in x] for step in steps]
    assert all(torch.equal(a, b) for a, b in zip(*map(state, steps), strict=True))
    assert all(loss.isfinite() for loss in losses[0])


def test_a_step_is_the_step_of_the_cpu() -> None:
    x = randn(700, 96, seed=1)
    on_gpu, on_cpu = model(torch.float32), model(torch.float32).cpu()
    exact = copy.deepcopy(on_cpu).double()
    for sae in (on_gpu, on_cpu, exact):
        ksae.TrainStep(sae, lr=1e-3)(x.to(sae.W_enc.device, sae.W_enc.dtype))
    for (name, p), plain, e in zip(
        on_gpu.named_parameters(), on_cpu.parameters(), exact.parameters(), strict=True
    ):
        assert_close(name, p.detach().cpu(), plain.detach(), e.detach(), floor=1e-5)


@dtypes
@pytest.mark.parametrize("way", gpu.WAYS)
def test_steps_in_a_cuda_graph(T: torch.dtype, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recorded once, replayed with new rows and a new learning rate: as called one by one."""
    monkeypatch.setattr(gpu, "override", way)
    batches = randn(6, 512, 96, seed=2).to("cuda", T)
    plain, recorded = (ksae.TrainStep(model(T), lr=1e-3) for _ in range(2))
    for step in (plain, recorded):  # a graph does not know how many are dead, and gathers
        assert step._fused is not None
        step._fused.dead_latents = None
    x = batches[0].clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        recorded(x)  # warm-up: modules are loaded, the allocator has its blocks
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        metrics = recorded(x)
    plain(batches[0])
    for n, rows in enumerate(batches[1:]):
        plain.lr = recorded.lr = 1e-3 / (n + 1)
        x.copy_(rows)
        graph.replay()
        loss = plain(rows)["loss"]
        torch.testing.assert_close(metrics["loss"], loss, rtol=1e-5, atol=0)
    for a, b in zip(state(plain), state(recorded), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    if way != "product" and T is torch.float32:
        assert_kept(recorded)


@pytest.mark.parametrize("dead", [0, 200])
def test_a_module_and_its_gradients_in_a_cuda_graph(dead: int) -> None:
    """Recorded while nothing is dead; replayed with new rows and with dead latents."""
    sae = ksae.TopKSAE(96, 1024, 16, k_aux=24).cuda().eval()
    batches, parameters = randn(2, 512, 96, seed=2).cuda(), list(sae.parameters())
    x = batches[0].clone()

    def call() -> list[Tensor]:
        out = sae(x)
        return [out.loss, out.recon, *torch.autograd.grad(out.loss, parameters)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = call()
    x.copy_(batches[1])
    sae.tokens_since_fired[:dead] = sae.dead_after + 1
    graph.replay()
    for got, want in zip(recorded, call(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_module_and_its_gradients(backend: str) -> None:
    sae, x = ksae.TopKSAE(96, 1024, 16, k_aux=24).cuda().eval(), randn(512, 96, seed=2).cuda()
    parameters = list(sae.parameters())
    torch._dynamo.reset()
    results = []
    for module in (sae, torch.compile(sae, fullgraph=True, backend=backend)):
        out = module(x)
        results.append([out.loss, out.recon, *torch.autograd.grad(out.loss, parameters)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)


@dtypes
def test_triton_in_a_cuda_graph(T: torch.dtype) -> None:
    """Both ways to encode, and decode, replayed with new rows."""
    kernels = triton.Kernels()
    x, W, b = (randn(*s, seed=i).to("cuda", T) for i, s in enumerate([(64, 96), (999, 96), (999,)]))

    def call(rows: Tensor) -> list[Tensor]:
        code = kernels.fused_topk_encode(rows, W, b, 9)
        return [*kernels.topk_encode(rows, W, b, 9), *code, kernels.sparse_decode(*code, W)]

    call(x)  # compiles
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        recorded = call(x)
    x.copy_(x.flip(0))
    graph.replay()
    for got, want in zip(recorded, call(x), strict=True):
        assert_same("replayed", got, want)


@pytest.mark.parametrize("dead", [0, 200])
@pytest.mark.parametrize("kind", [ksae.TopKSAE, ksae.GradTopKSAE])
def test_no_step_waits_for_the_device(kind: type[ksae.TopKSAE], dead: int) -> None:
    sae = kind(96, 1024, 16, k_aux=24).cuda()
    step, x = ksae.TrainStep(sae, clip_norm=1.0), torch.randn(512, 96, device="cuda")
    options = {"grad": torch.randn_like(x)} if kind is ksae.GradTopKSAE else {}
    step(x, **options)
    sae.tokens_since_fired[:dead] = sae.dead_after + 1
    torch.cuda.set_sync_debug_mode("error")
    try:
        metrics = step(x, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (metrics["auxk_loss"] > 0) == (dead > 0)


@dtypes
@pytest.mark.parametrize("ahead", [0, 2], ids=["in turn", "prefetch"])
def test_no_training_loop_waits_for_the_device(T: torch.dtype, ahead: int, tmp_path: Path) -> None:
    """From float32 batches of the host to metrics in the log; only its end may wait."""
    steps, x = 6, randn(640, 96)
    config = TrainConfig(
        batch_size=64, steps=steps, prefetch=ahead, init_tokens=0, checkpoint_every=steps,
        eval_tokens=0,
    )  # fmt: skip
    trainer = Trainer(model(T), ArraySource([x]), config, out=tmp_path, log=LogConfig(every=1))
    save = trainer._save

    def save_and_wait(log: Any) -> None:
        torch.cuda.set_sync_debug_mode("default")
        save(log)

    trainer._save = save_and_wait  # type: ignore[method-assign]
    trainer.train_step(x[:64].to("cuda", T))  # loads what the first step loads
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.run()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    losses = [r["loss"] for r in map(json.loads, lines) if "loss" in r]
    assert len(losses) == steps and all(map(math.isfinite, losses))


def test_a_number_waits_for_its_own_step_alone() -> None:
    early = torch.ones((), device="cuda") * 2
    reading = Readback({"early": early})
    torch.cuda._sleep(2_000_000_000)  # about a second
    late = torch.cuda.Event()
    late.record()
    assert reading.get() == {"early": 2.0} and not late.query()
    torch.cuda.synchronize()


@pytest.mark.parametrize("dead", [0, 9, 5000, 20000])
def test_both_selections_in_chunks(dead: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """AuxK's latents from the step's own product, for any number of dead ones."""
    N, d, F = 700, 96, 20000
    x, W, grad = (randn(*s, seed=i).cuda() for i, s in enumerate([(N, d), (F, d), (N, d)]))
    b, mask = torch.zeros(F, device="cuda"), torch.zeros(F, dtype=torch.bool, device="cuda")
    mask[torch.randperm(F, generator=torch.Generator().manual_seed(0))[:dead].cuda()] = True
    monkeypatch.setattr(products, "chunk_bytes", 256 * F * 4)
    got = ops.topk_encode_aux(x, W, b, 32, 48, mask, None, grad, W, 0.5, "additive")
    chosen = ops.grad_topk_encode(x, grad, W, b, W, 32, 0.5, "additive")
    for name, g, w in zip(
        ("values", "indices") * 2, got, (*chosen, *ops.topk_encode(x, W, b, 48, None, mask)),
        strict=True,
    ):  # fmt: skip
        assert_same(name, g, w)
    listed = mask[got[3]].sum(1)
    assert (listed == min(dead, 48)).all() and (got[2][~mask[got[3]]] == 0).all()


def test_float32_products_are_not_tf32() -> None:
    """Screened, the bits do not depend on what torch may do; of products, the accuracy does not."""
    x, W = randn(300, 512).cuda(), randn(5000, 512, seed=1).cuda()
    b, settings = torch.zeros(5000, device="cuda"), torch.backends.cuda.matmul
    want, before = ops.topk_encode(x, W, b, 16), settings.fp32_precision
    settings.fp32_precision = "tf32"
    try:
        got, many = ops.topk_encode(x, W, b, 16), ops.topk_encode(x, W, b, 300)
    finally:
        settings.fp32_precision = before
    for name, g, w in zip(("values", "indices"), got, want, strict=True):
        assert_same(name, g, w)
    exact = (x.double() @ W.double().T).topk(300).values
    assert (many[0].double() - exact).abs().max() <= 1e-5 * exact.max()  # TF32: some 1e-3


def test_peak_memory_is_bounded_by_the_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "chunk_bytes", 8 << 20)
    x, W = torch.randn(4096, 64, device="cuda"), torch.randn(16384, 64, device="cuda")
    b = torch.zeros(16384, device="cuda")
    ops.topk_encode(x, W, b, 16)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    ops.topk_encode(x, W, b, 16)
    assert torch.cuda.max_memory_allocated() - before < 32 << 20  # the scores are 256 MB


def test_streams_are_respected() -> None:
    """Work is queued behind what the current stream holds, and nothing else."""
    x = torch.randn(512, 20000, device="cuda")
    want = ops.topk(x * 2 + 1, 9)
    for _ in range(5):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)
            got = ops.topk(x * 2 + 1, 9)
        stream.synchronize()
        assert_same("indices", got[1], want[1])


def test_a_forked_child_of_an_import_can_use_the_device() -> None:
    program = """
import os, ksae, torch
child = os.fork()
if child == 0:
    x = torch.randn(3, 99, device="cuda")
    os._exit(0 if torch.equal(ksae.topk(x, 2)[0], x.topk(2).values) else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_mixed_devices_are_refused() -> None:
    values, indices = code(3, 9, 2, torch.float32)
    W = randn(9, 4)
    with pytest.raises(ValueError, match="sparse_decode: W_dec must be on cuda:0, got cpu"):
        ops.sparse_decode(values.cuda(), indices.cuda(), W)
    with pytest.raises(ValueError, match="sparse_decode: indices must be on cuda:0, got cpu"):
        ops.sparse_decode(values.cuda(), indices, W.cuda())
    for n in range(1, torch.cuda.device_count()):
        with pytest.raises(ValueError, match=f"W_dec must be on cuda:0, got cuda:{n}"):
            ops.sparse_decode(values.cuda(), indices.cuda(), W.to(f"cuda:{n}"))


def test_every_device_runs_its_own_tensors() -> None:
    x = randn(5, 300)
    for n in range(torch.cuda.device_count()):
        got = ops.topk(x.to(f"cuda:{n}"), 7)
        assert got[0].device.index == n
        assert_same("indices", got[1].cpu(), reference.topk(x, 7)[1])
