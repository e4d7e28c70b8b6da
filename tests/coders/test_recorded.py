# SPDX-License-Identifier: Apache-2.0
"""Coders whose graph is exported or traced, and on tensors without data."""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import randn
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

import ksae
from ksae.coders.output import Output

N, D, F, K = 7, 8, 32, 4
KINDS: dict[str, Callable[[], ksae.SparseCoder]] = {
    "topk": lambda: ksae.TopKSAE(D, F, K),
    "without auxk": lambda: ksae.TopKSAE(D, F, K, auxk_alpha=0, loss="mse"),
    "multi_topk": lambda: ksae.TopKSAE(D, F, K, multi_topk=True),
    "transcoder": lambda: ksae.Transcoder(D, D, F, K, skip=True),
    "grad_topk": lambda: ksae.GradTopKSAE(D, F, K),
    "grad_topk rms": lambda: ksae.GradTopKSAE(D, F, K, grad_norm="rms"),
}
kinds = pytest.mark.parametrize("name", KINDS)
modes = pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])


def make(name: str, training: bool) -> ksae.SparseCoder:
    torch.manual_seed(0)
    coder = KINDS[name]().train(training)
    coder.tokens_since_fired[::3] = 2 * coder.dead_after
    return coder


def batch(coder: ksae.SparseCoder, N: int) -> dict[str, Tensor]:
    x = {"x": randn(N, D, seed=N)}
    if not coder.centred:
        x["y"] = randn(N, D, seed=N + 100)
    if coder.needs_gradient and coder.training:
        x["grad"] = randn(N, D, seed=N + 200)
    return x


def assert_same(got: Output, want: Output) -> None:
    for name, a, b in zip(Output._fields, got, want, strict=True):
        torch.testing.assert_close(
            a, b, rtol=1e-5, atol=1e-5, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(
    "strict",
    [pytest.param(True, id="strict", marks=pytest.mark.nightly), pytest.param(False, id="not")],
)
@modes
@kinds
def test_a_coder_is_exported_for_any_batch_and_saved(
    name: str, training: bool, strict: bool
) -> None:
    """Its output comes back as an `Output`, and counters count on in the loaded program."""
    coder = make(name, training)
    before = copy.deepcopy(coder)
    inputs = batch(coder, N)
    any_length = {0: torch.export.Dim("N", min=1)}
    sizes = dict.fromkeys(inputs, any_length)
    program = torch.export.export(coder, (), inputs, dynamic_shapes=sizes, strict=strict)
    assert torch.equal(coder.tokens_since_fired, before.tokens_since_fired)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for length in (3, 11):
        out = loaded(**batch(coder, length))
        assert type(out) is Output
        assert_same(out, before(**batch(coder, length)))
    assert torch.equal(loaded.tokens_since_fired, before.tokens_since_fired)


# Checks of shapes are recorded as they came out, and torch warns of them.
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@kinds
def test_a_coder_is_traced_for_any_batch(name: str) -> None:
    coder = make(name, training=False)

    class Tuple(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.coder = coder

        def forward(self, *inputs: Tensor) -> Any:
            return tuple(t for t in self.coder(*inputs) if t is not None)

    recorded = torch.jit.trace(Tuple(), tuple(batch(coder, N).values()), check_trace=False)
    for length in (0, 1, 3, 11):
        inputs = batch(coder, length)
        assert_same(Output(*recorded(*inputs.values())), coder(**inputs))


@modes
@kinds
def test_a_coder_takes_tensors_without_data(name: str, training: bool) -> None:
    coder = make(name, training).to("meta")
    out = coder(**{key: t.to("meta") for key, t in batch(coder, N).items()})
    out.loss.backward()
    assert out.recon.shape == (N, D) and out.values.shape == (N, K)
    assert coder.W_enc.grad is not None and coder.W_enc.grad.shape == (F, D)
    with FakeTensorMode():
        fake = KINDS[name]().train(training)
        inputs = {key: torch.empty(N, D) for key in batch(coder, N)}
        fake(**inputs).loss.backward()
        assert fake.W_dec.grad.shape == (F, D)
