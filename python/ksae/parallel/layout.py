# SPDX-License-Identifier: Apache-2.0
"""Which ranks share the latents of a coder and which hold copies of them, from a mesh."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch.distributed as dist

from .cost import Sizes, bytes_sent
from .meeting import meet, stay_away
from .ranks import Ranks
from .replicas import Replicas
from .shards import Shards


def best_replicas(s: Sizes) -> int:
    """How many replicas of the coder send the least: a number that divides R, the smallest of
    equally good ones, which needs the least memory.

    With all ranks sharing the latents a rank sends about 8 N d bytes, N the tokens of all; with
    all holding copies 16 F d in float32.
    """
    divisors = [D for D in range(1, s.R + 1) if s.R % D == 0]
    return min(divisors, key=lambda D: sum(bytes_sent(replace(s, replicas=D)).values()))


def lay_out(mesh: Any, replicas: int | None, latents: int) -> Shards | Replicas | None:
    """The communicator of a coder of F latents on the ranks of a mesh, as `ksae.shard` takes it;
    None for one rank. All ranks of the mesh call it.

    Raises:
        ValueError: torch.distributed is not set up, mesh or replicas do not fit, or another rank
            has others. TypeError: mesh is none. RankError: another rank has raised one.
    """
    _require_set_up("shard")
    try:
        members, D = _members("shard", mesh, replicas)
    except Exception as error:
        stay_away(error)
        raise
    meet("shard", members, f"{D} x {len(members) // D}")
    if len(members) == 1:
        return None
    everyone = _group(members, mesh)
    if D == 1:
        return Shards(everyone, latents)
    if len(members) == D:
        return Replicas(Ranks(everyone), latents)
    both = mesh
    if getattr(mesh, "ndim", 1) == 1:
        from torch.distributed.device_mesh import init_device_mesh

        kind = "cuda" if dist.get_backend() == "nccl" else "cpu"
        both = init_device_mesh(kind, (D, len(members) // D))
    return Shards(both.get_group(1), latents, Ranks(everyone), Ranks(both.get_group(0)))


def _members(what: str, mesh: Any, replicas: int | None) -> tuple[list[int], int]:
    """The ranks of a mesh in the default group, in their order, and how many replicas there are."""
    from torch.distributed.device_mesh import DeviceMesh

    if isinstance(mesh, DeviceMesh):
        if mesh.ndim > 2:
            raise ValueError(
                f"{what}: mesh must have 1 or 2 dimensions, got {mesh.ndim} of sizes"
                f" {tuple(mesh.shape)}; mesh['name'] is one of them"
            )
        if mesh.get_coordinate() is None:
            got = f"{mesh.mesh.tolist()} without rank {dist.get_rank()}"
            raise ValueError(f"{what}: mesh must have this process in it, got {got}")
        members = mesh.mesh.flatten().tolist()
        if mesh.ndim == 2:
            if replicas not in (None, mesh.shape[0]):
                got = f"{replicas} with a mesh of sizes {tuple(mesh.shape)}"
                raise ValueError(f"shard: replicas must be its first size or None, got {got}")
            replicas = mesh.shape[0]
    else:
        group = dist.group.WORLD if mesh is None else mesh
        if not isinstance(group, dist.ProcessGroup):
            kind = type(mesh).__name__
            raise TypeError(
                f"{what}: mesh must be a DeviceMesh, a ProcessGroup or None, got {kind}"
            )
        members = dist.get_process_group_ranks(group)
    replicas, R = 1 if replicas is None else replicas, len(members)
    if replicas < 1 or R % replicas:
        raise ValueError(f"{what}: replicas must divide the {R} ranks, got {replicas}")
    if 1 < replicas < R and members != list(range(dist.get_world_size())):
        raise ValueError(
            f"{what}: mesh must have all {dist.get_world_size()} processes in their order for"
            f" {replicas} replicas of {R // replicas} ranks, got {members}"
        )
    return members, replicas


def group_of(what: str, mesh: Any) -> dist.ProcessGroup:
    """The process group of a mesh of one dimension.

    Raises:
        ValueError: torch.distributed is not set up, or mesh does not fit. TypeError: it is none.
    """
    _require_set_up(what)
    if getattr(mesh, "ndim", 1) != 1:
        raise ValueError(f"{what}: mesh must have 1 dimension, got sizes {tuple(mesh.shape)}")
    return _group(_members(what, mesh, None)[0], mesh)


def _require_set_up(what: str) -> None:
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            f"{what}: torch.distributed must be set up, as by torchrun and"
            " torch.distributed.init_process_group, got no process group"
        )


def _group(members: list[int], mesh: Any) -> dist.ProcessGroup:
    """The group of these ranks."""
    if isinstance(mesh, dist.ProcessGroup):
        return mesh
    if members == list(range(dist.get_world_size())):
        assert dist.group.WORLD is not None
        return dist.group.WORLD
    # of two dimensions that are not all processes: the one that has all members
    found: dist.ProcessGroup = mesh.get_group(list(mesh.shape).index(len(members)))
    return found
