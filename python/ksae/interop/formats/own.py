# SPDX-License-Identifier: Apache-2.0
"""ksae's own file (see `ksae.checkpoint`), and the coder as a module of ksae."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ksae.coders import SAE, Transcoder, registry
from ksae.coders import coder as modules
from ksae.coders.activation import (
    Activation,
    BatchTopK,
    Gated,
    GradTopK,
    GroupMax,
    JumpReLU,
    MatchingPursuit,
    ReLU,
    TopK,
)
from ksae.coders.file import load_own, save
from ksae.errors import UserError
from ksae.files.container import read_header
from ksae.ops import accumulator

from .coder import Coder, check, require
from .files import Source

FOLDER = False
GRADIENT = ("beta", "mode", "grad_norm")  # of coders that select by a gradient alone
TRAINING = (
    "loss", "auxk_alpha", "k_aux", "dead_after", "normalize_decoder", "multi_topk", "auxk",
    "multi_k", "multi_weights", "prefixes", "prefix_weights",
)  # fmt: skip
ACTIVATIONS: dict[type[Activation], str] = {
    TopK: "topk", GradTopK: "topk", BatchTopK: "batchtopk", JumpReLU: "jumprelu", ReLU: "relu",
    Gated: "gated", GroupMax: "groupmax", MatchingPursuit: "pursuit",
}  # fmt: skip


def matches(source: Source) -> bool:
    return "ksae" in source.metadata


def read(source: Source) -> Coder:
    header = read_header(source.path)
    model = load_own(source.path)
    kind = type(model.activation)
    if kind not in ACTIVATIONS:
        wanted = ", ".join(known.__name__ for known in ACTIVATIONS)
        raise UserError(
            f"load: activation of {source.path} must be one of {wanted} to be converted, got "
            f"{kind.__name__}"
        )
    weights: dict[str, Any] = {
        name: parameter.detach() for name, parameter in model.named_parameters()
    }
    buffers = dict(model.named_buffers())
    if isinstance(model.activation, JumpReLU):
        learned = model.activation.learned
        buffers[learned] = weights.pop(learned)
        weights["threshold"] = model.activation.thresholds(model).detach()
    activation = ACTIVATIONS[kind]
    if isinstance(model.activation, MatchingPursuit):
        weights["tolerance"] = model.activation.tolerance
        weights["stop_on_repeat"] = model.activation.stop_on_repeat
    if isinstance(model.activation, BatchTopK):
        theta = buffers["threshold"]  # kernels take it in the accumulators' type
        weights["threshold"] = theta.to(accumulator(model.W_enc.dtype)) if theta >= 0 else None
        if model.prefixes and model.prefixes[0] > 0:
            activation = "matryoshka"
            weights["group_sizes"] = torch.tensor(model.prefixes).diff(prepend=torch.tensor([0]))
    names = [name for name in (*TRAINING, *GRADIENT, "activation") if name in header["config"]]
    coder = Coder(
        **weights,
        activation=activation,
        k=model.k or None,
        centred=model.centred,
        extra={
            **header["extra"].pop("interop", {}),
            "ksae": {
                "config": {name: header["config"][name] for name in names},
                "extra": header["extra"],
                "buffers": buffers,
            },
        },
    )
    return check(coder, str(source.path))


def exact(coder: Coder, threshold: Tensor | None) -> Coder:
    """`coder`, read from ksae's file, with the JumpReLU `threshold` that it had in another format,
    where the file holds the logarithm of it or the same numbers in another type."""
    if threshold is None or coder.activation != "jumprelu":
        return coder
    assert coder.threshold is not None
    log = coder.extra["ksae"]["buffers"].get("log_threshold")
    if log is None:
        same = torch.equal(threshold.to(coder.threshold.dtype).expand(coder.d_sae), coder.threshold)
    else:
        same = torch.equal(_log(threshold, coder), log)
    return replace(coder, threshold=threshold) if same else coder


def _log(threshold: Tensor, coder: Coder) -> Tensor:
    """Of accumulators' type: in 16 bits the logarithm is too coarse."""
    return threshold.to(accumulator(coder.dtype)).log().expand(coder.d_sae).contiguous()


def _jump_relu(
    coder: Coder, fields: dict[str, Any], before: dict[str, Any]
) -> tuple[Activation, dict[str, Tensor]]:
    """With the parameter of before, if it still gives these thresholds."""
    assert coder.threshold is not None
    made = JumpReLU(**fields)
    held = before.get(made.learned)
    if held is None or not torch.equal(made.theta_of({made.learned: held}), coder.threshold):
        held = coder.threshold.to(accumulator(coder.dtype)).expand(coder.d_sae).contiguous()
        held = held.log() if made.parametrization == "log" else held
    return made, {made.learned: held}


