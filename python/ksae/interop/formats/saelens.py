# SPDX-License-Identifier: Apache-2.0
"""SAELens: `sae_weights.safetensors` and `cfg.json` in a folder; W_enc is [d, F].

SAELens has no TopK transcoder. One whose output is as wide as its input is its TopK SAE that does
not subtract b_dec; with a skip connection or another width it is of ksae's own architecture, which
importing `ksae.interop.saelens` registers.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch

from ksae.errors import UserError
from ksae.files.container import write_tensors

from .coder import Coder, check, require, transposed
from .files import Source, integer, write_json

KEYS = {"W_enc", "b_enc", "W_dec", "b_dec"}
GATES = ("r_mag", "b_mag")
FOLDER = True
TRANSCODERS = {
    "transcoder": "relu",
    "skip_transcoder": "relu",
    "jumprelu_transcoder": "jumprelu",
    "jumprelu_skip_transcoder": "jumprelu",
    "ksae_topk_transcoder": "topk",
    "ksae_topk_skip_transcoder": "topk",
}
# "ksae_topk" is what SAELens' runner saves of ksae's class; it is written back as plain "topk".
ACTIVATIONS = {
    "topk": "topk",
    "ksae_topk": "topk",
    "jumprelu": "jumprelu",
    "standard": "relu",
    "gated": "gated",
    **TRANSCODERS,
}


# What releases before 6 called some fields.
RENAMED = {"hook_point": "hook_name", "activation_fn_str": "activation_fn"}
NORMALIZATIONS = (
    "none", "expected_average_only_in", "constant_norm_rescale", "layer_norm",
    "covariance_whitening",
)  # fmt: skip


def matches(source: Source) -> bool:
    return "W_enc" in source.state and source.config("d_in", "d_sae") is not None


def read(source: Source) -> Coder:
    original = source.config("d_in", "d_sae") or {}
    config, owner = _current(original), str(source.path)
    architecture = config.get("architecture")
    activation = _activation(config, owner)
    transcoder = architecture in TRANSCODERS
    normalization = config.get("normalize_activations", "none")
    _one_of("normalize_activations", normalization, NORMALIZATIONS, owner)
    _one_of("reshape_activations", config.get("reshape_activations", "none"), ("none",), owner)
    centred = bool(config.get("apply_b_dec_to_input", not transcoder))
    if transcoder:
        _one_of("apply_b_dec_to_input", centred, (False,), owner)
    needed = KEYS | ({"threshold"} if activation == "jumprelu" else set())
    if activation == "gated":  # the gate's bias is b_enc here
        needed = (needed - {"b_enc"}) | {"b_gate", *GATES}
    needed |= {"W_skip"} if "skip" in str(architecture) else set()
    tensors = source.tensors(needed, {"scaling_factor"})
    ones = tensors.get("scaling_factor")  # beside the weights for a while, never with another value
    if ones is not None and not torch.allclose(ones, torch.ones_like(ones)):
        raise UserError(f"load: scaling_factor of {owner} must be 1 everywhere, got other values")
    coder = Coder(
        W_enc=transposed(tensors["W_enc"], owner),
        b_enc=tensors["b_gate" if activation == "gated" else "b_enc"],
        W_dec=tensors["W_dec"],
        b_dec=tensors["b_dec"],
        W_skip=tensors.get("W_skip"),
        threshold=tensors.get("threshold"),
        **{name: tensors.get(name) for name in GATES},
        activation=activation,
        k=integer(config, "k", source.path) if activation == "topk" else None,
        centred=centred,
        scaled=activation == "topk" and bool(config.get("rescale_acts_by_decoder_norm", False)),
        normalization=normalization,
        extra={"saelens": dict(original)},
    )
    if (coder.d_in, coder.d_sae) != (config["d_in"], config["d_sae"]):
        raise UserError(
            f"load: W_enc of {owner} must have the shape {[config['d_in'], config['d_sae']]} that "
            f"its config gives, got {list(tensors['W_enc'].shape)}"
        )
    return check(coder, owner)


def _current(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration in the fields of SAELens 6, which takes older ones to mean this."""
    metadata = config.get("metadata") or {}
    version = str(config.get("sae_lens_version") or metadata.get("sae_lens_version") or "0")
    if not re.match(r"[0-5]\b", version):
        return config
    new = {**config, **{RENAMED[name]: v for name, v in config.items() if name in RENAMED}}
    new.setdefault("architecture", "standard")
    k = (new.get("activation_fn_kwargs") or {}).get("k")
    if k is not None and "topk" in (new.get("activation_fn"), new["architecture"]):
        new |= {"architecture": "topk", "k": k}
    normalize = new.get("normalize_activations")
    if normalize is None or isinstance(normalize, bool):
        new["normalize_activations"] = "expected_average_only_in" if normalize else "none"
    if "hook_z" in str(new.get("hook_name")):
        new.setdefault("reshape_activations", "hook_z")
    return new


