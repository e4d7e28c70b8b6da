# SPDX-License-Identifier: Apache-2.0
"""Every op of ksae on a GPU beside its rivals, for gpu/run.py."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ksae import ops, reference
from ksae.backends import product as products
from ksae.backends import serving as gpu
from ksae.backends.product import Encode
from ksae.backends.triton import Kernels

from ..harness import costs
from ..harness.measure import Times
from ..harness.session import Session
from ..suites import latents
from . import rivals
from .measure import CHUNK, Inputs, Shape, Timer, Way, add_rows, check


def measure_select(session: Session, timer: Timer, shape: Shape, dtype: torch.dtype) -> None:
    i = Inputs(shape, timer.device, dtype)
    for op, wide in (("select", dtype), ("select float32", torch.float32)):
        _measure_select(session, timer, shape, op, (i.x[:CHUNK] @ i.W.T).to(wide))


def _measure_select(session: Session, timer: Timer, shape: Shape, op: str, scores: Tensor) -> None:
    k, portable = shape.k, Kernels()
    ways: dict[str, Way] = {
        "ksae": lambda: ops.topk(scores, k),
        "Triton": lambda: portable.topk(scores, k),
        "torch.topk": lambda: scores.topk(k),
    }
    want = scores.topk(k)[0]
    for way in ("ksae", "Triton"):
        got = lambda way=way: ways[way]()[0]
        check(session, timer, f"{op} {shape.name} by {way}", got, want, 0)
    cost = costs.topk(*scores.shape, k, scores.element_size())
    add_rows(session, timer, shape, op, ways, cost)


def measure_encode(session: Session, timer: Timer, shape: Shape, dtype: torch.dtype) -> None:
    """Product and selection: what serves, both ways, and torch's."""
    i = Inputs(shape, timer.device, dtype)
    tokens = (i.x, i.W, i.b_enc, shape.k)

    def dense_encode() -> None:
        for part in i.x.split(CHUNK):
            torch.addmm(i.b_enc, part, i.W.T).topk(shape.k)

    ways: dict[str, Way] = {
        "ksae": lambda: ops.topk_encode(*tokens),
        "fused Triton": lambda: Kernels().fused_topk_encode(*tokens),
        "product + select": lambda: with_product().topk_encode(*tokens),
        "product alone": i.product,
        "cuBLAS + torch.topk": dense_encode,
    }
    for size in (32, 1024):  # MiB of scores at a time: what L2 holds, and full waves of rows
        ways[f"product + select, {size} MiB"] = in_chunks(size, ways["product + select"])
    for way in list(ways)[:3]:
        got = lambda way=way: ways[way]()[0]
        check(session, timer, f"encode {shape.name} by {way}", got, i.values, 1e-2)
    cost = costs.topk_encode(shape.N, shape.d, shape.F, shape.k, i.x.element_size())
    times = add_rows(session, timer, shape, "encode + select", ways, cost)
    note_choice(session, timer.device, shape, "16 bit", "encode", times)


def measure_screen(session: Session, timer: Timer, shape: Shape, dtype: torch.dtype) -> None:
    """float32 weights: screened in bfloat16, and by float32 products."""
    i = Inputs(shape, timer.device, torch.float32)
    tokens = (i.x, i.W, i.b_enc, shape.k)
    low_x, low_W = i.x.bfloat16(), i.W.bfloat16()
    kept = gpu.bf16_copy(i.W) if timer.device == "cuda" else Kernels().bf16_copy(i.W)
    by_hand = (*tokens, None, None, *kept)  # as in a training step, which writes the bf16 copy

    def low_product() -> None:
        for part in low_x.split(CHUNK):
            part @ low_W.T

    ways: dict[str, Way] = {
        "ksae": lambda: ops.topk_encode(*by_hand),
        "screened product": lambda: with_product().screened_topk_encode(*by_hand),
        "fused Triton": lambda: Kernels().fused_topk_encode(*by_hand),
        "product + select": lambda: with_product().topk_encode(*tokens),
        "screened product, Triton": lambda: Kernels().screened_topk_encode(*by_hand),
        "screened product, new copy": lambda: with_product().screened_topk_encode(*tokens),
        "fused Triton, new copy": lambda: Kernels().fused_topk_encode(*tokens),
        "bf16 product alone": low_product,
        "product alone": i.product,
    }
    for way in list(ways)[:5]:
        got = lambda way=way: ways[way]()[0]
        check(session, timer, f"encode float32 {shape.name} by {way}", got, i.values, 1e-5)
    cost = costs.topk_encode(shape.N, shape.d, shape.F, shape.k, 4)
    times = add_rows(session, timer, shape, "encode float32", ways, cost)
    note_choice(session, timer.device, shape, "float32", "encode", times)


