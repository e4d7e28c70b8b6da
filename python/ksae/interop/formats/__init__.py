# SPDX-License-Identifier: Apache-2.0
"""File formats, one module each: `matches(source)`, `read(source)`, `write(coder, path, fold)`.

A format is recognised by what a file holds, never by its name. `FOLDER`: its files are a folder.
"""

from types import ModuleType

from . import (
    circuit_tracer,
    dictionary_learning,
    gemma_scope,
    nvidia,
    openai,
    own,
    saelens,
    sparsify,
)
from .coder import Coder

# The first that matches is the one.
FORMATS: dict[str, ModuleType] = {
    "ksae": own,
    "gemma-scope": gemma_scope,
    "nvidia": nvidia,
    "openai": openai,
    "sparsify": sparsify,
    "dictionary-learning": dictionary_learning,
    "saelens": saelens,
    "circuit-tracer": circuit_tracer,
}

__all__ = ["FORMATS", "Coder"]
