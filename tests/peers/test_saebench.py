# SPDX-License-Identifier: Apache-2.0
"""The adapter inside SAEBench: its core metrics and its sparse probing, beside its own TopK SAE.

The language model is a tiny one with random weights, so that nothing is fetched.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import sae_bench.custom_saes.topk_sae as topk
import sae_bench.evals.core.main as core
import sae_bench.evals.sparse_probing.probe_training as probing
import sae_bench.sae_bench_utils.activation_collection as collection
import sae_bench.sae_bench_utils.general_utils as general
import torch
import transformer_lens

import ksae
from ksae.analysis.metrics import Accumulator
from ksae.interop.saebench import SAEBenchSAE

D, F, K, LENGTH, PROMPTS = 16, 64, 4, 12, 8
HOOK = "blocks.0.hook_resid_post"


@pytest.fixture(scope="module")
def model():
    config = transformer_lens.HookedTransformerConfig(
        n_layers=2, d_model=D, n_ctx=LENGTH, d_head=8, n_heads=2, d_mlp=32, d_vocab=50,
        act_fn="gelu", seed=0, device="cpu",
    )  # fmt: skip
    return transformer_lens.HookedTransformer(config)


@pytest.fixture(scope="module")
def pair(model):
    """The adapter of a coder, and SAEBench's own TopK SAE with its weights."""
    torch.manual_seed(0)
    sae = ksae.TopKSAE(D, F, K)
    theirs = topk.TopKSAE(D, F, K, "tiny", 0, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        sae.b_dec.copy_(torch.randn(D) * 0.1)
        sae.b_enc.copy_(torch.randn(F) * 0.1)
        theirs.W_enc.copy_(sae.W_enc.T)
        for name in ("W_dec", "b_enc", "b_dec"):
            getattr(theirs, name).copy_(getattr(sae, name))
    return SAEBenchSAE(sae, model_name="tiny", hook_layer=0), theirs


def store():
    """What the evaluation asks for tokens; the same ones for each."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, 50, (PROMPTS, LENGTH), generator=generator)
    return SimpleNamespace(get_batch_tokens=lambda n: tokens[:n])


def metrics(sae, model) -> dict[str, float]:
    found, _ = core.get_sparsity_and_variance_metrics(
        sae, model, store(), n_batches=1, compute_l2_norms=True, compute_sparsity_metrics=True,
        compute_variance_metrics=True, compute_featurewise_density_statistics=True,
        eval_batch_size_prompts=PROMPTS, model_kwargs={},
    )  # fmt: skip
    found |= core.get_downstream_reconstruction_metrics(
        sae, model, store(), compute_kl=True, compute_ce_loss=True, n_batches=1,
        eval_batch_size_prompts=PROMPTS,
    )  # fmt: skip
    return found


def test_it_is_taken_as_a_custom_sae(pair) -> None:
    ours, _ = pair
    name, same, sparsity = general.load_and_format_sae("any", ours, "cpu")
    assert same is ours and name == "custom_sae" and sparsity is None


def test_its_core_metrics_are_those_of_its_own_topk_sae(pair, model) -> None:
    ours, theirs = pair
    got, want = metrics(ours, model), metrics(theirs, model)
    assert got.keys() == want.keys() and got["l0"] > 0
    for name in want:
        assert got[name] == pytest.approx(want[name], rel=1e-4, abs=1e-6), name


def test_its_definitions_beside_ours(pair, model) -> None:
    """What it computes of a batch is by name among ours; its mse is divided by the tokens twice."""
    ours, _ = pair
    want = metrics(ours, model)
    with torch.no_grad():
        _, cache = model.run_with_cache(store().get_batch_tokens(PROMPTS), names_filter=[HOOK])
        x = cache[HOOK].reshape(-1, D)
        output = ours.coder(x)
    accumulator = Accumulator(D, F)
    accumulator.update(x, output.recon, output.values, output.indices)
    got = accumulator.results()
    pairs = {
        "l0": "l0",
        "explained_variance_legacy": "explained_variance_legacy",
        "l2_ratio": "norm_ratio",
        "relative_reconstruction_bias": "shrinkage",
        "cossim": "cosine",
    }
    for theirs, name in pairs.items():
        assert got[name] == pytest.approx(want[theirs], rel=1e-4), name
    assert got["squared_error"] / len(x) == pytest.approx(want["mse"], rel=1e-4)


def test_its_sparse_probing_takes_the_codes(pair) -> None:
    """Two classes told apart by one direction, which is a latent's: k = 1 finds it."""
    ours, _ = pair
    torch.manual_seed(2)
    direction = 6 * ours.W_dec[5]
    acts = {
        "0": 0.3 * torch.randn(60, LENGTH, D),
        "1": 0.3 * torch.randn(60, LENGTH, D) + direction,
    }
    parts = [{name: x[part] for name, x in acts.items()} for part in (slice(40), slice(40, 60))]
    codes = [collection.get_sae_meaned_activations(part, ours, 16) for part in parts]
    assert codes[0]["0"].shape == (40, F)
    _, accuracies = probing.train_probe_on_activations(*codes, select_top_k=1)
    assert min(accuracies.values()) > 0.9
