# SPDX-License-Identifier: Apache-2.0
"""Loading models: saved folders, unknown names, and SmolLM2 with its hooks."""

from __future__ import annotations

import builtins
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tokenizers
import torch
import transformers
from torch import nn

import ksae
from ksae import _cpu
from ksae.activations import (
    SMOLLM2,
    LanguageModel,
    capture,
    documents,
    harvest,
    load_model,
    splice,
    tokenize,
)
from ksae.backends import cpu as native
from ksae.coders.initialize import initialize_from
from ksae.errors import UserError


def test_a_saved_model_is_loaded_by_its_folder(tmp_path: Path) -> None:
    words = {word: i for i, word in enumerate(["<pad>", "<s>", "<unk>", "the", "cat"])}
    backend = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", bos_token="<s>", unk_token="<unk>"
    )
    sizes: dict[str, Any] = {
        "vocab_size": 5,
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
    }
    for saved in (
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes)),
        transformers.BertModel(transformers.BertConfig(**sizes)),
    ):
        folder = tmp_path / type(saved).__name__
        saved.save_pretrained(folder)
        with pytest.raises(UserError, match="comes with no tokenizer") as caught:
            load_model(folder)
        assert "\n" not in str(caught.value)
        tokenizer.save_pretrained(folder)
        loaded = load_model(folder, dtype=torch.float64)
        assert type(loaded.model) is type(saved)
        assert next(loaded.model.parameters()).dtype == torch.float64
        data = tokenize(["the cat the", "cat the cat"], loaded.tokenizer, length=4)
        assert data.ids.tolist() == [[1, 3, 4, 3], [1, 4, 3, 4]]
        source = harvest(loaded.model, data, "layers.2.resid_post", progress=False)
        assert (source.num_tokens, source.dtype) == (6, torch.float64)


def test_dtype_and_revision_of_a_language_model(tmp_path: Path) -> None:
    asked: list[dict[str, Any]] = []

    def pretend(where: str, **options: Any) -> Any:
        asked.append(options)
        raise OSError("seen")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers.AutoConfig, "from_pretrained", pretend)
        with pytest.raises(UserError, match="no folder here, and cannot be loaded: seen"):
            load_model("nobody/such-a-model", revision="v2")
    assert asked[0]["revision"] == "v2"
    with pytest.raises(UserError, match=r"revision must be None .* got 'v2'"):
        load_model(tmp_path, revision="v2")
    with pytest.raises(
        UserError, match="dtype must be one of float32, bfloat16, float16, got 'f8'"
    ):
        load_model(tmp_path, dtype="f8")


def test_unknown_models_are_one_line_errors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "text.gguf").write_text("no model")
    for name in (
        "nobody/such-a-model",
        tmp_path / "none",
        tmp_path / "none.gguf",
        tmp_path / "text.gguf",
    ):
        with pytest.raises(UserError) as caught:
            load_model(name, offline=True)
        assert "\n" not in str(caught.value)
    real = builtins.__import__

    def importer(module: str, *arguments: Any, **options: Any) -> Any:
        if module == "transformers":
            raise ImportError
        return real(module, *arguments, **options)

    monkeypatch.setattr(builtins, "__import__", importer)
    with pytest.raises(UserError, match=r"pip install \"ksae\[lm\]\""):
        load_model(SMOLLM2)


@pytest.fixture(scope="module")
def smollm2() -> Iterator[LanguageModel]:
    yield load_model(SMOLLM2)


def test_smollm2(smollm2: LanguageModel) -> None:
    model, tokenizer, name = smollm2
    assert name == SMOLLM2
    assert not model.training
    data = tokenize(documents("pydoc"), tokenizer, length=32, max_tokens=200)
    assert (data.ids[:, 0] == tokenizer.bos_token_id).all()
    source = harvest(model, data, "layers.9.resid_post", progress=False)
    assert (source.d_in, source.num_tokens) == (576, int(data.lengths.sum()) - len(data))
    inputs = {"input_ids": data.ids[:1].long()}
    with torch.no_grad():
        clean = model(**inputs, output_hidden_states=True)
        found = capture(model, ["layers.9.resid_post"], inputs)["layers.9.resid_post"]
        assert torch.equal(found, clean.hidden_states[10])
        with splice(model, "layers.9.resid_post", lambda x: x):
            assert torch.equal(model(**inputs).logits, clean.logits)
        with splice(model, "layers.9.resid_post", torch.zeros_like):
            ablated = model(**inputs).logits

    def loss(logits: torch.Tensor) -> float:
        targets = inputs["input_ids"][0, 1:]
        return float(nn.functional.cross_entropy(logits[0, :-1], targets))

    assert loss(clean.logits) + 2 < loss(ablated)  # a model that knows English, cut in two


def test_screening_of_real_activations(smollm2: LanguageModel) -> None:
    """Few survivors a row, none of the winners lost, before and after some training."""
    data = tokenize(documents("pydoc"), smollm2.tokenizer, length=64, max_tokens=1500)
    source = harvest(smollm2.model, data, "layers.9.resid_post", progress=False)
    x, _ = next(source.sweep(1024))  # [1024, 576]
    sae = ksae.TopKSAE(d_in=576, d_sae=2304, k=32)
    initialize_from(sae, x)
    step = ksae.TrainStep(sae, lr=2e-3)
    for _ in range(2):
        weights = [p.detach() for p in (sae.W_enc, sae.b_enc)]
        values, indices, (rows, survivors, redone) = native.topk_encode_counted(
            x, *weights, 32, sae.b_dec.detach(), screen=True
        )
        plain = native.topk_encode_counted(x, *weights, 32, sae.b_dec.detach(), screen=False)
        assert torch.equal(values, plain[0]) and torch.equal(indices, plain[1])
        assert rows == (len(x) if _cpu.can_screen() else 0)
        assert redone <= 0.05 * len(x)
        assert survivors <= 3 * 32 * rows
        for _ in range(30):
            step(x)
