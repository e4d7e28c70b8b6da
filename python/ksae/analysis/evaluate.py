# SPDX-License-Identifier: Apache-2.0
"""Held-out evaluation: reconstruction, and what a language model loses with the SAE spliced in."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from ksae.analysis.metrics import Accumulator
from ksae.coders.coder import SparseCoder
from ksae.coders.predictions import prefix_recons

# x [N, d], or (x, y) for a transcoder, or (x, y or None, g) to select with gradients
Batch = Tensor | tuple[Tensor, Tensor] | tuple[Tensor, Tensor | None, Tensor]


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` measured: `metrics.DEFINITIONS` by name, and each latent's frequency.

    Metrics have fvu_m too for each prefix of m latents but the last (Matryoshka).
    """

    metrics: dict[str, float]
    frequency: Tensor  # [F] float64, share of tokens on which the latent fired
    tokens: int


@torch.no_grad()
def evaluate(
    model: SparseCoder, batches: Iterable[Batch], *, max_tokens: int | None = None
) -> Evaluation:
    """Measures a model on held-out activations.

    Args:
        model: a TopKSAE, GradTopKSAE or Transcoder.
        batches: tensors [N, d], or pairs (x, y) for a transcoder, or triples (x, y, g): then a
            GradTopKSAE selects with the gradients g. Gradients of a loss on the text's own labels
            make the result an oracle's: they are not to be had where the text is not known.
        max_tokens: stop after this many tokens; None takes the whole stream.

    Numerics: sums in float64, so the result does not depend on how the stream is split.
    """
    accumulator: Accumulator | None = None
    squares = [0.0] * max(len(model.prefixes), 1)
    with eval_mode(model):
        for x, y, g in _triples(model, batches, max_tokens):
            output = model(x) if g is None else model(x, grad=g)
            if accumulator is None:
                accumulator = Accumulator(model.d_out, model.d_sae)
            accumulator.update(y, output.recon, output.values, output.indices)
            for m, recon in enumerate(prefix_recons(model, x, output.recon, output.code)):
                squares[m] += float((y.double() - recon.double()).square().sum())
    if accumulator is None:
        raise ValueError("eval: the stream must have at least one token, got none")
    metrics = accumulator.results()
    for width, square in zip(model.prefixes[:-1], squares, strict=False):
        metrics[f"fvu_{width}"] = metrics["fvu"] * square / squares[-1]
    return Evaluation(metrics, accumulator.frequency(), accumulator.tokens)


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
# The same where latents are selected with the gradient of the loss at the clean activation.
ORACLE_DEFINITIONS: dict[str, str] = {
    f"{name}_oracle": f"uses labels (oracle): {LM_DEFINITIONS[name]}"
    for name in LM_DEFINITIONS
    if name not in ("ce_clean", "ce_zero", "kl_zero")
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
    oracle: bool = False,
    progress: Callable[[int], object] | None = None,
) -> dict[str, float]:
    """Measures what a language model loses when a reconstruction replaces the activation at a hook.

    Args:
        model: a TopKSAE or GradTopKSAE, or a Transcoder with `target_hook`.
        language_model: a Hugging Face causal language model.
        batches: pairs (token ids [B, T], attention mask [B, T]) of held-out text.
        hook: where the SAE reads.
        target_hook: where a transcoder writes; None: where it reads.
        exclude: token ids whose activations are neither replaced nor zeroed (the special tokens
            that training left out), and which do not count as predictions.
        oracle: also measure a GradTopKSAE that selects with the gradient of the loss, labels
            included, at the clean activation.
        progress: called with the number of tokens of each batch done.

    Returns:
        LM_DEFINITIONS by name, with `oracle` ORACLE_DEFINITIONS, and `ce_tokens`, the number of
        predictions measured.

    Numerics: per-token losses in float32 from float32 logits, summed over tokens in float64.
    """
    measured = compare_language_model(
        {"": model},
        language_model,
        batches,
        hook,
        target_hook=target_hook,
        exclude=exclude,
        oracle=[""] if oracle else [],
        progress=progress,
    )
    return measured[""]


