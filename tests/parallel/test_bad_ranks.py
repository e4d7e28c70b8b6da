# SPDX-License-Identifier: Apache-2.0
"""Ranks that differ, are missing or end: an error on every rank that says so, and no hang."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import rank_jobs
from ranks import Failed, Pool

import ksae


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    pool = Pool(4)
    yield pool
    pool.close()


@pytest.mark.parametrize(
    ("how", "says"),
    [
        (
            "k",
            "shard: the setting k must be the same on all ranks, got 5 on rank 0 and 6 on rank 1",
        ),
        (
            "version",
            f"shard: the version of ksae must be the same on all ranks, got {ksae.__version__}",
        ),
        ("seed", "shard: W_enc, by the sum of its bits, must be the same on all ranks"),
        ("betas", "TrainStep: betas must be the same on all ranks, got (0.9, 0.999) on rank 0"),
        ("lr", "TrainStep: the learning rate must be the same on all ranks, got 0.001 on rank 0"),
        ("rows", "TrainStep: the shape of x must be the same on all ranks, got [6, 8] on rank 0"),
        ("y", "TrainStep: the shape of y must be the same on all ranks, got None on rank 0"),
    ],
)
def test_a_difference_is_named_on_every_rank(pool: Pool, how: str, says: str) -> None:
    for answer in pool.run(rank_jobs.differ, 3, how):
        assert isinstance(answer, Failed) and answer.kind == "ValueError", answer
        assert answer.message.startswith(says), answer.message


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("bad lr", "TrainStep: lr must be a finite number >= 0, got -1.0"),
        ("width", "TopKSAE: x must be of shape [..., 8], got [6, 9]"),
    ],
)
def test_what_one_rank_refuses_is_told_to_all(pool: Pool, how: str, says: str) -> None:
    for rank, answer in enumerate(pool.run(rank_jobs.differ, 3, how)):
        assert isinstance(answer, Failed)
        if rank == 1:
            assert (answer.kind, answer.message) == ("ValueError", says)
        else:
            assert answer.kind == "RankError"
            assert f"rank 1 has stopped with ValueError: {says}" in answer.message


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("few", "shard: sae must have at least 4 latents, one a rank, got 2"),
        ("float64", "shard: sae must be float32, bfloat16 or float16, got torch.float64"),
        (
            "activation",
            "shard: sae must have an activation of TopK, GradTopK, BatchTopK, JumpReLU, AbsTopK,",
        ),
        (
            "relu",
            "shard: sae must have an activation of TopK, GradTopK, BatchTopK, JumpReLU, AbsTopK,"
            " got ReLU",
        ),
        (
            "norm",
            "shard: sae must have an activation of TopK, GradTopK, BatchTopK, JumpReLU, AbsTopK,",
        ),
        ("abs", "shard: sae must be float32 with AbsTopK, got torch.bfloat16"),
        ("tanh", "shard: sae must have JumpReLU with the penalty l0 or target_l0, got tanh"),
        ("batch", "shard: sae must be float32 with BatchTopK, got torch.bfloat16"),
        ("3-d", "shard: mesh must have 1 or 2 dimensions, got 3 of sizes (2, 2, 1)"),
        ("replicas", "shard: replicas must divide the 4 ranks, got 3"),
        ("type", "shard: mesh must be a DeviceMesh, a ProcessGroup or None, got int"),
        ("twice", "shard: sae must be whole, got one that is spread over ranks"),
        ("autograd", "TrainStep: fused must be True for a coder spread over ranks, got False"),
        ("forward", "TopKSAE: forward must be called on a whole coder, got the part of rank"),
        ("save", "TopKSAE: save must be called on a whole coder, got the part of rank"),
    ],
)
def test_what_there_is_not(pool: Pool, how: str, says: str) -> None:
    for answer in pool.run(rank_jobs.refused, 4, how):
        assert isinstance(answer, Failed) and answer.kind in ("ValueError", "TypeError")
        assert answer.message.startswith(says), answer.message


def test_a_mesh_and_the_meta_device(pool: Pool) -> None:
    one = [(0, 11), (1, 10), (2, 10), (3, 10)]
    two = [(0, 21), (1, 20), (0, 21), (1, 20)]
    assert pool.values(rank_jobs.on_a_mesh, 4) == [
        list(pair) for pair in zip(one, two, strict=True)
    ]
    for rank, (shape, ratio) in enumerate(pool.values(rank_jobs.from_meta, 3)):
        assert shape == [14 - (rank == 2), 8, 41]
        assert ratio < 0.8


WHOLE, DIFFERS = "1 x 3 of ranks [0, 1, 2]", "shard: the mesh must be the same on all ranks, got "


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("no mesh", "shard: mesh must be a DeviceMesh, a ProcessGroup or None, got str"),
        pytest.param(
            "a part",
            f"{DIFFERS}{WHOLE} on rank 0 and 1 x 2 of ranks [0, 1] on rank 1",
            marks=pytest.mark.nightly,
        ),
        pytest.param(
            "not in it",
            "shard: mesh must have this process in it, got [0, 2] without rank 1",
            marks=pytest.mark.nightly,
        ),
        pytest.param(
            "replicas",
            f"{DIFFERS}{WHOLE} on rank 0 and 3 x 1 of ranks [0, 1, 2] on rank 1",
            marks=pytest.mark.nightly,
        ),
    ],
)
def test_another_mesh_on_one_rank_is_told_to_all(how: str, says: str) -> None:
    """Each says it or has been told, and none waits for the time-out."""
    pool = Pool(3, timeout=100.0)
    assert pool.values(rank_jobs.nothing, 3) == [None] * 3
    start = time.monotonic()
    answers = pool.run(rank_jobs.odd_mesh, 3, how)
    assert time.monotonic() - start < 60
    pool.close()
    said = [answer for answer in answers if isinstance(answer, Failed)]
    assert len(said) == 3, answers
    for answer in said:
        assert DIFFERS in answer.message or says in answer.message, answer.message
        assert "rank 1" in answer.message or answer.kind == "TypeError"
    assert any(says in answer.message for answer in said)


def test_one_process_has_no_ranks() -> None:
    with pytest.raises(ValueError, match=r"torch\.distributed must be set up"):
        ksae.shard(ksae.TopKSAE(8, 32, 2))


@pytest.mark.parametrize("how", ["killed", pytest.param("absent", marks=pytest.mark.nightly)])
def test_a_rank_that_is_gone_is_an_error_within_the_time_out(how: str) -> None:
    pool = Pool(3, timeout=10.0)
    start = time.monotonic()
    answers = pool.run(rank_jobs.silent, 3, how)
    assert time.monotonic() - start < 60  # with the start of three processes
    pool.close()
    for rank in (0, 2):
        assert isinstance(answers[rank], Failed) and answers[rank].kind == "RankError", answers
        said = f"rank {rank} of 3: the exchange of agreement must reach all ranks"
        assert answers[rank].message.startswith(said)
    assert answers[1] == (Failed("ended", "", "") if how == "killed" else None)
