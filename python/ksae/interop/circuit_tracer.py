# SPDX-License-Identifier: Apache-2.0
"""circuit-tracer's SingleLayerTranscoder on ksae's kernels, and the files it reads.

With a TopK, encoder, decoder and the sparse products that attribution asks for never build [N, F];
with ReLU and JumpReLU, which select nothing, they are the library's formulas. Its TopK has no ReLU:
a token with fewer than k positive pre-activations has negative latents. What differs: a TopK file
that the library has written, with `k` in it, can be read.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from ..errors import UserError, first_line
from . import libraries, sparse
from .formats.circuit_tracer import KEYS, THRESHOLD
from .formats.files import pick

_PATH = "circuit_tracer.transcoder"
if TYPE_CHECKING:
    _Base = nn.Module
    _TopK = nn.Module
    _JumpReLU = nn.Module
else:
    _Base = libraries.base(f"{_PATH}.single_layer_transcoder", "SingleLayerTranscoder", nn.Module)
    _TopK = libraries.base(f"{_PATH}.activation_functions", "TopK", nn.Module)
    _JumpReLU = libraries.base(f"{_PATH}.activation_functions", "JumpReLU", nn.Module)


def default_device() -> torch.device:
    """Where the library puts what names no device: on a GPU, if there is one."""
    kinds = (("cuda", torch.cuda), ("mps", torch.backends.mps))
    return torch.device(next((name for name, kind in kinds if kind.is_available()), "cpu"))


class TopK(_TopK):
    """The k largest entries of each row, of either sign."""

    def __init__(self, k: int) -> None:
        nn.Module.__init__(self)
        self.k = k

    def forward(self, x: Tensor) -> Tensor:
        """[..., F] -> [..., F]."""
        return x * torch.zeros_like(x).scatter(-1, x.topk(self.k, dim=-1).indices, 1)


class _Jump(torch.autograd.Function):
    """x where x > threshold; the threshold's gradient by a rectangle of width `bandwidth`
    (arXiv 2407.14435)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, threshold: Tensor, bandwidth: float) -> Tensor:
        ctx.save_for_backward(x, threshold)
        ctx.bandwidth = bandwidth
        return x * (x > threshold)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        x, threshold = ctx.saved_tensors
        near = ((x - threshold).abs() < ctx.bandwidth / 2) * grads[0]
        slope = -(threshold / ctx.bandwidth) * near
        return (x > threshold) * grads[0], slope.sum_to_size(threshold.shape), None


class JumpReLU(_JumpReLU):
    """x where it exceeds a trained threshold ([F] or []), 0 elsewhere."""

    def __init__(self, threshold: float | Tensor, bandwidth: float = 2) -> None:
        nn.Module.__init__(self)
        self.threshold = nn.Parameter(torch.as_tensor(threshold))
        self.bandwidth = bandwidth

    def forward(self, x: Tensor) -> Tensor:
        """[..., F] -> [..., F]."""
        out: Tensor = _Jump.apply(x, self.threshold, self.bandwidth)  # type: ignore[no-untyped-call]
        return out


