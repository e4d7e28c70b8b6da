# SPDX-License-Identifier: Apache-2.0
"""The axes: activation, topology, options, code."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import ksae
from ksae.coders import registry
from ksae.coders.code import Code
from ksae.coders.coder import SparseCoder

D, OUT, F, K = 6, 4, 10, 3

PAIRS: list[tuple[str, Callable[..., SparseCoder], Callable[..., SparseCoder]]] = [
    (
        "TopKSAE",
        lambda **o: ksae.SAE(D, F, activation=ksae.TopK(K), **o),
        lambda **o: ksae.TopKSAE(D, F, K, **o),
    ),
    (
        "GradTopKSAE",
        lambda **o: ksae.SAE(D, F, ksae.GradTopK(K, 0.5, "signed", "rms"), **o),
        lambda **o: ksae.GradTopKSAE(D, F, K, beta=0.5, mode="signed", grad_norm="rms", **o),
    ),
    (
        "Transcoder",
        lambda **o: ksae.Transcoder(D, OUT, F, activation=ksae.TopK(K), skip=True, **o),
        lambda **o: ksae.Transcoder(D, OUT, F, K, skip=True, **o),
    ),
    (
        "GradTopKTranscoder",
        lambda **o: ksae.Transcoder(D, OUT, F, activation=ksae.GradTopK(K, beta=2.0), **o),
        lambda **o: ksae.GradTopKTranscoder(D, OUT, F, K, beta=2.0, **o),
    ),
]


@pytest.mark.parametrize(("name", "general", "short"), PAIRS, ids=[p[0] for p in PAIRS])
def test_a_short_name_is_its_topology_with_its_activation(
    name: str,
    general: Callable[..., SparseCoder],
    short: Callable[..., SparseCoder],
    tmp_path: Path,
) -> None:
    options = {"loss": "mse", "k_aux": 2, "multi_topk": True}
    models = []
    for make in (general, short):
        torch.manual_seed(0)
        models.append(make(**options))
    one, other = models
    assert one.config() == other.config() and one.config()["class"] == name
    assert one.needs_gradient == name.startswith("Grad")
    assert one.state_dict().keys() == other.state_dict().keys()
    assert all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))
    one.save(tmp_path / "model.safetensors")
    read = ksae.load(tmp_path / "model.safetensors")
    assert type(read) is registry.find(name) and read.config() == one.config()


def test_options_are_frozen() -> None:
    model = ksae.TopKSAE(D, F, K)
    with pytest.raises(dataclasses.FrozenInstanceError):
        model.settings.k_aux = 1  # type: ignore[misc]
    with pytest.raises(AttributeError):
        model.k_aux = 1


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ksae.SAE(D, F, K), "SAE: activation must be an Activation, as ksae.TopK(k), got"),  # type: ignore[arg-type]
        (lambda: ksae.SAE(D, F, ksae.TopK(11)), "SAE: k must be in [1, 10], the number of latents"),
        (lambda: ksae.Transcoder(D, OUT, F), "Transcoder: k or activation must be given"),
        (lambda: ksae.TopKSAE(D, F, 2.0), "TopK: k must be an integer, got 2.0"),  # type: ignore[arg-type]
        (lambda: ksae.TopKSAE(D, "x", 2), "TopKSAE: d_sae must be an integer, got 'x'"),  # type: ignore[arg-type]
        (lambda: ksae.TopKSAE(D, F, 2, l1=3.0), "TopKSAE: options must be among"),  # type: ignore[call-arg]
        (lambda: ksae.GradTopKSAE(D, F, 2, beta=-1.0), "GradTopKSAE: beta must be"),
    ],
)  # fmt: skip
def test_messages(make: Callable[[], Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=re.escape(message)):
        make()


def test_numpy_numbers_are_converted_so_that_the_model_can_be_saved(tmp_path: Path) -> None:
    i, f = np.int64, np.float32
    models = [
        ksae.TopKSAE(
            i(D), np.int32(F), i(K), k_aux=i(2), dead_after=i(5), auxk_alpha=f(0.5),
            multi_topk=np.bool_(True),
        ),
        ksae.GradTopKTranscoder(i(D), i(OUT), i(F), i(K), beta=f(0.5)),
    ]  # fmt: skip
    for model in models:
        assert json.loads(json.dumps(model.config())) == model.config()
        model.save(tmp_path / "model.safetensors")
        assert ksae.load(tmp_path / "model.safetensors").config() == model.config()


CASTS: list[Callable[[SparseCoder], Any]] = [
    lambda m: m.half(),
    lambda m: m.bfloat16(),
    lambda m: m.double(),
    lambda m: m.to(torch.float16),
    lambda m: m.to("cpu", torch.bfloat16),
]


@pytest.mark.parametrize("cast", CASTS)
def test_accumulators_keep_their_dtype_when_a_model_is_cast(
    cast: Callable[[SparseCoder], Any],
) -> None:
    model = ksae.GradTopKSAE(D, F, K, grad_norm="rms")
    x = torch.randn(5, D)
    model(x, grad=torch.randn(5, D) * 1e-6)  # its square is below float16's range
    before = {name: b.clone() for name, b in model.named_buffers()}
    assert before.keys() == {"tokens_since_fired", "grad_square", "grad_rows"}
    cast(model)
    assert model.W_enc.dtype != torch.float32
    for name, buffer in model.named_buffers():
        assert buffer.dtype == before[name].dtype and torch.equal(buffer, before[name])


def test_accumulators_keep_their_dtype_when_a_file_is_read_in_another(tmp_path: Path) -> None:
    model = ksae.GradTopKSAE(D, F, K, grad_norm="rms")
    model(torch.randn(5, D), grad=torch.randn(5, D) * 1e-6)
    model.save(tmp_path / "m.safetensors")
    read = ksae.load(tmp_path / "m.safetensors", dtype=torch.float16)
    assert read.W_enc.dtype == torch.float16
    assert torch.equal(read.get_buffer("grad_square"), model.get_buffer("grad_square"))
    assert float(read.get_buffer("grad_square")) > 0


def test_a_cast_model_selects_as_before() -> None:
    torch.manual_seed(0)
    model = ksae.GradTopKSAE(16, 64, 4, grad_norm="rms", beta=5.0)
    x, grad = torch.randn(50, 16), torch.randn(50, 16) * 1e-6
    model(x, grad=grad)
    model.eval()
    want = model(x, grad=grad).indices.sort().values
    got = model.half()(x, grad=grad).indices.sort().values
    plain = model(x).indices.sort().values
    assert (got == want).float().mean() > 0.9 > (plain == want).float().mean()


def test_arrays_of_numpy_are_refused_with_a_word() -> None:
    array = np.zeros((3, D), dtype=np.float32)
    rows = torch.zeros(3, D)
    sae, graded = ksae.TopKSAE(D, F, K), ksae.GradTopKSAE(D, F, K)
    calls: list[tuple[str, Callable[[], Any]]] = [
        ("TopKSAE: x", lambda: sae(array)),
        ("TopKSAE: x", lambda: sae.encode(array)),  # type: ignore[arg-type]
        ("TopKSAE: y", lambda: sae(rows, array)),
        ("TopKSAE: x", lambda: ksae.TrainStep(sae)(array)),  # type: ignore[arg-type]
        ("GradTopKSAE: x", lambda: graded(array, grad=rows)),
        ("GradTopKSAE: grad", lambda: graded(rows, grad=array)),
    ]
    for name, call in calls:
        with pytest.raises(TypeError, match=f"{name} must be a torch.Tensor, got numpy.ndarray: "):
            call()


# --------------------------------------------------------------------------------------- the code


def test_a_code_with_k_entries_a_row() -> None:
    code = Code(torch.tensor([[3.0, 1.0], [2.0, 0.0]]), torch.tensor([[4, 0], [1, 2]]))
    assert code.k == 2 and code.first(2) is code
    assert torch.equal(code.first(1).indices, torch.tensor([[4], [1]]))
    want = torch.tensor([[1.0, 0, 0, 0, 3], [0, 2, 0, 0, 0]])
    assert torch.equal(code.dense(5), want)


def test_a_code_with_row_offsets() -> None:
    code = Code(torch.tensor([3.0, 1.0, 2.0]), torch.tensor([4, 0, 1]), torch.tensor([0, 2, 2, 3]))
    want = torch.tensor([[1.0, 0, 0, 0, 3], [0, 0, 0, 0, 0], [0, 2, 0, 0, 0]])
    assert torch.equal(code.dense(5), want)
    with pytest.raises(ValueError, match="Code: k must be the same in each row"):
        code.k  # noqa: B018
    with pytest.raises(ValueError, match=r"Code: indices must be of shape \[3\] as values"):
        Code(torch.zeros(3), torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"Code: values must be of shape \[E\] with offsets"):
        Code(torch.zeros(3, 1), torch.zeros(3, 1, dtype=torch.int64), torch.tensor([0, 3]))


def test_the_output_gives_its_code() -> None:
    model = ksae.TopKSAE(D, F, K)
    x = torch.randn(5, D)
    assert torch.equal(model(x).code.dense(F), model.encode_dense(x))
