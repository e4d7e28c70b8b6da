# SPDX-License-Identifier: Apache-2.0
"""Sparse coders as plain modules: any torch optimizer trains them.

What `TrainStep` does besides Adam, one's own loop has to: unit_rows.py has two ways.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as nnf

from .. import functional
from ..ops import accumulator
from . import registry
from .activation import Activation, from_fields
from .code import Code, recomputes
from .config import Config, Options, floating
from .counts import Counts
from .losses import losses
from .output import Output
from .terms import multi_loss
from .unit_rows import unit_rows, without_parallel

_T = TypeVar("_T")


def _setting(name: str, kind: type[_T]) -> _T:
    """A property that reads an option of the coder's `settings`."""
    return cast(_T, property(lambda self: getattr(self.settings, name)))


class SparseCoder(Counts):
    """The base of `SAE` and `Transcoder`: an activation, a linear decoder, a loss.

    u = (x - b_dec if centred else x) @ W_enc.T + b_enc; the activation makes a sparse code of u;
    recon = sum_j values_j W_dec[indices_j] + b_dec (+ x @ W_skip.T).

    Args:
        d_in, d_out: widths of the input and of the target.
        d_sae: F, the number of latents.
        activation: how pre-activations become a sparse code, as `TopK(k)`.
        skip: add a learned linear map of the input to the output.
        options: loss, auxk_alpha, k_aux, dead_after, normalize_decoder and multi_topk, described at
            `ksae.coders.config.Config`; dtype and device of the parameters. Inputs are cast to
            the parameters' dtype; losses are float32 or float64.

    Raises:
        ValueError: a size, k, loss or weight out of range. TypeError: a size is no integer, or
            dtype is not floating.

    The variance in the FVU is a constant: the gradient for the target leaves out its derivative. A
    batch of one token (or of equal tokens) has no variance: its FVU is infinite or not a number.
    In training mode `forward` counts, in `tokens_since_fired` [F], the tokens since each latent
    last fired. Buffers keep their dtype when the module is cast.

    normalize_decoder is for `TrainStep`. In a loop with an optimizer of torch the decoder's norms
    drift, unless `remove_gradient_parallel_to_decoder_directions` is called before its step and
    `set_decoder_norm_to_unit_norm` after it, or W_dec is parametrised by `ksae.UnitRows`.
    """

    topology: str  # what is read and predicted, by name
    centred: bool  # whether b_dec is subtracted from the input
    shares_memory = False  # with parameters of others, whose writes do not show in these

    W_enc: nn.Parameter  # [F, d_in]
    b_enc: nn.Parameter  # [F]
    W_dec: nn.Parameter  # [F, d_out]
    b_dec: nn.Parameter  # [d_out]
    W_skip: nn.Parameter | None  # [d_out, d_in]

    # What needs higher folders; set by ksae.api, which may know of them.
    attached: ClassVar[Callable[..., Any]]  # in a language model: ksae.analysis.attached
    show: ClassVar[Callable[..., Any]]  # a latent in a notebook: ksae.analysis.dashboard.notebook

    def __init__(
        self,
        d_in: int,
        d_out: int,
        d_sae: int,
        activation: Activation | Mapping[str, Any],
        *,
        skip: bool = False,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        **options: Any,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        if isinstance(activation, Mapping):
            activation = from_fields(activation)
        if not isinstance(activation, Activation):
            got = type(activation).__name__
            raise TypeError(f"{name}: activation must be an Activation, as ksae.TopK(k), got {got}")
        unknown = ", ".join(options.keys() - Options.__annotations__.keys())
        if unknown:
            raise TypeError(f"{name}: options must be among those of Config, got {unknown}")
        self.settings = Config(name, d_in, d_out, d_sae, skip, **options)
        self.activation = activation
        activation.check(name, self.d_sae)
        if self.multi_k and (activation.ragged or not activation.other_k):
            kind, ks = type(activation).__name__, self.settings.multi_k
            got = f"multi_k must be None with {kind}, got {list(ks)}" if ks else ""
            raise ValueError(f"{name}: {got or f'multi_topk must be False with {kind}, got True'}")
        if activation.of_input and not self.centred:
            kind = type(activation).__name__
            raise ValueError(f"{name}: activation must be one of a transcoder, got {kind}")
        self.seen_gradient = False  # by the activation, which warns once
        F, d_in, d_out = self.d_sae, self.d_in, self.d_out

        dtype = floating(name, dtype)
        acc = accumulator(dtype)
        like: dict[str, Any] = {"dtype": dtype, "device": device}
        rows = torch.randn(F, d_in, dtype=acc, device=device)
        rows /= rows.norm(dim=1, keepdim=True)
        self.W_enc = nn.Parameter(rows.to(dtype))
        self.b_enc = nn.Parameter(torch.zeros(F, **like))
        self.W_dec = nn.Parameter(torch.zeros(F, d_out, **like))
        self.b_dec = nn.Parameter(torch.zeros(d_out, **like))
        self.W_skip = nn.Parameter(torch.zeros(d_out, d_in, **like)) if skip else None
        counts = torch.zeros(F, dtype=torch.int64, device=device)
        self.register_buffer("tokens_since_fired", counts)
        more = activation.parameters(F, acc, self.W_enc.device)
        for parameter, start in more.items():
            self.register_parameter(parameter, nn.Parameter(start.to(dtype)))
        for buffer, start in activation.buffers(acc, self.W_enc.device).items():
            self.register_buffer(buffer, start)

    # ---------------------------------------------------------------------------------- the options

    d_in = _setting("d_in", int)
    d_out = _setting("d_out", int)
    d_sae = _setting("d_sae", int)
    skip = _setting("skip", bool)
    loss = _setting("loss", str)
    auxk_alpha = _setting("auxk_alpha", float)
    k_aux = _setting("k_aux", int)
    auxk = _setting("auxk", str)
    dead_after = _setting("dead_after", int)
    normalize_decoder = _setting("normalize_decoder", bool)
    multi_topk = _setting("multi_topk", bool)

    @property
    def prefixes(self) -> tuple[int, ...]:
        """Widths of the Matryoshka prefixes; empty: none."""
        return tuple(self.settings.prefixes or ())

    @property
    def prefix_weights(self) -> str | Sequence[float]:
        """By name, or one a prefix."""
        return self.settings.prefix_weights

    @property
    def k(self) -> int:
        """Active latents a token."""
        return self.activation.k

    @property
    def multi_k(self) -> tuple[tuple[int, float], ...]:
        """The other k whose losses count, and their weights."""
        if self.multi_topk:
            return ((min(4 * self.k, self.d_sae), 1 / 8),)
        weights: Any = self.settings.multi_weights
        return tuple(zip(self.settings.multi_k or (), weights, strict=True))

    @property
    def needs_gradient(self) -> bool:
        """Whether training selects by the gradient of a downstream loss."""
        return self.activation.needs_gradient

    def config(self) -> dict[str, Any]:
        """Class name and constructor arguments, plain values only."""
        return {
            "class": registry.name_of(self),
            "d_in": self.d_in,
            "d_sae": self.d_sae,
            **self._activation_options(),
            "loss": self.loss,
            "auxk_alpha": self.auxk_alpha,
            "k_aux": self.k_aux,
            "dead_after": self.dead_after,
            "normalize_decoder": self.normalize_decoder,
            "multi_topk": self.multi_topk,
            **self.settings.rarer(),
            "dtype": str(self.W_enc.dtype).removeprefix("torch."),
            **(self.activation.options() if registry.is_named(self) else {}),
        }

    def _activation_options(self) -> dict[str, Any]:
        """By its own fields, or for those with a class of their own the class's arguments."""
        if registry.is_named(self):
            return {"k": self.k}
        return {"activation": self.activation.fields()}

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> SparseCoder:
        """As torch's, but accumulators, which are the buffers, keep their dtype."""
        kinds = {name: buffer.dtype for name, buffer in self._buffers.items() if buffer is not None}
        old = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, kind in kinds.items():
            moved, before = self._buffers[name], old[name]
            if moved is not None and before is not None and moved.dtype != kind:
                self._buffers[name] = before.to(moved.device)
        return self

    def extra_repr(self) -> str:
        return ", ".join(f"{k}={v}" for k, v in self.config().items() if k != "class")

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the module to one file; `ksae.load(path)` reads it."""
        from .file import save

        self.require_whole("save")
        save(self, path)

    @property
    def dead(self) -> Tensor:
        """[F] bool: latents that have not fired for more than `dead_after` tokens."""
        return self.found("tokens_since_fired") > self.dead_after

    # ------------------------------------------------------------------------------------- the code

    def require_whole(self, method: str) -> None:
        """Refuse what the latents of one rank alone cannot do.

        Raises:
            ValueError: the coder is spread over ranks.
        """
        if self.ranks is not None:
            everyone = self.ranks.everyone
            got = f"the part of rank {everyone.rank} of {everyone.size}"
            raise ValueError(
                f"{type(self).__name__}: {method} must be called on a whole coder, got {got}:"
                " ksae.unshard makes it whole"
            )

    def require_tensor(self, arg: str, t: object) -> None:
        """Refuse an argument that is no tensor.

        Raises:
            TypeError: it is none.
        """
        if not isinstance(t, Tensor):
            kind = f"{type(t).__module__}.{type(t).__name__}".removeprefix("builtins.")
            hint = ": torch.from_numpy makes one of it" if kind == "numpy.ndarray" else ""
            raise TypeError(
                f"{type(self).__name__}: {arg} must be a torch.Tensor, got {kind}{hint}"
            )

    def rows(self, arg: str, t: Tensor, d: int) -> Tensor:
        """[..., d] -> [N, d] in the parameters' dtype, checked."""
        name = type(self).__name__
        self.require_tensor(arg, t)
        if t.dim() < 1 or t.shape[-1] != d:
            raise ValueError(f"{name}: {arg} must be of shape [..., {d}], got {list(t.shape)}")
        if not t.is_floating_point():
            raise TypeError(f"{name}: {arg} must be floating, got {t.dtype}")
        if t.device != self.W_enc.device:
            raise ValueError(f"{name}: {arg} must be on {self.W_enc.device}, got {t.device}")
        return t.to(self.W_enc.dtype).reshape(-1, d)

    def targets(self, x: Tensor, rows: Tensor, y: Tensor | None) -> Tensor | None:
        """The target's rows [N, d_out], None if there is no target."""
        if y is None:
            return rows if self.centred else None
        self.require_tensor("y", y)
        if y.shape[:-1] != x.shape[:-1]:
            want = f"of shape {[*x.shape[:-1], self.d_out]} for x of shape {list(x.shape)}"
            raise ValueError(f"{type(self).__name__}: y must be {want}, got {list(y.shape)}")
        return self.rows("y", y, self.d_out)

    def encode_dead(self, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
        """Values and indices [N, k] of the k largest dead pre-activations of each of x's rows
        [N, d_in]: the code of AuxK."""
        return self.activation.encode_dead(self, rows, k)

    def gradients(self, x: Tensor, grad: Tensor | None, training: bool) -> Tensor | None:
        """The rows [N, d_out] of a downstream gradient [..., d_out], as `select` takes it."""
        return self.activation.gradients(self, x, grad, training)

    def select(
        self, rows: Tensor, k: int, grad: Tensor | None, W_bf16: tuple[Tensor, ...] = ()
    ) -> tuple[Tensor, ...]:
        """The fields of the `Code` that x's rows [N, d_in] get in training, of k latents a row;
        W_bf16: that of W_enc and its norms, where they are kept."""
        return self.activation.select(self, rows, k, grad, W_bf16)

    def select_aux(
        self,
        rows: Tensor,
        k: int,
        k_aux: int,
        grad: Tensor | None,
        W_bf16: tuple[Tensor, ...] = (),
    ) -> tuple[Tensor, ...]:
        """What `select` returns, then values and indices [N, k_aux] of AuxK, of dead latents."""
        return self.activation.select_aux(self, rows, k, k_aux, grad, W_bf16)

    def encode(self, x: Tensor, grad: Tensor | None = None) -> tuple[Tensor, ...]:
        """The sparse code of x [..., d_in] -> values [..., k], indices [..., k] int64; for an
        activation without a fixed k values [E], indices [E], row_offsets [N+1].

        As in use, not in training: selected by u, which needs no labels, or with grad [..., d_out]
        by the score.
        """
        self.require_whole("encode")
        scaled = self.gradients(x, grad, training=False)
        values, indices, *offsets = self.activation.infer(
            self, self.rows("x", x, self.d_in), scaled
        )
        if offsets:
            return values, indices, *offsets
        shape = (*x.shape[:-1], self.k)
        return values.reshape(shape), indices.reshape(shape)

    def encode_dense(self, x: Tensor) -> Tensor:
        """The code of x [..., d_in] with its zeros -> [..., F]."""
        return Code(*self.encode(x)).dense(self.d_sae).reshape(*x.shape[:-1], self.d_sae)

    def decode(
        self,
        values: Tensor,
        indices: Tensor,
        x: Tensor | None = None,
        row_offsets: Tensor | None = None,
    ) -> Tensor:
        """Reconstruction [..., d_out] of a code; x [..., d_in] is needed with a skip connection."""
        self.require_whole("decode")
        if row_offsets is not None and self.training and self.activation.is_dense(self):
            dense = Code(values, indices, row_offsets).dense(self.d_sae)
            recon = torch.addmm(self.b_dec, dense, self.W_dec)
        else:
            recon = functional.sparse_decode(values, indices, self.W_dec, self.b_dec, row_offsets)
        if self.W_skip is None:
            return recon
        if x is None:
            raise ValueError(
                f"{type(self).__name__}: x must be given to decode with a skip connection, got None"
            )
        return recon + nnf.linear(x.to(self.W_skip.dtype), self.W_skip)

    # ----------------------------------------------------------------------------------- the losses

    def forward(self, x: Tensor, y: Tensor | None = None, *, grad: Tensor | None = None) -> Output:
        """Reconstruct x [..., d_in] or predict y [..., d_out]; losses if there is a target."""
        self.require_whole("forward")
        rows = self.rows("x", x, self.d_in)  # [N, d_in]
        target = self.targets(x, rows, y)  # [N, d_out]
        ks = [self.k] if target is None else [self.k, *(k for k, _ in self.multi_k)]
        downstream = self.gradients(x, grad, self.training)  # [N, d_out]
        if self.training or len(ks) > 1:
            wide = Code(*self.select(rows, max(ks), downstream))
        else:
            wide = Code(*self.activation.infer(self, rows, downstream))
        code, lead = wide.first(self.k), x.shape[:-1]  # sorted: a prefix
        values = code.values  # what is returned has a gradient: so it stands between encoder and
        if code.offsets is None:  # decoder
            values = values.reshape(*lead, self.k)
            code = Code(values.reshape(-1, self.k), code.indices)
            rest = wide.values[:, self.k :]
            wide = (
                Code(torch.cat([code.values, rest], dim=1), wide.indices) if len(ks) > 1 else code
            )
        recon = self.decode(code.values, code.indices, rows, code.offsets)
        loss = fvu = auxk_loss = multi_topk_loss = prefix_fvu = None
        if target is not None:
            loss, fvus, parts = losses(self, rows, target, recon, wide)
            fvu = fvus[-1]
            prefix_fvu = fvus if self.prefixes else None
            zero = torch.zeros_like(fvu)
            auxk_loss, multi_topk_loss = parts.get("auxk", zero), multi_loss(self, parts)
            multi_topk_loss = zero if multi_topk_loss is None else multi_topk_loss
        if self.training and not recomputes():
            self._count(code, rows.shape[0])
            self.activation.observe(self, code)
        return Output(
            recon.reshape(*lead, self.d_out),
            values,
            code.indices.reshape(values.shape),
            loss,
            fvu,
            auxk_loss,
            multi_topk_loss,
            prefix_fvu,
            code.offsets,
        )

    # ------------------------------------------------------------------------- one's own optimizer

    @torch.no_grad()
    def remove_gradient_parallel_to_decoder_directions(self) -> None:
        """Take out of W_dec.grad [F, d_out] its component along each decoder row: what an update
        along it would do, `set_decoder_norm_to_unit_norm` undoes. After backward, before the step.

        Raises:
            ValueError: W_dec has no gradient.
        """
        if self.W_dec.grad is None:
            raise ValueError(
                f"{type(self).__name__}: W_dec must have a gradient to project, got none: call it "
                "after backward()"
            )
        self.W_dec.grad.copy_(without_parallel(self.W_dec.grad, self.W_dec))

    @torch.no_grad()
    def set_decoder_norm_to_unit_norm(self) -> None:
        """Give the decoder rows [F, d_out] length 1, after the step of a torch optimizer; rows of
        zeros stay. Norms in float32 (float64). `ksae.UnitRows` is the same as a parametrisation."""
        self.W_dec.copy_(unit_rows(self.W_dec))
