# SPDX-License-Identifier: Apache-2.0
"""The adapter to SAEBench's interface; beside the package itself in tests/peers."""

from __future__ import annotations

import pytest
import torch

import ksae
from ksae.interop.saebench import SAEBenchSAE

D, F, K = 12, 40, 4


def coder(free: bool = False, activation: object = None) -> ksae.SparseCoder:
    torch.manual_seed(0)
    kind = ksae.TopK(K) if activation is None else activation
    sae = ksae.SAE(D, F, kind, normalize_decoder=not free)
    with torch.no_grad():
        sae.b_dec.copy_(torch.randn(D))
        sae.b_enc.copy_(torch.randn(F) * 0.1)
        if free:
            sae.W_dec *= torch.rand(F, 1) + 0.5
            sae.W_dec[3] = 0
    return sae


@pytest.mark.parametrize("shape", [(7,), (2, 5), (0,)])
@pytest.mark.parametrize("free", [False, True], ids=["unit rows", "free rows"])
def test_it_reconstructs_as_the_coder_does(free: bool, shape: tuple[int, ...]) -> None:
    sae = coder(free)
    adapter = SAEBenchSAE(sae, model_name="gpt2", hook_layer=3)
    x = torch.randn(*shape, D)
    code = adapter.encode(x)
    assert code.shape == (*shape, F) and not code.requires_grad
    values, indices = sae.encode(x)
    lengths = sae.W_dec.detach().norm(dim=1)
    lengths = torch.where(lengths > 0, lengths, 1)
    want = torch.zeros(*shape, F).scatter(-1, indices, values.detach() * lengths[indices])
    torch.testing.assert_close(code, want)
    torch.testing.assert_close(adapter(x), sae(x).recon.detach(), rtol=1e-5, atol=1e-5)
    norms = adapter.W_dec.norm(dim=1)
    assert ((norms - 1).abs() < 1e-5)[lengths != 1].all()
    # the weights are those of the same autoencoder: its pre-activations are the values
    pre = (x - adapter.b_dec) @ adapter.W_enc + adapter.b_enc
    torch.testing.assert_close(pre[code > 0], code[code > 0], rtol=1e-4, atol=1e-5)


def test_a_code_with_a_number_of_entries_of_each_row() -> None:
    sae = coder(activation=ksae.BatchTopK(K)).train()
    adapter = SAEBenchSAE(sae, model_name="gpt2", hook_layer=3)
    assert not sae.training  # selection is that of use
    with torch.no_grad():
        sae.threshold.fill_(1.0)
    x = torch.randn(2, 6, D)
    code = adapter.encode(x)
    assert code.shape == (2, 6, F) and (code[code > 0] > 1).all()
    torch.testing.assert_close(adapter(x), sae(x.reshape(-1, D)).recon.detach().reshape(x.shape))


def test_it_says_what_it_is() -> None:
    adapter = SAEBenchSAE(coder(), model_name="pythia-70m", hook_layer=4, hook_name="blocks.4.mlp")
    assert adapter.cfg.hook_name == "blocks.4.mlp" and adapter.cfg.activation_fn_str == "topk"
    assert adapter.to(dtype=torch.bfloat16) is adapter
    assert adapter.dtype == torch.bfloat16 and adapter.cfg.dtype == "bfloat16"
    assert adapter.encode(torch.randn(3, D)).dtype == torch.bfloat16
    assert adapter.cfg.to_dict()["d_sae"] == F
    with pytest.raises(ValueError, match="must be an autoencoder, got Transcoder"):
        SAEBenchSAE(ksae.Transcoder(D, D, F, K), model_name="gpt2", hook_layer=0)
