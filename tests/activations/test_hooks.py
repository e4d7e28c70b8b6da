# SPDX-License-Identifier: Apache-2.0
"""Hooks, harvesting and streaming on tiny random models of each family."""

from __future__ import annotations

import fcntl
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

from ksae.activations import (
    Contexts,
    StreamSource,
    capture,
    harvest,
    hook_names,
    model_fingerprint,
    prefetch,
    resolve_hook,
    splice,
)
from ksae.activations.hooks import special_ids
from ksae.errors import UserError
from ksae.files import lock

VOCABULARY, LAYERS, D = 100, 3, 16
PARTS = ["resid_pre", "resid_post", "attn_z", "attn_out", "mlp_in", "mlp_out"]

_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": D,
    "intermediate_size": 24,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
    "max_position_embeddings": 32,
}
FAMILIES: dict[str, Any] = {
    "llama": lambda: transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**_SIZES, num_key_value_heads=1)
    ),
    "gpt2": lambda: transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=D, n_layer=LAYERS, n_head=2, n_positions=32
        )
    ),
    "neox": lambda: transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**_SIZES)),
    "opt": lambda: transformers.OPTForCausalLM(
        transformers.OPTConfig(**_SIZES, ffn_dim=24, word_embed_proj_dim=D)
    ),
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**_SIZES)),
    "distilbert": lambda: transformers.DistilBertForMaskedLM(
        transformers.DistilBertConfig(
            vocab_size=VOCABULARY, dim=D, hidden_dim=24, n_layers=LAYERS, n_heads=2
        )
    ),
}
# The modules that the names must mean, written out here by hand.
MODULES = {
    "llama": ("model.layers.1", "self_attn.o_proj", "mlp", "mlp"),
    "gpt2": ("transformer.h.1", "attn.c_proj", "mlp", "mlp"),
    "neox": ("gpt_neox.layers.1", "attention.dense", "mlp", "mlp"),
    "opt": ("model.decoder.layers.1", "self_attn.out_proj", "fc1", "fc2"),
    "bert": ("encoder.layer.1", "attention.output.dense", "intermediate", "output.dense"),
    "distilbert": ("distilbert.transformer.layer.1", "attention.out_lin", "ffn", "ffn"),
}


def build(family: str) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = FAMILIES[family]().eval()
    return model


@pytest.fixture(params=FAMILIES)
def family(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def model(family: str) -> nn.Module:
    return build(family)


def ids(batch: int = 2, length: int = 7) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"input_ids": torch.randint(5, VOCABULARY, (batch, length), generator=generator)}


def contexts(count: int = 20, length: int = 8) -> Contexts:
    """Contexts of 3 to 8 tokens that start with the special token 1."""
    tokens = ids(count, length)["input_ids"].int()
    tokens[:, 0] = 1
    lengths = torch.arange(count, dtype=torch.int32) % 6 + 3
    tokens[torch.arange(length) >= lengths[:, None]] = 0
    keys = tuple(str(i).encode() for i in range(count))
    return Contexts(tokens, lengths, torch.arange(count, dtype=torch.int32), keys, (0, 1, 2))


