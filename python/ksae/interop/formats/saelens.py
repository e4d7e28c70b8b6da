# SPDX-License-Identifier: Apache-2.0
"""SAELens: `sae_weights.safetensors` and `cfg.json` in a folder; W_enc is [d, F].

SAELens has no TopK transcoder. One whose output is as wide as its input is its TopK SAE that does
not subtract b_dec; with a skip connection or another width it is of ksae's own architecture, which
importing `ksae.interop.saelens` registers.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ksae.errors import UserError
from ksae.files.container import write_tensors

from .coder import Coder, check, require, transposed
from .files import Source, integer, write_json

KEYS = {"W_enc", "b_enc", "W_dec", "b_dec"}
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
    **TRANSCODERS,
}


def matches(source: Source) -> bool:
    return "W_enc" in source.state and source.config("architecture", "d_sae") is not None


def read(source: Source) -> Coder:
    config = source.config("architecture", "d_sae") or {}
    architecture = config["architecture"]
    if architecture not in ACTIVATIONS:
        raise UserError(
            f"load: architecture of {source.path} must be one of {', '.join(ACTIVATIONS)}, "
            f"got {architecture!r}"
        )
    activation = ACTIVATIONS[architecture]
    needed = KEYS | ({"threshold"} if activation == "jumprelu" else set())
    needed |= {"W_skip"} if "skip" in architecture else set()
    tensors = source.tensors(needed)
    if config.get("reshape_activations", "none") != "none":
        raise UserError(
            f"load: reshape_activations of {source.path} must be none, "
            f"got {config['reshape_activations']!r}"
        )
    transcoder = architecture in TRANSCODERS
    coder = Coder(
        W_enc=transposed(tensors["W_enc"], str(source.path)),
        b_enc=tensors["b_enc"],
        W_dec=tensors["W_dec"],
        b_dec=tensors["b_dec"],
        W_skip=tensors.get("W_skip"),
        threshold=tensors.get("threshold"),
        activation=activation,
        k=integer(config, "k", source.path) if activation == "topk" else None,
        centred=bool(config.get("apply_b_dec_to_input", not transcoder)),
        scaled=bool(config.get("rescale_acts_by_decoder_norm", False)),
        normalization=config.get("normalize_activations", "none"),
        extra={"saelens": dict(config)},
    )
    if (coder.d_in, coder.d_sae) != (config.get("d_in"), config["d_sae"]):
        raise UserError(
            f"load: W_enc of {source.path} must have the shape "
            f"{[config.get('d_in'), config['d_sae']]} that its config gives, "
            f"got {list(tensors['W_enc'].shape)}"
        )
    return check(coder, str(source.path))


def write(coder: Coder, path: Path, fold: bool) -> Path:
    kept = coder.extra.get("saelens", {})
    coder = require(
        coder,
        "SAELens",
        activations=("topk", "jumprelu", "relu", "batchtopk"),
        skip=True,
        square=False,
        scaled=True,
        normalization=(
            "none", "expected_average_only_in", "constant_norm_rescale", "layer_norm",
        ),
        fold=fold,
    )  # fmt: skip
    threshold = coder.threshold
    activation = "jumprelu" if coder.activation == "batchtopk" else coder.activation
    if coder.activation == "batchtopk":
        if threshold is None or not float(threshold) >= 0:
            raise UserError("convert: SAELens cannot hold batchtopk with threshold = -1 (not set)")
        threshold = threshold.to(coder.dtype).expand(coder.d_sae)
    skip = "skip_" if coder.W_skip is not None else ""
    if not coder.centred and (
        coder.W_skip is not None
        or coder.d_in != coder.d_out
        or kept.get("architecture") in TRANSCODERS
    ):
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
        "b_enc": coder.b_enc,
        "W_dec": coder.W_dec,
        "b_dec": coder.b_dec,
    }
    if threshold is not None:
        tensors["threshold"] = threshold
    if coder.W_skip is not None:
        tensors["W_skip"] = coder.W_skip
    write_tensors(path / "sae_weights.safetensors", tensors)
    write_json(path / "cfg.json", config)
    return path / "sae_weights.safetensors"
