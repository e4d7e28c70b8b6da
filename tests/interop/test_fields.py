# SPDX-License-Identifier: Apache-2.0
"""A field that decides what a file computes is read, or refused: in folders of old releases too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import randn
from safetensors.torch import load_file, save_file

import ksae
from ksae.errors import UserError
from ksae.interop import convert
from ksae.interop.formats import Coder

D, F, K = 6, 10, 3
OLD_TOPK: dict[str, Any] = {
    "architecture": "standard",
    "activation_fn_str": "topk",
    "activation_fn_kwargs": {"k": K},
    "normalize_activations": False,
    "hook_point": "blocks.3.hook_resid_pre",
}


def make(**changes: Any) -> Coder:
    sizes = {"W_enc": (F, D), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,)}
    tensors = {name: randn(*size, seed=i) for i, (name, size) in enumerate(sizes.items())}
    return Coder(**{**tensors, "activation": "topk", "k": K, "centred": True, **changes})


def folder(path: Path, config: dict[str, Any], **tensors: torch.Tensor) -> Path:
    """A SAELens folder with exactly this configuration beside d_in, d_sae and dtype."""
    whole = make()
    weights = {"W_enc": whole.W_enc.T, "b_enc": whole.b_enc, "W_dec": whole.W_dec}
    weights |= {"b_dec": whole.b_dec, **tensors}
    path.mkdir()
    save_file({n: t.contiguous() for n, t in weights.items()}, path / "sae_weights.safetensors")
    sizes = {"d_in": D, "d_sae": F, "dtype": "float32"}
    (path / "cfg.json").write_text(json.dumps(sizes | config))
    return path


TOPK = {
    "standard with activation_fn_str": OLD_TOPK,
    "no architecture": {n: v for n, v in OLD_TOPK.items() if n != "architecture"},
    "k in activation_fn_kwargs": {"architecture": "topk", "activation_fn_kwargs": {"k": K}},
    "normalize_activations null": OLD_TOPK | {"normalize_activations": None},
    "an old version": OLD_TOPK | {"sae_lens_version": "5.11.0"},
    "both spellings": OLD_TOPK | {"activation_fn": "topk"},
}


@pytest.mark.parametrize("name", TOPK)
def test_an_old_saelens_topk_is_a_topk(name: str, tmp_path: Path) -> None:
    path = folder(tmp_path / "s", TOPK[name], scaling_factor=torch.ones(D))
    model = ksae.load(path)
    assert isinstance(model, ksae.TopKSAE) and model.k == K
    x = randn(20, D, seed=9)
    u = (x - model.b_dec) @ model.W_enc.T + model.b_enc
    values, indices = u.topk(K)
    expected = torch.zeros_like(u).scatter(1, indices, values.relu()) @ model.W_dec + model.b_dec
    torch.testing.assert_close(model(x).recon, expected)
    coder = convert.convert(path, tmp_path / "c", "circuit-tracer", fold=True).coder
    assert (coder.activation, coder.k, coder.normalization) == ("topk", K, "none")
    assert "activation: topk" in (tmp_path / "c" / "config.yaml").read_text()
    convert.convert(path, tmp_path / "again", "saelens")
    assert convert.read(tmp_path / "again")[1].k == K


@pytest.mark.parametrize("config", [{}, {"activation_fn_str": "relu"}], ids=["nothing", "relu"])
def test_an_old_saelens_folder_without_topk_is_a_relu(
    config: dict[str, str], tmp_path: Path
) -> None:
    coder = convert.read(folder(tmp_path / "s", config))[1]
    assert (coder.activation, coder.k, coder.centred) == ("relu", None, True)


def test_normalize_activations_true_is_the_april_update(tmp_path: Path) -> None:
    path = folder(tmp_path / "s", OLD_TOPK | {"normalize_activations": True})
    assert convert.read(path)[1].normalization == "expected_average_only_in"
    with pytest.raises(UserError, match="cannot hold input normalization"):
        ksae.load(path)


REFUSED = {
    "another activation": ({"activation_fn_str": "tanh-relu"}, "activation_fn_str", "tanh-relu"),
    "topk without k": ({"activation_fn_str": "topk"}, "activation_fn_str", "topk"),
    "hook_z by name": (OLD_TOPK | {"hook_point": "blocks.3.attn.hook_z"}, "reshape_", "hook_z"),
    "normalization": ({"normalize_activations": "batch"}, "normalize_activations", "batch"),
    "null today": (
        {"architecture": "standard", "normalize_activations": None, "sae_lens_version": "6.5.0"},
        "normalize_activations",
        None,
    ),
    "two activations today": (
        OLD_TOPK | {"metadata": {"sae_lens_version": "6.5.0"}, "normalize_activations": "none"},
        "activation_fn_str",
        "topk",
    ),
    "no architecture today": ({"sae_lens_version": "6.5.0"}, "architecture", None),
    "a transcoder that subtracts b_dec": (
        {"architecture": "transcoder", "apply_b_dec_to_input": True},
        "apply_b_dec_to_input",
        True,
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_saelens_would_not_read_so_is_refused(name: str, tmp_path: Path) -> None:
    config, field, got = REFUSED[name]
    with pytest.raises(UserError, match=rf"load: {field}\S* of .* must be .*, got {got!r}"):
        ksae.load(folder(tmp_path / "s", config))


def test_a_scale_of_saelens_other_than_one_is_refused(tmp_path: Path) -> None:
    path = folder(tmp_path / "s", OLD_TOPK, scaling_factor=torch.full((D,), 2.0))
    with pytest.raises(UserError, match=r"scaling_factor of .* must be 1"):
        ksae.load(path)


@pytest.mark.parametrize("name", ["saelens", "circuit-tracer"])
def test_a_threshold_below_zero_is_refused(name: str, tmp_path: Path) -> None:
    """There one library has a ReLU and the other has none."""
    low = make(activation="jumprelu", k=None, centred=False, threshold=torch.full((F,), -0.1))
    convert.write(low, tmp_path / "s", name)
    with pytest.raises(
        UserError, match=r"threshold of .* must be at least 0 and finite, got -0\.1"
    ):
        convert.read(tmp_path / "s")


def test_a_signed_sparsify_file_is_refused(tmp_path: Path) -> None:
    convert.write(make(), tmp_path / "s", "sparsify")
    config = json.loads((tmp_path / "s" / "cfg.json").read_text())
    (tmp_path / "s" / "cfg.json").write_text(json.dumps({**config, "signed": True}))
    with pytest.raises(UserError, match=r"signed of .* must be False"):
        ksae.load(tmp_path / "s")


def test_nvidia_batch_topk_is_refused_and_its_buffers_are_kept(tmp_path: Path) -> None:
    convert.write(make(), tmp_path / "a.pt", "nvidia")
    file = torch.load(tmp_path / "a.pt", weights_only=True)
    file["model_state_dict"]["batchtopk_threshold"] = torch.tensor([0.5])
    torch.save(file, tmp_path / "a.pt")
    convert.convert(tmp_path / "a.pt", tmp_path / "b.pt", "nvidia")
    back = torch.load(tmp_path / "b.pt", weights_only=True)["model_state_dict"]
    assert back["batchtopk_threshold"] == 0.5
    file["model_config"]["batch_topk"] = True
    torch.save(file, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"batch_topk of .* must be False"):
        ksae.load(tmp_path / "a.pt")


def test_the_weights_of_saelens_are_not_touched(tmp_path: Path) -> None:
    path = folder(tmp_path / "s", OLD_TOPK)
    convert.convert(path, tmp_path / "t", "saelens")
    one, two = (load_file(p / "sae_weights.safetensors") for p in (path, tmp_path / "t"))
    assert one.keys() == two.keys() and all(torch.equal(one[n], two[n]) for n in one)
