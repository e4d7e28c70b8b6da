# SPDX-License-Identifier: Apache-2.0
"""The names of the package that need torch. Importing them registers torch.ops.ksae."""

from __future__ import annotations

from contextlib import AbstractContextManager
from os import PathLike
from typing import TYPE_CHECKING, Any

from .coders import (
    SAE,
    AbsTopK,
    BatchTopK,
    Gated,
    GradTopK,
    GradTopKSAE,
    GradTopKTranscoder,
    GroupMax,
    JumpReLU,
    MatchingPursuit,
    NormTopK,
    Output,
    ReLU,
    SparseCoder,
    TopK,
    TopKSAE,
    Transcoder,
    pursuit,
)
from .coders.unit_rows import UnitRows
from .functional import (
    batch_topk_encode,
    grad_topk_encode,
    sparse_decode,
    threshold_encode,
    topk,
    topk_encode,
)
from .parallel.peers import count_over_ranks
from .parallel.shard import shard, unshard
from .step.train_step import TrainStep

if TYPE_CHECKING:
    from .analysis.attached import Attachment
    from .analysis.dashboard.notebook import View

__all__ = [
    "SAE",
    "AbsTopK",
    "BatchTopK",
    "Gated",
    "GradTopK",
    "GradTopKSAE",
    "GradTopKTranscoder",
    "GroupMax",
    "JumpReLU",
    "MatchingPursuit",
    "NormTopK",
    "Output",
    "ReLU",
    "SparseCoder",
    "TopK",
    "TopKSAE",
    "TrainStep",
    "Transcoder",
    "UnitRows",
    "batch_topk_encode",
    "count_over_ranks",
    "grad_topk_encode",
    "pursuit",
    "shard",
    "sparse_decode",
    "threshold_encode",
    "topk",
    "topk_encode",
    "unshard",
]


def _attached(
    coder: SparseCoder, model: Any, hook: str, **options: Any
) -> AbstractContextManager[Attachment]:
    """The coder inside of a language model: `ksae.analysis.attached.attached`."""
    from .analysis.attached import attached

    return attached(coder, model, hook, **options)


def _show(coder: SparseCoder, latent: int, folder: str | PathLike[str], **options: Any) -> View:
    """One latent in a notebook, from the coder's dashboard:
    `ksae.analysis.dashboard.notebook.show`."""
    from .analysis.dashboard.notebook import show

    return show(folder, latent, F=coder.d_sae, **options)


SparseCoder.attached = _attached
SparseCoder.show = _show
