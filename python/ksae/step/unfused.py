# SPDX-License-Identifier: Apache-2.0
"""The fused step's oracle: autograd, projection, clipping, torch's Adam, unit rows."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..coders.coder import SparseCoder
from ..reference.scalars import scale_to
from .state import State

Metrics = dict[str, Tensor]
CLIPS = ("above", "always")


class Unfused:
    """One step at a time on the parameters and the state of a TrainStep, which shares them."""

    def __init__(
        self,
        model: SparseCoder,
        state: State,
        betas: tuple[float, float],
        eps: float,
        clip_norm: float | None,
        clip: str,
        decoder_lr: float,
    ) -> None:
        self.model, self.clip_norm, self.clip = model, clip_norm, clip
        self.parameters, self.masters, self.theta = state.parameters, state.masters, state.theta
        self.acc, self.t, self.lr, self.decoder_lr = state.acc, state.t, state.lr, decoder_lr
        decoder = {"params": [self.theta["W_dec"]]}
        others = {"params": [t for name, t in self.theta.items() if name != "W_dec"]}
        groups = [others, decoder]
        self.optimizer = torch.optim.Adam(groups, lr=0.0, betas=betas, eps=eps, foreach=False)
        for name, tensor in self.theta.items():
            m, v = state.moments[name]
            entry = {"step": torch.tensor(float(self.t)), "exp_avg": m, "exp_avg_sq": v}
            self.optimizer.state[tensor] = entry

    def set_steps_taken(self) -> None:
        """After the state was loaded: torch's Adam counts for itself."""
        for entry in self.optimizer.state.values():
            entry["step"].fill_(float(self.t))

    def step(self, x: Tensor, y: Tensor, grad: Tensor | None) -> tuple[Metrics, Tensor]:
        """A step on x [N, d_in] and y [N, d_out]: metrics, and whether all was finite, [] bool."""
        model = self.model
        others, decoder = self.optimizer.param_groups
        others["lr"] = float(self.lr)
        decoder["lr"] = others["lr"] * self.decoder_lr
        training, since = model.training, model.tokens_since_fired.clone()
        dead = model.dead.to(self.acc).mean()
        model.train()
        for p in self.parameters.values():
            p.requires_grad_(True)
        out = model(x, y, grad=grad)
        model.train(training)
        metrics: Metrics = {
            "loss": out.loss.detach(),
            "fvu": out.fvu,
            "auxk_loss": out.auxk_loss.detach(),
            "l0": (out.values != 0).sum().to(self.acc) / x.shape[0],
            "dead": dead,
        }
        if out.prefix_fvu is not None:
            named = zip(model.prefixes[:-1], out.prefix_fvu, strict=False)
            metrics |= {f"fvu_{width}": fvu for width, fvu in named}
        if model.multi_k:
            metrics["multi_topk_loss"] = out.multi_topk_loss.detach()
        finite = bool(metrics["loss"].isfinite())
        if finite:
            grads = torch.autograd.grad(out.loss, list(self.parameters.values()), allow_unused=True)
            finite = self._update(dict(zip(self.parameters, grads, strict=True)), metrics)
        if not finite:
            model.tokens_since_fired.copy_(since)
        return metrics, torch.tensor(finite, device=x.device)

    @torch.no_grad()
    def _update(self, grads: Mapping[str, Tensor | None], metrics: Metrics) -> bool:
        """Projection, clipping, torch's Adam, unit rows; False if the norm is not finite."""
        W_dec = self.theta["W_dec"]
        for name, theta in self.theta.items():
            g = grads[name]
            theta.grad = torch.zeros_like(theta) if g is None else g.to(self.acc)
        try:
            if self.model.normalize_decoder:
                assert W_dec.grad is not None
                w = self.model.W_dec.to(self.acc)  # the rows that the gradient was taken at
                square = w.square().sum(1, keepdim=True)
                along = (W_dec.grad * w).sum(1, keepdim=True)
                W_dec.grad -= torch.where(square > 0, along / square, 0) * w
            if self.clip_norm is not None:
                norm = torch.nn.utils.get_total_norm(
                    [p.grad for p in self.theta.values() if p.grad is not None]
                )
                metrics["grad_norm"] = norm
                if not norm.isfinite():
                    return False
                if self.clip == "always":
                    scale = scale_to(self.clip_norm, norm)
                    for p in self.theta.values():
                        if p.grad is not None:
                            p.grad *= scale
                else:
                    torch.nn.utils.clip_grads_with_norm_(self.theta.values(), self.clip_norm, norm)
            self.optimizer.step()
        finally:
            for theta in self.theta.values():
                theta.grad = None
        if self.model.normalize_decoder:
            norms = W_dec.norm(dim=1, keepdim=True)
            W_dec /= torch.where(norms > 0, norms, 1)
        for name, master in self.masters.items():
            self.parameters[name].copy_(master)
        self.t += 1
        return True
