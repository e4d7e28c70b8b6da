# SPDX-License-Identifier: Apache-2.0
"""What the tests share: implementations, shapes, data, dense model, tolerance rule."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from ksae import ops, reference
from ksae.backends import cpu as native

T = TypeVar("T")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NAMES = tuple(ops.serving())

# N, d, F, k: nothing a multiple of a vector, k = 1, k = F, no row, one row.
SHAPES: tuple[tuple[int, int, int, int], ...] = (
    (0, 7, 33, 4),
    (1, 1, 33, 1),
    (7, 17, 33, 33),
    (7, 64, 130, 5),
    (19, 100, 1000, 32),
)
if os.environ.get("TRITON_INTERPRET") == "1":  # its interpreter takes a second for a large one
    SHAPES = ((0, 7, 33, 4), (1, 1, 33, 1), (2, 17, 33, 33), (2, 140, 130, 5))


def dtype_id(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def implementations() -> list[str]:
    """Ids of the implementations that can run here."""
    if not native.available():
        return ["reference"]
    from ksae import _cpu

    return ["reference", *(f"cpu-{isa}" for isa in _cpu.isas())]


class Implementation:
    """The ops as one implementation computes them: `impl.topk(x, k)` and so on."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.native = name != "reference"

    def __getattr__(self, op: str) -> Any:
        return getattr(ops if self.native else reference, op)


# --------------------------------------------------------------------------------------------- data


