# SPDX-License-Identifier: Apache-2.0
"""Evaluation against direct formulas, on a tiny random language model; contexts; pictures."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import tiny_lm
import torch
from torch import nn

from ksae import TopKSAE, Transcoder
from ksae.analysis.evaluate import LM_DEFINITIONS, evaluate, evaluate_language_model
from ksae.analysis.plots import latent_frequency, training_curve
from ksae.analysis.top_contexts import encode_rows, repeats, telling_latents, top_contexts

VOCABULARY, D = 50, 16
RESIDUAL = "layers.1.resid_post"


@pytest.fixture(scope="module")
def lm() -> nn.Module:
    return tiny_lm.llama(VOCABULARY, D, 32, 3, initializer_range=0.3).train()


@pytest.fixture()
def sae() -> TopKSAE:
    torch.manual_seed(1)
    return TopKSAE(D, 64, 6)


def ids_and_mask() -> tuple[torch.Tensor, torch.Tensor]:
    """Six texts of 9 tokens that start with the special token 0; the last is padded from 5 on."""
    ids = torch.randint(1, VOCABULARY, (6, 9), generator=torch.Generator().manual_seed(2))
    ids[:, 0] = 0
    mask = torch.ones_like(ids)
    mask[5, 5:] = 0
    return ids, mask


class Identity(nn.Module):
    """A model whose reconstruction is perfect."""

    def __init__(self) -> None:
        super().__init__()
        self.unused = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return type("Output", (), {"recon": x})


def test_evaluate_is_independent_of_batches_and_leaves_no_trace(sae: TopKSAE):
    x = torch.randn(101, D)
    sae.train()
    silent = sae.tokens_since_fired.clone()
    whole, parts = evaluate(sae, [x]), evaluate(sae, x.split(17))
    assert sae.training and torch.equal(sae.tokens_since_fired, silent)
    assert whole.tokens == parts.tokens == 101
    assert torch.equal(whole.frequency, parts.frequency)
    assert parts.metrics["fvu"] == pytest.approx(whole.metrics["fvu"], rel=1e-6)
    out = sae.eval()(x)
    residual = x.double() - out.recon.detach().double()
    expected = residual.square().sum() / (x.double() - x.double().mean(0)).square().sum()
    assert whole.metrics["fvu"] == pytest.approx(float(expected), rel=1e-12)
    assert evaluate(sae, x.split(17), max_tokens=40).tokens == 40
    assert evaluate(sae, itertools.repeat(x), max_tokens=250).tokens == 250  # an endless stream


def test_evaluate_transcoder_measures_the_target():
    coder = Transcoder(D, 5, 32, 4, skip=True)
    x, y = torch.randn(50, D), torch.randn(50, 5)
    got = evaluate(coder, [(x, y)]).metrics["fvu"]
    residual = y.double() - coder(x).recon.detach().double()
    expected = residual.square().sum() / (y.double() - y.double().mean(0)).square().sum()
    assert got == pytest.approx(float(expected), rel=1e-12)


def test_evaluate_refuses_an_empty_and_a_non_finite_stream(sae: TopKSAE):
    with pytest.raises(ValueError, match="at least one token"):
        evaluate(sae, [])
    with pytest.raises(ValueError, match="at least one token"):
        evaluate(sae, [torch.zeros(0, D)])
    with pytest.raises(ValueError, match="finite"):
        evaluate(sae, [torch.full((3, D), float("nan"))])


def test_perfect_reconstruction_recovers_everything(lm: nn.Module):
    got = evaluate_language_model(Identity(), lm, [ids_and_mask()], RESIDUAL, exclude=[0])
    assert set(LM_DEFINITIONS) <= set(got)
    assert got["ce_sae"] == got["ce_clean"]
    assert got["ce_recovered"] == 1 and got["kl_recovered"] == 1 and got["kl_sae"] == 0
    assert got["kl_zero"] > 0 and got["ce_zero"] != got["ce_clean"]


def test_language_model_losses_are_their_formulas(lm: nn.Module, sae: TopKSAE):
    ids, mask = ids_and_mask()
    got = evaluate_language_model(sae, lm, [(ids, mask)], RESIDUAL, exclude=[0])
    keep = mask.bool() & (ids != 0)

    def direct(replace) -> torch.Tensor:
        def hook(module, args, output):
            x = output[0] if isinstance(output, tuple) else output
            changed = torch.where(keep[..., None], replace(x), x)
            return (changed, *output[1:]) if isinstance(output, tuple) else changed

        handle = lm.get_submodule("model.layers.1").register_forward_hook(hook)
        with torch.no_grad():
            logits = lm(input_ids=ids, attention_mask=mask).logits
        handle.remove()
        return logits[:, :-1][keep[:, 1:]].double().log_softmax(-1)

    targets = ids[:, 1:][keep[:, 1:]][:, None]
    clean = direct(lambda x: x)
    cases = {"sae": direct(lambda x: sae.eval()(x).recon), "zero": direct(torch.zeros_like)}
    assert got["ce_tokens"] == len(targets) == 5 * 8 + 4
    assert got["ce_clean"] == pytest.approx(float(-clean.gather(1, targets).mean()), rel=1e-6)
    for name, log_probs in cases.items():
        ce, kl = (
            -log_probs.gather(1, targets).mean(),
            (clean.exp() * (clean - log_probs)).sum(1).mean(),
        )
        assert got["ce_" + name] == pytest.approx(float(ce), rel=1e-6)
        assert got["kl_" + name] == pytest.approx(float(kl), rel=1e-4)
    recovered = (got["ce_zero"] - got["ce_sae"]) / (got["ce_zero"] - got["ce_clean"])
    if got["ce_zero"] > got["ce_clean"]:
        assert got["ce_recovered"] == pytest.approx(recovered)
    else:  # an untrained language model may lose nothing without its residual
        assert math.isnan(got["ce_recovered"])


def test_language_model_sums_do_not_depend_on_batches(lm: nn.Module, sae: TopKSAE):
    ids, mask = ids_and_mask()
    whole = evaluate_language_model(sae, lm, [(ids, mask)], RESIDUAL, exclude=[0])
    split = list(zip(ids.split(1), mask.split(1), strict=True))
    seen: list[int] = []
    parts = evaluate_language_model(sae, lm, split, RESIDUAL, exclude=[0], progress=seen.append)
    assert sum(seen) == int(mask.sum())
    for name in ("ce_clean", "ce_sae", "ce_zero", "kl_sae", "kl_zero"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-5)


def test_transcoder_is_spliced_from_its_own_input(lm: nn.Module):
    """A transcoder that is the MLP itself changes nothing."""

    class Mlp(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = copy.deepcopy(lm.get_submodule("model.layers.1.mlp"))

        def forward(self, x):
            return type("Output", (), {"recon": self.mlp(x)})

    got = evaluate_language_model(
        Mlp(), lm, [ids_and_mask()], "layers.1.mlp_in", target_hook="layers.1.mlp_out"
    )
    assert got["ce_sae"] == pytest.approx(got["ce_clean"], rel=1e-6)
    assert got["kl_zero"] > 1e-4


def test_no_text_is_an_error(lm: nn.Module, sae: TopKSAE):
    one = torch.zeros(1, 1, dtype=torch.int64)
    with pytest.raises(ValueError, match="at least two tokens"):
        evaluate_language_model(sae, lm, [(one, torch.ones_like(one))], RESIDUAL)


def test_top_contexts():
    # latent 7 fires at rows 1, 2 (text 0) and 4, 6 (text 1); a slot of value 0 is no firing
    values = torch.tensor([0, 1.0, 3.0, 0, 5.0, 0, 2.0])[:, None].repeat(1, 2)
    indices = torch.tensor([[7, 1]] * 7)
    ids, sequence = torch.arange(100, 107), torch.tensor([0, 0, 0, 0, 1, 1, 1])
    found = top_contexts(values, indices, ids, sequence, [7, 3], n=5, before=2, after=2)
    assert found[3] == []
    first, second = found[7]  # one a text, strongest first
    assert (first.value, first.before, first.token, first.after) == (5.0, [], 104, [105, 106])
    assert (second.value, second.before, second.token, second.after) == (
        3.0,
        [100, 101],
        102,
        [103],
    )
    assert second.text(lambda t: "".join(f"<{i}>\n" for i in t)) == "<100>⏎<101>⏎«<102>⏎»<103>⏎"
    with pytest.raises(ValueError, match="ids and sequence"):
        top_contexts(values, indices, ids[1:], sequence, [7])


def test_top_contexts_do_not_repeat_a_phrase():
    values, indices = torch.tensor([[0.0], [0], [3], [0], [0], [2], [1]]), torch.full((7, 1), 4)
    ids, sequence = torch.tensor([1, 2, 3, 1, 2, 3, 9]), torch.tensor([0, 0, 0, 1, 1, 1, 2])
    (found,) = top_contexts(values, indices, ids, sequence, [4]).values()
    assert [c.row for c in found] == [2, 6]


def test_contexts_of_a_signed_activation_are_ranked_by_size():
    values, indices = torch.tensor([[-3.0], [2], [float("nan")], [-5], [0]]), torch.full((5, 1), 4)
    ids, sequence = torch.arange(5), torch.arange(5)
    (found,) = top_contexts(values, indices, ids, sequence, [4]).values()
    assert [(c.row, c.value) for c in found] == [(3, -5.0), (0, -3.0), (1, 2.0)]


def test_telling_latents_are_rare_strong_and_on_several_tokens():
    N = 10_000
    values, indices = torch.zeros(N, 4), torch.arange(4).repeat(N, 1)
    ids = torch.arange(N) % 97
    values[:, 0] = 9.0  # fires everywhere
    values[:80, 1] = 1.0
    values[:80, 2] = 5.0
    values[200:240, 3] = 9.0  # fires too rarely
    assert telling_latents(values, indices, ids, 6, 10) == [2, 1]
    assert telling_latents(values, indices, ids, 6, 1) == [2]
    assert telling_latents(-values, indices, ids, 6, 10) == [2, 1]
    ids[:80] = 5  # one token
    assert telling_latents(values, indices, ids, 6, 10) == []


def test_repeats_finds_quotes_of_the_training_text_only():
    seen = torch.arange(100, 140)
    new = torch.arange(500, 530)
    quote, short, padded = new.clone(), new.clone(), new.clone()
    quote[4:24] = seen[7:27]
    short[4:23] = seen[7:26]  # 19 tokens
    padded[4:24] = seen[7:27]
    ids, mask = torch.stack([new, quote, short, padded]), torch.ones(4, 30, dtype=torch.bool)
    mask[3, 20:] = False  # the end of the quote is padding
    assert repeats(ids, mask, seen).tolist() == [False, True, False, False]
    assert repeats(ids, mask, seen, length=19).tolist() == [False, True, True, False]
    assert repeats(ids, mask, seen[:5]).tolist() == [False] * 4


def test_encode_rows(sae: TopKSAE):
    x = torch.randn(20, D)
    values, indices = encode_rows(sae, x.split(6))
    expected = sae.encode(x)
    assert torch.equal(indices, expected[1])
    torch.testing.assert_close(values, expected[0].detach())


def test_plots(tmp_path):
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text(
        "".join(
            f'{{"step": {s}, "tokens": {64 * s}, "fvu": {1 / s}, "dead": 0.1, "l0": 4}}\n'
            for s in range(1, 90)
        )
    )
    training_curve(metrics, tmp_path / "curve.png")
    for name, frequency in {
        "some": torch.rand(50) - 0.3,
        "none": torch.zeros(5),
        "all": torch.ones(5),
    }.items():
        latent_frequency(frequency.clamp_min(0), tmp_path / f"{name}.png", tokens=1000)
    for path in tmp_path.glob("*.png"):
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000
    metrics.write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match="fvu"):
        training_curve(metrics, tmp_path / "curve.png")
