# SPDX-License-Identifier: Apache-2.0
"""Every op of ksae on a GPU beside its rivals, for gpu.py."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ksae import gpu, ops
from ksae.triton import Kernels

from . import costs, gpurivals
from .gpumeasure import CHUNK, Inputs, Shape, Timer, Way, add_rows, check
from .gpureport import Record
from .measure import Times


def measure_ops(record: Record, timer: Timer, shape: Shape, dtype: torch.dtype) -> None:
    """Rows of all ops at one shape."""
    i = Inputs(shape, timer.device, dtype)
    for kind, wide in (("", dtype), (" float32", torch.float32)):
        measure_select(record, timer, i, f"select{kind}", (i.x[:CHUNK] @ i.W.T).to(wide))
    measure_encode(record, timer, i)
    measure_decode(record, timer, i)
    measure_latents(record, timer, i, "")
    measure_latents(record, timer, i, ", hot latent")


def measure_select(record: Record, timer: Timer, i: Inputs, op: str, scores: Any) -> None:
    k, portable = i.shape.k, Kernels()
    want = scores.topk(k)[0]
    for served, name in ((ops, op), (portable, f"Triton {op}")):
        check(record, f"{name} {i.shape.name}", served.topk(scores, k)[0], want, 0)
    ways: dict[str, Way] = {
        "ksae": lambda: ops.topk(scores, k),
        "Triton": lambda: portable.topk(scores, k),
        "torch.topk": lambda: scores.topk(k),
    }
    cost = costs.topk(*scores.shape, k, scores.element_size())
    add_rows(record, i.shape, op, timer(ways), cost)


def measure_encode(record: Record, timer: Timer, i: Inputs) -> None:
    """Product and selection: plain, gradient-aware, and with AuxK's."""
    shape, s, portable = i.shape, i.x.element_size(), Kernels()
    N, d, F, k = shape.N, shape.d, shape.F, shape.k

    def dense_encode() -> None:
        for part in i.x.split(CHUNK):
            torch.addmm(i.b_enc, part, i.W.T).topk(k)

    tokens = (i.x, i.W, i.b_enc, k)
    with_product = gpu.cuda.kernels or portable
    ways: dict[str, Way] = {
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
    note_choice(record, timer.device, shape, i.dtype, times, aux_times)


def note_choice(
    record: Record,
    device: str,
    shape: Shape,
    dtype: torch.dtype,
    times: Mapping[str, Times],
    aux_times: Mapping[str, Times],
) -> None:
    """The row for the table of python/ksae/gpu.py that these times give."""
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


def measure_decode(record: Record, timer: Timer, i: Inputs) -> None:
    """Reconstruction and residual, also of slots that AuxK has no latent for."""
    shape, s, portable = i.shape, i.x.element_size(), Kernels()
    N, d, F, k = shape.N, shape.d, shape.F, shape.k
    want = ops.sparse_decode(i.values, i.indices, i.W)
    check(record, f"decode {shape.name}", gpurivals.decode(i.values, i.indices, i.W), want, 1e-2)
    got = portable.sparse_decode(i.values, i.indices, i.W)
    check(record, f"Triton decode {shape.name}", got, want, 1e-2)
    bag = torch.nn.functional.embedding_bag
    ways: dict[str, Way] = {
        "ksae": lambda: ops.sparse_decode(i.values, i.indices, i.W),
        "Triton": lambda: portable.sparse_decode(i.values, i.indices, i.W),
        "Triton gather": lambda: gpurivals.decode(i.values, i.indices, i.W),
        "embedding_bag": lambda: bag(i.indices, i.W, mode="sum", per_sample_weights=i.values),
    }
    cost = costs.sparse_decode(N, d, F, k, s)
    add_rows(record, shape, "decode", timer(ways), cost, gathered=N * k * d * s)

    code = (i.values, i.indices, i.W, i.b_dec, i.x, d)
    residual = lambda: ops.sparse_residual(*code)
    ways = {"ksae": residual, "Triton": lambda: portable.sparse_residual(*code)}
    for part, wanted in zip(ways["Triton"](), residual(), strict=True):
        check(record, f"Triton residual {shape.name}", part, wanted, 1e-4)
    cost = costs.sparse_residual(N, d, F, k, s)
    add_rows(record, shape, "residual", timer(ways), cost, gathered=N * k * d * s)

    k_aux = min(d, F) // 2  # slots of AuxK while nothing is dead
    none = (torch.zeros(N, k_aux, device=i.x.device, dtype=i.dtype), i.indices.new_zeros(N, k_aux))
    ways = {
        name: lambda served=served: (
            served.sparse_residual(*none, i.W, None, i.x, d),
            served.group_by_latent(*none, F),
        )
        for name, served in (("ksae", ops), ("Triton", portable))
    }
    cost = costs.Cost(N * k_aux * (2 * s + 8) + N * d * (s + 4))
    add_rows(record, shape, "unused slots", timer(ways), cost)


def hot(indices: Tensor, latent: int) -> Tensor:
    """The indices [N, k], with `latent` in each row."""
    first = torch.where((indices == latent).any(1), indices[:, 0], latent)
    return torch.cat([first[:, None], indices[:, 1:]], 1)


def measure_latents(record: Record, timer: Timer, i: Inputs, case: str) -> None:
    """Grouping by latent and the passes over latents; in one case, every token has one latent."""
    shape, s, portable = i.shape, i.x.element_size(), Kernels()
    N, d, F, k = shape.N, shape.d, shape.F, shape.k
    indices = hot(i.indices, F // 2) if case else i.indices
    ways: dict[str, Way] = {
        "ksae": lambda: ops.group_by_latent(i.values, indices, F),
        "Triton": lambda: portable.group_by_latent(i.values, indices, F),
        "stable sort": lambda: indices.reshape(-1).sort(stable=True),
    }
    for got, want in zip(ways["Triton"](), ways["ksae"](), strict=True):
        check(record, f"Triton group{case} {shape.name}", got, want, 0)
    add_rows(record, shape, f"group{case}", timer(ways), costs.group_by_latent(N, F, k, s))

    ways = {
        name: latent_pass(i, indices, served)
        for name, served in (("ksae", ops), ("Triton", portable))
    }
    got, want = (ways[name]() for name in ("Triton", "ksae"))
    check(record, f"Triton latent pass{case} {shape.name}", got - i.W, want - i.W, 1e-2)
    cost = costs.latent_sums(N, F, k, s) + costs.row_update(N, d, F, k, s, row=s)
    cost += costs.row_update(N, d, F, k, s, coefficient=s)
    add_rows(record, shape, f"latent pass{case}", timer(ways), cost)


def latent_pass(i: Inputs, indices: Tensor, served: Any) -> Way:
    """Gradients, projection, Adam and unit rows of both matrices, as `served` computes them."""
    error, _, grads = ops.sparse_residual(i.values, indices, i.W, i.b_dec, i.x, i.shape.d)
    wide = torch.float32
    masters = [None if i.dtype == wide else i.W.float() for _ in range(2)]
    W_enc, W_dec = i.W.clone(), i.W.clone()
    moments = [torch.zeros(i.W.shape, device=i.W.device, dtype=wide) for _ in range(4)]
    hyper = torch.tensor([1e-4, 0.03, 0.9, 0.999, 1e-8, 1.0, 0.1, 0.001], device=i.W.device)
    grad_b_dec = torch.empty(i.shape.d, device=i.W.device)
    scale = torch.full((1,), 1e-6, device=i.W.device)
    offsets, order = ([t] for t in ops.group_by_latent(i.values, indices, i.shape.F))

    def call() -> Any:
        b_enc, along = served.latent_sums([i.values], [grads], offsets, order, scale)
        encoder = ([grads], offsets, order, [i.x], scale, i.b_dec, None, b_enc, W_enc, masters[0])
        served.row_update(*encoder, moments[0], moments[1], hyper, grad_b_dec, 0, False)
        decoder = ([i.values], offsets, order, [error], scale, None, along, None, W_dec, masters[1])
        served.row_update(*decoder, moments[2], moments[3], hyper, None, 0, True)
        return W_dec

    return call
