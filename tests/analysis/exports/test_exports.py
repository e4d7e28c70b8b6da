# SPDX-License-Identifier: Apache-2.0
"""Exports against what their readers take."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from toy_language_model import HOOK, D, contexts, llama, tokenizer

from ksae import TopKSAE
from ksae.activations import capture
from ksae.analysis.dashboard import build, read_labels
from ksae.analysis.exports import delphi, neuronpedia, saedashboard
from ksae.analysis.exports.pages import Pages
from ksae.errors import UserError

F, K = 40, 3
LABELS = {3: "three", 39: "<b>last</b>"}
# The fields of SAEDashboard 0.8.0's NeuronpediaDashboardFeature and -Activation.
FEATURE = {
    "feature_index", "neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1",
    "correlated_neurons_indices", "correlated_neurons_l1", "correlated_neurons_pearson",
    "correlated_features_indices", "correlated_features_l1", "correlated_features_pearson",
    "neg_str", "neg_values", "pos_str", "pos_values", "frac_nonzero", "freq_hist_data_bar_values",
    "freq_hist_data_bar_heights", "logits_hist_data_bar_heights", "logits_hist_data_bar_values",
    "n_prompts_total", "n_tokens_in_prompt", "dataset", "activations", "decoder_weights_dist",
    "vector",
}  # fmt: skip
ACTIVATION = {"bin_min", "bin_max", "bin_contains", "tokens", "values", "qualifying_token_index"}
# The columns of Neuronpedia's table Activation.
ROW = {
    "id", "tokens", "dataIndex", "index", "layer", "modelId", "dataSource", "maxValue",
    "maxValueTokenIndex", "minValue", "values", "dfaValues", "dfaTargetIndex", "dfaMaxValue",
    "creatorId", "createdAt", "lossValues", "logitContributions", "binMin", "binMax", "binContains",
    "qualifyingTokenIndex",
}  # fmt: skip


def coder() -> TopKSAE:
    torch.manual_seed(3)
    return TopKSAE(D, F, K)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("exports") / "pages"
    build(coder(), llama(), tokenizer(), contexts(), HOOK, out, labels=LABELS, title="toy")
    return out


def lines(path: Path) -> list[dict[str, Any]]:
    data = path.read_bytes()
    text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    return [json.loads(line) for line in text.splitlines()]


def test_batches_of_saedashboard(folder: Path, tmp_path: Path) -> None:
    assert saedashboard(folder, tmp_path, model="toy") == 2
    pages = Pages.open(folder)
    records = [r for _, chunk in pages.chunks() for r in chunk]
    latent = 0
    for number in range(2):
        batch = json.loads((tmp_path / f"batch-{number}.json").read_text())
        assert batch.keys() == {"model_id", "layer", "sae_set", "sae_id_suffix", "features"}
        assert (batch["model_id"], batch["layer"]) == ("toy", 1)
        for feature in batch["features"]:
            assert feature.keys() == FEATURE and feature["feature_index"] == latent
            record = records[latent]
            assert feature["frac_nonzero"] == record["fired"] / pages.meta["tokens"]
            assert sum(feature["freq_hist_data_bar_heights"]) == record["fired"]
            assert len(feature["pos_str"]) == len(feature["pos_values"]) == 10
            assert feature["pos_values"] == sorted(feature["pos_values"], reverse=True)
            assert feature["neg_values"] == sorted(feature["neg_values"])
            for activation in feature["activations"]:
                assert activation.keys() == ACTIVATION
                assert len(activation["tokens"]) == len(activation["values"])
                assert max(activation["values"]) > 0
            if record["fired"]:
                assert max(feature["activations"][0]["values"]) == pytest.approx(record["max"])
            latent += 1
    assert latent == F


def test_lines_of_neuronpedia(folder: Path, tmp_path: Path) -> None:
    where = neuronpedia(folder, tmp_path, model="toy", source_set="res-x")
    assert where == tmp_path / "toy" / "1-res-x"
    (source,) = lines(where / "source.jsonl")
    assert (source["id"], source["modelId"], source["setName"]) == ("1-res-x", "toy", "res-x")
    (group,) = lines(where / "sourceset.jsonl")
    (release,) = lines(where / "release.jsonl")
    assert group["releaseName"] == release["name"] and group["name"] == source["setName"]
    assert lines(where / "model.jsonl")[0]["id"] == "toy"
    features = lines(where / "features" / "batch-0.jsonl.gz")
    assert [f["index"] for f in features] == [str(i) for i in range(F)]
    activations = lines(where / "activations" / "batch-0.jsonl.gz")
    assert len({a["id"] for a in activations}) == len(activations)
    for row in (*features, *activations):
        assert (row["modelId"], row["layer"]) == ("toy", "1-res-x")
    for a in activations:
        assert a.keys() == ROW
        assert a["values"][a["maxValueTokenIndex"]] == a["maxValue"] == max(a["values"])
        assert a["values"][a["qualifyingTokenIndex"]] > 0 and len(a["tokens"]) == len(a["values"])
    for f in features:
        mine = [a["maxValue"] for a in activations if a["index"] == f["index"]]
        assert f["maxActApprox"] == max(mine, default=0.0)
        assert len(f["topkCosSimIndices"]) == len(f["topkCosSimValues"]) == 8


def test_labels_come_back(folder: Path, tmp_path: Path) -> None:
    where = neuronpedia(folder, tmp_path, model="toy")
    assert read_labels(where / "explanations" / "batch-0.jsonl.gz", F) == LABELS
    cut = tmp_path / "cut.jsonl.gz"
    cut.write_bytes((where / "explanations" / "batch-0.jsonl.gz").read_bytes()[:40])
    with pytest.raises(UserError, match="cannot read"):
        read_labels(cut, F)
    cut.write_bytes(b"no gzip")
    with pytest.raises(UserError, match="cannot read"):
        read_labels(cut, F)


@pytest.mark.parametrize("splits", [1, 3])
def test_cache_of_delphi(tmp_path: Path, splits: int) -> None:
    """Every firing is there, as delphi's loader adds them up, and no other."""
    text = contexts()
    folder = delphi(coder(), llama(), text, HOOK, tmp_path, model_name="toy", splits=splits)
    config = json.loads((folder / "config.json").read_text())
    assert config["cache_ctx_len"] == 24 and config["model_name"] == "toy"
    dense = np.zeros((*text.ids.shape, F), np.float32)
    files = sorted(folder.glob("*.safetensors"))
    assert len(files) == splits
    ranges = sorted(tuple(map(int, f.stem.split("_"))) for f in files)
    assert ranges[0][0] == 0 and ranges[-1][1] == F - 1
    assert all(a[1] + 1 == b[0] for a, b in itertools.pairwise(ranges))
    for file in files:
        data = load_file(file)
        assert data["locations"].dtype == np.uint16 and data["activations"].dtype == np.float16
        np.testing.assert_array_equal(data["tokens"], text.ids.numpy())
        where = data["locations"].astype(np.int64)
        where[:, 2] += int(file.stem.split("_")[0])
        dense[tuple(where.T)] = data["activations"]
    inputs = {"input_ids": text.ids.long(), "attention_mask": text.attended().long()}
    with torch.no_grad():
        expected = coder().encode_dense(capture(llama(), [HOOK], inputs)[HOOK]).numpy()
    expected = expected * text.mask().numpy()[..., None]
    np.testing.assert_allclose(dense, expected, rtol=1e-3, atol=1e-5)


def test_mistakes(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="must be a dashboard"):
        saedashboard(tmp_path / "none", tmp_path / "out", model="toy")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "meta.js").write_text("alert(1)")
    with pytest.raises(UserError, match="is not as it was"):
        neuronpedia(tmp_path, tmp_path / "out", model="toy")
    big = coder()
    with torch.no_grad():
        big.W_enc *= 1e7
    with pytest.raises(UserError, match="must fit float16"):
        delphi(big, llama(), contexts(), HOOK, tmp_path / "d", model_name="toy")
    build(coder(), llama(), tokenizer(), contexts(), "model.layers.1:out", tmp_path / "path")
    with pytest.raises(UserError, match="must name a layer"):
        saedashboard(tmp_path / "path", tmp_path / "out", model="toy")
