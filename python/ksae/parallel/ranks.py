# SPDX-License-Identifier: Apache-2.0
"""The exchanges between the ranks of a process group, counted, and with errors that say what."""

from __future__ import annotations

import contextlib
import weakref
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import RankError
from ..ops import accumulator
from .cost import SMALL
from .one_device import Pending

# torch 2.13 renames it
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


ROWS = 128  # of a pass over a batch whose temporaries stay in cache


class Ranks:
    """The ranks of a process group. Every method but the properties is a collective: all ranks call
    it, in the same order, with tensors of the same shapes and dtypes.

    Sums are added in the order of ranks, so that all ranks have the same bits, on every run. An
    exchange that ends in an error or in the time-out of the group raises RankError.

    bytes: what this rank has sent to others, by the name of the exchange.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        # A group that outlives destroy_process_group keeps Gloo's threads, and where one of them
        # drops the last tensor of an exchange while Python ends, the process aborts.
        self._group = weakref.ref(group)
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)
        self.device = torch.device("cpu")
        if dist.get_backend(group) == "nccl":
            self.device = torch.device("cuda", torch.cuda.current_device())
        self.bytes: Counter[str] = Counter()
        self._agreed: dict[str, Any] = {}  # what was last agreed on, by subject

    @property
    def group(self) -> dist.ProcessGroup:
        group = self._group()
        if group is None:
            raise RankError(
                f"rank {self.rank} of {self.size}: its process group must be there, got one that"
                " torch.distributed.destroy_process_group has ended"
            )
        return group

    @contextlib.contextmanager
    def exchange(self, name: str, size: int) -> Iterator[None]:
        """Around a collective that sends `size` bytes to other ranks: counted, errors explained."""
        self.bytes[name] += size
        try:
            yield
        except RankError:
            raise
        except RuntimeError as error:
            why = str(error).strip().split("\n")[0]
            raise RankError(
                f"rank {self.rank} of {self.size}: the exchange of {name} must reach all ranks, got"
                f" an error; another rank has ended, or not come here in time: {why}"
            ) from error

    # ------------------------------------------------------------------------------------ exchanges

    def gather(self, rows: Tensor, name: str = "rows", into: Tensor | None = None) -> Tensor:
        """The rows of all ranks in the order of ranks [R n, ...], from [n, ...]; into: overwritten,
        of that shape."""
        return self.start_gather(rows, name, into)()

    def start_gather(self, rows: Tensor, name: str = "rows", into: Tensor | None = None) -> Pending:
        """`gather` that goes on beside other work: what waits for its end, and returns the rows."""
        rows = rows.contiguous()
        every = into
        if every is None:
            every = rows.new_empty(self.size * rows.shape[0], *rows.shape[1:])
        with self.exchange(name, (self.size - 1) * rows.numel() * rows.element_size()):
            work = _all_gather(_bytes(every), _bytes(rows), group=self.group, async_op=True)

        def end() -> Tensor:
            with self.exchange(name, 0):
                work.wait()
            return every

        return end

    def scatter(self, rows: Tensor, name: str = "rows", into: Tensor | None = None) -> Tensor:
        """Of each rank's [R n, ...] the rows of this one: [R, n, ...]; into: overwritten, of the
        shape of rows."""
        rows = rows.contiguous()
        mine = torch.empty_like(rows) if into is None else into
        size = rows.numel() * rows.element_size() // self.size * (self.size - 1)
        with self.exchange(name, size):
            dist.all_to_all_single(_bytes(mine), _bytes(rows), group=self.group)
        return mine.view(self.size, rows.shape[0] // self.size, *rows.shape[1:])

    def broadcast(self, named: dict[str, Tensor] | None, source: int) -> dict[str, Tensor]:
        """Tensors by name on the CPU, of any shapes, from the rank `source`, which alone has them,
        to all."""
        about: list[Any] = [{n: (list(t.shape), t.dtype) for n, t in (named or {}).items()}]
        got = {}
        with self.exchange("reasons", 0):
            dist.broadcast_object_list(
                about, group=self.group, group_src=source, device=self.device
            )
        for name, (shape, dtype) in about[0].items():
            t = torch.empty(shape, dtype=dtype) if named is None else named[name]
            t = t.contiguous().to(self.device)
            size = 0 if named is None else t.numel() * t.element_size() * (self.size - 1)
            with self.exchange("harvest", size):
                dist.broadcast(_bytes(t), group=self.group, group_src=source)
            got[name] = t.cpu()
        return got

    def own(self, rows: Tensor) -> Tensor:
        """This rank's rows [n, ...] of [R n, ...]; no exchange."""
        n = rows.shape[0] // self.size
        return rows[self.rank * n : (self.rank + 1) * n]

    def all_reduce(self, part: Tensor, name: str = "sums") -> Tensor:
        """The sum over ranks, of any shape."""
        return self.start_all_reduce(part, name)()

    def start_all_reduce(self, part: Tensor, name: str = "sums") -> Pending:
        """`all_reduce` that goes on beside other work, as `start_gather`; of many elements it ends
        here."""
        flat = part.reshape(-1)
        if flat.numel() <= SMALL:
            every = self.start_gather(flat[None], name)
            return lambda: _sum(every()).view(part.shape)
        padded = torch.nn.functional.pad(flat, (0, -flat.numel() % self.size))
        mine = _sum(self.scatter(padded, name))
        total = self.gather(mine, name)[: flat.numel()].view(part.shape)
        return lambda: total

    def totals(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Each the sum over ranks, of any shape; of the small ones in one exchange, in float64."""
        small = [i for i, part in enumerate(parts) if part.numel() <= SMALL]
        flat = torch.cat([parts[i].reshape(-1).double() for i in small]) if small else None
        sums: Iterator[Tensor] = iter(())
        if flat is not None:
            sizes = [parts[i].numel() for i in small]
            sums = iter(torch.split(_sum(self.gather(flat[None], "sums")), sizes))
        return [
            next(sums).view(part.shape).to(part.dtype)
            if part.numel() <= SMALL
            else self.all_reduce(part)
            for part in parts
        ]

    def variance(self, y: Tensor) -> Tensor:
        """`total_variance` of the rows of all ranks: [], from this one's [n, d], in float64 of the
        variance and the mean of each rank's rows."""
        return self.start_variance(y)()

    def start_variance(self, y: Tensor) -> Pending:
        """`variance` whose exchange goes on beside other work."""
        parts = [y] if y.is_cuda else torch.split(y, ROWS)
        sums = torch.stack([t.sum(0, dtype=torch.float64) for t in parts])
        mean = sums.sum(0) / max(len(y), 1)  # [d]
        size = torch.full((1,), len(y), dtype=torch.float64, device=y.device)
        centre = mean.to(accumulator(y.dtype))
        squares = [torch.linalg.vector_norm(t - centre, dtype=torch.float64) ** 2 for t in parts]
        mine = torch.cat([size, torch.stack(squares).sum()[None], mean])
        every = self.start_gather(mine[None], "variance")

        def end() -> Tensor:
            sizes, withins, means = torch.split(every(), [1, 1, y.shape[1]], 1)
            middle = (sizes * means).sum(0) / sizes.sum()  # [d]
            variance: Tensor = withins.sum() + (sizes * (means - middle).square()).sum()
            return variance.to(accumulator(y.dtype))

        return end

    def observed(self, values: Tensor) -> Tensor:
        """Of each rank the smallest positive one of its values [any], 0 without one: [R]."""
        flat = torch.nn.functional.pad(values.reshape(-1), (0, 1))  # one of none
        least = torch.where(flat > 0, flat, torch.inf).min()
        every = self.gather(least[None], "least values")
        return torch.where(every.isinf(), 0, every)

    def mean_entries(self, E: int, N: int) -> float:
        """A token of all ranks, of E on this one's N tokens."""
        total, tokens = self.totals([torch.tensor(n, device=self.device) for n in (E, N)])
        return float(total) / max(int(tokens), 1)

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


def set_up(timeout: float = 600.0) -> bool:
    """Join the processes that torchrun has started: NCCL with CUDA devices, else Gloo.

    timeout: seconds that an exchange may take. Returns False where torchrun has started none.
    """
    if not dist.is_available() or not dist.is_torchelastic_launched():
        return False
    # Its functions have the default group of their import as a default argument: imported later, as
    # torch's compiler does, they keep it beyond its end, with the threads of `Ranks.__init__`.
    import torch.distributed.nn.functional

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
