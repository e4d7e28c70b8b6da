# SPDX-License-Identifier: Apache-2.0
"""SAELens' own runner, from a language model to files, on our classes."""

from __future__ import annotations

import pytest
import sae_lens
import torch
from agree import assert_same_curve
from datasets import Dataset
from sae_lens.training.sae_trainer import SAETrainer
from transformer_lens import HookedTransformer, HookedTransformerConfig

import ksae
from ksae.interop import saelens

D, F, K, CONTEXT, BATCH, STEPS = 32, 128, 4, 16, 128, 60
INPUT, OUTPUT = "blocks.0.ln2.hook_normalized", "blocks.0.hook_mlp_out"


@pytest.fixture(scope="module")
def language_model():
    """Two layers of random weights."""
    cfg = HookedTransformerConfig(
        n_layers=2,
        d_model=D,
        n_ctx=CONTEXT,
        d_head=16,
        d_mlp=64,
        d_vocab=64,
        act_fn="relu",
        normalization_type="LN",
        seed=0,
        device="cpu",
    )
    return HookedTransformer(cfg)


def config(sae, tmp_path, **settings):
    return sae_lens.LanguageModelSAERunnerConfig(
        sae=sae,
        model_name="random",
        hook_name=settings.pop("hook_name", "blocks.1.hook_resid_pre"),
        dataset_path="random",
        context_size=CONTEXT,
        n_batches_in_buffer=32,
        store_batch_size_prompts=16,
        training_tokens=STEPS * BATCH,
        train_batch_size_tokens=BATCH,
        lr=5e-3,
        dead_feature_window=5,
        logger=sae_lens.LoggingConfig(log_to_wandb=False),
        checkpoint_path=str(tmp_path / "checkpoints"),
        output_path=str(tmp_path / "output"),
        verbose=False,
        **settings,
    )


