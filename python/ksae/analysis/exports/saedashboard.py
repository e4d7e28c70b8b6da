# SPDX-License-Identifier: Apache-2.0
"""SAEDashboard's batches: the JSON files that its Neuronpedia runner writes and its tools read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ksae.analysis.exports.pages import Pages, put


def saedashboard(folder: Path, out: Path, *, model: str, sae_set: str = "ksae") -> int:
    """Write `batch-N.json` files, one for each data file of a dashboard; returns their number.

    Args:
        folder: a dashboard.
        model: the model's id, as gpt2-small.
        sae_set: the name of the coder's set.

    What a dashboard does not measure (neuron alignment, Pearson correlations, the histogram of
    logits) is left empty. A batch's settings are not written.
    """
    pages, number = Pages.open(folder), 0
    batch: dict[str, Any]
    layer = pages.layer()
    for begin, records in pages.chunks():
        features = []
        for latent, record in enumerate(records, begin):
            features.append(pages.feature(latent, record))
        batch = {"model_id": model, "layer": layer, "sae_set": sae_set, "sae_id_suffix": None}
        batch["features"] = features
        data = json.dumps(batch, ensure_ascii=False).encode("utf-8", "replace")
        put(out / f"batch-{number}.json", data)
        number += 1
    return number
