# SPDX-License-Identifier: Apache-2.0
"""Sparse probing, by SAEBench's definitions: how well a few latents tell classes of texts apart.

A text is the mean over its tokens of their code. For each class the k latents whose means differ
most between its texts and as many of the other classes are given to a logistic regression; what
counts is its accuracy on other texts, averaged over classes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ksae.analysis.evaluate import eval_mode
from ksae.coders.coder import SparseCoder

KS = (1, 2, 5)  # SAEBench's
PENALTY = 1.0  # of the squared weights, halved; the constant is free. scikit-learn's C = 1
NEWTON_STEPS = 100


@torch.no_grad()
def mean_codes(model: SparseCoder, texts: Sequence[Tensor]) -> Tensor:
    """Activations of texts, each [tokens, d_in] -> [texts, F] float32, the mean of their codes.

    Raises:
        ValueError: a text without a token.
    """
    rows = []
    with eval_mode(model):
        for number, x in enumerate(texts):
            if len(x) == 0:
                raise ValueError(f"mean_codes: text {number} must have a token, got none")
            rows.append(
                model.encode_dense(x.to(model.W_enc.device, model.W_enc.dtype)).float().mean(0)
            )
    return torch.stack(rows) if rows else torch.zeros(0, model.d_sae)


def sparse_probing(
    train: Mapping[str, Tensor],
    test: Mapping[str, Tensor],
    ks: Sequence[int | None] = KS,
    *,
    seed: int = 0,
) -> dict[int | None, float]:
    """Mean accuracy over classes by k; None stands for all features, which makes a baseline of
    activations instead of codes.

    Args:
        train, test: class -> features of its texts, [n, F]; the same two classes or more in both.
        ks: how many features a probe sees.
        seed: of the texts of other classes that a probe is trained and tested on, as many as there
            are of its own, from all classes alike.

    Raises:
        ValueError: fewer than two classes, other classes in test, a class without texts, or a k
            that is not in [1, F].
    """
    _check(train, test, ks)
    generator = torch.Generator().manual_seed(seed)
    sums = dict.fromkeys(ks, 0.0)
    for name in train:
        (x, y), (x_test, y_test) = (_against_rest(part, name, generator) for part in (train, test))
        difference = (x[y == 1].mean(0) - x[y == 0].mean(0)).abs()
        order = difference.argsort(descending=True, stable=True)
        for k in ks:
            chosen = order[:k]
            w, b = logistic_regression(x[:, chosen], y)
            right = (x_test[:, chosen] @ w + b > 0) == (y_test == 1)
            sums[k] += float(right.double().mean()) / len(train)
    return sums


def _check(
    train: Mapping[str, Tensor], test: Mapping[str, Tensor], ks: Sequence[int | None]
) -> None:
    if len(train) < 2 or train.keys() != test.keys():
        want = "two classes or more, the same in train and test"
        raise ValueError(
            f"sparse_probing: there must be {want}, got {sorted(train)} and {sorted(test)}"
        )
    for part in (train, test):
        for name, x in part.items():
            if x.ndim != 2 or len(x) == 0:
                raise ValueError(
                    f"sparse_probing: class {name!r} must be of shape [n, F] with n >= 1, got"
                    f" {list(x.shape)}"
                )
    width = next(iter(train.values())).shape[1]
    for k in ks:
        if k is not None and not 1 <= k <= width:
            raise ValueError(f"sparse_probing: k must be in [1, {width}], got {k}")


def _against_rest(
    part: Mapping[str, Tensor], name: str, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Texts of a class and as many of the others -> [n, F] float64 and labels [n] 1 or 0; fewer of
    the others where there are not as many."""
    own = part[name].double()
    each = -(-len(own) // (len(part) - 1))
    others = []
    for other, x in part.items():
        if other != name:
            others.append(x[torch.randperm(len(x), generator=generator)[:each]])
    rest = torch.cat(others).double()
    rest = rest[torch.randperm(len(rest), generator=generator)[: len(own)]]
    y = torch.cat([torch.ones(len(own)), torch.zeros(len(rest))])
    return torch.cat([own, rest]), y.double()


def logistic_regression(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Weights [F] and constant [] that minimise the log loss of x [n, F] and labels y [n], 1 or 0,
    plus |w|^2 / 2, in float64 by Newton's method with step halving."""
    rows = torch.cat([x, torch.ones_like(x[:, :1])], 1)
    ridge = torch.full((rows.shape[1],), PENALTY, dtype=x.dtype)
    ridge[-1] = 0
    theta = torch.zeros_like(ridge)

    def loss(theta: Tensor) -> Tensor:
        margin = rows @ theta
        fit = torch.nn.functional.softplus(margin) - y * margin
        return fit.sum() + 0.5 * (ridge * theta.square()).sum()

    best = loss(theta)
    for _ in range(NEWTON_STEPS):
        p = torch.sigmoid(rows @ theta)
        gradient = rows.T @ (p - y) + ridge * theta
        curvature = rows.T @ (rows * (p * (1 - p))[:, None]) + torch.diag(ridge)
        curvature[-1, -1] += 1e-12  # all p at 0 or 1
        step = torch.linalg.solve(curvature, gradient)
        size = 1.0
        while (new := loss(theta - size * step)) > best and size > 1e-10:
            size /= 2
        theta = theta - size * step
        if best - new <= 1e-12 * (1 + best.abs()):
            break
        best = new
    return theta[:-1], theta[-1]
