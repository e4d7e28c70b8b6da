# SPDX-License-Identifier: Apache-2.0
"""ksae's step set up as each library's own, for equal results from the same weights and batches."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

from torch import Tensor

from ..harness.data import Weights, fill
from .families import NAMES, SHARES, DictionaryLearning, SaeLens, widths

AUXK = 1 / 32  # dictionary-learning's weight of it
SHARE = 0.02  # of a sample's squares, what the penalty of k active latents is set to
PRE_ACT = 3e-6
PAIRS = [
    *(("sae-lens", name) for name in (
        "TopK", "NormTopK", "BatchTopK", "Matryoshka", "JumpReLU", "JumpReLU, tanh", "ReLU",
        "Gated",
    )),
    *(("dictionary-learning", name) for name in (
        "TopK", "BatchTopK", "Matryoshka", "JumpReLU", "JumpReLU, steps of u", "ReLU", "Gated",
    )),
]  # fmt: skip
# what a library does otherwise, by design or mistake, so that results are not equal
DIFFERENCES = {
    ("sae-lens", "NormTopK"): "its AuxK ranks dead latents by value times norm, ksae's by value",
    ("sae-lens", "Gated"): "its gate's reconstruction trains W_dec and b_dec too",
    ("dictionary-learning", "JumpReLU"): (
        "its L0 counts values, not pre-activations: only the half of the kernel above a threshold"
        " has a gradient"
    ),
}


class Ours:
    """ksae's TrainStep as the step of a library that sums squares over d.

    ksae minimises the mean of squares over all elements, which is the library's loss divided by d;
    the length that gradients are clipped to and Adam's eps are divided as well, so that both take
    the same steps.

    alpha: the weight of AuxK beside the library's sum. clip: to length 1, in the library's unit.
    """

    def __init__(
        self, start: Weights, lr: float, activation: Any, *, alpha: float, dead_after: int,
        eps: float = 1e-8, betas: tuple[float, float] = (0.9, 0.999), clip: bool = True,
        centred: bool = True, **options: Any,
    ) -> None:  # fmt: skip
        from ksae.coders import SAE, Transcoder
        from ksae.step.train_step import TrainStep

        F, self.d = start["W_enc"].shape
        self.centred = centred
        options |= {"loss": "mse", "auxk_alpha": alpha, "dead_after": dead_after}
        if centred:
            self.model: Any = SAE(self.d, F, activation, **options)
        else:
            self.model = Transcoder(self.d, self.d, F, activation=activation, **options)
        fill(self.model, start)
        self.trainer = TrainStep(
            self.model, lr, decoder_lr=1.0, clip_norm=1 / self.d if clip else None,
            eps=eps / self.d, betas=betas, fused=activation.fused_refuses is None,
        )  # fmt: skip

    def step(self, x: Tensor) -> Tensor:
        """One step; the loss before it, in the library's unit."""
        said = self.trainer(x) if self.centred else self.trainer(x, x)
        self.l0 = float(said["l0"])
        return said["loss"] * self.d


class StepsOfPreActivations(DictionaryLearning):
    """dictionary-learning's JumpReLU whose L0 counts pre-activations above their thresholds."""

    def step(self, x: Tensor) -> float:
        from dictionary_learning.trainers import jumprelu

        jump, step = jumprelu.JumpReLUFunction, jumprelu.StepFunction
        seen: list[Tensor] = []

        def remember(u: Tensor, *rest: Any) -> Any:
            seen.append(u)
            return jump.apply(u, *rest)

        def count(_: Tensor, *rest: Any) -> Any:
            return step.apply(seen[-1], *rest)

        jumprelu.JumpReLUFunction = SimpleNamespace(apply=remember)
        jumprelu.StepFunction = SimpleNamespace(apply=count)
        try:
            return super().step(x)
        finally:
            jumprelu.JumpReLUFunction, jumprelu.StepFunction = jump, step


class Scale(NamedTuple):
    """What penalties and thresholds are set by: numbers of a sample of the data."""

    theta: float  # above it k pre-activations a token, at the start
    squares: float  # of x - b_dec a token


def scale_of(start: Weights, sample: Tensor, k: int, centred: bool) -> Scale:
    """Of rows [n, d]."""
    rows = sample - start["b_dec"]
    u = (rows if centred else sample) @ start["W_enc"].T + start["b_enc"]
    theta = u.flatten().topk(k * len(sample)).values[-1]
    return Scale(float(theta.float()), float(rows.square().sum() / len(rows)))