class SingleLayerTranscoder(_Base):
    """circuit-tracer's SingleLayerTranscoder.

    Args:
        d_model: d. d_transcoder: F.
        activation_function: `TopK(k)` (or the library's), `JumpReLU` or any function of [..., F].
        layer_idx: the layer it stands in for.
        skip_connection: add x @ W_skip.T to the output.
        transcoder_path: the file of lazy weights.
        lazy_encoder, lazy_decoder: read W_enc, W_dec from the file at each use.
        device: of the parameters; None: a GPU if there is one, as there. dtype: theirs too.

    Raises:
        ValueError: lazy weights without a file, or k out of range.
    """

    def __init__(
        self,
        d_model: int,
        d_transcoder: int,
        activation_function: Callable[[Tensor], Tensor],
        layer_idx: int,
        skip_connection: bool = False,
        transcoder_path: str | None = None,
        lazy_encoder: bool = False,
        lazy_decoder: bool = False,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.bfloat16,
    ) -> None:
        nn.Module.__init__(self)
        if (lazy_encoder or lazy_decoder) and transcoder_path is None:
            raise ValueError(
                "SingleLayerTranscoder: transcoder_path must be given for lazy weights, got None"
            )
        k = _k(activation_function)
        if k is not None and not 1 <= k <= d_transcoder:
            raise ValueError(
                f"SingleLayerTranscoder: k must be in [1, {d_transcoder}], the number of latents,"
                f" got {k}"
            )
        device = default_device() if device is None else device
        self.d_model, self.d_transcoder, self.layer_idx = d_model, d_transcoder, layer_idx
        self.transcoder_path = transcoder_path
        self.lazy_encoder, self.lazy_decoder = lazy_encoder, lazy_decoder

        def zeros(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.zeros(*shape, device=device, dtype=dtype))

        if not lazy_encoder:
            self.W_enc = zeros(d_transcoder, d_model)
        if not lazy_decoder:
            self.W_dec = zeros(d_transcoder, d_model)
        self.b_enc, self.b_dec = zeros(d_transcoder), zeros(d_model)
        self.W_skip = zeros(d_model, d_model) if skip_connection else None
        self.activation_function = activation_function

    @property
    def device(self) -> torch.device:
        return self.b_enc.device

    @property
    def dtype(self) -> torch.dtype:
        return self.b_enc.dtype

    def __getattr__(self, name: str) -> Any:
        flag = {"W_enc": "lazy_encoder", "W_dec": "lazy_decoder"}.get(name)
        if flag is not None and self.__dict__.get(flag):
            return self._read(name, None)
        return nn.Module.__getattr__(self, name)

    def _read(self, name: str, rows: Tensor | None) -> Tensor:
        """A lazy weight, or some of its rows."""
        assert self.transcoder_path is not None
        with safe_open(self.transcoder_path, framework="pt", device=str(self.device)) as file:
            if rows is None:
                whole: Tensor = file.get_tensor(name)
                return whole.to(self.dtype)
            part: Tensor = file.get_slice(name)[rows.cpu()]
            return part.to(self.dtype)

    def _get_decoder_vectors(self, feat_ids: Tensor | None = None) -> Tensor:
        if self.lazy_decoder:
            return self._read("W_dec", feat_ids)
        rows: Tensor = self.W_dec if feat_ids is None else self.W_dec[feat_ids.to(self.device)]
        return rows

    def _code(self, x: Tensor, W_enc: Tensor) -> tuple[Tensor, Tensor] | None:
        """values, indices [..., k] with a TopK that nobody listens to."""
        k = _k(self.activation_function)
        if k is None or getattr(self.activation_function, "_forward_hooks", None):
            return None
        values, indices = sparse.signed_topk(sparse.flat(x), W_enc, self.b_enc, k)
        return values.reshape(*x.shape[:-1], k), indices.reshape(*x.shape[:-1], k)

    def encode(self, input_acts: Tensor, apply_activation_function: bool = True) -> Tensor:
        """The dense code [..., F] of [..., d], or the pre-activations."""
        W_enc = self.W_enc
        x = input_acts.to(W_enc.dtype)
        code = self._code(x, W_enc) if apply_activation_function else None
        if code is not None:
            return sparse.scatter(*code, self.d_transcoder)
        pre_acts = nn.functional.linear(x, W_enc, self.b_enc)
        return self.activation_function(pre_acts) if apply_activation_function else pre_acts

    def decode(self, acts: Tensor, input_acts: Tensor | None = None) -> Tensor:
        """Output [..., d] of a code [..., F]; the skip connection needs the input."""
        return self._skip(acts @ self.W_dec + self.b_dec, input_acts)

    def _skip(self, out: Tensor, input_acts: Tensor | None) -> Tensor:
        if self.W_skip is None:
            return out
        if input_acts is None:
            raise ValueError(
                "SingleLayerTranscoder: input_acts must be given with a skip connection, got None"
            )
        return out + self.compute_skip(input_acts)

    def compute_skip(self, input_acts: Tensor) -> Tensor:
        """x @ W_skip.T."""
        if self.W_skip is None:
            raise ValueError("SingleLayerTranscoder: W_skip must be there, got no skip connection")
        return input_acts @ self.W_skip.T

    def forward(self, input_acts: Tensor) -> Tensor:
        """Output [..., d] of [..., d]."""
        W_enc = self.W_enc
        code = self._code(input_acts.to(W_enc.dtype), W_enc)
        if code is None:
            return self.decode(self.encode(input_acts), input_acts)
        return self._skip(sparse.decode(*code, self.W_dec, self.b_dec), input_acts)

    def encode_sparse(
        self, input_acts: Tensor, zero_positions: slice = slice(0, 1)
    ) -> tuple[Tensor, Tensor]:
        """The code of [N, d] as a coalesced sparse tensor, 0 at the positions `zero_positions`,
        and the encoder's rows of its entries."""
        W_enc = self.W_enc
        x = input_acts.to(W_enc.dtype)
        code = self._code(x, W_enc)
        if code is None:
            acts = self.activation_function(nn.functional.linear(x, W_enc, self.b_enc))
            acts[zero_positions] = 0
            sparse_acts = acts.to_sparse()
            return sparse_acts, W_enc[sparse_acts.indices()[1]]
        values, indices = code
        indices, order = indices.sort(dim=-1)
        values = values.gather(-1, order)
        kept = values != 0
        kept[zero_positions] = False
        rows, slots = kept.nonzero(as_tuple=True)
        features = indices[rows, slots]
        sparse_acts = torch.sparse_coo_tensor(
            torch.stack([rows, features]),
            values[rows, slots],
            (x.shape[0], self.d_transcoder),
            is_coalesced=True,
            check_invariants=False,
        )
        return sparse_acts, W_enc[features]

    def decode_sparse(
        self, sparse_acts: Tensor, input_acts: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Output [N, d] of a sparse code [N, F], and the decoder's rows times its values."""
        rows, features = sparse_acts.indices()
        scaled = self._get_decoder_vectors(features) * sparse_acts.values()[:, None]
        out = scaled.new_zeros(sparse_acts.shape[0], self.d_model).index_add(0, rows, scaled)
        return self._skip(out, input_acts) + self.b_dec, scaled

    def to_safetensors(self, save_path: str | os.PathLike[str]) -> None:
        """Write the file that `load_transcoder`, the library's too, reads: without k, which the
        config beside it holds."""
        tensors = {name: getattr(self, name) for name in sorted(KEYS)}
        if self.W_skip is not None:
            tensors["W_skip"] = self.W_skip
        threshold = getattr(self.activation_function, "threshold", None)
        if threshold is not None:
            tensors[THRESHOLD] = threshold
        save_file({n: t.detach().cpu().contiguous() for n, t in tensors.items()}, save_path)


def _k(activation: Any) -> int | None:
    """k of a TopK, ours or the library's."""
    topk = isinstance(activation, TopK) or (_TopK is not nn.Module and type(activation) is _TopK)
    return int(activation.k) if topk else None


def load_transcoder(
    path: str | os.PathLike[str],
    layer: int,
    activation_fn: Callable[[Tensor], Tensor] | None = None,
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
    lazy_encoder: bool = True,
    lazy_decoder: bool = True,
) -> SingleLayerTranscoder:
    """One layer's file.

    Args:
        path: a safetensors file. layer: its index.
        activation_fn: None: JumpReLU for a file with thresholds, TopK for one with k, else ReLU.
        device: of the parameters; None: a GPU if there is one, as there. dtype: theirs too.
        lazy_encoder, lazy_decoder: leave W_enc, W_dec in the file.

    Raises:
        UserError: the file or a tensor of it is missing, damaged or unknown.
        RuntimeError: a tensor is of the wrong shape.
    """
    device = default_device() if device is None else device
    if not os.path.isfile(path):
        raise UserError(f"load: no such file: {os.fspath(path)}")
    lazy = {
        name
        for name, is_lazy in zip(("W_enc", "W_dec"), (lazy_encoder, lazy_decoder), strict=True)
        if is_lazy
    }
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            names = set(file.keys())
            state = {name: file.get_tensor(name) for name in names - lazy}
    except (SafetensorError, OSError) as error:
        raise UserError(f"load: cannot read {os.fspath(path)}: {first_line(error)}") from None
    pick(state, KEYS - lazy, {"W_skip", THRESHOLD, "k"}, str(path))
    k = state.pop("k", None)
    if activation_fn is None:
        if THRESHOLD in state:
            activation_fn = JumpReLU(torch.zeros_like(state[THRESHOLD]), 0.1)
        else:
            activation_fn = nn.functional.relu if k is None else TopK(int(k))
    transcoder = SingleLayerTranscoder(
        state["b_dec"].shape[0],
        state["b_enc"].shape[0],
        activation_fn,
        layer,
        skip_connection="W_skip" in state,
        transcoder_path=str(path),
        lazy_encoder=lazy_encoder,
        lazy_decoder=lazy_decoder,
        device=torch.device("meta"),
        dtype=dtype,
    )
    transcoder.load_state_dict(state, assign=True)
    transcoder.to(dtype)
    return transcoder
