# SPDX-License-Identifier: Apache-2.0
"""The gradient of a language model's loss at a hook, beside the activation there.

One forward pass in which the activation at the hook is a leaf, and one backward pass down to it:
what lies below the hook records no graph, and no parameter gets a gradient. The loss is a sum over
tokens, never a mean: a mean would divide the gradient by the number of tokens in the batch. The
gradient at a position covers the predictions of all later ones; the last position of a context
predicts nothing, and under a causal mask its gradient is zero.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from ksae.activations.hooks import attach, first, replaced, resolve_hook, without_cache
from ksae.errors import UserError

# name -> what it is. All but "labels" look at no label, so gradients of the same kind can be had at
# inference without giving the answer away.
LOSSES: dict[str, str] = {
    "labels": "cross-entropy of the text's own next token",
    "sampled": "cross-entropy of a next token drawn from the model's prediction",
    "entropy": "entropy of the model's prediction",
    "logsumexp": "log of the sum of exponentials of the logits",
    "max_logit": "the largest logit, with its sign turned",
}
# float16 has no normal numbers below 6e-5; a power of two is undone exactly.
FLOAT16_LOSS_SCALE = 256.0


def capture_gradient(
    model: nn.Module,
    hooks: Sequence[str],
    inputs: dict[str, Any],
    predicted: Tensor,
    *,
    loss: str = "labels",
    seeds: Sequence[int] = (),
    loss_scale: float | None = None,
) -> tuple[dict[str, Tensor], Tensor]:
    """Run the model and return the activation at each hook, and the gradient at the last of them.

    Args:
        hooks: where activations are read, from the input of the model on; a transcoder's are its
            input and its target.
        inputs: keyword arguments of the model's forward, input_ids [B, T] among them.
        predicted: [B, T] bool: the tokens whose prediction is part of the loss, the first of a
            context never.
        loss: a key of LOSSES.
        seeds: "sampled" only: [B], one a context, so that its draws do not depend on the batch.
        loss_scale: factor on the loss during the backward pass, taken out of the gradient
            afterwards; by default 1, for float16 FLOAT16_LOSS_SCALE.

    Returns:
        The activations by hook, and the gradient in float32 (float64 for float64 models), both of
        the shape of the activations.

    Raises:
        UserError: no such loss; the model has no logits; the loss does not depend on the hook.

    Source: arXiv 2411.10397.
    """
    if loss not in LOSSES:
        raise UserError(f"gradient: loss must be one of {', '.join(LOSSES)}, got {loss!r}")
    names = list(dict.fromkeys(hooks))
    points = [resolve_hook(model, name) for name in names]
    found: dict[str, Tensor] = {}
    leaves: list[Tensor] = []

    def reader(index: int) -> Callable[[Any], Any]:
        point, last = points[index], index == len(points) - 1

        def read(value: Any) -> Any:
            if point.name in found:  # a shared module runs several times; its first run counts
                return value
            found[point.name] = first(value, point).detach().clone()
            if not last:
                return value
            leaves.append(found[point.name].clone().requires_grad_())
            # A copy goes on: the model might work in place, which a leaf does not allow.
            return replaced(value, leaves[0].clone())

        return read

    frozen = [p for p in model.parameters() if p.requires_grad]
    handles = [attach(model, point, reader(i)) for i, point in enumerate(points)]
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            output = model(**without_cache(model, inputs))
            for point in points:
                if point.name not in found:
                    raise UserError(
                        f"hook {point.name}: the forward pass does not reach {point.path}"
                    )
            logits = _logits(model, output, inputs["input_ids"])
            total = _total(logits, inputs["input_ids"], predicted, loss, seeds)
            scale = loss_scale
            if scale is None:
                scale = FLOAT16_LOSS_SCALE if logits.dtype == torch.float16 else 1.0
            gradient = None
            if total.requires_grad:
                (gradient,) = torch.autograd.grad(total * scale, leaves, allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
        for parameter in frozen:
            parameter.requires_grad_(True)
    if gradient is None:
        raise UserError(
            f"hook {names[-1]}: the loss of {type(model).__name__} does not depend on it, so it "
            "has no gradient there; choose a hook that the logits are computed from"
        )
    return found, gradient.to(torch.promote_types(gradient.dtype, torch.float32)) / scale


def rescale(x: Tensor, g: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Activations in units of `scale`, x / scale, with the gradient that belongs to them: a step of
    1 in x / scale is a step of `scale` in x, so it is g * scale.

    Multiplicative scores keep their selection, additive ones keep it with beta / scale.
    """
    if not 0 < scale < float("inf"):
        raise UserError(f"rescale: scale must be a finite number > 0, got {scale}")
    return x / scale, g * scale


def gradient_dtype(dtype: torch.dtype) -> torch.dtype:
    """What gradients are stored in beside activations of `dtype`: the same, but bfloat16 for
    float16, whose range ends above many of a gradient's entries."""
    return torch.bfloat16 if dtype == torch.float16 else dtype


def _logits(model: nn.Module, output: Any, ids: Tensor) -> Tensor:
    logits = getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.shape[:-1] != ids.shape:
        raise UserError(
            f"gradient: the model must predict next tokens, got {type(model).__name__}, which has "
            "no language model head"
        )
    return logits  # [B, T, vocabulary]


def _total(
    logits: Tensor, ids: Tensor, predicted: Tensor, loss: str, seeds: Sequence[int]
) -> Tensor:
    """The loss summed over the predictions: of token t + 1 from the logits at t."""
    counted = predicted[:, 1:]  # [B, T-1]
    logits = logits[:, :-1]
    if logits.dtype in (torch.float16, torch.bfloat16):
        logits = logits.float()
    if loss in ("labels", "sampled"):
        labels = ids[:, 1:] if loss == "labels" else _sample(logits.detach(), seeds)
        labels = labels.masked_fill(~counted, -100)
        return nnf.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
        )
    if loss == "entropy":
        log_probs = logits.log_softmax(-1)
        each = -(log_probs.exp() * log_probs).sum(-1)
    elif loss == "logsumexp":
        each = logits.logsumexp(-1)
    else:
        each = -logits.amax(-1)
    return each[counted].sum()  # [B, T-1] -> []


def _sample(logits: Tensor, seeds: Sequence[int]) -> Tensor:
    """A token at each position, [B, T-1], by inversion of the distribution function."""
    B, T, _ = logits.shape
    if len(seeds) != B:
        raise UserError(f"gradient: seeds must be {B}, one a context, got {len(seeds)}")
    generator = torch.Generator()
    draws = torch.stack(
        [
            torch.rand(T, generator=generator.manual_seed(seed), dtype=torch.float64)
            for seed in seeds
        ]
    )  # [B, T]
    cumulative = logits.softmax(-1, dtype=torch.float64).cumsum(-1)
    at = draws.to(logits.device).unsqueeze(-1) * cumulative[..., -1:]
    return (
        torch.searchsorted(cumulative, at, right=True).squeeze(-1).clamp_max(logits.shape[-1] - 1)
    )