def pair(
    library: str,
    architecture: str,
    start: Weights,
    sample: Tensor,
    k: int,
    lr: float,
    batch: int,
    dead_after: int,
) -> tuple[Callable[[], Ours], Callable[[], Any]]:
    """What makes ksae's contestant, and what makes the library's.

    Args:
        library, architecture: one of PAIRS. k: active latents a token, of those with a penalty at
            the start.
        sample: rows [n, d] of the data. batch: tokens a step.
        dead_after: tokens without a value after which a latent is dead.
    """
    kind, ours, theirs = {
        "sae-lens": _sae_lens,
        "dictionary-learning": _dictionary_learning,
    }[library](architecture, start, sample, k)
    if kind is SaeLens:
        theirs["batch"] = batch
    name = NAMES[library][architecture]

    def make_theirs() -> Any:
        with contextlib.redirect_stdout(io.StringIO()):
            return kind(start, lr, name, dead_after, **theirs)

    return lambda: Ours(start, lr, dead_after=dead_after, **ours), make_theirs


Setup = tuple[Any, dict[str, Any], dict[str, Any]]


def _jumps(scale: Scale) -> dict[str, Any]:
    return {"bandwidth": scale.theta / 4, "theta": scale.theta, "parametrization": "linear"}


def _sae_lens(architecture: str, start: Weights, sample: Tensor, k: int) -> Setup:
    from ksae.coders.activation import BatchTopK, Gated, JumpReLU, NormTopK, ReLU, TopK

    F, d = start["W_enc"].shape
    ours: dict[str, Any] = {"alpha": 1.0, "auxk": "saelens", "normalize_decoder": False}
    theirs: dict[str, Any] = {"k": k, "rescale_acts_by_decoder_norm": architecture == "NormTopK"}
    if architecture in ("TopK", "NormTopK"):
        ours["activation"] = (TopK if architecture == "TopK" else NormTopK)(k)
        return SaeLens, ours, theirs
    if architecture in ("BatchTopK", "Matryoshka"):
        ours["activation"] = BatchTopK(k, threshold="saelens")
        if architecture == "Matryoshka":
            ours |= {"prefixes": widths(F), "prefix_weights": "sum"}
            theirs["matryoshka_widths"] = widths(F)
        return SaeLens, ours, theirs
    scale = scale_of(start, sample, k, centred=True)
    weight = SHARE * scale.squares / k
    ours["alpha"] = 0.0
    if architecture.startswith("JumpReLU"):
        more = _jumps(scale)
        theirs = {"l0_coefficient": weight, "jumprelu_init_threshold": scale.theta}
        theirs["jumprelu_bandwidth"] = more["bandwidth"]
        if architecture == "JumpReLU, tanh":
            more |= {"penalty": "tanh", "tanh_scale": 1 / scale.theta, "pre_act": PRE_ACT / d}
            theirs |= {"jumprelu_sparsity_loss_mode": "tanh", "pre_act_loss_coefficient": PRE_ACT}
            theirs["jumprelu_tanh_scale"] = more["tanh_scale"]
        return SaeLens, {**ours, "activation": JumpReLU(weight / d, **more)}, theirs
    weight /= scale.theta
    activation = (ReLU if architecture == "ReLU" else Gated)(weight / d)
    return SaeLens, {**ours, "activation": activation}, {"l1_coefficient": weight}


def _dictionary_learning(architecture: str, start: Weights, sample: Tensor, k: int) -> Setup:
    from ksae.coders.activation import BatchTopK, Gated, JumpReLU, ReLU, TopK

    F, d = start["W_enc"].shape
    ours: dict[str, Any] = {"alpha": AUXK / d, "auxk": "dictionary_learning"}
    theirs: dict[str, Any] = {"k": k}
    if architecture == "TopK":
        return DictionaryLearning, {**ours, "activation": TopK(k)}, theirs
    if architecture in ("BatchTopK", "Matryoshka"):
        ours["activation"] = BatchTopK(k, threshold="dictionary_learning")
        if architecture == "Matryoshka":
            ours |= {"prefixes": widths(F), "prefix_weights": "dictionary_learning"}
            theirs["group_fractions"] = list(SHARES)
        return DictionaryLearning, ours, theirs
    jumps = architecture.startswith("JumpReLU")
    scale = scale_of(start, sample, k, centred=not jumps)
    weight = SHARE * scale.squares
    theirs = {"sparsity_warmup_steps": None}
    ours["alpha"] = 0.0
    if jumps:
        more = _jumps(scale)
        activation: Any = JumpReLU(weight / d, "target_l0", float(k), **more)
        theirs |= {"sparsity_penalty": weight, "target_l0": float(k), "theta": scale.theta}
        theirs["bandwidth"] = more["bandwidth"]
        ours |= {"centred": False, "normalize_decoder": True, "betas": (0.0, 0.999)}
        whole = architecture == "JumpReLU, steps of u"
        kind = StepsOfPreActivations if whole else DictionaryLearning
        return kind, {**ours, "activation": activation}, theirs
    theirs["l1_penalty"] = weight / k / scale.theta
    if architecture == "Gated":
        ours["betas"] = (0.0, 0.999)
    activation = (ReLU if architecture == "ReLU" else Gated)(
        theirs["l1_penalty"] / d, decoder_norm=False
    )
    return DictionaryLearning, {**ours, "activation": activation, "clip": False}, theirs
