# SPDX-License-Identifier: Apache-2.0
"""Whole training steps on the CUDA kernels, executed by the emulator: as on a GPU, AuxK does not
know how many latents are dead, and nothing asks the device for a number."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from bf16_copies import assert_kept, bf16_copy_of
from cases import Implementation, assert_same, integers, randn
from implementations import EMULATED, Emulated
from torch import is_tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from training import LR, assert_at_most_twice_torchs_error, batch, build

import ksae
from ksae import reference
from ksae.backends import product as products
from ksae.ops import MODES
from ksae.step.dead_latents import DeadLatents
from ksae.step.fused import FusedStep

pytestmark = pytest.mark.implementations(EMULATED)
N, D, F, K, K_AUX = 11, 17, 130, 9, 20


@pytest.fixture(autouse=True)
def as_on_cuda(impl: Emulated, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every op of the fused step is the emulated kernel, and the step takes CUDA's way."""
    monkeypatch.setattr("ksae.step.fused.ops", impl)
    monkeypatch.setattr("ksae.parallel.one_device.ops", impl)
    monkeypatch.setattr("ksae.step.counters.ops", impl)
    monkeypatch.setattr("ksae.coders.activation.topk.ops", impl)
    made = FusedStep.__init__

    def on_cuda(self: FusedStep, *args: Any, **options: Any) -> None:
        made(self, *args, **options)
        self.asks_for_dead = False

    monkeypatch.setattr(FusedStep, "__init__", on_cuda)
    monkeypatch.setattr("ksae.step.train_step._may_look", lambda rows: False)
    yield


@pytest.mark.parametrize("case", ["clip", "few dead", "more dead than k_aux", "skip, all"])
def test_one_step(dtype: torch.dtype, oracle: dict[str, Any], case: str) -> None:
    assert_at_most_twice_torchs_error(case, dtype, oracle)


