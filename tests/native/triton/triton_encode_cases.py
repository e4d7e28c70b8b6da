# SPDX-License-Identifier: Apache-2.0
"""The interpreted encodes against the reference; integers make sums exact.

Prints a JSON object: the name of each case that is asked for, and "equal" or what differs.
"""

import json
import sys

import torch
import triton_interpreter  # noqa: F401  first: sets the mode
from cases import assert_close, assert_same, integers, randn
from torch import Tensor

from ksae import reference
from ksae.kernels import grad_topk_encode as grad_encode
from ksae.kernels import topk_encode as encode

INF = torch.inf


def every(
    x: Tensor,
    W: Tensor,
    b: Tensor,
    b_dec: Tensor | None = None,
    mask: Tensor | None = None,
    activation: str = "relu",
    scale: Tensor | None = None,
    theta: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Scores and values of all latents [N, F], as topk_encode means them."""
    u = (x if b_dec is None else x - b_dec).float() @ W.float().T + b.float()
    u = u if scale is None else u * scale
    s = u.abs() if activation == "abs" else u
    lost = torch.zeros_like(s, dtype=torch.bool)
    lost = lost if theta is None else u <= theta
    lost = lost if mask is None else lost | ~mask
    s = s.masked_fill(lost, -INF)
    v = torch.where(u <= 0, 0, u) if activation == "relu" else u
    return s, v.masked_fill(s == -INF, 0)


DEFAULT = ("random", "k is F", "masked, overflow")  # the capacity that a caller gets


def topk_case(case: str) -> None:
    N, d, F, k = {
        "no row": (0, 7, 33, 4),
        "one row": (1, 1, 33, 1),
        "k is F": (2, 17, 33, 33),
        "two tiles of rows": (17, 3, 70, 1),
        "sampled": (2, 5, 2100, 4),
        "overflow of one row": (3, 17, 200, 6),
        "random": (5, 40, 300, 9),
        "winners at every place": (16, 16, 70, 5),
    }.get(case, (2, 17, 200, 6))
    dtype = {"half": torch.float16, "bf16": torch.bfloat16}.get(case, torch.float32)
    x, W = integers(N, d, dtype=dtype), integers(F, d, dtype=dtype, seed=1)
    b = integers(F, dtype=dtype, seed=2)
    meaning, way = {}, {"capacity": 64} if case not in DEFAULT else {}
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
        case "winners at every place":
            x, way = torch.eye(N, d, dtype=dtype), {"tau": everything, "capacity": 128}
            W[torch.arange(F), torch.arange(F) % N] = 1000
        case "room for many" | "absolute, room for many":  # more than are sorted
            way = {"tau": everything, "capacity": 2048}
            meaning["activation"] = "abs" if "absolute" in case else "relu"
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
    got = encode.topk_encode(x, W, b, k, **meaning, **way)
    score, values = every(x, W, b, **meaning)
    indices = reference.topk(score, k)[1]
    if not set(meaning) & {"activation", "scale", "theta"}:
        assert_same("indices, reference", got[1], reference.topk_encode(x, W, b, k, **meaning)[1])
    assert_same("indices", got[1], indices)
    assert_same("values", got[0], values.gather(1, indices).to(dtype))


def normal_case(case: str) -> None:
    """Normal numbers by the rule of cases.py; no two scores are close enough for another order."""
    op, name = case.split(", ")
    dtype = {"half": torch.float16, "bf16": torch.bfloat16, "float": torch.float32}[name]
    N, d, F, k = 2, 50, 200, 8
    sizes = (N, d), (N, d), (F, d), (F,), (F, d)
    x, g, W, b, W_dec = (randn(*s, dtype=dtype, seed=i) for i, s in enumerate(sizes))
    if op == "grad":
        run, arguments = "grad_topk_encode", (x, g, W, b, W_dec, k, 0.5)
        got = grad_encode.grad_topk_encode(*arguments, capacity=128)
    else:
        run, arguments = "topk_encode", (x, W, b, k)
        got = encode.topk_encode(*arguments, capacity=128)
    double = [a.double() if isinstance(a, Tensor) else a for a in arguments]
    exact, plain = getattr(reference, run)(*double), getattr(reference, run)(*arguments)
    assert_same("indices", got[1], exact[1])
    assert_close("values", got[0], plain[0], exact[0])


def dense_case(case: str) -> None:
    N, d, F, group = (5, 17, 200, 16) if case != "no row" else (0, 3, 70, 64)
    x, W, b = integers(N, d), integers(F, d, seed=1), integers(F, seed=2)
    meaning = {}
    match case:
        case "options":
            meaning = {"scale": 2.0 ** integers(F, seed=4), "mask": torch.arange(F) % 3 > 0}
        case "absolute":
            meaning = {"activation": "abs", "theta": integers(F, seed=4)}
        case "NaN":
            b[150] = torch.nan
    values, maxima = encode.dense_encode(x, W, b, group=group, **meaning)
    score, expected = every(x, W, b, **meaning)
    assert_same("values", values, expected)
    score = torch.nn.functional.pad(score, (0, -F % group), value=-INF)
    assert_same("maxima", maxima, score.unflatten(1, (-1, group)).amax(2))


def batch_case(case: str) -> None:
    N, d, F, k, most = 4, 17, 200, 4, 9
    x, W, b = integers(N, d), integers(F, d, seed=1), integers(F, seed=2)
    meaning, way = {}, {"capacity": 128}
    match case:
        case "guessed":
            x[3] *= 8  # more of its latents than `most` are among the N k largest
        case "short":
            way["tau"] = torch.tensor(1000.0)
        case "overflow":
            way["tau"] = torch.tensor(-INF)
        case "all equal":
            x[:] = 1
            W[:] = 1
        case "negative":
            b -= 1000
        case "masked":
            meaning["mask"] = torch.arange(F) % 60 == 0  # 4 a row: all of them
        case "NaN":
            b[150] = torch.nan
        case "cap":
            most = k  # then it is the plain selection
    got = encode.batch_topk_encode(x, W, b, k, most=most, **meaning, **way)
    score, values = every(x, W, b, **meaning)
    indices = reference.topk(score, most)[1]
    best = score.gather(1, indices)
    places = reference.topk(best.reshape(1, -1), N * k)[1][0]
    selected = torch.zeros(N * most, dtype=torch.bool).scatter(0, places, True).view(N, most)
    expected = torch.where(selected, values.gather(1, indices), 0)
    assert_same("values", got[0], expected)
    assert_same("threshold", got[2], best.flatten()[places[-1]])
    fired = (expected > 0) | expected.isnan()
    assert_same("indices", got[1][fired], indices[fired])
    assert all(len(set(row)) == most for row in got[1].tolist()), "an index twice"


def grad_case(case: str) -> None:
    mode, _, kind = case.partition(", ")
    N, d, F, k = 3, 17, 200, 6
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


CASES = {
    "topk": topk_case,
    "normal": normal_case,
    "dense": dense_case,
    "batch": batch_case,
    "grad": grad_case,
}


def outcome(name: str) -> str:
    op, _, case = name.partition(", ")
    try:
        CASES[op](case)
    except Exception as error:  # the report goes on with the next case
        return f"{type(error).__name__}: {error}"
    return "equal"


if __name__ == "__main__":
    print(json.dumps({name: outcome(name) for name in sys.argv[1:]}))
