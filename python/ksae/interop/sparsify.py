# SPDX-License-Identifier: Apache-2.0
"""EleutherAI's sparsify (eai-sparsify) on ksae's kernels: `from ksae.interop.sparsify import
SparseCoder`.

The library's names, arguments, attributes, parameters and files. What differs: AuxK and Multi-TopK
train the encoder too, latents chosen at value 0 get no gradient, and Multi-TopK leaves the returned
output and code alone. `compat=True` (of the constructor, or set as an attribute) brings the
library's gradients and outputs back.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import SUPPORTED_NODES, _register_namedtuple

from .. import functional
from ..errors import UserError
from . import lazy, libraries, sparse
from .formats.files import integer, pick, read_json, read_tensors

FILES = ("cfg.json", "sae.safetensors")
ACTIVATIONS = ("topk", "groupmax")


class _EncoderOutput(NamedTuple):
    top_acts: Tensor  # [..., k]
    top_indices: Tensor  # [..., k]
    pre_acts: Tensor  # [..., F], after the ReLU


class _ForwardOutput(NamedTuple):
    sae_out: Tensor  # [..., d]
    latent_acts: Tensor  # [..., k]
    latent_indices: Tensor  # [..., k]
    fvu: Tensor
    auxk_loss: Tensor
    multi_topk_fvu: Tensor


@dataclass
class _SparseCoderConfig:
    activation: str = "topk"
    expansion_factor: int = 32
    normalize_decoder: bool = True
    num_latents: int = 0  # 0: d_in * expansion_factor
    k: int = 32
    multi_topk: bool = False
    skip_connection: bool = False
    transcode: bool = False

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, d: dict[str, Any], drop_extra_fields: bool = False) -> _SparseCoderConfig:
        names = {f.name for f in fields(cls)}
        extra = sorted(d.keys() - names)
        if extra and not drop_extra_fields:
            raise ValueError(f"SparseCoderConfig: fields must be known, got {', '.join(extra)}")
        return cls(**{name: v for name, v in d.items() if name in names})


if TYPE_CHECKING:
    _Base = nn.Module
    EncoderOutput = _EncoderOutput
    ForwardOutput = _ForwardOutput
    SparseCoderConfig = _SparseCoderConfig
else:
    _Base = libraries.base("sparsify.sparse_coder", "SparseCoder", nn.Module)
    EncoderOutput = libraries.base("sparsify.fused_encoder", "EncoderOutput", _EncoderOutput)
    ForwardOutput = libraries.base("sparsify.sparse_coder", "ForwardOutput", _ForwardOutput)
    SparseCoderConfig = libraries.base("sparsify.config", "SparseCoderConfig", _SparseCoderConfig)
SaeConfig = SparseCoderConfig
for _kind in (EncoderOutput, ForwardOutput):  # so that an exported module can be saved
    if _kind not in SUPPORTED_NODES:
        _register_namedtuple(_kind, serialized_type_name=f"sparsify.{_kind.__name__}")
TranscoderConfig = partial(SparseCoderConfig, transcode=True)


def _groupmax(pre_acts: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The largest of each of k contiguous groups: values, indices [..., k]."""
    F = pre_acts.shape[-1]
    if F % k:
        raise ValueError(f"fused_encoder: k must divide the number of latents {F}, got {k}")
    values, indices = pre_acts.reshape(*pre_acts.shape[:-1], k, F // k).max(dim=-1)
    return values, indices + torch.arange(0, F, F // k, device=pre_acts.device)


def fused_encoder(
    input: Tensor,
    weight: Tensor,
    bias: Tensor,
    k: int,
    activation: str = "topk",
    *,
    compat: bool = False,
    b_dec: Tensor | None = None,
) -> EncoderOutput:
    """The library's encoder: ReLU, selection.

    Args:
        input: [..., d]. weight: [F, d]. bias: [F].
        k: latents a row. activation: "topk", or "groupmax" (the best of each of k groups).
        compat: as the library: pre_acts pass no gradient, latents chosen at value 0 do.
        b_dec: [d], subtracted from the input first.

    Returns:
        top_acts, top_indices [..., k], and pre_acts [..., F], computed when somebody reads it.

    Raises:
        ValueError: an unknown activation, k out of range or, for groupmax, no divisor of F.
    """
    if activation not in ACTIVATIONS:
        names = " or ".join(map(repr, ACTIVATIONS))
        raise ValueError(f"fused_encoder: activation must be {names}, got {activation!r}")
    pre_acts = lazy.pre_activations(input, weight, bias, b_dec, relu=True)
    if compat:
        pre_acts = pre_acts.detach()
    if activation == "topk" and not compat:
        values, indices = functional.topk_encode(input, weight, bias, k, b_dec)
        lazy.selected(pre_acts, values, indices)
        return EncoderOutput(values, indices, pre_acts)
    if activation == "groupmax":
        values, indices = _groupmax(lazy.dense(pre_acts.detach()), k)
    else:
        values, indices = functional.topk_encode(
            input.detach(),
            weight.detach(),
            bias.detach(),
            k,
            None if b_dec is None else b_dec.detach(),
        )
    rows, flat = sparse.flat(indices), sparse.flat(values)
    gate = None if compat else flat > 0
    out = sparse.at(sparse.flat(input), weight, bias, b_dec, rows, values=flat, gate=gate)
    out = out.reshape(values.shape)
    lazy.selected(pre_acts, out, indices)  # with compat detached: none, as there
    return EncoderOutput(out, indices, pre_acts)


def _centre(x: Tensor, b_dec: Tensor | None) -> Tensor:
    return x if b_dec is None else x - b_dec


def decoder_impl(top_indices: Tensor, top_acts: Tensor, W_dec: Tensor) -> Tensor:
    """The library's seam for decoders. W_dec is [d, F], the view `W_dec.mT` of the parameter."""
    return functional.sparse_decode(top_acts, top_indices, W_dec.mT)


class SparseCoder(_Base):
    """sparsify's SparseCoder: arguments, attributes and outputs as there.

    Args:
        d_in: width of the input and of the output.
        cfg: SparseCoderConfig.
        device, dtype: of the parameters.
        decoder: False leaves W_dec out.
        compat: reproduce the library's gradients and its Multi-TopK outputs.

    Raises:
        ValueError: k or activation that do not fit.
    """

    cfg: Any
    compat: bool = False  # of instances whose class was swapped

    def __init__(
        self,
        d_in: int,
        cfg: Any,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
        *,
        decoder: bool = True,
        compat: bool = False,
    ) -> None:
        nn.Module.__init__(self)
        self.cfg, self.d_in, self.compat = cfg, d_in, compat
        self.num_latents: int = cfg.num_latents or d_in * cfg.expansion_factor
        if not 1 <= cfg.k <= self.num_latents:
            raise ValueError(
                f"SparseCoder: k must be in [1, {self.num_latents}], the number of latents, got"
                f" {cfg.k}"
            )
        if cfg.activation not in ACTIVATIONS:
            names = " or ".join(map(repr, ACTIVATIONS))
            raise ValueError(f"SparseCoder: activation must be {names}, got {cfg.activation!r}")
        self.encoder = nn.Linear(d_in, self.num_latents, device=device, dtype=dtype)
        self.encoder.bias.data.zero_()
        self.W_dec: nn.Parameter | None = None
        if decoder:
            rows = self.encoder.weight.data  # [F, d]
            self.W_dec = nn.Parameter(torch.zeros_like(rows) if cfg.transcode else rows.clone())
            if cfg.normalize_decoder and not cfg.transcode:
                self.set_decoder_norm_to_unit_norm()
        self.b_dec = nn.Parameter(torch.zeros(d_in, dtype=dtype, device=device))
        self.W_skip: nn.Parameter | None = None
        if cfg.skip_connection:
            self.W_skip = nn.Parameter(torch.zeros(d_in, d_in, device=device, dtype=dtype))

    # -------------------------------------------------------------------------------------- files

    @classmethod
    def load_many(
        cls,
        name: str,
        local: bool = False,
        layers: list[str] | None = None,
        device: str | torch.device = "cpu",
        *,
        decoder: bool = True,
        pattern: str | None = None,
    ) -> dict[str, SparseCoder]:
        """The coders of a folder (local) or of a hub repository, by hookpoint, sorted as people
        count; without layers those of all its folders that hold one.

        Raises:
            UserError: no such folder, none in it that holds a coder, or a file that cannot be read.
        """
        pattern = None if pattern is None else pattern + "/*"
        root = Path(name) if local else _snapshot(name, pattern)
        if layers is None:
            folders = [f.name for f in _inside(root) if any((f / file).exists() for file in FILES)]
            layers = [f for f in folders if pattern is None or fnmatch(f + "/", pattern)]
            if not layers:
                kind = "" if pattern is None else f" named {pattern.removesuffix('/*')}"
                raise UserError(
                    f"load: {root} must have folders{kind} with {' and '.join(FILES)}, got none"
                )
        return {
            layer: cls.load_from_disk(root / layer, device=device, decoder=decoder)
            for layer in sorted(layers, key=_natural)
        }

    @classmethod
    def load_from_hub(
        cls,
        name: str,
        hookpoint: str | None = None,
        device: str | torch.device = "cpu",
        *,
        decoder: bool = True,
    ) -> SparseCoder:
        """One coder of a hub repository."""
        root = _snapshot(name, None if hookpoint is None else f"{hookpoint}/*")
        if hookpoint is not None:
            root = root / hookpoint
        elif not (root / "cfg.json").exists():
            raise FileNotFoundError(f"SparseCoder: hookpoint must be given for {name}, got None")
        return cls.load_from_disk(root, device=device, decoder=decoder)

    @classmethod
    def load_from_disk(
        cls, path: Path | str, device: str | torch.device = "cpu", *, decoder: bool = True
    ) -> SparseCoder:
        """Read cfg.json and sae.safetensors; the dtype is the file's.

        Raises:
            UserError: a file that is missing or damaged; a tensor that is missing, or that the
                format does not have.
        """
        path = Path(path)
        config = read_json(path / FILES[0])
        d_in = integer(config, "d_in", path / FILES[0])
        del config["d_in"]
        tensors = read_tensors(path / FILES[1], str(device))
        if not decoder:
            tensors.pop("W_dec", None)
        cfg = SparseCoderConfig.from_dict(config, drop_extra_fields=True)
        wanted = {"encoder.weight", "encoder.bias", "b_dec"} | ({"W_dec"} if decoder else set())
        wanted |= {"W_skip"} if cfg.skip_connection else set()
        tensors = pick(tensors, wanted, set(), str(path / "sae.safetensors"))
        sae = cls(d_in, cfg, device, tensors["encoder.weight"].dtype, decoder=decoder)
        sae.load_state_dict(tensors)
        return sae

    def save_to_disk(self, path: Path | str) -> None:
        """Write cfg.json and sae.safetensors as the library does."""
        from safetensors.torch import save_file

        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        tensors = {name: t.contiguous() for name, t in self.state_dict().items()}
        save_file(tensors, path / "sae.safetensors")
        (path / "cfg.json").write_text(json.dumps({**self.cfg.to_dict(), "d_in": self.d_in}))

    # ----------------------------------------------------------------------------------- the code

    @property
    def device(self) -> torch.device:
        return self.encoder.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.encoder.weight.dtype

    def _decoder(self) -> Tensor:
        if self.W_dec is None:
            raise ValueError("SparseCoder: decoder must be True to decode, got False")
        return self.W_dec

    def encode(self, x: Tensor) -> EncoderOutput:
        """top_acts, top_indices [..., k], pre_acts [..., F] (when read) of x [..., d]."""
        return self._encode(x, self.cfg.k)

    def _encode(self, x: Tensor, k: int) -> EncoderOutput:
        x = x.to(torch.promote_types(x.dtype, self.dtype))
        b_dec = None if self.cfg.transcode else self.b_dec
        if x.requires_grad or sparse.autocast_dtype(x.device.type):
            # Autocast would round x before it is centred; a gradient of x is b_dec's as well.
            x, b_dec = _centre(x, b_dec), None
        weights = self.encoder.weight, self.encoder.bias
        return fused_encoder(x, *weights, k, self.cfg.activation, compat=self.compat, b_dec=b_dec)

    def decode(self, top_acts: Tensor, top_indices: Tensor) -> Tensor:
        """Output [..., d] of a code, without the skip connection."""
        return sparse.decode(top_acts, top_indices, self._decoder(), self.b_dec)

    def forward(
        self,
        x: Tensor,
        y: Tensor | None = None,
        *,
        dead_mask: Tensor | None = None,
        total_variance: Tensor | None = None,
    ) -> ForwardOutput:
        """Reconstruct x [N, d], or predict y [N, d]; AuxK for the latents in dead_mask [F]."""
        bf16 = x.is_cuda and torch.cuda.is_bf16_supported()
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=bf16):
            return self._forward(x, x if y is None else y, dead_mask, total_variance)

    def _forward(
        self, x: Tensor, y: Tensor, dead_mask: Tensor | None, total_variance: Tensor | None
    ) -> ForwardOutput:
        k, multi = self.cfg.k, self.cfg.multi_topk
        prefix = multi and not self.compat and self.cfg.activation == "topk"
        code = self._encode(x, 4 * k if prefix else k)
        acts, indices = code.top_acts[..., :k], code.top_indices[..., :k]  # sorted: a prefix
        sae_out = self.decode(acts, indices)
        if self.W_skip is not None:
            sae_out = sae_out + x.to(self.dtype) @ self.W_skip.mT
        e = y - sae_out
        if total_variance is None:
            total_variance = (y - y.mean(0)).pow(2).sum()
        auxk_loss = multi_topk_fvu = sae_out.new_tensor(0.0)
        if dead_mask is not None:
            auxk_loss = self._auxk(code.pre_acts, e.detach(), dead_mask, total_variance)
        fvu = e.pow(2).sum() / total_variance
        if multi:
            wide = code[:2] if prefix else tuple(code.pre_acts.topk(4 * k))
            out = self.decode(wide[0], wide[1])  # without the skip connection, as there
            multi_topk_fvu = (out - y).pow(2).sum() / total_variance
            if self.compat:
                sae_out, acts, indices = out, wide[0], wide[1]
        return ForwardOutput(sae_out, acts, indices, fvu, auxk_loss, multi_topk_fvu)

    def _auxk(
        self, pre_acts: Tensor, e: Tensor, dead_mask: Tensor, total_variance: Tensor
    ) -> Tensor:
        """The d/2 largest dead latents predict the residual; less weight for few dead latents."""
        count = int(dead_mask.sum())
        if count == 0:
            return e.new_tensor(0.0)
        k_aux = e.shape[-1] // 2
        scale = min(count / k_aux, 1.0)
        dead = torch.where(dead_mask[None], pre_acts, -torch.inf)
        acts, indices = dead.topk(min(k_aux, count), sorted=False)
        e_hat = sparse.decode(acts, indices, self._decoder())
        loss: Tensor = scale * (e_hat - e).pow(2).sum() / total_variance
        return loss

    # -------------------------------------------------------------------------------- the decoder

    @torch.no_grad()
    def set_decoder_norm_to_unit_norm(self) -> None:
        """Scale the rows of W_dec to length 1."""
        W_dec = self._decoder()
        W_dec.data /= W_dec.data.norm(dim=1, keepdim=True) + torch.finfo(W_dec.dtype).eps

    def remove_gradient_parallel_to_decoder_directions(self) -> None:
        """Take from each row of W_dec.grad its component along the (unit) row of W_dec."""
        W_dec = self._decoder()
        if W_dec.grad is None:
            raise ValueError("SparseCoder: W_dec.grad must be there after backward(), got None")
        sparse.project_(W_dec.grad, W_dec.data)


Sae = SparseCoder


def _inside(root: Path) -> list[Path]:
    """The folders of a folder, without hidden ones, such as .git and .cache."""
    if not root.is_dir():
        raise UserError(f"load: no such folder: {root}")
    return [f for f in root.iterdir() if f.is_dir() and not f.name.startswith(".")]


def _natural(name: str) -> list[tuple[bool, int, str]]:
    """Sort key by which "layers.9" comes before "layers.10"."""
    import re

    parts = re.split(r"(\d+)", name)
    return [(p.isdigit(), int(p) if p.isdigit() else 0, p) for p in parts]


def _snapshot(name: str, pattern: str | None) -> Path:
    try:
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise ImportError(
            "SparseCoder: huggingface_hub must be installed to load from the hub, got no such"
            " package"
        ) from error
    return Path(snapshot_download(name, allow_patterns=pattern))


def adopt(module: Any) -> None:
    """A swapped instance of the library's class needs nothing."""
