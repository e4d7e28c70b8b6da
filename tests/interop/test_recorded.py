# SPDX-License-Identifier: Apache-2.0
"""Drop-ins whose graph is recorded (compiled, exported, traced), and on tensors without data."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import randn
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from ksae.interop import circuit_tracer, nvidia, openai, overcomplete, sparsify
from ksae.interop.dictionary_learning import AutoEncoderTopK

N, D, F, K = 7, 8, 32, 4
Call = Callable[[Any, Tensor], Any]


def sparsify_coder(**options: Any) -> nn.Module:
    config = sparsify.SparseCoderConfig(num_latents=F, k=K, **options)
    return sparsify.SparseCoder(D, config)


def traced(activation: nn.Module) -> nn.Module:
    return circuit_tracer.SingleLayerTranscoder(
        D, F, activation, 0, dtype=torch.float32, device=torch.get_default_device()
    )


def whole(model: Any, x: Tensor) -> Any:
    return model(x)


KINDS: dict[str, tuple[Callable[[], nn.Module], Call]] = {
    "openai": (lambda: openai.Autoencoder(F, D, openai.TopK(K), normalize=True), whole),
    "openai encode": (
        lambda: openai.Autoencoder(F, D, openai.TopK(K)),
        lambda model, x: model.encode(x)[0],
    ),
    "openai fast": (
        lambda: openai.FastAutoencoder(F, D, K, 6, 2),
        lambda model, x: [(out := model(x))[0], *out[1].values()],
    ),
    "nvidia": (lambda: nvidia.TopKSAE(D, F, K), whole),
    "nvidia loss": (lambda: nvidia.TopKSAE(D, F, K), lambda model, x: [*model.loss(x).values()]),
    "nvidia parts": (
        lambda: nvidia.TopKSAE(D, F, K, normalize_input=False),
        lambda model, x: [v for v in model.forward_with_aux(x).values() if not isinstance(v, dict)],
    ),
    "overcomplete": (lambda: overcomplete.TopKSAE(D, F, K), whole),
    "sparsify": (sparsify_coder, whole),
    "sparsify multi": (lambda: sparsify_coder(multi_topk=True), whole),
    "sparsify groupmax": (lambda: sparsify_coder(activation="groupmax"), whole),
    "circuit-tracer": (
        lambda: traced(circuit_tracer.TopK(K)),
        lambda model, x: [model(x), model.encode(x)],
    ),
    "dictionary_learning": (lambda: AutoEncoderTopK(D, F, K), whole),
    "dictionary_learning parts": (
        lambda: AutoEncoderTopK(D, F, K),
        lambda model, x: [*model.encode(x, return_topk=True), *model(x, output_features=True)],
    ),
    "dictionary_learning threshold": (
        lambda: AutoEncoderTopK(D, F, K),
        lambda model, x: model.encode(x, return_topk=True, use_threshold=True),
    ),
    "circuit-tracer jump": (lambda: traced(circuit_tracer.JumpReLU(torch.full((F,), 0.1))), whole),
}
kinds = pytest.mark.parametrize("name", KINDS)


class Called(nn.Module):
    """A drop-in as a module whose forward pass is the call in question."""

    def __init__(self, name: str) -> None:
        super().__init__()
        make, self.call = KINDS[name]
        torch.manual_seed(0)
        self.model = make()

    def forward(self, x: Tensor) -> Any:
        return self.call(self.model, x)


def assert_same(got: Any, want: Any) -> None:
    got, want = (out if isinstance(out, list | tuple) else [out] for out in (got, want))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a * 1, b * 1, rtol=1e-5, atol=1e-5)


X, OTHER = randn(N, D, seed=1), randn(3, D, seed=2)


@kinds
def test_a_drop_in_is_compiled_as_one_graph(name: str) -> None:
    torch.compiler.reset()
    model, eager = Called(name), Called(name)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for x in (X, OTHER):
        assert_same(compiled(x), eager(x))
    for (key, a), b in zip(model.state_dict().items(), eager.state_dict().values(), strict=True):
        assert not isinstance(a, Tensor) or torch.equal(a, b), key  # counters and dictionaries


@kinds
def test_a_drop_in_is_exported_for_any_batch_and_saved(name: str) -> None:
    model, before = Called(name), Called(name)
    sizes = {"x": {0: torch.export.Dim("N", min=1)}}
    program = torch.export.export(model, (X,), dynamic_shapes=sizes, strict=False)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    assert_same(torch.export.load(file).module()(OTHER), Called(name)(OTHER))
    for (key, a), b in zip(model.state_dict().items(), before.state_dict().values(), strict=True):
        assert not isinstance(a, Tensor) or torch.equal(a, b), key  # export leaves no trace


# Checks of shapes are recorded as they came out, and torch warns of them.
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore::DeprecationWarning")
@kinds
def test_a_drop_in_is_traced_for_any_batch(name: str) -> None:
    class Tuple(Called):
        def forward(self, x: Tensor) -> Any:
            out = super().forward(x)
            return tuple(out) if isinstance(out, list | tuple) else out

    model, eager = Tuple(name), Called(name)
    recorded = torch.jit.trace(model, (X,), check_trace=False)
    assert_same(recorded(OTHER), eager(OTHER))


@kinds
def test_a_drop_in_takes_tensors_without_data(name: str) -> None:
    out = Called(name).to("meta")(X.to("meta"))
    with FakeTensorMode():
        fake = Called(name)(torch.empty(N, D))
    for result in (out, fake):
        parts = [result] if isinstance(result, Tensor) else result
        assert {t.shape[0] for t in parts if t.dim()} <= {N}


def test_a_graph_of_another_k_than_the_buffers_says_so() -> None:
    """dictionary_learning keeps k in a tensor, which a trainer may fill or a file bring."""
    ae = AutoEncoderTopK(D, F, K)
    ae.load_state_dict(AutoEncoderTopK(D, F, K - 1).state_dict())
    program = torch.export.export(ae, (X,), strict=False).module()
    assert_same(program(X), ae(X))
    dict(program.named_buffers())["k"].fill_(K)
    with pytest.raises(RuntimeError, match=f"AutoEncoderTopK: k must be {K - 1}, for which this"):
        program(X)
