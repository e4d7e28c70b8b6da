# SPDX-License-Identifier: Apache-2.0
"""What SAELens' trainer saves, read as what SAELens itself makes of it; its matching pursuit both
ways."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import sae_lens
import torch
from sae_lens.config import LoggingConfig, SAETrainerConfig
from sae_lens.training.sae_trainer import SAETrainer

import ksae
from ksae.errors import UserError
from ksae.interop import convert

D, F, K, N = 16, 40, 4, 64
X = torch.randn(50, D, generator=torch.Generator().manual_seed(1))
CLASSES: dict[str, tuple[dict[str, Any], Any]] = {
    "TopK": ({"k": K}, ksae.TopK(K)),
    "BatchTopK": ({"k": K}, ksae.BatchTopK(K, "saelens")),
    "MatryoshkaBatchTopK": (
        {"k": K, "matryoshka_widths": [8, 20]},
        ksae.BatchTopK(K, "saelens"),
    ),
    "JumpReLU": ({"jumprelu_init_threshold": 0.3}, ksae.JumpReLU()),
    "Standard": ({}, ksae.ReLU()),
    "Gated": ({}, ksae.Gated()),
    "MatchingPursuit": (
        {"max_iterations": 7, "residual_threshold": 1.0, "decoder_init_norm": 1.0},
        ksae.MatchingPursuit(7, 1.0, stop_on_repeat=True),
    ),
}


@torch.enable_grad()
def trained(name: str, folder: Path, **more: Any) -> tuple[Any, Path]:
    """A training class after some steps of the trainer, and its last checkpoint."""
    torch.manual_seed(0)
    options = dict(CLASSES[name][0] if name in CLASSES else {"k": K}, **more)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        config = getattr(sae_lens, f"{name}TrainingSAEConfig")(d_in=D, d_sae=F, **options)
        sae = getattr(sae_lens, f"{name}TrainingSAE")(config)
    settings = SAETrainerConfig(
        total_training_samples=20 * N, train_batch_size_samples=N, lr=1e-2, lr_end=1e-2,
        checkpoint_path=str(folder), save_final_checkpoint=True, n_checkpoints=0, device="cpu",
        logger=LoggingConfig(log_to_wandb=False),
    )  # fmt: skip
    SAETrainer(settings, sae, data_provider=(torch.randn(N, D) for _ in range(99))).fit()
    return sae, next(folder.glob("final_*"))


@torch.no_grad()
@pytest.mark.parametrize("name", CLASSES)
def test_a_checkpoint_is_what_saelens_makes_of_it(name: str, tmp_path: Path) -> None:
    scaled = "TopK" in name  # by decoder norms, which are folded
    sae, path = trained(name, tmp_path / "run")
    ours = ksae.load(path, fold=scaled).eval()
    assert ours.activation == CLASSES[name][1]
    sae.save_inference_model(str(tmp_path / "use"))
    theirs = sae_lens.SAE.load_from_disk(str(tmp_path / "use"))
    torch.testing.assert_close(ours.encode_dense(X), theirs.encode(X))
    torch.testing.assert_close(ours(X).recon, theirs(X))
    if "Batch" in name:
        assert ours.threshold == sae.topk_threshold > 0
        assert ours.prefixes == ((8, 20, F) if "Matryoshka" in name else ())
        assert not ours.prefixes or ours.prefix_weights == "sum"
    if scaled:
        with pytest.raises(UserError, match="cannot hold scaling by decoder norms"):
            ksae.load(path)


@pytest.mark.parametrize("name", ["BatchTopK", "MatryoshkaBatchTopK", "MatchingPursuit"])
def test_training_goes_on(name: str, tmp_path: Path) -> None:
    scale = {} if name == "MatchingPursuit" else {"rescale_acts_by_decoder_norm": False}
    sae, path = trained(name, tmp_path / "run", **scale)
    ours = ksae.load(path).train()
    step = ksae.TrainStep(ours, lr=1e-2, fused=name != "MatchingPursuit")
    losses = [float(step(X)["fvu"]) for _ in range(20)]
    assert losses[-1] < losses[0]
    if name != "MatchingPursuit":
        assert float(ours.threshold) != float(sae.topk_threshold)


def test_an_architecture_that_ksae_cannot_hold(tmp_path: Path) -> None:
    _, path = trained("AbsTopK", tmp_path / "run")
    with pytest.raises(UserError, match=r"architecture of .* must be one of .*, got 'abstopk'"):
        ksae.load(path)


@torch.no_grad()
def test_an_older_checkpoint_has_the_logarithm_of_thresholds(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    _, path = trained("JumpReLU", tmp_path / "run")
    want = ksae.load(path).eval()(X).recon
    state = load_file(path / "sae_weights.safetensors")
    state["log_threshold"] = state.pop("threshold").log()
    save_file(state, path / "sae_weights.safetensors")
    torch.testing.assert_close(ksae.load(path).eval()(X).recon, want)


@torch.no_grad()
@pytest.mark.parametrize("steps", [None, 9])
@pytest.mark.parametrize("stop", [True, False], ids=["stops", "goes on"])
@pytest.mark.parametrize("threshold", [0.0, 1.5])
def test_matching_pursuit_both_ways(
    steps: int | None, stop: bool, threshold: float, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    config = sae_lens.MatchingPursuitSAEConfig(
        d_in=D, d_sae=F, max_iterations=steps, residual_threshold=threshold,
        stop_on_duplicate_support=stop,
    )  # fmt: skip
    theirs = sae_lens.MatchingPursuitSAE(config)
    theirs.W_dec.copy_(torch.nn.functional.normalize(torch.randn(F, D), dim=1))
    theirs.b_dec.copy_(0.1 * torch.randn(D))
    theirs.save_model(str(tmp_path / "a"))
    ours = ksae.load(tmp_path / "a").eval()
    assert ours.activation == ksae.MatchingPursuit(steps or D, threshold, stop)
    code = theirs.encode(X)
    torch.testing.assert_close(ours.encode_dense(X), code, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours(X).recon, theirs(X), rtol=1e-4, atol=1e-5)
    ours.save(tmp_path / "m")
    convert.convert(tmp_path / "m", tmp_path / "b", "saelens")
    again = sae_lens.SAE.load_from_disk(str(tmp_path / "b"))
    assert isinstance(again, sae_lens.MatchingPursuitSAE)
    assert torch.equal(again.encode(X), code)
    with pytest.raises(UserError, match="sparsify cannot hold activation = pursuit"):
        convert.convert(tmp_path / "m", tmp_path / "c", "sparsify", fold=True)


@torch.no_grad()
@pytest.mark.parametrize("shift", [0.0, 0.1])
def test_matching_pursuit_that_does_not_subtract_b_dec(shift: float, tmp_path: Path) -> None:
    """Read where b_dec is 0; by SAELens' defaults where fields are left out."""
    config = sae_lens.MatchingPursuitSAEConfig(d_in=D, d_sae=F, apply_b_dec_to_input=False)
    theirs = sae_lens.MatchingPursuitSAE(config)
    theirs.W_dec.copy_(torch.nn.functional.normalize(torch.randn(F, D), dim=1))
    theirs.b_dec.fill_(shift)
    theirs.save_model(str(tmp_path / "a"))
    file = tmp_path / "a" / "cfg.json"
    fields = json.loads(file.read_text())
    for name in ("residual_threshold", "stop_on_duplicate_support"):
        del fields[name]
    file.write_text(json.dumps(fields))
    if shift:
        with pytest.raises(UserError, match=r"b_dec of .* must be 0 for matching_pursuit with"):
            ksae.load(tmp_path / "a")
        return
    ours = ksae.load(tmp_path / "a").eval()
    assert ours.activation == ksae.MatchingPursuit(D, 1e-2, True)
    torch.testing.assert_close(ours(X).recon, theirs(X), rtol=1e-4, atol=1e-5)
