# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of many ranks: read by any number of ranks, gathered into one file, or refused."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import rank_jobs
import torch
from rank_cases import make
from ranks import Failed, Pool

import ksae
from ksae.errors import UserError
from ksae.interop import convert
from ksae.parallel import checkpoint

CASE = "skip, all"


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    pool = Pool(4)
    yield pool
    pool.close()


@pytest.fixture(scope="module")
def saved(pool: Pool, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[float]]:
    folder = tmp_path_factory.mktemp("run") / "step_4"
    losses = pool.values(rank_jobs.save_half_way, 4, CASE, str(folder))
    assert losses[0] == losses[1]
    assert [p.name for p in folder.parent.iterdir()] == ["step_4"]  # nothing temporary is left
    return folder, losses[0]


@pytest.mark.parametrize("R", [4, 3, 2, 1])
def test_any_number_of_ranks_goes_on(pool: Pool, saved: tuple[Path, list[float]], R: int) -> None:
    folder, losses = saved
    got = pool.values(rank_jobs.go_on, R, CASE, str(folder))[0]
    assert got == (losses if R == 4 else pytest.approx(losses, rel=1e-6))


def test_one_device_saves_what_ranks_read(pool: Pool, tmp_path: Path) -> None:
    losses = pool.values(rank_jobs.save_half_way, 1, CASE, str(tmp_path / "a"))[0]
    assert pool.values(rank_jobs.go_on, 3, CASE, str(tmp_path / "a"))[0] == pytest.approx(
        losses, rel=1e-6
    )


def test_gathered_into_one_file(saved: tuple[Path, list[float]], tmp_path: Path) -> None:
    done = convert.convert(saved[0], tmp_path / "sae.safetensors", "ksae")
    one, whole = ksae.load(done.path), ksae.load(saved[0])
    assert one.config() == whole.config() == make(CASE).config()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(one.state_dict()[name], tensor), name
    with pytest.raises(UserError, match=r"as_topk must be False for .*: ksae convert --as-topk"):
        ksae.load(saved[0], as_topk=True)
    assert not torch.equal(one.W_enc, make(CASE).W_enc)


def test_what_cannot_be_read_is_told(saved: tuple[Path, list[float]], tmp_path: Path) -> None:
    folder = saved[0]
    with pytest.raises(UserError, match=r"must be a sharded checkpoint, got no sharded\.json"):
        checkpoint.load_whole(tmp_path)
    with pytest.raises(UserError, match=r"must be of a coder with k = 3, got 5"):
        checkpoint.load_sharded(folder, ksae.Transcoder(17, 23, 97, 3, skip=True))
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "__2_0.distcp").unlink()
    with pytest.raises(UserError, match=r"2/model\.W_enc of .* cannot be read"):
        checkpoint.load_whole(broken)
    (broken / ".metadata").unlink()
    with pytest.raises(UserError, match=r"must be whole, got a folder without \.metadata"):
        checkpoint.load_whole(broken)


def test_what_cannot_be_written_is_told_to_all(pool: Pool, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    answers = pool.run(rank_jobs.save_half_way, 2, CASE, str(tmp_path / "file" / "step_4"))
    assert isinstance(answers[0], Failed) and isinstance(answers[1], Failed)
    assert answers[0].kind == "UserError" and "save: cannot write" in answers[0].message
    assert (
        answers[1].kind == "RankError" and "rank 0 has stopped with UserError" in answers[1].message
    )
