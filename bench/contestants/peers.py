# SPDX-License-Identifier: Apache-2.0
"""The training steps of other libraries, each as its own trainer takes it.

Each class is a `Contestant` (ours.py) of the same shape and the same initial weights. Where the
trainer can be called step by step it is; where it needs a language model (eai-sparsify) its step is
written out here around its own model. Nothing is installed: a library that is missing raises
ImportError, which becomes a row of the table.
"""

from __future__ import annotations

import os
import sys
import types
from collections.abc import Iterable
from importlib import metadata
from typing import Any

import torch
from torch import Tensor

from ..harness.data import Weights, fill, total_variance
from .ours import per_token

NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")
MANY = 10**9  # steps or tokens of a run that no benchmark reaches the end of


def folded(model: torch.nn.Module) -> Weights:
    """Of sae-lens' coders, with the decoder norms folded in: they select and decode as if they were
    1."""
    p = {name: t.detach() for name, t in model.named_parameters()}
    norms = p["W_dec"].norm(dim=1)
    return {
        "W_enc": p["W_enc"].T * norms[:, None],
        "b_enc": p["b_enc"] * norms,
        "W_dec": p["W_dec"] / norms[:, None],
        "b_dec": p["b_dec"],
    }


class Sparsify:
    """eai-sparsify: its SparseCoder, loop and order; torch's Adam, its own without bitsandbytes."""

    def __init__(self, start: Weights, k: int, lr: float, *, fused_adam: bool = False) -> None:
        # Its decoder is chosen at import: with Triton installed, CPU tensors fail.
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"
        from sparsify import SparseCoder, SparseCoderConfig

        self.version = metadata.version("eai-sparsify")
        self.note = "eager decoder, " + ("fused Adam" if fused_adam else "Adam")
        F, d = start["W_enc"].shape
        self.model: Any = SparseCoder(d, SparseCoderConfig(num_latents=F, k=k))
        names = {"encoder.weight": "W_enc", "encoder.bias": "b_enc"}
        names |= {"W_dec": "W_dec", "b_dec": "b_dec"}
        fill(self.model, {p: start[w] for p, w in names.items()})
        fused = True if fused_adam else None  # None: torch's own choice
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=lr, fused=fused)
        self.since_fired = torch.zeros(F, dtype=torch.long)
        self.did_fire = torch.zeros(F, dtype=torch.bool)

    def step(self, x: Tensor) -> Tensor:
        self.model.set_decoder_norm_to_unit_norm()
        out = self.model(x)
        self.did_fire[out.latent_indices.flatten()] = True
        out.fvu.backward()  # auxk_alpha is 0 by default
        self.model.remove_gradient_parallel_to_decoder_directions()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.since_fired += x.shape[0]
        self.since_fired[self.did_fire] = 0
        self.did_fire.zero_()
        loss: Tensor = out.fvu.detach()
        return loss

    def fvu(self, loss: Tensor, x: Tensor) -> float:
        return float(loss)

    def parameters(self) -> Iterable[Tensor]:
        return list(self.model.parameters())

    def weights(self) -> Weights:
        self.model.set_decoder_norm_to_unit_norm()  # as its trainer does before it uses them
        model = self.model
        named = (model.encoder.weight, model.encoder.bias, model.W_dec, model.b_dec)
        return dict(zip(NAMES, map(Tensor.detach, named), strict=True))


class SaeLens:
    """sae-lens: SAETrainer.step of a TopKTrainingSAE, its defaults; no projection, no unit norm."""

    def __init__(self, start: Weights, k: int, lr: float) -> None:
        from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
        from sae_lens.config import SAETrainerConfig
        from sae_lens.training.sae_trainer import SAETrainer

        self.version = metadata.version("sae-lens")
        self.note = "scales by decoder norm, clips"
        F, d = start["W_enc"].shape
        self.model: torch.nn.Module = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=d, d_sae=F, k=k))
        fill(self.model, start | {"W_enc": start["W_enc"].T})
        config = SAETrainerConfig(
            total_training_samples=MANY, train_batch_size_samples=1, lr=lr, lr_end=lr
        )
        self.trainer = SAETrainer(config, self.model, data_provider=iter(()))

    def step(self, x: Tensor) -> Any:
        losses = self.trainer.step(x).losses
        self.trainer.n_training_steps += 1  # as its fit() does
        return losses["mse_loss"].detach()

    def fvu(self, loss: Tensor, x: Tensor) -> float:
        return per_token(float(loss), x)

    def parameters(self) -> Iterable[Tensor]:
        return list(self.model.parameters())

    def weights(self) -> Weights:
        return folded(self.model)


