# SPDX-License-Identifier: Apache-2.0
"""Conversion between file formats: bit for bit, nothing dropped in silence, bad files refused."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from training import assert_same_coder

import ksae
from ksae.cli import run
from ksae.coders import file as model_file
from ksae.errors import UserError
from ksae.files import container
from ksae.interop import convert
from ksae.interop.dictionary_learning import AutoEncoderTopK
from ksae.interop.formats import FORMATS, Coder
from ksae.interop.formats.nvidia import STANDARDIZE as NVIDIA
from ksae.interop.formats.openai import STANDARDIZE as OPENAI

D, F, K = 6, 10, 3
NAMES = tuple(name for name in FORMATS if name != "gemma-scope")  # which holds no TopK
SAE = [name for name in NAMES if name != "circuit-tracer"]  # subtract b_dec from the input
PLAIN = ["ksae", "sparsify", "saelens", "circuit-tracer"]  # do not
SINGLE = ("ksae", "openai", "nvidia")
FIELDS = ("W_enc", "b_enc", "W_dec", "b_dec", "W_skip", "threshold", "group_sizes")
MEANING = ("activation", "k", "centred", "scaled", "normalization")


def make(dtype: torch.dtype = torch.float32, **changes: object) -> Coder:
    g = torch.Generator().manual_seed(0)
    sizes = {"W_enc": (F, D), "b_enc": (F,), "W_dec": (F, D), "b_dec": (D,)}
    tensors = {name: torch.randn(size, generator=g).to(dtype) for name, size in sizes.items()}
    arguments = {**tensors, "activation": "topk", "k": K, "centred": True, **changes}
    return Coder(**arguments)  # type: ignore[arg-type]


def place(folder: Path, name: str) -> Path:
    return folder / (f"{name}.pt" if name in SINGLE else name)


def assert_same(a: Coder, b: Coder) -> None:
    for name in FIELDS:
        one, two = getattr(a, name), getattr(b, name)
        assert (one is None) == (two is None), name
        if one is not None:
            assert one.dtype == two.dtype, name
            assert one.shape == two.shape, name
            wide = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
            bits = wide[one.element_size()]
            assert torch.equal(one.contiguous().view(bits), two.contiguous().view(bits)), name
    for name in MEANING:
        assert getattr(a, name) == getattr(b, name), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("second", NAMES)
@pytest.mark.parametrize("first", NAMES)
def test_round_trip_between_every_pair(
    first: str, second: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    plain = "circuit-tracer" in (first, second)
    other = plain and not {first, second} <= set(PLAIN)  # one subtracts b_dec, the other cannot
    coder = make(dtype, centred=first != "circuit-tracer" if other else not plain)
    if other:
        source = place(tmp_path, first)
        convert.write(coder, source, first)
        with pytest.raises(UserError, match="b_dec subtracted from the input"):
            convert.convert(source, tmp_path / "no", second)
        coder.b_dec.zero_()
    coder.b_dec[0] = -0.0
    coder.W_enc[0, 0] = float("nan")
    a, b, c = (
        place(tmp_path / step, n) for step, n in zip("abc", (first, second, first), strict=True)
    )
    convert.write(coder, a, first)
    assert convert.convert(a, b, second).source == first
    assert convert.convert(b, c, first).source == second
    for path in (a, b, c):
        assert_same(convert.read(path)[1], coder)
    one, two = convert.read(a)[1].extra, convert.read(c)[1].extra
    key = {"dictionary-learning": "dictionary_learning"}.get(first, first)
    assert str(one.get(key)) == str(two.get(key))  # settings, counters and metadata came back


def stored(path: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a file or folder, as the file has it."""
    found: dict[str, torch.Tensor] = {}

    def look(name: str, value: object) -> None:
        if isinstance(value, torch.Tensor):
            found[name] = value
        elif isinstance(value, dict):
            for key, inner in value.items():
                look(f"{name}.{key}", inner)

    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file() and file.suffix not in (".json", ".yaml"):
            try:
                look("", load_file(file))
            except Exception:
                look("", torch.load(file, weights_only=False))
    return found


