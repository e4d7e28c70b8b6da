# SPDX-License-Identifier: Apache-2.0
"""k-sparse autoencoders and transcoders, trained as fast as the hardware allows.

Names are imported, and ops registered with torch, on first use: the command line shows its help
without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from .version import VERSION as __version__

if TYPE_CHECKING:
    from .checkpoint import load
    from .functional import grad_topk_encode, sparse_decode, topk, topk_encode
    from .gradtopk import GradTopKSAE, GradTopKTranscoder
    from .info import config
    from .modules import Output, SparseCoder, TopKSAE, Transcoder
    from .step import TrainStep

__all__ = [
    "GradTopKSAE",
    "GradTopKTranscoder",
    "Output",
    "SparseCoder",
    "TopKSAE",
    "TrainStep",
    "Transcoder",
    "__version__",
    "config",
    "grad_topk_encode",
    "load",
    "sparse_decode",
    "topk",
    "topk_encode",
]
_HOMES = {
    "checkpoint": ("load",),
    "functional": ("grad_topk_encode", "sparse_decode", "topk", "topk_encode"),
    "gradtopk": ("GradTopKSAE", "GradTopKTranscoder"),
    "info": ("config",),
    "modules": ("Output", "SparseCoder", "TopKSAE", "Transcoder"),
    "step": ("TrainStep",),
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return import_module(f".{name}", __name__)
    for home, names in _HOMES.items():
        if name in names:
            value = getattr(import_module(f".{home}", __name__), name)
            globals()[name] = value
            return value
    raise AttributeError(f"module 'ksae' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
