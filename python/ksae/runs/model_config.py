# SPDX-License-Identifier: Apache-2.0
"""The settings of a run's model."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeVar

T = TypeVar("T")
PENALIZED = ("jump_relu", "relu", "gated")  # activations without a k, kept sparse by a penalty


def setting(default: T, help: str) -> T:
    """A key of the configuration."""
    return field(default=default, metadata={"help": help})


@dataclass
class ModelConfig:
    start: str | None = setting(
        None,
        "model to start from: file, run folder or Hugging Face id; its sizes and activation are"
        " taken",
    )
    kind: Literal["sae", "transcoder"] = setting("sae", "a transcoder predicts outputs from inputs")
    d_sae: int = setting(4096, "latents")
    k: int = setting(32, "active latents per token")
    activation: Literal[
        "topk",
        "batch_topk",
        "norm_topk",
        "abs_topk",
        "group_max",
        "pursuit",
        "jump_relu",
        "relu",
        "gated",
    ] = setting(
        "topk",
        "batch_topk: k a token on average; norm_topk: by value times decoder norm; "
        "abs_topk: of either sign; group_max: one of each of k groups; pursuit: k steps; "
        "jump_relu: learned thresholds; relu, gated: kept sparse by l1",
    )
    threshold: Literal["running", "saelens", "dictionary_learning"] = setting(
        "running", "of batch_topk: how the threshold for use is estimated"
    )
    l0: float | None = setting(
        None, "of jump_relu: active latents per token to aim at; null: weighed by l0_weight alone"
    )
    l0_weight: float = setting(1e-3, "of jump_relu: weight of the penalty on active latents")
    theta: float = setting(1e-3, "of jump_relu: thresholds at the start")
    parametrization: Literal["log", "linear"] = setting(
        "log", "of jump_relu: what is learned, log(theta) or theta itself"
    )
    bandwidth: float = setting(1e-3, "of jump_relu: of the kernel that trains thresholds")
    l1: float = setting(1e-3, "of relu, gated: weight of the penalty on the sum of values")
    decoder_norm: bool = setting(True, "of l1: values count times their decoder row's norm")
    p_end: float | None = setting(
        None, "of relu: anneal the penalty's power from 1 to it, as 0.2; null: 1"
    )
    p_steps: tuple[int, ...] = setting((15_000, 100_000), "of p_end: the first and the last step")
    loss: Literal["fvu", "mse"] = setting("fvu", "what is minimised")
    auxk_alpha: float = setting(
        1 / 32, "weight of the loss that revives dead latents; 0 turns it off"
    )
    auxk: Literal["dictionary_learning", "openai", "sparsify", "saelens", "batch_topk"] = setting(
        "dictionary_learning", "the library whose form of that loss it is"
    )
    k_aux: int | None = setting(
        None, "dead latents in that loss; default half the width of the output"
    )
    dead_after: int | None = setting(
        None,
        "tokens without firing after which a latent is dead; default 1e7, at most 1/4 of the run",
    )
    normalize_decoder: bool | None = setting(None, "unit decoder rows; default true only for sae")
    multi_topk: bool = setting(False, "add the loss with 4k latents, at 1/8")
    multi_k: tuple[int, ...] | None = setting(None, "add the losses with these k, each at 1/8")
    prefixes: tuple[int, ...] | None = setting(
        None, "rising numbers of latents, the last d_sae: each reconstructs by itself (Matryoshka)"
    )
    prefix_weights: Literal["mean", "sum", "dictionary_learning"] = setting(
        "mean", "of prefixes: what each one's loss counts, 1/P, 1 or 1/P^2"
    )
    skip: bool = setting(False, "transcoder only: a linear path beside the latents")
    beta: float | None = setting(
        None, "weight of a downstream gradient in selection; null: plain TopK"
    )
    mode: Literal["additive", "multiplicative", "signed"] = setting(
        "additive", "of beta: the score"
    )
    grad_norm: Literal["none", "unit", "rms", "sqrt_d"] = setting(
        "sqrt_d", "of beta: gradients' scale"
    )