def layout(name: str, latents: int, folder: Path) -> dict[str, str]:
    """Which tensor of the coder each one of the file is, and whether it is transposed there."""
    coder = make(centred=name != "circuit-tracer")
    coder.W_enc, coder.W_dec = torch.randn(latents, D), torch.randn(latents, D)
    coder.b_enc = torch.randn(latents)
    path = place(folder, name)
    convert.write(coder, path, name)
    assert_same(convert.read(path)[1], coder)
    candidates = {field: getattr(coder, field) for field in ("W_enc", "W_dec", "b_enc", "b_dec")}
    candidates |= {f"{field} transposed": candidates[field].T for field in ("W_enc", "W_dec")}
    return {
        key: field
        for key, tensor in stored(path).items()
        for field, own in candidates.items()
        if tensor.shape == own.shape and torch.equal(tensor, own)
    }


@pytest.mark.parametrize("name", NAMES)
def test_square_matrices_lie_as_others_do(name: str, tmp_path: Path) -> None:
    """With as many latents as inputs no shape tells whether a matrix is transposed."""
    (tmp_path / "square").mkdir()
    wide = layout(name, F, tmp_path)
    assert {"W_enc", "W_dec"} <= {field.split()[0] for field in wide.values()}
    assert layout(name, D, tmp_path / "square") == wide


@pytest.mark.parametrize("centred", [True, False], ids=["sae", "transcoder"])
def test_load_gives_the_model(centred: bool, tmp_path: Path) -> None:
    coder = make(centred=centred)
    x = torch.randn(7, D)
    expected = None
    for name in SAE if centred else PLAIN:
        convert.write(coder, place(tmp_path, name), name)
        model = ksae.load(place(tmp_path, name))
        assert isinstance(model, ksae.TopKSAE if centred else ksae.Transcoder)
        recon = model(x).recon
        expected = recon if expected is None else expected
        assert torch.equal(recon, expected), name
        assert torch.equal(model.W_enc, coder.W_enc)


def test_own_settings_and_counters_survive_a_detour(tmp_path: Path) -> None:
    model = ksae.TopKSAE(D, F, K, auxk_alpha=0.5, dead_after=7, normalize_decoder=False, loss="mse")
    model(torch.randn(5, D))
    model_file.save(model, tmp_path / "a.safetensors", {"note": "x"})
    for name in SAE[1:]:
        convert.convert(tmp_path / "a.safetensors", place(tmp_path, name), name)
        back = tmp_path / f"{name}.back"
        convert.convert(place(tmp_path, name), back, "ksae")
        assert ksae.load(back).config() == model.config()
        assert torch.equal(ksae.load(back).tokens_since_fired, model.tokens_since_fired)
        assert container.read_header(back)["extra"] == {"note": "x"}


@pytest.mark.parametrize("kind", ["TopKSAE", "Transcoder", "GradTopKSAE", "GradTopKTranscoder"])
def test_a_model_is_itself_again_after_any_detour(kind: str, tmp_path: Path) -> None:
    transcodes = kind.endswith("Transcoder")
    sizes = (D, D, F, K) if transcodes else (D, F, K)
    options = {"beta": 0.5, "mode": "signed", "grad_norm": "rms"} if "Grad" in kind else {}
    model = getattr(ksae, kind)(*sizes, auxk_alpha=0.5, **options)
    for name, buffer in model.named_buffers():
        buffer.copy_(torch.full_like(buffer, len(name)))
    assert not model.b_dec.any()  # so that each format can hold it
    model.save(tmp_path / "a.safetensors")
    for name in NAMES[1:]:
        convert.convert(tmp_path / "a.safetensors", place(tmp_path, name), name)
        convert.convert(place(tmp_path, name), tmp_path / "b", "ksae")
        for again in (ksae.load(place(tmp_path, name)), ksae.load(tmp_path / "b")):
            assert_same_coder(again, model)


def test_skip_transcoder(tmp_path: Path) -> None:
    coder = make(centred=False, W_skip=torch.randn(D, D))
    for name in PLAIN:
        convert.write(coder, place(tmp_path, name), name)
        assert_same(convert.read(place(tmp_path, name))[1], coder)
    for name in set(NAMES) - set(PLAIN):
        with pytest.raises(UserError, match="W_skip"):
            convert.write(coder, place(tmp_path, name), name, fold=True)