def measure_grad_encode(session: Session, timer: Timer, shape: Shape, dtype: torch.dtype) -> None:
    i, portable = Inputs(shape, timer.device, dtype), Kernels()
    arguments = (i.x, i.x.flip(0), i.W, i.b_enc, i.W, shape.k, 0.5)
    ways: dict[str, Way] = {
        "ksae": lambda: ops.grad_topk_encode(*arguments),
        "Triton": lambda: portable.grad_topk_encode(*arguments),
        "fused Triton": lambda: portable.fused_grad_topk_encode(*arguments),
        "products alone": lambda: (i.product(), i.product()),
    }
    cost = costs.grad_topk_encode(shape.N, shape.d, shape.F, shape.k, i.x.element_size())
    add_rows(session, timer, shape, "grad encode + select", ways, cost)


def measure_aux(session: Session, timer: Timer, shape: Shape, dtype: torch.dtype) -> None:
    """A second selection, of AuxK's dead latents, by kind of weights."""
    for kind, of in (("16 bit", dtype), ("float32", torch.float32)):
        single = kind == "float32"
        i, portable = Inputs(shape, timer.device, of), Kernels()
        tokens = (i.x, i.W, i.b_enc, shape.k)
        dead = torch.arange(shape.F, device=timer.device) % 10 == 0
        k_aux = min(shape.d, shape.F) // 2
        both = (*tokens, k_aux, dead)
        ways: dict[str, Way] = {
            "ksae": partial(ops.topk_encode_aux, *both),
            "Triton": partial(portable.topk_encode_aux, *both),
            "fused Triton": partial(portable.fused_topk_encode_aux, *both),
            "product + select": partial(with_product().topk_encode_aux, *both),
        }
        if single:
            ways["screened product"] = partial(with_product().screened_topk_encode_aux, *both)
        else:
            second = partial(ops.topk_encode, i.x, i.W, i.b_enc, k_aux, None, dead)
            first = partial(ops.topk_encode, *tokens)
            ways["encoded twice"] = partial(_each, first, second)
        sizes = (shape.N, shape.d, shape.F, shape.k)
        cost = costs.topk_encode_aux(*sizes, k_aux, i.x.element_size())
        name = "encode float32 + AuxK" if single else "encode + AuxK"
        times = add_rows(session, timer, shape, name, ways, cost)
        note_choice(session, timer.device, shape, kind, "aux", times)


def _each(*calls: Way) -> Any:
    return [call() for call in calls]


def in_chunks(mebibytes: int, way: Way) -> Way:
    """The same, with so much memory for the scores of a chunk."""

    def run() -> Any:
        before, products.chunk_bytes = products.chunk_bytes, mebibytes << 20
        try:
            return way()
        finally:
            products.chunk_bytes = before

    return run


def with_product() -> Encode:
    """Kernels that encode by torch's product."""
    return gpu.cuda.kernels or Kernels()


NAMES = {"product": "product + select", "screened": "screened product", "fused": "fused Triton"}


def note_choice(
    session: Session,
    device: str,
    shape: Shape,
    kind: str,
    what: str,
    times: Mapping[str, Times],
) -> None:
    """The row for the table of ksae/backends/serving.py that these times give, once they are there:
    for "encode" and "aux"."""
    ms = {way: times[name].median * 1e3 for way, name in NAMES.items() if name in times}
    wanted = {"product", "fused", *({"screened"} if kind == "float32" else ())}
    if not wanted <= ms.keys():
        return
    key = f"{shape.name}, {kind}"
    found = session.suite.facts.get("choice", {}).get(key, {}) | {what: ms}
    measured = ("encode", "aux")
    if found.keys() >= set(measured):
        generation = gpu.generation(torch.device("cuda")) if device == "cuda" else "dry run"
        said = f"{session.record.machine.get('gpu')}, N={shape.N}, k={shape.k}: " + (
            "; with AuxK ".join(
                ", ".join(f"{way} {took:.4g} ms" for way, took in found[of].items())
                for of in measured
            )
        )
        said += f"; {time.strftime('%Y-%m-%d')}"
        way, aux = (min(found[of], key=found[of].__getitem__) for of in measured)
        found["row"] = repr(gpu.Row(generation, kind, shape.d, shape.F, way, said, aux))
    session.fact("choice", **{key: found})


