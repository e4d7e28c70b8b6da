# SPDX-License-Identifier: Apache-2.0
"""OpenAI's sparse_autoencoder on ksae's kernels: `Autoencoder` with TopK, and `FastAutoencoder`.

The library is a git repository, not a package that can be required; the surface is its own. What
differs: one process works, the input gets a gradient, and nothing is written into pre-activations.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import functional
from ..coders.code import recomputes
from . import lazy, sparse


class TopK(nn.Module):
    """The k largest entries of each row, then a ReLU."""

    def __init__(self, k: int, postact_fn: nn.Module | None = None) -> None:
        super().__init__()
        self.k, self.postact_fn = k, nn.ReLU() if postact_fn is None else postact_fn
        if not isinstance(self.postact_fn, nn.ReLU):
            name = type(self.postact_fn).__name__
            raise ValueError(f"TopK: postact_fn must be a ReLU, got {name}")

    def forward(self, x: Tensor) -> Tensor:
        """[..., F] -> [..., F]."""
        values, indices = functional.topk(x, self.k)
        return sparse.scatter(values.relu(), indices, x.shape[-1])


def _standardise(x: Tensor, eps: float = 1e-5) -> tuple[Tensor, Tensor, Tensor]:
    """Each token to mean 0 and (unbiased) standard deviation 1; x, mean, deviation."""
    mu = x.mean(dim=-1, keepdim=True)
    x = x - mu
    std = x.std(dim=-1, keepdim=True)
    return x / (std + eps), mu, std


class Autoencoder(nn.Module):
    """OpenAI's Autoencoder with TopK.

    Args:
        n_latents: F. n_inputs: d. activation: `TopK(k)`.
        tied: not offered. normalize: standardise each token and undo it on the output.

    Raises:
        ValueError: tied, or an activation that is not `TopK`.
    """

    stats_last_nonzero: Tensor  # [F] int64: forward passes since it fired

    def __init__(
        self,
        n_latents: int,
        n_inputs: int,
        activation: nn.Module,
        tied: bool = False,
        normalize: bool = False,
    ) -> None:
        super().__init__()
        if tied:
            raise ValueError("Autoencoder: tied must be False, got True")
        if not isinstance(activation, TopK):
            name = type(activation).__name__
            raise ValueError(f"Autoencoder: activation must be a TopK, got {name}")
        self.pre_bias = nn.Parameter(torch.zeros(n_inputs))
        self.encoder = nn.Linear(n_inputs, n_latents, bias=False)
        self.latent_bias = nn.Parameter(torch.zeros(n_latents))
        self.activation = activation
        self.decoder = nn.Linear(n_latents, n_inputs, bias=False)
        self.decoder.weight = sparse.transposed(self.decoder.weight)
        self.normalize = normalize
        self.register_buffer("stats_last_nonzero", torch.zeros(n_latents, dtype=torch.long))
        self.register_buffer("latents_activation_frequency", torch.ones(n_latents))
        self.register_buffer("latents_mean_square", torch.zeros(n_latents))

    def preprocess(self, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """x standardised, and what undoes it."""
        if not self.normalize:
            return x, {}
        x, mu, std = _standardise(x)
        return x, {"mu": mu, "std": std}

    def _code(self, x: Tensor) -> tuple[Tensor, Tensor]:
        k = self.activation.k
        assert isinstance(k, int)
        return functional.topk_encode(x, self.encoder.weight, self.latent_bias, k, self.pre_bias)

    def encode_pre_act(self, x: Tensor) -> Tensor:
        """Pre-activations [..., F] of a preprocessed x [..., d]; computed when read."""
        weights = self.encoder.weight, self.latent_bias, self.pre_bias
        return lazy.pre_activations(x, *weights, relu=False)

    def encode(self, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
        """The dense code [..., F], and what `decode` needs to undo the preprocessing."""
        x, info = self.preprocess(x)
        return sparse.scatter(*self._code(x), self.latent_bias.shape[0]), info

    def decode(self, latents: Tensor, info: dict[str, Any] | None = None) -> Tensor:
        """Reconstruction [..., d]."""
        code = lazy.known(latents)
        rows = sparse.latent_rows(self.decoder.weight)
        if code is None:
            out = nn.functional.linear(latents, self.decoder.weight, self.pre_bias)
        else:
            out = lazy.decoded(latents, sparse.decode(*code, rows, self.pre_bias), rows)
        if not self.normalize:
            return out
        if info is None:
            raise ValueError("Autoencoder: info must be given with normalize, got None")
        result: Tensor = out * info["std"] + info["mu"]
        return result

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """latents_pre_act, latents [..., F], both lazy, and recons [..., d]."""
        x, info = self.preprocess(x)
        values, indices = self._code(x)
        latents = lazy.code(values, indices, self.latent_bias.shape[0])
        recons = self.decode(latents, info)
        if not recomputes():
            fired = torch.zeros_like(self.stats_last_nonzero)
            fired.index_add_(0, indices.flatten(), (values > 0).flatten().long())
            self.stats_last_nonzero.mul_(fired == 0).add_(1)
        latents_pre_act = self.encode_pre_act(x)
        lazy.selected(latents_pre_act, values, indices)
        return latents_pre_act, latents, recons

    @classmethod
    def from_state_dict(cls, state_dict: dict[str, Any], strict: bool = True) -> Autoencoder:
        """An autoencoder of a file's entries: "TopK" implies normalize.

        Raises:
            ValueError: the activation is not TopK.
        """
        state = dict(state_dict)
        F, d = state["encoder.weight"].shape
        name = state.pop("activation", None)
        if name != "TopK":
            raise ValueError(f"Autoencoder: activation must be 'TopK', got {name!r}")
        settings = state.pop("activation_state_dict", None) or {}
        own = cls(F, d, TopK(int(settings["k"])), normalize=True)
        own.load_state_dict(state, strict=strict)
        return own

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The tensors, the activation's name and its k."""
        prefix = kwargs.get("prefix", "")
        state: dict[str, Any] = super().state_dict(*args, **kwargs)
        state[prefix + "activation"] = "TopK"
        state[prefix + "activation_state_dict"] = {"k": self.activation.k, "postact_fn": "ReLU"}
        return state

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        for name in ("activation", "activation_state_dict"):
            state_dict.pop(prefix + name, None)
        super()._load_from_state_dict(state_dict, prefix, *args)


