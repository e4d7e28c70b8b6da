# SPDX-License-Identifier: Apache-2.0
"""Where a trainer's activations come from: the protocol, and arrays in memory or on disk."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ksae.activations import fingerprint
from ksae.activations.rows import FLOATS, Rows, check_finite, take
from ksae.activations.shuffle import Loaded, check_stream, shuffled
from ksae.errors import UserError

Batch = tuple[Tensor, "Tensor | None"]  # x [N,d_in], y [N,d_out] or None
GradientBatch = tuple[Tensor, "Tensor | None", Tensor]  # and g, of the shape of y, or else of x

BUFFER_TOKENS = 131_072  # rows of a window: 300 MB at d=576 in float32
BLOCK_TOKENS = 512  # rows read from disk in one go: about 1 MB at d=576


class ActivationSource(ABC):
    """A set of activation rows. `d_out` is None where the target is the input itself (an SAE);
    `num_tokens` is the number of rows of an epoch, None if unknown; `has_gradient` tells whether
    each row comes with the gradient of a language model's loss."""

    name: str
    d_in: int
    d_out: int | None
    dtype: torch.dtype
    num_tokens: int | None
    has_gradient: bool = False
    first_row: int = 0  # of a part of another source, where in that it begins: messages count there

    def batches(self, batch_size: int, *, seed: int = 0, start_step: int = 0) -> Iterator[Batch]:
        """An endless stream of shuffled batches, epoch after epoch, all of `batch_size` rows: the
        rows left over by an epoch are joined by the first of the next one.

        Batch t depends on (data, batch_size, seed, t) only, so a run resumes with `start_step` set
        to the number of batches it has used. A non-finite activation raises UserError.
        """
        check_stream(batch_size, seed, start_step)
        for step, part in enumerate(self._stream(batch_size, seed, start_step), start_step):
            yield self._checked(part, f" (step {step})")

    def gradient_batches(
        self, batch_size: int, *, seed: int = 0, start_step: int = 0
    ) -> Iterator[GradientBatch]:
        """`batches`, each with the gradient of its rows: (x, y, g). A gradient may be non-finite:
        selection then ignores it."""
        check_stream(batch_size, seed, start_step)
        for step, part in enumerate(self._stream(batch_size, seed, start_step), start_step):
            yield *self._checked(part, f" (step {step})"), self._gradient(part)

    def sweep(self, batch_size: int) -> Iterator[Batch]:
        """Every row once, in order; the last batch may be smaller. For evaluation."""
        check_stream(batch_size, 0, 0)
        for part in self._ordered(batch_size):
            yield self._checked(part, "")

    def gradient_sweep(self, batch_size: int) -> Iterator[GradientBatch]:
        """`sweep`, each batch with the gradient of its rows: (x, y, g)."""
        check_stream(batch_size, 0, 0)
        for part in self._ordered(batch_size):
            yield *self._checked(part, ""), self._gradient(part)

    def fingerprint(self) -> str | None:
        """A hash that is another one for other data, so that a run does not resume on them; None
        for a source that cannot tell."""
        return None

    def _checked(self, part: Loaded, where: str) -> Batch:
        rows = part.rows + self.first_row
        check_finite(part.x, rows, f"{self.name}{where}")
        if part.y is not None:
            check_finite(part.y, rows, f"{self.name} target{where}")
        return part.x, part.y

    def _gradient(self, part: Loaded) -> Tensor:
        if part.g is None:
            raise UserError(
                f"{self.name}: holds no gradients; harvest the activations with gradients"
            )
        return part.g

    @abstractmethod
    def _stream(self, batch_size: int, seed: int, start_step: int) -> Iterator[Loaded]: ...

    @abstractmethod
    def _ordered(self, batch_size: int) -> Iterator[Loaded]: ...


@dataclass(frozen=True)
class RowOrigin:
    """Which token each row came from, per shard, all [rows] int32: token id, context number and
    position in that context."""

    tokens: Sequence[Tensor]
    contexts: Sequence[Tensor]
    positions: Sequence[Tensor]


