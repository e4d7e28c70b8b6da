# SPDX-License-Identifier: Apache-2.0
"""openai/sparse_autoencoder: a pickled state dict.

With "activation" it is an `Autoencoder`, whose TopK always standardises its input; without, a
`FastAutoencoder`, which does not and whose file lacks k.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ksae.errors import UserError

from .coder import Coder, check, require, transposed
from .files import Source, pick, write_pickle

KEYS = {"pre_bias", "latent_bias", "encoder.weight", "decoder.weight"}
STATS = {"stats_last_nonzero", "latents_activation_frequency", "latents_mean_square"}
FOLDER = False
STANDARDIZE = "standardize per token, eps 1e-5"


def matches(source: Source) -> bool:
    return bool({"pre_bias", "latent_bias"} & set(source.state))


def read(source: Source) -> Coder:
    owner = str(source.path)
    state = pick(source.state, KEYS, STATS | {"activation", "activation_state_dict"}, owner)
    activation = state.get("activation", "TopK")
    if activation not in ("TopK", "ReLU"):
        raise UserError(f"load: activation of {owner} must be TopK or ReLU, got {activation!r}")
    settings = state.get("activation_state_dict", {})
    if settings.get("postact_fn", "ReLU") != "ReLU":
        raise UserError(f"load: postact_fn of {owner} must be ReLU, got {settings['postact_fn']!r}")
    k = settings.get("k")
    coder = Coder(
        W_enc=state["encoder.weight"],
        b_enc=state["latent_bias"],
        W_dec=transposed(state["decoder.weight"], owner),
        b_dec=state["pre_bias"],
        activation={"TopK": "topk", "ReLU": "relu"}[activation],
        k=None if k is None else int(k),
        centred=True,
        normalization=STANDARDIZE if state.get("activation") == "TopK" else "none",
        extra={"openai": {name: state[name] for name in sorted(STATS & set(state))}},
    )
    return check(coder, owner)


def write(coder: Coder, path: Path, fold: bool) -> Path:
    coder = require(
        coder,
        "OpenAI's format",
        activations=("topk", "relu"),
        centred=True,
        normalization=("none", STANDARDIZE),
        fold=fold,
    )
    F = coder.d_sae
    kept = coder.extra.get("openai", {})
    state: dict[str, Any] = {
        "pre_bias": coder.b_dec,
        "latent_bias": coder.b_enc,
        "encoder.weight": coder.W_enc,
        "decoder.weight": coder.W_dec.T,  # column-major, as OpenAI keeps it
        "stats_last_nonzero": kept.get("stats_last_nonzero", torch.zeros(F, dtype=torch.int64)),
    }
    if coder.normalization == STANDARDIZE or coder.activation == "relu":
        state |= {
            "latents_activation_frequency": torch.ones(F),
            "latents_mean_square": torch.ones(F),
            **kept,
            "activation": "ReLU" if coder.activation == "relu" else "TopK",
        }
        if coder.activation == "topk":
            state["activation_state_dict"] = {"k": coder.k, "postact_fn": "ReLU"}
    else:
        coder.extra.setdefault("fields", {})["k"] = coder.k
    write_pickle(path, state)
    return path
