# SPDX-License-Identifier: Apache-2.0
"""How well latents are the true features of synthetic activations, by SynthSAEBench's definitions
(arXiv 2602.14687).

A latent stands for the true feature whose direction is nearest to its decoder row, by absolute
cosine, and is a classifier of whether that feature fires.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ksae.activations.synthetic import SyntheticSource, World
from ksae.analysis.evaluate import eval_mode
from ksae.analysis.metrics import Accumulator
from ksae.coders.coder import SparseCoder
from ksae.errors import UserError

# name -> definition
DEFINITIONS: dict[str, str] = {
    "f1": "mean over latents of 2 precision recall / (precision + recall), 0 where undefined",
    "precision": "mean over latents of the share of firings at which the feature fires, or 0",
    "recall": "mean over latents of the share of the feature's firings at which it fires, or 0",
    "explained_variance": "1 - sum_b |e|^2 / sum_b |x - xbar|^2",
    "uniqueness": "number of features that any latent stands for / number of latents",
    "dead": "share of latents that fired on none of the rows",
    "l0": "mean number of values above 0 in a row",
    "true_l0": "mean number of features that fire in a row",
}
ROWS = 1024  # of a matrix of cosines


class Matches:
    """Counts over rows of how latents and the features that they stand for fire.

    Args:
        decoder: rows of the latents, [F, d].
        directions: of the true features, [features, d].
    """

    def __init__(self, decoder: Tensor, directions: Tensor) -> None:
        parts = [cosines(rows, directions).abs().argmax(1) for rows in torch.split(decoder, ROWS)]
        self.feature = torch.cat(parts)  # [F]
        self._fired = torch.zeros(len(decoder), dtype=torch.int64)
        self._both = torch.zeros(len(decoder), dtype=torch.int64)
        self._true = torch.zeros(len(directions), dtype=torch.int64)
        self._rows = 0

    def update(
        self, values: Tensor, indices: Tensor, true_values: Tensor, true_indices: Tensor
    ) -> None:
        """Add rows: a code [N, k] and the features behind it [N, m]; values of 0 did not fire."""
        rows = len(values)
        truth = torch.zeros(rows, len(self._true), dtype=torch.bool)
        row, place = (true_values > 0).nonzero(as_tuple=True)
        truth[row, true_indices[row, place].long()] = True
        self._true += truth.sum(0)
        row, place = (values != 0).nonzero(as_tuple=True)
        latent = indices[row, place].long()
        self._fired += torch.bincount(latent, minlength=len(self._fired))
        hits = latent[truth[row, self.feature[latent]]]
        self._both += torch.bincount(hits, minlength=len(self._fired))
        self._rows += rows

    def results(self) -> dict[str, float]:
        """Those of DEFINITIONS that need no reconstruction."""
        if self._rows == 0:
            raise ValueError("Matches: there must be at least one row, got none")
        both = self._both.double()
        precision = both / self._fired.clamp(min=1)
        recall = both / self._true[self.feature].clamp(min=1)
        total = precision + recall
        f1 = torch.where(total > 0, 2 * precision * recall / total, 0)
        return {
            "f1": float(f1.mean()),
            "precision": float(precision.mean()),
            "recall": float(recall.mean()),
            "uniqueness": len(torch.unique(self.feature)) / len(self.feature),
            "true_l0": int(self._true.sum()) / self._rows,
        }


def cosines(a: Tensor, b: Tensor) -> Tensor:
    """Of each row of a [n, d] with each of b [m, d] -> [n, m]; 0 for rows of zeros."""
    unit = torch.nn.functional.normalize
    return unit(a.float(), dim=1, eps=1e-8) @ unit(b.float(), dim=1, eps=1e-8).T


def mean_correlation(decoder: Tensor, directions: Tensor) -> float:
    """MCC: mean absolute cosine of pairs of a decoder row [F, d] and a direction [features, d], no
    row and no direction twice, paired so that it is largest.

    Raises:
        UserError: scipy, whose assignment it uses, is not installed.
    """
    try:
        from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped]
    except ImportError:
        raise UserError("mean_correlation: needs scipy: pip install scipy") from None
    similar = cosines(decoder, directions).abs().numpy()
    rows, columns = linear_sum_assignment(similar, maximize=True)
    return float(similar[rows, columns].mean())


@torch.no_grad()
def compare_with_truth(
    model: SparseCoder, source: SyntheticSource, *, batch_size: int = 1024
) -> dict[str, float]:
    """DEFINITIONS by name, of an autoencoder on the rows of `source.sweep`."""
    world: World = source.world
    if (model.d_in, model.d_out) != (world.config.d, world.config.d):
        got = f"{model.d_in} and {model.d_out}"
        raise ValueError(f"compare_with_truth: widths must be {world.config.d}, got {got}")
    matches = Matches(model.W_dec.cpu(), world.directions)
    accumulator = Accumulator(model.d_out, model.d_sae)
    with eval_mode(model):
        for draw in source.draws(batch_size):
            x = world.activations(draw).to(model.W_dec.device)
            output = model(x)
            accumulator.update(x, output.recon, output.values, output.indices)
            values, indices = (t.cpu() for t in output.code.padded())
            matches.update(values, indices, draw.values, draw.indices)
    found = accumulator.results() | matches.results()
    return {name: found[name] for name in DEFINITIONS}
