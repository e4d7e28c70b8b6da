# SPDX-License-Identifier: Apache-2.0
"""ksae's step and the libraries' own, architecture by architecture, from the same weights on the
same batches."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_study import tiny_study

import ksae
from ksae.bench.contestants import families, pairs
from ksae.bench.harness.data import batches, initial_weights
from ksae.coders.code import Code

d, F, k, N, STEPS, LR = 64, 512, 8, 128, 40, 1e-3
DEAD = 10 * N  # tokens; there are dead latents from then on


@pytest.fixture(autouse=True)
def no_services(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "disabled")


def two(library: str, architecture: str, dead_after: int) -> tuple[pairs.Ours, Any]:
    """ksae's contestant and the library's, in float64."""
    start = {name: value.double() for name, value in initial_weights(F, d).items()}
    sample = torch.cat(batches("planted", N, d, 4)).double()
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        made = pairs.pair(library, architecture, start, sample, k, LR, N, dead_after)
        ours, theirs = (make() for make in made)
    finally:
        torch.set_default_dtype(default)
    model = theirs.trainer.ae if library == "dictionary-learning" else theirs.model.double()
    if architecture.startswith("JumpReLU"):  # sae-lens keeps it in float32
        model.threshold.data = model.threshold.data.double()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    return ours, theirs


def losses(ours: Any, theirs: Any, steps: int = STEPS) -> tuple[list[float], list[float]]:
    found: tuple[list[float], list[float]] = [], []
    for x in batches("planted", N, d, steps):
        for one, said in zip((ours, theirs), found, strict=True):
            said.append(float(one.step(x.double())))
    return found


SAME = [pair for pair in pairs.PAIRS if pair not in pairs.DIFFERENCES]
AUXK = ("TopK", "BatchTopK", "Matryoshka")


@pytest.mark.parametrize(("library", "architecture"), [*SAME, ("sae-lens", "NormTopK")])
def test_the_steps_are_those_of_the_library(library: str, architecture: str) -> None:
    """Selection, loss, gradients, projection, clipping, Adam and unit rows; of sae-lens what it
    does with dead latents too: dictionary-learning counts a batch before it asks which latents are
    dead, ksae after it; and sae-lens' AuxK ranks by decoder norms where its selection does."""
    with_dead = library == "sae-lens" and architecture != "NormTopK"
    ours, theirs = two(library, architecture, DEAD if with_dead else STEPS * N)
    got, want = losses(ours, theirs)
    assert got == pytest.approx(want, rel=1e-6)
    if with_dead:
        assert bool(ours.model.dead.any())
    if library == "dictionary-learning" or architecture not in (*AUXK, "NormTopK"):
        assert want[-1] < 0.9 * want[0]
    if architecture.startswith("JumpReLU"):
        theirs_in = theirs.trainer.ae if library == "dictionary-learning" else theirs.model
        got_theta, want_theta = ours.model.theta, theirs_in.threshold
        torch.testing.assert_close(got_theta, want_theta, rtol=1e-6, atol=1e-6)
        assert (want_theta - want_theta.max()).abs().max() > 5 * LR  # they have moved apart


@pytest.mark.parametrize(("library", "architecture"), pairs.DIFFERENCES)
def test_what_differs_begins_the_same_and_stays_near(library: str, architecture: str) -> None:
    ours, theirs = two(library, architecture, DEAD)
    got, want = losses(ours, theirs)
    assert got[0] == pytest.approx(want[0], rel=1e-6)
    assert got[-1] != pytest.approx(want[-1], rel=1e-6)
    assert got == pytest.approx(want, rel=5e-2)


@pytest.mark.parametrize("architecture", AUXK)
def test_dictionary_learning_with_auxk_is_near(architecture: str) -> None:
    ours, theirs = two("dictionary-learning", architecture, DEAD)
    got, want = losses(ours, theirs)
    assert bool(ours.model.dead.any())
    assert got == pytest.approx(want, rel=1e-2)


@pytest.mark.parametrize(
    ("library", "architecture"), [pair for pair in pairs.PAIRS if pair[1] in AUXK[1:]]
)
def test_thresholds_are_estimated_as_the_library_does(library: str, architecture: str) -> None:
    """On the codes of the same batches; dictionary-learning begins after its step 1000."""
    ours, theirs = two(library, architecture, 10**9)
    assert isinstance(ours.model.activation, ksae.BatchTopK)
    if library == "sae-lens":
        losses(ours, theirs)
        want = theirs.model.topk_threshold
    else:
        ae, steps = theirs.trainer.ae, 1040
        generator = torch.Generator().manual_seed(0)
        for step in range(steps):
            code = torch.randn(8, 16, generator=generator)  # at times no value is positive
            code = code.relu() if step % 50 else -code.abs()
            if step > theirs.trainer.threshold_start_step:
                theirs.trainer.update_threshold(code)
            values = code.relu().flatten()
            batch = Code(values, torch.arange(len(values)), torch.tensor([0, len(values)]))
            ours.model.activation.observe(ours.model, batch)
        want = ae.threshold
    got = ours.model.get_buffer("threshold")
    assert float(got) > 0
    assert float(got) == pytest.approx(float(want), rel=1e-6)


@pytest.mark.parametrize("architecture", families.ARCHITECTURES)
def test_contestants_of_an_architecture_reconstruct_alike(architecture: str) -> None:
    """What the suite `families` times: the same code from the same weights, with every default."""
    x = batches("normal", N, d, 1)[0]
    said = {}
    for name, make in families.CONTESTANTS.items():
        if name.endswith(f", {architecture}"):
            contestant = make(initial_weights(F, d), k, LR)
            getattr(contestant, "prepare", lambda x: None)(x)
            said[name] = contestant.fvu(contestant.step(x), x)
    assert len(said) == 4
    first = next(iter(said.values()))
    assert said == pytest.approx(dict.fromkeys(said, first), rel=1e-4)


def test_the_study_compares_them_and_goes_on_where_it_was_stopped(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    study = tiny_study(monkeypatch, "families")
    words = ["--d-sae", "32", "--k", "4", "--steps", "24", "--batch", "32", "--out", str(tmp_path)]
    monkeypatch.setattr(pairs, "PAIRS", [("sae-lens", "BatchTopK"), ("no-library", "TopK")])
    assert study.main(words) == 0
    record = json.loads((tmp_path / "families_study.json").read_text())
    done, failed = record["cells"]
    assert abs(done["difference"]) < 1e-3 and done["first"] > done["ksae"] > 0
    assert "KeyError" in failed["failure"]
    table = (tmp_path / "families_study.md").read_text()
    assert "| sae-lens | BatchTopK |" in table and "| no-library | TopK | KeyError" in table
    monkeypatch.setattr(study, "run", lambda *_: {"failure": "again"})
    assert study.main(words) == 0
    again = json.loads((tmp_path / "families_study.json").read_text())["cells"]
    assert again[0] == done and again[1]["failure"] == "again"
