# SPDX-License-Identifier: Apache-2.0
"""Copies of a coder, whole or each spread over ranks: steps against one process, and the rule."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import rank_jobs
import torch
from rank_cases import CASES, make, rows
from ranks import Pool
from training import LR

import ksae
from ksae.parallel import checkpoint
from ksae.parallel.cost import Sizes, bytes_sent
from ksae.parallel.layout import best_replicas

pytestmark = pytest.mark.nightly  # many processes

MESHES = ((2, 2), (3, 3), (4, 2))  # ranks, replicas
CHOSEN = (
    "unit rows", "clip", "skip, all", "batch, dead", "jump, dead", "prefixes, dead", "saelens",
    "batch_topk, prefixes, batch",
)  # fmt: skip


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    pool = Pool(4)
    yield pool
    pool.close()


def each_with_every_mesh() -> list[Any]:
    """Every case with every mesh."""
    return [pytest.param(case, *mesh) for case in CHOSEN for mesh in MESHES]


@pytest.mark.parametrize(("case", "R", "replicas"), each_with_every_mesh())
def test_twenty_steps_have_the_losses_of_one_process(
    pool: Pool, case: str, R: int, replicas: int
) -> None:
    model = make(case)
    step = ksae.TrainStep(model, LR, **CASES[case][2])
    want = [step(*rows(case, t)) for t in range(20)]
    answers = pool.values(rank_jobs.train, R, case, 20, replicas)
    metrics, whole = answers[0]
    assert all(theirs == metrics for theirs, _ in answers), "ranks must agree"
    for t, (got, exact) in enumerate(zip(metrics, want, strict=True)):
        assert got.keys() == exact.keys()
        for name, value in exact.items():
            assert got[name] == pytest.approx(float(value), rel=1e-6, abs=1e-9), (t, name)
    for name, tensor in model.state_dict().items():
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
    for R, replicas in MESHES[::2]:
        for metrics, buffers in pool.values(rank_jobs.train_by_gradient, R, 20, replicas):
            for got, exact in zip(metrics, want, strict=True):
                assert got == pytest.approx(exact, rel=1e-6)
            assert torch.equal(buffers[0], model.get_buffer("grad_rows"))
            torch.testing.assert_close(buffers[1], model.get_buffer("grad_square"))


def test_weights_of_16_bits(pool: Pool) -> None:
    torch.manual_seed(0)
    step = ksae.TrainStep(make("more dead than k_aux").bfloat16(), LR)
    want = [float(step(rows("plain", t)[0].bfloat16())["loss"]) for t in range(10)]
    for losses in pool.values(rank_jobs.train_in, 4, "bfloat16", 10, 2):
        assert losses[0] == pytest.approx(want[0], rel=1e-6)
        assert losses == pytest.approx(want, rel=2e-3)


def test_the_same_bits_on_every_run(pool: Pool) -> None:
    first, second = (pool.values(rank_jobs.train, 4, "skip, all", 5, 2)[0] for _ in range(2))
    assert first[0] == second[0]
    for name, tensor in first[1].items():
        assert torch.equal(tensor, second[1][name]), name


def test_a_checkpoint_is_for_any_mesh(pool: Pool, tmp_path: Path) -> None:
    case, folder = "jump, dead", tmp_path / "step_4"
    losses = pool.values(rank_jobs.save_half_way, 4, case, str(folder), 2)[0]
    for R, replicas in ((4, 2), (2, 2), (3, 1), (1, 1)):
        got = pool.values(rank_jobs.go_on, R, case, str(folder), replicas)[0]
        assert got == (losses if R == 4 else pytest.approx(losses, rel=1e-6))
    step = ksae.TrainStep(whole := make(case), LR, **CASES[case][2])
    for t in range(4):
        step(*rows(case, t))
    loaded = checkpoint.load_whole(folder)
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[name], tensor, rtol=1e-4, atol=1e-4)


def test_what_sends_least_is_chosen() -> None:
    """Few tokens beside latents are sent, few latents beside tokens are copied: float32 rows of
    16 F d against 8 N d bytes or more, and both between."""
    small, large = Sizes(8, 512, 256, 65536, 32), Sizes(8, 65536, 256, 2048, 32)
    assert best_replicas(small) == 1
    assert best_replicas(large) == 8
    middle = Sizes(8, 1024, 256, 4096, 32)
    D = best_replicas(middle)
    sent = {D: sum(bytes_sent(replace(middle, replicas=D)).values()) for D in (1, 2, 4, 8)}
    assert sent[D] == min(sent.values()) and 1 < D < 8
    # 8 N d against 16 F d bytes: by shards where N < 2 F in float32
    for F, want in ((1024, 1), (512, 2)):
        assert best_replicas(Sizes(2, 600, 4096, F, 1)) == want