@torch.no_grad()
def compare_language_model(
    models: Mapping[str, nn.Module],
    language_model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    hook: str,
    *,
    target_hook: str | None = None,
    exclude: Iterable[int] = (),
    oracle: Iterable[str] = (),
    progress: Callable[[int], object] | None = None,
) -> dict[str, dict[str, float]]:
    """`evaluate_language_model` of several models on the same text, with one clean and one
    zero-ablated pass for all of them. `oracle` names those that are also measured with gradients.
    """
    excluded = torch.tensor(sorted(set(exclude)), dtype=torch.int64)
    with_gradient = set(oracle)
    clean_sum, predictions = 0.0, 0
    ce: dict[str, float] = {}  # sums over predictions, by what was spliced in
    kl: dict[str, float] = {}
    with ExitStack() as stack:
        for each in (language_model, *models.values()):
            stack.enter_context(eval_mode(each))
        for ids, mask in batches:
            device = next(language_model.parameters()).device
            ids, mask = ids.to(device), mask.to(device)
            keep = mask.bool() & ~torch.isin(
                ids, excluded.to(device)
            )  # [B, T] tokens the SAE acts on
            counted = keep[:, 1:] & mask[:, :-1].bool()  # [B, T-1] next tokens that are measured
            targets = ids[:, 1:][counted]  # [M]

            clean = _log_probs(language_model, ids, mask, counted)  # [M, vocabulary]
            clean_sum -= _at(clean, targets)
            replacements: dict[str, _Reconstruct | _Zero] = {"zero": _Zero(keep)}
            replacements |= {f"sae {name}": _Reconstruct(m, keep) for name, m in models.items()}
            if with_gradient:
                g = _gradient(language_model, ids, mask, keep, target_hook or hook)  # [B, T, d]
                for name in with_gradient:
                    replacements[f"oracle {name}"] = _Reconstruct(models[name], keep, g)
            for name, replacement in replacements.items():
                with _spliced(language_model, hook, target_hook, replacement):
                    changed = _log_probs(language_model, ids, mask, counted)
                ce[name] = ce.get(name, 0.0) - _at(changed, targets)
                each_kl = nnf.kl_div(changed, clean, reduction="none", log_target=True)
                kl[name] = kl.get(name, 0.0) + float(each_kl.sum(-1).double().sum())
                del changed, each_kl
            predictions += len(targets)
            if progress is not None:
                progress(int(mask.sum()))
    if predictions == 0:
        raise ValueError(
            "eval: the held-out text must have at least two tokens, got none to predict"
        )
    ce = {name: total / predictions for name, total in ce.items()}
    kl = {name: total / predictions for name, total in kl.items()}
    result = {}
    for name in models:
        result[name] = _lm_metrics(clean_sum / predictions, ce, kl, f"sae {name}")
        if name in with_gradient:
            with_g = _lm_metrics(clean_sum / predictions, ce, kl, f"oracle {name}")
            result[name] |= {key: with_g[key.removesuffix("_oracle")] for key in ORACLE_DEFINITIONS}
        result[name]["ce_tokens"] = float(predictions)
    return result


def _lm_metrics(
    clean: float, ce: Mapping[str, float], kl: Mapping[str, float], name: str
) -> dict[str, float]:
    damage = ce["zero"] - clean
    return {
        "ce_clean": clean,
        "ce_sae": ce[name],
        "ce_zero": ce["zero"],
        "ce_increase": ce[name] - clean,
        "ce_recovered": (ce["zero"] - ce[name]) / damage if damage > 0 else float("nan"),
        "kl_sae": kl[name],
        "kl_zero": kl["zero"],
        "kl_recovered": 1 - kl[name] / kl["zero"] if kl["zero"] > 0 else float("nan"),
    }


def _gradient(
    language_model: nn.Module, ids: Tensor, mask: Tensor, keep: Tensor, hook: str
) -> Tensor:
    """Of the loss on the text's labels at a hook, [B, T, d]."""
    from ksae.activations import capture_gradient

    inputs = {"input_ids": ids, "attention_mask": mask}
    return capture_gradient(language_model, [hook], inputs, keep)[1].reshape(*keep.shape, -1)


class _Reconstruct:
    """Replaces the activations [B, T, d] at `keep` [B, T] by the SAE's reconstruction."""

    def __init__(self, model: nn.Module, keep: Tensor, g: Tensor | None = None) -> None:
        self.model, self.keep, self.g = model, keep, g
        self.source: Tensor | None = None  # a transcoder's input, recorded at its own hook

    def read(self, x: Tensor) -> Tensor:
        self.source = x
        return x

    def __call__(self, x: Tensor) -> Tensor:
        source = x if self.source is None else self.source
        parameter = next(self.model.parameters())
        rows = source[self.keep].to(parameter.device, parameter.dtype)  # [M, d]
        options = {}
        if self.g is not None:
            options["grad"] = self.g[self.keep].to(parameter.device, parameter.dtype)
        recon = self.model(rows, **options).recon.to(x.device, x.dtype)  # [M, d]
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
            stack.enter_context(splice(language_model, hook, replacement.read, exclude=()))
        target = target_hook or hook  # the replacement leaves out what is excluded
        stack.enter_context(splice(language_model, target, replacement, exclude=()))
        yield


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation must leave no trace: in train mode a forward pass would count dead latents."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _triples(
    model: nn.Module, batches: Iterable[Batch], max_tokens: int | None
) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
    """Rows, what they are to give, and their gradients."""
    parameter = next(model.parameters())
    left = max_tokens
    for batch in batches:
        g: Tensor | None = None
        if isinstance(batch, Tensor):
            x, y = batch, batch
        else:
            x, y = batch[0], batch[0] if batch[1] is None else batch[1]
            g = batch[2] if len(batch) == 3 else None
        if left is not None:
            x, y, g = x[:left], y[:left], None if g is None else g[:left]
            left -= len(x)
        if len(x):
            like = parameter.device, parameter.dtype
            yield x.to(*like), y.to(parameter.device), None if g is None else g.to(*like)
        if left == 0:
            return


def _log_probs(language_model: nn.Module, ids: Tensor, mask: Tensor, counted: Tensor) -> Tensor:
    logits: Tensor = language_model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return logits[:, :-1][counted].float().log_softmax(-1)  # [M, vocabulary]


def _at(log_probs: Tensor, targets: Tensor) -> float:
    return float(log_probs.gather(1, targets.unsqueeze(1)).double().sum())
