# SPDX-License-Identifier: Apache-2.0
"""TopK transcoders in SAELens: for inference beside its ReLU ones, and their training.

A transcoder predicts y, an MLP's output, from x, its input (arXiv 2406.11944; with a skip
connection, arXiv 2501.18823). SAELens' trainers hand a training step one tensor: here it holds
x and y side by side, [N, d_in + d_out]; see `runner.pairs` and `runner.TranscoderTrainingRunner`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import lazy
from .topk import TopK, TopKTrainingSAE, TopKTrainingSAEConfig

if TYPE_CHECKING:
    _Transcoder = nn.Module
    _SkipTranscoder = nn.Module

    class _Config:
        def __post_init__(self) -> None: ...

    class _SkipConfig: ...

    TrainStepInput = Any
    TrainStepOutput = Any
    Activation = Any
else:
    from sae_lens import SkipTranscoder as _SkipTranscoder
    from sae_lens import SkipTranscoderConfig as _SkipConfig
    from sae_lens import Transcoder as _Transcoder
    from sae_lens import TranscoderConfig as _Config
    from sae_lens.saes.sae import TrainStepInput, TrainStepOutput
    from sae_lens.saes.topk_sae import TopK as Activation

ARCHITECTURE = "ksae_topk_transcoder"
SKIP_ARCHITECTURE = "ksae_topk_skip_transcoder"


@dataclass
class TopKTranscoderConfig(_Config):
    """SAELens' TranscoderConfig with the fields of its TopKSAEConfig."""

    apply_b_dec_to_input: bool = False
    k: int = 100
    rescale_acts_by_decoder_norm: bool = False

    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE


@dataclass
class TopKSkipTranscoderConfig(TopKTranscoderConfig, _SkipConfig):
    """The same with a skip connection."""

    @classmethod
    def architecture(cls) -> str:
        return SKIP_ARCHITECTURE


@dataclass(kw_only=True)
class TopKTrainingTranscoderConfig(TopKTrainingSAEConfig):
    """TopKTrainingSAEConfig of a transcoder.

    Args:
        d_out: width of the target.
        hook_name_out: where a language model gives the target; `TranscoderTrainingRunner` reads it
            there, and it becomes the metadata's `hook_name_out`.

    Raises:
        ValueError: apply_b_dec_to_input, or a normalization of the activations: the trainer would
            estimate it on input and target together.
    """

    d_out: int = 768
    apply_b_dec_to_input: bool = False
    hook_name_out: str | None = None

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.apply_b_dec_to_input:
            raise ValueError(
                f"{name}: apply_b_dec_to_input must be False, for b_dec has the output's width,"
                " got True"
            )
        if self.normalize_activations != "none":  # type: ignore[attr-defined]
            raise ValueError(
                f"{name}: normalize_activations must be 'none', got {self.normalize_activations!r}"  # type: ignore[attr-defined]
            )
        if self.hook_name_out is not None:
            self.metadata.hook_name_out = self.hook_name_out  # type: ignore[attr-defined]
        super().__post_init__()  # type: ignore[misc]

    @classmethod
    def architecture(cls) -> str:
        return ARCHITECTURE

    def get_inference_config_class(self) -> Any:
        return TopKTranscoderConfig


@dataclass(kw_only=True)
class TopKTrainingSkipTranscoderConfig(TopKTrainingTranscoderConfig):
    """The same with a skip connection."""

    @classmethod
    def architecture(cls) -> str:
        return SKIP_ARCHITECTURE

    def get_inference_config_class(self) -> Any:
        return TopKSkipTranscoderConfig


