# SPDX-License-Identifier: Apache-2.0
"""Runs kernels with mistakes in them: what each one's comparison with the reference comes to.

    python mutants.py MODULE < jobs.json > outcomes.json

MODULE is a module of build.cuda whose mistakes wait for the number in its variable `ksae_mutant`;
jobs are [number, a name in CASES]. Each runs in a child of its own, because a broken kernel may
read and write anywhere and need not end. An outcome is "right", "wrong: " and the case,
"rejected: " and what the emulator threw, or, where the child died, what it said before that.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from cases import (
    assert_norms,
    at_rest,
    clone_all,
    code,
    count_arguments,
    hidden_winners,
    integers,
    norm_arguments,
    row_arguments,
    scalars_arguments,
    scores,
    special_rows,
    terms_arguments,
    vector_arguments,
    written,
)
from emulation.build import Emulator
from implementations import Emulated
from torch import Tensor

from ksae import reference
from ksae.backends import cuda
from ksae.backends import product as products

SECONDS = 60  # of processor time for one child: a busy machine is no mutant
ROOM = 1 << 16  # numbers
Case = tuple[str, bool]


def same(got: Tensor, want: Tensor) -> bool:
    return bool(((got == want) | (got.isnan() & want.isnan())).all())


def all_same(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> bool:
    return all(same(g, w) for g, w in zip(got, want, strict=True))


def select(kernels: Emulated) -> Iterator[Case]:
    for kind, F in (("ties", 1001), ("nan", 1001), ("one late winner", 1001), ("random", 5000)):
        x = scores(kind, 2, F, torch.float32)
        for k in (5, 700):
            yield f"{kind}, k={k}", all_same(kernels.topk(x, k), reference.topk(x, k))
    x = scores("descending", 1, 5000, torch.float32).flip(1).contiguous()  # the buffer overflows
    yield "ascending", all_same(kernels.topk(x, 700), reference.topk(x, 700))
    N, d, F, k = 3, 5, 1100, 40
    x, W, b = (integers(*s, seed=i) for i, s in enumerate([(N, d), (F, d), (F,)]))
    few = torch.zeros(F, dtype=torch.bool)
    few[torch.tensor([3, 39, 40, 1064, 1099])] = True
    for mask in (few, torch.arange(F) % 2 == 0):
        yield (
            f"{int(mask.sum())} listed",
            all_same(
                kernels.topk_encode(x, W, b, k, None, mask),
                reference.topk_encode(x, W, b, k, None, mask),
            ),
        )
    grad = integers(N, d, seed=3)
    grad[1] = 0
    yield (
        "without a gradient",
        all_same(
            kernels.grad_topk_encode(x, grad, W, b, W, k, 0.5, "multiplicative"),
            reference.grad_topk_encode(x, grad, W, b, W, k, 0.5, "multiplicative"),
        ),
    )


def screened(impl: Emulated, *args: Any, capacity: int = 0, chunk: int = 2) -> tuple[Tensor, ...]:
    x, W, b, k, mask = args
    (rounded, x_norms), (W_bf16, norms) = impl.kernels.bf16_copy(x), impl.kernels.bf16_copy(W)
    selection = impl.kernels._screen(x, W, b, x_norms, norms, k, mask, capacity)
    for n in range(0, len(x), chunk):
        selection.select(products._scores(rounded[n : n + chunk], W_bf16), n)
    return selection.result()


def screen(impl: Emulated) -> Iterator[Case]:
    N, d, F, k = 5, 21, 1100, 6
    x, W, b = (integers(*s, top=511, seed=i) for i, s in enumerate([(N, d), (F, d), (F,)]))
    near = integers(1, d, top=511, seed=1) + integers(F, d, top=1, seed=3)
    few = torch.arange(F) % 300 == 7
    x[1, 3], hot = torch.nan, W * 2.0 ** integers(F, 1, top=6, seed=4)
    plain = x[2:].bfloat16().float()  # what is lost is the weights' alone
    hidden = hidden_winners()
    cases: dict[str, tuple[tuple[Any, ...], int]] = {
        "random": ((x, W, b, k, None), 0),
        "of many sizes": ((x, hot, b, k, None), 0),
        "rows as they are": ((plain, near, b * 0, k, None), 2048),
        "near ties": ((x, near, b * 0, k, None), 2048),
        "weights as they are": ((x, W.bfloat16().float(), b * 0, k, None), 0),
        "hidden by its copy": ((*hidden[:2], b * 0, k, None), 0),
        "hidden by the row's copy": ((*hidden[2:], b * 0, k, None), 0),
        "overflow": ((x, near, b * 0, k, None), 64),
        "many, overflow": ((x, near, b * 0, 300, None), 64),
        "one row, many parts": ((x[:1], near, b * 0, 300, None), 64),
        "masked": ((x, W, b, k, few), 0),
        "masked, overflow": ((x, near, b * 0, k, torch.arange(F) % 2 == 0), 64),
    }
    for name, (args, capacity) in cases.items():
        want = reference.topk_encode(*args[:4], None, args[4])
        yield name, all_same(screened(impl, *args, capacity=capacity), want)
    long = integers(3, 300, top=63), integers(40, 300, top=63, seed=1), b[:40]
    yield (
        "long rows",
        all_same(screened(impl, *long, 3, None), reference.topk_encode(*long, 3)),
    )
    copy, norms = impl.kernels.bf16_copy(W)
    assert_norms(norms, W, copy)
    yield "copy", same(copy, W.bfloat16())


def decode(kernels: Emulated) -> Iterator[Case]:
    for N, d, F, k in ((3, 21, 33, 35), (3, 11_300, 7, 3)):  # the second: rows in the workspace
        values, indices = code(N, F, k, torch.float32)
        values = (values * 2).round()
        W, target = integers(F, d), integers(N, d, seed=1)
        W[indices[1, 0]] = torch.inf
        values[indices == indices[1, 0]] = 0
        args = (values, indices, W, target[0], target)
        shape = f"N={N}, d={d}, k={k}"
        yield (
            f"decode, {shape}",
            same(kernels.sparse_decode(*args[:4]), reference.sparse_decode(*args[:4])),
        )
        got, want = kernels.sparse_residual(*args, d), reference.sparse_residual(*args, d)
        yield f"residual, {shape}", all_same(got, want)
        part = (*args, d // 3, d - 2)
        got_part = kernels.sparse_residual_slice(*part)
        yield f"slice, {shape}", same(got_part, reference.sparse_residual_slice(*part))
        W = W.nan_to_num(posinf=1.0)
        back = (target, indices, W)
        yield (
            f"products, {shape}",
            same(
                kernels.sparse_decode_backward_values(*back),
                reference.sparse_decode_backward_values(*back),
            ),
        )

    N, d, F = 5, 21, 33
    offsets = torch.tensor([0, 0, 40, 41, 41, 75])
    values, indices = integers(75, 1).abs(), torch.arange(75)[:, None] * 7 % F
    W, target = integers(F, d), integers(N, d, seed=1)
    args = (values, indices, W, target[0], target)
    yield (
        "decode, row offsets",
        same(
            kernels.sparse_decode(*args[:4], offsets), reference.sparse_decode(*args[:4], offsets)
        ),
    )
    got, want = (g.sparse_residual(*args, d, None, offsets) for g in (kernels, reference))
    yield "residual, row offsets", all_same(got, want)
    yield (
        "products, row offsets",
        same(
            kernels.sparse_decode_backward_values(target, indices, W, offsets),
            reference.sparse_decode_backward_values(target, indices, W, offsets),
        ),
    )


def group(kernels: Emulated) -> Iterator[Case]:
    for N, F, k in ((1, 3, 1), (37, 40, 9), (130, 1000, 33)):  # the last: several tiles and digits
        values, indices = code(N, F, k, torch.float32)
        hot = torch.where(indices % 3 == 0, F - 1, indices)
        for what, latents in (("spread", indices), ("hot", hot)):
            got, want = (g.group_by_latent(values, latents, F) for g in (kernels, reference))
            yield f"{what}, N={N}, F={F}, k={k}", all_same(got, want)


def long_segments(side: str) -> dict[str, Any]:
    """Arguments of row_update in integers: two groups, segments of several cuts."""
    N, d, F = 400, 21, 23
    a = row_arguments(torch.float32, side, N=N, d=d, F=F, ks=(2, 3))
    for g, k in enumerate((2, 3)):
        values, indices = integers(N, k, seed=g).abs(), torch.full((N, k), 2)
        indices[:, 1], indices[::50], indices[1::50, 0] = 4, 5, 0
        a["offsets"][g], a["order"][g] = reference.group_by_latent(values, indices, F)
        a["coefficients"][g] = values
        a["rows"][g] = integers(N, d, seed=g)
    a["scales"] = torch.tensor([0.5, 2.0])
    for name in ("W", "centre", "grad_b_enc"):
        if a[name] is not None:
            a[name] = integers(*a[name].shape, seed=5)
    return a


def close(got: Tensor, want: Tensor) -> bool:
    return torch.allclose(got, want, rtol=1e-5, atol=1e-6)


def bounds(norms: Tensor, W: Tensor, W_bf16: Tensor) -> bool:
    try:
        assert_norms(norms, W, W_bf16)
    except AssertionError:
        return False
    return True


def latent(kernels: Emulated) -> Iterator[Case]:
    for side in ("encoder", "decoder"):
        for slices in ((0, 21), (0, 8, 21)):
            a = long_segments(side)
            if side == "encoder" and len(slices) > 2:
                continue
            want = clone_all(a)
            for start, stop in itertools.pairwise(slices):
                part = [[r[:, start:stop].contiguous() for r in b["rows"]] for b in (a, want)]
                last = {"start": start, "normalize": side == "decoder" and stop == 21}
                kernels.row_update(*(a | last | {"rows": part[0]}).values())
                reference.row_update(*(want | last | {"rows": part[1]}).values())
            names = written(a).keys()
            right = all(close(written(a)[n], written(want)[n]) for n in names)
            yield f"update, {side}, {len(slices) - 1} slices", right
        a = long_segments(side)
        got, want_sq = (g.row_grad_sq(*norm_arguments(a)) for g in (kernels, reference))
        yield f"norm, {side}", close(got, want_sq)
        row_of = [torch.arange(c.numel(), dtype=torch.int32) % len(c) for c in a["coefficients"]]
        got, want_sq = (g.row_grad_sq(*norm_arguments(a), row_of) for g in (kernels, reference))
        yield f"norm, {side}, rows of entries", close(got, want_sq)
        W_bf16, norms = a["W"].bfloat16(), a["W"].new_empty(3, a["W"].shape[0])
        kernels.row_update(*a.values(), W_bf16, None, norms)
        yield f"norms of the bf16 copy, {side}", bounds(norms, a["W"], W_bf16)
    for d in (1, 23):
        a = at_rest(special_rows(d))
        W_bf16, norms = a["W"].bfloat16(), a["W"].new_empty(3, a["W"].shape[0])
        kernels.row_update(*a.values(), W_bf16, None, norms)
        yield f"norms of special rows, d={d}", bounds(norms, a["W"], W_bf16)


def sums(kernels: Emulated) -> Iterator[Case]:
    a = long_segments("decoder")
    grads = [integers(*c.shape, seed=7 + g) for g, c in enumerate(a["coefficients"])]
    grads = [torch.where(c == 0, 0, g) for c, g in zip(a["coefficients"], grads, strict=True)]
    arguments = (a["coefficients"], grads, a["offsets"], a["order"], a["scales"])
    got, want = (g.latent_sums(*arguments) for g in (kernels, reference))
    yield "latent sums", all_same(got, want)
    N, d, F = 700, 5, 33
    back = (integers(N, d), integers(N, 1, seed=1).abs(), torch.full((N, 1), 31), F)
    pair = (g.sparse_decode_backward_weight(*back) for g in (kernels, reference))
    yield "weight gradient", all_same(*pair)


def variance(kernels: Emulated) -> Iterator[Case]:
    for N, d in ((1, 3), (300, 37), (259, 600)):  # the others: shares of two rows; two slices
        y = integers(N, d)
        yield f"N={N}, d={d}", close(kernels.total_variance(y), reference.total_variance(y))


def scalars(kernels: Emulated) -> Iterator[Case]:
    terms = terms_arguments(torch.float32, N=1100)
    terms["denominators"][2].zero_()
    pair = (g.loss_terms(*terms.values()) for g in (kernels, reference))
    yield "terms", all(itertools.starmap(close, zip(*pair, strict=True)))
    for loss, norm in ((0.5, 2.5), (0.5, 0.25), (torch.nan, 2.5)):
        a = scalars_arguments(torch.float32)
        a["loss"].fill_(loss)
        a["norm"].fill_(norm)
        for always in (False, True):
            (hyper, *got, own), (want_hyper, *want, want_own) = (
                g.adam_scalars(*a.values(), 3.0, always) for g in (kernels, reference)
            )
            right = close(hyper, want_hyper) and close(own, want_own)
            yield f"loss {loss}, norm {norm}", right and all_same(tuple(got), tuple(want))


def tokens(kernels: Emulated) -> Iterator[Case]:
    for F, taken in ((33, True), (70_001, True), (33, False)):
        a = count_arguments(torch.float32, F) | {"taken": torch.tensor(taken)}
        want = clone_all(a)
        got = kernels.count_tokens(*a.values())
        counts = all_same(got, reference.count_tokens(*want.values()))
        yield f"F={F}, {taken}", counts and same(a["since"], want["since"]) and a["t"] == want["t"]


def vector(kernels: Emulated) -> Iterator[Case]:
    for size, extras in ((33, True), (700, False)):
        a = vector_arguments(torch.float32, size, extras=extras)
        want = clone_all(a)
        kernels.vector_update(*a.values())
        reference.vector_update(*want.values())
        pairs = zip(written(a).values(), written(want).values(), strict=True)
        yield f"{size} numbers", all(itertools.starmap(close, pairs))


CASES: dict[str, Callable[[Emulated], Iterator[Case]]] = {
    "select": select,
    "screen": screen,
    "decode": decode,
    "group": group,
    "latent": latent,
    "sums": sums,
    "variance": variance,
    "scalars": scalars,
    "tokens": tokens,
    "vector": vector,
}


def leave_room() -> None:
    """A little past the end of an output or a workspace, nothing else of this process lies."""

    def new_empty(t: Tensor, *shape: Any, dtype: torch.dtype | None = None) -> Tensor:
        size = torch.Size(shape[0] if isinstance(shape[0], Sequence) else shape)
        memory = torch.empty(size.numel() + ROOM, dtype=t.dtype if dtype is None else dtype)
        return memory[: size.numel()].view(size)

    workspace = cuda._Workspace.__call__
    cuda._Workspace.__call__ = lambda self, size: workspace(self, size + 8 * ROOM)
    Tensor.new_empty = new_empty


def outcome(emulator: Emulator, name: str) -> str:
    leave_room()
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty gives NaN
    kernels = Emulated(emulator)
    emulator.step_limit(2**26)
    for seed in range(2):
        emulator.seed(seed)
        try:
            for what, right in CASES[name](kernels):
                if not right:
                    return f"wrong: {what}, seed {seed}"
        except RuntimeError as error:
            return f"rejected: {error}"
    return "right"


def in_child(emulator: Emulator, number: int, name: str) -> str:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(write, 2)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        ctypes.c_int.in_dll(ctypes.CDLL(str(emulator.path)), "ksae_mutant").value = number
        os.write(write, outcome(emulator, name).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as said:
        text = said.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return text if status == 0 else f"died of {status}: {text}"


if __name__ == "__main__":
    torch.set_num_threads(1)  # no thread of it is there after a fork
    loaded = Emulator(Path(sys.argv[1]), "_cuda")
    print(json.dumps([in_child(loaded, *job) for job in json.load(sys.stdin)]))
