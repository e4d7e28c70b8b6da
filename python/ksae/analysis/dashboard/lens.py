# SPDX-License-Identifier: Apache-2.0
"""The logit lens of latents: which tokens a direction promotes and demotes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ksae import functional
from ksae.activations import find_blocks
from ksae.errors import UserError

NORMS = ("norm", "ln_f", "final_layer_norm", "final_layernorm", "decoder.final_layer_norm")
WRITES = ("resid_pre", "resid_post", "attn_out", "mlp_out")  # hooks in the residual stream
ROWS_AT_ONCE = 2**24  # logits: 64 MiB


@dataclass(frozen=True)
class Lens:
    """Tokens at the ends of each direction's logits, the outermost first."""

    promoted: Tensor  # [F, n] int64 token ids
    promoted_logits: Tensor  # [F, n] float32
    demoted: Tensor
    demoted_logits: Tensor


@torch.no_grad()
def logit_lens(model: nn.Module, directions: Tensor, n: int = 10) -> Lens:
    """The logit lens (nostalgebraist, 2020) of directions in the residual stream.

    A direction w is brought to a root mean square of 1, sent through the model's final norm, less
    what the norm makes of zero (its bias), and through the unembedding: gains and centring of the
    norm count, the length of w does not.

    Args:
        model: a Hugging Face causal language model.
        directions: [F, d].
        n: tokens at each end; at most the vocabulary.

    Raises:
        UserError: the model has no unembedding, or one of another width.

    Numerics: float32. Larger first, on equal logits the smaller id. A zero direction gives zeros.
    """
    reason = why_no_lens(model, directions.shape[1])
    if reason is not None:
        raise UserError(f"logit lens: {reason}")
    head: Any = model.get_output_embeddings()  # type: ignore[operator]
    unembedding = head.weight.detach().float()  # [V, d]
    norm = final_norm(model)
    n = min(n, len(unembedding))
    parts: list[tuple[Tensor, ...]] = []
    for rows in _blocks(directions, ROWS_AT_ONCE // len(unembedding)):
        rows = rows.to(unembedding.device).float()
        scale = rows.square().mean(1, keepdim=True).sqrt()
        rows = rows / scale.clamp_min(torch.finfo(torch.float32).tiny)
        logits = normed(norm, rows) @ unembedding.T  # [rows, V]
        high, promoted = functional.topk(logits, n)
        low, demoted = functional.topk(-logits, n)
        parts.append((promoted.cpu(), high.cpu(), demoted.cpu(), -low.cpu()))
    return Lens(*(torch.cat(column) for column in zip(*parts, strict=True)))


@torch.no_grad()
def embedding_match(model: nn.Module, directions: Tensor, n: int = 10) -> tuple[Tensor, Tensor]:
    """What the encoder's directions read: the n tokens whose embeddings have the largest cosine
    with each.

    Args:
        directions: [F, d] of the width of the model's token embeddings.

    Returns:
        [F, n] int64 token ids, and [F, n] float32 cosines.
    """
    table: Any = model.get_input_embeddings()  # type: ignore[operator]
    embeddings = nn.functional.normalize(table.weight.detach().float(), dim=1)
    n = min(n, len(embeddings))
    ids, cosines = [], []
    for rows in _blocks(directions, ROWS_AT_ONCE // len(embeddings)):
        unit = nn.functional.normalize(rows.to(embeddings.device).float(), dim=1)
        values, indices = functional.topk(unit @ embeddings.T, n)
        ids.append(indices.cpu())
        cosines.append(values.cpu())
    return torch.cat(ids), torch.cat(cosines)


def why_no_lens(model: nn.Module, width: int, hook: str | None = None) -> str | None:
    """Why directions of a width, written at a hook, have no logit lens; None if they have."""
    head = getattr(model, "get_output_embeddings", lambda: None)()
    if head is None:
        return f"{type(model).__name__} has no unembedding"
    if head.weight.shape[1] != width:
        return f"the unembedding has width {head.weight.shape[1]}, the decoder {width}"
    part = "" if hook is None or ":" in hook else hook.rpartition(".")[2]
    if part and part not in WRITES:
        return f"{hook} is not in the residual stream"
    return None


def final_norm(model: nn.Module) -> nn.Module | None:
    """The norm before the unembedding, None if the model has none: it stands beside the blocks."""
    places: list[nn.Module] = [getattr(model, "base_model", model)]
    with suppress(UserError):  # a model without a list of blocks
        places.insert(0, model.get_submodule(find_blocks(model)[0].rpartition(".")[0]))
    for where in places:
        for name in NORMS:
            with suppress(AttributeError):
                found = where.get_submodule(name)
                if isinstance(found, nn.Module):
                    return found
    return None


def normed(norm: nn.Module | None, rows: Tensor) -> Tensor:
    """Rows [..., d] through a norm, less what it makes of zero."""
    if norm is None:
        return rows
    weight = next(norm.parameters(), rows)
    out: Tensor = norm(rows.to(weight.dtype)) - norm(torch.zeros_like(rows, dtype=weight.dtype))
    return out.float()


def _blocks(rows: Tensor, size: int) -> Iterator[Tensor]:
    size = max(1, size)
    for begin in range(0, len(rows), size):
        yield rows[begin : begin + size].detach()
