# SPDX-License-Identifier: Apache-2.0
"""SAELens' TopK sparse autoencoders on ksae's kernels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import lazy, sparse

if TYPE_CHECKING:
    _SAE = nn.Module
    _TrainingSAE = nn.Module
    _Config = object
    _TrainingConfig = object
else:
    from sae_lens import TopKSAE as _SAE
    from sae_lens import TopKSAEConfig as _Config
    from sae_lens import TopKTrainingSAE as _TrainingSAE
    from sae_lens import TopKTrainingSAEConfig as _TrainingConfig

ARCHITECTURE = "ksae_topk"


@dataclass
class TopKSAEConfig(_Config):
    """SAELens' TopKSAEConfig, naming our architecture."""

    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE


@dataclass(kw_only=True)
class TopKTrainingSAEConfig(_TrainingConfig):
    """SAELens' TopKTrainingSAEConfig, naming our architecture."""

    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE

    def get_inference_config_class(self) -> Any:
        """SAELens' own, so that inference files need no ksae."""
        return _Config


def _watched(hook: nn.Module) -> bool:
    """Whether somebody listens at a hook point."""
    return bool(hook._forward_hooks or hook._forward_pre_hooks or hook._backward_hooks)


class TopK:
    """Encoder and decoder of all classes."""

    if TYPE_CHECKING:
        cfg: Any
        d_head: Any
        use_error_term: bool
        activation_fn: Any
        W_enc: nn.Parameter  # [d, F], a view of storage in which each latent is one row
        b_enc: nn.Parameter  # [F]
        W_dec: nn.Parameter  # [F, d]
        b_dec: nn.Parameter  # [d]
        hook_sae_acts_pre: Any
        hook_sae_acts_post: Any
        hook_sae_recons: Any
        hook_sae_output: Any
        process_sae_in: Any
        run_time_activation_norm_fn_out: Any
        reshape_fn_out: Any

    def initialize_weights(self) -> None:
        super().initialize_weights()  # type: ignore[misc]
        self.W_enc = sparse.transposed(self.W_enc)

    def _code(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The code and the pre-activations [..., F], lazy where nobody listens."""
        sae_in = self.process_sae_in(x)
        W_enc, F = sparse.latent_rows(self.W_enc), self.cfg.d_sae
        norm = self.W_dec.norm(dim=-1) if self.cfg.rescale_acts_by_decoder_norm else None
        if _watched(self.hook_sae_acts_pre) or lazy.plain():
            hidden = self.hook_sae_acts_pre(sae_in @ self.W_enc + self.b_enc)
            hidden = hidden if norm is None else hidden * norm
            return self.hook_sae_acts_post(self.activation_fn(hidden)), hidden
        hidden = lazy.PreActivations(sae_in, W_enc, self.b_enc, relu=False, scale=norm)
        values, indices = hidden.rectified_topk(self.cfg.k)  # without the scale
        code = lazy.Code(values if norm is None else values * norm[indices], indices, F)
        code.unscaled = values
        if getattr(self.cfg, "use_sparse_activations", False):
            acts = lazy.coo(code)
        else:
            acts = code.dense() if _watched(self.hook_sae_acts_post) else code
        return self.hook_sae_acts_post(acts), hidden

    def decode(self, feature_acts: Tensor) -> Tensor:
        """Reconstruction [..., d] of a code [..., F]: lazy, dense or sparse."""
        code: Any = feature_acts
        if (sparse_of := getattr(feature_acts, "code", None)) is not None:
            indices = sparse_of.indices_
            values = self._unscaled(lazy.values_of(feature_acts), indices)
            return self._decoded(sparse.decode(values, indices, self.W_dec, self.b_dec))
        if (known := lazy.known(code)) is not None:
            values, indices = known
            values = code.unscaled if hasattr(code, "unscaled") else self._unscaled(values, indices)
            out = sparse.decode(values, indices, self.W_dec, self.b_dec)
            scale = self._norm().detach() if self.cfg.rescale_acts_by_decoder_norm else None
            return self._decoded(lazy.decoded(code, out, self.W_dec, scale))
        acts = lazy.dense(feature_acts.to_dense() if feature_acts.is_sparse else feature_acts)
        return self._decoded(self._unscaled(acts) @ self.W_dec + self.b_dec)

    def _unscaled(self, acts: Tensor, indices: Tensor | None = None) -> Tensor:
        """The dense code [..., F], or its entries [..., k] at indices, as the decoder takes it."""
        if not self.cfg.rescale_acts_by_decoder_norm:
            return acts
        norm = self._norm()
        return acts / (norm if indices is None else norm[indices])

    def _norm(self) -> Tensor:
        """Norms [F] of the decoder's rows, none of them 0: 0 / 0 is 0."""
        norm: Tensor = self.W_dec.norm(dim=-1)
        return norm.clamp(min=torch.finfo(norm.dtype).tiny)

    def _decoded(self, out: Tensor) -> Tensor:
        """What follows the decoder's product: hook, the input's normalization undone, heads."""
        out = self.run_time_activation_norm_fn_out(self.hook_sae_recons(out))
        result: Tensor = self.reshape_fn_out(out, self.d_head)
        return result

    def encode(self, x: Tensor) -> Tensor:
        """The code [..., F] of x [..., d]; COO with use_sparse_activations."""
        return lazy.dense(self._code(x)[0])

    def forward(self, x: Tensor) -> Tensor:
        """Reconstruction [..., d] of x [..., d]."""
        if self.use_error_term:
            error: Tensor = super().forward(x)  # type: ignore[misc]
            return error
        out: Tensor = self.hook_sae_output(self.decode(self._code(x)[0]))
        return out

    def process_state_dict_for_saving(self, state_dict: dict[str, Any]) -> None:
        """Files hold contiguous tensors of SAELens' shapes."""
        super().process_state_dict_for_saving(state_dict)  # type: ignore[misc]
        state_dict["W_enc"] = state_dict["W_enc"].contiguous()


class TopKSAE(TopK, _SAE):
    """SAELens' TopKSAE for inference."""


class TopKTrainingSAE(TopK, _TrainingSAE):
    """SAELens' TopKTrainingSAE: hooks, losses and AuxK as there."""

    def encode_with_hidden_pre(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The code and the (norm-scaled) pre-activations [..., F] of x [..., d], lazy."""
        return self._code(x)

    def calculate_topk_aux_loss(
        self,
        sae_in: Tensor,
        sae_out: Tensor,
        hidden_pre: Tensor,
        dead_neuron_mask: Tensor | None,
    ) -> Tensor:
        """The d/2 largest dead pre-activations predict the residual, without b_dec."""
        if not isinstance(hidden_pre, lazy.PreActivations) or hidden_pre.built:
            loss: Tensor = super().calculate_topk_aux_loss(  # type: ignore[misc]
                sae_in, sae_out, hidden_pre, dead_neuron_mask
            )
            return loss
        if dead_neuron_mask is None or (count := int(dead_neuron_mask.sum())) == 0:
            return sae_out.new_tensor(0.0)
        if self.cfg.normalize_activations in ("constant_norm_rescale", "layer_norm"):
            raise ValueError(
                "TopKTrainingSAE: normalize_activations must leave the residual's scale for AuxK,"
                f" got {self.cfg.normalize_activations!r}"
            )
        residual = (sae_in - sae_out).detach()
        k_aux = sae_in.shape[-1] // 2
        weight = self.cfg.aux_loss_coefficient * min(count / k_aux, 1.0)
        values, indices = hidden_pre.signed_topk(min(k_aux, count), dead_neuron_mask)
        recons = self.reshape_fn_out(sparse.decode(values, indices, self.W_dec), self.d_head)
        loss = weight * (recons - residual).pow(2).sum(dim=-1).mean()
        return loss
