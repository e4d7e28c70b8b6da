# SPDX-License-Identifier: Apache-2.0
"""Latents spread over ranks: selection, steps and bytes against one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import rank_jobs
import torch
from cases import randn
from rank_cases import CASES, make, rows
from ranks import Pool
from torch import Tensor
from training import LR

import ksae
from ksae.coders.code import Code
from ksae.parallel import cost
from ksae.parallel.keys import keys_of

RANKS = (2, 3, 4)


Data = Callable[[], tuple[Tensor, Tensor, Tensor]]


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    pool = Pool(max(RANKS))
    yield pool
    pool.close()


def test_keys_have_the_order_of_selection() -> None:
    inf, nan = float("inf"), float("nan")
    scores = torch.tensor([1.0, -0.0, 0.0, nan, inf, -inf, 1.0, -1.0, 1e-45, -nan, -1e-45, 2.0])
    order = keys_of(scores, torch.arange(12)).argsort(descending=True)
    assert torch.equal(order, ksae.topk(scores, 12)[1])
    assert keys_of(scores[:1], torch.tensor([2**32 - 1])).item() >> 32 == 0x3F800000


# ---------------------------------------------------------------------------------------- selection


def ties() -> tuple[Tensor, Tensor, Tensor]:
    """Many latents are equal, in all remainders of R."""
    W = randn(7, 9, seed=1)[torch.arange(53) % 7].sign()
    return randn(12, 9, seed=2).sign(), W, torch.zeros(53)


def nans() -> tuple[Tensor, Tensor, Tensor]:
    """Rows that are NaN or infinite, and a latent that is NaN."""
    x, W = randn(12, 9, seed=3), randn(53, 9, seed=4)
    x[2], x[5, 3], W[17] = float("nan"), float("inf"), float("nan")
    return x, W, randn(53, seed=5)


def one_sided() -> tuple[Tensor, Tensor, Tensor]:
    """All winners are on rank 0, for each R; few pre-activations are positive otherwise."""
    b = torch.full((53,), -20.0)
    b[::12] = 50.0
    return randn(12, 9, seed=6), randn(53, 9, seed=7), b


@pytest.mark.parametrize("R", RANKS)
@pytest.mark.parametrize("data", [ties, nans, one_sided])
@pytest.mark.parametrize("k", [1, 5, 20, 53])
def test_selection_is_that_of_one_process(pool: Pool, R: int, data: Data, k: int) -> None:
    args = data()
    parts = compare(pool, R, k, *args, None)
    if data is one_sided and k <= 5:
        assert parts[0] and not any(parts[1:])


@pytest.mark.parametrize("R", RANKS)
@pytest.mark.parametrize("data", [ties, nans, one_sided])
@pytest.mark.parametrize("k", [1, 5, 53])
def test_a_batch_has_one_threshold(pool: Pool, R: int, data: Data, k: int) -> None:
    args = data()
    if data is ties and k == 5:  # the last of many that are equal decides
        values, *_ = ksae.batch_topk_encode(*args, k)
        more, *_ = ksae.batch_topk_encode(*args, k + 2)
        least = values.min()
        assert least > 0 and (more == least).sum() > (values == least).sum() > 1
    parts = compare(pool, R, k, *args, ksae.BatchTopK(k))
    if data is one_sided and k <= 5:
        assert parts[0] and not any(parts[1:])


@pytest.mark.parametrize("R", RANKS)
@pytest.mark.parametrize("beta", [None, 0.7])
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16])
def test_selection_is_by_scores(pool: Pool, R: int, beta: float | None, kind: torch.dtype) -> None:
    """Values are equal in 16 bits where scores are not, and not in the order of a gradient's."""
    x, W = 1 + randn(12, 16, seed=8).to(kind) / 64, 1 + randn(301, 16, seed=9).to(kind) / 64
    values, _ = ksae.topk_encode(x, W, torch.zeros(301, dtype=kind), 40)
    if kind == torch.bfloat16:
        assert len(values[0].unique()) < 20
    compare(pool, R, 40, x, W, torch.zeros(301, dtype=kind), beta)


