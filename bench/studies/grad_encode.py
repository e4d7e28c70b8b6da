# SPDX-License-Identifier: Apache-2.0
"""What the gradient costs: grad_topk_encode by each route against plain topk_encode on this CPU.

    PYTHONPATH=python python bench/studies/grad_encode.py [--threads 2] [--repeats 7] [--rows 2048]

Rounds are interleaved and ratios taken within a round, so that a slow spell hits both. `dual` and
`pruned` are forced; `auto` is what the op does. Data: noise-free sparse codes over tied random unit
rows, random gradients of one norm.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ksae import _cpu
from ksae.backends import cpu as native


def problem(N: int, d: int, F: int, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [N, d], unit rows W [F, d], b_enc [F], gradients of norm 1 [N, d]."""
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(F, d, generator=generator)
    W /= W.norm(dim=1, keepdim=True)
    chosen = torch.randint(0, F, (N, k), generator=generator)
    strength = torch.rand(N, k, generator=generator) + 0.5
    x = native.sparse_decode(strength, chosen, W)
    g = torch.randn(N, d, generator=generator)
    return x, W, torch.zeros(F), g / g.norm(dim=1, keepdim=True)


def timed(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--isa", default=_cpu.isa(), choices=_cpu.isas())
    parser.add_argument("--beta", type=float, nargs="+", default=[0.1, 0.5, 1.0, 2.0, 4.0, 16.0])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    _cpu.set_isa(args.isa)
    N, d, F, k = args.rows, 768, 24576, 32
    dtype = getattr(torch, args.dtype)
    x, W, b, g = (t.to(dtype) for t in problem(N, d, F, k))
    print(f"N={N} d={d} F={F} k={k} {args.dtype}, {args.threads} threads, {args.isa}")
    print("beta |g|   route    ms   x plain  computed a/row  survivors/row  redone")
    for beta in args.beta:
        routes = ["dual", "pruned", "auto"] if dtype == torch.float32 else ["dual"]
        calls: dict[str, Callable[[], Any]] = {"plain": partial(native.topk_encode, x, W, b, k)}
        for route in routes:
            calls[route] = partial(
                native.grad_topk_encode_counted, x, g, W, b, W, k, beta, route=route
            )
        counts = {name: calls[name]()[2] for name in routes}
        rounds = [{n: timed(c) for n, c in calls.items()} for _ in range(args.repeats)]
        for name in calls:
            ms = 1e3 * min(r[name] for r in rounds)
            ratio = statistics.median(r[name] / r["plain"] for r in rounds)
            rows, survivors, redone, candidates = counts.get(name, (0, 0, 0, 0))
            print(
                f"{beta:8.2f}   {name:7s}{ms:6.0f}{ratio:9.2f}{candidates / N:16.0f}"
                f"{survivors / max(rows - redone, 1):15.0f}{redone:8d}",
                flush=True,
            )


if __name__ == "__main__":
    main()
