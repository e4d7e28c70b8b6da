# SPDX-License-Identifier: Apache-2.0
"""What only hardware answers: the rounding of tensor cores, large offsets, other devices and
threads, graphs, and steps of every dtype and dead share with the kernels that serve them."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import assert_same, integers, randn
from torch import Tensor

import ksae
from ksae import ops, reference
from ksae.activations.transfer import CopyStream
from ksae.backends import product as products
from ksae.backends import serving as gpu
from ksae.step.dead_latents import LAG
from ksae.step.graph import WARM, StepGraph

pytestmark = pytest.mark.gpu
T32, B16 = torch.float32, torch.bfloat16


# ------------------------------------------------------------------------------------ the bound


@pytest.mark.parametrize("d", [768, 4096])
@pytest.mark.parametrize("kind", ["positive", "normal", "one large"])
def test_tensor_cores_lose_no_more_than_the_bound_says(d: int, kind: str) -> None:
    """Sums of numbers of one sign lose most to truncation."""
    x, W = torch.randn(256, d, device="cuda"), torch.randn(8192, d, device="cuda")
    if kind != "normal":
        x, W = x.abs() + 0.1, W.abs() + 0.1
    if kind == "one large":
        x[:, 0], W[:, 0] = 2.0**12, 2.0**12
    x16, W16 = x.bfloat16(), W.bfloat16()
    exact = x16.double() @ W16.double().T
    error = (products._scores(x16, W16).double() - exact).abs()
    g = (d + 16) * 2.0**-22
    allowed = g * x16.double().norm(dim=1)[:, None] * W16.double().norm(dim=1)[None, :]
    assert (error <= allowed).all(), float((error / allowed).max())
    float32 = (x.double() @ W.double().T - products._scores(x, W).double()).abs()
    assert (float32 <= g * x.double().norm(dim=1)[:, None] * W.double().norm(dim=1)[None]).all()


def near_ties(N: int, d: int, F: int) -> tuple[Tensor, Tensor, Tensor]:
    """Latents that bf16 cannot tell apart; sums in float32 are exact."""
    x = integers(N, d, top=15)
    W = integers(1, d, top=15, seed=1) * 16 + integers(F, d, top=1, seed=3)
    return x.cuda(), W.cuda(), torch.zeros(F, device="cuda")


def test_rows_that_are_scored_in_full() -> None:
    """Few of them, as many as there are programs, and more."""
    for N in (1, 5, 300, 1000):
        x, W, b = near_ties(N, 96, 24576)
        got, want = (
            ops.topk_encode(x, W, b, 32),
            reference.topk_encode(x.cpu(), W.cpu(), b.cpu(), 32),
        )
        assert_same("indices", got[1].cpu(), want[1])
        assert_same("values", got[0].cpu(), want[0])
        by = gpu.cuda.kernels or gpu.triton.kernels
        assert by is not None
        (x16, x_norms), (W16, norms) = by.bf16_copy(x), by.bf16_copy(W)
        screen = by._screen(x, W, b, x_norms, norms, 32, None, 0)
        screen.select(products._scores(x16, W16), 0)
        screen.result()
        assert len(screen.redone()) == N


@pytest.mark.parametrize("way", gpu.WAYS)
@pytest.mark.parametrize("T", [T32, B16])
def test_every_way_at_the_shapes_of_training(
    way: str, T: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "override", way)
    for d, F, k in ((768, 24576, 32), (4096, 65536, 64)):
        x, W = randn(600, d).cuda().to(T), (randn(F, d, seed=1) / d**0.5).cuda().to(T)
        b = torch.zeros(F, device="cuda", dtype=T)
        values, indices = ops.topk_encode(x, W, b, k)
        u = x.double() @ W.double().T
        found, best = u.gather(1, indices), u.topk(k).values
        assert (found - best).abs().max() <= 2e-5 * best.abs().max()
        assert (values.double() - found).abs().max() <= (2e-5 if T is T32 else 8e-3) * best.max()


# ------------------------------------------------------------------------------- devices, offsets


def test_another_device_in_a_fresh_thread() -> None:
    """A thread begins on device 0, whatever the tensors' device."""
    device, failures = f"cuda:{torch.cuda.device_count() - 1}", []

    def work() -> None:
        try:
            x, W, b = near_ties(9, 32, 4096)
            step = ksae.TrainStep(ksae.TopKSAE(32, 4096, 16, device=device))
            got = ops.topk_encode(*(t.to(device) for t in (x, W, b)), 16)
            want = reference.topk_encode(x.cpu(), W.cpu(), b.cpu(), 16)
            assert_same("indices", got[1].cpu(), want[1])
            assert got[0].device == torch.device(device)
            for n in range(3):
                assert step(randn(64, 32, seed=n).to(device))["loss"].isfinite()
        except BaseException as error:
            failures.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failures, failures[0]


