# SPDX-License-Identifier: Apache-2.0
"""Coders at several sites of a language model, whose latents and errors are the nodes of a circuit.

At a site the activation y is the sum of a code's decoder rows, a constant and an error. What is
measured here replaces codes and errors; no tensor has a row for each token and a column for each
latent.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ksae import functional
from ksae.activations import splice
from ksae.activations.hooks import without_cache
from ksae.coders.code import Code
from ksae.coders.coder import SparseCoder
from ksae.errors import UserError

Metric = Callable[[Any], Tensor]  # of the model's output: [] or [B], one an example


@dataclass(frozen=True)
class Site:
    """A coder where its latents are nodes.

    Args:
        coder: an autoencoder, or a transcoder with `target_hook`.
        hook: where the coder reads, see `ksae.activations.hooks`.
        target_hook: where a transcoder writes; it must come after `hook` in the model.
        exclude: ids of tokens that have no nodes and whose activations always stay. By default the
            special tokens that the model's configuration names; () leaves none out.

    Raises:
        UserError: a transcoder without target_hook, or an autoencoder with one.
    """

    coder: SparseCoder
    hook: str
    target_hook: str | None = None
    exclude: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if not self.coder.centred and self.target_hook is None:
            raise UserError("Site: target_hook must be given for a transcoder, got None")
        if self.coder.centred and self.target_hook is not None:
            raise UserError(f"Site: target_hook is for transcoders, got {self.target_hook!r}")

    @property
    def name(self) -> str:
        """The hook that the coder writes at."""
        return self.target_hook or self.hook

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Values and indices [..., k] of the activation x [..., d_in]; rows of unequal length are
        filled up with zeros."""
        like = self.coder.W_dec
        code = Code(*self.coder.encode(x.to(like.device, like.dtype)))
        values, indices = code.padded()
        shape = (*x.shape[:-1], values.shape[-1])
        return values.reshape(shape), indices.reshape(shape)

    def rows(self, values: Tensor, indices: Tensor) -> Tensor:
        """Sum of decoder rows [..., d_out] of entries [..., K]: no bias and no skip connection."""
        if values.shape[-1] == 0:
            return values.new_zeros(*values.shape[:-1], self.coder.d_out)
        return functional.sparse_decode(values, indices, self.coder.W_dec.detach())

    def rest(self, x: Tensor) -> Tensor:
        """What a reconstruction has besides the decoder rows: the bias, and x through a skip
        connection. [..., d_out]."""
        bias = self.coder.b_dec.detach()
        if self.coder.W_skip is None:
            return bias.expand(*x.shape[:-1], -1)
        skip = self.coder.W_skip.detach()
        return bias + x.to(skip.device, skip.dtype) @ skip.T


# What goes on at a site, of its number, what the coder reads [..., d_in] and the activation there
# [..., d_out], both in the coder's type.
Change = Callable[[int, Tensor, Tensor], Tensor]


@contextmanager
def at_sites(model: nn.Module, sites: Sequence[Site], change: Change) -> Iterator[None]:
    """Within the block the model goes on from `change(i, x, y)` at site i."""
    with ExitStack() as stack:
        for number, site in enumerate(sites):
            seen = _Seen(number, site, change)
            if site.target_hook is not None:
                stack.enter_context(splice(model, site.hook, seen.read, exclude=()))
            stack.enter_context(splice(model, site.name, seen.write, exclude=site.exclude))
        yield


class _Seen:
    """One site in a forward pass."""

    def __init__(self, number: int, site: Site, change: Change) -> None:
        self.number, self.site, self.change = number, site, change
        self.input: Tensor | None = None

    def read(self, x: Tensor) -> Tensor:
        self.input = x
        return x

    def write(self, y: Tensor) -> Tensor:
        x = y
        if self.site.target_hook is not None:
            if self.input is None:
                raise UserError("attribution: target_hook must come after hook in the model")
            x, self.input = self.input, None
        like = self.site.coder.W_dec
        if y.ndim != 3:
            name, got = self.site.name, list(y.shape)
            raise UserError(f"attribution: {name} must give activations [B, T, d], got {got}")
        x, out = (t.to(like.device, like.dtype) for t in (x, y))
        return self.change(self.number, x, out).to(y.device, y.dtype)


@dataclass(frozen=True)
class Parts:
    """An activation at a site in parts."""

    values: Tensor  # [B, T, k]
    indices: Tensor  # [B, T, k] int64
    error: Tensor  # [B, T, d_out], what the reconstruction lacks


@torch.no_grad()
def record(
    model: nn.Module, inputs: Mapping[str, Any], sites: Sequence[Site], metric: Metric
) -> tuple[list[Parts], Tensor]:
    """The parts at each site, and the metric's value [] or [B], of the model as it is."""
    found: dict[int, Parts] = {}

    def look(i: int, x: Tensor, y: Tensor) -> Tensor:
        values, indices = sites[i].encode(x)
        found[i] = Parts(values, indices, y - sites[i].rows(values, indices) - sites[i].rest(x))
        return y

    with at_sites(model, sites, look):
        value = run(model, inputs, metric)
    for i, site in enumerate(sites):
        if i not in found:
            raise UserError(f"attribution: the forward pass does not reach {site.name}")
    if list(found) != sorted(found):
        names = ", ".join(sites[i].name for i in found)
        raise UserError(f"attribution: sites must be in the model's order, which is {names}")
    return [found[i] for i in range(len(sites))], value


def run(model: nn.Module, inputs: Mapping[str, Any], metric: Metric) -> Tensor:
    """The metric of a forward pass.

    Raises:
        UserError: the metric is no tensor of floats, [] or [B].
    """
    value = metric(model(**without_cache(model, dict(inputs))))
    if not isinstance(value, Tensor) or not value.is_floating_point() or value.ndim > 1:
        got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise UserError(f"attribution: metric must return a float tensor [] or [B], got {got}")
    return value


def check_sites(sites: Sequence[Site]) -> None:
    """Refuse no sites, and two at one place.

    Raises:
        UserError: either.
    """
    if not sites:
        raise UserError("attribution: sites must have at least one, got none")
    names = [site.name for site in sites]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"attribution: sites must be at different hooks, got {name} twice")


def logit_difference(
    right: int | Iterable[int], wrong: int | Iterable[int], position: int = -1
) -> Metric:
    """A metric: the logit of one token less that of another at a position, [B].

    Args:
        right, wrong: a token id, or one for each example.
    """

    def of(output: Any, tokens: int | Iterable[int]) -> Tensor:
        logits: Tensor = output.logits[:, position]  # [B, V]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        ids = [tokens] * len(logits) if isinstance(tokens, int) else list(tokens)
        return logits.gather(1, torch.tensor(ids, device=logits.device)[:, None])[:, 0]

    return lambda output: of(output, right) - of(output, wrong)
