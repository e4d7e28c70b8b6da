# SPDX-License-Identifier: Apache-2.0
"""NVIDIA BioNeMo: a pickled checkpoint with `model_state_dict` and `model_config`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ksae.errors import UserError

from .coder import Coder, check, require, transposed
from .files import Source, pick, write_pickle

KEYS = {"pre_bias", "latent_bias", "encoder.weight", "decoder.weight"}
# What a TopK does not read: counters, and buffers of options that later releases have.
BESIDE = {"stats_last_nonzero", "batchtopk_threshold", "protein_dir", "protein_thresh"}
FOLDER = False
STANDARDIZE = "standardize per token, eps 1e-8"
OPTIONS = {
    "auxk": None, "auxk_coef": 1 / 32, "dead_tokens_threshold": 10_000_000,
}  # fmt: skip


def matches(source: Source) -> bool:
    return isinstance(source.state.get("model_state_dict"), dict)


def read(source: Source) -> Coder:
    owner = str(source.path)
    whole = source.state
    state = {n.removeprefix("module."): t for n, t in whole["model_state_dict"].items()}
    state = pick(state, KEYS, BESIDE, owner)
    config = whole.get("model_config")
    if not isinstance(config, dict) or "top_k" not in config:
        raise UserError(f"load: {owner} must hold a model_config with top_k")
    if config.get("batch_topk"):
        raise UserError(f"load: batch_topk of {owner} must be False, got {config['batch_topk']!r}")
    rest = {name: value for name, value in whole.items() if name != "model_state_dict"}
    rest |= {name: state[name] for name in BESIDE & state.keys()}
    rest.pop("optimizer_state_dict", None)  # of another optimizer's parameters: no use to ksae's
    coder = Coder(
        W_enc=state["encoder.weight"],
        b_enc=state["latent_bias"],
        W_dec=transposed(state["decoder.weight"], owner),
        b_dec=state["pre_bias"],
        activation="topk",
        k=int(config["top_k"]),
        centred=True,
        normalization=STANDARDIZE if config.get("normalize_input", True) else "none",
        extra={"nvidia": rest},
    )
    return check(coder, owner)


def write(coder: Coder, path: Path, fold: bool) -> Path:
    coder = require(
        coder, "NVIDIA's format", centred=True, normalization=("none", STANDARDIZE), fold=fold
    )
    kept = dict(coder.extra.get("nvidia", {}))
    never = {"stats_last_nonzero": torch.zeros(coder.d_sae, dtype=torch.int64)}
    buffers = never | {name: kept.pop(name) for name in BESIDE & kept.keys()}
    state = {
        "pre_bias": coder.b_dec,
        "latent_bias": coder.b_enc,
        **buffers,
        "encoder.weight": coder.W_enc,
        "decoder.weight": coder.W_dec.T.contiguous(),
    }
    sizes: dict[str, Any] = {"input_dim": coder.d_in, "hidden_dim": coder.d_sae}
    config = {
        **OPTIONS,
        **kept.get("model_config", {}),
        **sizes,
        "top_k": coder.k,
        "normalize_input": coder.normalization == STANDARDIZE,
    }
    whole = {"global_step": 0, "epoch": 0, "config": {}, **kept, **sizes}
    write_pickle(path, {**whole, "model_state_dict": state, "model_config": config})
    return path
