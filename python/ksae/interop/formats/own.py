# SPDX-License-Identifier: Apache-2.0
"""ksae's own file (see `ksae.checkpoint`), and the coder as a module of ksae."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from ksae.coders import coder as modules
from ksae.coders import registry
from ksae.coders.activation import GradTopK, TopK
from ksae.coders.file import load_own, save
from ksae.errors import UserError
from ksae.files.container import read_header

from .coder import Coder, check, require
from .files import Source

FOLDER = False
GRADIENT = ("beta", "mode", "grad_norm")  # of coders that select by a gradient alone
TRAINING = (
    "loss", "auxk_alpha", "k_aux", "dead_after", "normalize_decoder", "multi_topk", "auxk",
    "multi_k", "multi_weights", "prefixes", "prefix_weights",
)  # fmt: skip


def matches(source: Source) -> bool:
    return "ksae" in source.metadata


def read(source: Source) -> Coder:
    header = read_header(source.path)
    model = load_own(source.path)
    weights: dict[str, Any] = {
        name: parameter.detach() for name, parameter in model.named_parameters()
    }
    names = [name for name in (*TRAINING, *GRADIENT) if name in header["config"]]
    config = {name: header["config"][name] for name in names}
    coder = Coder(
        **weights,
        activation="topk",
        k=model.k,
        centred=model.centred,
        extra={
            **header["extra"].pop("interop", {}),
            "ksae": {
                "config": config,
                "extra": header["extra"],
                "buffers": dict(model.named_buffers()),
            },
        },
    )
    return check(coder, str(source.path))


def build(coder: Coder, fold: bool) -> modules.SparseCoder:
    """The coder as a `ksae.TopKSAE` or `ksae.Transcoder`, or with GradTopK what it was."""
    coder = require(coder, "ksae", skip=True, square=False, fold=fold)
    if coder.centred and coder.W_skip is not None:
        raise UserError("convert: ksae cannot hold W_skip with b_dec subtracted from the input")
    kinds = {t.dtype for t in (coder.W_enc, coder.b_enc, coder.W_dec, coder.b_dec)}
    if len(kinds) > 1:
        raise UserError(f"convert: ksae needs one dtype, got {', '.join(sorted(map(str, kinds)))}")
    kept = coder.extra.get("ksae", {})
    settings: dict[str, Any] = dict(kept.get("config", {}))
    settings |= {"dtype": coder.dtype, "device": "meta"}
    assert coder.k is not None
    by_gradient = set(GRADIENT) <= settings.keys()
    model: modules.SparseCoder
    try:
        kind: Any = registry.of(
            "sae" if coder.centred else "transcoder", GradTopK if by_gradient else TopK
        )
        if not coder.centred:
            settings |= {"d_out": coder.d_out, "skip": coder.W_skip is not None}
        model = kind(d_in=coder.d_in, d_sae=coder.d_sae, k=coder.k, **settings)
    except TypeError as error:
        raise UserError(f"load: {error}") from None
    names = ["W_enc", "b_enc", "W_dec", "b_dec"] + (["W_skip"] if coder.W_skip is not None else [])
    state = {name: getattr(coder, name).contiguous() for name in names}
    for name, buffer in model.named_buffers():
        counted = kept.get("buffers", {}).get(name)
        state[name] = torch.zeros_like(buffer, device="cpu") if counted is None else counted
    model.load_state_dict(state, assign=True)
    return model


def write(coder: Coder, path: Path, fold: bool) -> Path:
    model = build(coder, fold)
    save(model, path, coder.extra.get("ksae", {}).get("extra"))
    return path
