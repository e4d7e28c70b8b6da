# SPDX-License-Identifier: Apache-2.0
"""The bf16 copy of float32 weights and the norms of it: who writes them, who may read them, and
that a training step which keeps them never keeps old ones."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bf16_copies import assert_kept, bf16_copy_of, write
from cases import (
    Implementation,
    assert_norms,
    assert_same,
    at_rest,
    clone_all,
    integers,
    randn,
    row_arguments,
    special_rows,
)
from implementations import EVERY, INTERPRETED, INTERPRETED_FUSED, KERNELS
from torch import Tensor

import ksae
from ksae import ops, reference
from ksae.backends import serving as gpu
from ksae.backends.triton import Kernels
from ksae.coders.coder import SparseCoder
from ksae.step import fused as step


def unwritten(W: Tensor) -> tuple[Tensor, Tensor]:
    return torch.full_like(W, 7).bfloat16(), torch.full((3, W.shape[0]), 7.0)


# ------------------------------------------------------------------------------------- row_update


@pytest.mark.parametrize("d", [1, 23, 140])
@pytest.mark.parametrize("side", ["encoder", "decoder"])
@pytest.mark.implementations(*EVERY, INTERPRETED)
def test_norms_are_of_the_row_as_it_is_stored(impl: Implementation, side: str, d: int) -> None:
    """After the update, and on the decoder's side after the unit rows; W is as without norms."""
    a = row_arguments(torch.float32, side, d=d)
    plain, (W_bf16, norms) = clone_all(a), unwritten(a["W"])
    impl.row_update(*a.values(), W_bf16, None, norms)
    impl.row_update(*plain.values(), torch.empty_like(W_bf16))
    assert_same("W", a["W"], plain["W"])
    assert_same("W_bf16", W_bf16, a["W"].bfloat16())
    assert_norms(norms, a["W"], W_bf16)


@pytest.mark.parametrize("d", [1, 23, 1300])
@pytest.mark.implementations(*EVERY, INTERPRETED)
def test_norms_of_special_rows(impl: Implementation, d: int) -> None:
    a = at_rest(special_rows(d))
    W, (W_bf16, norms) = a["W"].clone(), unwritten(a["W"])
    impl.row_update(*a.values(), W_bf16, None, norms)
    assert_same("W", a["W"], W)
    assert_same("W_bf16", W_bf16, W.bfloat16())
    assert_norms(norms, W, W_bf16)
    assert norms[:, [1, 3, 9, 10, 11, 12]].isinf().all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.implementations(*EVERY, INTERPRETED)
def test_a_step_that_is_not_taken_leaves_both(impl: Implementation, bad: float) -> None:
    a = row_arguments(torch.float32, "encoder")
    a["scales"][1] = bad
    W_bf16, norms = unwritten(a["W"])
    impl.row_update(*a.values(), W_bf16, None, norms)
    assert (W_bf16 == 7).all() and (norms == 7).all()


SLICE = {"rows": [torch.zeros(19, 8)] * 2, "start": 4}


@pytest.mark.parametrize(
    ("changes", "W_bf16", "norms", "error", "message"),
    [
        ({}, None, torch.zeros(3, 33), ValueError, "W_bf16 must be given with norms, got None"),
        ({}, 0, torch.zeros(2, 33), ValueError, r"norms must be of shape \[3, 33\], got \[2, 33\]"),
        ({}, 0, torch.zeros(3, 33).half(), TypeError, "norms must be torch.float32, got"),
        ({}, 0, torch.zeros(33, 3).T, ValueError, "norms must be contiguous, for it is written"),
        (SLICE, 0, torch.zeros(3, 33), ValueError, r"rows\[0\] must be 23 columns with norms"),
    ],
)  # fmt: skip
def test_bad_arguments_of_row_update(
    changes: dict[str, Any],
    W_bf16: int | None,
    norms: Tensor,
    error: type[Exception],
    message: str,
) -> None:
    a = row_arguments(torch.float32, "decoder") | changes
    before = a["W"].clone()
    copied = None if W_bf16 is None else torch.zeros(33, 23).bfloat16()
    with pytest.raises(error, match=f"row_update: {message}"):
        ops.row_update(*a.values(), copied, None, norms)
    assert torch.equal(a["W"], before)


def test_what_is_written_is_marked() -> None:
    a = row_arguments(torch.float32, "encoder")
    W_bf16, norms = unwritten(a["W"])
    versions = W_bf16._version, norms._version
    ops.row_update(*a.values(), W_bf16, None, norms)
    assert W_bf16._version > versions[0] and norms._version > versions[1]


# ----------------------------------------------------------------------------------------- encode

N, D, F, K = 6, 5, 40, 3


