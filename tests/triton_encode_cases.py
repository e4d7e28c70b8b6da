# SPDX-License-Identifier: Apache-2.0
"""The interpreted encodes against the reference; integers make sums exact.

Prints a JSON object: the name of each case that is asked for, and "equal" or what differs.
"""

import json
import sys

import torch
import triton_interpreter  # noqa: F401  first: sets the mode
from cases import assert_same, integers
from torch import Tensor

from ksae import reference
from ksae.kernels import encode, grad_encode

INF = torch.inf


def chosen(
    x: Tensor,
    W: Tensor,
    b: Tensor,
    k: int,
    b_dec: Tensor | None = None,
    mask: Tensor | None = None,
    activation: str = "relu",
    scale: Tensor | None = None,
    theta: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """What topk_encode means, from the matrix of all scores."""
    u = (x if b_dec is None else x - b_dec).float() @ W.float().T + b.float()
    u = u if scale is None else u * scale
    s = u.abs() if activation == "abs" else u
    lost = torch.zeros_like(s, dtype=torch.bool)
    lost = lost if theta is None else u <= theta
    lost = lost if mask is None else lost | ~mask
    s = s.masked_fill(lost, -INF)
    indices = reference.topk(s, k)[1]
    v = u.gather(1, indices)
    v = torch.where(v <= 0, 0, v) if activation == "relu" else v
    return v.masked_fill(s.gather(1, indices) == -INF, 0).to(x.dtype), indices


def topk_case(case: str) -> None:
    N, d, F, k = {
        "random": (5, 40, 300, 9),
        "no row": (0, 7, 33, 4),
        "one row": (1, 1, 33, 1),
        "k is F": (2, 17, 33, 33),
        "two tiles of rows": (17, 3, 70, 1),
        "sampled": (2, 5, 2100, 4),
    }.get(case, (3, 17, 200, 6))
    dtype = {"half": torch.float16, "bf16": torch.bfloat16}.get(case, torch.float32)
    x, W = integers(N, d, dtype=dtype), integers(F, d, dtype=dtype, seed=1)
    b = integers(F, dtype=dtype, seed=2)
    meaning, way = {}, {"capacity": 128} if case != "random" else {}
    everything, nothing = torch.full((N,), -INF), torch.full((N,), INF)
    living = torch.arange(F) % 50 == 0  # fewer than k
    match case:
        case "overflow":  # the guess lets everything through; a buffer is compacted on the way
            way["tau"] = everything
        case "overflow of one row":
            way["tau"] = torch.tensor([20.0, -INF, 20.0])
        case "shortfall":
            way["tau"] = nothing
        case "all equal":
            W = torch.ones_like(W)
        case "infinite":
            b[:] = -INF
            b[77] = INF
        case "one NaN latent":  # the guess is met by others: no redo would bring a lost NaN back
            b[150], way["tau"] = torch.nan, torch.full((N,), 20.0)
        case "NaN row":
            x[1] = torch.nan
        case "winners in one tile":
            b[128:140] = 1000
        case "centred":
            meaning["b_dec"] = integers(d, seed=3)
        case "masked":
            meaning["mask"] = living
        case "masked, overflow":
            meaning["mask"], way["tau"] = torch.arange(F) % 2 == 0, everything
        case "scaled":
            meaning["scale"] = 2.0 ** integers(F, seed=4)
        case "linear":
            b, meaning["activation"] = b - 30, "none"
        case "absolute":
            meaning["activation"] = "abs"
        case "absolute, overflow":
            meaning["activation"], way["tau"] = "abs", everything
        case "absolute, shortfall":
            meaning["activation"], way["tau"] = "abs", nothing
        case "absolute, masked":
            meaning |= {"activation": "abs", "mask": living}
        case "thresholds":  # some rows have fewer than k above theirs
            meaning["theta"] = 20 + integers(F, seed=4)
        case "thresholds, overflow":
            meaning["theta"], way["tau"] = integers(F, seed=4), everything
        case "threshold that nothing reaches":
            meaning |= {"theta": torch.full((F,), 1e6), "activation": "abs"}
    got, expected = encode.topk_encode(x, W, b, k, **meaning, **way), chosen(x, W, b, k, **meaning)
    if not set(meaning) & {"activation", "scale", "theta"}:
        assert_same("indices, reference", got[1], reference.topk_encode(x, W, b, k, **meaning)[1])
    assert_same("indices", got[1], expected[1])
    assert_same("values", got[0], expected[0])


def grad_case(case: str) -> None:
    mode, _, kind = case.partition(", ")
    N, d, F, k = 4, 17, 200, 6
    dtype = {"half": torch.float16, "bf16": torch.bfloat16}.get(kind, torch.float32)
    width = 70 if kind == "wide" else d
    sizes = (N, d), (N, width), (F, d), (F,), (F, width)
    x, g, W, b, W_dec = (integers(*s, dtype=dtype, seed=i) for i, s in enumerate(sizes))
    g[1] = 0
    g[2, 3] = INF
    beta, way, b_dec = 0.25, {"capacity": 128}, None
    match kind:
        case "overflow":
            way["tau"] = torch.full((N,), -INF)
        case "shortfall":
            way["tau"] = torch.full((N,), INF)
        case "no beta":
            beta = 0.0
        case "no gradient":
            g[:] = -0.0
        case "NaN":
            g[2, 3], W_dec[7, 2], b[9] = torch.nan, torch.nan, torch.nan
        case "infinite":
            W_dec[7, 2], b[9], b[10] = INF, INF, -INF
        case "negative":
            b -= 100
        case "centred":
            b_dec = integers(d, dtype=dtype, seed=9)
    arguments = x, g, W, b, W_dec, k, beta, mode, b_dec
    got = grad_encode.grad_topk_encode(*arguments, **way)
    expected = reference.grad_topk_encode(*arguments)
    assert_same("indices", got[1], expected[1])
    assert_same("values", got[0], expected[0])


def outcome(name: str) -> str:
    op, _, case = name.partition(", ")
    try:
        {"topk": topk_case, "grad": grad_case}[op](case)
    except Exception as error:  # the report goes on with the next case
        return f"{type(error).__name__}: {error}"
    return "equal"


if __name__ == "__main__":
    print(json.dumps({name: outcome(name) for name in sys.argv[1:]}))