class DictionaryLearning:
    """dictionary-learning: TopKTrainer.update, without warm-up: the same learning rate for all."""

    def __init__(self, start: Weights, k: int, lr: float) -> None:
        from dictionary_learning.trainers.top_k import TopKTrainer

        self.version = metadata.version("dictionary-learning")
        self.note = "clips"
        F, d = start["W_enc"].shape
        self.trainer = TopKTrainer(
            steps=MANY,
            activation_dim=d,
            dict_size=F,
            k=k,
            layer=0,
            lm_name="none",
            lr=lr,
            warmup_steps=0,
            device="cpu",
        )
        values = {
            "encoder.weight": start["W_enc"],
            "encoder.bias": start["b_enc"],
            "decoder.weight": start["W_dec"].T,
            "b_dec": start["b_dec"],
        }
        fill(self.trainer.ae, values)
        self.t = 0

    def step(self, x: Tensor) -> float:
        self.t += 1  # its step 0 would replace b_dec
        return float(self.trainer.update(self.t, x))

    def fvu(self, loss: float, x: Tensor) -> float:
        return per_token(loss, x)

    def parameters(self) -> Iterable[Tensor]:
        return list(self.trainer.ae.parameters())

    def weights(self) -> Weights:
        ae = self.trainer.ae
        named = (ae.encoder.weight, ae.encoder.bias, ae.decoder.weight.T.contiguous(), ae.b_dec)
        return dict(zip(NAMES, map(Tensor.detach, named), strict=True))


def _without_torchvision() -> str:
    """Let overcomplete import without torchvision, which only its image models need."""
    try:
        import torchvision  # noqa: F401
    except (ImportError, RuntimeError):  # RuntimeError: built for another torch
        stand_in: Any = types.ModuleType("torchvision")
        stand_in.transforms = types.ModuleType("torchvision.transforms")
        sys.modules["torchvision"] = stand_in
        return ", no torchvision"
    return ""


class Overcomplete:
    """overcomplete: train_sae on one batch, TopKSAE, mean squared error, torch's Adam."""

    def __init__(self, start: Weights, k: int, lr: float) -> None:
        self.note = "no b_dec, clips" + _without_torchvision()
        from overcomplete.sae import TopKSAE, train_sae

        self.version = metadata.version("overcomplete")
        if start["b_dec"].any():
            raise ValueError("overcomplete has no b_dec: it cannot start from these weights")
        F, d = start["W_enc"].shape
        self.model: torch.nn.Module = TopKSAE(d, nb_concepts=F, top_k=k)
        values = {
            "encoder.final_block.0.weight": start["W_enc"],
            "encoder.final_block.0.bias": start["b_enc"],
            "dictionary._weights": start["W_dec"],
        }
        fill(self.model, values)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=lr)
        self.train = train_sae
        self.last = torch.tensor(0.0)

    def step(self, x: Tensor) -> Tensor:
        self.train(self.model, [x], self._criterion, self.optimizer, nb_epochs=1, monitoring=0)
        return self.last

    def _criterion(self, x: Tensor, x_hat: Tensor, *_: Tensor) -> Tensor:
        loss = (x - x_hat).square().mean()
        self.last = loss.detach()
        return loss

    def fvu(self, loss: Tensor, x: Tensor) -> float:
        return float(loss) * x.numel() / total_variance(x)

    def parameters(self) -> Iterable[Tensor]:
        return list(self.model.parameters())

    def weights(self) -> Weights:
        p = {name: t.detach() for name, t in self.model.named_parameters()}
        W_dec = p["dictionary._weights"]
        return {
            "W_enc": p["encoder.final_block.0.weight"],
            "b_enc": p["encoder.final_block.0.bias"],
            "W_dec": W_dec / W_dec.norm(dim=1, keepdim=True),
            "b_dec": torch.zeros(W_dec.shape[1]),
        }
