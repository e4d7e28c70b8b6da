# SPDX-License-Identifier: Apache-2.0
"""The study of gradient SAEs at tiny sizes: it runs, resumes, and its statistics are right."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny_lm
import torch

from ksae.activations import Contexts, harvest

D = 8
TINY = [
    *("--steps", "6", "--batch", "16", "--d-sae", "24", "--ce-tokens", "40", "--threads", "1"),
    *("--steer-tokens", "20", "--steer-latents", "2", "--ks", "2", "4", "--seeds", "0", "1"),
    *("--sweep", "3", "--sweep-k", "4"),
]


@pytest.fixture()
def study() -> Any:
    from ksae.bench.studies import gsae_study

    return gsae_study


def tiny(gsae_data: ModuleType) -> Any:
    lm = tiny_lm.llama(20, D, 12, 11, initializer_range=0.4)
    ids = torch.randint(1, 20, (12, 10), dtype=torch.int32)
    numbers = torch.arange(12, dtype=torch.int32)
    keys = tuple(bytes([i]) for i in range(12))
    contexts = Contexts(ids, torch.full((12,), 10, dtype=torch.int32), numbers, keys, (0,))
    source = harvest(
        lm,
        contexts,
        gsae_data.SITES["mlp"],
        target_hook=gsae_data.SITES["resid"],
        gradient="labels",
        progress=False,
    )
    pairs = gsae_data._pairs(source)
    return gsae_data.StudyData(pairs, pairs, lm, contexts)


def test_one_gradient_serves_both_sites(study: Any) -> None:
    data = tiny(study.gsae_data)
    alone = harvest(
        data.model,
        data.contexts,
        study.gsae_data.SITES["mlp"],
        gradient="labels",
        progress=False,
    )
    x, _, g = next(alone.gradient_sweep(1000))
    torch.testing.assert_close(data.train["mlp"].x, x)
    torch.testing.assert_close(data.train["mlp"].g, g, rtol=1e-4, atol=1e-6)
    assert torch.equal(data.train["resid"].g, data.train["mlp"].g)


def test_the_study_runs_resumes_and_reports(study: Any, tmp_path: Path, monkeypatch) -> None:
    data, trained = tiny(study.gsae_data), []
    monkeypatch.setattr(study.gsae_data, "load", lambda cache, tokens: data)
    train = study.train

    def counted(site, k, seed, beta, args):
        trained.append((k, seed, beta))
        return train(site, k, seed, beta, args)

    monkeypatch.setattr(study, "train", counted)
    threads = torch.get_num_threads()
    try:
        assert study.main([*TINY, "--out", str(tmp_path)]) == 0
        first = json.loads((tmp_path / "gsae_study.json").read_text())
        # 2 sites, 2 k, 2 seeds of TopK and beta 1, then the sweep with TopK at 2 seeds
        assert len(trained) == 2 * 2 * 2 * 2 + 2 * 2
        assert study.main([*TINY, "--out", str(tmp_path)]) == 0
        assert len(trained) == 20  # nothing was run again
        again = dict(first, units=first["units"][1:])
        (tmp_path / "gsae_study.json").write_text(json.dumps(again))
        assert study.main([*TINY, "--out", str(tmp_path), "--sweep"]) == 0
        assert trained[20:] == [(2, 0, None), (2, 0, 1.0)]  # only what was missing
        with pytest.raises(SystemExit, match="was made with"):
            study.main([*TINY, "--out", str(tmp_path), "--steps", "7"])
    finally:
        torch.set_num_threads(threads)
    by_key = {(u["site"], u["k"], u["seed"]): u["models"] for u in first["units"]}
    assert len(by_key) == 8
    assert set(by_key["resid", 4, 0]) == {"topk", "beta 1", "beta 3"}
    one = by_key["resid", 4, 0]["beta 1"]
    for key in ("fvu", "dead", "ce_increase", "kl_sae", "steering", "ce_increase_oracle"):
        assert math.isfinite(one[key]), key
    text = (tmp_path / "gsae_study.md").read_text()
    assert "| resid | 4 | g-SAE beta 3 |" in text and "uses labels (oracle)" in text
    assert "PARTIAL" not in text
    for name in ("gsae_study_ce_increase.png", "gsae_study_fvu.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"


def test_pairs_of_a_unit_start_alike(study: Any) -> None:
    site = tiny(study.gsae_data).train["resid"]
    args = study.parse([*TINY, "--steps", "3"])
    topk, zero = (study.train(site, 2, 0, beta, args) for beta in (None, 0.0))
    assert torch.equal(topk.W_dec, zero.W_dec) and torch.equal(topk.W_enc, zero.W_enc)
    other = study.train(site, 2, 0, 3.0, args)
    assert not torch.equal(topk.W_dec, other.W_dec)


def test_interval_is_students(study: Any) -> None:
    interval = study.gsae_report.interval
    mean, half = interval([1.0, 2.0, 3.0])
    assert mean == 2 and half == pytest.approx(4.303 / math.sqrt(3))
    assert interval([5.0]) == (5.0, math.inf)


def test_differences_are_paired(study: Any) -> None:
    units = [
        {
            "site": "resid",
            "k": 2,
            "seed": seed,
            "models": {
                "topk": dict.fromkeys(("ce_increase", "kl_sae", "fvu", "dead"), 1.0 + seed),
                "beta 1": {
                    **dict.fromkeys(("ce_increase", "ce_increase_oracle"), 0.9 * (1.0 + seed)),
                    **dict.fromkeys(("kl_sae", "fvu"), 1.1 * (1.0 + seed)),
                    "dead": 1.02 + seed,
                    "steering": 3.0,
                    "steering_topk": 2.0,
                },
            },
        }
        for seed in (0, 1, 2)
    ]
    lines = study.gsae_report.table({"units": units}).splitlines()
    assert lines[-1] == (
        "| resid | 2 | g-SAE beta 1 | -10.0% ± 0.0% | +10.0% ± 0.0% | +10.0% ± 0.0% "
        "| +2.0 ± 0.0 points | +50.0% ± 0.0% | -10.0% ± 0.0% |"
    )
