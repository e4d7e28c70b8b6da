# SPDX-License-Identifier: Apache-2.0
"""Tests beside the installed libraries: `pytest tests/peers`, with the dependency group `peers`."""

from __future__ import annotations

import os
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType

import jaxtyping

# sparsify chooses its decoder when imported: with Triton installed it refuses CPU tensors.
os.environ["SPARSIFY_DISABLE_TRITON"] = "1"

# SAEBench's annotations name one size twice, which newer releases of jaxtyping than its own refuse.
jaxtyping.config.update("jaxtyping_disable", True)

# overcomplete imports its vision models, which want a torchvision built for this very torch.
models = ModuleType("overcomplete.models")
for name in ("DinoV2", "SigLIP", "ViT", "ResNet", "ConvNeXt"):
    setattr(models, name, object)
sys.modules["overcomplete.models"] = models

# delphi's loader is imported with what finds neighbours and asks language models.
for name in ("asyncer", "blobfile", "faiss", "orjson", "sentence_transformers"):
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)  # transformers asks whether it is there
    for used in ("asyncify", "SentenceTransformer"):
        setattr(module, used, lambda method: method)
    sys.modules.setdefault(name, module)
