# SPDX-License-Identifier: Apache-2.0
"""SAELens: `sae_weights.safetensors` and `cfg.json` in a folder; W_enc is [d, F].

SAELens has no TopK transcoder. One whose output is as wide as its input is its TopK SAE that does
not subtract b_dec; with a skip connection or another width it is of ksae's own architecture, which
importing `ksae.interop.saelens` registers.

What its trainer saves is read as well: weights and configuration of a training class, of which
BatchTopK and Matryoshka are no architectures for use. Of its matching pursuit a file has the tied
rows alone.
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
    "matching_pursuit": "pursuit",
    "batchtopk": "batchtopk",
    "matryoshka_batchtopk": "matryoshka",
    **TRANSCODERS,
}
SELECTS = ("topk", "batchtopk", "matryoshka")  # with a k, by norms or not


# What releases before 6 called some fields.
RENAMED = {"hook_point": "hook_name", "activation_fn_str": "activation_fn"}
NORMALIZATIONS = (
    "none", "expected_average_only_in", "constant_norm_rescale", "layer_norm",
    "covariance_whitening",
)  # fmt: skip


def matches(source: Source) -> bool:
    config = source.config("d_in", "d_sae")
    if config is None or "W_dec" not in source.state:
        return False
    return "W_enc" in source.state or config.get("architecture") == "matching_pursuit"


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
    if activation == "pursuit":
        needed = {"W_dec", "b_dec"}
    elif activation in ("batchtopk", "matryoshka"):
        needed |= {"topk_threshold"}
    elif activation == "jumprelu" and "threshold" not in source.state:  # of older trainers
        needed = (needed - {"threshold"}) | {"log_threshold"}
    needed |= {"W_skip"} if "skip" in str(architecture) else set()
    tensors = source.tensors(needed, {"scaling_factor"})
    ones = tensors.get("scaling_factor")  # beside the weights for a while, never with another value
    if ones is not None and not torch.allclose(ones, torch.ones_like(ones)):
        raise UserError(f"load: scaling_factor of {owner} must be 1 everywhere, got other values")
    if activation == "pursuit":
        tensors |= _tied(tensors, config, owner)
        centred = True  # b_dec is 0 where it is not subtracted
    threshold = tensors.get("threshold", tensors.get("topk_threshold"))
    if "log_threshold" in tensors:
        threshold = tensors["log_threshold"].exp()
    coder = Coder(
        W_enc=transposed(tensors["W_enc"], owner),
        b_enc=tensors["b_gate" if activation == "gated" else "b_enc"],
        W_dec=tensors["W_dec"],
        b_dec=tensors["b_dec"],
        W_skip=tensors.get("W_skip"),
        threshold=threshold,
        group_sizes=_group_sizes(config) if activation == "matryoshka" else None,
        **{name: tensors.get(name) for name in GATES},
        activation=activation,
        k=_k(config, activation, source.path),
        tolerance=float(config.get("residual_threshold", 1e-2)),
        stop_on_repeat=bool(config.get("stop_on_duplicate_support", True)),
        centred=centred,
        scaled=activation in SELECTS and bool(config.get("rescale_acts_by_decoder_norm", False)),
        normalization=normalization,
        extra={"saelens": dict(original)},
    )
    if (coder.d_in, coder.d_sae) != (config["d_in"], config["d_sae"]):
        raise UserError(
            f"load: W_enc of {owner} must have the shape {[config['d_in'], config['d_sae']]} that "
            f"its config gives, got {list(tensors['W_enc'].shape)}"
        )
    return check(coder, owner)


def _tied(tensors: dict[str, Any], config: dict[str, Any], owner: str) -> dict[str, Any]:
    """The encoder that matching pursuit has not; with it b_dec is out of use without centring."""
    if not config.get("apply_b_dec_to_input", True) and tensors["b_dec"].any():
        raise UserError(
            f"load: b_dec of {owner} must be 0 for matching_pursuit with apply_b_dec_to_input ="
            " false, which does not use it, got other values"
        )
    return {"W_enc": tensors["W_dec"].clone().T, "b_enc": torch.zeros_like(tensors["W_dec"][:, 0])}


def _k(config: dict[str, Any], activation: str, path: Path) -> int | None:
    """Latents a token, or steps."""
    if activation == "pursuit":
        steps = config.get("max_iterations")
        return integer(config, "d_in" if steps is None else "max_iterations", path)
    return integer(config, "k", path) if activation in SELECTS else None


def _group_sizes(config: dict[str, Any]) -> torch.Tensor:
    widths = [int(width) for width in config.get("matryoshka_widths") or []]
    widths += [config["d_sae"]] if widths[-1:] != [config["d_sae"]] else []
    return torch.tensor(widths).diff(prepend=torch.tensor([0]))


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
        activations=(
            "topk",
            "jumprelu",
            "relu",
            "gated",
            "batchtopk",
            "matryoshka",
            "pursuit",
        ),
        skip=True,
        square=False,
        scaled=coder.activation == "topk",
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
        named = {"relu": "standard", "pursuit": "matching_pursuit"}
        architecture = named.get(activation, activation)
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
    if activation == "pursuit":
        config |= {"max_iterations": coder.k, "residual_threshold": coder.tolerance}
        config["stop_on_duplicate_support"] = coder.stop_on_repeat
    if architecture in TRANSCODERS:
        config["d_out"] = coder.d_out
    tensors = {
        "W_enc": coder.W_enc.T,
        "b_gate" if activation == "gated" else "b_enc": coder.b_enc,
        "W_dec": coder.W_dec,
        "b_dec": coder.b_dec,
    }
    if activation == "pursuit":
        tensors = {name: tensors[name] for name in ("W_dec", "b_dec")}
    if threshold is not None:
        tensors["threshold"] = threshold
    for name in GATES if activation == "gated" else ():
        tensors[name] = getattr(coder, name)
    if coder.W_skip is not None:
        tensors["W_skip"] = coder.W_skip
    write_tensors(path / "sae_weights.safetensors", tensors)
    write_json(path / "cfg.json", config)
    return path / "sae_weights.safetensors"
