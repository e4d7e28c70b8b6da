# SPDX-License-Identifier: Apache-2.0
"""Gradients beside activations: equal to autograd of the whole model, and never apart from x."""

from __future__ import annotations

import copy
from itertools import islice
from pathlib import Path

import pytest
import tiny_lm
import torch
import transformers
from torch import nn
from torch.nn import functional as nnf

from ksae.activations import (
    LOSSES,
    ArraySource,
    Contexts,
    StreamSource,
    capture,
    capture_gradient,
    harvest,
    open_cache,
    open_source,
    rescale,
)
from ksae.errors import UserError

VOCABULARY, D, PAD, BOS = 40, 16, 0, 1
MIDDLE, MLP_IN, MLP_OUT = "layers.1.resid_post", "layers.1.mlp_in", "layers.1.mlp_out"


def llama(dtype: torch.dtype = torch.float64) -> nn.Module:
    return tiny_lm.llama(VOCABULARY, D, 24, 3, initializer_range=0.3).to(dtype)


@pytest.fixture(scope="module")
def lm() -> nn.Module:
    return llama()


def contexts(count: int = 7, length: int = 9) -> Contexts:
    """Contexts that start with BOS, of 9, 8, 7, ... tokens."""
    ids = torch.randint(2, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(1))
    ids[:, 0] = BOS
    lengths = torch.tensor([length - i % 4 for i in range(count)], dtype=torch.int32)
    ids[torch.arange(length) >= lengths[:, None]] = PAD
    numbers = torch.arange(count, dtype=torch.int32)
    keys = tuple(bytes([i]) for i in range(count))
    return Contexts(ids.int(), lengths, numbers, keys, (PAD, BOS))


def log_probs_from(model: nn.Module, ids: torch.Tensor, hook: str, delta: torch.Tensor):
    """Log-probabilities [T-1, vocabulary] with `delta` [1, T, d] added at the hook: autograd sees
    the whole model."""
    layer = model.model.layers[1]
    module = layer if hook == MIDDLE else layer.mlp

    def add(_module, _args, output):
        if isinstance(output, tuple):
            return (output[0] + delta, *output[1:])
        return output + delta

    handle = module.register_forward_hook(add)
    logits = model(input_ids=ids).logits
    handle.remove()
    return logits[0, :-1].log_softmax(-1)


def full_gradient(model: nn.Module, ids: torch.Tensor, hook: str, weight: torch.Tensor):
    """Of the weighted sum of next-token losses of one context, [T, d]."""
    delta = torch.zeros(1, len(ids), D, dtype=torch.float64, requires_grad=True)
    log_probs = log_probs_from(model, ids[None].long(), hook, delta)
    each = nnf.nll_loss(log_probs, ids[1:].long(), reduction="none")
    (g,) = torch.autograd.grad((each * weight).sum(), delta)
    return g[0]


@pytest.mark.parametrize("hook", [MIDDLE, MLP_OUT])
def test_the_gradient_is_that_of_the_whole_model(lm: nn.Module, hook: str) -> None:
    texts = contexts()
    source = harvest(lm, texts, hook, gradient="labels", batch_size=3, progress=False)
    x, _, g = next(source.gradient_sweep(1000))
    _, numbers, positions = source.tokens_of(torch.arange(len(x)))
    for i in range(len(texts)):
        length = int(texts.lengths[i])
        ids = texts.ids[i, :length]
        mine = numbers == i
        expected = full_gradient(lm, ids, hook, torch.ones(length - 1))
        torch.testing.assert_close(g[mine], expected[positions[mine].long()], rtol=1e-9, atol=1e-12)
        assert torch.equal(g[mine][-1], torch.zeros(D, dtype=torch.float64))  # predicts nothing
        assert g[mine][:-1].abs().sum(1).min() > 0
        stored = capture(lm, [hook], {"input_ids": ids[None].long()})[hook][0]
        torch.testing.assert_close(x[mine], stored[1:])