def measure_decode(session: Session, timer: Timer, shape: Shape, dtype: torch.dtype) -> None:
    """Reconstruction and residual, also of slots that AuxK has no latent for."""
    i, portable = Inputs(shape, timer.device, dtype), Kernels()
    s = i.x.element_size()
    N, d, F, k = shape.N, shape.d, shape.F, shape.k
    code: Any = (i.values, i.indices, i.W)
    bag = torch.nn.functional.embedding_bag
    ways: dict[str, Way] = {
        "ksae": lambda: ops.sparse_decode(*code),
        "Triton": lambda: portable.sparse_decode(*code),
        "Triton gather": lambda: rivals.decode(*code),
        "embedding_bag": lambda: bag(i.indices, i.W, mode="sum", per_sample_weights=i.values),
    }
    want = ways["embedding_bag"]()
    for way in list(ways)[:3]:
        check(session, timer, f"decode {shape.name} by {way}", ways[way], want, 1e-2)
    cost, gathered = costs.sparse_decode(N, d, F, k, s), N * k * d * s
    add_rows(session, timer, shape, "decode", ways, cost, gathered)

    target = (i.b_dec, i.x, d)
    ways = {
        "ksae": lambda: ops.sparse_residual(*code, *target),
        "Triton": lambda: portable.sparse_residual(*code, *target),
    }
    want = want.float() - i.x.float()
    for way in ways:
        got = lambda way=way: ways[way]()[0]
        check(session, timer, f"residual {shape.name} by {way}", got, want, 1e-2)
    cost = costs.sparse_residual(N, d, F, k, s)
    add_rows(session, timer, shape, "residual", ways, cost, gathered)

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
    add_rows(session, timer, shape, "unused slots", ways, cost)


def hot(indices: Tensor, latent: int) -> Tensor:
    """The indices [N, k], with `latent` in each row."""
    first = torch.where((indices == latent).any(1), indices[:, 0], latent)
    return torch.cat([first[:, None], indices[:, 1:]], 1)


def measure_latents(session: Session, timer: Timer, shape: Shape, dtype: torch.dtype) -> None:
    """Grouping by latent and the passes over latents; once more with one latent in every token."""
    i = Inputs(shape, timer.device, dtype)
    _measure_latents(session, timer, i, i.indices, "")
    _measure_latents(session, timer, i, hot(i.indices, shape.F // 2), ", hot latent")


def _measure_latents(session: Session, timer: Timer, i: Inputs, indices: Tensor, case: str) -> None:
    shape, s, portable = i.shape, i.x.element_size(), Kernels()
    N, d, F, k = shape.N, shape.d, shape.F, shape.k
    ways: dict[str, Way] = {
        "ksae": lambda: ops.group_by_latent(i.values, indices, F),
        "Triton": lambda: portable.group_by_latent(i.values, indices, F),
        "stable sort": lambda: indices.reshape(-1).sort(stable=True),
    }
    groups = reference.group_by_latent(i.values, indices, F)
    for way in ("ksae", "Triton"):
        for part, want in enumerate(groups):
            got = lambda way=way, part=part: ways[way]()[part]
            check(session, timer, f"group{case} {shape.name} by {way}", got, want, 0)
    add_rows(session, timer, shape, f"group{case}", ways, costs.group_by_latent(N, F, k, s))

    ours, triton = (
        latents.both_passes(i.x, i.W, i.b_dec, i.values, indices, groups, served)
        for served in (ops, portable)
    )
    what = f"latent pass{case} {shape.name} by Triton"
    check(session, timer, what, lambda: triton() - i.W.float(), lambda: ours() - i.W.float(), 1e-2)
    cost = latents.cost(N, d, F, k, s)
    ways = {"ksae": ours, "Triton": triton}
    add_rows(session, timer, shape, f"latent pass{case}", ways, cost)


SECTIONS = {
    "select": measure_select,
    "encode": measure_encode,
    "grad encode": measure_grad_encode,
    "AuxK": measure_aux,
    "encode float32": measure_screen,
    "decode": measure_decode,
    "latents": measure_latents,
}
