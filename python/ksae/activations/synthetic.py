# SPDX-License-Identifier: Apache-2.0
"""Activations whose true features are known: the generator of SynthSAEBench (arXiv 2602.14687).

Features fire by a Gaussian copula of low rank, in trees: a child fires only with its parent, at
most one of siblings does, and its value is scaled by its parent's. An activation is the sum of
value * direction over the features that fire, plus a bias. Draws are sparse: what cannot fire is
not drawn.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ksae import ops
from ksae.activations.shuffle import Loaded
from ksae.activations.sources import ActivationSource

CHUNK = 1024  # rows drawn at a time
RARE = 1 / 64  # features less probable than this in a row are drawn by skipping over rows


@dataclass(frozen=True)
class WorldConfig:
    """What a world is made from; the defaults are SynthSAEBench-16k's.

    features, d: number of features and width of an activation.
    exponent, most, least: probabilities of firing fall as rank^-exponent between the two.
    roots, branching, depth: of the trees, whose features are the first, level by level.
    rank, correlation: of the factor of the copula, whose entries are N(0, correlation^2).
    means: of the values, from the first feature to the last.
    spread: mean and deviation of the folded normal that each feature's deviation is drawn from.
    steps, lr: of Adam on the squared cosines between directions.
    """

    features: int = 16_384
    d: int = 768
    exponent: float = 0.5
    most: float = 0.4
    least: float = 5e-4
    roots: int = 128
    branching: int = 4
    depth: int = 3
    rank: int = 25
    correlation: float = 0.1
    means: tuple[float, float] = (5.0, 4.0)
    spread: tuple[float, float] = (0.5, 0.5)
    bias: float = 0.5
    steps: int = 100
    lr: float = 3e-4
    seed: int = 42

    def __post_init__(self) -> None:
        for name in ("features", "d", "rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"WorldConfig: {name} must be >= 1, got {getattr(self, name)}")
        for name in ("roots", "branching", "depth", "steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"WorldConfig: {name} must be >= 0, got {getattr(self, name)}")
        if not 0 < self.least <= self.most <= 1:
            got = f"{self.least} and {self.most}"
            raise ValueError(f"WorldConfig: 0 < least <= most <= 1 must hold, got {got}")
        if not self.correlation >= 0:
            raise ValueError(f"WorldConfig: correlation must be >= 0, got {self.correlation}")


@dataclass(frozen=True)
class Draw:
    """The features that fire in each row: values [N, m] float32, 0 where a row has fewer, and
    indices [N, m] int32."""

    values: Tensor
    indices: Tensor


class World:
    """The features of a synthetic model, and draws from them.

    directions [features, d] unit rows, bias [d], frequency [features] as it is meant to be,
    probability [features] of firing before parents and siblings, mean and std [features] of values,
    factor [features, rank] of the copula, parent [features] and children [features, branching]
    int64, -1 where there is none.
    """

    def __init__(self, config: WorldConfig | None = None) -> None:
        self.config = c = config or WorldConfig()
        generator = torch.Generator().manual_seed(c.seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        self.directions = _spread_out(randn(c.features, c.d), c.steps, c.lr)
        bias = randn(c.d)
        self.bias = c.bias * bias / bias.norm()
        self.frequency = _zipf(c)
        self.parent, self.children = _trees(c)
        self.probability = self.frequency * _compensation(self.frequency, self.children)
        self.probability.clamp_(max=1)
        self.mean = torch.linspace(*c.means, c.features)
        self.std = (c.spread[0] + c.spread[1] * randn(c.features)).abs()
        factor = c.correlation * randn(c.features, c.rank)
        length = factor.square().sum(1, keepdim=True)
        # what a feature has of its own keeps at least 1 % of the variance
        self.factor = factor * (0.99 / length).clamp(max=1).sqrt()
        self._own = (1 - self.factor.square().sum(1)).sqrt()
        self._threshold = -torch.special.ndtri(self.probability.double()).float()
        self._free = (self.parent < 0).nonzero()[:, 0]  # neither waits for a parent

    def draw(self, rows: int, generator: torch.Generator) -> Draw:
        """Independent rows: which features fire, and their values."""
        parts = [self._draw(min(CHUNK, rows - i), generator) for i in range(0, rows, CHUNK)]
        width = max((part.values.shape[1] for part in parts), default=1)
        values = torch.zeros(rows, width)
        indices = torch.zeros(rows, width, dtype=torch.int32)
        for number, part in enumerate(parts):
            here = slice(number * CHUNK, (number + 1) * CHUNK), slice(part.values.shape[1])
            values[here], indices[here] = part.values, part.indices
        return Draw(values, indices)

    def activations(self, draw: Draw) -> Tensor:
        """The rows x [N, d] float32 of a draw."""
        x: Tensor = ops.sparse_decode(draw.values, draw.indices, self.directions, self.bias)
        return x

    def _draw(self, rows: int, generator: torch.Generator) -> Draw:
        common = torch.randn(rows, self.config.rank, generator=generator)
        row, feature = self._firing(common, generator)
        row, feature, value = _active(row, feature, self._values(feature, generator))
        found = [(row, feature, value)]
        while self.children.shape[1] and len(row):
            child = self.children[feature]  # [active, branching]
            level = self._score(common[row][:, None], child.clamp(min=0))
            fires = torch.rand(child.shape, generator=generator) < torch.special.ndtr(level)
            scale = (value / self.mean[feature])[:, None]
            values = self._values(child.clamp(min=0), generator) * scale
            fires &= (child >= 0) & (values > 0)
            # of siblings that fire together one stays, each as likely as the others
            lot = torch.where(fires, torch.rand(child.shape, generator=generator), -1.0)
            best, which = lot.max(1)
            kept = (best >= 0).nonzero()[:, 0]
            row, which = row[kept], which[kept, None]
            feature, value = child[kept].gather(1, which)[:, 0], values[kept].gather(1, which)[:, 0]
            found.append((row, feature, value))
        row, feature, value = (torch.cat(column) for column in zip(*found, strict=True))
        return _packed(rows, row, feature, value)

    def _firing(self, common: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Rows and features, of those without a parent, that fire; common [rows, rank].

        Each entry fires with its own probability p = Phi(level), given what is common to its row.
        Entries with p > RARE are drawn one by one. Over the others one skips, from one candidate
        of probability RARE to the next, and keeps it with p / RARE.
        """
        own, free = self._own[self._free], self._free
        level = torch.addmm(-self._threshold[free], common, self.factor[free].T).div_(own).flatten()
        often = level > float(torch.special.ndtri(torch.tensor(RARE)))
        one_by_one = often.nonzero()[:, 0]
        p = torch.special.ndtr(level[one_by_one])
        fired = [one_by_one[torch.rand(len(p), generator=generator) < p]]
        at = _skip(len(level), RARE, generator)
        at = at[~often[at]]
        p = torch.special.ndtr(level[at]) / RARE
        fired.append(at[torch.rand(len(at), generator=generator) < p])
        entry = torch.cat(fired)
        return entry // len(free), free[entry % len(free)]

    def _score(self, common: Tensor, feature: Tensor) -> Tensor:
        """Of features [...] in rows whose common part is [..., rank]: they fire with Phi(score)."""
        level: Tensor = (common * self.factor[feature]).sum(-1) - self._threshold[feature]
        return level / self._own[feature]

    def _values(self, feature: Tensor, generator: torch.Generator) -> Tensor:
        noise = torch.randn(feature.shape, generator=generator)
        return (self.mean[feature] + self.std[feature] * noise).relu()


