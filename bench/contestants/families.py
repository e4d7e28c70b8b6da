# SPDX-License-Identifier: Apache-2.0
"""Architectures beside TopK, of every library that has them.

CONTESTANTS take a library's step as its users do, with its defaults, for the suite `families`.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from functools import partial
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from ..harness.data import Weights, fill
from .ours import Dense, per_token
from .peers import MANY

ARCHITECTURES = ("BatchTopK", "Matryoshka", "JumpReLU")
SHARES = (1 / 16, 1 / 16, 1 / 8, 1 / 4, 1 / 2)  # of the latents, that each level adds
BANDWIDTH = 0.05
L0_WEIGHT = 1e-5
CHECKED = 5  # steps of which `fvu` is asked
NEVER = 10**9  # tokens after which a latent is dead, in benchmarks of time


def widths(F: int) -> list[int]:
    """Of the levels of a Matryoshka coder of F latents."""
    sizes = [int(F * share) for share in SHARES[:-1]]
    return [sum(sizes[: n + 1]) for n in range(len(sizes))] + [F]


def threshold(F: int, k: int) -> float:
    """Above which k of F standard normal pre-activations lie on average."""
    return statistics.NormalDist().inv_cdf(1 - k / F)


# ---------------------------------------------------------------------------------- times of a step


class Ksae:
    """ksae.TrainStep with its defaults."""

    note = ""

    def __init__(self, start: Weights, k: int, lr: float, architecture: str) -> None:
        from ksae.coders import SAE
        from ksae.coders.activation import BatchTopK, JumpReLU
        from ksae.step.train_step import TrainStep
        from ksae.version import VERSION

        self.version = VERSION
        F, d = start["W_enc"].shape
        activation: Any = BatchTopK(k)
        options: dict[str, Any] = {}
        if architecture == "JumpReLU":
            activation = JumpReLU(coefficient=L0_WEIGHT, bandwidth=BANDWIDTH, theta=threshold(F, k))
        elif architecture == "Matryoshka":
            options = {"prefixes": widths(F)}
        self.model = SAE(d, F, activation, **options)
        fill(self.model, start)
        self.trainer = TrainStep(self.model, lr)

    def step(self, x: Tensor) -> Tensor:
        return self.trainer(x)["fvu"]

    def fvu(self, loss: Tensor, x: Tensor) -> float:
        return float(loss)

    def parameters(self) -> Iterable[Tensor]:
        return self.model.parameters()


class DenseFamily(Dense):
    """What one writes in plain torch: all N*F pre-activations, autograd, the fused Adam of torch;
    the FVU of the whole reconstruction is what it says."""

    def __init__(self, start: Weights, k: int, lr: float, architecture: str) -> None:
        super().__init__(start, k, lr)
        self.note = "dense code, autograd, fused Adam"
        self.architecture = architecture
        F = len(start["b_enc"])
        self.widths = widths(F) if architecture == "Matryoshka" else [F]
        if architecture == "JumpReLU":
            theta = torch.full((F,), threshold(F, k)).log()
            self.theta["log_threshold"] = torch.nn.Parameter(theta)
            self.optimizer.add_param_group({"params": [self.theta["log_threshold"]]})
        self.said = torch.tensor(0.0)

    def _loss(self, x: Tensor, *parameters: Tensor) -> Tensor:
        W_enc, b_enc, W_dec, b_dec, *more = parameters
        u = torch.nn.functional.linear(x - b_dec, W_enc, b_enc)  # [N, F]
        penalty = torch.tensor(0.0)
        if more:
            code, active = _Jump.apply(u, more[0].exp())  # type: ignore[no-untyped-call]
            penalty = L0_WEIGHT * active.sum() / len(x)
        else:
            values, at = u.flatten().topk(self.k * len(x), sorted=False)
            code = torch.zeros(u.numel()).scatter(0, at, values.relu()).view_as(u)
        variance = (x - x.mean(0)).square().sum()
        losses, recon, before = [], b_dec, 0
        for width in self.widths:
            recon = recon + code[:, before:width] @ W_dec[before:width]
            losses.append((recon - x).square().sum() / variance)
            before = width
        self.said = losses[-1].detach()
        return torch.stack(losses).mean() + penalty

    def step(self, x: Tensor) -> Tensor:
        super().step(x)
        return self.said


class _Jump(torch.autograd.Function):
    """u 1[u > theta] and 1[u > theta], with the straight-through estimates for theta."""

    @staticmethod
    def forward(ctx: Any, u: Tensor, theta: Tensor) -> tuple[Tensor, Tensor]:
        active = (u > theta).to(u.dtype)
        ctx.save_for_backward(u, theta, active)
        return u * active, active

    @staticmethod
    def backward(ctx: Any, of_code: Tensor, of_active: Tensor) -> tuple[Tensor, Tensor]:
        u, theta, active = ctx.saved_tensors
        near = ((u - theta).abs() < BANDWIDTH / 2) / BANDWIDTH
        return of_code * active, -(near * (theta * of_code + of_active)).sum(0)


# ---------------------------------------------------------------------------------- other libraries


class SaeLens:
    """sae-lens: SAETrainer.step of one of its training classes."""

    note = "clips"

    def __init__(
        self, start: Weights, lr: float, name: str, dead_after: int, batch: int, **config: Any
    ) -> None:
        import sae_lens
        from sae_lens.config import SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

        self.version = metadata.version("sae-lens")
        F, d = start["W_enc"].shape
        made = getattr(sae_lens, f"{name}Config")(
            d_in=d, d_sae=F, apply_b_dec_to_input=True, **config
        )
        self.model = getattr(sae_lens, name)(made)
        values = {**start, "W_enc": start["W_enc"].T}
        if name == "GatedTrainingSAE":
            values["b_gate"] = values.pop("b_enc")
        with torch.no_grad():
            for parameter, value in values.items():
                getattr(self.model, parameter).copy_(value)
        settings = SAETrainerConfig(
            total_training_samples=MANY,
            train_batch_size_samples=batch,
            lr=lr,
            lr_end=lr,
            dead_feature_window=dead_after // batch,
        )
        self.trainer = SAETrainer(settings, self.model, data_provider=iter(()))
        self.squares = torch.tensor(0.0)  # a token, of the whole reconstruction

    def step(self, x: Tensor) -> Tensor:
        output = self.trainer.step(x)
        self.trainer.n_training_steps += 1  # as its fit() does
        self.squares = output.losses["mse_loss"].detach()
        loss: Tensor = output.loss.detach()
        return loss

    def fvu(self, loss: Tensor, x: Tensor) -> float:
        return per_token(float(self.squares), x)

    def parameters(self) -> Iterable[Tensor]:
        return list(self.model.parameters())


class DictionaryLearning:
    """dictionary-learning: update of one of its trainers, without warm-up."""

    note = "clips"

    def __init__(
        self,
        start: Weights,
        lr: float,
        name: str,
        dead_after: int,
        theta: float | None = None,
        **settings: Any,
    ) -> None:
        from dictionary_learning import trainers

        self.version = metadata.version("dictionary-learning")
        F, d = start["W_enc"].shape
        sizes = {"activation_dim": d, "dict_size": F, "steps": MANY, "lr": lr, "warmup_steps": 0}
        where = {"layer": 0, "lm_name": "none", "device": "cpu"}
        kind = getattr(trainers, name, None) or _of_a_file(name)
        self.trainer = kind(**sizes, **where, **settings)
        if hasattr(self.trainer, "dead_feature_threshold"):
            self.trainer.dead_feature_threshold = dead_after + 1  # it counts from there on
        ae = self.trainer.ae
        named = dict(ae.named_parameters())
        values = {
            "encoder.weight": start["W_enc"], "encoder.bias": start["b_enc"],
            "decoder.weight": start["W_dec"].T, "b_dec": start["b_dec"],
            "W_enc": start["W_enc"].T, "b_enc": start["b_enc"], "W_dec": start["W_dec"],
            "bias": start["b_dec"], "decoder_bias": start["b_dec"], "gate_bias": start["b_enc"],
            "r_mag": torch.zeros(F), "mag_bias": torch.zeros(F),
        }  # fmt: skip
        if theta is not None:
            values["threshold"] = torch.full((F,), theta)
        with torch.no_grad():
            for parameter, tensor in named.items():
                tensor.copy_(values[parameter])
        self.t = 0
        self.squares = 0.0  # a token, of the whole reconstruction
        self.said = torch.tensor(0.0)  # by its last loss
        loss = self.trainer.loss

        def heard(*args: Any, **named: Any) -> Any:
            found = loss(*args, **named)
            self.said = found.detach()
            return found

        self.trainer.loss = heard

    @torch.no_grad()
    def prepare(self, x: Tensor) -> None:
        """Before a step, and not in its time: what `fvu` says of the first steps, whose losses are
        of other units."""
        if self.t < CHECKED:
            ae = self.trainer.ae
            batch = {"use_threshold": False} if hasattr(ae, "k") else {}
            error = x - ae.decode(ae.encode(x, **batch))
            self.squares = float(error.square().sum() / len(x))

    def step(self, x: Tensor) -> float:
        self.t += 1  # its step 0 would replace b_dec
        said = self.trainer.update(self.t, x)
        return float(self.said if said is None else said)  # some return none

    def fvu(self, loss: float, x: Tensor) -> float:
        return per_token(self.squares, x)

    def parameters(self) -> Iterable[Tensor]:
        return list(self.trainer.ae.parameters())


def _of_a_file(name: str) -> Any:
    from dictionary_learning.trainers import jumprelu, matryoshka_batch_top_k

    return getattr(jumprelu if name == "JumpReluTrainer" else matryoshka_batch_top_k, name)


NAMES = {
    "sae-lens": {
        "TopK": "TopKTrainingSAE",
        "NormTopK": "TopKTrainingSAE",
        "BatchTopK": "BatchTopKTrainingSAE",
        "Matryoshka": "MatryoshkaBatchTopKTrainingSAE",
        "JumpReLU": "JumpReLUTrainingSAE",
        "JumpReLU, tanh": "JumpReLUTrainingSAE",
        "ReLU": "StandardTrainingSAE",
        "Gated": "GatedTrainingSAE",
    },
    "dictionary-learning": {
        "TopK": "TopKTrainer",
        "BatchTopK": "BatchTopKTrainer",
        "Matryoshka": "MatryoshkaBatchTopKTrainer",
        "JumpReLU": "JumpReluTrainer",
        "JumpReLU, steps of u": "JumpReluTrainer",
        "ReLU": "StandardTrainer",
        "Gated": "GatedSAETrainer",
    },
}


def as_users_do(library: str, start: Weights, k: int, lr: float, architecture: str) -> Any:
    """A library's step with its defaults."""
    F = len(start["b_enc"])
    theta = threshold(F, k)
    common = (start, lr, NAMES[library][architecture], NEVER)
    if library == "sae-lens":
        config: dict[str, Any] = {"k": k}
        if architecture == "JumpReLU":
            config = {"jumprelu_init_threshold": theta, "jumprelu_bandwidth": BANDWIDTH}
            config["l0_coefficient"] = L0_WEIGHT
        elif architecture == "Matryoshka":
            config["matryoshka_widths"] = widths(F)
        return SaeLens(*common, batch=1, **config)
    settings: dict[str, Any] = {"k": k}
    if architecture == "JumpReLU":
        settings = {"theta": theta, "bandwidth": BANDWIDTH, "sparsity_penalty": L0_WEIGHT}
        settings |= {"sparsity_warmup_steps": None, "target_l0": float(k)}
    elif architecture == "Matryoshka":
        settings["group_fractions"] = list(SHARES)
    return DictionaryLearning(*common, **settings)


MAKERS: dict[str, Callable[..., Any]] = {
    "ksae": Ksae,
    "dense torch": DenseFamily,
    "sae-lens": partial(as_users_do, "sae-lens"),
    "dictionary-learning": partial(as_users_do, "dictionary-learning"),
}
CONTESTANTS = {
    f"{name}, {architecture}": partial(make, architecture=architecture)
    for architecture in ARCHITECTURES
    for name, make in MAKERS.items()
}
