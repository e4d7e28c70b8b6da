# SPDX-License-Identifier: Apache-2.0
"""What each op is timed on: its arguments, its cost, and torch's ways of doing it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as nn

from ksae import ops

from ..harness import costs
from . import latents, selections
from .case import BETA, Call, Case, Problem


def problems(case: Case, modes: tuple[str, ...] = ("forward", "backward")) -> Iterator[Problem]:
    """All ops at one shape and dtype, made one after the other."""
    if "forward" in modes:
        yield from _forward(case)
        yield from selections.forward(case)
        yield from _step_ops(case)
    if "backward" in modes:
        yield from _backward(case)


def _forward(case: Case) -> Iterator[Problem]:
    N, d, F, k, s = case.N, case.d, case.F, case.k, case.dtype.itemsize
    x, W, b_enc, b_dec = case.x, case.W, case.b_enc, case.b_dec
    values, indices, grad = case.values, case.indices, case.grad
    u = case.scores()  # [N, F]
    yield Problem(
        "topk",
        "forward",
        costs.topk(N, F, k, s),
        lambda impl: partial(impl.topk, u, k),
        {"torch.topk": lambda: u.topk(k)},
        check=lambda r: [r[0]],
    )
    yield Problem(
        "topk_encode",
        "forward",
        costs.topk_encode(N, d, F, k, s),
        lambda impl: partial(impl.topk_encode, x, W, b_enc, k, b_dec),
        {"F.linear + topk": lambda: case.scores().topk(k)},
        {"F.linear alone": case.scores},
        check=lambda r: [r[0].relu()],
        dense_product=True,
    )
    informed = nn.normalize(grad.float()).to(grad)  # rows of length 1: beta is beta |g|

    def dense_scores() -> tuple[Tensor, Tensor]:
        z = case.scores().relu()
        indices = (z * (1 + BETA * (informed @ W.T).abs())).topk(k).indices
        return z.gather(1, indices), indices

    yield Problem(
        "grad_topk_encode",
        "forward",
        costs.grad_topk_encode(N, d, F, k, s),
        lambda impl: partial(
            impl.grad_topk_encode, x, informed, W, b_enc, W, k, BETA, "additive", b_dec
        ),
        {"two F.linear + topk": dense_scores},
        check=lambda r: [r[0].sort(1).values],  # near-ties of the score come in another order
        dense_product=True,
        exchanges=True,
    )
    dead = torch.arange(F, device=x.device) % 10 == 0
    k_aux = min(d // 2, int(dead.sum()))

    def dense_selections() -> tuple[Tensor, ...]:
        z = case.scores()
        return (*z.topk(k), *z.where(dead, -torch.inf).topk(k_aux))

    yield Problem(
        "topk_encode_aux",
        "forward",
        costs.topk_encode_aux(N, d, F, k, k_aux, s),
        lambda impl: partial(impl.topk_encode_aux, x, W, b_enc, k, k_aux, dead, b_dec),
        {"F.linear + two topk": dense_selections},
        check=lambda r: [r[0].relu(), r[2].relu()],
        dense_product=True,
    )
    yield Problem(
        "sparse_decode",
        "forward",
        costs.sparse_decode(N, d, F, k, s),
        lambda impl: partial(impl.sparse_decode, values, indices, W, b_dec),
        {
            "embedding_bag": lambda: (
                b_dec + nn.embedding_bag(indices, W, per_sample_weights=values, mode="sum")
            ),
            "dense matmul": lambda: b_dec + case.dense_code() @ W,
        },
    )
    yield Problem(
        "sparse_decode_backward_values",
        "forward",
        costs.backward_values(N, d, F, k, s),
        lambda impl: partial(impl.sparse_decode_backward_values, grad, indices, W),
        {
            "gather + bmm": lambda: torch.bmm(W[indices], grad[:, :, None])[:, :, 0],
            "dense matmul": lambda: (grad @ W.T).gather(1, indices),
        },
    )
    yield Problem(
        "sparse_decode_backward_weight",
        "forward",
        costs.backward_weight(N, d, F, k, s),
        lambda impl: partial(impl.sparse_decode_backward_weight, grad, values, indices, F),
        {"index_add_": case.index_add, "dense matmul": lambda: (case.dense_code().T @ grad,)},
        check=lambda r: [r[0]],
    )


def _step_ops(case: Case) -> Iterator[Problem]:
    """What only the fused training step calls."""
    N, d, F, k, s = case.N, case.d, case.F, case.k, case.dtype.itemsize
    values, indices = case.values, case.indices
    code = (values, indices, case.W, case.b_dec, case.x)
    yield Problem(
        "group_by_latent",
        "forward",
        costs.group_by_latent(N, F, k, s),
        lambda impl: partial(impl.group_by_latent, values, indices, F),
        {"stable sort": case.sort_by_latent},
        check=lambda r: [r[0]],
    )
    yield Problem(
        "sparse_residual",
        "forward",
        costs.sparse_residual(N, d, F, k, s),
        lambda impl: partial(impl.sparse_residual, *code, d),
        check=list,
    )
    yield Problem(
        "sparse_residual_slice",
        "forward",
        costs.residual_slice(N, d, F, k, d // 2, s),
        lambda impl: partial(impl.sparse_residual_slice, *code, 0, d // 2),
    )
    widths = torch.tensor([max(F >> m, 1) for m in (4, 3, 2, 1, 0)], device=case.x.device)
    shares = torch.ones(len(widths), dtype=torch.float32, device=case.x.device)
    nested = (*code, widths, shares)
    yield Problem(
        "prefix_residual",
        "forward",
        costs.prefix_residual(N, d, F, k, len(widths), s),
        lambda impl: partial(impl.prefix_residual, *nested, d),
        check=list,
    )
    yield Problem(
        "prefix_residual_slice",
        "forward",
        costs.prefix_slice(N, d, F, k, len(widths), d // 5, s),
        lambda impl: partial(impl.prefix_residual_slice, *nested, 0, d // 5),
    )
    yield from latents.forward(case)
    yield from _small(case)


def _small(case: Case) -> Iterator[Problem]:
    """What else a step does: the numbers of its loss and of Adam, and the update of a bias."""
    N, d, s, x = case.N, case.d, case.dtype.itemsize, case.x
    device = x.device
    loss, lr, t = (torch.tensor(v, device=device, dtype=torch.float64) for v in (0.5, 1e-3, 0.0))
    constants = torch.tensor([0.9, 0.999, 1e-8], device=device, dtype=torch.float64)
    terms = ([case.residual.double().square().sum(1)], [ops.total_variance(x)], [1.0])
    yield Problem(
        "total_variance",
        "forward",
        costs.total_variance(N, d, s),
        lambda impl: partial(impl.total_variance, x),
        {"torch.var": lambda: N * x.float().var(0, correction=0).sum()},
    )
    yield Problem(
        "loss_terms",
        "forward",
        costs.loss_terms(N),
        lambda impl: partial(impl.loss_terms, *terms),
        check=list,
    )
    scalars = (loss.float(), None, None, case.scale, lr, t, constants)
    yield Problem(
        "adam_scalars",
        "forward",
        costs.adam_scalars(),
        lambda impl: partial(impl.adam_scalars, *scalars),
        check=lambda r: [r[0], r[2]],
    )
    yield Problem(
        "count_tokens",
        "forward",
        costs.count_tokens(case.F),
        lambda impl: _count_tokens(case, impl),
        check=list,
    )
    yield Problem(
        "vector_update",
        "forward",
        costs.vector_update(case.F, s),
        lambda impl: _vector_update(case, impl),
    )


def _count_tokens(case: Case, impl: Any) -> Call:
    """Counters of its own, in which no latent is dead however often it is called."""
    device, never = case.x.device, 1 << 62
    loss, taken = torch.tensor(0.5, device=device), torch.tensor(True, device=device)
    since = torch.zeros(case.F, dtype=torch.int64, device=device)
    t = torch.zeros((), dtype=torch.float64, device=device)
    given = (loss, taken, case.offsets, since, t, case.N, never, 0)
    return partial(impl.count_tokens, *given)


def _vector_update(case: Case, impl: Any) -> Call:
    """b_enc's update, on a bias and moments of its own."""
    p = case.b_enc.clone()
    master = None if case.dtype == torch.float32 else p.float()
    m, v = (torch.zeros_like(p, dtype=torch.float32) for _ in range(2))
    hyper, taken = torch.tensor(latents.HYPER, device=p.device), torch.tensor(True, device=p.device)
    grad = case.W[:, 0].float()

    def call() -> Tensor:
        impl.vector_update([grad], None, None, taken, hyper, p, master, m, v)
        return p

    return call