class FastAutoencoder(nn.Module):
    """OpenAI's FastAutoencoder in one process: TopK, and AuxK candidates of the dead latents.

    Args:
        n_dirs_local: F. d_model: d. k: active latents. auxk: dead latents for AuxK, None for none.
        dead_steps_threshold: a latent is dead once it has not fired for more forward passes.
        comms: None; sharding is not offered.

    Raises:
        ValueError: comms is given.
    """

    stats_last_nonzero: Tensor  # [F] int64

    def __init__(
        self,
        n_dirs_local: int,
        d_model: int,
        k: int,
        auxk: int | None,
        dead_steps_threshold: int,
        comms: Any = None,
    ) -> None:
        super().__init__()
        if comms is not None:
            raise ValueError(f"FastAutoencoder: comms must be None, got {type(comms).__name__}")
        self.n_dirs_local, self.d_model, self.k, self.auxk = n_dirs_local, d_model, k, auxk
        self.dead_steps_threshold = dead_steps_threshold
        self.encoder = nn.Linear(d_model, n_dirs_local, bias=False)
        self.decoder = nn.Linear(n_dirs_local, d_model, bias=False)
        self.pre_bias = nn.Parameter(torch.zeros(d_model))
        self.latent_bias = nn.Parameter(torch.zeros(n_dirs_local))
        self.register_buffer("stats_last_nonzero", torch.zeros(n_dirs_local, dtype=torch.long))
        rows = self.encoder.weight.data / self.encoder.weight.data.norm(dim=1, keepdim=True)
        self.decoder.weight = nn.Parameter(rows.clone().T)

    def _encode(self, x: Tensor, k: int, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        W_enc, b_enc = self.encoder.weight, self.latent_bias
        return functional.topk_encode(x, W_enc, b_enc, k, self.pre_bias, mask)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor | None]]:
        """recons [..., d], {"auxk_inds", "auxk_vals"} [..., auxk] (None without auxk)."""
        values, indices = self._encode(x, self.k)
        silent = 1e-3  # at this value and below
        if not recomputes():
            fired = torch.zeros_like(self.stats_last_nonzero)
            fired.index_add_(0, indices.flatten(), (values > silent).flatten().long())
            self.stats_last_nonzero.mul_(fired == 0).add_(1)
        auxk_vals = auxk_inds = None
        if self.auxk is not None:
            dead = self.stats_last_nonzero > self.dead_steps_threshold
            auxk_vals, auxk_inds = self._encode(x, self.auxk, dead)
        recons = self.decode_sparse(indices, values)
        return recons, {"auxk_inds": auxk_inds, "auxk_vals": auxk_vals}

    def decode_sparse(self, inds: Tensor, vals: Tensor) -> Tensor:
        """Reconstruction [..., d] of a code [..., k]."""
        return sparse.decode(vals, inds, sparse.latent_rows(self.decoder.weight), self.pre_bias)
