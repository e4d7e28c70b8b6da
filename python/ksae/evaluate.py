# SPDX-License-Identifier: Apache-2.0
"""Held-out evaluation: reconstruction, and what a language model loses with the SAE spliced in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ksae.metrics import Accumulator
from ksae.modules import SparseCoder

Batch = Tensor | tuple[Tensor, Tensor]  # x [N, d], or (x, y) for a transcoder


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured: `ksae.metrics.DEFINITIONS` by name, and each latent's frequency."""

    metrics: dict[str, float]
    frequency: Tensor  # [F] float64, share of tokens on which the latent fired
    tokens: int


@torch.no_grad()
def evaluate(
    model: SparseCoder, batches: Iterable[Batch], *, max_tokens: int | None = None
) -> Evaluation:
    """Measures a model on held-out activations.

    Args:
        model: a TopKSAE or Transcoder.
        batches: tensors [N, d], or pairs (x, y) for a transcoder.
        max_tokens: stop after this many tokens; None takes the whole stream.

    Numerics: sums in float64, so the result does not depend on how the stream is split.
    """
    accumulator: Accumulator | None = None
    with _eval_mode(model):
        for x, y in _pairs(model, batches, max_tokens):
            output = model(x)
            if accumulator is None:
                accumulator = Accumulator(model.d_out, model.d_sae)
            accumulator.update(y, output.recon, output.values, output.indices)
    if accumulator is None:
        raise ValueError("eval: the stream must have at least one token, got none")
    return Evaluation(accumulator.results(), accumulator.frequency(), accumulator.tokens)


# name -> definition. Nats a token, over every next token that is neither padding nor excluded.
LM_DEFINITIONS: dict[str, str] = {
    "ce_clean": "cross-entropy of the language model",
    "ce_sae": "the same with the reconstruction in place of the activation",
    "ce_zero": "the same with zero in place of the activation",
    "ce_increase": "ce_sae - ce_clean",
    "ce_recovered": "(ce_zero - ce_sae) / (ce_zero - ce_clean), one ratio of mean cross-entropies",
    "kl_sae": "mean over tokens of KL(clean, with the reconstruction)",
    "kl_zero": "mean over tokens of KL(clean, with zero)",
    "kl_recovered": "(kl_zero - kl_sae) / kl_zero",
}


@torch.no_grad()
def evaluate_language_model(
    model: nn.Module,
    language_model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    hook: str,
    *,
    target_hook: str | None = None,
    exclude: Iterable[int] = (),
    progress: Callable[[int], object] | None = None,
) -> dict[str, float]:
    """Measures what a language model loses when a reconstruction replaces the activation at a hook.

    Args:
        model: a TopKSAE, or a Transcoder with `target_hook`.
        language_model: a Hugging Face causal language model.
        batches: pairs (token ids [B, T], attention mask [B, T]) of held-out text.
        hook: where the SAE reads.
        target_hook: where a transcoder writes; None: where it reads.
        exclude: token ids whose activations are neither replaced nor zeroed (the special tokens
            that training left out), and which do not count as predictions.
        progress: called with the number of tokens of each batch done.

    Returns:
        LM_DEFINITIONS by name, and `ce_tokens`, the number of predictions measured.

    Numerics: per-token losses in float32 from float32 logits, summed over tokens in float64.
    """
    excluded = torch.tensor(sorted(set(exclude)), dtype=torch.int64)
    sums = dict.fromkeys(("clean", "sae", "zero", "kl_sae", "kl_zero"), 0.0)
    predictions = 0
    with _eval_mode(model), _eval_mode(language_model):
        for ids, mask in batches:
            device = next(language_model.parameters()).device
            ids, mask = ids.to(device), mask.to(device)
            keep = mask.bool() & ~torch.isin(
                ids, excluded.to(device)
            )  # [B, T] tokens the SAE acts on
            counted = keep[:, 1:] & mask[:, :-1].bool()  # [B, T-1] next tokens that are measured
            targets = ids[:, 1:][counted]  # [M]

            clean = _log_probs(language_model, ids, mask, counted)  # [M, vocabulary]
            sums["clean"] -= _at(clean, targets)
            replacements: list[tuple[str, _Reconstruct | _Zero]] = [
                ("sae", _Reconstruct(model, keep)),
                ("zero", _Zero(keep)),
            ]
            for name, replacement in replacements:
                with _spliced(language_model, hook, target_hook, replacement):
                    changed = _log_probs(language_model, ids, mask, counted)
                sums[name] -= _at(changed, targets)
                kl = torch.nn.functional.kl_div(changed, clean, reduction="none", log_target=True)
                sums["kl_" + name] += float(kl.sum(-1).double().sum())
                del changed, kl
            predictions += len(targets)
            if progress is not None:
                progress(int(mask.sum()))
    if predictions == 0:
        raise ValueError(
            "eval: the held-out text must have at least two tokens, got none to predict"
        )
    mean = {name: total / predictions for name, total in sums.items()}
    damage = mean["zero"] - mean["clean"]
    return {
        "ce_clean": mean["clean"],
        "ce_sae": mean["sae"],
        "ce_zero": mean["zero"],
        "ce_increase": mean["sae"] - mean["clean"],
        "ce_recovered": (mean["zero"] - mean["sae"]) / damage if damage > 0 else float("nan"),
        "kl_sae": mean["kl_sae"],
        "kl_zero": mean["kl_zero"],
        "kl_recovered": 1 - mean["kl_sae"] / mean["kl_zero"]
        if mean["kl_zero"] > 0
        else float("nan"),
        "ce_tokens": float(predictions),
    }