def compare(
    pool: Pool,
    R: int,
    k: int,
    x: Tensor,
    W: Tensor,
    b: Tensor,
    by: float | ksae.BatchTopK | None,
) -> list[list[tuple[int, int, float]]]:
    """Entries of each rank, which together are those of one process."""
    if by is None:
        code = Code(*ksae.topk_encode(x, W, b, k))
    elif isinstance(by, float):
        code = Code(*ksae.grad_topk_encode(x, x.flip(0), W, b, W.flip(1), k, by))
    else:
        code = Code(*ksae.batch_topk_encode(x, W, b, k))
    at = code.values != 0
    entries = (code.rows()[at], code.indices[at], code.values[at])
    want = list(zip(*(t.tolist() for t in entries), strict=True))
    parts = pool.values(rank_jobs.select, R, k, x, W, b, by)
    got = [entry for part in parts for entry in part]
    assert repr(sorted(got, key=repr)) == repr(sorted(want, key=repr))  # NaN too
    return parts


# -------------------------------------------------------------------------------------------- steps


def each_with_some_rank() -> list[Any]:
    """Every case with every R, of which one is in the day's tests."""
    return [
        pytest.param(case, R, marks=[] if RANKS[i % len(RANKS)] == R else pytest.mark.nightly)
        for i, case in enumerate(CASES)
        for R in RANKS
    ]


@pytest.mark.parametrize(("case", "R"), each_with_some_rank())
def test_twenty_steps_have_the_losses_of_one_process(pool: Pool, case: str, R: int) -> None:
    model = make(case)
    step = ksae.TrainStep(model, LR, **CASES[case][2])
    want = [step(*rows(case, t)) for t in range(20)]
    answers = pool.values(rank_jobs.train, R, case, 20)
    metrics, whole = answers[0]
    assert all(theirs == metrics for theirs, _ in answers), "ranks must agree"
    if "dead" in CASES[case][1]:
        assert want[0]["dead"] > 0.1 and want[0]["auxk_loss"] > 0
    for t, (got, exact) in enumerate(zip(metrics, want, strict=True)):
        assert got.keys() == exact.keys()
        for name, value in exact.items():
            assert got[name] == pytest.approx(float(value), rel=1e-6, abs=1e-9), (t, name)
    for name, tensor in model.state_dict().items():
        # a first step of Adam is lr * sign: where a gradient is rounding, it may go either way
        torch.testing.assert_close(whole[name], tensor, rtol=1e-4, atol=1e-4, msg=name)
    assert torch.equal(whole["tokens_since_fired"], model.tokens_since_fired)


def test_a_gradient_chooses_as_in_one_process(pool: Pool) -> None:
    torch.manual_seed(0)
    model = make("gradient")
    step = ksae.TrainStep(model, LR, clip_norm=1.0)
    want = []
    for t in range(20):
        (x,) = rows("plain", t)
        want.append({n: float(v) for n, v in step(x, grad=x.flip(1)).items()})
    assert want[0]["dead"] > 0.1 and want[0]["auxk_loss"] > 0
    for R in RANKS:
        for metrics, buffers in pool.values(rank_jobs.train_by_gradient, R, 20):
            for got, exact in zip(metrics, want, strict=True):
                assert got == pytest.approx(exact, rel=1e-6)
            assert torch.equal(buffers[0], model.get_buffer("grad_rows"))
            torch.testing.assert_close(buffers[1], model.get_buffer("grad_square"))


