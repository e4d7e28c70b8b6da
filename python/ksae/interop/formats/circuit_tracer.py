# SPDX-License-Identifier: Apache-2.0
"""circuit-tracer: one `layer_{i}.safetensors` a layer and a `config.yaml`; W_enc is [F, d].

Its TopK has no ReLU: a token with fewer than k positive pre-activations has negative latents there
and zeros here. Its bias is never subtracted from the input. Its own TopK files hold `k`, which its
own loader refuses: it is read here, never written.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ksae.errors import UserError
from ksae.files.container import write_tensors

from .coder import Coder, check, require
from .files import Source, integer, write_yaml

KEYS = {"W_enc", "W_dec", "b_enc", "b_dec"}
THRESHOLD = "activation_function.threshold"
FOLDER = True


def matches(source: Source) -> bool:
    names = set(source.state)
    if "W_enc" not in names or "tokens_since_fired" in names or "group_sizes" in names:
        return False
    return source.config("model_kind") is not None or THRESHOLD in names or "k" in names


def read(source: Source) -> Coder:
    tensors = source.tensors(KEYS, {"W_skip", THRESHOLD, "k"})
    config = source.config("model_kind") or {}
    own = {"activation": "topk", "k": int(tensors["k"])} if "k" in tensors else {}
    config = {**own, **config}
    activation = config.get("activation", "jumprelu" if THRESHOLD in tensors else "relu")
    if activation not in ("topk", "relu", "jumprelu"):
        raise UserError(
            f"load: activation of {source.path} must be topk, relu or jumprelu, got {activation!r}"
        )
    coder = Coder(
        W_enc=tensors["W_enc"],
        b_enc=tensors["b_enc"],
        W_dec=tensors["W_dec"],
        b_dec=tensors["b_dec"],
        W_skip=tensors.get("W_skip"),
        threshold=tensors.get(THRESHOLD),
        activation=activation,
        k=integer(config, "k", source.path) if activation == "topk" else None,
        centred=False,
        extra={"circuit-tracer": {"config": config, "file": source.path.name}},
    )
    return check(coder, str(source.path))


def write(coder: Coder, path: Path, fold: bool) -> Path:
    coder = require(
        coder,
        "circuit-tracer",
        activations=("topk", "relu", "jumprelu"),
        centred=False,
        skip=True,
        fold=fold,
    )
    kept = coder.extra.get("circuit-tracer", {})
    config: dict[str, Any] = {
        "model_kind": "transcoder_set",
        "feature_input_hook": "hook_resid_mid",
        "feature_output_hook": "hook_mlp_out",
        **kept.get("config", {}),
    }
    if coder.activation != "jumprelu":
        config["activation"] = coder.activation
    if coder.k is not None:
        config["k"] = coder.k
    tensors = {name: getattr(coder, name) for name in sorted(KEYS)}
    if coder.W_skip is not None:
        tensors["W_skip"] = coder.W_skip
    if coder.threshold is not None:
        tensors[THRESHOLD] = coder.threshold
    file: Path = path / Path(kept.get("file", "layer_0.safetensors")).name
    write_tensors(file, tensors)
    write_yaml(path / "config.yaml", config)
    return file