class _Reconstruct:
    """Replaces the activations [B, T, d] at `keep` [B, T] by the SAE's reconstruction."""

    def __init__(self, model: nn.Module, keep: Tensor) -> None:
        self.model, self.keep = model, keep
        self.source: Tensor | None = None  # a transcoder's input, recorded at its own hook

    def read(self, x: Tensor) -> Tensor:
        self.source = x
        return x

    def __call__(self, x: Tensor) -> Tensor:
        source = x if self.source is None else self.source
        parameter = next(self.model.parameters())
        rows = source[self.keep].to(parameter.device, parameter.dtype)  # [M, d]
        recon = self.model(rows).recon.to(x.device, x.dtype)  # [M, d]
        return x.masked_scatter(self.keep.unsqueeze(-1), recon)


class _Zero:
    def __init__(self, keep: Tensor) -> None:
        self.keep = keep

    def __call__(self, x: Tensor) -> Tensor:
        return x.masked_fill(self.keep.unsqueeze(-1), 0)


@contextmanager
def _spliced(
    language_model: nn.Module, hook: str, target_hook: str | None, replacement: _Reconstruct | _Zero
) -> Iterator[None]:
    from ksae.activations import splice

    with ExitStack() as stack:
        if target_hook is not None and isinstance(replacement, _Reconstruct):
            stack.enter_context(splice(language_model, hook, replacement.read))
        stack.enter_context(splice(language_model, target_hook or hook, replacement))
        yield


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation must leave no trace: in train mode a forward pass would count dead latents."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _pairs(
    model: nn.Module, batches: Iterable[Batch], max_tokens: int | None
) -> Iterator[tuple[Tensor, Tensor]]:
    parameter = next(model.parameters())
    left = max_tokens
    for batch in batches:
        x, y = batch if isinstance(batch, tuple) else (batch, batch)
        if left is not None:
            x, y = x[:left], y[:left]
            left -= len(x)
        if len(x):
            yield x.to(parameter.device, parameter.dtype), y.to(parameter.device)
        if left == 0:
            return


def _log_probs(language_model: nn.Module, ids: Tensor, mask: Tensor, counted: Tensor) -> Tensor:
    logits: Tensor = language_model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return logits[:, :-1][counted].float().log_softmax(-1)  # [M, vocabulary]


def _at(log_probs: Tensor, targets: Tensor) -> float:
    return float(log_probs.gather(1, targets.unsqueeze(1)).double().sum())
