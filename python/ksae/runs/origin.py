# SPDX-License-Identifier: Apache-2.0
"""Which activations a model was trained on, and whether others are of the same kind.

A model of equal width computes something for the activations of any other layer or language model,
so a mistake shows in nothing but the figures.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ksae.errors import UserError
from ksae.files import container
from ksae.runs.data import ORIGIN

WORDS = {
    "model": "language model",
    "hook": "hook",
    "target_hook": "target hook",
    "model_fingerprint": "weights of the language model",
}


def identity_of_file(path: str | Path) -> dict[str, Any]:
    """What the file of a model, or the folder of a run, says about its run; {} if it says nothing
    or is another library's."""
    path = Path(path)
    file = path / "model.safetensors" if path.is_dir() else path
    try:
        identity: dict[str, Any] = container.read_header(file)["extra"].get("identity", {})
    except (UserError, AttributeError):
        return {}
    return identity


def origin_of_file(path: str | Path) -> dict[str, str]:
    """The language model and hooks that the model at `path` was trained on, as far as known."""
    origin: dict[str, str] = identity_of_file(path).get("origin", {})
    return origin


def differences(trained: Mapping[str, str], measured: Mapping[str, str]) -> list[str]:
    """Lines on what differs between two origins; of names and weights of a language model the
    weights count, where both are known."""
    keys = [key for key in ORIGIN if key in trained and key in measured]
    if (
        "model_fingerprint" in keys
        and trained["model_fingerprint"] == measured["model_fingerprint"]
    ):
        keys.remove("model")  # the same under another name
    lines = []
    for key in keys:
        if trained[key] != measured[key]:
            lines.append(f"{WORDS[key]} {trained[key]} there, {measured[key]} here")
    return lines
