# SPDX-License-Identifier: Apache-2.0
"""The fused step of coders with Matryoshka prefixes, against autograd with torch's Adam."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import training
from cases import Implementation, randn
from training import D, F, N, assert_at_most_twice_torchs_error, build, one_step

import ksae
from ksae.coders.auxk import AUXK
from ksae.coders.code import Code
from ksae.coders.terms import terms_of
from ksae.parallel.one_device import OneDevice
from ksae.step.fused import FusedStep
from ksae.step.nested import Nested, together
from ksae.step.phases import Batch, Selection
from ksae.step.state import State

WIDTHS = [7, 30, 31, F]
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "sae": ("sae", {}, {}),
    "bias alone, sum": ("sae", {"prefixes": [0, 50, F], "prefix_weights": "sum"}, {}),
    "mse, weights": ("sae", {"loss": "mse", "prefix_weights": [0.1, 1, 3, 0.5]}, {}),
    "clip": ("sae", {"prefix_weights": "dictionary_learning"}, {"clip_norm": 0.05}),
    "dead, multi": ("sae", {"k_aux": 8, "dead": 3, "multi_topk": True}, {"clip_norm": 0.05}),
    "transcoder": ("transcoder", {"normalize_decoder": True}, {}),
    "skip": ("skip", {}, {"clip_norm": 0.05}),
    "skip, all": ("skip", {"multi_topk": True, "k_aux": 8, "dead": 3, "loss": "mse"}, {}),
}
CASES = {
    name: (kind, {"prefixes": WIDTHS, **settings}, options)
    for name, (kind, settings, options) in CASES.items()
}


@pytest.fixture(autouse=True)
def nested_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "CASES", CASES)


@pytest.fixture(scope="module")
def exact() -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "CASES", CASES)
        return {case: one_step(case, torch.float64, fused=False) for case in CASES}


@pytest.mark.parametrize("case", CASES)
def test_fused_in_float64_is_autograd(exact: dict[str, Any], case: str) -> None:
    want, want_metrics, want_counts = exact[case]
    got, metrics, counts = one_step(case, torch.float64, fused=True)
    assert metrics.keys() == want_metrics.keys()
    assert {f"fvu_{m}" for m in CASES[case][1]["prefixes"][:-1]} <= metrics.keys()
    for name, value in want_metrics.items():
        torch.testing.assert_close(metrics[name], value, rtol=1e-11, atol=1e-13, msg=name)
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-10, atol=1e-13, msg=name)
    assert torch.equal(counts, want_counts)


@pytest.mark.parametrize("case", CASES)
def test_one_step_has_at_most_twice_torchs_error(
    impl: Implementation,
    dtype: torch.dtype,
    exact: dict[str, Any],
    case: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if not impl.native:
        monkeypatch.setattr("ksae.step.fused.ops", impl)
        monkeypatch.setattr("ksae.step.nested.ops", impl)
    assert_at_most_twice_torchs_error(case, dtype, exact)


@pytest.mark.parametrize("clip", [None, 0.05], ids=["free", "clip"])
@pytest.mark.parametrize("kind", ["sae", "skip"])
def test_columns_one_part_at_a_time_give_the_same_step(
    kind: str, clip: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """However many columns of the residuals exist at a time."""
    results = []
    for columns in (4, 12, 1000):
        model = build(kind, torch.float32, prefixes=WIDTHS)
        step = training.warm(ksae.TrainStep(model, 1e-2, clip_norm=clip))
        assert step._fused is not None
        width = min(columns, model.d_out)
        monkeypatch.setattr(step._fused, "columns", lambda *_, width=width: width)
        step(*training.batch(kind))
        results.append(training.results(model, step))
    for other in results[1:]:
        for name, value in other.items():
            torch.testing.assert_close(value, results[0][name], rtol=2e-4, atol=1e-6, msg=name)


def test_a_large_batch_takes_few_columns_at_a_time() -> None:
    """The residuals of all prefixes that exist at a time are no larger than one of TopK."""
    for F_, d in ((24576, 768), (4096, 768), (64, 8)):
        model = ksae.SAE(d, F_, ksae.TopK(4), prefixes=[F_ // 4, F_ // 2, F_], device="meta")
        x = torch.empty(5, d)
        fused = FusedStep(model, State(model, (0.9, 0.99), 1e-8), None, OneDevice())
        chosen = Selection([None], [], torch.tensor(0))  # type: ignore[list-item]
        columns = fused.columns(Batch(x, x, x, None, x.sum), chosen)
        assert columns % 4 == 0 or columns == d
        assert 3 * columns <= d + 12


def test_twenty_steps_stay_together() -> None:
    losses = {}
    for fused in (True, False):
        model = build("sae", torch.float32, prefixes=WIDTHS, dead_after=3 * N, k_aux=8)
        step = ksae.TrainStep(model, 5e-3, clip_norm=1.0, fused=fused)
        losses[fused] = [float(step(randn(N, D, seed=s))["loss"]) for s in range(20)]
    assert losses[True][-1] < 0.95 * losses[True][0]
    torch.testing.assert_close(losses[True], losses[False], rtol=1e-4, atol=0)


def test_a_step_that_is_not_finite_changes_nothing() -> None:
    model = build("skip", torch.float32, prefixes=WIDTHS)
    step = training.warm(ksae.TrainStep(model, 1e-2))
    before = {n: t.clone() for n, t in {**model.state_dict(), **step.state_dict()}.items()}
    x, y = training.batch("skip")
    x[3, 2] = torch.nan
    with pytest.warns(UserWarning, match="was not taken"):
        step(x, y)
    for name, value in {**model.state_dict(), **step.state_dict()}.items():
        assert torch.equal(value, before[name]), name


def test_resumed_is_uninterrupted() -> None:
    """State and file of a coder with prefixes hold all that a step reads."""

    def fresh() -> tuple[Any, ksae.TrainStep]:
        model = build("sae", torch.float32, prefixes=WIDTHS)
        return model, ksae.TrainStep(model, 1e-2)

    straight, step = fresh()
    for s in range(4):
        step(randn(N, D, seed=s))
    first, half = fresh()
    for s in range(2):
        half(randn(N, D, seed=s))
    second, rest = fresh()
    second.load_state_dict(first.state_dict())
    rest.load_state_dict(half.state_dict())
    for s in range(2, 4):
        rest(randn(N, D, seed=s))
    for name, value in straight.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


@pytest.mark.parametrize("ragged", [(True, False), (False, True), (True, True), (False, False)])
def test_two_codes_together(ragged: tuple[bool, bool]) -> None:
    """Row by row, whichever of them has row offsets."""
    codes, dense = [], torch.zeros(4, 30)
    for seed, with_offsets in enumerate(ragged):
        lengths = torch.tensor([3, 0, 5, 1]) if with_offsets else torch.full((4,), 2)
        E = int(lengths.sum())
        values = randn(E, seed=seed)
        indices = torch.arange(E) + 15 * seed
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        code = Code(values, indices, offsets)
        if not with_offsets:
            code = Code(values.view(4, 2), indices.view(4, 2))
        dense += Code(values, indices, offsets).dense(30)
        codes.append(code)
    both = together(*codes)
    assert torch.equal(both.dense(30), dense)
    first = both.values.reshape(4, -1)[:, :2] if ragged == (False, False) else None
    assert first is None or torch.equal(first, codes[0].values)


def test_rows_of_a_code_with_offsets() -> None:
    """The step's table of residuals is read where the op has put each entry's rows."""
    model = build("sae", torch.float32, prefixes=WIDTHS)
    nested = Nested(model, torch.float32, OneDevice())
    lengths = torch.tensor([3, 0, 5, 1])
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    E = int(lengths.sum())
    code = Code(randn(E).abs(), torch.arange(E) * 9 + 3, offsets)
    target = randn(4, D, seed=1)
    table, squares, grads = nested.residual(code, model, target, D)
    (rows,) = nested.row_of(terms_of(model, 0), [code], 4)
    exact = (table[rows.long()] * model.W_dec[code.indices]).sum(1)
    torch.testing.assert_close(grads[:, 0], exact.detach(), rtol=1e-5, atol=1e-6)
    fixed = Code(randn(4, 3).abs(), torch.arange(12).view(4, 3) * 8)
    table, squares, grads = nested.residual(fixed, model, target, D)
    (rows,) = nested.row_of(terms_of(model, 0), [fixed], 4)
    exact = (table[rows.long()] * model.W_dec[fixed.indices.reshape(-1)]).sum(1)
    torch.testing.assert_close(grads.reshape(-1), exact.detach(), rtol=1e-5, atol=1e-6)
    assert squares.shape == (len(WIDTHS), 4)
    torch.testing.assert_close(nested.slice(fixed, model, target, 4, 9), table[:, 4:9])


@pytest.mark.parametrize("auxk", AUXK)
@pytest.mark.parametrize("clip", [None, 0.05], ids=["free", "clip"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_a_number_of_entries_of_each_row(dtype: torch.dtype, clip: float | None, auxk: str) -> None:
    """BatchTopK's codes: prefixes, and AuxK beside and in one code with them."""
    states = []
    for fused in (True, False):
        torch.manual_seed(0)
        options = {"prefixes": [0, 9, F], "auxk": auxk, "k_aux": 5, "auxk_alpha": 0.7}
        model = ksae.SAE(D, F, ksae.BatchTopK(4), dtype=dtype, **options)
        with torch.no_grad():
            model.b_enc.sub_(0.5)
        model.tokens_since_fired[::7] = model.dead_after + 1
        step = ksae.TrainStep(model, 1e-2, clip_norm=clip, fused=fused)
        metrics = [step(randn(N, D, seed=s).to(dtype)) for s in range(3)]
        states.append((step.state_dict(), metrics))
    (fused_state, fused_metrics), (state, metrics) = states
    tolerance = 1e-9 if dtype == torch.float64 else 2e-4
    for got, want in zip(fused_metrics, metrics, strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * 1e-2)
    if dtype == torch.float64:
        for entry, value in state.items():
            torch.testing.assert_close(fused_state[entry], value, rtol=1e-8, atol=1e-12, msg=entry)
