# SPDX-License-Identifier: Apache-2.0
"""What adding a latent's direction does to a language model's logits.

Latents that fire often have other directions than those that fire seldom, so two models are
compared on latents of equal firing rate, and one model is reported by firing rate.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from ksae.analysis.evaluate import eval_mode
from ksae.coders.coder import SparseCoder

# Decades of the firing rate; a latent that never fired is in none.
RATES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)


@torch.no_grad()
def logit_shift(
    model: SparseCoder,
    language_model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    hook: str,
    latents: Tensor,
    c: float,
    *,
    exclude: Iterable[int] = (),
) -> Tensor:
    """How far each of some latents moves the logits.

    At every token but the excluded ones, c times the latent's unit decoder row is added to the
    activation; the shift of a token is the root mean square, over the vocabulary, of the change of
    its logits, each with its mean taken out: a constant on all logits changes no prediction.

    Args:
        model: its W_dec rows are the directions; rows of other lengths are brought to length 1, so
            that models are compared by direction alone.
        language_model: a Hugging Face causal language model.
        batches: pairs (token ids [B, T], attention mask [B, T]).
        hook: where W_dec writes.
        latents: [L] int64.
        c: how much is added, in units of the activation; the mean length of an activation moves the
            model about as far as its own activations do.
        exclude: token ids at which nothing is added and nothing measured.

    Returns:
        [L] float64, means over tokens.

    Numerics: differences of float32 logits, squared and averaged in float64.
    """
    from ksae.activations import splice

    excluded = torch.tensor(sorted(set(exclude)), dtype=torch.int64)
    rows = model.W_dec[latents.to(model.W_dec.device)].float()  # [L, d]
    rows = rows / rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    shifts = torch.zeros(len(latents), dtype=torch.float64)
    tokens = 0
    with eval_mode(language_model):
        for ids, mask in batches:
            device = next(language_model.parameters()).device
            ids, mask = ids.to(device), mask.to(device)
            keep = mask.bool() & ~torch.isin(ids, excluded.to(device))  # [B, T]
            clean = _logits(language_model, ids, mask, keep)  # [M, vocabulary]
            for i, row in enumerate(rows):
                step = c * row.to(device) * keep.unsqueeze(-1)  # [B, T, d]
                with splice(language_model, hook, _Add(step), exclude=()):
                    change = _logits(language_model, ids, mask, keep) - clean
                change -= change.mean(1, keepdim=True)
                shifts[i] += change.double().square().mean(1).sqrt().sum().cpu()
            tokens += int(keep.sum())
    if tokens == 0:
        raise ValueError("steering: the text must have at least one token, got none")
    return shifts / tokens


def matched_latents(rates: Sequence[Tensor], count: int) -> list[Tensor]:
    """Latents of several models with the same firing rates.

    Args:
        rates: [F] of each model, share of tokens on which a latent fired.
        count: latents wanted of each model.

    Returns:
        [count] int64 of each model: place j of all of them has about one rate. The rates are spread
        evenly over the ranks of the latents that fired, of the model with the fewest of these.
        Fewer than `count` if fewer fired.
    """
    orders = []
    for rate in rates:
        order = rate.argsort(descending=True, stable=True)
        orders.append(order[: int((rate > 0).sum())])
    fewest = min(range(len(rates)), key=lambda i: len(orders[i]))
    count = min(count, len(orders[fewest]))
    ranks = ((torch.arange(count, dtype=torch.float64) + 0.5) / max(count, 1)) * len(orders[fewest])
    wanted = rates[fewest][orders[fewest]].double()[ranks.long()]  # [count], falling
    chosen = []
    for rate, order in zip(rates, orders, strict=True):
        free = rate.double()[order].clone()
        picks = []
        for target in wanted:
            nearest = int((free.log() - target.log()).abs().argmin())
            picks.append(int(order[nearest]))
            free[nearest] = float("inf")  # each once
        chosen.append(torch.tensor(picks, dtype=torch.int64))
    return chosen


def latents_by_rate(rate: Tensor, count: int) -> dict[str, Tensor]:
    """Up to `count` latents of each decade of the firing rate in RATES, evenly spread over it: name
    of the decade -> [<= count] int64; decades without a latent are left out."""
    found = {}
    for low, high in pairwise(RATES):
        inside = ((rate > low) & (rate <= high)).nonzero().flatten()
        inside = inside[rate[inside].argsort(stable=True)]
        if len(inside):
            at = torch.arange(min(count, len(inside))) * len(inside) // min(count, len(inside))
            found[f"{low:g} to {high:g}"] = inside[at]
    return found


class _Add:
    def __init__(self, step: Tensor) -> None:
        self.step = step

    def __call__(self, x: Tensor) -> Tensor:
        return x + self.step.to(x.dtype).reshape(x.shape)


def _logits(language_model: nn.Module, ids: Tensor, mask: Tensor, keep: Tensor) -> Tensor:
    logits: Tensor = language_model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return logits[keep].float()  # [M, vocabulary]