def test_the_gradient_does_not_depend_on_the_batch(lm: nn.Module) -> None:
    """A mean over tokens would."""
    for loss in LOSSES:
        parts = [
            harvest(lm, contexts(), MIDDLE, gradient=loss, batch_size=size, progress=False)
            for size in (1, 7)
        ]
        one, all_ = (next(part.gradient_sweep(1000))[2] for part in parts)
        torch.testing.assert_close(one, all_, rtol=1e-9, atol=1e-12)


def test_a_transcoder_has_the_gradient_at_its_target(lm: nn.Module) -> None:
    options = {"gradient": "labels", "progress": False}
    pair = harvest(lm, contexts(), MLP_IN, target_hook=MLP_OUT, **options)
    alone = harvest(lm, contexts(), MLP_OUT, **options)
    x, y, g = next(pair.gradient_sweep(1000))
    target, _, expected = next(alone.gradient_sweep(1000))
    assert torch.equal(y, target) and torch.equal(g, expected) and not torch.equal(x, y)


def test_a_loss_mask_leaves_out_predictions(lm: nn.Module) -> None:
    texts = contexts()
    mask = torch.zeros_like(texts.ids, dtype=torch.bool)
    mask[:, 3] = True  # only the prediction of token 3
    source = harvest(lm, texts, MIDDLE, gradient="labels", loss_mask=mask, progress=False)
    x, _, g = next(source.gradient_sweep(1000))
    _, numbers, positions = source.tokens_of(torch.arange(len(x)))
    weight = torch.zeros(int(texts.lengths[0]) - 1)
    weight[2] = 1
    expected = full_gradient(lm, texts.ids[0], MIDDLE, weight)[1:]  # without BOS
    torch.testing.assert_close(g[numbers == 0], expected, rtol=1e-9, atol=1e-12)
    assert (g[positions >= 3] == 0).all() and (g[positions == 2] != 0).any(1).all()