@pytest.mark.parametrize("kind", ["bfloat16", "float16"])
def test_weights_of_16_bits(pool: Pool, kind: str) -> None:
    """Sums are in float32: the first loss is that of one process, and later ones are near it."""
    torch.manual_seed(0)
    step = ksae.TrainStep(make("more dead than k_aux").to(getattr(torch, kind)), LR)
    batches = (rows("plain", t) for t in range(10))
    want = [float(step(x.to(getattr(torch, kind)))["loss"]) for (x,) in batches]
    for R in RANKS:
        for losses in pool.values(rank_jobs.train_in, R, kind, 10):
            assert losses[0] == pytest.approx(want[0], rel=1e-6)
            assert losses == pytest.approx(want, rel=2e-3)


@pytest.mark.parametrize("R", RANKS)
def test_the_same_bits_on_every_run(pool: Pool, R: int) -> None:
    first, second = (pool.values(rank_jobs.train, R, "skip, all", 5)[0] for _ in range(2))
    assert first[0] == second[0]
    for name, tensor in first[1].items():
        assert torch.equal(tensor, second[1][name]), name


def test_one_rank_has_the_bits_of_one_device(pool: Pool) -> None:
    ((metrics, whole),) = pool.values(rank_jobs.train, 1, "multi, dead", 5)
    model = make("multi, dead")
    step = ksae.TrainStep(model, LR, **CASES["multi, dead"][2])
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as the rank: plain torch's sums of the loss depend on it
    for t in range(5):
        assert {n: float(v) for n, v in step(*rows("multi, dead", t)).items()} == metrics[t]
    torch.set_num_threads(before)
    for name, tensor in model.state_dict().items():
        assert torch.equal(whole[name], tensor), name


# -------------------------------------------------------------------------------------------- bytes


@pytest.mark.parametrize("kind", [4, 2])
@pytest.mark.parametrize("R", RANKS)
def test_a_step_sends_and_holds_what_the_formula_says(pool: Pool, R: int, kind: int) -> None:
    s = cost.Sizes(R, 96, 64, 1024, 8, kind)
    for held in same_bytes(pool, s):
        assert held == pytest.approx(cost.state_bytes(s), rel=0.01)
        whole = cost.state_bytes(cost.Sizes(1, R * s.n, s.d, s.F, s.k, s.itemsize))
        assert held <= 1.1 * whole / R


@pytest.mark.parametrize("R", RANKS)
def test_the_formula_of_a_batch_and_of_prefixes(pool: Pool, R: int) -> None:
    same_bytes(pool, cost.Sizes(R, 96, 64, 1024, 8, batch=True))
    same_bytes(pool, cost.Sizes(R, 96, 64, 1024, 8, prefixes=3), [100, 500, 1024])


@pytest.mark.parametrize(("R", "replicas"), [(2, 2), (3, 3), (4, 4), (4, 2)])
def test_the_formula_of_replicas(pool: Pool, R: int, replicas: int) -> None:
    same_bytes(pool, cost.Sizes(R, 1024, 64, 128, 16, replicas=replicas))  # all rows are touched


def same_bytes(pool: Pool, s: cost.Sizes, prefixes: list[int] | None = None) -> list[int]:
    """What each rank holds after a step that has sent what the formula says."""
    want, answers = cost.bytes_sent(s), pool.values(rank_jobs.count_bytes, s.R, s, prefixes)
    for sent, _ in answers:
        assert sent.keys() == want.keys()
        for name in ("rows", "candidates", "last keys", "partial sums", "residuals"):
            assert sent.get(name) == want.get(name), name
        assert sum(sent.values()) == pytest.approx(sum(want.values()), rel=0.02)
    return [held for _, held in answers]


def test_the_page_is_what_the_script_writes(monkeypatch: pytest.MonkeyPatch) -> None:
    from ksae.bench.studies import scale

    root = Path(__file__).parents[2]  # results are not installed
    monkeypatch.setattr(scale, "COUNTED", root / "bench" / "results" / "scale_counted.json")
    page = root / "docs" / "scale.md"
    assert page.read_text(encoding="utf-8") == scale.page()
