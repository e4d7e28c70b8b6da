# SPDX-License-Identifier: Apache-2.0
"""Activations to train on: from arrays and files, or harvested from a language model.

Nothing here needs transformers but `load_model`, which imports it when called.
"""

from ksae.activations.cache import CacheSource, CacheWriter, open_cache
from ksae.activations.contexts import Contexts, tokenize
from ksae.activations.gradients import LOSSES, capture_gradient, rescale
from ksae.activations.harvest import StreamSource, harvest
from ksae.activations.hooks import HookPoint, capture, find_blocks, hook_names, resolve_hook, splice
from ksae.activations.models import SMOLLM2, LanguageModel, load_model, model_fingerprint
from ksae.activations.open import open_source
from ksae.activations.prefetch import prefetch
from ksae.activations.sources import ActivationSource, ArraySource, RowOrigin
from ksae.activations.synthetic import SyntheticSource, World, WorldConfig
from ksae.activations.texts import KJV, PACKAGED, PYDOC, documents

__all__ = [
    "KJV",
    "LOSSES",
    "PACKAGED",
    "PYDOC",
    "SMOLLM2",
    "ActivationSource",
    "ArraySource",
    "CacheSource",
    "CacheWriter",
    "Contexts",
    "HookPoint",
    "LanguageModel",
    "RowOrigin",
    "StreamSource",
    "SyntheticSource",
    "World",
    "WorldConfig",
    "capture",
    "capture_gradient",
    "documents",
    "find_blocks",
    "harvest",
    "hook_names",
    "load_model",
    "model_fingerprint",
    "open_cache",
    "open_source",
    "prefetch",
    "rescale",
    "resolve_hook",
    "splice",
    "tokenize",
]
