# SPDX-License-Identifier: Apache-2.0
"""Neuronpedia's import format: JSON lines of a release, a model, a source, features, activations
and explanations."""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterable
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from ksae.analysis.exports.pages import Pages, put

PER_FILE = 256  # latents


def neuronpedia(
    folder: Path,
    out: Path,
    *,
    model: str,
    source_set: str = "ksae",
    creator: str = "ksae",
    creator_id: str = "ksae",
    release: str = "ksae",
) -> Path:
    """Write `out/MODEL/LAYER-SET/`, as Neuronpedia's importer reads it: release.jsonl,
    model.jsonl, sourceset.jsonl, source.jsonl, and features/, activations/ and explanations/ with
    gzipped batches.

    Args:
        folder: a dashboard; its labels become the explanations.
        model: the model's id, as gpt2-small.
        source_set: the name of the coder's set; the source is named by layer and set.
        creator, creator_id: who made the coder.
        release: the release's name.

    Returns:
        The folder of the source.
    """
    pages = Pages.open(folder)
    source = f"{pages.layer()}-{source_set}"
    where = out / model / source
    now = datetime.now(timezone.utc).isoformat()
    common = {"creatorId": creator_id, "createdAt": now}
    _lines(where / "release.jsonl", [_release(release, creator) | common])
    _lines(where / "model.jsonl", [_model(model) | common | {"updatedAt": now}])
    _lines(where / "sourceset.jsonl", [_source_set(model, source_set, creator, release) | common])
    _lines(where / "source.jsonl", [_source(pages, model, source_set, source) | common])
    features: list[dict[str, Any]] = []
    activations: list[dict[str, Any]] = []
    owner = {"modelId": model, "layer": source} | common
    number = 0
    for begin, records in pages.chunks():
        for latent, record in enumerate(records, begin):
            data = pages.feature(latent, record)
            passages = data.pop("activations")
            named = owner | {"index": str(latent)}
            features.append(named | _feature(pages, data, record, source_set))
            activations += [
                named | _activation(source, latent, i, p) for i, p in enumerate(passages)
            ]
        if len(features) >= PER_FILE or begin + len(records) == pages.meta["F"]:
            _lines(where / "features" / f"batch-{number}.jsonl.gz", features)
            _lines(where / "activations" / f"batch-{number}.jsonl.gz", activations)
            features, activations, number = [], [], number + 1
    explanations = [
        owner
        | {"id": _id(source, latent, "label"), "index": str(latent), "description": text}
        | {"typeName": None, "explanationModelName": None}
        for latent, text in pages.labels.items()
    ]
    if explanations:
        _lines(where / "explanations" / "batch-0.jsonl.gz", explanations)
    return where


def _feature(
    pages: Pages, data: dict[str, Any], record: dict[str, Any], source_set: str
) -> dict[str, Any]:
    for name in ("feature_index", "n_prompts_total", "n_tokens_in_prompt", "dataset"):
        del data[name]
    others, cosines = record["decoder"]
    return data | {
        "sourceSetName": source_set,
        "maxActApprox": float(record["max"]),
        "hasVector": False,
        "vectorLabel": None,
        "hookName": pages.meta["target_hook"] or pages.meta["hook"],
        "topkCosSimIndices": others,
        "topkCosSimValues": [float(v) for v in cosines],
    }


def _activation(source: str, latent: int, number: int, passage: dict[str, Any]) -> dict[str, Any]:
    values = passage["values"]
    return {
        "id": _id(source, latent, str(number)),
        "tokens": passage["tokens"],
        "values": values,
        "maxValue": max(values),
        "maxValueTokenIndex": values.index(max(values)),
        "minValue": min(values),
        "qualifyingTokenIndex": passage["qualifying_token_index"],
        "binMin": passage["bin_min"],
        "binMax": passage["bin_max"],
        "binContains": passage["bin_contains"],
        "dataIndex": None,
        "dataSource": None,
        "dfaValues": [],
        "dfaTargetIndex": None,
        "dfaMaxValue": None,
        "lossValues": [],
        "logitContributions": None,
    }


def _release(name: str, creator: str) -> dict[str, Any]:
    return {
        "name": name,
        "description": name,
        "descriptionShort": name,
        "creatorName": creator,
        "creatorNameShort": creator,
        "visibility": "PUBLIC",
        "urls": [],
    }


def _model(model: str) -> dict[str, Any]:
    return {"id": model, "displayName": model, "displayNameShort": model, "instruct": False}


def _source_set(model: str, name: str, creator: str, release: str) -> dict[str, Any]:
    return {
        "modelId": model,
        "name": name,
        "creatorName": creator,
        "releaseName": release,
        "description": name,
        "visibility": "PUBLIC",
        "hasDashboards": True,
    }


def _source(pages: Pages, model: str, source_set: str, source: str) -> dict[str, Any]:
    return {
        "id": source,
        "modelId": model,
        "setName": source_set,
        "visibility": "PUBLIC",
        "hasDashboards": True,
        "num_prompts": pages.meta["contexts"],
        "num_tokens_in_prompt": pages.meta["length"],
    }


def _id(*parts: object) -> str:
    """An identifier of 25 characters, the same each time."""
    return "c" + hashlib.sha256("/".join(map(str, parts)).encode()).hexdigest()[:24]


def _lines(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    data = text.encode("utf-8", "replace")
    if path.suffix == ".gz":
        data = gzip.compress(data, compresslevel=5, mtime=0)
    put(path, data)
