# SPDX-License-Identifier: Apache-2.0
"""`ksae hooks`: what --hook may name, of a model on disk."""

from __future__ import annotations

from pathlib import Path

import pytest
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers

from ksae import cli


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    words = {"[UNK]": 0, "<s>": 1, "a": 2, "b": 3}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[UNK]", bos_token="<s>"
    ).save_pretrained(path)
    transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=4,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=3,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
    ).save_pretrained(path)
    return path


def test_hooks_are_listed_with_width_and_module(folder, capfd):
    assert cli.run(["hooks", str(folder)]) == 0
    out = capfd.readouterr().out.splitlines()
    assert out[0] == "LlamaForCausalLM, 3 layers"
    lines = {line.split()[0]: line for line in out[1:7]}
    parts = ["resid_pre", "resid_post", "attn_z", "attn_out", "mlp_in", "mlp_out"]
    assert list(lines) == [f"layers.{{0..2}}.{part}" for part in parts]
    assert all("d = 16 " in line for line in lines.values())
    assert lines["layers.{0..2}.attn_out"].endswith("output of model.layers.0.self_attn.o_proj")
    assert lines["layers.{0..2}.mlp_in"].endswith("input of model.layers.0.mlp")


def test_all_names_are_those_that_hooks_take(folder, capfd):
    assert cli.run(["hooks", str(folder), "--all"]) == 0
    names = capfd.readouterr().out.split()
    assert len(names) == 3 * 6 and names[0] == "layers.0.resid_pre"
    assert names[-1] == "layers.2.mlp_out"


def test_unknown_model_is_one_line(tmp_path, capfd):
    assert cli.run(["hooks", str(tmp_path / "none")]) == 1
    out, error = capfd.readouterr()
    assert out == "" and error.count("\n") == 1 and "no such folder" in error
