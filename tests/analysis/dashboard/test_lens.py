# SPDX-License-Identifier: Apache-2.0
"""The logit lens against the dense product, and nearest rows against all cosines."""

from __future__ import annotations

import pytest
import torch
import transformers
from toy_language_model import VOCABULARY, D, llama

from ksae.analysis.dashboard import lens as module
from ksae.analysis.dashboard.lens import embedding_match, logit_lens, why_no_lens
from ksae.analysis.dashboard.neighbours import nearest
from ksae.errors import UserError


def directions() -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randn(13, D, generator=generator)


def gpt2() -> transformers.GPT2LMHeadModel:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=VOCABULARY, n_embd=D, n_layer=2, n_head=2)
    model = transformers.GPT2LMHeadModel(config)
    with torch.no_grad():
        model.transformer.ln_f.weight.uniform_(0.5, 2)
        model.transformer.ln_f.bias.uniform_(-1, 1)
    return model


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("at_once", [2**24, 3 * VOCABULARY])
def test_the_lens_is_the_dense_product(family: str, at_once: int, monkeypatch) -> None:
    monkeypatch.setattr(module, "ROWS_AT_ONCE", at_once)
    model = llama() if family == "llama" else gpt2()
    rows = directions().double()
    if family == "llama":
        gain, head = model.model.norm.weight.double(), model.lm_head.weight.double()
    else:
        gain, head = model.transformer.ln_f.weight.double(), model.lm_head.weight.double()
        rows = rows - rows.mean(1, keepdim=True)  # layer norm centres
    unit = rows / rows.square().mean(1, keepdim=True).sqrt()
    logits = (unit * gain) @ head.T  # [13, V]
    got = logit_lens(model, 7.0 * directions(), 6)
    for ids, values, largest in (
        (got.promoted, got.promoted_logits, True),
        (got.demoted, got.demoted_logits, False),
    ):
        expected = logits.topk(6, largest=largest)
        torch.testing.assert_close(values.double(), expected.values, rtol=2e-5, atol=1e-6)
        assert torch.equal(ids, expected.indices)


def test_the_lens_of_zero_and_of_a_small_vocabulary() -> None:
    got = logit_lens(llama(), torch.zeros(2, D), 10 * VOCABULARY)
    assert got.promoted.shape == (2, VOCABULARY)
    assert (got.promoted_logits == 0).all() and got.promoted[0].tolist() == list(range(VOCABULARY))


def test_why_there_is_no_lens() -> None:
    assert why_no_lens(llama(), D, "layers.0.mlp_out") is None
    assert why_no_lens(llama(), D, "model.layers.0:out") is None
    assert "not in the residual stream" in str(why_no_lens(llama(), D, "layers.0.attn_z"))
    assert "has width 16, the decoder 8" in str(why_no_lens(llama(), 8))
    assert "no unembedding" in str(why_no_lens(llama().model, D))
    with pytest.raises(UserError, match="no unembedding"):
        logit_lens(llama().model, directions())


def test_embeddings_that_an_encoder_reads() -> None:
    model = llama()
    table = torch.nn.functional.normalize(model.model.embed_tokens.weight.double(), dim=1)
    unit = torch.nn.functional.normalize(directions().double(), dim=1)
    expected = (unit @ table.T).topk(4)
    ids, cosines = embedding_match(model, directions(), 4)
    assert torch.equal(ids, expected.indices)
    torch.testing.assert_close(cosines.double(), expected.values, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("n", [3, 50])
def test_nearest_rows(n: int) -> None:
    rows = directions()
    rows[4] = 2 * rows[7]  # one direction
    unit = torch.nn.functional.normalize(rows.double(), dim=1)
    cosines = unit @ unit.T
    cosines.fill_diagonal_(-2)
    order = (-cosines).argsort(dim=1, stable=True)[:, : min(n, 12)]  # equal ones by index
    values, indices = nearest(rows, n)
    assert torch.equal(indices, order)
    torch.testing.assert_close(values.double(), cosines.gather(1, order), rtol=1e-5, atol=1e-6)
    assert indices[4, 0] == 7 and indices[7, 0] == 4
    assert nearest(rows[:1], n)[0].shape == (1, 0)