def hooks_left(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_names_mean_the_modules_they_should(family: str, model: nn.Module) -> None:
    assert hook_names(model) == [f"layers.{i}.{part}" for i in range(LAYERS) for part in PARTS]
    block, projection, mlp_in, mlp_out = MODULES[family]
    expected = {
        "resid_pre": (block, "in"),
        "resid_post": (block, "out"),
        "attn_z": (f"{block}.{projection}", "in"),
        "attn_out": (f"{block}.{projection}", "out"),
        "mlp_in": (f"{block}.{mlp_in}", "in"),
        "mlp_out": (f"{block}.{mlp_out}", "out"),
    }
    for part, (path, side) in expected.items():
        assert resolve_hook(model, f"layers.1.{part}")[1:] == (path, side)


def test_residuals_are_the_models_hidden_states(model: nn.Module) -> None:
    with torch.no_grad():
        states = model(**ids(), output_hidden_states=True).hidden_states
    names = [f"layers.{i}.{part}" for i in range(LAYERS) for part in ("resid_pre", "resid_post")]
    found = capture(model, names, ids())
    for i in range(LAYERS):
        assert torch.equal(found[f"layers.{i}.resid_pre"], states[i])
        if i < LAYERS - 1:  # the last hidden state has passed the final norm in some families
            assert torch.equal(found[f"layers.{i}.resid_post"], states[i + 1])


def test_the_parts_of_a_block_fit_together(family: str, model: nn.Module) -> None:
    found = capture(model, [f"layers.1.{part}" for part in PARTS], ids(), stop=False)
    block, projection, _, _ = MODULES[family]
    project = model.get_submodule(f"{block}.{projection}")
    assert torch.equal(project(found["layers.1.attn_z"]), found["layers.1.attn_out"])
    if family in ("llama", "gpt2", "neox", "opt"):  # the residual is a plain sum there
        mlp_out = found["layers.1.mlp_out"].view(2, 7, D)  # OPT's is a list of tokens
        total = found["layers.1.resid_pre"] + found["layers.1.attn_out"] + mlp_out
        torch.testing.assert_close(total, found["layers.1.resid_post"])
    if family in ("llama", "gpt2", "neox"):
        mlp = model.get_submodule(f"{block}.mlp")
        assert torch.equal(mlp(found["layers.1.mlp_in"]), found["layers.1.mlp_out"])


def test_the_pass_ends_at_the_last_hook(family: str, model: nn.Module) -> None:
    block = MODULES[family][0].removesuffix(".1")
    ran: list[str] = []
    for name, module in model.named_modules():
        if name and not list(module.children()):
            module.register_forward_pre_hook(lambda _m, _a, name=name: ran.append(name))
    before = hooks_left(model)
    capture(model, ["layers.0.mlp_out", "layers.1.resid_pre"], ids())
    assert hooks_left(model) == before
    assert any(name.startswith(f"{block}.0.") for name in ran)
    assert not any(name.startswith((f"{block}.1.", f"{block}.2.", "lm_head")) for name in ran)
    ran.clear()
    capture(model, ["layers.1.resid_pre"], ids(), stop=False)
    assert any(name.startswith(f"{block}.2.") for name in ran)


def output(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(**ids())[0]  # type: ignore[no-any-return]


@pytest.mark.parametrize("part", [*PARTS, "raw"])
def test_splice(part: str, family: str, model: nn.Module) -> None:
    block, projection, _, _ = MODULES[family]
    hook = f"{block}.{projection}:out" if part == "raw" else f"layers.1.{part}"
    clean = output(model)
    with splice(model, hook, lambda x: x):
        assert torch.equal(output(model), clean)
    seen: list[torch.Tensor] = []
    zero = lambda x: seen.append(x) or torch.zeros_like(x)  # type: ignore[func-returns-value]
    with splice(model, hook, zero, exclude=()):
        assert not torch.equal(output(model), clean)
        with ThreadPoolExecutor(1) as other:
            assert torch.equal(other.submit(output, model).result(), clean)
    assert torch.equal(seen[0], capture(model, [hook], ids())[hook])
    assert torch.equal(output(model), clean)
    short = splice(model, hook, lambda x: x[:, :1])
    with pytest.raises(UserError, match="the replacement must have shape"), short:
        output(model)
    assert hooks_left(model) == 0


@pytest.mark.parametrize("part", PARTS)
def test_splice_leaves_what_training_left_out(part: str, family: str, model: nn.Module) -> None:
    """BOS and padding keep their activations; ones that are replaced in place too."""
    hook, tokens = f"layers.1.{part}", ids()["input_ids"]
    mask = torch.ones_like(tokens)
    excluded = {int(tokens[0, 0]), int(tokens[1, 2])}
    mask[1, -2:] = 0
    kept = torch.isin(tokens, torch.tensor(sorted(excluded))) | (mask == 0)
    found: list[torch.Tensor] = []
    inputs = {"input_ids": tokens, "attention_mask": mask}
    clean = capture(model, [hook], inputs)[hook].reshape(*tokens.shape, -1)
    change = lambda x: x.mul_(0).add_(7)
    handle = splice(model, hook, change, exclude=excluded)
    look = lambda x: found.append(x.reshape(*tokens.shape, -1).clone()) or x  # type: ignore[func-returns-value]
    with torch.no_grad(), handle, splice(model, hook, look, exclude=()):
        model(**inputs)
        model(tokens, attention_mask=mask)  # by position too
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0][kept], clean[kept]) and (found[0][~kept] == 7).all()
    assert hooks_left(model) == 0


