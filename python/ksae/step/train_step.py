# SPDX-License-Identifier: Apache-2.0
"""One training step: gradients, projection, clipping, Adam and unit decoder rows.

fused=True does it in one pass over latents, without a dense gradient; fused=False (unfused.py) is
autograd and torch.optim.Adam in the same order, and the oracle of the first. Adam is dense in both:
a latent with zero gradient still moves.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..backends import serving as gpu
from ..backends import triton
from ..coders.coder import SparseCoder
from ..ops import accumulator
from .unfused import Metrics, Unfused


class _Group(NamedTuple):
    """A term of the loss: its code, grouped by latent, and its residual."""

    values: Tensor  # [N, k]
    grads: Tensor  # [N, k] of the values, before scaling
    offsets: Tensor  # [F+1]
    order: Tensor  # [N*k]
    residual: Tensor  # [N, columns]
    sq_error: Tensor  # [N], of all columns
    sums: Tensor | None  # [d] of all its columns, where the kernel forms them


class TrainStep:
    """A training step for any `SparseCoder`, in the order "project-clip-adam-normalize".

    Gradients of the module's loss; then, if the module has normalize_decoder, the decoder gradient
    without its component along each decoder row; then, if clip_norm is given, the global norm of
    all gradients clipped to it; Adam (arXiv 1412.6980); then, if normalize_decoder, unit decoder
    rows.

    Args:
        model: its parameters are updated in place, all of them, whatever their requires_grad.
        lr: learning rate; `step.lr` may be assigned between steps.
        betas, eps: of Adam.
        clip_norm: largest global gradient norm; None: no clipping.
        fused: False runs autograd and torch.optim.Adam instead.
        moments: "bfloat16", for the fused step of bfloat16 models: W_enc and W_dec have no masters,
            and they and their moments are bfloat16, rounded stochastically. A step then moves 12
            bytes of theirs a parameter instead of 28, by count. On the CPU plain torch does it.

    Raises:
        ValueError: a setting out of range, or parameters of different dtypes or devices.

    Numerics: gradients, moments and update in float32 (float64 for float64 parameters). bfloat16
    and float16 parameters have float32 masters here, except as `moments` says: a master is updated
    and the parameter is the master rounded. Parameters written from outside between steps are taken
    over. A step whose loss (or, if clipping, gradient norm) is not finite changes nothing and
    returns that loss. The fused step gives the same bits on every run and, natively, for every
    number of threads. On CUDA it never waits for the device, and after a warm-up step it can be
    captured in a CUDA graph. Where float32 weights are encoded by screening, it keeps the bf16 copy
    of W_enc that screening reads, 2 bytes a weight, and makes it anew when W_enc was written from
    outside; a replayed graph does not see that, nor any step a write that does not count in the
    parameter's version, as through `.data`.

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
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        clip_norm: float | None = None,
        fused: bool = True,
        moments: str = "float32",
    ) -> None:
        if not 0 <= betas[0] < 1 or not 0 <= betas[1] < 1:
            raise ValueError(f"TrainStep: betas must be in [0, 1), got {betas}")
        if not eps > 0:
            raise ValueError(f"TrainStep: eps must be > 0, got {eps}")
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(f"TrainStep: clip_norm must be > 0 or None, got {clip_norm}")
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
        self.model, self.betas, self.eps, self.clip_norm = model, betas, eps, clip_norm
        self.fused = fused
        self.acc = acc = accumulator(first.dtype)
        self.parameters = parameters
        # the seeds of those that are rounded stochastically
        names = ("W_enc", "W_dec") if moments == "bfloat16" else ()
        self._seeds = {n: torch.tensor(i, device=first.device) for i, n in enumerate(names)}
        with torch.no_grad():
            self.masters = {
                n: p.to(acc)
                for n, p in parameters.items()
                if acc != first.dtype and n not in self._seeds
            }
        # theta is what Adam moves
        self.theta: Mapping[str, Tensor] = parameters | self.masters
        self.moments = {
            n: (torch.zeros_like(p, dtype=kind), torch.zeros_like(p, dtype=kind))
            for n, p in parameters.items()
            for kind in [p.dtype if n in self._seeds else acc]
        }
        self.t = torch.zeros((), dtype=torch.float64, device=first.device)  # steps taken
        constants = torch.tensor([*betas, eps], dtype=torch.float64)
        self._constants = constants.to(first.device)
        self._sums_in_decode = first.is_cuda  # one reading of the residual less
        self._W_bf16: tuple[Tensor, ...] = ()  # of W_enc and its norms, once a step has read them
        self._versions = self._read_versions()
        self._unfused: Unfused | None = None
        if not fused:
            shared = (model, parameters, self.masters, self.theta, self.moments, self.t)
            self._unfused = Unfused(*shared, betas=betas, eps=eps, clip_norm=clip_norm)
        self._lr_on_device = torch.zeros_like(self.t)  # a CUDA graph reads it at every replay
        self.lr = lr

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return self._lr

    @lr.setter
    def lr(self, lr: float) -> None:
        if not 0 <= lr < float("inf"):
            raise ValueError(f"TrainStep: lr must be a finite number >= 0, got {lr}")
        self._lr = float(lr)
        self._lr_on_device.fill_(self._lr)
        if self._unfused is not None:
            self._unfused.optimizer.param_groups[0]["lr"] = self._lr

    def __call__(
        self, x: Tensor, y: Tensor | None = None, *, grad: Tensor | None = None
    ) -> Metrics:
        """Take one step on x [..., d_in], for a transcoder y [..., d_out], and for a module that
        selects by it the downstream gradient grad [..., d_out].

        Returns 0-d tensors, all from before the update: loss, fvu, auxk_loss, l0 (mean number of
        positive values a token), dead (share of latents), and with multi_topk multi_topk_loss, with
        clip_norm grad_norm (unclipped), with grad nonfinite_grad_rows: how many rows of it had an
        entry that is not finite and were selected by u.
        """
        model = self.model
        rows = model.rows("x", x, model.d_in).contiguous()
        target = model.targets(x, rows, y)
        if target is None:
            raise ValueError("TrainStep: y must be given for a transcoder, got None")
        self._adopt()
        buffers = model.named_buffers()
        running = [(b, b.clone()) for name, b in buffers if name != "tokens_since_fired"]
        with torch.autocast(rows.device.type, enabled=False):
            scaled = model.gradients(x, grad, training=True)  # [N, d_out]
            if self._unfused is None:
                metrics, finite = self._fused(rows, target.contiguous(), scaled)
            else:
                for buffer, old in running:  # the module's forward counts the batch itself
                    buffer.copy_(old)
                flat = None if grad is None else grad.reshape(-1, model.d_out)
                metrics, finite = self._unfused.step(rows, target.contiguous(), flat)
        for buffer, old in running:
            buffer.copy_(torch.where(finite, buffer, old))
        if scaled is not None:
            metrics["nonfinite_grad_rows"] = (~scaled.isfinite().all(1)).sum()
        self._versions = self._read_versions()
        return metrics

    # ---------------------------------------------------------------------------------------- fused

    @torch.no_grad()
    def _fused(self, x: Tensor, y: Tensor, grad: Tensor | None) -> tuple[Metrics, Tensor]:
        model, acc = self.model, self.acc
        N, F, d = x.shape[0], model.d_sae, model.d_out
        b_dec = model.b_dec if model.centred else None
        variance = ops.total_variance(y)
        is_fvu = model.loss == "fvu"
        denominators = [variance if is_fvu else torch.full_like(variance, y.numel())]
        shares = [1.0]
        dead = model.dead
        n_dead = dead.sum()
        k_aux = self._k_aux(dead) if model.auxk_alpha > 0 else 0
        metrics: Metrics = {}

        # The residual [N, d] is a CPU's largest temporary. Where it is not small beside [N, F], or
        # a 16-bit copy of the batch is there as well, half of it exists at a time. On a GPU chunks
        # of scores are larger, and the other half would cost gathers again.
        has_room = x.is_cuda or (64 if self.masters else 32) * d <= F
        whole = bool(model.multi_topk or k_aux or model.skip or self.clip_norm) or has_room
        columns = d if whole else min(d, (d + 7) // 8 * 4)  # a multiple of 4
        # With a skip connection the sparse part predicts what the linear part leaves.
        target = y if model.W_skip is None else y.to(acc) - x.to(acc) @ model.W_skip.to(acc).T

        k = model.k_multi if model.multi_topk else model.k
        self._keep_bf16_copy(max(k, k_aux), k_aux > 0, grad)
        if k_aux:
            *wide, aux_values, aux_indices = model.select_aux(x, k, k_aux, grad, self._W_bf16)
        else:
            wide = [*model.select(x, k, grad, self._W_bf16)]  # [N, k] twice, sorted
        code = (wide[0][:, : model.k].contiguous(), wide[1][:, : model.k].contiguous())
        decoder = (model.W_dec, model.b_dec, target)
        groups = [self._group(code, decoder, columns)]
        if model.multi_topk:
            groups.append(self._group((wide[0], wide[1]), decoder, d))
            denominators.append(denominators[0])
            shares.append(1 / 8)
        with_bias = len(groups)  # AuxK decodes without bias and without skip
        if k_aux:
            left = -groups[0].residual  # what AuxK predicts: y - recon
            groups.append(self._group((aux_values, aux_indices), (model.W_dec, None, left), d))
            denominators.append(torch.where(n_dead > 0, ops.total_variance(left), 0))
            shares.append(model.auxk_alpha)
        lists = (list(t) for t in zip(*groups, strict=True))
        values, grads, offsets, order, residuals, sq_errors, sums = lists
        errors, terms, loss, scale = ops.loss_terms(sq_errors, denominators, shares)
        metrics["loss"] = loss
        metrics["fvu"] = terms[0] if is_fvu else errors[0] / variance
        metrics["auxk_loss"] = terms[-1] if k_aux else torch.zeros_like(loss)
        metrics["l0"] = offsets[0][-1].to(acc) / N  # entries that are not 0
        metrics["dead"] = n_dead.to(acc) / F
        if model.multi_topk:
            metrics["multi_topk_loss"] = terms[1]

        grad_b_enc, grad_dot_w = ops.latent_sums(values, grads, offsets, order, scale)
        along = grad_dot_w if model.normalize_decoder else None
        encoder = (grads, offsets, order, [x] * len(groups))
        # of each small parameter the gradients whose sum, weighted by the scales, is its own
        small = {"b_dec": _column_sums(residuals[:with_bias], sums)}
        if model.W_skip is not None:
            small["W_skip"] = [r.T @ x.to(acc) for r in residuals[:with_bias]]
        norm = None
        if self.clip_norm is not None:
            square = ops.row_grad_sq(*encoder, scale, b_dec, None, model.W_enc, 0)
            square += ops.row_grad_sq(
                values, offsets, order, residuals, scale, None, along, model.W_dec, 0
            )
            total = square.sum() + grad_b_enc.double().square().sum()
            for name, parts in small.items():
                g = sum((s * t for s, t in zip(scale, parts, strict=False)), torch.zeros_like(loss))
                if name == "b_dec" and model.centred:
                    g = g - model.W_enc.to(acc).T @ grad_b_enc
                total = total + g.double().square().sum()
            metrics["grad_norm"] = norm = total.sqrt().to(acc)

        adam = (self._lr_on_device, self.t, self._constants)
        hyper, finite, scale = ops.adam_scalars(loss, norm, self.clip_norm, scale, *adam)
        centre_grad = torch.empty(model.d_in, dtype=acc, device=x.device) if model.centred else None
        centre_sums = grad_b_enc if model.centred else None
        state = self._state("W_enc")
        W_bf16, norms = self._W_bf16 or (None, None)
        options = (hyper, centre_grad, 0, False, W_bf16, self._rng_state("W_enc"), norms)
        ops.row_update(*encoder, scale, b_dec, None, centre_sums, *state, *options)
        state, unit = self._state("W_dec"), model.normalize_decoder
        rng_state = self._rng_state("W_dec")
        last = columns == d
        ops.row_update(
            values,
            offsets,
            order,
            residuals,
            scale,
            None,
            along,
            None,
            *state,
            hyper,
            None,
            0,
            unit and last,
            None,
            rng_state,
        )
        if not last:  # the other half, from the columns of W_dec that are still as they were
            del groups
            residuals.clear()
            residuals = [ops.sparse_residual_slice(*code, *decoder, columns, d)]
            if sums[0] is None:
                rest = _column_sums(residuals, sums)
                small["b_dec"] = [torch.cat([small["b_dec"][0], rest[0]])]
            ops.row_update(
                values,
                offsets,
                order,
                residuals,
                scale,
                None,
                along,
                None,
                *state,
                hyper,
                None,
                columns,
                unit,
                None,
                rng_state,
            )
        fired = offsets[0][1:] > offsets[0][:-1]  # [F]: has a value > 0 (finite loss: no NaN)
        del residuals, values, grads, order, encoder
        taken = (finite, hyper)
        ops.vector_update([grad_b_enc], None, None, *taken, *self._state("b_enc"))
        for name, parts in small.items():
            minus = centre_grad if name == "b_dec" else None
            ops.vector_update(parts, scale[: len(parts)], minus, *taken, *self._state(name))
        model.tokens_since_fired.add_(finite, alpha=N).masked_fill_(fired & finite, 0)
        self.t += finite
        return metrics, finite

    def _k_aux(self, dead: Tensor) -> int:
        """Latents a token that AuxK takes, no more than are dead; 0: none are.

        On CUDA only the device knows how many are dead: there the last of k_aux slots may be
        living latents, whose value is 0.
        """
        if dead.is_cuda:
            return min(self.model.k_aux, dead.numel())
        return min(self.model.k_aux, int(dead.sum()))

    def _group(
        self,
        code: tuple[Tensor, Tensor],
        decoder: tuple[Tensor, Tensor | None, Tensor],
        columns: int,
    ) -> _Group:
        """One term of the loss."""
        sums = None
        if self._sums_in_decode and decoder[1] is not None:
            sums = torch.empty(self.model.d_out, dtype=self.acc, device=code[0].device)
        residual, square, grads = ops.sparse_residual(*code, *decoder, columns, sums)
        offsets, order = ops.group_by_latent(*code, self.model.d_sae)
        return _Group(code[0], grads, offsets, order, residual, square, sums)

    def _keep_bf16_copy(self, k: int, aux: bool, grad: Tensor | None) -> None:
        """From the first step that screens with a bf16 copy; with a gradient only AuxK does."""
        if self._W_bf16:
            return
        W = self.parameters["W_enc"]
        unseen = W.is_inference() or self.model.shares_memory  # writes that no version counts
        if (aux or grad is None) and gpu.screens(W, k, aux) and not unseen:
            self._W_bf16 = triton.bf16_copy(W)

    def _renew_shadow(self) -> None:
        """In place: a CUDA graph knows where it lies."""
        if self._W_bf16:
            for kept, new in zip(self._W_bf16, triton.bf16_copy(self.model.W_enc), strict=True):
                kept.copy_(new)

    def _state(self, name: str) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Parameter, master and moments, as row_update wants them."""
        return self.parameters[name], self.masters.get(name), *self.moments[name]

    def _rng_state(self, name: str) -> Tensor | None:
        """Seed and step of the stochastic rounding of a matrix, as row_update wants them."""
        seed = self._seeds.get(name)
        return None if seed is None else torch.stack([seed, self.t.long()])

    # ---------------------------------------------------------------------------------------- state

    def _read_versions(self) -> dict[str, tuple[int, int]]:
        return {
            n: (p.data_ptr(), -1 if p.is_inference() else p._version)
            for n, p in self.parameters.items()
        }

    @torch.no_grad()
    def _adopt(self) -> None:
        """Take over parameters that somebody else has replaced or written since the last step."""
        versions = self._read_versions()
        current = dict(self.model.named_parameters())
        for name, p in self.parameters.items():
            if current.get(name) is not p:
                raise ValueError(
                    f"TrainStep: {name} must be the parameter that the step was made for, got a"
                    " new one: make a new TrainStep after replacing parameters"
                )
        for name, master in self.masters.items():
            if versions[name] != self._versions[name]:
                p = self.parameters[name]
                master.copy_(torch.where(master.to(p.dtype) == p, master, p.to(self.acc)))
        if versions["W_enc"] != self._versions["W_enc"]:
            self._renew_shadow()

    def state_dict(self) -> dict[str, Tensor]:
        """Steps taken, moments and masters, by name; the same for fused and not."""
        state = {"t": self.t}
        for name, (m, v) in self.moments.items():
            state |= {f"m.{name}": m, f"v.{name}": v}
        return state | {f"master.{name}": t for name, t in self.masters.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned, for a model of the same shapes and dtype."""
        own = self.state_dict()
        if own.keys() != state.keys():
            odd = ", ".join(sorted(own.keys() ^ state.keys()))
            raise ValueError(
                f"TrainStep: state must have the entries of state_dict(), got a difference in {odd}"
            )
        for name, t in own.items():
            if t.shape != state[name].shape:
                want, got = list(t.shape), list(state[name].shape)
                raise ValueError(f"TrainStep: state {name} must be of shape {want}, got {got}")
        for name, t in own.items():
            t.copy_(state[name])
        for name, master in self.masters.items():
            self.parameters[name].copy_(master)
        self._renew_shadow()  # the versions below take in what was written before
        self._versions = self._read_versions()
        if self._unfused is not None:
            self._unfused.set_steps_taken()


def _column_sums(residuals: list[Tensor], sums: list[Tensor | None]) -> list[Tensor]:
    """Sums over the tokens [columns] of each residual, where the kernel has not formed them."""
    pairs = zip(residuals, sums, strict=False)
    return [r.sum(0) if done is None else done for r, done in pairs]
