# SPDX-License-Identifier: Apache-2.0
"""`ksae.load`: a model from ksae's own files or from those of another library."""

from __future__ import annotations

import os

import torch

from ksae.coders.coder import SparseCoder
from ksae.coders.file import load_own
from ksae.interop import convert, hub
from ksae.parallel import checkpoint


def load(
    path: str | os.PathLike[str],
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    *,
    k: int | None = None,
    fold: bool = False,
    as_topk: bool = False,
    revision: str | None = None,
) -> SparseCoder:
    """Read a model from a file of `save`, a training checkpoint, also of many ranks, a finished
    run's folder, or the files of another library (`ksae.interop.convert`), recognised by what they
    hold.

    Args:
        path: the file, or the directory that `ksae train` wrote to; of another library, its file or
            folder, or a Hugging Face id, `owner/name` or `owner/name/folder`.
        device: where to put the tensors; default the CPU.
        dtype: of the parameters; default the dtype they were saved in.
        k, fold, as_topk: for files of other libraries, see `ksae.interop.convert.load`.
        revision: of a Hugging Face id: a branch, a tag or a commit; default the main branch.
    """
    path = file = hub.local(path, revision)
    if file.is_dir() and (file / "model.safetensors").is_file():
        file = file / "model.safetensors"
    if checkpoint.is_sharded(file):
        return checkpoint.load_whole(file, device).to(dtype=dtype)
    if not convert.is_foreign(file):
        return load_own(path, device, dtype)
    return convert.load(path, device, dtype, k=k, fold=fold, as_topk=as_topk)
