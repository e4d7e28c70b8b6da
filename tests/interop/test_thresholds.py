# SPDX-License-Identifier: Apache-2.0
"""Coders with thresholds and with nested prefixes in the formats of all libraries."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from training import assert_same_coder

import ksae
from ksae.cli import run
from ksae.errors import UserError
from ksae.interop import convert
from ksae.interop.formats import FORMATS, Coder

D, F, K = 6, 10, 3
SINGLE = {"ksae": "a.safetensors", "openai": "a.pt", "nvidia": "b.pt", "gemma-scope": "params.npz"}
JUMPS = ("ksae", "saelens", "dictionary-learning", "gemma-scope", "circuit-tracer")
X = torch.randn(200, D, generator=torch.Generator().manual_seed(1))


def place(folder: Path, name: str) -> Path:
    return folder / SINGLE.get(name, name)


def randomize(model: Any) -> Any:
    g = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            drawn = torch.randn(parameter.shape, generator=g)
            drawn = {"log_threshold": drawn - 1, "theta": drawn.exp() / 3}.get(name, drawn)
            parameter.copy_(drawn)
    return model


def make(kind: str, **options: Any) -> ksae.SparseCoder:
    """A trained-looking coder whose b_dec is not subtracted; "sae": with b_dec = 0, where it is."""
    made = {
        "jumprelu": ksae.JumpReLU(coefficient=0.5, bandwidth=0.25),
        "linear": ksae.JumpReLU(coefficient=0.5, bandwidth=0.25, parametrization="linear"),
        "batchtopk": ksae.BatchTopK(K, "saelens"),
        "matryoshka": ksae.BatchTopK(K),
        "topk": ksae.TopK(K),
    }[kind]
    if kind == "matryoshka":
        options |= {"prefixes": [2, 5, F], "prefix_weights": [0.5, 1.0, 2.0]}
    model = randomize(ksae.Transcoder(D, D, F, activation=made, **options))
    if kind in ("batchtopk", "matryoshka"):
        model.threshold.fill_(0.61803398874989)  # no float32
        model.threshold_batches.fill_(77)
    return model.eval()


def by_hand(model: ksae.SparseCoder, x: Tensor, theta: Tensor) -> Tensor:
    """The reconstruction [N, d] of a JumpReLU with thresholds theta."""
    u = x @ model.W_enc.T + model.b_enc
    return torch.where(u > theta, u.relu(), 0) @ model.W_dec + model.b_dec


REFUSED = {
    "jumprelu": ("sparsify", "openai", "nvidia"),
    "batchtopk": ("sparsify", "openai", "nvidia", "circuit-tracer"),
    "matryoshka": ("sparsify", "openai", "nvidia", "circuit-tracer"),
}
PRINTED = {"openai": "OpenAI's format", "nvidia": "NVIDIA's format"}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_a_format_cannot_hold_is_an_error_that_names_both(kind: str, tmp_path: Path) -> None:
    make(kind).save(tmp_path / "m")
    for name in REFUSED[kind]:
        named = f"convert: {PRINTED.get(name, name)} cannot hold activation = {kind}"
        with pytest.raises(UserError, match=named):
            convert.convert(tmp_path / "m", place(tmp_path / "out", name), name, fold=True)
        assert not place(tmp_path / "out", name).exists()


def test_gemma_scope_holds_thresholds_only(tmp_path: Path) -> None:
    for kind in ("topk", "jumprelu"):
        make(kind, dtype=torch.bfloat16).save(tmp_path / kind)
    with pytest.raises(UserError, match="Gemma Scope's format cannot hold activation = topk"):
        convert.convert(tmp_path / "topk", tmp_path / "a.npz", "gemma-scope")
    with pytest.raises(UserError, match=r"cannot hold .* of torch.bfloat16"):
        convert.convert(tmp_path / "jumprelu", tmp_path / "a.npz", "gemma-scope")
    assert not (tmp_path / "a.npz").exists()


@pytest.mark.parametrize("to", ["saelens", "dictionary-learning", "gemma-scope"])
@pytest.mark.parametrize("kind", ["batchtopk", "matryoshka"])
def test_a_threshold_that_is_not_set_is_refused(kind: str, to: str, tmp_path: Path) -> None:
    model = make(kind)
    model.threshold.fill_(-1)
    model.save(tmp_path / "m")
    with pytest.raises(UserError, match=rf"cannot hold {kind} with threshold = -1 \(not set\)"):
        convert.convert(tmp_path / "m", place(tmp_path, to), to, fold=True)


@pytest.mark.parametrize("kind", ["jumprelu", "linear", "batchtopk", "matryoshka"])
def test_ksae_coders_come_back_as_they_were(kind: str, tmp_path: Path) -> None:
    model = make(kind, auxk="openai", auxk_alpha=0.25)
    with torch.no_grad():
        model.b_dec.zero_()  # so that each format can hold it
    model.save(tmp_path / "m")
    expected = model(X).recon
    jumps = kind in ("jumprelu", "linear")
    for name in sorted(set(FORMATS) - set(REFUSED["jumprelu" if jumps else kind])):
        convert.convert(tmp_path / "m", place(tmp_path, name), name)
        if jumps or name in ("ksae", "dictionary-learning"):
            again = ksae.load(place(tmp_path, name))
            assert_same_coder(again, model)
            convert.convert(place(tmp_path, name), tmp_path / "back", "ksae")
            assert_same_coder(ksae.load(tmp_path / "back"), model)
        again = ksae.load(place(tmp_path, name)).eval()
        assert torch.equal(again(X).recon, expected), name


@pytest.mark.parametrize("option", [
    {"prefixes": [0, 4, F], "prefix_weights": "sum"}, {"multi_k": [1, 5]}, {"multi_topk": True},
    {"auxk": "saelens"},
], ids=str)  # fmt: skip
def test_training_options_are_kept_beside(option: dict[str, Any], tmp_path: Path) -> None:
    model = make("topk", **option)
    with torch.no_grad():
        model.b_dec.zero_()
    model.save(tmp_path / "m")
    for name in sorted(set(FORMATS) - {"gemma-scope"}):
        convert.convert(tmp_path / "m", place(tmp_path, name), name)
        assert_same_coder(ksae.load(place(tmp_path, name)), model)


@pytest.mark.parametrize(
    ("first", "second", "dtype"),
    [
        (first, second, dtype)
        for first in JUMPS[1:]  # ksae's own: test_ksae_coders_come_back_as_they_were
        for second in JUMPS
        for dtype in (torch.float32, torch.float16, torch.bfloat16)
        if dtype != torch.bfloat16 or "gemma-scope" not in (first, second)  # NumPy lacks the type
    ],
)
def test_thresholds_keep_their_bits(
    first: str, second: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    g = torch.Generator().manual_seed(0)
    theta = torch.rand(F, generator=g).to(dtype)
    theta[0] = 0
    sizes = {"W_enc": (F, D), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,)}
    tensors = {name: torch.randn(s, generator=g).to(dtype) for name, s in sizes.items()}
    coder = Coder(**tensors, threshold=theta, activation="jumprelu", k=None, centred=False)
    a, b, c = (place(tmp_path / step, n) for step, n in zip("abc", (first, second, first)))  # noqa: B905
    convert.write(coder, a, first)
    convert.convert(a, b, second)
    convert.convert(b, c, first)
    for path in (a, b, c):
        found = convert.read(path)[1]
        for name in (*sizes, "threshold"):
            one, two = getattr(found, name), getattr(coder, name)
            assert one.dtype == two.dtype and torch.equal(one, two), (path, name)
        assert (found.activation, found.k, found.centred) == ("jumprelu", None, False)


@pytest.mark.parametrize("kind", ["jumprelu", "linear"])
def test_a_threshold_kept_beside_does_not_hide_a_trained_one(kind: str, tmp_path: Path) -> None:
    make(kind).save(tmp_path / "m")
    convert.convert(tmp_path / "m", tmp_path / "s", "saelens")
    convert.convert(tmp_path / "s", tmp_path / "n", "ksae")  # keeps the threshold of s beside
    model = ksae.load(tmp_path / "n")
    with torch.no_grad():
        model.get_parameter(model.activation.learned).add_(0.5)
    model.save(tmp_path / "n")
    convert.convert(tmp_path / "n", tmp_path / "t", "saelens")
    found = load_file(tmp_path / "t" / "sae_weights.safetensors")["threshold"]
    assert torch.equal(found, model.activation.thresholds(model).detach())
    assert_same_coder(ksae.load(tmp_path / "t"), model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("to", ["saelens", "dictionary-learning", "circuit-tracer"])
def test_thresholds_that_are_learned_themselves(
    to: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """They are written as they are, 0 too; one below 0, as another optimizer leaves it, as the 0
    that it counts as, and comes back."""
    model = make("linear", dtype=dtype)
    with torch.no_grad():
        model.theta[2], model.theta[3] = 0, -0.25
    convert.convert(_saved(model, tmp_path), place(tmp_path, to), to)
    found = convert.read(place(tmp_path, to))[1].threshold
    assert found is not None and torch.equal(found.to(dtype), model.theta.detach().relu())
    again = ksae.load(place(tmp_path, to)).eval()
    assert_same_coder(again, model)
    assert torch.equal(again(X).recon, model(X).recon)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["jumprelu", "linear"])
def test_thresholds_that_were_changed_have_the_type_of_sums(
    kind: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    model = make(kind, dtype=dtype)
    convert.convert(_saved(model, tmp_path), tmp_path / "s", "saelens")
    file = tmp_path / "s" / "sae_weights.safetensors"
    held = load_file(file)
    held["threshold"] = held["threshold"].double() + 0.25
    save_file(held, file)
    again = ksae.load(tmp_path / "s").eval()
    found = again.activation.thresholds(again).detach()
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), held["threshold"], rtol=1e-6, atol=0)
    assert again(X.to(dtype)).recon.isfinite().all()


def test_gemma_scope(tmp_path: Path) -> None:
    g = np.random.default_rng(0)
    sizes = {"W_enc": (D, F), "W_dec": (F, D), "b_enc": (F,), "b_dec": (D,), "threshold": (F,)}
    arrays = {n: g.standard_normal(s).astype(np.float32) for n, s in sizes.items()}
    arrays["threshold"] = np.abs(arrays["threshold"])
    folder = tmp_path / "layer_20" / "width_16k" / "average_l0_71"
    folder.mkdir(parents=True)
    np.savez(folder / "params.npz", **arrays)
    model = ksae.load(folder)
    assert isinstance(model, ksae.Transcoder) and isinstance(model.activation, ksae.JumpReLU)
    u = X.numpy() @ arrays["W_enc"] + arrays["b_enc"]
    code = np.where(u > arrays["threshold"], np.maximum(u, 0), 0)
    assert (code > 0).any(0).all() and (code == 0).any(0).all()
    expected = torch.from_numpy(code @ arrays["W_dec"] + arrays["b_dec"])
    torch.testing.assert_close(model(X).recon, expected, rtol=1e-5, atol=1e-5)
    assert run(["convert", str(folder), str(tmp_path / "s"), "--to", "saelens"]) == 0
    assert (
        run(["convert", str(tmp_path / "s"), str(tmp_path / "p.npz"), "--to", "gemma-scope"]) == 0
    )
    with np.load(tmp_path / "p.npz") as back:
        assert set(back) == set(arrays)
        for name, array in arrays.items():
            assert np.array_equal(back[name], array), name


def test_arrays_that_are_damaged_or_pickled_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "params.npz"
    convert.convert(_saved(make("jumprelu"), tmp_path), path, "gemma-scope")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot read"):
        ksae.load(path)
    np.savez(path, W_enc=np.array([{}], dtype=object), threshold=np.zeros(1))
    with pytest.raises(UserError, match="cannot read"):
        ksae.load(path)
    for theta in (-0.5, float("inf"), float("nan")):
        shapes = {"W_enc": (D, F), "W_dec": (F, D), "b_enc": (F,), "b_dec": (D,)}
        rest = {n: np.zeros(s, np.float32) for n, s in shapes.items()}
        np.savez(path, **rest, threshold=np.full(F, theta, np.float32))
        with pytest.raises(UserError, match=r"threshold of .* must be at least 0 and finite"):
            ksae.load(path)


def _saved(model: ksae.SparseCoder, folder: Path) -> Path:
    model.save(folder / "saved")
    return folder / "saved"


@pytest.mark.parametrize("to", ["saelens", "gemma-scope"])
@pytest.mark.parametrize("kind", ["batchtopk", "matryoshka"])
def test_batch_topk_is_written_as_the_jumprelu_it_is_in_use(
    kind: str, to: str, tmp_path: Path
) -> None:
    model = make(kind)
    convert.convert(_saved(model, tmp_path), place(tmp_path, to), to)
    theta = model.threshold.float()
    if to == "saelens":
        config = json.loads((tmp_path / to / "cfg.json").read_text())
        assert (config["architecture"], config["apply_b_dec_to_input"]) == ("jumprelu", False)
        found = load_file(tmp_path / to / "sae_weights.safetensors")["threshold"]
        assert torch.equal(found, theta.expand(F))
    again = ksae.load(place(tmp_path, to)).eval()
    assert isinstance(again.activation, ksae.JumpReLU)
    recon = model(X).recon
    assert torch.equal(again(X).recon, recon)
    torch.testing.assert_close(recon, by_hand(model, X, theta), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["batchtopk", "matryoshka"])
def test_dictionary_learning_files_without_ksae_beside(kind: str, tmp_path: Path) -> None:
    options: Any = {"prefixes": [2, 5, F]} if kind == "matryoshka" else {}
    model = randomize(ksae.SAE(D, F, ksae.BatchTopK(K), **options)).eval()
    model.threshold.fill_(0.3)
    file = convert.convert(_saved(model, tmp_path), tmp_path / "d", "dictionary-learning").path
    file.with_name(f"{file.name}.ksae.safetensors").unlink()
    again = ksae.load(tmp_path / "d").eval()
    assert again.activation == ksae.BatchTopK(K, "dictionary_learning")
    assert again.prefixes == model.prefixes
    if options:
        assert again.prefix_weights == "dictionary_learning"
        state = torch.load(file, weights_only=True)
        assert state["group_sizes"].tolist() == [2, 3, 5]
    assert torch.equal(again(X).recon, model(X).recon)
    again.train()(X)  # goes on from there
    assert 0 < abs(float(again.threshold) - 0.3) < 0.01


def test_an_unset_threshold_of_dictionary_learning_is_refused(tmp_path: Path) -> None:
    model = randomize(ksae.SAE(D, F, ksae.BatchTopK(K)))
    model.threshold.fill_(0.3)
    file = convert.convert(_saved(model, tmp_path), tmp_path / "d", "dictionary-learning").path
    state = torch.load(file, weights_only=True)
    torch.save({**state, "threshold": torch.tensor(-1.0)}, file)
    with pytest.raises(UserError, match=r"batchtopk with threshold = -1.0 \(not set\)"):
        ksae.load(tmp_path / "d")
    assert ksae.load(tmp_path / "d", as_topk=True).activation == ksae.TopK(K)


@pytest.mark.parametrize("to", ["saelens", "dictionary-learning", "sparsify"])
def test_as_topk_of_ksae_coders(to: str, tmp_path: Path) -> None:
    model = make("matryoshka")
    with torch.no_grad():
        model.b_dec.zero_()
    convert.convert(_saved(model, tmp_path), tmp_path / "t", to, as_topk=True)
    again = ksae.load(tmp_path / "t")
    directly = ksae.load(tmp_path / "saved", as_topk=True)
    for topk in (again, directly):
        assert topk.activation == ksae.TopK(K)
        assert topk.prefixes == (2, 5, F)
        assert torch.equal(topk.W_enc, model.W_enc)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_thresholds_are_as_fine_as_their_logarithm(dtype: torch.dtype, tmp_path: Path) -> None:
    """In 16 bits exp(log(theta)) would be off by more than the type's last digit."""
    model = make("jumprelu", dtype=dtype)
    file = convert.convert(_saved(model, tmp_path), tmp_path / "s", "saelens").path
    file.with_name(f"{file.name}.ksae.safetensors").unlink()
    theta = load_file(file)["threshold"]
    again = ksae.load(tmp_path / "s")
    assert again.W_enc.dtype == dtype
    torch.testing.assert_close(again.activation.thresholds(again), theta, rtol=1e-6, atol=0)


@pytest.mark.parametrize("fused", [True, False])
def test_a_loaded_jumprelu_trains_on(fused: bool, tmp_path: Path) -> None:
    """A threshold of 0, whose logarithm is not finite, stays what it is."""
    path = tmp_path / "params.npz"
    convert.convert(_saved(make("jumprelu"), tmp_path), path, "gemma-scope")
    with np.load(path) as arrays:
        changed = dict(arrays)
    changed["threshold"][2] = 0
    np.savez(path, **changed)
    (tmp_path / "params.npz.ksae.safetensors").unlink()
    model = ksae.load(path).train()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    step = ksae.TrainStep(model, lr=1e-2, fused=fused)
    losses = [float(step(X, X)["loss"]) for _ in range(20)]
    assert losses[-1] < losses[0]
    for name, p in model.named_parameters():
        assert not p.isnan().any() and not torch.equal(p, before[name]), name
    assert model.activation.thresholds(model)[2] == 0