def test_splice_excludes_by_default_what_the_configuration_names() -> None:
    model = build("llama")
    model.config.bos_token_id, model.config.eos_token_id = 5, [6, 7]
    model.config.pad_token_id = -1  # none
    assert special_ids(model) == {5, 6, 7} and special_ids(nn.Linear(2, 2)) == set()
    tokens, found = torch.tensor([[5, 1, 2, 6]]), []
    look = lambda x: found.append(x.clone()) or x  # type: ignore[func-returns-value]
    hook = "layers.0.resid_post"
    with splice(model, hook, torch.zeros_like), splice(model, hook, look, exclude=()):
        model(tokens)
        with pytest.raises(UserError, match=r"must be given input_ids .* exclude=\(\) replaces"):
            model(inputs_embeds=torch.zeros(1, 3, D))
    clean = capture(model, [hook], {"input_ids": tokens})[hook]
    assert torch.equal(found[0][0, [0, 3]], clean[0, [0, 3]]) and not found[0][0, 1:3].any()
    with (
        splice(model, hook, torch.zeros_like),
        pytest.raises(UserError, match="got a part of the model called alone"),
    ):
        model.model(tokens)
    with splice(model, hook, torch.zeros_like, exclude=()):
        model(inputs_embeds=torch.zeros(1, 3, D))


def test_splice_with_a_cache_sees_the_new_tokens() -> None:
    model = build("llama")
    tokens, found = torch.tensor([[5, 1, 2, 5]]), []
    look = lambda x: found.append(x.clone()) or x  # type: ignore[func-returns-value]
    zeroed = splice(model, "layers.0.mlp_out", torch.zeros_like, exclude=[5])
    with torch.no_grad(), zeroed, splice(model, "layers.0.mlp_out", look, exclude=()):
        cache = model(tokens[:, :3], use_cache=True).past_key_values
        mask = torch.ones(1, 4, dtype=torch.int64)
        model(tokens[:, 3:], past_key_values=cache, attention_mask=mask)
    assert [x.shape[1] for x in found] == [3, 1]
    assert found[0][0, 0].any() and not found[0][0, 1:].any() and found[1].any()


def test_bad_hooks_are_one_line_errors() -> None:
    model = build("llama")
    for name in (
        "layers.3.mlp_out",
        "layers.0.mlp",
        "layers.x.mlp_out",
        "resid_post",
        "model.layers.9:out",
        "model.layers.1:middle",
    ):
        with pytest.raises(
            UserError, match=r"valid are layers\.\{0\.\.2\}\.\{resid_pre,"
        ) as caught:
            resolve_hook(model, name)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"must be a tensor of floats, got BaseModelOutput"):
        capture(model, ["model:out"], ids())
    with pytest.raises(UserError, match=r"got a tensor of torch.int64"):
        capture(model, ["model.embed_tokens:in"], ids())
    model.register_module("unused", nn.Linear(2, 2))
    with pytest.raises(UserError, match="does not reach unused"):
        capture(model, ["unused:out"], ids())
    assert hooks_left(model) == 0
    with pytest.raises(UserError, match=r"valid are path\.of\.module:in or :out$"):
        resolve_hook(nn.Linear(2, 2), "mlp_out")
    with pytest.raises(UserError, match=r"no list of blocks was found in Linear"):
        resolve_hook(nn.Linear(2, 2), "layers.0.mlp_out")


