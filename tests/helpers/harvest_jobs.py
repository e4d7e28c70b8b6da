# SPDX-License-Identifier: Apache-2.0
"""Jobs for `ranks.Pool`: a language model's activations, harvested by all ranks together."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import tiny_lm
import torch
import torch.distributed as dist
from torch import Tensor

from ksae.activations import ArraySource, harvest, open_cache
from ksae.parallel.ranks import Ranks

HOOK = "layers.0.resid_post"
CONTEXTS, AT_ONCE = 11, 2  # six batches, the last of one context


def harvested(
    folder: Path | None, ranks: Ranks | None, broken: int = -1
) -> tuple[ArraySource, list[int]]:
    """The activations, and the contexts that this process has run its model on."""
    torch.manual_seed(0)
    contexts, seen = tiny_lm.contexts(CONTEXTS), []
    model = tiny_lm.language_model()

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        ids = kwargs["input_ids"].int()
        where = [(contexts.ids == row).all(1).nonzero()[0].item() for row in ids]
        if broken in where:
            raise OSError("the model has broken")
        seen.extend(where)

    model.register_forward_pre_hook(note, with_kwargs=True)
    options = {"gradient": "labels", "target_hook": "layers.1.resid_post", "shard_tokens": 50}
    source = harvest(
        model, contexts, HOOK, folder, batch_size=AT_ONCE, progress=False, ranks=ranks, **options
    )
    return source, seen


def rows_of(source: ArraySource) -> tuple[Tensor, ...]:
    columns = zip(*source.gradient_sweep(7), strict=True)
    return tuple(torch.cat(list(column)) for column in columns)


def together(group: Any, folder: str | None, half: str | None = None) -> tuple[Any, list[int]]:
    """Rows, and contexts run here; with `half` from a copy of that unfinished cache on."""
    ranks = Ranks(group)
    if half is not None and folder is not None and ranks.rank == 0:
        shutil.copytree(half, folder)
    dist.barrier(group)
    source, seen = harvested(None if folder is None else Path(folder), ranks)
    if folder is not None:
        assert open_cache(folder).meta["complete"]
    return rows_of(source), seen


def broken(group: Any, folder: str | None) -> None:
    """The model of rank 1 fails in its second batch."""
    rank = dist.get_rank(group)
    harvested(None if folder is None else Path(folder), Ranks(group), 8 if rank == 1 else -1)
