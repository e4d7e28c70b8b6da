# SPDX-License-Identifier: Apache-2.0
"""A dashboard read back from its folder, latent by latent, in the terms of SAEDashboard."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ksae.analysis.dashboard.folder import read
from ksae.errors import UserError
from ksae.files.atomic import write_atomic

NO_TABLES = (
    "neuron_alignment_indices",
    "neuron_alignment_values",
    "neuron_alignment_l1",
    "correlated_neurons_indices",
    "correlated_neurons_l1",
    "correlated_neurons_pearson",
    "correlated_features_indices",
    "correlated_features_l1",
    "correlated_features_pearson",
    "logits_hist_data_bar_heights",
    "logits_hist_data_bar_values",
    "decoder_weights_dist",
    "vector",
)  # SAEDashboard's tables that a dashboard does not hold; empty lists there


@dataclass(frozen=True)
class Pages:
    """The data of a dashboard."""

    folder: Path
    meta: dict[str, Any]
    labels: dict[int, str]
    tokens: Sequence[str]

    @classmethod
    def open(cls, folder: Path) -> Pages:
        """Raises UserError if the folder holds no dashboard."""
        meta, index, tokens = (read(folder, name) for name in ("meta", "index", "tokens"))
        labels = {int(latent): text for latent, text in index["labels"].items()}
        return cls(folder, meta, labels, tokens)

    def chunks(self) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """The first latent of each data file, and its records."""
        size = self.meta["chunk"]
        for begin in range(0, self.meta["F"], size):
            yield begin, read(self.folder, f"latents/{begin // size}")

    def feature(self, latent: int, record: dict[str, Any]) -> dict[str, Any]:
        """A latent as in SAEDashboard's batches, activations included."""
        width, counts = record["histogram"]
        feature: dict[str, Any] = {"feature_index": latent} | {name: [] for name in NO_TABLES}
        for ours, theirs in (("promoted", "pos"), ("demoted", "neg")):
            ids, values = record.get(ours, ([], []))
            feature[f"{theirs}_str"] = [self.tokens[i] for i in ids]
            feature[f"{theirs}_values"] = [float(v) for v in values]
        feature["frac_nonzero"] = record["fired"] / self.meta["tokens"]
        feature["freq_hist_data_bar_values"] = [(i + 0.5) * width for i in range(len(counts))]
        feature["freq_hist_data_bar_heights"] = counts
        feature["n_prompts_total"] = self.meta["contexts"]
        feature["n_tokens_in_prompt"] = self.meta["length"]
        feature["dataset"] = ""
        top = record["contexts"][: record["top"]]
        groups = [(-1.0, float(record["max"]), -1.0, top)] if top else []
        for low, high, which in record["bands"]:
            share = 1 / len(record["bands"])
            chosen = [record["contexts"][i] for i in which]
            groups.append((float(low), float(high), share, chosen))
        feature["activations"] = [
            {"bin_min": low, "bin_max": high, "bin_contains": share} | self._passage(context)
            for low, high, share, contexts in groups
            for context in contexts
        ]
        return feature

    def _passage(self, context: list[Any]) -> dict[str, Any]:
        _, _, peak, tokens, flat = context
        values = [0.0] * len(tokens)
        for i, value in zip(flat[::2], flat[1::2], strict=True):
            values[i] = float(value)
        return {
            "qualifying_token_index": peak,
            "tokens": [self.tokens[t] for t in tokens],
            "values": values,
        }

    def layer(self) -> int:
        """Of the hook that the coder writes at.

        Raises:
            UserError: the hook is a module by path.
        """
        words = str(self.meta["target_hook"] or self.meta["hook"]).split(".")
        if len(words) != 3 or not words[1].isdecimal():
            raise UserError(f"export: the hook must name a layer, got {self.meta['hook']!r}")
        return int(words[1])


def put(path: Path, data: bytes) -> None:
    """A file, whole or not at all."""
    write_atomic(path, lambda file: file.write(data))
