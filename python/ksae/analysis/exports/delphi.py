# SPDX-License-Identifier: Apache-2.0
"""The latent cache of delphi (EleutherAI's automated interpretability): every firing of a text."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save
from torch import nn

from ksae.activations import Contexts
from ksae.analysis.dashboard.survey import firings
from ksae.analysis.exports.pages import put
from ksae.coders.coder import SparseCoder
from ksae.errors import UserError

SPLITS = 5  # files, as delphi makes by default


@torch.no_grad()
def delphi(
    coder: SparseCoder,
    model: nn.Module,
    contexts: Contexts,
    hook: str,
    out: Path,
    *,
    model_name: str,
    dataset: str = "",
    splits: int = SPLITS,
    progress: Callable[[int], object] | None = None,
) -> Path:
    """Write `out/HOOK/`: a file of firings for each range of latents, and config.json. Returns the
    folder.

    A file FIRST_LAST.safetensors has `locations` [E, 3] (context, position, latent less FIRST) as
    uint16 or uint32, `activations` [E] float16 and `tokens` [contexts, length].

    Memory: 16 bytes a firing.

    Raises:
        UserError: an activation does not fit float16, in which delphi keeps them.
    """
    columns: list[tuple[np.ndarray, ...]] = []
    for row, latent, value, places in firings(coder, model, contexts, hook):
        if len(value) and float(value.max()) > float(np.finfo(np.float16).max):
            raise UserError(f"delphi: activations must fit float16, got {float(value.max()):g}")
        columns.append((places[row].astype(np.int64), latent, value.astype(np.float16)))
        if progress is not None:
            progress(len(places))
    place, latent, value = (np.concatenate(column) for column in zip(*columns, strict=True))
    length = contexts.ids.shape[1]
    folder = out / hook
    bounds = np.linspace(0, coder.d_sae, min(splits, coder.d_sae) + 1).astype(int).tolist()
    for first, end in pairwise(bounds):
        mine = (latent >= first) & (latent < end)
        locations = np.stack(
            [place[mine] // length, place[mine] % length, latent[mine] - first], axis=1
        )
        small = len(contexts) < 2**16 and coder.d_sae < 2**16
        data = save(
            {
                "locations": locations.astype(np.uint16 if small else np.uint32),
                "activations": value[mine],
                "tokens": contexts.ids.numpy().astype(np.int64),
            }
        )
        put(folder / f"{first}_{end - 1}.safetensors", data)
    config = {
        "model_name": model_name,
        "dataset_repo": dataset,
        "dataset_split": "",
        "dataset_name": "",
        "dataset_column": "text",
        "batch_size": 16,
        "cache_ctx_len": length,
        "n_tokens": contexts.num_tokens,
        "n_splits": len(bounds) - 1,
    }
    put(folder / "config.json", json.dumps(config, indent=1).encode())
    return folder
