# SPDX-License-Identifier: Apache-2.0
"""Steps by a captured graph, on the CPU: what stands for a graph takes the step again on the same
memory. test_cuda_hardware.py has the real one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from training import LR, batch, build, results

import ksae
from ksae.runs.steps import Steps
from ksae.step import graph as graphs
from ksae.step.dead_latents import LAG, DeadLatents
from ksae.step.graph import WARM, StepGraph, why_not
from ksae.step.unfused import Metrics

pytestmark = pytest.mark.implementations("reference")


class Recorded:
    """Stands for `graphs.capture`: nothing has happened after it, and a replay writes to the memory
    of the metrics."""

    def __init__(self) -> None:
        self.step: ksae.TrainStep
        self.captured, self.replayed = 0, 0

    def state(self) -> list[Tensor]:
        step = self.step
        own = [*step.parameters.values(), *step.masters.values(), step.t, *step.model.buffers()]
        return own + [t for pair in step.moments.values() for t in pair]

    def __call__(self, run: Callable[[], Metrics]) -> tuple[Metrics, Callable[[], None]]:
        self.captured += 1
        before = [t.detach().clone() for t in self.state()]
        metrics = run()
        with torch.no_grad():
            for t, old in zip(self.state(), before, strict=True):
                t.copy_(old)
        self.step.state.note_versions()

        def replay() -> None:
            self.replayed += 1
            dead = self.step._fused.dead_latents
            if dead is not None:
                dead.captured = True
            for name, t in run().items():
                metrics[name].copy_(t)
            if dead is not None:
                dead.captured = False
                dead._version = self.step.model.tokens_since_fired._version

        return metrics, replay


@pytest.fixture(autouse=True)
def possible(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "why_not", lambda step: None)


def pair(
    kind: str, T: torch.dtype, settings: dict[str, Any] | None = None, **options: Any
) -> tuple[StepGraph, ksae.TrainStep, Recorded]:
    """A step by a graph, and one that is not."""
    made = [ksae.TrainStep(build(kind, T, **settings or {}), LR, **options) for _ in range(2)]
    recorded = Recorded()
    recorded.step = made[0]
    return StepGraph(made[0], recorded), made[1], recorded


def assert_equal(graph: StepGraph, plain: ksae.TrainStep) -> None:
    got, want = (results(s.model, s) for s in (graph.step, plain))
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert torch.equal(*(s.model.tokens_since_fired for s in (graph.step, plain)))


@pytest.mark.parametrize("kind", ["sae", "transcoder"])
@pytest.mark.parametrize("clip_norm", [None, 0.05])
def test_replays_are_the_eager_steps(
    kind: str, dtype: torch.dtype, clip_norm: float | None
) -> None:
    graph, plain, recorded = pair(kind, dtype, clip_norm=clip_norm)
    for n in range(WARM + 4):
        graph.step.lr = plain.lr = LR / (n + 1)
        rows = [t.to(dtype) for t in batch(kind, n)]
        got, want = graph(*rows), plain(*rows)
        assert got.keys() == want.keys()
        assert all(torch.equal(got[name], want[name]) for name in want)
    assert (recorded.captured, recorded.replayed) == (1, 4)
    assert_equal(graph, plain)


def test_another_shape_or_k_begins_anew() -> None:
    graph, plain, recorded = pair("sae", torch.float32)
    for n in range(3 * (WARM + 2)):
        (rows,) = batch("sae", n)
        rows = rows[: 64 - 8 * (n // (WARM + 2) == 1)]
        graph.step.k = plain.k = 3 if n >= 2 * (WARM + 2) else None
        graph(rows)
        plain(rows)
    assert (recorded.captured, recorded.replayed) == (3, 6)
    assert_equal(graph, plain)


def test_steps_with_dead_latents_run_eagerly() -> None:
    graph, plain, recorded = pair("sae", torch.float32, {"dead_after": 10_000})
    for step in (graph.step, plain):
        assert step._fused is not None
        step._fused.dead_latents = DeadLatents(step.model)
        step._fused.asks_for_dead = False
    replayed, dead = [], []
    for n in range(WARM + 3 * LAG):
        if n == WARM + 2 * LAG:
            for step in (graph.step, plain):
                step.model.tokens_since_fired[:7] = 20_000
        want, got = plain(*batch("sae", n)), graph(*batch("sae", n))
        assert all(torch.equal(got[name], want[name]) for name in want)
        replayed.append(recorded.replayed)
        dead.append(bool(want["dead"] > 0))
    assert dead == [False] * (WARM + 2 * LAG) + [True] * LAG
    assert replayed == [0] * WARM + [*range(1, 2 * LAG + 1)] + [2 * LAG] * LAG
    assert got["auxk_loss"] > 0
    assert_equal(graph, plain)


def test_a_parameter_written_from_outside_is_taken_over() -> None:
    graph, plain, recorded = pair("sae", torch.bfloat16)
    for n in range(WARM + 3):
        if n == WARM + 1:
            for step in (graph.step, plain):
                with torch.no_grad():
                    step.model.b_enc.add_(0.25)
        rows = [t.bfloat16() for t in batch("sae", n)]
        graph(*rows)
        plain(*rows)
    assert recorded.replayed == 2  # the step after the write was eager
    assert_equal(graph, plain)


def test_a_failed_capture_is_told_and_steps_go_on() -> None:
    def fails(run: Callable[[], Metrics]) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing\nmore")

    step, plain = (ksae.TrainStep(build("sae", torch.float32), LR) for _ in range(2))
    graph = StepGraph(step, fails)
    for n in range(WARM + 2):
        graph(*batch("sae", n))
        plain(*batch("sae", n))
    said = "the capture failed: operation not permitted when stream is capturing"
    assert graph.why == said
    assert_equal(graph, plain)


@pytest.mark.parametrize(
    ("why", "model", "fused"),
    [
        ("the model is on cpu", lambda: ksae.TopKSAE(4, 8, 2), True),
        ("the step is not fused", lambda: ksae.TopKSAE(4, 8, 2), False),
        ("many latents BatchTopK selects", lambda: ksae.SAE(4, 8, ksae.BatchTopK(2)), True),
    ],
)
def test_why_not(
    why: str, model: Callable[[], Any], fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = ksae.TrainStep(model(), fused=fused)
    if why != "the model is on cpu":
        monkeypatch.setattr(Tensor, "is_cuda", True)
    assert why in str(why_not(step))


def test_a_run_says_once_why() -> None:
    steps = Steps(ksae.TrainStep(build("sae", torch.float32), LR), "auto")
    said: list[str] = []
    steps.tell(said.append)
    assert steps.graph is not None and not said
    steps.graph.why = "a reason"
    steps.tell(said.append)
    assert not said  # on the CPU nothing is lost
    steps.step.model = type("Coder", (), {"W_enc": type("W", (), {"is_cuda": True})})()
    for _ in range(2):
        steps.tell(said.append)
    assert said == ["train.graph: steps run eagerly: a reason"]
    assert Steps(steps.step, "off").graph is None
