# SPDX-License-Identifier: Apache-2.0
"""A harvest shared by ranks: the rows of one process, each context run once, errors told to all."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import harvest_jobs
import pytest
import torch
from ranks import Failed, Pool

from ksae.activations import CacheWriter
from ksae.errors import UserError

pytestmark = pytest.mark.nightly  # many processes


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    pool = Pool(3)
    yield pool
    pool.close()


@pytest.mark.parametrize("R", [2, 3])
@pytest.mark.parametrize("kept", [True, False])
def test_the_rows_are_those_of_one_process(pool: Pool, tmp_path: Path, R: int, kept: bool) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # as the ranks
    source, everything = harvest_jobs.harvested(None, None)
    torch.set_num_threads(before)
    want = harvest_jobs.rows_of(source)
    folder = str(tmp_path / "cache") if kept else None
    answers = pool.values(harvest_jobs.together, R, folder)
    for rows, _ in answers:
        assert all(torch.equal(a, b) for a, b in zip(rows, want, strict=True))
    work = [seen for _, seen in answers]
    assert sorted(n for seen in work for n in seen) == sorted(everything) == list(range(11))
    assert max(map(len, work)) <= 2 * -(-6 // R)
    if kept:  # a finished one is read
        again = pool.values(harvest_jobs.together, R, folder)
        assert [seen for _, seen in again] == [[]] * R
        assert all(torch.equal(a, b) for a, b in zip(again[1][0], want, strict=True))


def test_an_unfinished_cache_is_gone_on_with(
    pool: Pool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(CacheWriter, "finish", lambda self: None)  # killed before its last shard
        with pytest.raises(UserError, match="is unfinished"):
            harvest_jobs.harvested(tmp_path / "half", None)
    want = harvest_jobs.rows_of(harvest_jobs.harvested(None, None)[0])
    half, whole = str(tmp_path / "half"), str(tmp_path / "whole")
    answers = pool.values(harvest_jobs.together, 2, whole, half)
    assert 0 < sum(len(seen) for _, seen in answers) < 11
    for got, exact in zip(answers[1][0], want, strict=True):
        torch.testing.assert_close(got, exact)


@pytest.mark.parametrize("kept", [True, False])
def test_an_error_of_one_is_told_to_all(pool: Pool, tmp_path: Path, kept: bool) -> None:
    answers = pool.run(harvest_jobs.broken, 3, str(tmp_path / "cache") if kept else None)
    for rank, answer in enumerate(answers):
        assert isinstance(answer, Failed)
        if rank == 1:
            assert (answer.kind, answer.message) == ("OSError", "the model has broken")
        else:
            assert answer.kind == "RankError"
            assert "rank 1 has stopped with OSError: the model has broken" in answer.message