def test_fold_keeps_the_function(tmp_path: Path) -> None:
    coder = make(torch.float64, scaled=True)
    convert.write(coder, tmp_path / "s", "saelens")
    with pytest.raises(UserError, match=r"scaling by decoder norms = True.*--fold"):
        ksae.load(tmp_path / "s")
    convert.convert(tmp_path / "s", tmp_path / "c", "circuit-tracer", fold=True)
    a, b = ksae.load(tmp_path / "s", fold=True), ksae.load(tmp_path / "c")
    x = torch.randn(9, D, dtype=torch.float64)
    u = ((x - coder.b_dec) @ coder.W_enc.T + coder.b_enc) * coder.W_dec.norm(dim=1)
    code = torch.zeros_like(u).scatter(1, u.topk(K).indices, 1) * u.relu()
    expected = code / coder.W_dec.norm(dim=1) @ coder.W_dec + coder.b_dec
    torch.testing.assert_close(a(x).recon, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(b(x).recon, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("source", "changes", "refused"),
    [
        ("openai", {"normalization": OPENAI}, set(NAMES) - {"openai"}),
        ("nvidia", {"normalization": NVIDIA}, set(NAMES) - {"nvidia"}),
        ("sparsify", {"activation": "groupmax"}, set(NAMES) - {"sparsify", "ksae"}),
        (
            "dictionary-learning",
            {
                "activation": "matryoshka",
                "threshold": torch.tensor(0.5),
                "group_sizes": torch.tensor([4, 6]),
            },
            {"sparsify", "openai", "nvidia", "circuit-tracer"},
        ),
        (
            "saelens",
            {"activation": "jumprelu", "k": None, "threshold": torch.rand(F)},
            {"sparsify", "openai", "nvidia", "circuit-tracer", "dictionary-learning"},
        ),
    ],
    ids=["openai", "nvidia", "groupmax", "matryoshka", "jumprelu"],
)
def test_what_a_target_cannot_hold_is_an_error(
    source: str, changes: dict[str, object], refused: set[str], tmp_path: Path
) -> None:
    coder = make(**changes)  # type: ignore[arg-type]
    convert.write(coder, place(tmp_path, source), source)
    assert_same(convert.read(place(tmp_path, source))[1], coder)
    for name in sorted(refused):
        with pytest.raises(UserError, match="cannot hold"):
            convert.convert(place(tmp_path, source), place(tmp_path / "out", name), name)
        assert not place(tmp_path / "out", name).exists()


def test_batchtopk_is_readable(tmp_path: Path) -> None:
    path = tmp_path / "dl"
    convert.write(make(activation="batchtopk", threshold=torch.tensor(0.25)), path, NAMES[4])
    assert ksae.load(path).activation == ksae.BatchTopK(K, "dictionary_learning")
    assert ksae.load(path, as_topk=True).activation == ksae.TopK(K)
    with pytest.raises(UserError, match="activation = batchtopk: --as-topk"):
        convert.convert(path, tmp_path / "o.pt", "openai")
    convert.convert(path, tmp_path / "lens", "saelens")  # its own export of such a model
    assert load_file(tmp_path / "lens" / "sae_weights.safetensors")["threshold"].unique() == 0.25


def test_recognised_by_content_not_by_name(tmp_path: Path) -> None:
    (tmp_path / "x").mkdir()
    convert.write(make(), tmp_path / "s", "sparsify")
    (tmp_path / "s" / "sae.safetensors").rename(tmp_path / "x" / "model.pt")
    (tmp_path / "s" / "cfg.json").rename(tmp_path / "x" / "other.json")
    assert convert.read(tmp_path / "x" / "model.pt")[0] == "sparsify"
    assert convert.read(tmp_path / "x")[0] == "sparsify"


def test_openai_without_k_needs_it(tmp_path: Path) -> None:
    convert.write(make(), tmp_path / "a.pt", "openai")
    (tmp_path / "a.pt.ksae.safetensors").unlink()
    with pytest.raises(UserError, match=r"needs k.*--k"):
        ksae.load(tmp_path / "a.pt")
    assert ksae.load(tmp_path / "a.pt", k=2).k == 2


@pytest.mark.parametrize("name", [n for n in NAMES if n != "ksae"])
def test_missing_extra_and_misshapen_tensors(name: str, tmp_path: Path) -> None:
    coder = make(centred=name != "circuit-tracer")
    path = place(tmp_path, name)
    file = convert.write(coder, path, name)
    safe = file.suffix == ".safetensors"
    whole = load_file(file) if safe else torch.load(file, weights_only=True)
    state = whole["model_state_dict"] if name == "nvidia" else whole
    bias = next(key for key in ("encoder.bias", "latent_bias", "b_enc") if key in state)

    def store() -> None:
        save_file(whole, file) if safe else torch.save(whole, file)

    right = state.pop(bias)
    store()
    with pytest.raises(UserError, match="got none of that name"):
        ksae.load(file)
    state[bias] = torch.zeros(F + 1)
    store()
    with pytest.raises(UserError, match=r"b_enc of .* must have the shape \[10\].*got \[11\]"):
        ksae.load(file)
    state |= {bias: right, "strange": torch.zeros(1)}
    store()
    with pytest.raises(UserError, match="holds strange"):
        ksae.load(file)
    state.pop("strange")
    for weight in [key for key, t in state.items() if getattr(t, "ndim", 0) == 2]:
        for shape in ((F * D,), (F, D, 1), (F + 1, D)):
            right, state[weight] = state[weight], torch.zeros(shape)
            store()
            with pytest.raises(UserError, match=r"load: .* (must|subtracts|cannot)"):
                ksae.load(file)
            state[weight] = right
    store()
    assert ksae.load(file).d_sae == F


UNSUPPORTED = {
    "saelens": ("cfg.json", {"architecture": "temporal"}),
    "sparsify": ("cfg.json", {"activation": "temporal"}),
    "dictionary-learning": ("config.json", {"trainer": {"dict_class": "temporal"}}),
    "circuit-tracer": ("config.yaml", {"activation": "temporal"}),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_activation(name: str, tmp_path: Path) -> None:
    convert.write(make(centred=name != "circuit-tracer"), tmp_path / "s", name)
    file, change = UNSUPPORTED[name]
    config = yaml.safe_load((tmp_path / "s" / file).read_text())  # JSON is YAML
    (tmp_path / "s" / file).write_text(json.dumps({**config, **change}))
    field = "(activation|architecture|dict_class)"
    with pytest.raises(UserError, match=rf"{field} of .* got 'temporal'"):
        ksae.load(tmp_path / "s")


def test_unsupported_activation_in_a_pickle(tmp_path: Path) -> None:
    convert.write(make(normalization=OPENAI), tmp_path / "a.pt", "openai")
    state = torch.load(tmp_path / "a.pt", weights_only=True)
    torch.save({**state, "activation": "Gated"}, tmp_path / "a.pt")
    with pytest.raises(UserError, match=r"activation of .* must be TopK or ReLU, got 'Gated'"):
        ksae.load(tmp_path / "a.pt")


def test_what_the_runner_of_saelens_saves_of_our_class(tmp_path: Path) -> None:
    convert.write(make(), tmp_path / "s", "saelens")
    config = json.loads((tmp_path / "s" / "cfg.json").read_text())
    (tmp_path / "s" / "cfg.json").write_text(json.dumps({**config, "architecture": "ksae_topk"}))
    assert isinstance(ksae.load(tmp_path / "s"), ksae.TopKSAE)
    convert.convert(tmp_path / "s", tmp_path / "t", "saelens")
    assert json.loads((tmp_path / "t" / "cfg.json").read_text())["architecture"] == "topk"


class Evil:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (open, ("pwned", "w"))  # type: ignore[return-value]


@pytest.mark.parametrize(
    "wrap",
    [
        lambda evil: {"encoder.weight": evil},
        lambda evil: {"model_state_dict": {"encoder.weight": evil}},
        lambda evil: {"activation": "TopK", "activation_state_dict": {"k": evil}},
        lambda evil: evil,
    ],
    ids=["tensor", "nvidia", "openai", "all of it"],
)
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_pickle_is_never_executed(
    zipped: bool, wrap: Callable[[Evil], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    evil = wrap(Evil())
    torch.save(evil, tmp_path / "ae.pt", _use_new_zipfile_serialization=zipped)
    with pytest.raises(UserError, match="nothing else is unpickled"):
        ksae.load(tmp_path / "ae.pt")
    with pytest.raises(pickle.UnpicklingError):
        AutoEncoderTopK.from_pretrained(tmp_path / "ae.pt")
    assert not (tmp_path / "pwned").exists()


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    convert.write(make(), tmp_path / "s", "sparsify")
    out = tmp_path / "m.safetensors"
    assert run(["convert", str(tmp_path / "s"), str(out), "--to", "ksae"]) == 0
    assert "sparsify to ksae: 6 -> 10 -> 6, topk, k = 3" in capsys.readouterr().out
    assert ksae.load(out).k == K
    assert run(["convert", str(tmp_path / "s"), str(out), "--to", "nothing"]) == 1
    assert run(["convert", str(tmp_path / "gone"), str(out), "--to", "ksae"]) == 1
    assert run(["convert", str(out), str(tmp_path / "c"), "--to", "circuit-tracer"]) == 1
    assert "Traceback" not in capsys.readouterr().err
