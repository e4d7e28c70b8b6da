# SPDX-License-Identifier: Apache-2.0
"""Reconstruction and sparsity metrics, accumulated in float64 in one pass over the tokens.

Libraries give different numbers the same name, so every flavour here has its own name, and
DEFINITIONS says what it is and who reports it. All of them but `explained_variance_legacy` are
independent of how the tokens are split into batches. SAEBench 0.6.0's other explained variance,
1 - E|e|^2 / (E|x|^2 - (E|x|^2/d)^2), is left out: it squares a mean square, so it changes with the
scale of x.
"""

from __future__ import annotations

import torch
from torch import Tensor

# name -> (definition, who reports it). x is the target (the input of an autoencoder), e = x - xhat,
# xbar the mean over all tokens seen, mean_b a mean over tokens.
DEFINITIONS: dict[str, tuple[str, str]] = {
    "fvu": (
        "sum_b |e|^2 / sum_b |x - xbar|^2: sees a constant error of the bias",
        "SAE-Dark-Matter, MP-SAE; sparsify per batch",
    ),
    "nmse": ("mean_b |e|^2/|x|^2: not centred, a mean of ratios", "openai/sparse_autoencoder"),
    "explained_variance": ("1 - fvu", "ksae"),
    "explained_variance_centred": (
        "1 - sum_j Var(e_j) / sum_j Var(x_j): blind to a constant error of the bias",
        "dictionary_learning",
    ),
    "explained_variance_legacy": (
        "mean_b [1 - |e|^2/|x - xbar|^2], xbar of each batch: changes with the batch size",
        "SAEBench, SAELens",
    ),
    "mse": ("mean over tokens and dimensions of e^2", "ksae's loss 'mse', BatchTopK"),
    "squared_error": ("mean_b |e|^2", "SAELens (its 'mse')"),
    "l0": ("mean_b count(value != 0)", "SAELens, SAEBench, dictionary_learning"),
    "dead": ("share of latents that fired on none of the evaluated tokens", "dictionary_learning"),
    "shrinkage": ("sum_b |xhat|^2 / sum_b <x, xhat>: 1 if lengths are right", "SAEBench"),
    "norm_ratio": ("mean_b |xhat|/|x|", "SAEBench, SAELens, dictionary_learning"),
    "cosine": ("mean_b <x, xhat>/(|x||xhat|)", "SAEBench, SAELens, dictionary_learning"),
}


class Accumulator:
    """Sums over tokens from which `results()` computes every metric of DEFINITIONS.

    Args:
        d: width of the target.
        F: number of latents.

    Numerics: float64 throughout, so memory and error do not grow with the number of tokens.
    A token with |x| = 0 has no ratio and is left out of the means of ratios (`nmse`, `norm_ratio`,
    `cosine`).
    """

    def __init__(self, d: int, F: int) -> None:
        self.d = d
        self.tokens = 0
        self.fired = torch.zeros(F, dtype=torch.int64)  # [F] tokens on which each latent was not 0
        self._x = torch.zeros(d, dtype=torch.float64)  # [d] sum x
        self._e = torch.zeros(d, dtype=torch.float64)  # [d] sum e
        self._sums = dict.fromkeys(
            ("x2", "e2", "xhat2", "dot", "e2/x2", "norm_ratio", "cosine", "ratios", "legacy"), 0.0
        )

    def update(self, x: Tensor, recon: Tensor, values: Tensor, indices: Tensor) -> None:
        """Adds a batch.

        Args:
            x: the target, [N, d].
            recon: the reconstruction, [N, d].
            values, indices: the code, [N, k], or its entries [E].

        Raises:
            ValueError: the shapes disagree, or x or recon has a non-finite entry; nothing is added.
        """
        if x.ndim != 2 or x.shape[1] != self.d:
            raise ValueError(f"metrics: x must be of shape [N, {self.d}], got {list(x.shape)}")
        if recon.shape != x.shape:
            raise ValueError(
                f"metrics: recon must have the shape of x {list(x.shape)}, got {list(recon.shape)}"
            )
        rows = values.shape[:1] if values.ndim == 2 else x.shape[:1]
        if values.shape != indices.shape or rows != x.shape[:1]:
            raise ValueError(
                f"metrics: values and indices must both be of shape [{x.shape[0]}, k], "
                f"got {list(values.shape)} and {list(indices.shape)}"
            )
        x, recon = x.detach().double(), recon.detach().double()  # [N, d]
        e = x - recon  # [N, d]
        x2, e2, xhat2 = x.square().sum(1), e.square().sum(1), recon.square().sum(1)  # [N]
        dot = (x * recon).sum(1)  # [N]
        for name, total in (("x", x2.sum()), ("recon", xhat2.sum())):
            if not bool(total.isfinite()):
                raise ValueError(f"metrics: {name} must be finite, got NaN or infinity in a batch")

        nonzero = x2 > 0  # [N]
        ratio = (xhat2 / x2).sqrt()  # [N]
        cosine = dot / (x2 * xhat2).sqrt().clamp_min(torch.finfo(torch.float64).tiny)  # [N]
        centred2 = (x - x.mean(0)).square().sum(1)  # [N]
        add = {
            "x2": x2.sum(),
            "e2": e2.sum(),
            "xhat2": xhat2.sum(),
            "dot": dot.sum(),
            "e2/x2": (e2 / x2)[nonzero].sum(),
            "norm_ratio": ratio[nonzero].sum(),
            "cosine": cosine[nonzero].sum(),
            "ratios": nonzero.sum(),
            "legacy": (1 - e2 / centred2).sum(),
        }
        for name, value in add.items():
            self._sums[name] += float(value)
        self.tokens += len(x)
        self._x += x.sum(0).cpu()
        self._e += e.sum(0).cpu()
        active = indices[values != 0].long().cpu()
        self.fired += torch.bincount(active, minlength=len(self.fired))

    def frequency(self) -> Tensor:
        """Share of tokens on which each latent fired, [F] float64."""
        self._require_tokens()
        return self.fired.double() / self.tokens

    def results(self) -> dict[str, float]:
        """Every metric of DEFINITIONS by name. A ratio whose denominator is zero is NaN."""
        self._require_tokens()
        n, s = self.tokens, self._sums
        x_scatter = s["x2"] - float(self._x.square().sum()) / n  # sum_b |x - xbar|^2
        e_scatter = s["e2"] - float(self._e.square().sum()) / n
        fvu = _ratio(s["e2"], x_scatter)
        return {
            "fvu": fvu,
            "nmse": _ratio(s["e2/x2"], s["ratios"]),
            "explained_variance": 1 - fvu,
            "explained_variance_centred": 1 - _ratio(e_scatter, x_scatter),  # n - 1 cancels
            "explained_variance_legacy": s["legacy"] / n,
            "mse": s["e2"] / (n * self.d),
            "squared_error": s["e2"] / n,
            "l0": float(self.fired.sum()) / n,
            "dead": float((self.fired == 0).double().mean()),
            "shrinkage": _ratio(s["xhat2"], s["dot"]),
            "norm_ratio": _ratio(s["norm_ratio"], s["ratios"]),
            "cosine": _ratio(s["cosine"], s["ratios"]),
        }

    def _require_tokens(self) -> None:
        if self.tokens == 0:
            raise ValueError("metrics: the stream must have at least one token, got none")


def _ratio(a: float, b: float) -> float:
    return a / b if b > 0 else float("nan")
