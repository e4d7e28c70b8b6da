# SPDX-License-Identifier: Apache-2.0
"""The on-disk cache: atomic writing, resuming, and damage."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

from ksae.activations import ArraySource, CacheWriter, cache, open_cache, open_source
from ksae.errors import UserError
from ksae.files import checksum

IDENTITY = {"model": "m", "hook": "h", "dtype": "float32"}
PER_CONTEXT = 5


def rows(context: int, d: int = 3, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    first = context * PER_CONTEXT
    numbers = torch.arange(first, first + PER_CONTEXT)
    return {
        "x": numbers[:, None].expand(-1, d).to(dtype),
        "tokens": (1000 + numbers).int(),
        "contexts": torch.full((PER_CONTEXT,), context, dtype=torch.int32),
        "positions": torch.arange(PER_CONTEXT, dtype=torch.int32),
    }


def fill(folder: Path, contexts: int = 10, **options: Any) -> CacheWriter:
    writer = CacheWriter(folder, IDENTITY, shard_tokens=2 * PER_CONTEXT)
    for context in range(writer.contexts_done, contexts):
        writer.append(rows(context, **options), context + 1)
    return writer


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_round_trip(tmp_path: Path) -> None:
    fill(tmp_path / "a" / "b", contexts=9, dtype=torch.bfloat16).finish()
    source = open_source(tmp_path / "a" / "b", buffer_tokens=12)
    assert (source.d_in, source.dtype, source.num_tokens) == (3, torch.bfloat16, 45)
    assert source.meta["identity"] == IDENTITY  # type: ignore[attr-defined]
    assert torch.equal(
        torch.cat([x for x, _ in source.sweep(7)])[:, 0], torch.arange(45).bfloat16()
    )
    epoch = torch.cat([x[:, 0] for x, _ in islice(source.batches(9), 5)])
    assert sorted(epoch.tolist()) == list(range(45))


def test_rows_know_their_tokens(tmp_path: Path) -> None:
    fill(tmp_path).finish()
    source = open_cache(tmp_path)
    tokens, contexts, positions = source.tokens_of(torch.tensor([0, 49, 27]))
    assert tokens.tolist() == [1000, 1049, 1027]
    assert contexts.tolist() == [0, 9, 5]
    assert positions.tolist() == [0, 4, 2]
    assert source.context(27) == ([1025, 1026, 1027, 1028, 1029], 2)
    with pytest.raises(UserError, match=r"row must be in \[0, 50\), got 50"):
        source.context(50)


def test_a_writer_goes_on_where_one_stopped(tmp_path: Path) -> None:
    fill(tmp_path / "whole").finish()
    fill(tmp_path / "part", contexts=5)  # killed: the fifth context is in no shard
    (tmp_path / "part" / ".tmp-shard_00002.safetensors").write_text("half")
    with pytest.raises(UserError, match=r"is unfinished \(20 rows\)"):
        open_cache(tmp_path / "part")
    writer = fill(tmp_path / "part")
    assert writer.contexts_done == 10
    writer.finish()
    assert visible(tmp_path / "part") == visible(tmp_path / "whole")
    for name in visible(tmp_path / "whole"):
        assert (tmp_path / "part" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_foreign_folders_are_refused_untouched(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("irreplaceable")
    for _ in range(2):
        with pytest.raises(UserError, match="is not an activation cache"):
            CacheWriter(tmp_path, IDENTITY)
        assert visible(tmp_path) == ["thesis.txt"]
    other = tmp_path / "other"
    fill(other).finish()
    with pytest.raises(UserError, match="holds activations with hook h, not g"):
        CacheWriter(other, {**IDENTITY, "hook": "g"})
    (tmp_path / "meta.json").write_text(json.dumps({"format": "something else"}))
    with pytest.raises(UserError, match="is not the description"):
        open_cache(tmp_path)
    with pytest.raises(UserError, match="cannot use this folder"):
        CacheWriter(tmp_path / "thesis.txt", IDENTITY)


@pytest.mark.parametrize("damage", ["truncated", "missing", "exchanged", "newer", "broken"])
def test_damage_is_a_one_line_error(damage: str, tmp_path: Path) -> None:
    fill(tmp_path).finish()
    shard = tmp_path / "shard_00001.safetensors"
    meta = json.loads((tmp_path / "meta.json").read_text())
    if damage == "truncated":
        shard.write_bytes(shard.read_bytes()[:-10])
        message = "shard_00001.safetensors: has .* bytes instead of"
    elif damage == "missing":
        shard.unlink()
        message = "shard_00001.safetensors: is missing"
    elif damage == "exchanged":
        shard.write_bytes(b"\xff" * shard.stat().st_size)
        message = "shard_00001.safetensors: truncated or not"
    elif damage == "newer":
        (tmp_path / "meta.json").write_text(json.dumps({**meta, "format_version": 99}))
        message = "newer ksae"
    else:
        (tmp_path / "meta.json").write_text("{")
        message = "is not the description"
    with pytest.raises(UserError, match=message) as caught:
        open_cache(tmp_path)
    assert "\n" not in str(caught.value)


READS: dict[str, Callable[[ArraySource], object]] = {
    "sweep": lambda source: list(source.sweep(1000)),
    "batches": lambda source: list(islice(source.batches(100), 5)),
    "gather": lambda source: source.gather(torch.tensor([0, source.num_tokens - 1])),
    "tokens": lambda source: source.tokens_of(torch.tensor([source.num_tokens - 1])),
    "context": lambda source: source.context(source.num_tokens - 1),
    "held out": lambda source: list(source.part(600, source.num_tokens).sweep(100)),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_200_kb_of_zeros_in_a_shard_are_noticed(
    read: Callable[[ArraySource], object], tmp_path: Path
) -> None:
    """Whatever reads rows of the shard; what reads others goes on."""
    writer = CacheWriter(tmp_path, IDENTITY, shard_tokens=100 * PER_CONTEXT)
    for context in range(200):
        writer.append(rows(context, d=200), context + 1)
    writer.finish()
    read(open_cache(tmp_path))
    shard = tmp_path / "shard_00001.safetensors"
    with shard.open("r+b") as file:
        file.seek(shard.stat().st_size // 2)
        file.write(bytes(200_000))
    source = open_cache(tmp_path)  # in which only headers are read
    source.gather(torch.tensor([0]))
    list(source.part(0, 500).sweep(100))
    for _ in range(2):  # and again
        with pytest.raises(UserError, match=r"shard_00001.safetensors: is damaged") as caught:
            read(source)
    assert "\n" not in str(caught.value)


def test_a_shard_is_compared_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path).finish()
    compared = []
    original = checksum.of_file
    monkeypatch.setattr(checksum, "of_file", lambda p: compared.append(p.name) or original(p))
    source = open_cache(tmp_path)
    assert compared == []
    for _ in range(3):
        list(source.sweep(7))
        list(islice(source.batches(20), 9))
    assert sorted(compared) == [f"shard_{n:05d}.safetensors" for n in range(5)]


def test_a_cache_without_checksums_still_opens(tmp_path: Path) -> None:
    """As earlier versions wrote it, also half of it."""
    writer = fill(tmp_path, contexts=5)
    for shard in writer.meta["shards"]:
        del shard["crc32"]
    (tmp_path / "meta.json").write_text(json.dumps(writer.meta))
    fill(tmp_path).finish()
    meta = json.loads((tmp_path / "meta.json").read_text())
    assert ["crc32" in shard for shard in meta["shards"]] == [False, False, True, True, True]
    source = open_cache(tmp_path)
    assert torch.equal(torch.cat([x for x, _ in source.sweep(7)])[:, 0], torch.arange(50.0))


@pytest.mark.parametrize("target", ["shard_00001.safetensors", "meta.json"])
def test_a_full_disk_leaves_no_half_file_and_can_be_gone_on_with(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(tmp_path / "whole").finish()
    full = tmp_path / "full"
    writes = 0

    def fsync(descriptor: int) -> None:
        nonlocal writes
        if os.readlink(f"/proc/self/fd/{descriptor}").endswith(f".tmp-{target}"):
            writes += 1
            if target != "meta.json" or writes == 2:
                raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(cache.os, "fsync", fsync)
        with pytest.raises(UserError, match="no space left to write") as caught:
            fill(full)
    assert "\n" not in str(caught.value)
    assert not [name for name in visible(full) if name.startswith(".tmp-")]
    done = CacheWriter(full, IDENTITY, shard_tokens=2 * PER_CONTEXT).contexts_done
    assert done == (0 if target == "meta.json" else 2)
    fill(full).finish()
    for name in visible(tmp_path / "whole"):
        assert (full / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_really_full_disk(tmp_path: Path) -> None:
    """/dev/full refuses every write as a full disk does."""
    os.symlink("/dev/full", tmp_path / ".tmp-shard_00000.safetensors")
    with pytest.raises(UserError, match="no space left"):
        cache._write_file(tmp_path / "shard_00000.safetensors", b"x" * 100)
    assert visible(tmp_path) == []


def test_an_empty_cache_is_an_error(tmp_path: Path) -> None:
    fill(tmp_path, contexts=0).finish()
    with pytest.raises(UserError, match="at least one row, got none"):
        open_cache(tmp_path)
