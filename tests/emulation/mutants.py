# SPDX-License-Identifier: Apache-2.0
"""Runs kernels with mistakes in them: what each one's comparison with the reference comes to.

    python mutants.py MODULE < jobs.json > outcomes.json

MODULE is a module of build.cuda whose mistakes wait for the number in its variable `ksae_mutant`;
jobs are [number, file of the kernel]. Each runs in a child of its own, because a broken kernel may
read and write anywhere and need not end. An outcome is "right", "wrong: " and the case,
"rejected: " and what the emulator threw, or, where the child died, what it said before that.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from cases import code, integers, scores
from emulation.build import Emulator
from torch import Tensor

from ksae import reference
from ksae.cuda import Kernels

SECONDS = 60  # for one child
Case = tuple[str, bool]


def same(got: Tensor, want: Tensor) -> bool:
    return bool(((got == want) | (got.isnan() & want.isnan())).all())


def all_same(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> bool:
    return all(same(g, w) for g, w in zip(got, want, strict=True))


def select(kernels: Kernels) -> Iterator[Case]:
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


def decode(kernels: Kernels) -> Iterator[Case]:
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


CASES: dict[str, Callable[[Kernels], Iterator[Case]]] = {"select.cu": select, "decode.cu": decode}


def outcome(emulator: Emulator, file: str) -> str:
    torch.use_deterministic_algorithms(True, warn_only=True)  # torch.empty gives NaN
    kernels = Kernels(emulator.module)
    emulator.step_limit(2**26)
    for seed in range(2):
        emulator.seed(seed)
        try:
            for what, right in CASES[file](kernels):
                if not right:
                    return f"wrong: {what}, seed {seed}"
        except RuntimeError as error:
            return f"rejected: {error}"
    return "right"


def in_child(emulator: Emulator, number: int, file: str) -> str:
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        os.dup2(write, 2)
        signal.alarm(SECONDS)
        ctypes.c_int.in_dll(ctypes.CDLL(str(emulator.path)), "ksae_mutant").value = number
        os.write(write, outcome(emulator, file).encode())
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