@pytest.mark.parametrize("hook", ["layers.1.resid_post", "layers.1.mlp_out"])
def test_harvest_is_aligned_and_skips_special_tokens(hook: str, model: nn.Module) -> None:
    data = contexts()
    source = harvest(model, data, hook, batch_size=3, progress=False)
    assert (source.d_in, source.d_out) == (D, None)
    assert source.num_tokens == int(data.lengths.sum()) - len(data)
    rows = torch.arange(source.num_tokens)
    tokens, numbers, positions = source.tokens_of(rows)
    assert torch.equal(tokens, data.ids[numbers.long(), positions.long()])
    assert positions.min() == 1
    x, _ = source.gather(rows)
    for number in (0, 7, 19):  # padding and neighbours change nothing but rounding
        alone = {"input_ids": data.ids[number : number + 1, : data.lengths[number]].long()}
        expected = capture(model, [hook], alone)[hook].view(-1, D)[1:]
        torch.testing.assert_close(x[numbers == number], expected)
    assert source.context(0) == (data.ids[0, 1 : data.lengths[0]].tolist(), 0)


def test_harvest_of_a_transcoders_pairs_in_another_dtype() -> None:
    model, data = build("gpt2"), contexts()
    options: dict[str, Any] = {"target_hook": "layers.1.mlp_out", "progress": False}
    source = harvest(model, data, "layers.1.mlp_in", dtype=torch.bfloat16, **options)
    assert (source.d_in, source.d_out, source.dtype) == (D, D, torch.bfloat16)
    x, y = source.gather(torch.arange(source.num_tokens))
    assert y is not None
    mlp = model.get_submodule("transformer.h.1.mlp")
    torch.testing.assert_close(mlp(x.float()), y.float(), atol=1e-2, rtol=1e-2)
    everything = harvest(model, data, "layers.1.mlp_in", exclude_special=False, progress=False)
    assert everything.num_tokens == data.num_tokens


class Interrupt(Exception):
    pass


def test_an_interrupted_harvest_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, data = build("llama"), contexts()
    options: dict[str, Any] = {"batch_size": 3, "shard_tokens": 10, "progress": False}
    whole = harvest(model, data, "layers.1.attn_out", tmp_path / "whole", **options)
    passes = 0

    def interrupt(*_: Any) -> None:
        nonlocal passes
        passes += 1
        if passes == 5:
            raise Interrupt

    handle = model.register_forward_pre_hook(interrupt)
    with pytest.raises(Interrupt):
        harvest(model, data, "layers.1.attn_out", tmp_path / "part", **options)
    model.train()
    part = harvest(model, data, "layers.1.attn_out", tmp_path / "part", **options)
    assert model.training  # as it was, but not while it ran
    assert passes < 5 + 7  # seven passes make the whole
    rows = torch.arange(whole.num_tokens)
    assert torch.equal(whole.gather(rows)[0], part.gather(rows)[0])
    assert all(map(torch.equal, whole.tokens_of(rows), part.tokens_of(rows)))
    memory = harvest(model, data, "layers.1.attn_out", batch_size=3, progress=False)
    assert torch.equal(whole.gather(rows)[0], memory.gather(rows)[0])
    handle.remove()

    def never(*_: Any) -> None:
        raise AssertionError("a finished cache is reused")

    model.register_forward_pre_hook(never)
    assert harvest(model, data, "layers.1.attn_out", tmp_path / "part", **options).num_tokens
    for message, change in {
        "hook": lambda: harvest(model, data, "layers.2.attn_out", tmp_path / "part", **options),
        "dataset_fingerprint": lambda: harvest(
            model, data.select(torch.arange(5)), "layers.1.attn_out", tmp_path / "part", **options
        ),
    }.items():
        with pytest.raises(UserError, match=f"holds activations with {message}"):
            change()
    fingerprint = model_fingerprint(model)
    with torch.no_grad():
        model.get_submodule("model.layers.0.mlp.up_proj").weight[0, 0] += 1e-3
    assert model_fingerprint(model) != fingerprint


