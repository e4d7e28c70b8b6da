# SPDX-License-Identifier: Apache-2.0
"""Models, batches and single training steps that the tests of every backend share."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from cases import assert_close, on_threads, randn
from torch import Tensor

import ksae
from ksae.coders.coder import SparseCoder

N, D, OUT, F, K = 64, 17, 23, 97, 5
LR = 1e-2
METRICS = ("loss", "fvu", "auxk_loss", "l0", "dead")


def quantised(*shape: int, seed: int) -> Tensor:
    """Sixteenths up to 2: x - b_dec is exact in every dtype, so no selection hangs on it."""
    return (randn(*shape, seed=seed).clamp(-2, 2) * 16).round() / 16


def build(kind: str, dtype: torch.dtype, **settings: Any) -> SparseCoder:
    """A model in the middle of training, in bfloat16 numbers: every dtype starts the same."""
    torch.manual_seed(0)
    model: SparseCoder = (
        ksae.TopKSAE(D, F, K, **settings)
        if kind == "sae"
        else ksae.Transcoder(D, OUT, F, K, skip=kind == "skip", **settings)
    )
    with torch.no_grad():
        model.W_enc.add_(randn(F, D, seed=1) * 0.05)
        model.W_dec.add_(randn(*model.W_dec.shape, seed=2) * 0.05)
        model.b_enc.copy_(randn(F, seed=3) * 0.1 - 0.3)
        model.b_dec.copy_(quantised(*model.b_dec.shape, seed=4))
        if model.W_skip is not None:
            model.W_skip.copy_(randn(OUT, D, seed=5) * 0.1)
        if model.normalize_decoder:
            model.W_dec /= model.W_dec.norm(dim=1, keepdim=True)
    return model.bfloat16().to(dtype)


def batch(kind: str, seed: int = 10) -> tuple[Tensor, ...]:
    x = quantised(N, D, seed=seed)
    return (
        (x,)
        if kind == "sae"
        else (x, quantised(N, OUT, seed=seed + 1) + 0.3 * x.mean(1, keepdim=True).round())
    )


def warm(step: ksae.TrainStep) -> ksae.TrainStep:
    """Moments as after ten steps, the same in every dtype."""
    state = step.state_dict()
    fresh = {"t": torch.tensor(10.0)}
    for seed, name in enumerate(sorted(step.parameters)):
        shape = step.parameters[name].shape
        fresh |= {
            f"m.{name}": randn(*shape, seed=seed) * 1e-3,
            f"v.{name}": randn(*shape, seed=seed + 50).square() * 1e-5 + 1e-6,
        }
    step.load_state_dict({n: fresh.get(n, t) for n, t in state.items()})
    return step


def results(model: SparseCoder, step: ksae.TrainStep) -> dict[str, Tensor]:
    """Every number that a step writes."""
    out = {n: p.detach() for n, p in model.named_parameters()}
    return out | {n: t for n, t in step.state_dict().items() if n != "t"}


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "plain": ("sae", {"normalize_decoder": False}, {}),
    "unit rows": ("sae", {}, {}),
    "mse": ("sae", {"loss": "mse"}, {}),
    "clip": ("sae", {}, {"clip_norm": 0.05}),
    "clip, loose": ("sae", {}, {"clip_norm": 50.0}),
    "clip, always": ("sae", {"k_aux": 20, "dead": 9}, {"clip_norm": 1.0, "clip": "always"}),
    "skip, clip always": ("skip", {"multi_topk": True}, {"clip_norm": 0.05, "clip": "always"}),
    "decoder's rate": ("sae", {"k_aux": 20, "dead": 9}, {"decoder_lr": 3.0}),
    "skip, decoder's rate": ("skip", {}, {"decoder_lr": 0.5, "clip_norm": 0.05}),
    "few dead": ("sae", {"k_aux": 20, "dead": 9}, {"clip_norm": 0.05}),
    "more dead than k_aux": ("sae", {"k_aux": 6, "dead": 2}, {}),
    "all dead": ("sae", {"k_aux": 6, "dead": 1, "auxk_alpha": 1.0}, {}),
    "multi": ("sae", {"multi_topk": True}, {"clip_norm": 0.05}),
    "multi, dead": ("sae", {"multi_topk": True, "k_aux": 20, "dead": 2}, {}),
    "transcoder": ("transcoder", {}, {"clip_norm": 0.05}),
    "transcoder, unit rows": ("transcoder", {"normalize_decoder": True, "k_aux": 8, "dead": 3}, {}),
    "skip": ("skip", {}, {}),
    "skip, all": (
        "skip",
        {"multi_topk": True, "k_aux": 8, "dead": 3, "loss": "mse"},
        {"clip_norm": 0.05},
    ),
}


def one_step(
    case: str, dtype: torch.dtype, fused: bool
) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Results, metrics and counts after one step from a warm state."""
    kind, settings, options = CASES[case]
    settings = dict(settings)
    every = settings.pop("dead", None)
    model = build(kind, dtype, **settings)
    if every:
        model.tokens_since_fired[::every] = model.dead_after + 1
    step = warm(ksae.TrainStep(model, LR, fused=fused, **options))
    metrics = step(*(t.to(dtype) for t in batch(kind)))
    return results(model, step), metrics, model.tokens_since_fired


