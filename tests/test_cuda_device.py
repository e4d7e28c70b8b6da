# SPDX-License-Identifier: Apache-2.0
"""On a CUDA device: ops against the reference, bits, streams, graphs. bench/gpu.py runs them."""

from __future__ import annotations

import copy

import pytest
import torch
from cases import (
    SCORES,
    SHAPES,
    assert_close,
    assert_same,
    clone_all,
    code,
    norm_arguments,
    randn,
    row_arguments,
    scores,
    sums_arguments,
    to_float64,
    written,
)

import ksae
from ksae import ops, reference

pytestmark = pytest.mark.gpu


def on_gpu(arg):
    if isinstance(arg, dict):
        return {name: on_gpu(a) for name, a in arg.items()}
    if isinstance(arg, list):
        return [on_gpu(a) for a in arg]
    return arg.cuda() if isinstance(arg, torch.Tensor) else arg


def test_the_native_kernels_serve_cuda():
    assert ksae.config()["cuda"]["usable"], ksae.config()["cuda"]["reason"]
    assert {devices.get("cuda") for devices in ops.serving().values()} == {"native"}


@pytest.mark.parametrize("kind", SCORES)
@pytest.mark.parametrize(("F", "k"), [(33, 33), (1000, 32), (24_577, 700)])
def test_topk(dtype, kind, F, k):
    x = scores(kind, 5, F, dtype)
    got, want = ops.topk(x.cuda(), k), reference.topk(x, k)
    assert_same("indices", got[1].cpu(), want[1])
    assert_same("values", got[0].cpu(), want[0])


@pytest.mark.parametrize(("N", "d", "F", "k"), SHAPES)
def test_decode_and_residual(dtype, N, d, F, k):
    values, indices = code(N, F, k, dtype)
    W, b, x = randn(F, d, dtype=dtype, seed=4), randn(d, dtype=dtype), randn(N, d, dtype=dtype)
    for op, arguments in (
        ("sparse_decode", (values, indices, W, b)),
        ("sparse_residual", (values, indices, W, b, x, d)),
        ("sparse_decode_backward_values", (x, indices, W)),
        ("sparse_decode_backward_weight", (x, values, indices, F)),
    ):
        got = getattr(ops, op)(*(on_gpu(a) for a in arguments))
        plain = getattr(reference, op)(*arguments)
        wide = [
            a.double() if isinstance(a, torch.Tensor) and a.is_floating_point() else a
            for a in arguments
        ]
        exact = getattr(reference, op)(*wide)
        if isinstance(got, torch.Tensor):
            got, plain, exact = (got,), (plain,), (exact,)
        for i, (g, p, e) in enumerate(zip(got, plain, exact, strict=True)):
            assert_close(f"{op} {i}", g.cpu(), p, e)


def test_group_is_stable(dtype):
    values, indices = code(57, 33, 5, dtype)
    for got, want in zip(
        ops.group_by_latent(values.cuda(), indices.cuda(), 33),
        reference.group_by_latent(values, indices, 33),
        strict=True,
    ):
        entries = int(reference.group_by_latent(values, indices, 33)[0][-1])
        assert_same("group", got.cpu()[:entries], want[:entries])


@pytest.mark.parametrize("side", ["encoder", "decoder"])
def test_latent_pass(dtype, side):
    a = row_arguments(dtype, side, N=300)
    gpu, plain, exact = on_gpu(clone_all(a)), clone_all(a), to_float64(a)
    sums = sums_arguments(dtype)
    for got, want in zip(
        ops.latent_sums(*on_gpu(sums).values()),
        reference.latent_sums(*to_float64(sums).values()),
        strict=True,
    ):
        torch.testing.assert_close(got.cpu().double(), want, rtol=1e-5, atol=1e-5)
    floor = torch.finfo(torch.float32).eps
    assert_close(
        "grad_sq",
        ops.row_grad_sq(*norm_arguments(gpu)).cpu(),
        reference.row_grad_sq(*norm_arguments(plain)),
        reference.row_grad_sq(*norm_arguments(exact)),
        floor,
    )
    ops.row_update(*gpu.values())
    reference.row_update(*plain.values())
    reference.row_update(*exact.values())
    for name, t in written(gpu).items():
        assert_close(name, t.cpu(), written(plain)[name], written(exact)[name])


def model(dtype: torch.dtype) -> ksae.TopKSAE:
    torch.manual_seed(0)
    return ksae.TopKSAE(40, 300, 9, dtype=dtype).cuda()


def test_steps_give_the_same_bits_on_every_run_and_stream(dtype):
    batches = [randn(70, 40, dtype=dtype, seed=i).cuda() for i in range(4)]
    ends = []
    for stream in (torch.cuda.current_stream(), torch.cuda.Stream(), torch.cuda.Stream()):
        sae = model(dtype)
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            step = ksae.TrainStep(sae, lr=1e-3)
            for x in batches:
                step(x)
        torch.cuda.synchronize()
        ends.append({name: p.detach().clone() for name, p in sae.named_parameters()})
    for other in ends[1:]:
        assert all(torch.equal(p, other[name]) for name, p in ends[0].items())


def test_a_step_in_a_graph_is_the_same_step(dtype):
    batches = [randn(70, 40, dtype=dtype, seed=i).cuda() for i in range(6)]
    plain = model(dtype)
    captured = copy.deepcopy(plain)
    step = ksae.TrainStep(plain, lr=1e-3)
    for x in batches:
        step(x)
    step, x = ksae.TrainStep(captured, lr=1e-3), batches[0].clone()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for batch in batches[:2]:
            step(x.copy_(batch))
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step(x)
    for batch in batches[2:]:
        x.copy_(batch)
        graph.replay()
    for name, p in plain.named_parameters():
        assert torch.equal(p, captured.get_parameter(name)), name


def test_a_step_does_not_wait_for_the_device(dtype):
    sae, x = model(dtype), randn(70, 40, dtype=dtype).cuda()
    step = ksae.TrainStep(sae, lr=1e-3)
    step(x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
