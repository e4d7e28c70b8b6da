# SPDX-License-Identifier: Apache-2.0
"""AuxK as on a GPU: the number of dead latents is a bound from some steps ago, and products of the
dead latents' rows take the place of gathers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from cases import assert_close, randn
from torch import Tensor

import ksae
from ksae.coders.auxk import AUXK
from ksae.coders.coder import SparseCoder
from ksae.coders.terms import terms_of
from ksae.step import dead_latents, dense_auxk, fused
from ksae.step.dead_latents import LAG, DeadLatents, padded

N, D, F, K = 40, 12, 300, 4


def model(dtype: torch.dtype = torch.float32, **options: Any) -> SparseCoder:
    torch.manual_seed(0)
    options = {"k_aux": 9, "auxk_alpha": 0.5, "dead_after": 2000} | options
    sae = ksae.SAE(D, F, options.pop("activation", ksae.TopK(K)), dtype=dtype, **options)
    with torch.no_grad():
        sae.b_enc.copy_(0.1 * randn(F, seed=1))
        sae.b_dec.copy_(0.3 * randn(D, seed=2))
    return sae


def die(sae: SparseCoder, number: int) -> None:
    """Latents that do not fire, but would."""
    sae.tokens_since_fired[
        torch.randperm(F, generator=torch.Generator().manual_seed(3))[:number]
    ] = 3000


def as_on_a_gpu(train: ksae.TrainStep) -> ksae.TrainStep:
    step = train._fused
    assert step is not None
    step.asks_for_dead, step.dead_latents = False, DeadLatents(train.model)
    step.columns = lambda batch, chosen: D  # type: ignore[method-assign]
    return train


# -------------------------------------------------------------------------------------- the bound


def after_step(counted: DeadLatents, N: int) -> None:
    """A step of N tokens was taken."""
    model = counted.model
    bar = model.dead_after - counted.within(N)
    counted.after_step(N, (model.tokens_since_fired > bar).sum())


@pytest.mark.parametrize(
    ("sizes", "most_asked"), [([5] * 40, 1), ([5, 9, 2, 30] * 10, 6)], ids=["even", "uneven"]
)
def test_the_bound_is_one_and_the_device_is_seldom_asked(
    monkeypatch: pytest.MonkeyPatch, sizes: list[int], most_asked: int
) -> None:
    asked: list[int] = []

    def dead(self: SparseCoder) -> Tensor:
        asked.append(1)
        return self.tokens_since_fired > self.dead_after

    monkeypatch.setattr(SparseCoder, "dead", property(dead))
    sae = model(dead_after=200)
    sae.tokens_since_fired[:] = torch.randint(260, (F,), generator=torch.Generator().manual_seed(5))
    counted, tight = DeadLatents(sae), 0
    for n, rows in enumerate(sizes):
        most = counted.most()
        now = int((sae.tokens_since_fired > 200).sum())
        assert most is not None and now <= most
        tight += most < F
        fired = torch.rand(F, generator=torch.Generator().manual_seed(n)) < 0.02
        sae.tokens_since_fired.add_(rows).masked_fill_(fired, 0)
        after_step(counted, rows)
    assert tight == len(sizes) and 1 <= len(asked) <= most_asked


def test_zero_while_all_have_fired_lately() -> None:
    sae = model()
    counted = DeadLatents(sae)
    for _ in range(2 * LAG):
        assert counted.most() == 0
        sae.tokens_since_fired.add_(N)
        after_step(counted, N)


def test_counters_written_from_outside_are_counted_anew() -> None:
    sae = model()
    counted = DeadLatents(sae)
    for _ in range(LAG + 1):
        counted.most()
        after_step(counted, N)
    die(sae, 70)
    assert counted.most() == 70


def test_a_longer_batch_than_was_thought_of_is_seen() -> None:
    sae = model()
    counted = DeadLatents(sae)
    for _ in range(LAG):
        counted.most()
        after_step(counted, 1)
    sae.tokens_since_fired.add_(2500)
    after_step(counted, 2500)
    assert counted.most() == F


def test_steps_of_a_graph_leave_no_count(monkeypatch: pytest.MonkeyPatch) -> None:
    class Buffer:
        is_cuda, _version = True, 0

    sae = model()
    counted = DeadLatents(sae)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    counted.model = type("Coder", (), {"tokens_since_fired": Buffer()})()  # type: ignore[assignment]
    assert counted.most() is None
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert counted.most() is None
    counted.after_step(N, torch.tensor(0))
    assert not counted._counts


def test_padding() -> None:
    assert [padded(n, 1000) for n in (0, 1, 256, 257, 900)] == [0, 256, 256, 512, 1000]


# --------------------------------------------------------------------------------------- the steps

CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "clipped": {"clip_norm": 0.01},
    "unit rows off": {"normalize_decoder": False},
    "more than are wanted": {"dead": 200},
    "few": {"dead": 3},
    "many a token": {"k_aux": 200, "dead": 120},
    "mse": {"loss": "mse"},
    "batch": {"activation": ksae.BatchTopK(K)},
    "prefixes": {"prefixes": [30, 100, F]},
    "multi": {"multi_topk": True},
    **{name: {"auxk": name} for name in AUXK},
}


def steps(case: str, dtype: torch.dtype, way: str) -> tuple[SparseCoder, list[Tensor]]:
    options = dict(CASES[case])
    dead, clip_norm = options.pop("dead", 40), options.pop("clip_norm", None)
    sae = model(dtype, **options)
    die(sae, dead)
    train = ksae.TrainStep(sae, 1e-2, clip_norm=clip_norm, fused=way != "unfused")
    if way == "dense":
        as_on_a_gpu(train)
    metrics = [train(randn(N, D, seed=n) + 0.5) for n in range(3)]
    return sae, [torch.stack([m[name] for m in metrics]) for name in ("loss", "auxk_loss", "dead")]


@pytest.mark.parametrize("case", CASES)
def test_a_dense_step_is_the_step(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As exact as the sparse one, against float64 autograd."""
    monkeypatch.setattr(dense_auxk, "products_pay", lambda *_: True)
    taken, real = [], dense_auxk.dense_auxk
    monkeypatch.setattr(fused, "dense_auxk", lambda *a: taken.append(1) or real(*a))
    (sae, metrics), (sparse, want) = (
        steps(case, torch.float32, "dense"),
        steps(case, torch.float32, "sparse"),
    )
    exact, oracle = steps(case, torch.float64, "unfused")
    assert len(taken) == (0 if case == "batch_topk" else 3)
    assert (want[1] > 0).all()
    for name, got, plain, e in zip(("loss", "auxk", "dead"), metrics, want, oracle, strict=True):
        assert_close(name, got, plain, e.double(), floor=1e-5)
    for (name, p), plain, e in zip(
        sae.named_parameters(), sparse.parameters(), exact.parameters(), strict=True
    ):
        assert_close(name, p.detach(), plain.detach(), e.detach(), floor=2e-5)
    assert torch.equal(sae.tokens_since_fired, sparse.tokens_since_fired)