def _activation(config: dict[str, Any], owner: str) -> str:
    """The activation of an architecture; another one beside it is an error."""
    architecture = config.get("architecture")
    _one_of("architecture", architecture, tuple(ACTIVATIONS), owner)
    activation = ACTIVATIONS[str(architecture)]
    allowed = ("relu", "topk") if activation == "topk" else ("relu",)
    for name in ("activation_fn_str", "activation_fn"):
        _one_of(name, config.get(name, "relu"), allowed, owner)
    return activation


def _one_of(name: str, value: object, allowed: tuple[object, ...], owner: str) -> None:
    if value not in allowed:
        names = ", ".join(map(str, allowed))
        names = names if len(allowed) == 1 else f"one of {names}"
        raise UserError(f"load: {name} of {owner} must be {names}, got {value!r}")


def write(coder: Coder, path: Path, fold: bool) -> Path:
    kept = coder.extra.get("saelens", {})
    coder = require(
        coder,
        "SAELens",
        activations=("topk", "jumprelu", "relu", "gated", "batchtopk", "matryoshka"),
        skip=True,
        square=False,
        scaled=True,
        normalization=NORMALIZATIONS,
        fold=fold,
    )
    jumps = coder.activation in ("jumprelu", "batchtopk", "matryoshka")
    activation = "jumprelu" if jumps else coder.activation
    threshold = coder.jumps("SAELens") if jumps else None
    skip = "skip_" if coder.W_skip is not None else ""
    if not coder.centred and (
        coder.W_skip is not None
        or coder.d_in != coder.d_out
        or kept.get("architecture") in TRANSCODERS
    ):
        if activation == "gated":
            raise UserError("convert: SAELens cannot hold activation = gated of a transcoder")
        prefix = {"topk": "ksae_topk_", "jumprelu": "jumprelu_", "relu": ""}[activation]
        architecture = f"{prefix}{skip}transcoder"
    elif coder.W_skip is not None:
        raise UserError("convert: SAELens cannot hold W_skip with b_dec subtracted from the input")
    else:
        architecture = "standard" if activation == "relu" else activation
    config: dict[str, Any] = {
        "reshape_activations": "none",
        "metadata": {},
        "device": "cpu",
        **kept,
        "architecture": architecture,
        "d_in": coder.d_in,
        "d_sae": coder.d_sae,
        "dtype": str(coder.dtype).removeprefix("torch."),
        "apply_b_dec_to_input": coder.centred,
        "normalize_activations": coder.normalization,
    }
    if activation == "topk":
        config |= {"k": coder.k, "rescale_acts_by_decoder_norm": coder.scaled}
    if architecture in TRANSCODERS:
        config["d_out"] = coder.d_out
    tensors = {
        "W_enc": coder.W_enc.T,
        "b_gate" if activation == "gated" else "b_enc": coder.b_enc,
        "W_dec": coder.W_dec,
        "b_dec": coder.b_dec,
    }
    if threshold is not None:
        tensors["threshold"] = threshold
    for name in GATES if activation == "gated" else ():
        tensors[name] = getattr(coder, name)
    if coder.W_skip is not None:
        tensors["W_skip"] = coder.W_skip
    write_tensors(path / "sae_weights.safetensors", tensors)
    write_json(path / "cfg.json", config)
    return path / "sae_weights.safetensors"