@pytest.mark.parametrize("T", [T32, B16])
def test_weights_of_more_than_two_to_the_31_numbers(T: torch.dtype) -> None:
    d, F, k = 2112, (1 << 20) + 40, 8
    if torch.cuda.mem_get_info()[0] < 8 * F * d * T.itemsize:
        pytest.skip("needs the memory of a large GPU")
    W = torch.zeros(F, d, device="cuda", dtype=T)
    x = randn(40, d).to(T).cuda()
    last = torch.arange(F - 40, F, device="cuda")
    W[last] = x  # beyond 2^31 numbers
    values, indices = ops.topk_encode(x, W, torch.zeros(F, device="cuda", dtype=T), k)
    assert torch.equal(indices[:, 0], last)
    recon = ops.sparse_decode(values[:, :1], indices[:, :1], W)
    torch.testing.assert_close(
        recon.float(), (values[:, :1].float() * x.float()), rtol=1e-2, atol=1e-2
    )
    offsets, order = ops.group_by_latent(values[:, :1].contiguous(), indices[:, :1].contiguous(), F)
    assert int(offsets[-1]) == 40 and sorted(order.tolist()) == list(range(40))


def test_scores_of_more_than_two_to_the_31_numbers() -> None:
    N, F, k = 33000, 65600, 5
    if torch.cuda.mem_get_info()[0] < 4 * N * F * 2:
        pytest.skip("needs the memory of a large GPU")
    scores = torch.randn(N, F, device="cuda", dtype=B16)
    scores[-1, -1] = 100
    values, indices = ops.topk(scores, k)
    assert indices[-1, 0] == F - 1
    assert torch.equal(values[-50:], scores[-50:].topk(k).values)


# ---------------------------------------------------------------------------------------- steps


def model(T: torch.dtype, dead: float, **options: Any) -> ksae.TopKSAE:
    torch.manual_seed(0)
    sae = ksae.TopKSAE(96, 4096, 16, dead_after=100_000, dtype=T, device="cuda", **options)
    number = int(dead * 4096)
    sae.tokens_since_fired[torch.randperm(4096)[:number].cuda()] = 200_000
    return sae


@pytest.mark.parametrize("T", [T32, B16])
@pytest.mark.parametrize("clip_norm", [None, 0.1])
@pytest.mark.parametrize("dead", [0.0, 0.005, 0.02, 0.1])
def test_steps_are_those_of_autograd(T: torch.dtype, clip_norm: float | None, dead: float) -> None:
    """Over more steps than a count of dead latents is late."""
    sae = model(T, dead)
    fused = ksae.TrainStep(sae, 1e-3, clip_norm=clip_norm)
    plain = ksae.TrainStep(copy.deepcopy(sae), 1e-3, clip_norm=clip_norm, fused=False)
    for n in range(LAG + 2):
        rows = randn(512, 96, seed=n).cuda().to(T)
        got, want = fused(rows), plain(rows)
        for name in ("loss", "auxk_loss", "dead"):
            close = {"rtol": 1e-3 if T is T32 else 3e-2, "atol": 1e-6}
            torch.testing.assert_close(got[name], want[name], msg=name, **close)
    assert (got["auxk_loss"] > 0) == (dead > 0)


