# SPDX-License-Identifier: Apache-2.0
"""The activation of a run's model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ksae.coders import (
    AbsTopK,
    Activation,
    BatchTopK,
    Gated,
    GradTopK,
    GroupMax,
    JumpReLU,
    MatchingPursuit,
    NormTopK,
    ReLU,
    TopK,
)
from ksae.errors import UserError
from ksae.step.train_step import fused_refuses

if TYPE_CHECKING:
    from ksae.runs.config import RunConfig
    from ksae.runs.model_config import ModelConfig

NAMES: dict[type[Activation], str] = {
    TopK: "topk",
    GradTopK: "topk",
    BatchTopK: "batch_topk",
    JumpReLU: "jump_relu",
    ReLU: "relu",
    Gated: "gated",
    AbsTopK: "abs_topk",
    GroupMax: "group_max",
    NormTopK: "norm_topk",
    MatchingPursuit: "pursuit",
}


def activation_of(config: ModelConfig) -> Activation:
    """The activation that settings name, as its coder checks it; not that of `beta`."""
    match config.activation:
        case "topk":
            return TopK(config.k)
        case "batch_topk":
            return BatchTopK(config.k, config.threshold)
        case "abs_topk":
            return AbsTopK(config.k)
        case "group_max":
            return GroupMax(config.k)
        case "pursuit":
            return MatchingPursuit(config.k)
        case "norm_topk":
            return NormTopK(config.k)
        case "gated":
            return Gated(config.l1, config.decoder_norm)
        case "relu":
            return ReLU(config.l1, config.decoder_norm, config.p_end, config.p_steps)
    return JumpReLU(
        coefficient=config.l0_weight,
        penalty="l0" if config.l0 is None else "target_l0",
        target=config.l0,
        bandwidth=config.bandwidth,
        theta=config.theta,
        parametrization=config.parametrization,
    )


def objective_of(activation: Activation) -> dict[str, Any]:
    """The settings from which `activation_of` makes such an activation, besides its name and k; of
    those that have no setting, none."""
    if isinstance(activation, BatchTopK):
        return {"threshold": activation.threshold}
    if isinstance(activation, ReLU):
        names = ("l1", "decoder_norm", "p_end", "p_steps")
        return {name: getattr(activation, name) for name in names}
    if isinstance(activation, Gated):
        return {"l1": activation.l1, "decoder_norm": activation.decoder_norm}
    if isinstance(activation, JumpReLU):
        same = ("theta", "bandwidth", "parametrization")
        return {
            "l0": activation.target if activation.penalty == "target_l0" else None,
            "l0_weight": activation.coefficient,
            **{name: getattr(activation, name) for name in same},
        }
    return {}


def check_activation(model: ModelConfig, where: str) -> None:
    """Refuse what an activation cannot have.

    Raises:
        UserError: two settings do not go together, or one is out of range.
    """
    name = model.activation
    kind = activation_of(model)
    if kind.of_input and model.kind != "sae":
        raise UserError(f"{where}: model.kind must be sae with {name}, got {model.kind}")
    others = ("multi_topk", False), ("multi_k", None)
    for key, off in (("beta", None), *(others if kind.ragged or not kind.other_k else ())):
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
    if name != "jump_relu":  # settings have the names of its arguments
        try:
            kind.check("model", model.d_sae)
        except ValueError as error:
            raise UserError(f"{where}: {str(error).replace('model: ', 'model.', 1)}") from None


def check_fused(activation: Activation, config: RunConfig, where: str) -> None:
    """Refuse the fused step where it does not serve the activation of the run's model.

    Raises:
        UserError: so it is.
    """
    if config.train.fused and (what := fused_refuses(activation, config.model.auxk)):
        raise UserError(f"{where}: train.fused must be false with {what}, got true")