class SyntheticSource(ActivationSource):
    """Fresh rows of a world for every batch; batch t depends on (world, batch_size, seed, t) only.

    Args:
        world: where the rows are from.
        held_out: rows of a sweep, which are of no seed's batches.
    """

    def __init__(self, world: World, *, held_out: int = 65_536) -> None:
        if held_out < 1:
            raise ValueError(f"SyntheticSource: held_out must be >= 1, got {held_out}")
        self.world, self.held_out = world, held_out
        self.name, self.d_in, self.d_out = "synthetic activations", world.config.d, None
        self.dtype, self.num_tokens = torch.float32, None

    def draws(self, batch_size: int) -> Iterator[Draw]:
        """The features behind the rows of `sweep`."""
        for begin in range(0, self.held_out, batch_size):
            generator = _generator(self.world.config.seed, "sweep", begin)
            yield self.world.draw(min(batch_size, self.held_out - begin), generator)

    def _stream(self, batch_size: int, seed: int, start_step: int) -> Iterator[Loaded]:
        step = start_step
        while True:
            draw = self.world.draw(batch_size, _generator(seed, "batch", step))
            rows = np.arange(step * batch_size, (step + 1) * batch_size)
            yield Loaded(self.world.activations(draw), None, None, rows)
            step += 1

    def _ordered(self, batch_size: int) -> Iterator[Loaded]:
        for number, draw in enumerate(self.draws(batch_size)):
            begin = number * batch_size
            rows = np.arange(begin, begin + len(draw.values))
            yield Loaded(self.world.activations(draw), None, None, rows)


