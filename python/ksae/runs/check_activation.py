# SPDX-License-Identifier: Apache-2.0
"""What the activation of a run's model may be combined with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ksae.errors import UserError

if TYPE_CHECKING:
    from ksae.runs.config import ModelConfig


def check_activation(model: ModelConfig, where: str) -> None:
    """Refuse what an activation cannot have."""
    name = model.activation
    if name == "topk":
        return
    for key, off in (("beta", None), ("multi_topk", False), ("multi_k", None)):
        got = getattr(model, key)
        if got != off:
            want = "null" if off is None else "false"
            raise UserError(f"{where}: model.{key} must be {want} with {name}, got {got}")
    for key in ("l0", "theta", "bandwidth"):
        got = getattr(model, key)
        if name == "jump_relu" and got is not None and not 0 < got < float("inf"):
            raise UserError(f"{where}: model.{key} must be a finite number above 0, got {got}")
    if name == "jump_relu" and not 0 <= model.l0_weight < float("inf"):
        got = model.l0_weight
        raise UserError(f"{where}: model.l0_weight must be a finite number >= 0, got {got}")