def assert_at_most_twice_torchs_error(
    case: str, dtype: torch.dtype, oracle: dict[str, Any]
) -> None:
    """Every parameter, moment and master after one step."""
    exact, exact_metrics, exact_counts = oracle[case]
    plain, plain_metrics, _ = one_step(case, dtype, fused=False)
    got, metrics, counts = one_step(case, dtype, fused=True)
    assert got.keys() == plain.keys()
    for name, value in got.items():
        want = exact[name.removeprefix("master.")]
        # v holds squares: twice the relative error of a gradient
        floor = (4 if name.startswith("v.") else 2) * torch.finfo(value.dtype).eps
        assert_close(f"{case}: {name}", value, plain[name], want, floor)
    for name, value in exact_metrics.items():
        assert metrics[name].dtype == torch.float32
        # a single number: plain torch may be right by luck
        floor = 4 * torch.finfo(dtype).eps
        assert_close(f"{case}: {name}", metrics[name], plain_metrics[name], value.double(), floor)
    assert torch.equal(counts, exact_counts)


def assert_same_state(got: Mapping[str, Tensor], want: Mapping[str, Tensor]) -> None:
    """The same names and bits."""
    assert got.keys() == want.keys()
    for name, t in want.items():
        assert torch.equal(got[name], t), name


def assert_same_coder(got: SparseCoder, want: SparseCoder) -> None:
    """Of one class, with the same options, and the same bits in parameters and buffers."""
    assert type(got) is type(want)
    assert got.activation == want.activation and got.config() == want.config()
    assert_same_state(got.state_dict(), want.state_dict())


def assert_reads_back(model: SparseCoder, folder: Path) -> SparseCoder:
    """What `ksae.load` gives of the file that `save` wrote, the same coder."""
    model.save(folder / "model.safetensors")
    back = ksae.load(folder / "model.safetensors")
    assert_same_coder(back, model)
    return back


def assert_resumes(
    make: Callable[[], ksae.TrainStep], batches: Sequence[tuple[Tensor, ...]]
) -> list[dict[str, Tensor]]:
    """A step that takes over the states after half of the batches ends as one that saw them all;
    that one's metrics."""
    half = len(batches) // 2
    whole, first, second = make(), make(), make()
    metrics = [whole(*data) for data in batches]
    for data in batches[:half]:
        first(*data)
    second.model.load_state_dict(first.model.state_dict())
    second.load_state_dict(first.state_dict())
    for data in batches[half:]:
        second(*data)
    assert_same_state(second.model.state_dict(), whole.model.state_dict())
    assert_same_state(second.state_dict(), whole.state_dict())
    return metrics


def assert_same_bits_on_threads(
    make: Callable[[], ksae.TrainStep], data: tuple[Tensor, ...]
) -> None:
    """Model and moments after a step do not depend on the number of threads."""

    def run() -> dict[str, Tensor]:
        step = make()
        step(*data)
        return {**step.model.state_dict(), **step.state_dict()}

    first, *others = on_threads(run)
    for other in others:
        assert_same_state(other, first)


def assert_fused_is_unfused(
    make: Callable[[bool], ksae.TrainStep],
    batches: Sequence[tuple[Tensor, ...]],
    before: Callable[[SparseCoder], object] = lambda model: None,
) -> SparseCoder:
    """Metrics of the fused step and of autograd, in float64 their parameters and buffers too; the
    coder of the fused step. before: called with a coder before each of its steps."""
    steps = fused, unfused = make(True), make(False)
    tight = fused.model.W_enc.dtype == torch.float64
    tolerance = {"rtol": 1e-9, "atol": 1e-11} if tight else {"rtol": 0.1, "atol": 1e-3}
    for data in batches:
        for step in steps:
            before(step.model)
        got, want = (step(*data) for step in steps)
        assert got.keys() == want.keys()
        for name in got:
            torch.testing.assert_close(
                got[name].double(), want[name].double(), **tolerance, msg=name
            )
    if tight:
        state = unfused.model.state_dict()
        for name, t in fused.model.state_dict().items():
            torch.testing.assert_close(t, state[name], rtol=1e-8, atol=1e-10, msg=name)
    return fused.model
