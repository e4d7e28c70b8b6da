# SPDX-License-Identifier: Apache-2.0
"""Any autoencoder of ksae as SAEBench's evaluations take one (adamkarvonen/SAEBench)."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ksae.coders.coder import SparseCoder


@dataclass
class SAEBenchConfig:
    """What SAEBench reads of an autoencoder's `cfg`; the fields of its CustomSAEConfig."""

    model_name: str
    d_in: int
    d_sae: int
    hook_layer: int
    hook_name: str
    context_size: int | None = None
    hook_head_index: int | None = None
    architecture: str = "ksae"
    apply_b_dec_to_input: bool = True
    finetuning_scaling_factor: bool = False
    activation_fn_str: str = ""
    activation_fn_kwargs: dict[str, Any] = field(default_factory=dict)
    prepend_bos: bool = True
    normalize_activations: str = "none"
    dtype: str = "float32"
    device: str = "cpu"
    model_from_pretrained_kwargs: dict[str, Any] = field(default_factory=dict)
    dataset_path: str = ""
    dataset_trust_remote_code: bool = False
    seqpos_slice: tuple[int | None, ...] = (None,)
    training_tokens: int = -100_000
    sae_lens_training_version: str | None = None
    neuronpedia_id: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """All fields, plain."""
        return asdict(self)


class SAEBenchSAE(nn.Module):
    """An autoencoder with the interface of SAEBench's BaseSAE: W_enc [d, F], W_dec [F, d], b_enc,
    b_dec, device, dtype, cfg, encode to a dense code, decode, forward.

    Selection is the coder's own, as in use. Decoder rows of another length than 1, which SAEBench
    refuses, are folded into the code: values are times the rows' lengths, and the reconstruction is
    the same.

    Args:
        coder: an autoencoder, which is put in eval mode.
        model_name: of the language model, as SAEBench loads it.
        hook_layer: the layer of the activations.
        hook_name: TransformerLens' name of the place; default the residual stream after the layer.

    Raises:
        ValueError: a transcoder, whose inputs are not what it reconstructs.

    Example:
        >>> import torch, ksae
        >>> from ksae.interop.saebench import SAEBenchSAE
        >>> sae = SAEBenchSAE(ksae.TopKSAE(8, 32, 4), model_name="gpt2", hook_layer=7)
        >>> sae.encode(torch.randn(2, 5, 8)).shape, sae.cfg.hook_name
        (torch.Size([2, 5, 32]), 'blocks.7.hook_resid_post')
    """

    def __init__(
        self, coder: SparseCoder, *, model_name: str, hook_layer: int, hook_name: str | None = None
    ) -> None:
        super().__init__()
        if not coder.centred:
            kind = type(coder).__name__
            raise ValueError(f"SAEBenchSAE: coder must be an autoencoder, got {kind}")
        self.coder = coder.eval()
        self.cfg = SAEBenchConfig(
            model_name=model_name,
            d_in=coder.d_in,
            d_sae=coder.d_sae,
            hook_layer=hook_layer,
            hook_name=hook_name or f"blocks.{hook_layer}.hook_resid_post",
        )
        self.cfg.activation_fn_str = type(coder.activation).__name__.lower()
        self._note()

    def _note(self) -> None:
        self.cfg.dtype = str(self.dtype).removeprefix("torch.")
        self.cfg.device = str(self.device)

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return self.coder.W_enc.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the parameters."""
        return self.coder.W_enc.dtype

    @property
    def _lengths(self) -> Tensor:
        """Of the decoder rows, [F]; 1 where a row is 0, or of unit length but for rounding."""
        rows = self.coder.W_dec.detach()
        lengths = torch.linalg.vector_norm(rows, dim=1, dtype=torch.float32)
        near = (lengths - 1).abs() < 4 * torch.finfo(rows.dtype).eps
        return torch.where((lengths == 0) | near, 1, lengths).to(rows.dtype)

    @property
    def W_enc(self) -> Tensor:
        """[d, F]"""
        return (self.coder.W_enc.detach() * self._lengths[:, None]).T

    @property
    def W_dec(self) -> Tensor:
        """[F, d], unit rows"""
        return self.coder.W_dec.detach() / self._lengths[:, None]

    @property
    def b_enc(self) -> Tensor:
        """[F]"""
        return self.coder.b_enc.detach() * self._lengths

    @property
    def b_dec(self) -> Tensor:
        """[d]"""
        return self.coder.b_dec.detach()

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """x [..., d] -> the code with its zeros, [..., F]."""
        return self.coder.encode_dense(x.to(self.dtype)) * self._lengths

    @torch.no_grad()
    def decode(self, feature_acts: Tensor) -> Tensor:
        """A dense code [..., F] -> [..., d]."""
        return feature_acts @ self.W_dec + self.b_dec

    def forward(self, x: Tensor) -> Tensor:
        """The reconstruction of x [..., d]."""
        return self.decode(self.encode(x))

    def to(self, *args: Any, **kwargs: Any) -> SAEBenchSAE:
        """As of any module; `cfg` follows."""
        super().to(*args, **kwargs)
        self._note()
        return self
