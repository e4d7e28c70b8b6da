# SPDX-License-Identifier: Apache-2.0
"""Coders on a part of the processes, while the others do something else."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import sub_mesh_jobs
import torch
from rank_cases import CASES, make, rows
from ranks import Failed, Pool
from training import LR

import ksae

STEPS = 5


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    pool = Pool(4)
    yield pool
    pool.close()


@pytest.mark.parametrize("case", ["multi, dead", "prefixes, batch"])
@pytest.mark.parametrize(
    ("mesh", "replicas"),
    [([1, 3], None), ([1, 2, 3], 3), ([[0, 2]], None), ([[0], [3]], None)],
    ids=["shards", "replicas", "2-d of shards", "2-d of replicas"],
)
def test_a_mesh_of_some_processes_trains_as_one(
    pool: Pool, mesh: list[Any], replicas: int | None, case: str
) -> None:
    model = make(case)
    step = ksae.TrainStep(model, LR, **CASES[case][2])
    want = [float(step(*rows(case, t))["loss"]) for t in range(STEPS)]
    answers = pool.values(sub_mesh_jobs.train, 4, case, mesh, replicas, STEPS)
    members = torch.tensor(mesh).flatten().tolist()
    for rank, answer in enumerate(answers):
        assert (answer is not None) == (rank in members)
        if answer is not None:
            assert answer[0] == pytest.approx(want, rel=1e-6)
            assert bool(answer[1]) == (rank == members[0])
    whole = answers[members[0]][1]
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(whole[name], tensor, rtol=1e-4, atol=1e-4, msg=name)


def test_spread_replicas_are_of_all_processes(pool: Pool) -> None:
    """For a group between them has to be made by all."""
    want = "shard: mesh must have all 4 processes in their order for 2 replicas of 2 ranks, got"
    for answer in pool.run(sub_mesh_jobs.train, 4, "plain", [[3, 1], [0, 2]], None, 1):
        assert isinstance(answer, Failed) and answer.message.startswith(want), answer