def test_special_tokens_and_padding_are_not_predicted(lm: nn.Module) -> None:
    texts = contexts()
    texts.ids[:, 4] = BOS
    source = harvest(lm, texts, MIDDLE, gradient="labels", progress=False)
    _, _, g = next(source.gradient_sweep(1000))
    _, numbers, positions = source.tokens_of(torch.arange(len(g)))
    weight = torch.ones(int(texts.lengths[0]) - 1)
    weight[3] = 0
    expected = full_gradient(lm, texts.ids[0], MIDDLE, weight)
    mine = numbers == 0
    torch.testing.assert_close(g[mine], expected[positions[mine].long()], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("loss", [name for name in LOSSES if name != "labels"])
def test_surrogates_are_their_formulas(lm: nn.Module, loss: str) -> None:
    ids = contexts().ids[0]
    inputs = {"input_ids": ids[None].long()}
    predicted = torch.ones(1, len(ids), dtype=torch.bool)
    _, g = capture_gradient(lm, [MIDDLE], inputs, predicted, loss=loss, seeds=[0])
    delta = torch.zeros(1, len(ids), D, dtype=torch.float64, requires_grad=True)
    log_probs = log_probs_from(lm, ids[None].long(), MIDDLE, delta)
    if loss == "entropy":
        total = -(log_probs.exp() * log_probs).sum()
    elif loss == "sampled":
        # The mean over many draws of the gradient of log p is 0: labels add nothing on average.
        draws = [
            capture_gradient(lm, [MIDDLE], inputs, predicted, loss=loss, seeds=[seed])[1]
            for seed in range(400)
        ]
        mean = torch.stack(draws).mean(0)
        labels = capture_gradient(lm, [MIDDLE], inputs, predicted)[1]
        assert mean.norm() < 0.15 * torch.stack(draws).flatten(1).norm(dim=1).mean()
        assert labels.norm() > 3 * mean.norm()
        assert torch.equal(g, draws[0]) and not torch.equal(g, draws[1])
        return
    else:
        handle_free = lm(input_ids=ids[None].long()).logits[0, :-1].detach()
        norm = handle_free.logsumexp(-1)
        # A surrogate of the logits themselves: log p plus the norm, which moves with delta.
        logits = logits_from(lm, ids, delta)
        assert torch.allclose(logits.detach().logsumexp(-1), norm)
        total = logits.logsumexp(-1).sum() if loss == "logsumexp" else -logits.amax(-1).sum()
    (expected,) = torch.autograd.grad(total, delta)
    torch.testing.assert_close(g, expected, rtol=1e-9, atol=1e-12)


def logits_from(model: nn.Module, ids: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    kept: list[torch.Tensor] = []
    handle = model.lm_head.register_forward_hook(lambda _m, _a, output: kept.append(output))
    log_probs_from(model, ids[None].long(), MIDDLE, delta)
    handle.remove()
    return kept[0][0, :-1]


def test_loss_scaling_is_undone(lm: nn.Module) -> None:
    ids = contexts().ids[:1].long()
    arguments = (lm, [MIDDLE], {"input_ids": ids}, torch.ones_like(ids, dtype=torch.bool))
    plain, scaled = (capture_gradient(*arguments, loss_scale=s)[1] for s in (1.0, 1024.0))
    assert torch.equal(plain, scaled)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_sixteen_bit_models_and_what_is_stored(dtype: torch.dtype) -> None:
    source = harvest(llama(dtype), contexts(), MIDDLE, gradient="labels", progress=False)
    _, _, g = next(source.gradient_sweep(1000))
    exact = harvest(llama(), contexts(), MIDDLE, gradient="labels", progress=False)
    _, _, expected = next(exact.gradient_sweep(1000))
    assert g.dtype == torch.bfloat16
    cosine = nnf.cosine_similarity(g.double().flatten(), expected.flatten(), dim=0)
    assert cosine > 0.99 and 0.9 < float(g.double().norm() / expected.norm()) < 1.1


def test_the_model_is_left_as_it_was(lm: nn.Module) -> None:
    model = copy.deepcopy(lm).train()
    model.lm_head.weight.requires_grad_(False)
    wanted = [p.requires_grad for p in model.parameters()]
    harvest(model, contexts(), MIDDLE, gradient="labels", progress=False)
    assert model.training and [p.requires_grad for p in model.parameters()] == wanted
    assert all(p.grad is None for p in model.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# --- x and g stay together ------------------------------------------------------------------------


def rows(count: int = 1000, d: int = 4) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, y and g of which each row names its number."""
    x = torch.arange(count, dtype=torch.float32)[:, None].expand(-1, d).contiguous()
    return x, x[:, :2] + 0.25, -x[:, :2]


@pytest.mark.parametrize("kind", ["memory", "shards", "mapped"])
def test_pairs_survive_shuffling(kind: str) -> None:
    x, y, g = rows()
    pieces = [1000] if kind != "shards" else [300, 1, 699]
    source = ArraySource(
        x.split(pieces),
        y.split(pieces),
        g.split(pieces),
        mapped=kind == "mapped",
        buffer_tokens=100,
        block_tokens=7,
    )
    assert source.has_gradient
    seen = []
    for a, b, c in islice(source.gradient_batches(64, seed=3, start_step=2), 40):
        assert b is not None
        assert torch.equal(b, a[:, :2] + 0.25) and torch.equal(c, -a[:, :2])
        seen.append(a)
    plain = [a for a, _ in islice(source.batches(64, seed=3, start_step=2), 40)]
    assert all(map(torch.equal, seen, plain))
    part = source.part(250, 320)
    a, b, c = next(part.gradient_sweep(100))
    assert torch.equal(a, x[250:320]) and torch.equal(c, g[250:320])


def test_pairs_survive_the_cache_and_streaming(lm: nn.Module, tmp_path: Path) -> None:
    texts = contexts()
    options = {"gradient": "labels", "batch_size": 2}
    memory = harvest(lm, texts, MIDDLE, progress=False, **options)
    disk = harvest(lm, texts, MIDDLE, tmp_path / "c", shard_tokens=10, progress=False, **options)
    again = open_source(tmp_path / "c")
    assert len(list((tmp_path / "c").glob("shard_*"))) > 2
    stream = StreamSource(lm, texts, MIDDLE, buffer_tokens=20, **options)
    x, _, g = next(memory.gradient_sweep(1000))
    row_of = {tuple(row.tolist()): i for i, row in enumerate(x)}
    assert len(row_of) == len(x)
    for source in (disk, again, stream):
        assert source.has_gradient
        for a, _, b in islice(source.gradient_batches(8, seed=1), 20):
            nearest = torch.cdist(a, x).argmin(1)
            torch.testing.assert_close(a, x[nearest], rtol=1e-9, atol=1e-12)
            torch.testing.assert_close(b, g[nearest], rtol=1e-9, atol=1e-12)


def test_a_cache_of_another_loss_is_refused(lm: nn.Module, tmp_path: Path) -> None:
    harvest(lm, contexts(), MIDDLE, tmp_path, gradient="labels", progress=False)
    with pytest.raises(UserError, match="gradient labels, not entropy"):
        harvest(lm, contexts(), MIDDLE, tmp_path, gradient="entropy", progress=False)
    with pytest.raises(UserError, match="gradient labels, not None"):
        harvest(lm, contexts(), MIDDLE, tmp_path, progress=False)
    mask = torch.ones_like(contexts().ids).bool()
    mask[:, 2] = False
    with pytest.raises(UserError, match="predictions"):
        harvest(lm, contexts(), MIDDLE, tmp_path, gradient="labels", loss_mask=mask, progress=False)
    assert open_cache(tmp_path).has_gradient


def test_rescaled_pairs_keep_the_product() -> None:
    x, g = torch.randn(5, 4), torch.randn(5, 4)
    small, large = rescale(x, g, 8.0)
    assert torch.equal(small * large, x * g) and torch.equal(small * 8, x)
    with pytest.raises(UserError, match="rescale: scale must be a finite number > 0, got 0"):
        rescale(x, g, 0)


# --- bad input ------------------------------------------------------------------------------------


class Detached(nn.Module):
    """A model whose third block is computed and thrown away."""

    def __init__(self, lm: nn.Module) -> None:
        super().__init__()
        self.lm, self.config = lm, lm.config
        self.unused = nn.Linear(D, D, dtype=torch.float64)

    def forward(self, input_ids, attention_mask=None, use_cache=False):
        output = self.lm(input_ids=input_ids, attention_mask=attention_mask, use_cache=use_cache)
        self.unused(torch.zeros(*input_ids.shape, D, dtype=torch.float64))
        return output


def test_a_loss_that_does_not_reach_the_hook(lm: nn.Module) -> None:
    with pytest.raises(UserError, match="hook unused:out: the loss of Detached does not depend"):
        harvest(Detached(lm), contexts(), "unused:out", gradient="labels", progress=False)
    encoder = transformers.BertModel(
        transformers.BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=D,
            intermediate_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
        )
    )
    with pytest.raises(UserError, match="BertModel, which has no language model head") as caught:
        harvest(encoder, contexts(), MIDDLE, gradient="labels", progress=False)
    assert "\n" not in str(caught.value)
    assert not any(m._forward_hooks for m in encoder.modules())


def test_bad_arguments(lm: nn.Module) -> None:
    def run(**options) -> None:
        harvest(lm, contexts(), MIDDLE, progress=False, **options)

    with pytest.raises(UserError, match=r"gradient must be one of labels, sampled, .*, got 'loss'"):
        run(gradient="loss")
    with pytest.raises(UserError, match="loss_mask must be None where gradient is None"):
        run(loss_mask=torch.ones(7, 9))
    with pytest.raises(UserError, match=r"loss_mask must have shape \[7, 9\].*got \[7, 8\]"):
        run(gradient="labels", loss_mask=torch.ones(7, 8))
    x, y, g = rows(10)
    with pytest.raises(UserError, match="gradient must have the 10 rows of x, got 9"):
        ArraySource([x], [y], [g[:9]])
    with pytest.raises(UserError, match=r"gradient must have width 4, .* got 2"):
        ArraySource([x], None, [g])
    with pytest.raises(UserError, match="holds no gradients"):
        next(ArraySource([x]).gradient_batches(4))