@pytest.mark.parametrize("case", ["plain", "clip", "multi", "skip", "few dead"])
def test_one_step_with_rounded_residuals(
    dtype: torch.dtype, oracle: dict[str, Any], case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sums from the residual's own kernel, and its rows in the dtype of the weights but for AuxK,
    which predicts it."""
    made, kinds = FusedStep.__init__, []

    def rounding(self: FusedStep, *args: Any, **options: Any) -> None:
        made(self, *args, **options)
        self.sums_in_decode, self.rounds = True, dtype != torch.float32
        self.dead_latents = DeadLatents(self.model)
        self.columns = lambda batch, chosen: self.model.d_out  # type: ignore[method-assign]

    update = FusedStep._update_decoder

    def noting(self: FusedStep, g: Any, *args: Any) -> None:
        kinds.append({r.dtype for r in g.residuals})
        update(self, g, *args)

    monkeypatch.setattr(FusedStep, "__init__", rounding)
    monkeypatch.setattr(FusedStep, "_update_decoder", noting)
    assert_at_most_twice_torchs_error(case, dtype, oracle)
    assert kinds == [{torch.float32 if case == "few dead" else dtype}]


@pytest.mark.parametrize("case", ["few dead", "more dead than k_aux", "transcoder, unit rows"])
def test_one_step_with_dense_auxk(
    dtype: torch.dtype, oracle: dict[str, Any], case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The row passes take the dead latents' gradients as rows; float16 gathers, as ever."""
    made, taken = FusedStep.__init__, []

    def counting(self: FusedStep, *args: Any, **options: Any) -> None:
        made(self, *args, **options)
        self.dead_latents = DeadLatents(self.model)
        self.columns = lambda batch, chosen: self.model.d_out  # type: ignore[method-assign]

    monkeypatch.setattr(FusedStep, "__init__", counting)
    monkeypatch.setattr("ksae.step.dense_auxk.products_pay", lambda *_: taken.append(1) or True)
    assert_at_most_twice_torchs_error(case, dtype, oracle)
    assert bool(taken) == (dtype != torch.float16)


def test_a_kept_shadow_follows_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ksae.backends.serving.screens", lambda W, k, aux: True)
    monkeypatch.setattr("ksae.backends.serving.bf16_copy", bf16_copy_of)
    model = build("sae", torch.float32)
    step = ksae.TrainStep(model, lr=LR)
    for seed in (1, 2):
        step(*batch("sae", seed))
        with NothingAsksTheDevice():
            step(*batch("sae", seed + 2))
        assert_kept(step)


class NothingAsksTheDevice(TorchDispatchMode):
    """Fails where a number or a size would have to come from the device."""

    asking = ("_local_scalar_dense", "item", "nonzero", "equal", "masked_select", "unique")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().removeprefix("aten::").split(".")[0]
        assert name not in self.asking and not name.startswith("unique"), f"{name} in a step"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dead", [0, 1, 3, 40])
@pytest.mark.parametrize("kind", ["sae", "skip", "gradient"])
def test_no_step_asks_the_device(kind: str, dead: int) -> None:
    if kind == "gradient":
        model = ksae.GradTopKSAE(D, F, K, beta=0.5, k_aux=8)
    else:
        model = build(kind, torch.float32, k_aux=8, multi_topk=True)
    model.tokens_since_fired[: 2 * dead : 2] = model.dead_after + 1
    step = ksae.TrainStep(model, lr=LR, clip_norm=1.0)
    rows = batch("sae" if kind == "gradient" else kind)
    options = {"grad": randn(*rows[0].shape, seed=3)} if kind == "gradient" else {}
    step(*rows, **options)  # what is told of once, is told of here
    model.tokens_since_fired[: 2 * dead : 2] = model.dead_after + 1
    with NothingAsksTheDevice():
        metrics = step(*rows, **options)
    assert (metrics["auxk_loss"] > 0) == (dead > 0)


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that is made inside."""

    most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if is_tensor(t)}
        out = func(*args, **(kwargs or {}))
        for t in tree_leaves(out):
            if is_tensor(t) and t.untyped_storage()._cdata not in given:
                self.most = max(self.most, t.untyped_storage().nbytes())
        return out


@pytest.mark.parametrize("kind", ["sae", "gradient"])
def test_no_step_holds_the_scores(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever N, nothing is larger than the scores of a chunk and a few numbers a token."""
    d, width, k, k_aux, rows = 5, 700, 4, 3, 8
    chunk = rows * width * 4
    monkeypatch.setattr(products, "chunk_bytes", chunk)
    for tokens in (64, 256):
        if kind == "gradient":
            model = ksae.GradTopKSAE(d, width, k, beta=0.5, k_aux=k_aux)
        else:
            model = ksae.TopKSAE(d, width, k, k_aux=k_aux)
        x = randn(tokens, d)
        options = {"grad": randn(tokens, d, seed=3)} if kind == "gradient" else {}
        step = ksae.TrainStep(model, lr=LR, clip_norm=1.0)
        with Largest() as largest:
            step(x, **options)
        assert chunk <= largest.most <= chunk + tokens * 8 * (d + 2 * k)
        assert largest.most < tokens * width * 4


# ---------------------------------------------------------------------------------- both selections


def arguments(dtype: torch.dtype) -> list[torch.Tensor]:
    """x, W_enc, b_enc, b_dec, grad, W_dec in integers."""
    sizes = [(N, D), (F, D), (F,), (D,), (N, 5), (F, 5)]
    return [integers(*s, dtype=dtype, seed=i) for i, s in enumerate(sizes)]


@pytest.mark.parametrize("mode", [None, *MODES])
@pytest.mark.parametrize("dead", [0, 1, 7, K_AUX, 40, F])
def test_both_selections_are_those_of_the_reference(
    impl: Implementation,
    dtype: torch.dtype,
    dead: int,
    mode: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x, W_enc, b_enc, b_dec, grad, W_dec = arguments(dtype)
    grad[3] = 0
    mask = torch.zeros(F, dtype=torch.bool)
    mask[torch.randperm(F, generator=torch.Generator().manual_seed(0))[:dead]] = True
    score = () if mode is None else (grad, W_dec, 0.5, mode)
    want = reference.topk_encode_aux(x, W_enc, b_enc, K, K_AUX, mask, b_dec, *score)
    for rows in (4, N):
        monkeypatch.setattr(products, "chunk_bytes", rows * F * 4)
        got = impl.topk_encode_aux(x, W_enc, b_enc, K, K_AUX, mask, b_dec, *score)
        for name, g, w in zip(("values", "indices") * 2, got, want, strict=True):
            assert_same(name, g, w)
