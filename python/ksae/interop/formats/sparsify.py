# SPDX-License-Identifier: Apache-2.0
"""sparsify: `sae.safetensors` and `cfg.json` in a folder. W_enc and W_dec are [F, d] as here."""

from __future__ import annotations

from pathlib import Path

from ksae.errors import UserError
from ksae.files.container import write_tensors

from .coder import Coder, check, require
from .files import Source, integer, write_json

KEYS = {"encoder.weight", "encoder.bias", "W_dec", "b_dec"}
FOLDER = True
DEFAULTS = {
    "activation": "topk", "expansion_factor": 32, "normalize_decoder": True, "num_latents": 0,
    "k": 32, "multi_topk": False, "skip_connection": False, "transcode": False,
}  # fmt: skip


def matches(source: Source) -> bool:
    return "encoder.weight" in source.state and "W_dec" in source.state


def read(source: Source) -> Coder:
    config = source.config("d_in")
    if config is None:
        raise UserError(f"load: {source.path} needs its cfg.json with d_in beside it")
    tensors = source.tensors(KEYS, {"W_skip"})
    fields = {**DEFAULTS, **config}
    F = integer(fields, "num_latents", source.path) or (
        integer(fields, "d_in", source.path) * integer(fields, "expansion_factor", source.path)
    )
    shape = list(tensors["encoder.weight"].shape)
    if shape != [F, fields["d_in"]]:
        raise UserError(
            f"load: encoder.weight of {source.path} must have the shape {[F, fields['d_in']]} that "
            f"its config gives, got {shape}"
        )
    if fields["activation"] not in ("topk", "groupmax"):
        raise UserError(
            f"load: activation of {source.path} must be topk or groupmax, "
            f"got {fields['activation']!r}"
        )
    if fields.get("signed"):  # of early releases: without the ReLU
        raise UserError(f"load: signed of {source.path} must be False, got {fields['signed']!r}")
    if bool(fields["skip_connection"]) != ("W_skip" in tensors):
        raise UserError(
            f"load: {source.path} has skip_connection = {fields['skip_connection']} and "
            f"{'a' if 'W_skip' in tensors else 'no'} W_skip"
        )
    coder = Coder(
        W_enc=tensors["encoder.weight"],
        b_enc=tensors["encoder.bias"],
        W_dec=tensors["W_dec"],
        b_dec=tensors["b_dec"],
        W_skip=tensors.get("W_skip"),
        activation=fields["activation"],
        k=integer(fields, "k", source.path),
        centred=not fields["transcode"],
        extra={"sparsify": dict(config)},
    )
    return check(coder, str(source.path))


def write(coder: Coder, path: Path, fold: bool) -> Path:
    coder = require(coder, "sparsify", activations=("topk", "groupmax"), skip=True, fold=fold)
    ours = coder.extra.get("ksae", {}).get("config", {})
    config = {
        **DEFAULTS,
        **{key: ours[key] for key in ("normalize_decoder", "multi_topk") if key in ours},
        **coder.extra.get("sparsify", {"num_latents": coder.d_sae}),
        "activation": coder.activation,
        "k": coder.k,
        "skip_connection": coder.W_skip is not None,
        "transcode": not coder.centred,
        "d_in": coder.d_in,
    }
    tensors = {
        "encoder.weight": coder.W_enc,
        "encoder.bias": coder.b_enc,
        "W_dec": coder.W_dec,
        "b_dec": coder.b_dec,
    }
    if coder.W_skip is not None:
        tensors["W_skip"] = coder.W_skip
    write_tensors(path / "sae.safetensors", tensors)
    write_json(path / "cfg.json", config)
    return path / "sae.safetensors"
