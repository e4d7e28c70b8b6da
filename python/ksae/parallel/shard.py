# SPDX-License-Identifier: Apache-2.0
"""A coder spread over ranks by its latents, and put together again."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..coders import registry
from ..coders.activation import GradTopK, TopK
from ..coders.coder import SparseCoder
from ..coders.terms import Term, terms_of
from ..version import VERSION
from .ranks import ranks_of
from .shards import Shards

BY_LATENT = ("W_enc", "b_enc", "W_dec", "tokens_since_fired")  # the rest is on every rank


def shard(sae: SparseCoder, mesh: Any = None) -> SparseCoder:
    """This rank's part of a coder: of R ranks, rank r holds latents r, r + R, ...

    Every rank calls it with the same coder, and `TrainStep` trains the part. A step takes each
    rank's own n tokens and does what one device does with the R n tokens of all, in the order of
    ranks: the same latents are selected, ties included; a reconstruction is added up rank by rank,
    so numbers differ from one device's by rounding, and have the same bits whenever R is the same.
    Weights, gradients of weights and moments are never sent. With one rank the coder stays whole.

    Args:
        sae: whole, with `TopK` or `GradTopK`, float32, bfloat16 or float16. On the meta device,
            where it takes no memory, each rank draws the first weights of its own latents.
        mesh: a DeviceMesh of one dimension, a process group, or None: all processes. An exchange
            takes no longer than the time-out of its process group.

    Returns:
        A coder of the same class with parameters of its own. Its options are those of the whole,
        its tensors have the rows of its latents. It has no forward pass: see `unshard`.

    Raises:
        ValueError: on every rank if settings, versions or parameters differ between ranks, F < R,
            or mesh does not fit. TypeError: an activation, dtype or mesh that is not served.

    Example:
        torchrun --nproc-per-node 2 train.py

        >>> import torch, ksae  # doctest: +SKIP
        >>> torch.distributed.init_process_group("gloo")  # doctest: +SKIP
        >>> sae = ksae.shard(ksae.TopKSAE(d_in=768, d_sae=24576, k=32))  # doctest: +SKIP
        >>> step = ksae.TrainStep(sae, lr=1e-4)  # doctest: +SKIP
        >>> metrics = step(x)  # x: this rank's tokens  # doctest: +SKIP
    """
    ranks = ranks_of(mesh)
    try:
        _check(sae, ranks.size)
    except Exception as error:
        ranks.refuse("shard", error)
        raise
    ranks.agree("shard", _facts(sae))
    rank, R = ranks.rank, ranks.size
    part = copy.copy(sae)
    part._buffers, part._parameters = dict(sae._buffers), dict(sae._parameters)
    source = _drawn(sae, rank, R, ranks.device) if sae.W_enc.is_meta else sae
    for name, t in source.state_dict().items():
        own = t[rank::R] if name in BY_LATENT and source is sae else t
        own = own.detach().clone(memory_format=torch.contiguous_format)
        if name in part._parameters:
            part._parameters[name] = nn.Parameter(own)
        else:
            part._buffers[name] = own
    part.ranks = Shards(ranks.group, sae.d_sae) if R > 1 else None
    return part


def unshard(part: SparseCoder) -> SparseCoder | None:
    """The whole coder on rank 0, of the parts of all ranks, which all call it; None on the others.

    Rank 0 needs the memory of all parameters.
    """
    ranks: Shards | None = part.ranks
    if ranks is None:
        return part
    whole = None
    if ranks.rank == 0:
        whole = copy.copy(part)
        whole._buffers, whole._parameters = dict(part._buffers), dict(part._parameters)
        whole.ranks = None
    for name, t in part.state_dict().items():
        full = gather_latents(ranks, t) if name in BY_LATENT else t.detach().clone()
        if whole is None or full is None:
            continue
        if name in whole._parameters:
            whole._parameters[name] = nn.Parameter(full)
        else:
            whole._buffers[name] = full
    return whole


def gather_latents(ranks: Shards, part: Tensor) -> Tensor | None:
    """On rank 0 the rows of all latents [F, ...], from those of each rank's own; None elsewhere."""
    R, most = ranks.size, -(-ranks.latents // ranks.size)
    padded = part.new_zeros(most, *part.shape[1:])
    padded[: len(part)] = part.detach()
    pieces = None
    if ranks.rank == 0:
        pieces = [torch.empty_like(padded) for _ in range(R)]
    raw = None if pieces is None else [p.view(-1).view(torch.uint8) for p in pieces]
    with ranks.exchange("latents", 0 if pieces else padded.numel() * padded.element_size()):
        dist.gather(padded.view(-1).view(torch.uint8), raw, group=ranks.group, group_dst=0)
    if pieces is None:
        return None
    full = part.new_empty(ranks.latents, *part.shape[1:])
    for r, piece in enumerate(pieces):
        full[r::R] = piece[: len(full[r::R])]
    return full


def _check(sae: SparseCoder, R: int) -> None:
    if not isinstance(sae, SparseCoder):
        raise TypeError(f"shard: sae must be a coder of ksae, got {type(sae).__name__}")
    if sae.ranks is not None:
        raise ValueError("shard: sae must be whole, got one that is spread over ranks")
    if type(sae.activation) not in (TopK, GradTopK):
        got = type(sae.activation).__name__
        raise TypeError(f"shard: sae must have the activation TopK or GradTopK, got {got}")
    if sae.prefixes or any(term.aux and not _plain(term) for term in terms_of(sae, 1)):
        raise TypeError("shard: sae must have no prefixes and the AuxK of TopK, got another loss")
    if sae.W_enc.dtype == torch.float64:  # keys are of float32 scores
        raise TypeError("shard: sae must be float32, bfloat16 or float16, got torch.float64")
    if sae.d_sae < R:
        raise ValueError(f"shard: sae must have at least {R} latents, one a rank, got {sae.d_sae}")


def _plain(term: Term) -> bool:
    """Whether a term for dead latents is that of arXiv 2406.04093."""
    return term.aux is not None and term.of_residual and not term.aux.signed


def _facts(sae: SparseCoder) -> dict[str, Any]:
    """What must be the same on all ranks."""
    facts: dict[str, Any] = {
        "the version of ksae": VERSION,
        "the version of torch": torch.__version__,
    }
    facts |= {f"the setting {name}": value for name, value in sae.config().items()}
    facts["the kind of device"] = sae.W_enc.device.type
    if not sae.W_enc.is_meta:
        for name, t in sae.state_dict().items():
            facts[f"{name}, by the sum of its bits,"] = int(_bits(t).sum())
    return facts


def _bits(t: Tensor) -> Tensor:
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[t.element_size()]
    return t.detach().reshape(-1).view(kind)


def _drawn(sae: SparseCoder, rank: int, R: int, device: torch.device) -> SparseCoder:
    """The latents of one rank with first weights, of a coder that is on the meta device."""
    here = len(range(rank, sae.d_sae, R))
    config = sae.config()
    kind = registry.find(config.pop("class"))
    assert kind is not None
    options = {"d_sae": here, "k": min(sae.k, here), "device": device}
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(torch.initial_seed() + rank)
        return kind(**config | options)
