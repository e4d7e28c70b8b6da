# SPDX-License-Identifier: Apache-2.0
"""Coders without a k that a penalty keeps sparse, and GroupMax, in the formats of the libraries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from training import assert_same_coder

import ksae
from ksae.errors import UserError
from ksae.interop import convert

D, F, K = 6, 10, 5
X = torch.randn(200, D, generator=torch.Generator().manual_seed(1))
KINDS: dict[str, Any] = {
    "relu": ksae.ReLU(0.3, decoder_norm=False),
    "gated": ksae.Gated(0.3),
    "groupmax": ksae.GroupMax(K),
}
HELD = {
    "relu": ("saelens", "dictionary-learning"),
    "gated": ("saelens", "dictionary-learning"),
    "groupmax": ("sparsify",),
}
PAIRS = [(kind, to) for kind, held in HELD.items() for to in held]


def make(kind: str, centred: bool = True, **options: Any) -> ksae.SparseCoder:
    torch.manual_seed(0)
    model: ksae.SparseCoder = (
        ksae.SAE(D, F, KINDS[kind], **options)
        if centred
        else ksae.Transcoder(D, D, F, activation=KINDS[kind], **options)
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape))
        if kind != "groupmax":
            model.mean_active.fill_(3.5)
    return model.eval()


@pytest.mark.parametrize(("kind", "to"), PAIRS)
def test_there_and_back(kind: str, to: str, tmp_path: Path) -> None:
    model = make(kind)
    model.save(tmp_path / "m")
    convert.convert(tmp_path / "m", tmp_path / to, to)
    foreign = ksae.load(tmp_path / to)
    assert type(foreign.activation) is type(model.activation)
    torch.testing.assert_close(foreign.eval()(X).recon, model(X).recon)
    if kind != "groupmax":
        assert foreign.mean_active == 3.5  # kept beside
        ksae.TrainStep(foreign)(X)
    convert.convert(tmp_path / to, tmp_path / "back", "ksae")
    back = ksae.load(tmp_path / "back")
    assert_same_coder(back, model)


@pytest.mark.parametrize("kind", KINDS)
def test_the_centre_is_folded(kind: str, tmp_path: Path) -> None:
    """Into both biases of a gate, where a format wants the other way."""
    to = HELD[kind][-1]
    model = make(kind, centred=False)
    model.save(tmp_path / "m")
    if kind != "groupmax":
        with pytest.raises(UserError, match=r"cannot hold b_dec subtracted from the input = False"):
            convert.convert(tmp_path / "m", tmp_path / "x", to)
    convert.convert(tmp_path / "m", tmp_path / to, to, fold=True)
    torch.testing.assert_close(
        ksae.load(tmp_path / to).eval()(X).recon, model(X).recon, rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("kind", KINDS)
def test_what_a_format_cannot_hold_is_an_error_that_names_both(kind: str, tmp_path: Path) -> None:
    make(kind).save(tmp_path / "m")
    for to in {"saelens", "dictionary-learning", "sparsify"} - set(HELD[kind]):
        with pytest.raises(UserError, match=f"cannot hold activation = {kind}"):
            convert.convert(tmp_path / "m", tmp_path / to, to, fold=True)
    if kind == "gated":
        make(kind, centred=False, skip=True).save(tmp_path / "t")
        with pytest.raises(UserError, match="cannot hold activation = gated of a transcoder"):
            convert.convert(tmp_path / "t", tmp_path / "x", "saelens")


def test_an_activation_that_no_format_holds(tmp_path: Path) -> None:
    ksae.SAE(D, F, ksae.AbsTopK(2)).save(tmp_path / "m")
    with pytest.raises(UserError, match=r"must be one of TopK, .* to be converted, got AbsTopK"):
        convert.convert(tmp_path / "m", tmp_path / "x", "saelens")