def randn(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Normal numbers, rounded to dtype."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype)


def integers(
    *shape: int, dtype: torch.dtype = torch.float32, seed: int = 0, top: int = 3
) -> Tensor:
    """Integers in [-top, top]: sums of products are exact in any order, and ties abound."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-top, top + 1, shape, generator=generator).to(dtype)


def scores(kind: str, N: int, F: int, dtype: torch.dtype) -> Tensor:
    """Rows [N, F] that a selection can get wrong."""
    x = randn(N, F, dtype=dtype, seed=1)
    match kind:
        case "random":
            return x
        case "ties":
            return (x * 2).round()
        case "all equal":
            return torch.full_like(x, 0.5)
        case "all negative":
            return -x.abs() - 0.5
        case "zeros":  # -0 equals +0: the smaller index wins
            return torch.where(x > 0.5, 0.0, -0.0).to(dtype)
        case "infinite":
            x[:, ::5], x[:, ::3] = torch.inf, -torch.inf
            return x
        case "nan":
            x[:, 1::4], x[:, 2::7] = torch.nan, torch.inf
            x[1::2, ::3] = -torch.full((), torch.nan).to(dtype)  # the sign of a NaN does not count
            return x
        case "few values":
            return (x * 4).round().clamp(-3, 2) * 0.25
        case "one late winner":
            x = torch.full_like(x, -1.0)
            x[:, -1] = 1.0
            return x
        case "descending":
            return torch.arange(F, 0, -1.0).expand(N, F).contiguous().to(dtype)
    raise AssertionError(kind)


SCORES = (
    "random",
    "ties",
    "all equal",
    "all negative",
    "zeros",
    "infinite",
    "nan",
    "few values",
    "one late winner",
    "descending",
)


def code(
    N: int, F: int, k: int, dtype: torch.dtype, *, repeats: bool = True
) -> tuple[Tensor, Tensor]:
    """A sparse code with zeros: values [N, k] >= 0, indices [N, k] int64, perhaps repeated."""
    values = randn(N, k, dtype=dtype, seed=2).relu()
    generator = torch.Generator().manual_seed(3)
    if repeats:
        return values, torch.randint(0, F, (N, k), generator=generator)
    order = torch.rand(N, F, generator=generator).argsort(1)
    return values, order[:, :k].contiguous()


def row_arguments(
    dtype: torch.dtype,
    side: str,
    *,
    N: int = 19,
    d: int = 23,
    F: int = 33,
    ks: Sequence[int] = (5, 9),
    columns: tuple[int, int] | None = None,
    rounded: bool = False,
) -> dict[str, Any]:
    """Arguments of row_update for W_enc or W_dec in the middle of a run; no token uses the last
    latent, and row 3 of the matrix is zero. rounded: the residuals are in the weights' dtype."""
    acc, encoder = reference.accumulator(dtype), side == "encoder"
    codes = [code(N, F - 1, k, dtype) for k in ks]
    grouped = [reference.group_by_latent(v, i, F) for v, i in codes]
    W = randn(F, d, dtype=dtype, seed=4)
    W[3] = 0
    start, stop = columns or (0, d)
    kind = dtype if encoder or rounded else acc
    rows = [randn(N, d, dtype=kind, seed=9 + g)[:, start:stop].contiguous() for g in range(len(ks))]
    used = torch.zeros(F, dtype=torch.bool)  # the sums of a latent without entries are zero
    for offsets, _ in grouped:
        used |= offsets[1:] > offsets[:-1]
    sums = torch.where(used, randn(F, dtype=acc, seed=13), 0)
    signed = [torch.where(v > 0, randn(*v.shape, seed=7).to(acc), 0) for v, _ in codes]
    return {
        "coefficients": signed if encoder else [v for v, _ in codes],
        "offsets": [offsets for offsets, _ in grouped],
        "order": [order for _, order in grouped],
        "rows": [rows[0]] * len(ks) if encoder else rows,
        "scales": torch.tensor([0.5, 0.03, 0.1][: len(ks)], dtype=acc),
        "centre": randn(d, dtype=dtype, seed=8) if encoder else None,
        "grad_dot_w": None if encoder else sums,
        "grad_b_enc": sums if encoder else None,
        "W": W,
        "master": None if acc == dtype else _unrounded(W),
        "m": randn(F, d, seed=20).to(acc) * 0.1,
        "v": randn(F, d, seed=30).to(acc).square() * 0.1,
        "hyper": torch.tensor([1e-2, 0.7, 0.9, 0.99, 1e-8, 0.5, 0.1, 0.01], dtype=acc),
        "grad_b_dec": torch.zeros(d, dtype=acc) if encoder else None,
        "start": start,
        "normalize": not encoder,
    }


def norm_arguments(a: dict[str, Any]) -> list[Any]:
    """Of row_update's arguments those of row_grad_sq."""
    names = ("coefficients", "offsets", "order", "rows", "scales", "centre", "grad_dot_w", "W")
    return [*(a[name] for name in names), a["start"]]


def grad_encode_arguments(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    *,
    d_out: int | None = None,
    exact: bool = False,
) -> list[Tensor]:
    """x [N, d], grad [N, d_out], W_enc [F, d], b_enc [F], W_dec [F, d_out]."""
    N, d, F, _ = shape
    width = d if d_out is None else d_out
    make = integers if exact else randn
    sizes = [(N, d), (N, width), (F, d), (F,), (F, width)]
    return [make(*s, dtype=dtype, seed=i) for i, s in enumerate(sizes)]


def sums_arguments(dtype: torch.dtype, N: int = 19, F: int = 33) -> dict[str, Any]:
    """Arguments of latent_sums."""
    a = row_arguments(dtype, "decoder", N=N, F=F)
    acc = reference.accumulator(dtype)
    grads = [randn(*v.shape, dtype=acc, seed=7) for v in a["coefficients"]]
    return {
        "values": a["coefficients"],
        "grads": [torch.where(v == 0, 0, g) for v, g in zip(a["coefficients"], grads, strict=True)],
        **{name: a[name] for name in ("offsets", "order", "scales")},
    }


def terms_arguments(dtype: torch.dtype, N: int = 19, G: int = 3) -> dict[str, Any]:
    """Arguments of loss_terms."""
    acc = reference.accumulator(dtype)
    return {
        "sq_errors": [randn(N, seed=g).double().square() for g in range(G)],
        "denominators": [torch.tensor(3.0 + 7 * g, dtype=acc) for g in range(G)],
        "shares": [1.0, 0.125, 1 / 32][:G],
    }


def scalars_arguments(dtype: torch.dtype, clip: bool = True) -> dict[str, Any]:
    """Arguments of adam_scalars in the middle of a run."""
    acc = reference.accumulator(dtype)
    return {
        "loss": torch.tensor(0.7, dtype=acc),
        "norm": torch.tensor(2.5, dtype=acc) if clip else None,
        "clip_norm": 1.25 if clip else None,
        "scales": torch.tensor([0.5, 0.03], dtype=acc),
        "lr": torch.tensor(1e-3, dtype=torch.float64),
        "t": torch.tensor(6.0, dtype=torch.float64),
        "constants": torch.tensor([0.9, 0.999, 1e-8], dtype=torch.float64),
    }


def count_arguments(dtype: torch.dtype, F: int = 33) -> dict[str, Any]:
    """Arguments of count_tokens: latents that die, revive, and do neither."""
    generator = torch.Generator().manual_seed(F)
    counts = torch.randint(0, 3, (F + 1,), generator=generator).clamp(max=1)
    counts[0] = 0
    return {
        "loss": torch.tensor(0.7, dtype=reference.accumulator(dtype)),
        "taken": torch.tensor(True),
        "offsets": counts.cumsum(0).int(),
        "since": torch.randint(0, 1000, (F,), generator=generator),
        "t": torch.tensor(6.0, dtype=torch.float64),
        "tokens": 64,
        "dead_after": 500,
        "within": 200,
    }


def vector_arguments(
    dtype: torch.dtype, *shape: int, G: int = 2, extras: bool = True
) -> dict[str, Any]:
    """Arguments of vector_update; extras: weighted gradients, less another."""
    acc = reference.accumulator(dtype)
    p = randn(*shape, dtype=dtype, seed=4)
    a = row_arguments(dtype, "encoder")
    return {
        "grads": [randn(*shape, dtype=acc, seed=g) for g in range(G)],
        "scales": a["scales"][:1].repeat(G) if extras else None,
        "minus": randn(*shape, dtype=acc, seed=9) if extras else None,
        "taken": torch.tensor(True),
        "hyper": a["hyper"],
        "p": p,
        "master": None if acc == dtype else _unrounded(p),
        "m": randn(*shape, seed=20).to(acc) * 0.1,
        "v": randn(*shape, seed=30).to(acc).square() * 0.1,
    }


def written(a: dict[str, Any]) -> dict[str, Tensor]:
    """What row_update or vector_update writes and somebody reads."""
    names = ("W", "p", "master", "m", "v", "grad_b_dec", "since", "t")
    return {name: a[name] for name in names if a.get(name) is not None}


def at_rest(W: Tensor) -> dict[str, Any]:
    """Arguments of row_update that leave W as it is: no token, and a learning rate of 0."""
    a = row_arguments(W.dtype, "encoder", N=0, d=W.shape[1], F=W.shape[0], ks=(3,))
    a["hyper"][0] = 0
    bare = dict.fromkeys(("centre", "grad_b_enc", "grad_b_dec"))
    return a | bare | {"W": W, "v": a["v"] + 1}


def _unrounded(p: Tensor) -> Tensor:
    """A float32 master that rounds to p, as in the middle of training."""
    ulp = torch.finfo(p.dtype).eps
    return p.float() * (
        1 + 0.2 * ulp * torch.rand(p.shape, generator=torch.Generator().manual_seed(40))
    )


def clone_all(arguments: dict[str, Any]) -> dict[str, Any]:
    """A copy of an op's arguments."""
    return {name: clone(a) for name, a in arguments.items()}


def to_float64(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same numbers in the oracle's dtype, masters included."""

    def convert(a: Any) -> Any:
        if isinstance(a, list):
            return [convert(t) for t in a]
        return a.double() if isinstance(a, Tensor) and a.is_floating_point() else clone(a)

    return {name: convert(a) for name, a in arguments.items()}


def clone(a: Any) -> Any:
    """A copy of tensors and lists of tensors."""
    if isinstance(a, list):
        return [clone(t) for t in a]
    return a.clone() if isinstance(a, Tensor) else a


def dense_model(
    x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor, indices: Tensor
) -> Tensor:
    """The autoencoder with dense autograd and a given selection, in the dtype of its inputs."""
    u = torch.nn.functional.linear(x - b_dec, W_enc, b_enc)  # [N, F]
    chosen = torch.zeros_like(u).scatter(1, indices, 1.0)
    return (u.relu() * chosen) @ W_dec + b_dec


# ---------------------------------------------------------------------------------------- tolerance


def _error(got: Tensor, exact: Tensor) -> tuple[float, float]:
    """RMS and largest error."""
    if exact.numel() == 0:
        return 0.0, 0.0
    e = (got.detach().double() - exact.detach()).abs()
    return float(e.square().mean().sqrt()), float(e.max())


def assert_close(
    what: str, got: Tensor, plain: Tensor, exact: Tensor, floor: float | None = None
) -> None:
    """The tolerance rule: against the float64 oracle `exact`, the error of `got` is at most twice
    that of `plain`, which is plain torch in the same dtype, plus a floor of two units in the last
    place of got's dtype (relative to the largest number for the largest error, to the RMS for the
    RMS error). Infinite and NaN entries must agree exactly.
    """
    assert got.shape == exact.shape, (
        f"{what}: shape {list(got.shape)}, expected {list(exact.shape)}"
    )
    assert exact.dtype == torch.float64
    nan = exact.isnan()
    assert torch.equal(got.isnan(), nan), f"{what}: NaN in other places"
    infinite = exact.isinf()
    assert torch.equal(got.double()[infinite], exact[infinite]), f"{what}: infinite in other places"
    finite = ~(nan | infinite)
    floor = 2 * torch.finfo(got.dtype).eps if floor is None else floor
    rms, largest = _error(got[finite], exact[finite])
    plain_rms, plain_largest = _error(plain[finite], exact[finite])
    size = exact.detach()[finite].abs()
    scale_rms = float(size.square().mean().sqrt()) if size.numel() else 0.0
    scale_largest = float(size.max()) if size.numel() else 0.0
    if (
        rms <= 2 * plain_rms + floor * scale_rms
        and largest <= 2 * plain_largest + floor * scale_largest
    ):
        return
    error = torch.where(finite, (got.double() - exact).abs(), 0)
    rms, plain_rms = (r / max(scale_rms, 1e-300) for r in (rms, plain_rms))
    at = tuple(int(i) for i in torch.unravel_index(error.argmax(), error.shape))
    raise AssertionError(
        f"{what}: relative RMS error {rms:.3g} (plain torch {plain_rms:.3g});"
        f" worst at {list(at)}: {float(got[at]):.9g} for {float(exact[at]):.9g},"
        f" error {largest:.3g} (plain torch at worst {plain_largest:.3g})"
    )


def special_rows(d: int) -> Tensor:
    """Weights whose norms are hard to bound."""
    W = integers(20, d, top=511)  # of more bits than bf16 has
    W[0] = 0
    W[1], W[1, -1] = -0.0, 1e30  # its square overflows
    W[2] = 2.0**57.5  # a norm below 2^60, and above it for many columns
    W[3] = 2.0**61 / d**0.5
    W[4] = 2.0**58 / d**0.5
    W[5], W[6] = W[5] * 2.0**-70, W[6] * 2.0**-80  # squares underflow
    W[7], W[8] = W[7] * 2.0**-149, 2.0**-149
    W[9, 0], W[10, -1], W[11, d // 2] = torch.nan, torch.inf, -torch.inf
    W[12, 0] = 3.4e38  # its copy is infinite
    W[13] = 2.0**-60 * (1 + 2.0**-9)  # the copy loses most
    return W


def assert_rounded(what: str, got: Tensor, exact: Tensor, floor: float | None = None) -> None:
    """The tolerance rule with `exact`, rounded, for plain torch: what the reference is held to."""
    assert_close(what, got, exact.to(got.dtype), exact, floor)


def assert_norms(norms: Tensor, W: Tensor, W_bf16: Tensor) -> None:
    """norms [3, F] are the bounds of reference.bf16_norms, from above and not far."""
    d, exact = W.shape[1], [t.double() for t in (W, W_bf16)]
    wide = torch.stack([t.norm(dim=1) for t in (exact[0], exact[0] - exact[1], exact[1])])
    assert norms.shape == wide.shape and norms.dtype == torch.float32
    infinite = norms[0].isinf()
    assert (norms.isinf() == infinite).all() and not norms.isnan().any()
    assert infinite[~(wide[0] <= 2.0**60)].all() and not infinite[wide[0] < 2.0**59].any()
    got, wide = norms.double()[:, ~infinite], wide[:, ~infinite]
    assert (got >= wide).all(), f"below by {float((wide - got).max())}"
    assert (got <= wide * (1 + 2.0**-16 + d * 2.0**-22) + d**0.5 * 2.0**-62).all()


def assert_same(what: str, got: Tensor, expected: Tensor) -> None:
    """Equal dtype, shape and numbers; every NaN is the same number, and so are -0 and +0."""
    assert got.dtype == expected.dtype, f"{what}: {got.dtype}, expected {expected.dtype}"
    assert got.shape == expected.shape, (
        f"{what}: {list(got.shape)}, expected {list(expected.shape)}"
    )
    same = (got == expected) | (got.isnan() & expected.isnan())
    if not bool(same.all()):
        worst = tuple(int(i) for i in (~same).nonzero()[0])
        count = int((~same).sum())
        raise AssertionError(
            f"{what}: {count} differ, first at {list(worst)}: {got[worst]} for {expected[worst]}"
        )


def on_threads(run: Callable[[], T], counts: Sequence[int] = (1, 2, 3)) -> list[T]:
    """What `run` gives on so many threads each."""
    before, results = torch.get_num_threads(), []
    try:
        for count in counts:
            torch.set_num_threads(count)
            results.append(run())
    finally:
        torch.set_num_threads(before)
    return results


def hidden_winners() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x [1, 21], W [1100, 21] twice. Latent 500 scores highest; the products of bf16 copies rank it
    below ten others, whose copies lose nothing. The first W, the second x is rounded."""
    x, W = torch.ones(1, 21), torch.zeros(1100, 21)
    W[::110, 20] = 100
    W[500, :10], W[500, 10:20], W[500, 20] = 257, -256, 91  # 101; 91 of the copies
    row, exact = torch.full((1, 21), 257.0), torch.zeros(1100, 21)
    row[0, 20] = 57
    exact[::110, 20], exact[500, :10] = 45, 1  # 2565; 2570, and 2560 of the copies
    return x, W, row, exact