class TopKTranscoding(TopK):
    """What the transcoders below do otherwise than an SAE."""

    if TYPE_CHECKING:
        W_skip: nn.Parameter  # [d_out, d_in], of the skip variants
        dtype: torch.dtype
        hook_sae_input: Any
        run_time_activation_norm_fn_in: Any

    @property
    def d_out(self) -> int:
        """Width of the output."""
        return int(self.cfg.d_out)

    def process_sae_in(self, sae_in: Tensor) -> Tensor:
        """The input [..., d_in], without subtracting b_dec."""
        x: Tensor = self.hook_sae_input(sae_in.to(self.dtype))
        return self.run_time_activation_norm_fn_in(x)  # type: ignore[no-any-return]

    def _decoded(self, out: Tensor) -> Tensor:
        """The target has a scale of its own: no normalization is undone."""
        return self.hook_sae_recons(out)  # type: ignore[no-any-return]

    def _predict(self, x: Tensor, code: Tensor) -> Tensor:
        """Output [..., d_out] of an input [..., d_in] and its code [..., F]."""
        out = self.decode(code)
        if hasattr(self, "W_skip"):
            out = out + x.to(self.W_skip.dtype) @ self.W_skip.T
        return self.hook_sae_output(out)  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        """Output [..., d_out] of x [..., d_in]."""
        return self._predict(x, self._code(x)[0])

    def forward_with_activations(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Output [..., d_out] and code [..., F], of which the output is a function."""
        code = self.encode(x) if torch.is_grad_enabled() else self._code(x)[0]
        return self._predict(x, code), lazy.dense(code)


class TopKTranscoder(TopKTranscoding, _Transcoder):
    """SAELens' Transcoder with a TopK activation, for inference."""

    config_class: Any = TopKTranscoderConfig

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any]) -> TopKTranscoder:
        """An untrained one of what `cfg.to_dict()` returned."""
        return cls(cls.config_class.from_dict(config_dict))

    def get_activation_fn(self) -> Any:
        return Activation(self.cfg.k, use_sparse_activations=False)

    def fold_W_dec_norm(self) -> None:
        """Unit decoder rows, their norms moved to the encoder.

        Raises:
            NotImplementedError: the selection does not look at the norms, so that it would change.
        """
        if not self.cfg.rescale_acts_by_decoder_norm:
            raise NotImplementedError(
                f"{type(self).__name__}: rescale_acts_by_decoder_norm must be True to fold decoder"
                " norms without another selection, got False"
            )
        super().fold_W_dec_norm()  # type: ignore[misc]


class TopKSkipTranscoder(TopKTranscoder, _SkipTranscoder):
    """The same with a skip connection, as SAELens' SkipTranscoder."""

    config_class = TopKSkipTranscoderConfig


class TopKTrainingTranscoder(TopKTranscoding, TopKTrainingSAE):
    """TopK transcoder for SAELens' trainers: loss sum over d_out of (y - out)^2, mean over tokens;
    AuxK as in TopKTrainingSAE, on the residual of y.

    A batch is [N, d_in + d_out]: each row an input and its target.
    """

    skip = False

    if TYPE_CHECKING:
        mse_loss_fn: Any
        calculate_aux_loss: Any

    def __init__(self, cfg: Any) -> None:
        super().__init__(cfg)

    def initialize_weights(self) -> None:
        """Random directions in the encoder and, of their own, in the decoder, of the norm
        cfg.decoder_init_norm (None: about sqrt(2)); zeros elsewhere."""
        cfg: Any = self.cfg
        like: dict[str, Any] = {"dtype": self.dtype, "device": self.device}

        def rows(width: int) -> Tensor:
            t = nn.init.kaiming_uniform_(torch.empty(cfg.d_sae, width, **like))
            if cfg.decoder_init_norm is not None:
                t *= cfg.decoder_init_norm / t.norm(dim=-1, keepdim=True)
            return t

        self.b_dec = nn.Parameter(torch.zeros(cfg.d_out, **like))
        self.b_enc = nn.Parameter(torch.zeros(cfg.d_sae, **like))
        self.W_dec = nn.Parameter(rows(cfg.d_out))
        self.W_enc = nn.Parameter(rows(cfg.d_in).T)
        if self.skip:
            self.W_skip = nn.Parameter(torch.zeros(cfg.d_out, cfg.d_in, **like))

    def training_forward_pass(self, step_input: TrainStepInput) -> TrainStepOutput:
        """Losses of a batch [N, d_in + d_out]; the output's `sae_in` is the target.

        Raises:
            ValueError: the batch is of another width.
        """
        widths = [self.cfg.d_in, self.cfg.d_out]
        if step_input.sae_in.shape[-1] != sum(widths):
            raise ValueError(
                f"{type(self).__name__}: sae_in must be of width d_in + d_out = {sum(widths)},"
                f" input and target side by side, got {list(step_input.sae_in.shape)}"
            )
        x, y = step_input.sae_in.split(widths, dim=-1)
        code, hidden_pre = self.encode_with_hidden_pre(x)
        out = self._predict(x, code)
        losses = {"mse_loss": self.mse_loss_fn(out, y).sum(dim=-1).mean()}
        of_target = replace(step_input, sae_in=y)
        losses |= self.calculate_aux_loss(of_target, code, hidden_pre, out)
        return TrainStepOutput(
            sae_in=y,
            sae_out=out,
            feature_acts=code,
            hidden_pre=hidden_pre,
            loss=sum(losses.values()),
            losses=losses,
        )


class TopKTrainingSkipTranscoder(TopKTrainingTranscoder):
    """The same with a skip connection, zero at first."""

    skip = True
