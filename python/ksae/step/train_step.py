# SPDX-License-Identifier: Apache-2.0
"""One training step: gradients, projection, clipping, Adam and unit decoder rows.

fused=True (fused.py) does it in one pass over latents, without a dense gradient; fused=False
(unfused.py) is autograd and torch.optim.Adam in the same order, and the oracle of the first. Adam
is dense in both: a latent with zero gradient still moves.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from ..coders.activation import Activation
from ..coders.activation.above import Above
from ..coders.auxk import AUXK
from ..coders.coder import SparseCoder
from ..coders.config import integer
from ..coders.terms import total_variance
from ..parallel.one_device import OneDevice
from ..parallel.shards import Shards
from .fused import FusedStep
from .state import State, check_memory
from .unfused import CLIPS, Metrics, Unfused

DECODER_LR = 3.0  # bench/README.md, studies/recipe.py: measured on autoencoders


class TrainStep:
    """A training step for any `SparseCoder`, in the order "project-clip-adam-normalize".

    Gradients of the module's loss; then, if the module has normalize_decoder, the decoder gradient
    without its component along each decoder row; then, if clip_norm is given, the global norm of
    all gradients clipped to it; Adam (arXiv 1412.6980); then, if normalize_decoder, unit decoder
    rows.

    Args:
        model: its parameters are updated in place, all of them, whatever their requires_grad. Of
            `ksae.shard`, a step is one of all ranks, which all take it: each gives as many tokens.
        lr: learning rate; `step.lr` may be assigned between steps. So may `step.k`, latents a token
            of the steps that follow, None being the model's own, and `step.penalty`, what their
            activation's penalty counts, at first 1: `ksae.step.schedule` has schedules.
        decoder_lr: the rate of W_dec as a multiple of lr; default 3 for an autoencoder with
            normalize_decoder, else 1. It is the encoder's rate at which latents die; given the
            codes the decoder's problem is convex.
        betas, eps: of Adam.
        clip_norm: largest global gradient norm; None: no clipping.
        clip: when the gradients are scaled to clip_norm: "above", where their norm is larger;
            "always", at every step, so that all count alike in Adam's moments, whatever the scale
            of the loss and however far it has fallen.
        fused: False runs autograd and torch.optim.Adam instead.
        moments: "bfloat16", for the fused step of bfloat16 models: W_enc and W_dec have no masters,
            and they and their moments are bfloat16, rounded stochastically. A step then moves 12
            bytes of theirs a parameter instead of 26, by count. On the CPU plain torch does it.

    Raises:
        ValueError: a setting out of range, or parameters of different dtypes or devices, not
            contiguous or with memory in common, here or at the first step after they came to be so.

    Numerics: gradients, moments and update in float32 (float64 for float64 parameters). bfloat16
    and float16 parameters have float32 masters here, except as `moments` says: a master is updated
    and the parameter is the master rounded. Parameters written from outside between steps are taken
    over. A step whose loss (or, if clipping, gradient norm) is not finite changes nothing and
    returns that loss; the first such step warns and says why, on CUDA if it is the first of all.
    The fused step gives the same bits on every run and, natively, for every number of threads. On
    CUDA it waits for the device at its first step alone (later it reads how many latents were dead
    some steps ago), and after that it can be captured in a CUDA graph, which does not know that
    number and gathers what AuxK otherwise multiplies. Where float32 weights are encoded by
    screening, it keeps the bf16 copy of W_enc that screening reads, 2 bytes a weight, and makes it
    anew when W_enc was written from outside; a replayed graph does not see that, nor any step a
    write that does not count in the parameter's version, as through `.data`.

    Example:
        >>> import torch, ksae
        >>> step = ksae.TrainStep(ksae.TopKSAE(d_in=8, d_sae=32, k=4), lr=1e-3)
        >>> sorted(step(torch.randn(64, 8)))
        ['auxk_loss', 'dead', 'fvu', 'l0', 'loss']
    """

    order = "project-clip-adam-normalize"

    def __init__(
        self,
        model: SparseCoder,
        lr: float = 1e-4,
        *,
        decoder_lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        clip_norm: float | None = None,
        clip: str = "above",
        fused: bool = True,
        moments: str = "float32",
    ) -> None:
        self.communicator: OneDevice | Shards = model.ranks or OneDevice()
        if decoder_lr is None:
            decoder_lr = decoder_rate(model.centred, model.normalize_decoder)
        settings = {"betas": betas, "eps": eps, "clip_norm": clip_norm, "clip": clip}
        settings |= {"moments": moments, "decoder_lr": decoder_lr}
        try:
            _check(model, lr, fused=fused, **settings)  # type: ignore[arg-type]
        except Exception as error:
            self.communicator.refuse("TrainStep", error)
            raise
        self.communicator.agree("TrainStep", settings)
        self.model, self.betas, self.eps, self.clip_norm = model, betas, eps, clip_norm
        self.clip, self.fused, self.decoder_lr = clip, fused, decoder_lr
        rounded = ("W_enc", "W_dec") if moments == "bfloat16" else ()
        self.state = State(model, betas, eps, rounded)
        self.parameters, self.theta = self.state.parameters, self.state.theta
        self.masters, self.moments, self.t = self.state.masters, self.state.moments, self.state.t
        self._fused: FusedStep | None = None
        if fused:
            self._fused = FusedStep(
                model, self.state, clip_norm, self.communicator, clip, decoder_lr
            )
        self._unfused: Unfused | None = None  # beside the fused step: for batches of dense codes
        if not fused or isinstance(model.activation, Above):
            self._unfused = Unfused(model, self.state, betas, eps, clip_norm, clip, decoder_lr)
        self._warned = False  # of a step that was not taken
        self._k: int | None = None
        self._penalty = 1.0
        self.lr = lr

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return self._lr

    @lr.setter
    def lr(self, lr: float) -> None:
        _check_lr(lr)
        self._lr = float(lr)
        self.state.lr.fill_(self._lr)

    @property
    def k(self) -> int | None:
        """Latents a token in training from the next step on; None: the model's own."""
        return self._k

    @k.setter
    def k(self, k: int | None) -> None:
        if k is not None:
            k = integer("TrainStep", "k", k)
            activation = self.model.activation
            if not activation.k:
                kind = type(activation).__name__
                raise ValueError(f"TrainStep: k must be None with {kind}, which has none, got {k}")
            activation.scheduled(k, 1.0).check("TrainStep", self.model.d_sae)
        self._k = k

    @property
    def penalty(self) -> float:
        """What the activation's penalty is multiplied by from the next step on."""
        return self._penalty

    @penalty.setter
    def penalty(self, penalty: float) -> None:
        if not 0 <= penalty < float("inf"):
            raise ValueError(f"TrainStep: penalty must be a finite number >= 0, got {penalty}")
        activation = self.model.activation
        if penalty != 1 and not activation.penalized:
            kind = type(activation).__name__
            raise ValueError(f"TrainStep: penalty must be 1 with {kind}, got {penalty}")
        self._penalty = float(penalty)

    def __call__(
        self, x: Tensor, y: Tensor | None = None, *, grad: Tensor | None = None
    ) -> Metrics:
        """Take one step on x [..., d_in], for a transcoder y [..., d_out], and for a module that
        selects by it the downstream gradient grad [..., d_out].

        Returns 0-d tensors, all from before the update: loss, fvu, auxk_loss, l0 (mean number of
        values that are not 0 a token), dead (share of latents), and with multi_topk
        multi_topk_loss, with clip_norm grad_norm (unclipped), with grad nonfinite_grad_rows: how
        many rows of it had an entry that is not finite and were selected by u.
        """
        own = self.model.activation
        self.model.activation = own.scheduled(self._k, self._penalty)
        try:
            return self._take(x, y, grad)
        finally:
            self.model.activation = own

    def _take(self, x: Tensor, y: Tensor | None, grad: Tensor | None) -> Metrics:
        model = self.model
        if model.ranks is None:
            rows, target = self._rows(x, y)
        else:
            rows, target, grad = self._rows_of_all(x, y, grad)
            x = rows
        buffers = model.named_buffers()
        running = [(b, b.clone()) for name, b in buffers if name != "tokens_since_fired"]
        with torch.autocast(rows.device.type, enabled=False):
            scaled = model.gradients(x, grad, training=True)  # [N, d_out]
            dense = model.ranks is None and model.activation.is_dense(model)
            if self._fused is not None and not dense:
                metrics, finite = self._fused.step(rows, target, scaled)
            else:
                assert self._unfused is not None
                self._unfused.set_steps_taken()
                for buffer, old in running:  # the module's forward counts the batch itself
                    buffer.copy_(old)
                flat = None if grad is None else grad.reshape(-1, model.d_out)
                metrics, finite = self._unfused.step(rows, target, flat)
                if self._fused is not None:
                    self.state.renew_bf16_copy()
        self.state.keep_above(model.activation.at_least(), finite)
        for buffer, old in running:
            buffer.copy_(torch.where(finite, buffer, old))
        if scaled is not None:
            metrics["nonfinite_grad_rows"] = (~scaled.isfinite().all(1)).sum()
        self.state.note_versions()
        if not self._warned and not torch.compiler.is_compiling():
            self._warned = rows.is_cuda  # a look at later batches would stop a stream
            if _may_look(rows) and not bool(finite):
                self._warned = True
                self._warn(rows, target, scaled, metrics["loss"])
        return metrics

    def _rows(self, x: Tensor, y: Tensor | None) -> tuple[Tensor, Tensor]:
        """Rows [N, d_in] and targets [N, d_out]."""
        rows = self.model.rows("x", x, self.model.d_in).contiguous()
        target = self.model.targets(x, rows, y)
        if target is None:
            raise ValueError("TrainStep: y must be given for a transcoder, got None")
        self.state.adopt()
        return rows, target.contiguous()

    def _rows_of_all(
        self, x: Tensor, y: Tensor | None, grad: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Rows [N, d_in] of all ranks, targets [n, d_out] of this one, gradients [N, d_out]."""
        communicator = self.communicator
        try:
            rows, target = self._rows(x, y)
            if grad is not None:
                self.model.require_tensor("grad", grad)
        except Exception as error:
            communicator.refuse("TrainStep", error)
            raise
        communicator.agree(
            "TrainStep",
            {
                "the shape of x": list(x.shape),
                "the shape of y": None if y is None else list(y.shape),
                "the shape of grad": None if grad is None else [*grad.shape, grad.dtype],
                "the learning rate": self.lr,
                "k": self.k,
                "the penalty": self.penalty,
            },
        )
        if grad is not None:
            grad = communicator.gather(grad.reshape(-1, grad.shape[-1]))
        return communicator.tokens(rows), target, grad

    def _warn(self, x: Tensor, y: Tensor, grad: Tensor | None, loss: Tensor) -> None:
        """Say why a step was not taken."""
        if not x.isfinite().all():
            why = "x has an entry that is not finite"
        elif not y.isfinite().all():
            why = "y has an entry that is not finite"
        elif self.model.loss == "fvu" and not total_variance(y) > 0:
            why = f"the target has no variance ({y.shape[0]} rows, all equal), which loss='fvu'"
            why += " divides by"
        elif grad is not None and not grad.isfinite().all():
            why = "grad has an entry that is not finite"
        else:
            why = "it overflowed, or a parameter is not finite"
        warnings.warn(
            f"TrainStep: a step was not taken, its loss was {float(loss)}: {why};"
            " said once, later steps like it are silent",
            stacklevel=4,
        )

    def state_dict(self) -> dict[str, Tensor]:
        """Steps taken, moments and masters, by name; the same for fused and not."""
        return self.state.state_dict()

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned, for a model of the same shapes and dtype."""
        self.state.load_state_dict(state)
        if self._unfused is not None:
            self._unfused.set_steps_taken()


def _may_look(rows: Tensor) -> bool:
    """Whether a number may be read from the rows' device: not while a graph is recorded."""
    if rows.is_meta:
        return False
    return not (rows.is_cuda and torch.cuda.is_current_stream_capturing())


def decoder_rate(centred: bool, normalized: bool) -> float:
    """The default of `decoder_lr`, of an autoencoder (centred) or a transcoder."""
    return DECODER_LR if centred and normalized else 1.0


def _check_lr(lr: float) -> None:
    if not 0 <= lr < float("inf"):
        raise ValueError(f"TrainStep: lr must be a finite number >= 0, got {lr}")


def fused_refuses(activation: Activation, auxk: str) -> str | None:
    """What of a coder, its activation or AuxK of that name, the fused step does not serve."""
    kind = type(activation).__name__
    if activation.fused_refuses:
        return f"{kind} of {activation.fused_refuses}"
    if not activation.identity and not AUXK[auxk].detached:
        return f"{kind} and auxk={auxk!r}"
    return None


def _check(
    model: SparseCoder,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    clip_norm: float | None,
    clip: str,
    fused: bool,
    moments: str,
    decoder_lr: float,
) -> None:
    _check_lr(lr)
    if not 0 <= decoder_lr < float("inf"):
        raise ValueError(f"TrainStep: decoder_lr must be a finite number >= 0, got {decoder_lr}")
    if not 0 <= betas[0] < 1 or not 0 <= betas[1] < 1:
        raise ValueError(f"TrainStep: betas must be in [0, 1), got {betas}")
    if not eps > 0:
        raise ValueError(f"TrainStep: eps must be > 0, got {eps}")
    if clip_norm is not None and not clip_norm > 0:
        raise ValueError(f"TrainStep: clip_norm must be > 0 or None, got {clip_norm}")
    if clip not in CLIPS:
        raise ValueError(f"TrainStep: clip must be above or always, got {clip!r}")
    if moments not in ("float32", "bfloat16"):
        raise ValueError(f"TrainStep: moments must be float32 or bfloat16, got {moments!r}")
    parameters = dict(model.named_parameters())
    first = model.W_enc
    if moments == "bfloat16" and not (fused and first.dtype == torch.bfloat16):
        got = f"{first.dtype} and fused={fused}"
        want = "float32 without fused=True and a torch.bfloat16 model"
        raise ValueError(f"TrainStep: moments must be {want}, got bfloat16 with {got}")
    for name, p in parameters.items():
        if p.dtype != first.dtype or p.device != first.device:
            want = f"{first.dtype} on {first.device} as W_enc"
            raise ValueError(f"TrainStep: {name} must be {want}, got {p.dtype} on {p.device}")
    if fused and (what := fused_refuses(model.activation, model.auxk)):
        raise ValueError(f"TrainStep: fused must be False with {what}, got True")
    if moments == "bfloat16" and isinstance(model.activation, Above):
        kind = type(model.activation).__name__
        raise ValueError(f"TrainStep: moments must be float32 with {kind}, got bfloat16")
    if model.ranks is not None and not fused:
        raise ValueError("TrainStep: fused must be True for a coder spread over ranks, got False")
    check_memory(model)
