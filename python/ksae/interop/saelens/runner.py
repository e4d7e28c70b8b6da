# SPDX-License-Identifier: Apache-2.0
"""SAELens' runner: with torch's fused Adam, and for transcoders, whose input and target come from
one forward pass of a language model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import sparse
from .topk import TopK

if TYPE_CHECKING:

    class _Store:
        from_config_multi_hook: Any

        def get_multi_hook_data_loader(self) -> Iterator[dict[str, Tensor]]: ...

    class _Runner:
        def __init__(self, *args: Any) -> None: ...

        def run_trainer_with_interruption_handling(self, trainer: Any) -> Any: ...

else:
    from sae_lens import ActivationsStore as _Store
    from sae_lens import LanguageModelSAETrainingRunner as _Runner


def fused_adam(trainer: Any) -> Any:
    """Let SAELens' trainer step with torch's fused Adam: one pass over weights, moments and dense
    gradients instead of seven, and no temporaries of their size. The same but for rounding.

    Args:
        trainer: a `SAETrainer`, before `fit` and after `load_trainer_state`.

    Returns:
        trainer.
    """
    if isinstance(trainer.sae, TopK):
        sparse.latent_rows(trainer.sae.W_enc)
    for group in trainer.optimizer.param_groups:
        group["fused"], group["foreach"] = True, None
        for p in group["params"]:
            state = trainer.optimizer.state.get(p, {})
            for name, value in state.items():
                if value.dim():  # on a CPU it goes through memory without a look at strides
                    state[name] = torch.empty_like(p).copy_(value)
                else:
                    state[name] = value.to(p.device)
    return trainer


class LanguageModelSAETrainingRunner(_Runner):
    """SAELens' runner with `fused_adam`; all else as there."""

    def run_trainer_with_interruption_handling(self, trainer: Any) -> Any:
        return super().run_trainer_with_interruption_handling(fused_adam(trainer))


def pairs(
    batches: Iterable[dict[str, Tensor]], hook_name: str, hook_name_out: str
) -> Iterator[Tensor]:
    """A data provider for `SAETrainer`: [N, d_in + d_out] from {hook: [N, width]}.

    Args:
        batches: such as `ActivationsStore.get_multi_hook_data_loader()`.
        hook_name: the input's key. hook_name_out: the target's.
    """
    for batch in batches:
        yield torch.cat([batch[hook_name], batch[hook_name_out]], dim=-1)


class PairsStore(_Store):
    """SAELens' store of two hooks whose batches are [N, d_in + d_out]."""

    hook_name: str
    hook_name_out: str

    def get_data_loader(self) -> Iterator[Tensor]:
        return pairs(self.get_multi_hook_data_loader(), self.hook_name, self.hook_name_out)


class TranscoderTrainingRunner(LanguageModelSAETrainingRunner):
    """The same for `TopKTrainingTranscoderConfig`s and their skip variant.

    Arguments as there; the target is what `cfg.sae.hook_name_out` gives. SAELens' evaluation puts
    reconstructions back where the input was read, so it is not run.

    Raises:
        ValueError: no hook_name_out or the input's, a head index, cached activations.
    """

    if TYPE_CHECKING:
        model: Any
        activations_store: Any
        evaluator: Any

    def __init__(
        self,
        cfg: Any,
        override_dataset: Any = None,
        override_model: Any = None,
        override_sae: Any = None,
    ) -> None:
        name, out = type(self).__name__, getattr(cfg.sae, "hook_name_out", None)
        if out is None or out == cfg.hook_name:
            raise ValueError(
                f"{name}: cfg.sae.hook_name_out must be a hook other than {cfg.hook_name!r},"
                f" got {out!r}"
            )
        for option in ("hook_head_index", "use_cached_activations"):
            if getattr(cfg, option) not in (None, False):
                raise ValueError(
                    f"{name}: cfg.{option} must not be set, got {getattr(cfg, option)!r}"
                )
        if override_model is None:
            from sae_lens.load_model import load_model

            override_model = load_model(
                cfg.model_class_name,
                cfg.model_name,
                device=cfg.llm_device,
                model_from_pretrained_kwargs=cfg.model_from_pretrained_kwargs,
                hook_names=[cfg.hook_name, out],
            )
        super().__init__(cfg, override_dataset, override_model, override_sae)
        single = self.activations_store
        store = PairsStore.from_config_multi_hook(
            self.model,
            dataset=single.dataset,
            hook_names=[cfg.hook_name, out],
            hook_d_ins={cfg.hook_name: cfg.sae.d_in, out: cfg.sae.d_out},
            exclude_special_tokens=single.exclude_special_tokens,
            device=single.device,
            total_training_tokens=cfg.training_tokens,
            **{
                option: getattr(cfg, option)
                for option in (
                    "streaming",
                    "context_size",
                    "n_batches_in_buffer",
                    "store_batch_size_prompts",
                    "train_batch_size_tokens",
                    "prepend_bos",
                    "dtype",
                    "model_kwargs",
                    "autocast_lm",
                    "dataset_trust_remote_code",
                    "seqpos_slice",
                    "disable_concat_sequences",
                    "sequence_separator_token",
                    "activations_mixing_fraction",
                    "use_chat_formatting",
                )
            },
        )
        store.hook_name_out = out
        self.activations_store = store
        self.evaluator = None