def _backward(case: Case) -> Iterator[Problem]:
    """Autograd of the three ops that users call, from the same output gradients."""
    N, d, F, k, s = case.N, case.d, case.F, case.k, case.dtype.itemsize
    u = case.scores()
    yield Problem(
        "topk",
        "backward",
        costs.topk_backward(N, F, k, s),
        _autograd(lambda impl, a: impl.topk(a, k)[0], u),
        {"torch.topk": _autograd(lambda _, a: a.topk(k)[0], u)(None)},
        check=lambda r: [r[0].sort(1).values],  # of equal scores torch takes others
    )

    def encode(impl: Any, x: Tensor, W: Tensor, b_enc: Tensor, b_dec: Tensor) -> Tensor:
        out: Tensor = impl.topk_encode(x, W, b_enc, k, b_dec)[0]
        return out

    def linear(_: Any, x: Tensor, W: Tensor, b_enc: Tensor, b_dec: Tensor) -> Tensor:
        return nn.linear(x - b_dec, W, b_enc).topk(k)[0].relu()

    inputs = (case.x, case.W, case.b_enc, case.b_dec)
    yield Problem(
        "topk_encode",
        "backward",
        costs.topk_encode_backward(N, d, F, k, s),
        _autograd(encode, *inputs),
        {"F.linear + topk": _autograd(linear, *inputs)(None)},
        # of scores that round alike they take others, which moves single rows of the gradient
        check=lambda r: [g.norm() for g in r],
        exchanges=True,
    )

    def decode(impl: Any, values: Tensor, W: Tensor, b_dec: Tensor) -> Tensor:
        out: Tensor = impl.sparse_decode(values, case.indices, W, b_dec)
        return out

    def bag(_: Any, values: Tensor, W: Tensor, b_dec: Tensor) -> Tensor:
        return b_dec + nn.embedding_bag(case.indices, W, per_sample_weights=values, mode="sum")

    inputs_ = (case.values, case.W, case.b_dec)
    yield Problem(
        "sparse_decode",
        "backward",
        costs.backward_values(N, d, F, k, s) + costs.backward_weight(N, d, F, k, s),
        _autograd(decode, *inputs_),
        {"embedding_bag": _autograd(bag, *inputs_)(None)},
        check=list,
    )


def _autograd(function: Callable[..., Tensor], *inputs: Tensor) -> Callable[[Any], Call]:
    """make(module): gradients of `function` for its inputs, of a graph built at the first call."""

    def make(impl: Any) -> Call:
        graph: list[Any] = []

        def call() -> tuple[Tensor, ...]:
            if not graph:
                leaves = [t.detach().clone().requires_grad_() for t in inputs]
                with torch.enable_grad():
                    out = function(impl, *leaves)
                generator = torch.Generator().manual_seed(3)
                grad = torch.randn(out.shape, generator=generator).to(out)
                graph.extend([out, leaves, grad])
            out, leaves, grad = graph
            grads: tuple[Tensor, ...] = torch.autograd.grad(out, leaves, grad, retain_graph=True)
            return grads

        return call

    return make
