# SPDX-License-Identifier: Apache-2.0
"""Gemma Scope (arXiv 2408.05147): one `params.npz` with JumpReLU weights; W_enc is [d, F].

Its SAEs and transcoders do not subtract b_dec.
"""

from __future__ import annotations

from pathlib import Path

from .coder import Coder, check, require, transposed
from .files import Source, write_arrays

KEYS = {"W_enc", "W_dec", "b_enc", "b_dec", "threshold"}
FOLDER = False


def matches(source: Source) -> bool:
    return source.arrays and {"W_enc", "threshold"} <= set(source.state)


def read(source: Source) -> Coder:
    tensors, owner = source.tensors(KEYS), str(source.path)
    coder = Coder(
        W_enc=transposed(tensors["W_enc"], owner),
        b_enc=tensors["b_enc"],
        W_dec=tensors["W_dec"],
        b_dec=tensors["b_dec"],
        threshold=tensors["threshold"],
        activation="jumprelu",
        k=None,
        centred=False,
    )
    return check(coder, owner)


def write(coder: Coder, path: Path, fold: bool) -> Path:
    coder = require(
        coder,
        "Gemma Scope's format",
        activations=("jumprelu", "batchtopk", "matryoshka"),
        centred=False,
        square=False,
        fold=fold,
    )
    tensors = {name: getattr(coder, name) for name in KEYS - {"threshold"}}
    tensors["threshold"] = coder.jumps("Gemma Scope's format")
    write_arrays(path, {**tensors, "W_enc": coder.W_enc.T})
    return path
