# SPDX-License-Identifier: Apache-2.0
"""The exchanges between the ranks of a process group, counted, and with errors that say what."""

from __future__ import annotations

import contextlib
import zlib
from collections import Counter
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import RankError

# torch 2.13 renames it
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
SMALL = 1 << 14  # elements: a sum of fewer is made in one exchange instead of two


class Ranks:
    """The ranks of a process group. Every method but the properties is a collective: all ranks call
    it, in the same order, with tensors of the same shapes and dtypes.

    Sums are added in the order of ranks, so that all ranks have the same bits, on every run. An
    exchange that ends in an error or in the time-out of the group raises RankError.

    bytes: what this rank has sent to others, by the name of the exchange.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.device = torch.device("cpu")
        if dist.get_backend(group) == "nccl":
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.bytes: Counter[str] = Counter()
        self._agreed: dict[str, Any] = {}  # what was last agreed on, by subject

    @contextlib.contextmanager
    def exchange(self, name: str, size: int) -> Iterator[None]:
        """Around a collective that sends `size` bytes to other ranks: counted, errors explained."""
        self.bytes[name] += size
        try:
            yield
        except RuntimeError as error:
            why = str(error).strip().split("\n")[0]
            raise RankError(
                f"rank {self.rank} of {self.size}: the exchange of {name} must reach all ranks, got"
                f" an error; another rank has ended, or not come here in time: {why}"
            ) from error

    # ------------------------------------------------------------------------------------ exchanges

    def gather(self, rows: Tensor, name: str = "rows") -> Tensor:
        """The rows of all ranks in the order of ranks [R n, ...], from [n, ...]."""
        rows = rows.contiguous()
        every = rows.new_empty(self.size * rows.shape[0], *rows.shape[1:])
        with self.exchange(name, (self.size - 1) * rows.numel() * rows.element_size()):
            _all_gather(_bytes(every), _bytes(rows), group=self.group)
        return every

    def scatter(self, rows: Tensor, name: str = "rows") -> Tensor:
        """Of each rank's [R n, ...] the rows of this one: [R, n, ...]."""
        rows = rows.contiguous()
        mine = torch.empty_like(rows)
        size = rows.numel() * rows.element_size() // self.size * (self.size - 1)
        with self.exchange(name, size):
            dist.all_to_all_single(_bytes(mine), _bytes(rows), group=self.group)
        return mine.view(self.size, rows.shape[0] // self.size, *rows.shape[1:])

    def own(self, rows: Tensor) -> Tensor:
        """This rank's rows [n, ...] of [R n, ...]; no exchange."""
        n = rows.shape[0] // self.size
        return rows[self.rank * n : (self.rank + 1) * n]

    def all_reduce(self, part: Tensor, name: str = "sums") -> Tensor:
        """The sum over ranks, of any shape."""
        flat = part.reshape(-1)
        if flat.numel() <= SMALL:
            return _sum(self.gather(flat[None], name)).view(part.shape)
        padded = torch.nn.functional.pad(flat, (0, -flat.numel() % self.size))
        mine = _sum(self.scatter(padded, name))
        return self.gather(mine, name)[: flat.numel()].view(part.shape)

    # ---------------------------------------------------------------------------------- agreement

    def agree(self, what: str, facts: dict[str, Any]) -> None:
        """Raise an error on every rank that names the first of `facts` that is not the same on all.

        Raises:
            ValueError: a fact differs. RankError: another rank has called `refuse`.

        On CUDA only where the facts have changed since the last call: a look stops the stream.
        """
        if self.device.type == "cuda" and self._agreed.get(what) == facts:
            return
        if self._same(zlib.crc32(repr(sorted(facts.items())).encode())):
            self._agreed[what] = facts
            return
        self._tell(what, facts)

    def refuse(self, what: str, error: Exception) -> None:
        """Let the other ranks, which call `agree`, know that this one raises `error`."""
        with contextlib.suppress(RankError):
            self._same(-1)
            self._tell(what, f"{type(error).__name__}: {error}")

    def _same(self, number: int) -> bool:
        """Whether all ranks have the same number >= 0."""
        mine = torch.tensor([number], device=self.device)
        every: list[int] = self.gather(mine, "agreement").tolist()
        return min(every) >= 0 and min(every) == max(every)

    def _tell(self, what: str, said: dict[str, Any] | str) -> None:
        every: list[Any] = [None] * self.size
        with self.exchange("reasons", 0):
            dist.all_gather_object(every, said, group=self.group)
        for rank, theirs in enumerate(every):
            if isinstance(theirs, str):
                raise RankError(f"{what}: rank {rank} has stopped with {theirs}")
        first = every[0]
        for rank, theirs in enumerate(every):
            for name in first | theirs:
                a, b = (facts.get(name, "nothing") for facts in (first, theirs))
                if a != b:
                    raise ValueError(
                        f"{what}: {name} must be the same on all ranks, got {a} on rank 0 and"
                        f" {b} on rank {rank}"
                    )
        raise RankError(f"{what}: facts must be the same on all ranks, got {every}")


def ranks_of(mesh: Any) -> Ranks:
    """The ranks of a DeviceMesh of one dimension, a process group, or None: all processes.

    Raises:
        ValueError: torch.distributed is not set up, or mesh does not fit.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise ValueError(
            "shard: torch.distributed must be set up, as by torchrun and"
            " torch.distributed.init_process_group, got no process group"
        )
    from torch.distributed.device_mesh import DeviceMesh

    group = mesh
    if mesh is None:
        group = dist.group.WORLD
    elif isinstance(mesh, DeviceMesh):
        if mesh.ndim != 1:
            raise ValueError(
                f"shard: mesh must have 1 dimension, got {mesh.ndim} of sizes {tuple(mesh.shape)};"
                " mesh['name'] is one of them"
            )
        if mesh.get_coordinate() is None:
            got = f"{mesh.mesh.tolist()} without rank {dist.get_rank()}"
            raise ValueError(f"shard: mesh must have this process in it, got {got}")
        group = mesh.get_group()
    if not isinstance(group, dist.ProcessGroup):
        kind = type(mesh).__name__
        raise TypeError(f"shard: mesh must be a DeviceMesh, a ProcessGroup or None, got {kind}")
    return Ranks(group)


def set_up(timeout: float = 600.0) -> bool:
    """Join the processes that torchrun has started: NCCL with CUDA devices, else Gloo.

    timeout: seconds that an exchange may take. Returns False where torchrun has started none.
    """
    if not dist.is_available() or not dist.is_torchelastic_launched():
        return False
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    if backend == "nccl":
        torch.cuda.set_device(dist.get_node_local_rank())
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))
    return True


def _bytes(t: Tensor) -> Tensor:
    """Flat, as bytes: every backend moves those, whatever dtypes it can add."""
    return t.detach().reshape(-1).view(torch.uint8)


def _sum(parts: Tensor) -> Tensor:
    """Over the first dimension, in order."""
    total = parts[0].clone()
    for part in parts[1:]:
        total += part
    return total
