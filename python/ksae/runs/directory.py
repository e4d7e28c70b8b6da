# SPDX-License-Identifier: Apache-2.0
"""The directory of a run, and what a resumed run must share with the one it goes on with."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ksae.errors import UserError

FILES = frozenset(["run.yaml", "metrics.jsonl", "checkpoints"])  # one of which a run has at once
# Settings that a resumed run may change: where and how fast it runs, not what it computes.
FREE = frozenset(
    [
        "train.device",
        "train.threads",
        "train.prefetch",
        "train.checkpoint_every",
        "train.keep_last",
        "train.eval_tokens",
        "data.cache",
    ]
)

# What runs did before there was the setting.
BEFORE = {"train.clip": "above"}


def open_directory(out: Path, resume: bool) -> None:
    """Make the directory of a run, or refuse one that is not as `resume` asks."""
    try:
        found = {path.name for path in out.iterdir()} if out.is_dir() else None
        # An empty folder is a run that was stopped before its first step.
        if resume and (found is None or (found and not found & FILES)):
            raise UserError(f"train: out must be the folder of a run to resume, got {out}")
        if found and not resume:
            raise UserError(
                f"train: out must be a new folder, got {out}: resume it or choose another"
            )
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"train: cannot use {out} as out: {error.strerror}") from None


def compare(before: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    """Refuse to resume with settings that would give another result."""
    old, new = BEFORE | _flat(before), BEFORE | _flat(now)
    free = set(FREE)
    if old.get("train.decay") == 0 and new.get("train.decay") == 0:
        free |= {"train.steps", "train.tokens"}  # then the length of the run changes no step
    for key in sorted(old.keys() | new.keys()):
        if key not in free and old.get(key) != new.get(key):
            raise UserError(
                f"resume: {key} must be {old.get(key)!r} as in {where}, got {new.get(key)!r}"
            )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