def _generator(seed: int, use: str, number: int) -> torch.Generator:
    words = np.random.SeedSequence([seed, *use.encode(), number]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(words[0]) << 31 ^ int(words[1]))


def _active(row: Tensor, feature: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Entries whose value is above 0: another has not fired."""
    kept = value > 0
    return row[kept], feature[kept], value[kept]


def _packed(rows: int, row: Tensor, feature: Tensor, value: Tensor) -> Draw:
    """Entries in any order as a matrix of as many columns as the fullest row needs."""
    order = row.argsort(stable=True)
    row = row[order]
    count = torch.bincount(row, minlength=rows)
    first = count.cumsum(0) - count
    column = torch.arange(len(row)) - first[row]
    width = max(1, int(count.max()))
    values, indices = torch.zeros(rows, width), torch.zeros(rows, width, dtype=torch.int32)
    values[row, column] = value[order]
    indices[row, column] = feature[order].int()
    return Draw(values, indices)


def _skip(length: int, p: float, generator: torch.Generator) -> Tensor:
    """Positions below `length`, each there with probability p on its own, rising, int64."""
    found: list[Tensor] = []
    last = -1
    while last < length:
        n = int(p * (length - last) + 6 * math.sqrt(p * (length - last)) + 8)
        u = torch.rand(n, dtype=torch.float64, generator=generator)
        gaps = (torch.log1p(-u) / math.log1p(-p)).floor_().long() + 1
        found.append(last + gaps.cumsum(0))
        last = int(found[-1][-1])
    at = torch.cat(found)
    return at[at < length]


def _zipf(c: WorldConfig) -> Tensor:
    """[features], falling from `most` to `least`."""
    power = torch.arange(1, c.features + 1, dtype=torch.float64) ** -c.exponent
    if c.features > 1 and power[0] > power[-1]:
        power = (power - power[-1]) / (power[0] - power[-1])
    return (c.least + (c.most - c.least) * power).float()


def _trees(c: WorldConfig) -> tuple[Tensor, Tensor]:
    """Parent [features] and children [features, branching]: features are numbered level by level,
    within a level parent by parent, until there are none left."""
    parent = torch.full((c.features,), -1)
    begin, end = 0, min(c.roots, c.features)
    for _ in range(c.depth):
        stop = min(end + (end - begin) * c.branching, c.features)
        parent[end:stop] = begin + torch.arange(stop - end) // max(c.branching, 1)
        begin, end = end, stop
    children = torch.full((c.features, c.branching), -1)
    child = (parent >= 0).nonzero()[:, 0]
    if len(child):
        children[parent[child], (child - child[0]) % c.branching] = child
    return parent, children


def _compensation(frequency: Tensor, children: Tensor) -> Tensor:
    """By what a child's probability is raised, so that it fires about as often as it is meant to:
    1 / its parent's frequency, times 1 + the siblings expected to fire beside it."""
    factors = torch.ones_like(frequency)
    there = children >= 0
    of_child = torch.where(there, frequency[children.clamp(min=0)], 0)  # [features, branching]
    others = of_child.sum(1, keepdim=True) - of_child
    factor = (1 + others / frequency[:, None]) / frequency[:, None]
    factors[children[there]] = factor[there]
    return factors


def _spread_out(w: Tensor, steps: int, lr: float) -> Tensor:
    """Unit rows [n, d] nearer to orthogonal: Adam on the sum over pairs of squared products and n
    times that of (|w|^2 - 1)^2. The gradient needs w^T w only, which is [d, d]."""
    w = torch.nn.functional.normalize(w, dim=1)
    optimizer = torch.optim.Adam([w], lr=lr)
    for _ in range(steps):
        square = w.square().sum(1, keepdim=True)
        w.grad = 4 * (w @ (w.T @ w) - square * w) + 4 * len(w) * (square - 1) * w
        optimizer.step()
    return torch.nn.functional.normalize(w, dim=1)