def test_two_processes_do_not_write_to_one_cache(tmp_path: Path) -> None:
    """A second file of the same lock is as good as a second process. A finished cache is shared."""
    model, folder, options = build("gpt2"), tmp_path / "c", {"batch_size": 3, "progress": False}
    folder.mkdir()
    (folder / ".tmp-shard_00000.safetensors").write_text("what the other writes now")
    with (folder / lock.NAME).open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(UserError, match=r"harvest: .*c is in use by another process"):
            harvest(model, contexts(), "layers.1.attn_out", folder, **options)
        assert {path.name for path in folder.iterdir()} == {
            ".tmp-shard_00000.safetensors",
            lock.NAME,
        }
    first = harvest(model, contexts(), "layers.1.attn_out", folder, **options)
    assert sorted(p.name for p in folder.iterdir()) == ["meta.json", "shard_00000.safetensors"]
    with (folder / lock.NAME).open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        again = harvest(model, contexts(), "layers.1.attn_out", folder, **options)
    assert again.num_tokens == first.num_tokens


def test_harvest_refuses_what_it_cannot_do() -> None:
    model, data = build("gpt2"), contexts()
    with pytest.raises(UserError, match=r"hook 'layers\.9\.mlp_in'"):
        harvest(model, data, "layers.9.mlp_in")
    with pytest.raises(UserError, match="batch_size must be at least 1"):
        harvest(model, data, "layers.1.mlp_in", batch_size=0)
    with pytest.raises(UserError, match="dtype must be a float dtype"):
        harvest(model, data, "layers.1.mlp_in", dtype=torch.int8)
    with pytest.raises(UserError, match="must have at most the model's 32 positions, got 40"):
        harvest(model, contexts(4, 40), "layers.1.mlp_in")
    with pytest.raises(UserError, match="no token to use"):
        harvest(model, data.select(torch.arange(0)), "layers.1.mlp_in")
    with torch.no_grad():
        model.get_submodule("transformer.wpe").weight[2] = float("nan")
    with pytest.raises(
        UserError, match=r"layers\.1\.mlp_in: the model gives non-finite activations"
    ):
        harvest(model, data, "layers.1.mlp_in", progress=False)


def test_streaming_is_deterministic_and_complete() -> None:
    model, data = build("gpt2"), contexts(60)
    options: dict[str, Any] = {"batch_size": 4, "target_hook": "layers.1.mlp_out"}
    source = StreamSource(model, data, "layers.1.mlp_in", buffer_tokens=40, **options)
    stored = harvest(model, data, "layers.1.mlp_in", progress=False, **options)
    assert (source.d_in, source.d_out, source.num_tokens) == (D, D, stored.num_tokens)
    whole = list(islice(source.batches(16, seed=2), 30))
    assert stored.num_tokens < 30 * 16
    resumed = islice(source.batches(16, seed=2, start_step=11), 19)
    for (x, y), (again, y_again) in zip(whole[11:], resumed, strict=True):
        assert torch.equal(x, again)
        assert y is not None and y_again is not None
        assert torch.equal(y, y_again)

    def ordered(x: torch.Tensor) -> torch.Tensor:
        return x[x[:, 0].argsort()]

    epoch = torch.cat([x for x, _ in whole])[: stored.num_tokens]
    everything = torch.cat([x for x, _ in source.sweep(7)])
    rows = stored.gather(torch.arange(stored.num_tokens))[0]
    torch.testing.assert_close(everything, rows)
    torch.testing.assert_close(ordered(epoch), ordered(rows))
    with prefetch(source.batches(16, seed=2)) as ahead:
        assert all(torch.equal(x, next(ahead)[0]) for x, _ in whole[:10])