def test_the_host_does_not_wait_for_the_number_of_dead_latents() -> None:
    step = ksae.TrainStep(model(T32, 0.02), 1e-3)
    rows = randn(512, 96).cuda()
    for _ in range(LAG):
        step(rows)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(2 * LAG):
            step(rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("clip_norm", [None, 0.1])
def test_a_captured_float32_step_with_rows_redone(clip_norm: float | None) -> None:
    """Every latent is nearly the same: no row has a proof."""
    sae = model(T32, 0.02)
    with torch.no_grad():
        sae.W_enc.copy_(randn(1, 96).cuda() + 1e-4 * randn(4096, 96, seed=1).cuda())
    steps = [ksae.TrainStep(copy.deepcopy(sae), 1e-3, clip_norm=clip_norm) for _ in range(2)]
    for step in steps:
        assert step._fused is not None
        step._fused.dead_latents = None  # a graph does not know the number
    rows = randn(512, 96).cuda()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        steps[0](rows)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        metrics = steps[0](rows)
    steps[1](rows)
    for n in range(3):
        rows.copy_(randn(512, 96, seed=n))
        graph.replay()
        torch.testing.assert_close(metrics["loss"], steps[1](rows)["loss"], rtol=1e-5, atol=0)


@pytest.mark.parametrize("T", [T32, B16])
@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.1, "clip": "always"}], ids=str)
def test_replayed_steps_are_the_eager_ones(T: torch.dtype, options: dict[str, Any]) -> None:
    """Bit for bit; half of the steps with dead latents, which run eagerly."""
    sae = model(T, 0.0)
    graph = StepGraph(ksae.TrainStep(sae, 1e-3, **options))
    plain = ksae.TrainStep(copy.deepcopy(sae), 1e-3, **options)
    for n in range(WARM + 4 * LAG):
        if n == WARM + 2 * LAG:
            for step in (graph.step, plain):
                step.model.tokens_since_fired[:40] = 200_000
        graph.step.lr = plain.lr = 1e-3 / (n + 1)
        rows = randn(512, 96, seed=n).cuda().to(T)
        got, want = graph(rows), plain(rows)
        for name in want:
            assert torch.equal(got[name], want[name]), (n, name)
        assert graph.why is None
        assert (graph._replay is not None) == (n >= WARM)
    for got, want in zip(graph.step.model.parameters(), plain.model.parameters(), strict=True):
        assert torch.equal(got, want)


def test_copies_run_beside_the_step_and_arrive_before_the_next() -> None:
    """Many small copies from pinned memory that is overwritten as soon as it may be."""
    copies, seen = CopyStream(torch.device("cuda", 0)), []
    weight = torch.eye(256, device="cuda")
    for n in range(50):
        host = torch.full((256, 256), float(n)).pin_memory()
        (there, none) = copies([host, None], [T32, None])
        assert there is not None and none is None
        for _ in range(5):
            there = there @ weight
        seen.append(there.sum() / 65536)
        del there, host
    assert torch.stack(seen).tolist() == list(range(50))


def test_two_processes_compile_the_same_kernels_at_once(tmp_path: Path) -> None:
    program = """
import torch, ksae
from ksae.backends.triton import Kernels
from ksae import reference
x, W = torch.randn(64, 96, device="cuda"), torch.randn(4096, 96, device="cuda")
b = torch.zeros(4096, device="cuda")
for encode in (Kernels().screened_topk_encode, Kernels().fused_topk_encode):
    values, indices = encode(x, W, b, 8)
    best = (x.double() @ W.double().T).topk(8).values
    assert (values.double() - best).abs().max() < 1e-3
print("right")
"""
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program], env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for _ in range(2)
    ]  # fmt: skip
    for process in started:
        out, err = process.communicate(timeout=300)
        assert out.strip() == "right", err[-2000:]