def weights() -> tuple[Tensor, Tensor, Tensor]:
    x, W, b = (integers(*s, top=511, seed=i) for i, s in enumerate([(N, D), (F, D), (F,)]))
    return x, W, b


@pytest.mark.implementations(*KERNELS, INTERPRETED, INTERPRETED_FUSED)
def test_a_shadow_changes_no_encode(impl: Implementation) -> None:
    x, W, b = weights()
    kept, dead = bf16_copy_of(W), torch.arange(F) % 3 == 0
    want = reference.topk_encode(x, W, b, K, x[0], dead)
    for g, w in zip(impl.topk_encode(x, W, b, K, x[0], dead, *kept), want, strict=True):
        assert_same("topk_encode", g, w)
    for score in ((None, None, 0.0, "additive"), (x.flip(0), W.flip(0), 0.5, "signed")):
        args = (x, W, b, K, 2 * K, dead, x[0], *score)
        got, want = impl.topk_encode_aux(*args, *kept), reference.topk_encode_aux(*args)
        for g, w in zip(got, want, strict=True):
            assert_same("topk_encode_aux", g, w)


def test_a_shadow_has_no_gradient_and_no_batch() -> None:
    x, W, b = (t.requires_grad_() for t in weights())
    kept = bf16_copy_of(W)
    for t in kept[1:]:
        t.requires_grad_()
    args = (x, W, b, K, None, None)
    got = torch.autograd.grad(
        ops.topk_encode(*args, *kept)[0].sum(), [x, W, b, kept[1]], allow_unused=True
    )
    want = torch.autograd.grad(ops.topk_encode(*args)[0].sum(), [x, W, b])
    assert got[3] is None and all(map(torch.equal, got, want))
    x, W, b = weights()
    batch = torch.stack([x, x.flip(0)])
    values = torch.vmap(lambda x: ops.topk_encode(x, W, b, K, None, None, *bf16_copy_of(W))[0])(
        batch
    )
    assert torch.equal(values[0], ops.topk_encode(x, W, b, K)[0])
    message = "topk_encode: norms must be unbatched under vmap, got a batch"
    rounded, norms = bf16_copy_of(W)
    with pytest.raises(ValueError, match=message):
        torch.vmap(lambda norms: ops.topk_encode(x, W, b, K, None, None, rounded, norms))(
            torch.stack([norms, norms])
        )


def test_only_float32_weights_have_a_shadow(dtype: torch.dtype) -> None:
    x, W, b = (t.to(dtype).clamp(-9, 9) for t in weights())
    kept = bf16_copy_of(W.float())
    if dtype == torch.float32:
        ops.topk_encode(x, W, b, K, None, None, *kept)
        return
    with pytest.raises(ValueError, match=f"topk_encode: W_bf16 must be None for {dtype} weights"):
        ops.topk_encode(x, W, b, K, None, None, *kept)


def test_autocast_drops_the_shadow_of_what_it_casts() -> None:
    x, W, b = weights()
    with torch.autocast("cpu", torch.bfloat16):
        got = ops.topk_encode(x, W, b, K, None, None, *bf16_copy_of(W))
        want = ops.topk_encode(*(t.bfloat16() for t in (x, W, b)), K)
    assert got[0].dtype == torch.bfloat16 and all(map(torch.equal, got, want))


# ---------------------------------------------------------------------------------------- who asks


