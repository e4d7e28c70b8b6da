# SPDX-License-Identifier: Apache-2.0
"""Every environment variable that the package reads, with its default and its meaning.

Three are for users. The others choose between implementations, for tests and benchmarks; they may
change with any version.
"""

from __future__ import annotations

import os
from typing import NamedTuple


class Variable(NamedTuple):
    """One environment variable."""

    default: str
    meaning: str
    for_users: bool = False


VARIABLES = {
    "KSAE_NATIVE": Variable("1", "0: leave the C++ and CUDA kernels out", True),
    "KSAE_CHECK": Variable("0", "1: check latent numbers on GPUs too, which waits for them", True),
    "KSAE_DEBUG": Variable("0", "1: the command line shows tracebacks", True),
    "KSAE_ISA": Variable("", "plain, avx2, avx512 or avx512bf16: a lower instruction set"),
    "KSAE_SCREEN": Variable("on", "off: no certified screening of float32 encodes on the CPU"),
    "KSAE_TRITON": Variable("1", "0: leave the Triton kernels out"),
    "KSAE_ENCODE": Variable(
        "", "product, screened or fused: how GPUs encode, instead of the table"
    ),
    "KSAE_CHUNK_BYTES": Variable(
        "", "memory that the scores of one chunk of rows may take on GPUs, instead of what is wise"
    ),
}


def read(name: str) -> str:
    """The value of a variable, or its default."""
    return os.environ.get(name) or VARIABLES[name].default


# As the package was imported: kernels read theirs once, and later changes have no effect.
at_import = {name: os.environ.get(name) for name in VARIABLES}