def test_a_dense_step_of_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dense_auxk, "products_pay", lambda *_: True)
    found = {way: steps("plain", torch.bfloat16, way)[0] for way in ("dense", "sparse", "unfused")}
    start = dict(model(torch.bfloat16).named_parameters())
    for name, p in found["sparse"].named_parameters():
        moved = (p - start[name]).detach().float()
        for way in ("dense", "unfused"):
            other = (found[way].get_parameter(name) - start[name]).detach().float()
            error = (other - moved).norm() / moved.norm()
            found[f"{way} {name}"] = float(error)
        assert found[f"dense {name}"] <= max(2 * found[f"unfused {name}"], 0.02), (name, found)


def test_nothing_dead_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """No selection of dead latents, no second residual."""
    sae = model()
    train, plain = as_on_a_gpu(ksae.TrainStep(sae)), ksae.TrainStep(copy.deepcopy(sae))
    seen: list[int] = []
    select = fused.FusedStep.encode

    def encode(self: Any, batch: Any) -> Any:
        chosen = select(self, batch)
        seen.append(len(chosen.terms))
        return chosen

    monkeypatch.setattr(fused.FusedStep, "encode", encode)
    for n in range(LAG + 2):
        for step in (train, plain):
            step(randn(N, D, seed=n))
    assert set(seen) == {1} and len(terms_of(sae, 9)) == 2
    assert all(map(torch.equal, train.model.parameters(), plain.model.parameters()))


@pytest.mark.parametrize("share", [0.005, 0.02, 0.1, 0.5, 1.0])
def test_every_dead_share_takes_a_step(share: float) -> None:
    """By the formula, over the steps in which the bound changes."""
    sae = model(dead_after=60)
    sae.tokens_since_fired[: int(share * F)] = 61
    train = as_on_a_gpu(ksae.TrainStep(sae, 1e-2))
    losses = [float(train(randn(N, D, seed=n))["loss"]) for n in range(2 * LAG)]
    assert all(map(torch.isfinite, map(torch.tensor, losses)))


def test_dense_pays_where_gathers_are_many() -> None:
    for itemsize in (2, 4):
        assert dense_auxk.products_pay(2048, 2560, itemsize)  # 2 % of 131072 dead
    assert dense_auxk.products_pay(2048, 131072, 2) and not dense_auxk.products_pay(2048, 131072, 4)
    assert dead_latents.PADDED == 256
