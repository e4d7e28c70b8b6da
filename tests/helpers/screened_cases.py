# SPDX-License-Identifier: Apache-2.0
"""What screened encodes of float32 may get wrong: inputs, and how many rows are scored in full.

The numbers are integers of more bits than bf16 has, times powers of two: a float32 sum of their
products is exact in any order, and what their bf16 copies lose is not small.
"""

from __future__ import annotations

import torch
from cases import hidden_winners, integers
from torch import Tensor

INF, NAN = torch.inf, torch.nan


def near(F: int, d: int) -> Tensor:
    """Latents that bf16 cannot tell apart."""
    return integers(1, d, top=511, seed=1) + integers(F, d, top=1, seed=3)


ALL = -1  # rows that are expected to be scored in full
CASES: dict[str, int | None] = {
    "random": 0,
    "one row": 0,
    "k is F": 0,
    "wide": 0,
    "long rows": 0,
    "near ties, room for all": 0,
    "near ties, overflow": ALL,
    "near ties, masked": ALL,
    "near ties, more parts than latents": ALL,
    "near ties, more rows than programs": ALL,
    "overflow of one row": 1,
    "many": None,
    "many, near ties": ALL,
    "all equal": ALL,
    "ties": None,
    "outlier dimension": ALL,
    "tiny": None,
    "denormal": None,
    "huge weights": None,
    "huge rows": ALL,
    "mixed norms": None,
    "zeros": None,
    "NaN in a row": 1,
    "infinite row": 1,
    "NaN latent": None,
    "infinite latents": None,
    "bias not finite": None,
    "few above -inf": ALL,
    "few above -inf, room for all": 0,
    "all NaN": ALL,
    "all negative": None,
    "masked": None,
    "masked, nothing left": 0,
    "hidden by its copy": 0,
    "hidden by the row's copy": 0,
}


def inputs(case: str) -> tuple[Tensor, Tensor, Tensor, int, Tensor | None]:
    N, d, F, k = {
        "one row": (1, 1, 33, 1),
        "k is F": (2, 17, 33, 33),
        "wide": (2, 300, 40, 3),
        "long rows": (2, 12, 2300, 5),
        "overflow of one row": (3, 20, 160, 6),
        "many": (1, 20, 700, 300),
        "many, near ties": (1, 20, 1100, 600),
        "near ties, more parts than latents": (1, 20, 80, 3),
        "near ties, more rows than programs": (9, 20, 160, 6),
    }.get(case, (3, 20, 160, 6))
    top = 63 if case == "wide" else 511
    x, W = integers(N, d, top=top), integers(F, d, top=top, seed=1)
    b, mask = integers(F, top=511, seed=2), None
    if case.startswith(("near ties", "many, near")):
        W = near(F, d)
    match case:
        case "near ties, masked" | "masked":
            mask = torch.arange(F) % (2 if "near" in case else 50) == 0
        case "hidden by its copy" | "hidden by the row's copy":
            x, W = hidden_winners()[2 * ("row" in case) :][:2]
            b = torch.zeros(1100)
        case "masked, nothing left":
            mask = torch.zeros(F, dtype=torch.bool)
        case "overflow of one row":
            x[1, 5], W = 2.0**20 + 4095, integers(F, d, top=63, seed=1)
            W[:, 5] = 7
        case "all equal":
            W, b = integers(1, d, top=511, seed=1).expand(F, d).contiguous(), b * 0
        case "ties":
            W, b = W[torch.arange(F) % 8], b[torch.arange(F) % 8]
        case "outlier dimension":  # moves all scores together; its rounding dwarfs their spread
            x[:, 5], W = 2.0**20 + 4095, integers(F, d, top=63, seed=1)
            W[:, 5] = 7
        case "tiny":
            x, W, b = x * 2.0**-70, W * 2.0**-40, b * 2.0**-110
        case "denormal":
            x, W, b = x * 2.0**-90, W * 2.0**-59, b * 2.0**-149
        case "huge weights":
            W, b = W * 2.0**40, b * 2.0**40
        case "huge rows":
            x = x * 2.0**60
        case "mixed norms":
            x, W = x * 2.0 ** integers(N, 1, top=20, seed=4), W * 2.0 ** integers(F, 1, seed=5)
            b = b * 0
        case "zeros":
            x[1], W[::3] = 0, 0
        case "NaN in a row":
            x[1, 3] = NAN
        case "infinite row":
            x[1, 3] = INF
        case "NaN latent":
            W[150, 3] = NAN
        case "infinite latents":
            W[150, 3], W[10, 2] = INF, -INF
        case "bias not finite":
            b[3], b[77], b[150] = INF, -INF, NAN
        case "few above -inf" | "few above -inf, room for all":  # parts and rows with fewer than k
            b[torch.arange(F) % 40 != 7] = -INF
        case "all NaN":
            x[:, 0] = NAN
        case "all negative":
            b -= 1e6
    return x, W, b, k, mask
