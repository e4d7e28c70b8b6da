# SPDX-License-Identifier: Apache-2.0
"""Labels of latents, read from JSON."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

from ksae.errors import UserError


def read_labels(path: Path, F: int) -> dict[int, str]:
    """Labels by latent, from a JSON file: an object latent -> label, or Neuronpedia's explanations,
    a list or JSON lines of objects with `index` and `description`; gzipped if it ends in .gz.

    Raises:
        UserError: no such file, not JSON, a label that is no text, or a latent not in [0, F).
    """
    try:
        data = _json(path)
    except OSError as error:
        raise UserError(f"labels: cannot read {path}: {error.strerror or error}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"labels: {path} is not JSON: {error}") from None
    labels: dict[int, str] = {}
    for key, label in _pairs(data, path):
        if not isinstance(label, str):
            raise UserError(
                f"labels: {path}: the label of latent {key} must be text, "
                f"got {type(label).__name__}"
            )
        number = str(key)
        if not (number.isascii() and number.isdecimal() and int(number) < F):
            raise UserError(f"labels: {path}: a latent must be in [0, {F}), got {key!r}")
        labels[int(number)] = " ".join(label.split())
    return labels


def _json(path: Path) -> Any:
    """A JSON file, or the rows of JSON lines; both may be gzipped."""
    data = path.read_bytes()
    try:
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode("utf-8")
    except EOFError as error:
        raise gzip.BadGzipFile(str(error)) from None
    if path.name.removesuffix(".gz").endswith(".jsonl"):
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    return json.loads(text)


def _pairs(data: Any, path: Path) -> list[tuple[Any, Any]]:
    if isinstance(data, dict):
        return list(data.items())
    if isinstance(data, list):
        if all(isinstance(item, dict) and {"index", "description"} <= item.keys() for item in data):
            return [(item["index"], item["description"]) for item in data]
        raise UserError(f"labels: {path}: items of a list must have index and description")
    raise UserError(f"labels: {path} must be an object of latent: label, got {type(data).__name__}")