def _activation(coder: Coder, kept: dict[str, Any]) -> tuple[Activation, dict[str, Tensor]]:
    """The activation, and what the module holds for it: as it was before a detour, if it was one
    of ksae's."""
    fields = dict(kept.get("config", {}).get("activation", {}))
    name, before = fields.pop("name", None), kept.get("buffers", {})
    if coder.activation == "jumprelu":
        return _jump_relu(coder, fields if name == "JumpReLU" else {}, before)
    if coder.activation == "topk":
        return TopK(coder.k or 0), {}
    if coder.activation == "groupmax":
        return GroupMax(coder.k or 0), {}
    if coder.activation == "pursuit":
        return MatchingPursuit(coder.k or 0, coder.tolerance, coder.stop_on_repeat), {}
    if coder.activation == "relu":
        return ReLU(**(fields if name == "ReLU" else {})), {}
    if coder.activation == "gated":
        assert coder.r_mag is not None and coder.b_mag is not None
        held = {"r_mag": coder.r_mag.contiguous(), "b_mag": coder.b_mag.contiguous()}
        return Gated(**(fields if name == "Gated" else {})), held
    if coder.threshold is not None and not coder.threshold >= 0:
        raise UserError(
            f"convert: ksae cannot hold {coder.activation} with threshold = "
            f"{float(coder.threshold)} (not set): its coders take the k largest of the batch then, "
            "others all that are positive"
        )
    of_library = [n for n in ("dictionary_learning", "saelens") if n in coder.extra]
    estimator = of_library[0] if of_library else "running"
    made = BatchTopK(coder.k or 0, fields["threshold"] if name == "BatchTopK" else estimator)
    theta, old = coder.threshold, before.get("threshold")
    same = old is not None and (theta is None or bool(old.to(theta.dtype) == theta))
    if name == "BatchTopK" and same:
        return made, {n: before[n] for n in ("threshold", "threshold_batches")}
    held = made.buffers(torch.float32, torch.device("cpu"))
    if theta is not None:  # from here an average goes on, whatever the estimator
        held = {"threshold": theta.double(), "threshold_batches": torch.tensor(1002)}
    return made, held


def build(coder: Coder, fold: bool) -> modules.SparseCoder:
    """The coder as a `ksae.SAE` or `ksae.Transcoder`, of the class that it was."""
    kinds = tuple(dict.fromkeys((*ACTIVATIONS.values(), "matryoshka")))
    coder = require(coder, "ksae", activations=kinds, skip=True, square=False, fold=fold)
    if coder.centred and coder.W_skip is not None:
        raise UserError("convert: ksae cannot hold W_skip with b_dec subtracted from the input")
    dtypes = {t.dtype for t in (coder.W_enc, coder.b_enc, coder.W_dec, coder.b_dec)}
    if len(dtypes) > 1:
        raise UserError(f"convert: ksae needs one dtype, got {', '.join(sorted(map(str, dtypes)))}")
    kept = coder.extra.get("ksae", {})
    settings: dict[str, Any] = dict(kept.get("config", {}))
    settings.pop("activation", None)
    settings |= {"dtype": coder.dtype, "device": "meta"}
    if coder.group_sizes is not None:
        settings["prefixes"] = coder.group_sizes.cumsum(0).tolist()
        weights = "sum" if "saelens" in coder.extra else "dictionary_learning"
        settings.setdefault("prefix_weights", weights)
    if not coder.centred:
        settings |= {"d_out": coder.d_out, "skip": coder.W_skip is not None}
    sizes = {"d_in": coder.d_in, "d_sae": coder.d_sae}
    model: modules.SparseCoder
    try:
        activation, held = _activation(coder, kept)
        if type(activation) is TopK:
            by_gradient = set(GRADIENT) <= settings.keys()
            topology = "sae" if coder.centred else "transcoder"
            kind: Any = registry.of(topology, GradTopK if by_gradient else TopK)
            model = kind(**sizes, k=coder.k, **settings)
        else:
            kind = SAE if coder.centred else Transcoder
            model = kind(**sizes, activation=activation, **settings)
    except (TypeError, ValueError) as error:
        raise UserError(f"load: {error}") from None
    names = ["W_enc", "b_enc", "W_dec", "b_dec"] + (["W_skip"] if coder.W_skip is not None else [])
    state = {name: getattr(coder, name).contiguous() for name in names}
    fresh = activation.buffers(accumulator(coder.dtype), torch.device("cpu"))
    for name, buffer in model.named_buffers():
        start = fresh.get(name, torch.zeros_like(buffer, device="cpu"))
        state[name] = kept.get("buffers", {}).get(name, start)
    model.load_state_dict({**state, **held}, assign=True)
    return model


def write(coder: Coder, path: Path, fold: bool) -> Path:
    model = build(coder, fold)
    if coder.activation == "jumprelu":
        coder.extra.setdefault("fields", {})["threshold"] = coder.threshold
    save(model, path, coder.extra.get("ksae", {}).get("extra"))
    return path
