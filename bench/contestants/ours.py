# SPDX-License-Identifier: Apache-2.0
"""ksae's own contestants, and what every contestant of the step benchmark offers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

import torch
from torch import Tensor

from ..harness.data import Weights, fill, total_variance


class Contestant(Protocol):
    """One library's model, optimizer and training step, made from the common initial weights."""

    version: str
    note: str

    def step(self, x: Tensor) -> Any:
        """One full training step, which is what is timed; the loss before the update."""

    def fvu(self, loss: Any, x: Tensor) -> float:
        """The loss as sum (x - recon)^2 / sum (x - mean x)^2."""

    def parameters(self) -> Iterable[Tensor]: ...

    def weights(self) -> Weights:
        """Its parameters in the shapes of `Weights`."""


class Ksae:
    """ksae.TrainStep; `dtype` is the parameters', which batches are cast to within the step."""

    note = ""

    def __init__(
        self,
        start: Weights,
        k: int,
        lr: float,
        *,
        dtype: torch.dtype = torch.float32,
        fused: bool = True,
        screening: bool | None = None,
    ) -> None:
        from ksae.backends import cpu as native
        from ksae.coders import TopKSAE
        from ksae.step.train_step import TrainStep
        from ksae.version import VERSION

        self.version = VERSION
        if not native.available():
            self.note = f"reference, native kernels are {native.reason()}"
        elif screening is not None:
            from ksae import _cpu

            native.encode.screening = screening  # each contestant has a process of its own
            if screening and not _cpu.can_screen():
                self.note = "no BF16 dot instructions to screen with"
        F, d = start["W_enc"].shape
        self.model = TopKSAE(d, F, k, dtype=dtype)
        fill(self.model, start)
        # the rate of the others, whose losses it is compared with
        self.trainer = TrainStep(self.model, lr=lr, decoder_lr=1.0, fused=fused)

    def step(self, x: Tensor) -> Tensor:
        return self.trainer(x)["loss"]

    def fvu(self, loss: Tensor, x: Tensor) -> float:
        return float(loss)

    def parameters(self) -> Iterable[Tensor]:
        return self.model.parameters()

    def weights(self) -> Weights:
        theta = self.trainer.theta
        return {name: theta[name].detach().float() for name in ("W_enc", "b_enc", "W_dec", "b_dec")}


class Dense:
    """What one writes in plain torch: dense code, autograd, the fused Adam of torch."""

    note: str = "F.linear, topk, scatter, matmul, fused Adam"

    def __init__(self, start: Weights, k: int, lr: float, *, compiled: bool = False) -> None:
        self.version: str = str(torch.__version__)
        self.k = k
        if compiled:
            self.note += "; forward and backward through torch.compile"
            self._loss = torch.compile(self._loss, fullgraph=True)  # type: ignore[method-assign]
        self.theta = {name: torch.nn.Parameter(value.clone()) for name, value in start.items()}
        self.optimizer = torch.optim.Adam(self.theta.values(), lr=lr, fused=True)

    def _loss(
        self, x: Tensor, W_enc: Tensor, b_enc: Tensor, W_dec: Tensor, b_dec: Tensor
    ) -> Tensor:
        u = torch.nn.functional.linear(x - b_dec, W_enc, b_enc)  # [N, F]
        values, indices = u.topk(self.k, sorted=False)  # [N, k]
        code = torch.zeros_like(u).scatter(1, indices, values.relu())  # [N, F]
        error = (code @ W_dec + b_dec - x).square().sum()
        return error / (x - x.mean(0)).square().sum()

    def step(self, x: Tensor) -> Tensor:
        loss = self._loss(x, *self.theta.values())
        loss.backward()  # type: ignore[no-untyped-call]
        W_dec = self.theta["W_dec"]
        with torch.no_grad():
            assert W_dec.grad is not None
            W_dec.grad -= (W_dec.grad * W_dec).sum(1, keepdim=True) * W_dec
            self.optimizer.step()
            self.optimizer.zero_grad()
            W_dec.div_(W_dec.norm(dim=1, keepdim=True))
        return loss.detach()

    def fvu(self, loss: Tensor, x: Tensor) -> float:
        return float(loss)

    def parameters(self) -> Iterable[Tensor]:
        return self.theta.values()

    def weights(self) -> Weights:
        return {name: p.detach() for name, p in self.theta.items()}


def per_token(loss: float, x: Tensor) -> float:
    """FVU of a loss that is summed over d and averaged over tokens."""
    return float(loss) * x.shape[0] / total_variance(x)
