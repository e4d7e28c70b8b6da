# SPDX-License-Identifier: Apache-2.0
"""SAELens' TopK classes on ksae's kernels: `from ksae.interop.saelens import TopKTrainingSAE,
TopKTrainingSAEConfig`; and TopK transcoders, which SAELens lacks, with their training.

They derive from SAELens' own and need it installed. The configs here carry architectures of their
own ("ksae_topk", "ksae_topk_transcoder", "ksae_topk_skip_transcoder"), registered on import, so
that SAELens' runner, trainer and loaders build these classes; inference files of SAEs are saved as
"topk", which SAELens reads without ksae. `encode` returns the dense code as there; inside `forward`
and a training step it is lazy, unless a hook wants to see it.
"""

from __future__ import annotations

from typing import Any

from .. import libraries, sparse

if not libraries.installed("sae_lens"):
    raise ImportError("ksae.interop.saelens: sae-lens must be installed, got no such package")

from sae_lens import (
    SkipTranscoder,
    SkipTranscoderConfig,
    Transcoder,
    TranscoderConfig,
    register_sae_class,
    register_sae_training_class,
)
from sae_lens.registry import SAE_CLASS_REGISTRY, SAE_TRAINING_CLASS_REGISTRY

from .runner import LanguageModelSAETrainingRunner, TranscoderTrainingRunner, fused_adam, pairs
from .topk import TopKSAE, TopKSAEConfig, TopKTrainingSAE, TopKTrainingSAEConfig
from .transcoders import (
    TopKSkipTranscoder,
    TopKSkipTranscoderConfig,
    TopKTrainingSkipTranscoder,
    TopKTrainingSkipTranscoderConfig,
    TopKTrainingTranscoder,
    TopKTrainingTranscoderConfig,
    TopKTranscoder,
    TopKTranscoderConfig,
)

__all__ = [
    "LanguageModelSAETrainingRunner",
    "SkipTranscoder",
    "SkipTranscoderConfig",
    "TopKSAE",
    "TopKSAEConfig",
    "TopKSkipTranscoder",
    "TopKSkipTranscoderConfig",
    "TopKTrainingSAE",
    "TopKTrainingSAEConfig",
    "TopKTrainingSkipTranscoder",
    "TopKTrainingSkipTranscoderConfig",
    "TopKTrainingTranscoder",
    "TopKTrainingTranscoderConfig",
    "TopKTranscoder",
    "TopKTranscoderConfig",
    "Transcoder",
    "TranscoderConfig",
    "TranscoderTrainingRunner",
    "fused_adam",
    "pairs",
]

INFERENCE: list[tuple[Any, Any]] = [
    (TopKSAE, TopKSAEConfig),
    (TopKTranscoder, TopKTranscoderConfig),
    (TopKSkipTranscoder, TopKSkipTranscoderConfig),
]
TRAINING: list[tuple[Any, Any]] = [
    (TopKTrainingSAE, TopKTrainingSAEConfig),
    (TopKTrainingTranscoder, TopKTrainingTranscoderConfig),
    (TopKTrainingSkipTranscoder, TopKTrainingSkipTranscoderConfig),
]


def adopt(module: Any) -> None:
    """Make a swapped instance of the library's class what ours is."""
    sparse.latent_rows(module.W_enc)


for _cls, _config in INFERENCE:
    if _config.architecture() not in SAE_CLASS_REGISTRY:
        register_sae_class(_config.architecture(), _cls, _config)
for _cls, _config in TRAINING:
    if _config.architecture() not in SAE_TRAINING_CLASS_REGISTRY:
        register_sae_training_class(_config.architecture(), _cls, _config)