class ArraySource(ActivationSource):
    """Rows held in tensors, one a shard. Tensors in memory are shuffled by a full permutation each
    epoch; memory-mapped ones in windows (see shuffle.py), so that reads stay nearly sequential and
    about `buffer_tokens` rows are in memory at a time.

    Args:
        x: shards [rows, d_in], one float dtype.
        y: shards [rows, d_out] of the targets, row for row, or None.
        g: shards of the gradients of a loss at y, or at x where there is no y, row for row, or
            None.
        mapped: the shards are memory-mapped files.
        origin: the token of each row, if known.
        verify: called with the number of a shard before each read of its rows; raises if they are
            not what they should be.
        identity: what the rows are made from, as a cache says it, if known.
    """

    def __init__(
        self,
        x: Sequence[Tensor],
        y: Sequence[Tensor] | None = None,
        g: Sequence[Tensor] | None = None,
        *,
        name: str = "activations",
        mapped: bool = False,
        buffer_tokens: int = BUFFER_TOKENS,
        block_tokens: int = BLOCK_TOKENS,
        origin: RowOrigin | None = None,
        verify: Callable[[int], None] = lambda shard: None,
        identity: Mapping[str, Any] | None = None,
    ) -> None:
        if buffer_tokens < 1 or block_tokens < 1:
            raise UserError(f"{name}: buffer_tokens and block_tokens must be at least 1")
        self.name = name
        self.origin = origin
        self._verify, self._identity = verify, identity
        self._x = _shards(x, name)
        self._y = None if y is None else _shards(y, f"{name} target")
        self._g = None if g is None else _shards(g, f"{name} gradient")
        self.has_gradient = g is not None
        self._starts = np.cumsum([0, *map(len, self._x)])  # [shards + 1]
        self._in_one_piece = not mapped and len(self._x) == 1
        self._buffer_tokens = buffer_tokens
        self.d_in = self._x[0].shape[1]
        self.d_out = None if self._y is None else self._y[0].shape[1]
        self.dtype = self._x[0].dtype
        self.num_tokens: int = int(self._starts[-1])
        if self.num_tokens == 0:
            raise UserError(f"{name}: must hold at least one row, got none")
        for what, shards in (("target", self._y), ("gradient", self._g)):
            if shards is not None and [len(t) for t in shards] != [len(t) for t in self._x]:
                rows = sum(map(len, shards))
                raise UserError(
                    f"{name}: {what} must have the {self.num_tokens} rows of x, got {rows}"
                )
        width = self.d_in if self.d_out is None else self.d_out
        if self._g is not None and self._g[0].shape[1] != width:
            raise UserError(
                f"{name}: gradient must have width {width}, that of what is reconstructed, "
                f"got {self._g[0].shape[1]}"
            )
        # A block is `block_tokens` rows in a row, never across shards.
        self._blocks = np.concatenate(
            [np.arange(start, stop, block_tokens) for start, stop in self._spans()]
        )
        self._block_rows = np.diff(np.append(self._blocks, self.num_tokens))

    def gather(self, rows: Tensor) -> Batch:
        """x and y of some rows, [len(rows), d]; `rows` int64 in [0, num_tokens)."""
        wanted = rows.cpu().numpy().astype(np.int64)
        y = None if self._y is None else self._gather(self._y, wanted)
        return self._gather(self._x, wanted), y

    def fingerprint(self) -> str:
        """A hash of what the rows are made from, if that is known; else of up to 1024 rows of x, y
        and g, of their dtypes and sizes."""
        if self._identity is not None:
            return fingerprint.of_identity(self._identity)
        wanted = fingerprint.sampled(self.num_tokens).numpy()
        parts = (self._x, self._y, self._g)
        return fingerprint.of_rows(
            self.num_tokens,
            [None if part is None else self._gather(part, wanted) for part in parts],
        )

    def tokens_of(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Token ids, context numbers and positions of some rows, all int32 like `rows`."""
        origin, wanted = self._origin(), rows.cpu().numpy().astype(np.int64)
        tokens, contexts, positions = (
            self._gather(shards, wanted)
            for shards in (origin.tokens, origin.contexts, origin.positions)
        )
        return tokens, contexts, positions

    def context(self, row: int) -> tuple[list[int], int]:
        """The stored token ids of the context around a row, and the row's index among them.
        Excluded special tokens are not stored, so they are not among them either."""
        origin = self._origin()
        shard = int(np.searchsorted(self._starts, row, side="right")) - 1
        if not 0 <= row < self.num_tokens:
            raise UserError(f"{self.name}: row must be in [0, {self.num_tokens}), got {row}")
        self._verify(shard)
        local = row - int(self._starts[shard])
        contexts = origin.contexts[shard].numpy()  # a context never spans shards, and they rise
        begin = int(np.searchsorted(contexts, contexts[local], side="left"))
        end = int(np.searchsorted(contexts, contexts[local], side="right"))
        return origin.tokens[shard][begin:end].tolist(), local - begin

    def _origin(self) -> RowOrigin:
        if self.origin is None:
            raise UserError(f"{self.name}: holds no token ids; harvest the activations with ksae")
        return self.origin

    def _spans(self) -> list[tuple[int, int]]:
        return [(int(a), int(b)) for a, b in zip(self._starts[:-1], self._starts[1:], strict=True)]

    def _gather(self, shards: Sequence[Tensor], rows: Rows) -> Tensor:
        if len(shards) == 1:
            self._verify(0)
            return take(shards[0], rows)
        out = torch.empty(len(rows), *shards[0].shape[1:], dtype=shards[0].dtype)
        shard_of = np.searchsorted(self._starts, rows, side="right") - 1
        for shard in np.unique(shard_of):
            self._verify(int(shard))
            here = np.flatnonzero(shard_of == shard)
            out[torch.from_numpy(here)] = take(shards[shard], rows[here] - self._starts[shard])
        return out

    def _within(self, begin: int, end: int) -> list[int]:
        """The shards that hold the rows begin to end."""
        spans = enumerate(self._spans())
        return [shard for shard, (start, stop) in spans if begin < stop and end > start]

    def _slice(self, shards: Sequence[Tensor], begin: int, end: int) -> list[Tensor]:
        """Rows begin to end, as views."""
        starts = self._starts.tolist()
        return [
            shards[shard][max(begin - starts[shard], 0) : end - starts[shard]]
            for shard in self._within(begin, end)
        ]

    def _load_blocks(self, blocks: Rows) -> Loaded:
        begins, ends = self._blocks[blocks], self._blocks[blocks] + self._block_rows[blocks]
        spans = list(zip(begins.tolist(), ends.tolist(), strict=True))
        rows = np.concatenate([np.arange(begin, end) for begin, end in spans])
        shard_of = (np.searchsorted(self._starts, begins, side="right") - 1).tolist()
        for shard in sorted(set(shard_of)):
            self._verify(shard)

        def read(shards: Sequence[Tensor]) -> Tensor:
            return torch.cat(
                [
                    shards[shard][begin - self._starts[shard] : end - self._starts[shard]]
                    for shard, (begin, end) in zip(shard_of, spans, strict=True)
                ]
            )

        return Loaded(
            read(self._x),
            None if self._y is None else read(self._y),
            None if self._g is None else read(self._g),
            rows,
        )

    def _stream(self, batch_size: int, seed: int, start_step: int) -> Iterator[Loaded]:
        if self._in_one_piece:
            counts = np.array([self.num_tokens])
            y, g = (None if shards is None else shards[0] for shards in (self._y, self._g))
            load = lambda _: Loaded(self._x[0], y, g, np.arange(self.num_tokens))
            buffer_tokens = self.num_tokens
        else:
            counts, load, buffer_tokens = self._block_rows, self._load_blocks, self._buffer_tokens
        return shuffled(
            counts,
            load,
            batch_size,
            buffer_tokens=buffer_tokens,
            seed=seed,
            start_step=start_step,
        )

    def _ordered(self, batch_size: int) -> Iterator[Loaded]:
        for begin in range(0, self.num_tokens, batch_size):
            end = min(begin + batch_size, self.num_tokens)
            for shard in self._within(begin, end):
                self._verify(shard)
            y, g = (
                None if shards is None else torch.cat(self._slice(shards, begin, end))
                for shards in (self._y, self._g)
            )
            x = torch.cat(self._slice(self._x, begin, end))
            yield Loaded(x, y, g, np.arange(begin, end))

    def part(self, begin: int, end: int) -> ArraySource:
        """The rows begin to end, without copying them."""
        y, g = (
            None if shards is None else self._slice(shards, begin, end)
            for shards in (self._y, self._g)
        )
        x, mapped = self._slice(self._x, begin, end), not self._in_one_piece
        first, verify = int(np.searchsorted(self._starts, begin, side="right")) - 1, self._verify
        whole = self._identity
        source = ArraySource(
            x,
            y,
            g,
            name=self.name,
            mapped=mapped,
            verify=lambda shard: verify(first + shard),
            identity=None if whole is None else {**whole, "rows": [begin, end]},
        )
        source.first_row = self.first_row + begin
        return source


def _shards(shards: Sequence[Tensor], name: str) -> list[Tensor]:
    if not shards:
        raise UserError(f"{name}: must hold at least one row, got none")
    for shard in shards:
        if shard.ndim != 2:
            raise UserError(f"{name}: must have shape [N, d], got {list(shard.shape)}")
        if shard.dtype not in FLOATS:
            raise UserError(
                f"{name}: must be float16, bfloat16, float32 or float64, got {shard.dtype}"
            )
        if shard.shape[1] != shards[0].shape[1] or shard.dtype != shards[0].dtype:
            raise UserError(f"{name}: shards must agree in d and dtype")
    return [shard.detach() for shard in shards]
