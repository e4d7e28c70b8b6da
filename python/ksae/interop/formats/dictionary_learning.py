# SPDX-License-Identifier: Apache-2.0
"""dictionary_learning: `ae.pt` and `config.json` in a folder; the decoder is [d, F]."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ksae.errors import UserError

from .coder import Coder, check, require, transposed
from .files import Source, write_json, write_pickle

KEYS = {"encoder.weight", "encoder.bias", "decoder.weight", "b_dec", "k"}
MATRYOSHKA = {"W_enc", "b_enc", "W_dec", "b_dec", "group_sizes", "k"}
FOLDER = True
CLASSES = {
    "AutoEncoderTopK": "topk",
    "BatchTopKSAE": "batchtopk",
    "MatryoshkaBatchTopKSAE": "matryoshka",
}


def matches(source: Source) -> bool:
    names = set(source.state)
    return {"encoder.weight", "decoder.weight", "b_dec"} <= names or "group_sizes" in names


def read(source: Source) -> Coder:
    matryoshka = "group_sizes" in source.state
    tensors = source.tensors(MATRYOSHKA if matryoshka else KEYS, {"threshold"})
    owner, config = str(source.path), source.config("trainer") or {}
    trainer = config.get("trainer", {})
    name = trainer.get("dict_class") if isinstance(trainer, dict) else None
    if matryoshka:
        activation = "matryoshka"
    elif name is None or name in CLASSES:
        activation = CLASSES.get(name or "AutoEncoderTopK", "topk")
    else:
        raise UserError(
            f"load: dict_class of {source.path} must be one of {', '.join(CLASSES)}, got {name!r}"
        )
    parts: dict[str, Any] = (
        {
            "W_enc": transposed(tensors["W_enc"], owner),
            "b_enc": tensors["b_enc"],
            "W_dec": tensors["W_dec"],
        }
        if matryoshka
        else {
            "W_enc": tensors["encoder.weight"],
            "b_enc": tensors["encoder.bias"],
            "W_dec": transposed(tensors["decoder.weight"], owner),
        }
    )
    if tensors["k"].numel() != 1:
        raise UserError(f"load: k of {source.path} must be one number, got {tensors['k'].shape}")
    threshold = tensors.get("threshold")
    extra: dict[str, Any] = {"config": config}
    if activation == "topk" and threshold is not None:
        extra["threshold"] = threshold  # beside the k largest, TopK does not need it
        threshold = None
    coder = Coder(
        **parts,
        b_dec=tensors["b_dec"],
        activation=activation,
        k=int(tensors["k"]),
        centred=True,
        threshold=threshold,
        group_sizes=tensors.get("group_sizes"),
        extra={"dictionary_learning": extra},
    )
    return check(coder, str(source.path))


def write(coder: Coder, path: Path, fold: bool) -> Path:
    coder = require(
        coder,
        "dictionary_learning",
        activations=("topk", "batchtopk", "matryoshka"),
        centred=True,
        fold=fold,
    )
    kept = coder.extra.get("dictionary_learning", {})
    unset = torch.tensor(-1.0)
    threshold = kept.get("threshold") if coder.activation == "topk" else coder.threshold
    state = {
        "k": torch.tensor(coder.k, dtype=torch.int32),
        "threshold": unset if threshold is None else threshold,
        "b_dec": coder.b_dec,
    }
    if coder.activation == "matryoshka":
        state |= {"W_enc": coder.W_enc.T.contiguous(), "b_enc": coder.b_enc, "W_dec": coder.W_dec}
        state["group_sizes"] = coder.group_sizes
    else:
        state |= {
            "decoder.weight": coder.W_dec.T.contiguous(),
            "encoder.weight": coder.W_enc,
            "encoder.bias": coder.b_enc,
        }
    name = next(key for key, value in CLASSES.items() if value == coder.activation)
    config = dict(kept.get("config", {}))
    config["trainer"] = {
        **config.get("trainer", {}),
        "dict_class": name,
        "activation_dim": coder.d_in,
        "dict_size": coder.d_sae,
        "k": coder.k,
    }
    config.setdefault("buffer", {})
    write_pickle(path / "ae.pt", {key: t.contiguous() for key, t in state.items()})
    write_json(path / "config.json", config)
    return path / "ae.pt"