@pytest.mark.parametrize("way", gpu.WAYS)
def test_screened_are_float32_weights_on_a_gpu_where_few_are_chosen(
    monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    def weights(dtype: torch.dtype = torch.float32, is_cuda: bool = True) -> Any:
        return SimpleNamespace(dtype=dtype, is_cuda=is_cuda, shape=(24576, 768))

    monkeypatch.setattr(gpu, "override", way)
    monkeypatch.setattr(gpu.triton, "kernels", Kernels())
    screened = way != "product"
    assert gpu.screens(weights(), 32) == gpu.screens(weights(), 32, aux=True) == screened
    for W, k in (
        (weights(torch.bfloat16), 32),
        (weights(is_cuda=False), 32),
        (weights(), 1025),  # more than its programs sort
    ):
        assert not gpu.screens(W, k)
    assert gpu.screens(weights(), 385) == (way == "fused")  # a 64th of them is 384
    monkeypatch.setattr(gpu.triton, "kernels", None)
    assert not gpu.screens(weights(), 32)


# ------------------------------------------------------------------------------- the training step


def model(**options: Any) -> SparseCoder:
    torch.manual_seed(0)
    return ksae.TopKSAE(D, F, K, **options)


class Screening:
    """The ops, of which those that select look at the bf16 copy that they are given."""

    def __init__(self) -> None:
        self.made: list[Tensor] = []  # a copy of each W_enc of which a bf16 copy was made
        self.read: list[tuple[Tensor, ...]] = []

    def bf16_copy(self, W: Tensor) -> tuple[Tensor, Tensor]:
        self.made.append(W.detach().clone())
        return bf16_copy_of(W)

    def __getattr__(self, name: str) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            if name in ("topk_encode", "topk_encode_aux") and args[1].dtype == torch.float32:
                W, *kept = args[1], *args[-2:]
                assert_same("W_bf16", kept[0], W.detach().bfloat16())
                assert_norms(kept[1], W.detach(), kept[0])
                self.read.append(tuple(kept))
            return getattr(ops, name)(*args)

        return call


@pytest.fixture
def screening(monkeypatch: pytest.MonkeyPatch) -> Screening:
    """As on a GPU that screens."""
    seen = Screening()
    monkeypatch.setattr("ksae.backends.serving.screens", lambda W, k, aux: W.dtype == torch.float32)
    monkeypatch.setattr("ksae.backends.serving.bf16_copy", seen.bf16_copy)
    monkeypatch.setattr("ksae.coders.activation.topk.ops", seen)
    return seen


def batch(seed: int) -> Tensor:
    return randn(9, D, seed=seed)


def test_a_step_keeps_the_shadow_that_the_first_one_made(
    screening: Screening, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(step, "ops", reference)
    sae, other = model(), model()
    train, plain = ksae.TrainStep(sae, 1e-2), ksae.TrainStep(other, 1e-2)
    for seed in range(3):
        train(batch(seed))
        assert_kept(train)
        plain.state.keep_bf16_copy = lambda *_: None  # type: ignore[method-assign]
        plain(batch(seed))
    assert len(screening.made) == 1 and plain.state.W_bf16 == ()
    assert all(map(torch.equal, sae.parameters(), other.parameters()))
    assert train.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("dead", [False, True])
def test_every_selection_reads_what_is_kept(screening: Screening, dead: bool) -> None:
    sae = model(auxk_alpha=1.0, dead_after=5, k_aux=3)
    sae.tokens_since_fired[::2] = 100 * dead
    train = ksae.TrainStep(sae, 1e-2)
    for seed in range(2):
        train(batch(seed))
    assert len(screening.read) == 2
    for read in screening.read:
        assert all(t is kept for t, kept in zip(read, train.state.W_bf16, strict=True))


def replace(train: ksae.TrainStep) -> None:
    train.model.W_enc.data = train.model.W_enc.data * -0.5


def load_both(train: ksae.TrainStep) -> None:
    """The second call takes note of what the first has written."""
    other = model()
    with torch.no_grad():
        other.W_enc.mul_(-0.5)
    train.model.load_state_dict(other.state_dict())
    train.load_state_dict(copy.deepcopy(train.state_dict()))


@pytest.mark.parametrize("change", [write, replace, load_both])
def test_weights_written_from_outside_get_a_new_shadow_in_place(
    screening: Screening, change: Callable[[ksae.TrainStep], None]
) -> None:
    train = ksae.TrainStep(model(), 1e-2)
    train(batch(0))
    kept = train.state.W_bf16
    change(train)
    W = train.model.W_enc.detach().clone()
    train(batch(1))
    assert_kept(train)
    assert len(screening.made) == 2 and torch.equal(screening.made[1], W)
    assert all(t is old for t, old in zip(train.state.W_bf16, kept, strict=True))


def test_a_step_that_is_not_finite_leaves_the_copy(screening: Screening) -> None:
    train = ksae.TrainStep(model(), 1e-2)
    train(batch(0))
    before = [t.clone() for t in train.state.W_bf16]
    assert train(batch(1) * torch.nan)["loss"].isnan()
    assert all(map(torch.equal, before, train.state.W_bf16))
    train(batch(2))
    assert_kept(train)
    assert len(screening.made) == 1


def test_no_shadow_where_nothing_reads_one(screening: Screening) -> None:
    rows = batch(0)
    ksae.TrainStep(model().bfloat16())(rows)
    ksae.TrainStep(model(), fused=False)(rows)
    graded = ksae.GradTopKSAE(D, F, K, auxk_alpha=0)
    ksae.TrainStep(graded)(rows, grad=rows)
    assert screening.made == []
    graded = ksae.GradTopKSAE(D, F, K, auxk_alpha=1.0, dead_after=5)
    graded.tokens_since_fired[::2] = 100
    ksae.TrainStep(graded)(rows, grad=rows)  # AuxK ranks by u
    assert len(screening.made) == 1


def test_no_shadow_of_weights_that_are_written_unseen(screening: Screening) -> None:
    shared = model()
    shared.shares_memory = True
    for train in (ksae.TrainStep(shared), ksae.TrainStep(inferred())):
        train.state.keep_bf16_copy(K, 0, False)
        assert train.state.W_bf16 == ()


@torch.inference_mode()
def inferred() -> SparseCoder:
    return model()
