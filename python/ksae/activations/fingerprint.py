# SPDX-License-Identifier: Apache-2.0
"""Hashes that tell whether activations are those of before."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

SAMPLED_ROWS = 1024


def of_identity(identity: Mapping[str, Any]) -> str:
    """A hash of what activations are made from: weights, hooks, tokens, dtype, as a cache says it.

    Not of the activations, which another device may give with other bits, and not of the language
    model's name, which is a path that may have moved.
    """
    known = {key: value for key, value in identity.items() if key != "model"}
    return _hash(json.dumps(known, sort_keys=True).encode())


def sampled(rows: int) -> Tensor:
    """The numbers of up to SAMPLED_ROWS of `rows` rows, evenly spaced from first to last."""
    return torch.linspace(0, rows - 1, min(rows, SAMPLED_ROWS), dtype=torch.float64).long()


def of_rows(rows: int, parts: Sequence[Tensor | None]) -> str:
    """A hash of the number of rows and of some of them, x, y and g: each [sampled, d] or None."""
    texts = [str(rows).encode()]
    for part in parts:
        if part is None:
            texts.append(b"none")
            continue
        texts.append(f"{part.dtype} {part.shape[1]}".encode())
        texts.append(part.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return _hash(*texts)


def _hash(*texts: bytes) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for text in texts:
        digest.update(len(text).to_bytes(8, "little") + text)
    return digest.hexdigest()
