# SPDX-License-Identifier: Apache-2.0
"""What a resumed run must share with the run it goes on with, and what it may change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from ksae.errors import UserError
from ksae.step.train_step import decoder_rate

# Settings that a resumed run may change: where and how fast it runs, not what it computes.
FREE = frozenset(
    [
        "train.device",
        "train.threads",
        "train.timeout",
        "train.replicas",
        "train.graph",
        "train.prefetch",
        "train.checkpoint_every",
        "train.keep_last",
        "train.eval_tokens",
        "train.encoder_scale",  # of a run's start
        "data.cache",
    ]
)
# Settings that it may change if it is told to: the state of the run still fits.
CHANGEABLE = frozenset(
    [
        "train.lr",
        "train.steps",
        "train.tokens",
        "train.warmup",
        "train.decay",
        "train.decay_shape",
        "train.beta1",
        "train.beta2",
        "train.eps",
        "train.clip_norm",
        "train.clip",
        "train.decoder_lr",
        "train.k_start",
        "train.k_steps",
        "train.penalty_warmup",
        "model.dead_after",
        "model.auxk_alpha",
        "model.k_aux",
        # where the data lie: they may have been moved
        "data.activations",
        "data.targets",
        "data.text",
        "data.model",
    ]
)


# what runs did before there was the setting
BEFORE = {
    "train.clip": "above",
    "train.decoder_lr": 1.0,
    "train.penalty_warmup": 0,
}
RATE = "train.decoder_lr"
VALUES = "source.values"  # the fingerprint of the activations


def compare(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    where: str,
    *,
    allow_change: bool = False,
    partly: bool = False,
) -> dict[str, tuple[Any, Any]]:
    """Refuse to resume with settings that would give another result.

    Args:
        before, now: trees of settings.
        where: `before` is from, for the message.
        allow_change: the settings of CHANGEABLE may differ.
        partly: `now` does not have all keys yet; those that it lacks are passed over.

    Returns:
        What differs of CHANGEABLE: key -> (before, now).
    """
    old, new = BEFORE | _flat(before), ({} if partly else BEFORE) | _flat(now)
    if "model.class" in old:  # what is left to the model is what it takes
        centred = "Transcoder" not in str(old["model.class"])
        rate = decoder_rate(centred, bool(old.get("model.normalize_decoder")))
        for flat in (old, new):
            if flat.get(RATE, rate) is None:
                flat[RATE] = rate
    free = set(FREE)
    if old.get("train.decay") == 0 and new.get("train.decay") == 0:
        free |= {"train.steps", "train.tokens"}  # then the length of the run changes no step
    changed = {}
    for key in sorted(new.keys() if partly else old.keys() | new.keys()):
        if key in free or old.get(key) == new.get(key):
            continue
        if key == VALUES:
            # None: of an earlier version, or of a source that cannot tell
            if None in (old.get(key), new.get(key)):
                continue
            raise UserError(
                f"resume: the activations must be those of {where}, got as many others: the file "
                "was replaced, or the text or the language model has changed"
            )
        if allow_change and key in CHANGEABLE:
            changed[key] = old.get(key), new.get(key)
            continue
        way = "; allow_change (--allow-change) changes it from here on"
        raise UserError(
            f"resume: {key} must be {old.get(key)!r} as in {where}, got {new.get(key)!r}"
            f"{way if key in CHANGEABLE else ''}"
        )
    return changed


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value  # as in JSON
    return flat
