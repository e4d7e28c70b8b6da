# SPDX-License-Identifier: Apache-2.0
"""dictionary_learning: `ae.pt` and `config.json` in a folder; the decoder is [d, F], of Matryoshka
and JumpReLU [F, d]. JumpReLU subtracts no b_dec. That a file is JumpReLU's only its config tells.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ksae.errors import UserError

from .coder import Coder, check, require, transposed
from .files import Source, write_json, write_pickle

KEYS = {"encoder.weight", "encoder.bias", "decoder.weight", "b_dec", "k"}
MATRYOSHKA = {"W_enc", "b_enc", "W_dec", "b_dec", "group_sizes", "k"}
JUMPRELU = {"W_enc", "b_enc", "W_dec", "b_dec", "threshold"}
STANDARD = {"encoder.weight", "encoder.bias", "decoder.weight", "bias"}  # PAnneal's too
GATED = {"encoder.weight", "decoder.weight", "decoder_bias", "r_mag", "gate_bias", "mag_bias"}
FOLDER = True
CLASSES = {
    "AutoEncoderTopK": "topk",
    "BatchTopKSAE": "batchtopk",
    "MatryoshkaBatchTopKSAE": "matryoshka",
    "JumpReluAutoEncoder": "jumprelu",
    "AutoEncoder": "relu",
    "GatedAutoEncoder": "gated",
}
BIASES = {"relu": ("encoder.bias", "bias"), "gated": ("gate_bias", "decoder_bias")}
OTHERS = {"relu": STANDARD, "gated": GATED}
BY_LATENT = {"matryoshka": MATRYOSHKA, "jumprelu": JUMPRELU}


def matches(source: Source) -> bool:
    names = set(source.state)
    if {"encoder.weight", "decoder.weight", "b_dec"} <= names or "group_sizes" in names:
        return True
    if names in (STANDARD, GATED):
        return True
    return "W_enc" in names and _dict_class(source) == "JumpReluAutoEncoder"


def _dict_class(source: Source) -> Any:
    trainer = (source.config("trainer") or {}).get("trainer", {})
    return trainer.get("dict_class") if isinstance(trainer, dict) else None


def _activation(source: Source) -> str:
    name = _dict_class(source)
    if "group_sizes" in source.state:
        return "matryoshka"
    for activation, keys in OTHERS.items():
        if set(source.state) == keys:
            return activation
    if name is not None and name not in CLASSES:
        raise UserError(
            f"load: dict_class of {source.path} must be one of {', '.join(CLASSES)}, got {name!r}"
        )
    return CLASSES[name or "AutoEncoderTopK"]


def read(source: Source) -> Coder:
    activation, owner = _activation(source), str(source.path)
    tensors = source.tensors((BY_LATENT | OTHERS).get(activation, KEYS), {"threshold"})
    b_enc, b_dec = BIASES.get(activation, ("encoder.bias", "b_dec"))
    parts: dict[str, Any] = (
        {
            "W_enc": transposed(tensors["W_enc"], owner),
            "b_enc": tensors["b_enc"],
            "W_dec": tensors["W_dec"],
        }
        if activation in BY_LATENT
        else {
            "W_enc": tensors["encoder.weight"],
            "b_enc": tensors[b_enc],
            "W_dec": transposed(tensors["decoder.weight"], owner),
        }
    )
    k = tensors.get("k")
    if k is not None and k.numel() != 1:
        raise UserError(f"load: k of {source.path} must be one number, got {k.shape}")
    threshold = tensors.get("threshold")
    extra: dict[str, Any] = {"config": source.config("trainer") or {}}
    if activation == "topk" and threshold is not None:
        extra["threshold"] = threshold  # beside the k largest, TopK does not need it
        threshold = None
    coder = Coder(
        **parts,
        b_dec=tensors[b_dec],
        r_mag=tensors.get("r_mag"),
        b_mag=tensors.get("mag_bias"),
        activation=activation,
        k=None if k is None else int(k),
        centred=activation != "jumprelu",
        threshold=threshold,
        group_sizes=tensors.get("group_sizes"),
        extra={"dictionary_learning": extra},
    )
    return check(coder, owner)


def write(coder: Coder, path: Path, fold: bool) -> Path:
    coder = require(
        coder,
        "dictionary_learning",
        activations=("topk", "batchtopk", "matryoshka", "jumprelu", "relu", "gated"),
        centred=coder.activation != "jumprelu",
        fold=fold,
    )
    kept = coder.extra.get("dictionary_learning", {})
    name = next(key for key, value in CLASSES.items() if value == coder.activation)
    config = dict(kept.get("config", {}))
    config["trainer"] = {
        **config.get("trainer", {}),
        "dict_class": name,
        "activation_dim": coder.d_in,
        "dict_size": coder.d_sae,
    }
    if coder.k is not None:
        config["trainer"]["k"] = coder.k
    config.setdefault("buffer", {})
    state = _state(coder, kept.get("threshold"))
    write_pickle(path / "ae.pt", {key: t.contiguous() for key, t in state.items()})
    write_json(path / "config.json", config)
    return path / "ae.pt"


def _state(coder: Coder, beside: Tensor | None) -> dict[str, Tensor]:
    """Tensors by their names there; beside: the threshold that a TopK carries along."""
    if coder.activation in BIASES:
        names = dict(zip(BIASES[coder.activation], (coder.b_enc, coder.b_dec), strict=True))
        names |= {"encoder.weight": coder.W_enc, "decoder.weight": coder.W_dec.T}
        if coder.r_mag is not None and coder.b_mag is not None:
            names |= {"r_mag": coder.r_mag, "mag_bias": coder.b_mag}
        return names
    threshold = beside if coder.activation == "topk" else coder.threshold
    if threshold is None and coder.activation != "topk":  # it takes all positive latents then
        coder.jumps("dictionary_learning")
    state = {"b_dec": coder.b_dec}
    state["threshold"] = torch.tensor(-1.0) if threshold is None else threshold
    if coder.k is not None and coder.activation != "jumprelu":
        state["k"] = torch.tensor(coder.k, dtype=torch.int32)
    if coder.activation in BY_LATENT:
        state |= {"W_enc": coder.W_enc.T, "b_enc": coder.b_enc, "W_dec": coder.W_dec}
    else:
        state |= {
            "decoder.weight": coder.W_dec.T,
            "encoder.weight": coder.W_enc,
            "encoder.bias": coder.b_enc,
        }
    if coder.group_sizes is not None:
        state["group_sizes"] = coder.group_sizes
    elif coder.activation == "jumprelu":
        state["threshold"] = coder.jumps("dictionary_learning")
    return state