def tokens():
    rows = torch.randint(64, (2 * STEPS * BATCH // CONTEXT, CONTEXT))
    return Dataset.from_dict({"tokens": rows.tolist()})


def run(monkeypatch, runner, cfg, language_model):
    """What the runner returns, and the loss of each step."""
    losses = []
    step = SAETrainer.step

    def recorded(self, batch):
        out = step(self, batch)
        losses.append(float(out.loss.detach()))
        return out

    with monkeypatch.context() as patch:
        patch.setattr(SAETrainer, "step", recorded)
        torch.manual_seed(0)
        own = runner(cfg, override_model=language_model, override_dataset=tokens())
        return own.run(), losses


def test_the_runner_has_the_curve_of_the_original(monkeypatch, language_model, tmp_path):
    sizes = {"d_in": D, "d_sae": F, "k": K}
    curves = []
    for name, sae in (
        ("theirs", sae_lens.TopKTrainingSAEConfig(**sizes)),
        ("ours", saelens.TopKTrainingSAEConfig(**sizes)),
    ):
        cfg = config(sae, tmp_path / name, n_checkpoints=1)
        trained, losses = run(
            monkeypatch, sae_lens.LanguageModelSAETrainingRunner, cfg, language_model
        )
        curves.append(losses)
    assert type(trained) is saelens.TopKTrainingSAE
    assert_same_curve(curves)
    loaded = sae_lens.SAE.load_from_disk(tmp_path / "ours" / "output")
    assert type(loaded) is sae_lens.TopKSAE  # without ksae
    x = torch.randn(8, D)
    torch.testing.assert_close(loaded(x), trained(x), rtol=1e-4, atol=1e-5)
    for name in ("theirs", "ours"):  # what the runner wrote, read by ksae
        theirs = sae_lens.SAE.load_from_disk(tmp_path / name / "output")
        model = ksae.load(tmp_path / name / "output", fold=True)
        torch.testing.assert_close(model(x).recon, theirs(x), rtol=1e-4, atol=1e-5)
    # The same from our import, but for torch's fused Adam: from here, and from a checkpoint.
    trained, losses = run(
        monkeypatch,
        saelens.LanguageModelSAETrainingRunner,
        config(sae, tmp_path / "fused"),
        language_model,
    )
    assert_same_curve([curves[0], losses])
    (checkpoint,) = (tmp_path / "ours" / "checkpoints").glob("*/*")
    again = config(sae, tmp_path / "again", resume_from_checkpoint=str(checkpoint))
    resumed, rest = run(monkeypatch, saelens.LanguageModelSAETrainingRunner, again, language_model)
    assert 0 < len(rest) < STEPS
    assert type(resumed) is saelens.TopKTrainingSAE
    assert rest[0] < 0.9 * losses[0]


@pytest.mark.parametrize("skip", [False, True], ids=["plain", "skip"])
def test_a_transcoder_from_a_language_model(skip, monkeypatch, language_model, tmp_path):
    kind = (
        saelens.TopKTrainingSkipTranscoderConfig if skip else saelens.TopKTrainingTranscoderConfig
    )
    sae = kind(d_in=D, d_out=D, d_sae=F, k=K, hook_name_out=OUTPUT)
    cfg = config(sae, tmp_path, hook_name=INPUT)
    trained, losses = run(monkeypatch, saelens.TranscoderTrainingRunner, cfg, language_model)
    assert len(losses) == STEPS
    assert losses[-1] < 0.7 * losses[0]
    loaded = sae_lens.SAE.load_from_disk(tmp_path / "output")
    assert type(loaded) is (saelens.TopKSkipTranscoder if skip else saelens.TopKTranscoder)
    metadata = loaded.cfg.metadata
    assert (metadata.hook_name, metadata.hook_name_out) == (INPUT, OUTPUT)
    rows = torch.randint(64, (4, CONTEXT))
    _, cache = language_model.run_with_cache(rows, names_filter=[INPUT, OUTPUT])
    with torch.no_grad():
        error = (loaded(cache[INPUT]) - cache[OUTPUT]).square().sum()
        torch.testing.assert_close(
            loaded(cache[INPUT]), trained(cache[INPUT]), rtol=1e-4, atol=1e-5
        )
    # SAELens' transformer puts the prediction where the target was, without any skip connection.
    attached = sae_lens.HookedSAETransformer(language_model.cfg)
    attached.load_state_dict(language_model.state_dict())
    swap = [(OUTPUT, lambda out, hook: loaded.decode(loaded.encode(cache[INPUT])))]
    torch.testing.assert_close(
        attached.run_with_saes(rows, saes=[loaded]),
        language_model.run_with_hooks(rows, fwd_hooks=swap),
        rtol=1e-4,
        atol=1e-5,
    )
    variance = (cache[OUTPUT] - cache[OUTPUT].mean((0, 1))).square().sum()
    assert error < variance


def test_the_command_line_of_the_library_knows_our_classes():
    from sae_lens.llm_sae_training_runner import _parse_cfg_args

    args = ["--architecture", "ksae_topk", "--d_in", "16", "--d_sae", "64", "--k", "3"]
    cfg = _parse_cfg_args(args)
    assert cfg.sae == saelens.TopKTrainingSAEConfig(d_in=16, d_sae=64, k=3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"out": None}, f"cfg.sae.hook_name_out must be a hook other than '{INPUT}', got None"),
        ({"out": INPUT}, "cfg.sae.hook_name_out must be a hook other than"),
        ({"hook_head_index": 1}, "cfg.hook_head_index must not be set, got 1"),
        ({"use_cached_activations": True}, "cfg.use_cached_activations must not be set"),
    ],
)
def test_the_transcoder_runner_refuses(settings, message, tmp_path):
    out = settings.pop("out", OUTPUT)
    sae = saelens.TopKTrainingTranscoderConfig(d_in=D, d_out=D, d_sae=F, k=K, hook_name_out=out)
    cfg = config(sae, tmp_path, hook_name=INPUT, **settings)
    with pytest.raises(ValueError, match=f"TranscoderTrainingRunner: {message}"):
        saelens.TranscoderTrainingRunner(cfg)
