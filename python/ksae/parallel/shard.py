# SPDX-License-Identifier: Apache-2.0
"""A coder spread over ranks by its latents, and put together again."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..coders import registry
from ..coders.activation import AbsTopK, BatchTopK, GradTopK, JumpReLU, TopK
from ..coders.coder import SparseCoder
from ..version import VERSION
from .layout import lay_out
from .peers import Peers
from .replicas import Replicas
from .shards import Shards

# The rest is on every rank.
BY_LATENT = ("W_enc", "b_enc", "W_dec", "log_threshold", "theta", "tokens_since_fired")
SERVED = (TopK, GradTopK, BatchTopK, JumpReLU, AbsTopK)
BY_FLOAT32 = (
    BatchTopK,
    AbsTopK,
)  # whose order is by values: 16 bits have ties that scores have not


def shard(sae: SparseCoder, mesh: Any = None, *, replicas: int | None = None) -> SparseCoder:
    """This rank's part of a coder: of R ranks, rank r holds latents r, r + R, ...

    Every rank calls it with the same coder, and `TrainStep` trains the part. A step takes each
    rank's own n tokens and does what one device does with the R n tokens of all, in the order of
    ranks: the same latents are selected, ties included; a reconstruction is added up rank by rank,
    so numbers differ from one device's by rounding, and have the same bits whenever R is the same.
    Weights, gradients of weights and moments are never sent. With one rank the coder stays whole.

    With D replicas the first R / D ranks hold the coder together, the next ones a copy of it, and
    so on; D = R is data parallelism. Sent are then also the gradients of the rows that the batch
    touches, which are added in the order of replicas. It sends less where the coder is small beside
    the batch; `ksae.parallel.layout.best_replicas` says where.

    Args:
        sae: whole, float32, or with `TopK`, `GradTopK` or `JumpReLU` bfloat16 or float16; or with
            `BatchTopK` or `AbsTopK`. On the meta device, where it takes no memory, each rank draws
            the first weights of its own latents.
        mesh: a DeviceMesh of one dimension, or of two: replicas, and the ranks of each; a process
            group; or None: all processes. An exchange takes no longer than the time-out of its
            process group.
        replicas: of the coder; None: 1, or what a mesh of two dimensions says.

    Returns:
        A coder of the same class with parameters of its own. Its options are those of the whole,
        its tensors have the rows of its latents. It has no forward pass: see `unshard`.

    Raises:
        ValueError: on every rank if settings, versions, parameters or meshes differ between ranks,
            F < R / replicas, or mesh or replicas do not fit. TypeError: an activation, dtype or
            mesh that is not served. RankError: another rank has raised an error.

    Example:
        torchrun --nproc-per-node 2 train.py

        >>> import torch, ksae  # doctest: +SKIP
        >>> torch.distributed.init_process_group("gloo")  # doctest: +SKIP
        >>> sae = ksae.shard(ksae.TopKSAE(d_in=768, d_sae=24576, k=32))  # doctest: +SKIP
        >>> step = ksae.TrainStep(sae, lr=1e-4)  # doctest: +SKIP
        >>> metrics = step(x)  # x: this rank's tokens  # doctest: +SKIP
    """
    latents = sae.d_sae if isinstance(sae, SparseCoder) else 0
    ranks = lay_out(mesh, replicas, latents)
    size = 1 if ranks is None else ranks.size
    try:
        _check(sae, size)
    except Exception as error:
        if ranks is not None:
            ranks.refuse("shard", error)
        raise
    if ranks is not None:
        ranks.agree("shard", _facts(sae))
    rank = 0 if ranks is None else ranks.rank
    part = copy.copy(sae)
    part._buffers, part._parameters = dict(sae._buffers), dict(sae._parameters)
    source = _drawn(sae, rank, size) if sae.W_enc.is_meta else sae
    for name, t in source.state_dict().items():
        own = t[rank::size] if name in BY_LATENT and source is sae else t
        own = own.detach().clone(memory_format=torch.contiguous_format)
        if name in part._parameters:
            part._parameters[name] = nn.Parameter(own)
        else:
            part._buffers[name] = own
    part.ranks = ranks
    if isinstance(ranks, Replicas):
        part.peers = Peers(ranks.everyone)
    elif ranks is not None:
        part.peers = Peers(ranks.data)
    return part


def unshard(part: SparseCoder) -> SparseCoder | None:
    """The whole coder on rank 0, of the parts of all ranks, which all call it; None on the others.

    Rank 0 needs the memory of all parameters.
    """
    ranks: Shards | Replicas | None = part.ranks
    if ranks is None:
        return part
    whole = None
    if ranks.leads:
        whole = copy.copy(part)
        whole._buffers, whole._parameters = dict(part._buffers), dict(part._parameters)
        whole.ranks = whole.peers = None
    if not ranks.writes:  # a copy of what others hold
        return None
    for name, t in part.state_dict().items():
        full: Tensor | None = t.detach().clone()
        if name in BY_LATENT and isinstance(ranks, Shards):
            full = gather_latents(ranks, t)
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
    kind = type(sae.activation)
    if kind not in SERVED:
        wanted = ", ".join(served.__name__ for served in SERVED)
        raise TypeError(f"shard: sae must have an activation of {wanted}, got {kind.__name__}")
    if kind in BY_FLOAT32 and sae.W_enc.dtype != torch.float32:
        raise TypeError(f"shard: sae must be float32 with {kind.__name__}, got {sae.W_enc.dtype}")
    if isinstance(sae.activation, JumpReLU) and sae.activation.penalty == "tanh":
        raise TypeError("shard: sae must have JumpReLU with the penalty l0 or target_l0, got tanh")
    if sae.W_enc.dtype == torch.float64:  # keys are of float32 scores
        raise TypeError("shard: sae must be float32, bfloat16 or float16, got torch.float64")
    if sae.d_sae < R:
        raise ValueError(f"shard: sae must have at least {R} latents, one a rank, got {sae.d_sae}")


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


def _drawn(sae: SparseCoder, rank: int, R: int) -> SparseCoder:
    """The latents of one rank with first weights, of a coder that is on the meta device."""
    here = len(range(rank, sae.d_sae, R))
    cuda = dist.get_backend() == "nccl"
    device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
    of_all = ("prefixes", "prefix_weights", "multi_k", "multi_weights")  # and no weight's
    config = {n: value for n, value in sae.config().items() if n not in of_all}
    kind = registry.find(config.pop("class"))
    assert kind is not None
    options = {"d_sae": here, "device": device}
    for holder in (config, config.get("activation", {})):
        if "k" in holder:
            holder["k"] = min(sae.k, here)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(torch.initial_seed() + rank)
        return kind(**config | options)
