# SPDX-License-Identifier: Apache-2.0
"""The fused step in its phases: encode, residual, sums, scalars, update.

Each phase reads sparse codes and terms of the loss, whichever activation and topology they are of.
What shards of the latents exchange goes through the communicator.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..coders.code import Code
from ..coders.coder import SparseCoder
from ..coders.terms import Term, aux_width, terms_of
from .communicator import OneDevice
from .state import State
from .unfused import Metrics, scale_to

GRAD_SCALE = 5  # where Adam's numbers have the factor of all gradients


class Batch(NamedTuple):
    """The rows of a batch."""

    x: Tensor  # [N, d_in]
    y: Tensor  # [N, d_out]
    target: Tensor  # [N, d_out] of the sparse part: y without what a skip connection predicts
    grad: Tensor | None  # [N, d_out], of a downstream loss


class Selection(NamedTuple):
    """What the encode phase chose."""

    terms: list[Term]  # those with a bias first
    codes: list[Code]  # one a term
    n_dead: Tensor  # [] int64


class Groups:
    """The terms' codes grouped by latent and their residuals; lists of one entry a term, as the ops
    take them."""

    def __init__(self) -> None:
        self.values: list[Tensor] = []  # [N, k]
        self.grads: list[Tensor] = []  # [N, k] of the values, before scaling
        self.offsets: list[Tensor] = []  # [F+1]
        self.order: list[Tensor] = []  # [N*k]
        self.residuals: list[Tensor] = []  # [N, columns]
        self.sq_errors: list[Tensor] = []  # [N], of all columns
        self.sums: list[Tensor | None] = []  # [d] of all columns, where the kernel forms them
        self.denominators: list[Tensor] = []  # []
        self.variance: Tensor  # [], of y


class Sums(NamedTuple):
    """What the sums phase leaves to the scalars and the update."""

    loss: Tensor  # []
    scales: Tensor  # [terms]: of each term's gradients
    grad_b_enc: Tensor  # [F]
    grad_dot_w: Tensor | None  # [F], of the decoder rows, where it is projected out
    small: dict[str, list[Tensor]]  # gradients whose sum, weighted by the scales, is a parameter's


class FusedStep:
    """One step at a time on the parameters and the state of a TrainStep, without a dense gradient.

    Args:
        model, state: what is updated.
        clip_norm: largest global gradient norm; None: no clipping.
        clip: "above" or "always", as of TrainStep.
        communicator: between the shards of the model's latents.
    """

    def __init__(
        self,
        model: SparseCoder,
        state: State,
        clip_norm: float | None,
        communicator: OneDevice | None = None,
        clip: str = "above",
    ) -> None:
        self.model, self.state, self.clip_norm, self.clip = model, state, clip_norm, clip
        self.communicator = communicator or OneDevice()
        self.sums_in_decode = model.W_enc.is_cuda  # one reading of the residual less
        self.asks_for_dead = not model.W_enc.is_cuda  # on CUDA only the device knows how many

    @torch.no_grad()
    def step(self, x: Tensor, y: Tensor, grad: Tensor | None) -> tuple[Metrics, Tensor]:
        """A step on x [N, d_in] and y [N, d_out]: metrics, and whether all was finite, [] bool."""
        model, acc = self.model, self.state.acc
        target = y if model.W_skip is None else y.to(acc) - x.to(acc) @ model.W_skip.to(acc).T
        batch = Batch(x, y, target, grad)
        chosen = self.encode(batch)
        columns = self.columns(batch, chosen)
        groups = self.residual(batch, chosen, columns)
        sums, metrics = self.sums(batch, chosen, groups)
        hyper, finite, scales = self.scalars(batch, groups, sums, metrics)
        self.update(batch, chosen, groups, sums._replace(scales=scales), hyper, finite, columns)
        return metrics, finite

    # -------------------------------------------------------------------------------------- encode

    def encode(self, batch: Batch) -> Selection:
        """The code of each term: prefixes of one selection, and for AuxK that of dead latents."""
        model, exchange = self.model, self.communicator.exchange_keys
        dead = model.dead
        k_aux = aux_width(model, dead, self.asks_for_dead)
        terms = sorted(terms_of(model, k_aux), key=lambda term: term.of_residual)
        k = max(term.k for term in terms if not term.of_dead)
        self.state.keep_bf16_copy(max(k, k_aux), k_aux > 0, batch.grad is not None)
        how = (batch.grad, self.state.W_bf16)
        if k_aux:
            values, indices, *aux = model.select_aux(batch.x, k, k_aux, *how)
        else:
            values, indices, *aux = model.select(batch.x, k, *how)
        wide = Code(*exchange(values, indices))
        codes: list[Code] = []
        for term in terms:
            if term.of_dead:
                codes.append(Code(*exchange(aux[0], aux[1])))
            else:  # sorted: a prefix
                codes.append(wide.first(term.k).contiguous())
        return Selection(terms, codes, self.communicator.all_reduce(dead.sum()))

    # ------------------------------------------------------------------------------------ residual

    def columns(self, batch: Batch, chosen: Selection) -> int:
        """How many columns of the residual exist at a time.

        The residual [N, d] is a CPU's largest temporary. Where it is not small beside [N, F], or a
        16-bit copy of the batch is there as well, half of it exists at a time. On a GPU chunks of
        scores are larger, and the other half would cost gathers again.
        """
        model, d = self.model, self.model.d_out
        has_room = batch.x.is_cuda or (64 if self.state.masters else 32) * d <= model.d_sae
        if has_room or len(chosen.terms) > 1 or model.skip or self.clip_norm:
            return d
        return min(d, (d + 7) // 8 * 4)  # a multiple of 4

    def residual(self, batch: Batch, chosen: Selection, columns: int) -> Groups:
        """Each term's residual, the gradients of its values, and its code grouped by latent."""
        model, groups = self.model, Groups()
        groups.variance = ops.total_variance(batch.y)
        for term, code in zip(chosen.terms, chosen.codes, strict=True):
            bias: Tensor | None = model.b_dec
            pair = (code.values, code.indices)
            target, variance, sums = batch.target, groups.variance, None
            if term.of_residual:
                bias, target = None, -groups.residuals[0]  # y - recon
                variance = ops.total_variance(target)
            elif self.sums_in_decode:
                sums = torch.empty(model.d_out, dtype=self.state.acc, device=target.device)
            residual, square, grads = ops.sparse_residual(
                *pair, model.W_dec, bias, target, columns, sums
            )
            offsets, order = ops.group_by_latent(*pair, model.d_sae)
            groups.values.append(code.values)
            groups.grads.append(grads)
            groups.offsets.append(offsets)
            groups.order.append(order)
            groups.residuals.append(self.communicator.exchange_rows(residual))
            groups.sq_errors.append(square)
            groups.sums.append(sums)
            groups.denominators.append(term.denominator(batch.y, variance, chosen.n_dead))
        return groups

    # ---------------------------------------------------------------------------------------- sums

    def sums(self, batch: Batch, chosen: Selection, g: Groups) -> tuple[Sums, Metrics]:
        """Loss and metrics; sums over the tokens that make the gradients of the small parameters,
        and of each decoder row its product with its gradient."""
        model, acc = self.model, self.state.acc
        weights = [term.weight for term in chosen.terms]
        errors, parts, loss, scales = ops.loss_terms(g.sq_errors, g.denominators, weights)
        named = {term.name: part for term, part in zip(chosen.terms, parts, strict=True)}
        fvu = parts[0]
        if not chosen.terms[0].by_variance:
            fvu = errors[0] / g.variance
        metrics: Metrics = {
            "loss": loss,
            "fvu": fvu,
            "auxk_loss": named.get("auxk", torch.zeros_like(loss)),
            # entries that are not 0
            "l0": self.communicator.all_reduce(g.offsets[0][-1]).to(acc) / batch.x.shape[0],
            "dead": chosen.n_dead.to(acc) / model.d_sae,
        }
        if "multi_topk" in named:
            metrics["multi_topk_loss"] = named["multi_topk"]
        grad_b_enc, grad_dot_w = ops.latent_sums(g.values, g.grads, g.offsets, g.order, scales)
        biased = sum(not term.of_residual for term in chosen.terms)  # those that b_dec is in
        small = {"b_dec": _column_sums(g.residuals[:biased], g.sums)}
        if model.W_skip is not None:
            small["W_skip"] = [r.T @ batch.x.to(acc) for r in g.residuals[:biased]]
        along = grad_dot_w if model.normalize_decoder else None
        return Sums(loss, scales, grad_b_enc, along, small), metrics

    # ------------------------------------------------------------------------------------- scalars

    def scalars(
        self, batch: Batch, groups: Groups, sums: Sums, metrics: Metrics
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Adam's numbers for this step, whether all is finite, [] bool, and the clipped scales."""
        norm = None
        if self.clip_norm is not None:
            metrics["grad_norm"] = norm = self._gradient_norm(batch, groups, sums)
        state = self.state
        hyper, finite, scales = ops.adam_scalars(
            sums.loss, norm, self.clip_norm, sums.scales, state.lr, state.t, state.constants
        )
        if norm is not None and self.clip_norm is not None and self.clip == "always":
            hyper[GRAD_SCALE] = scale_to(self.clip_norm, norm)
        return hyper, finite, scales

    def _gradient_norm(self, batch: Batch, g: Groups, sums: Sums) -> Tensor:
        """Of all gradients, before clipping, []."""
        model, acc, all_reduce = self.model, self.state.acc, self.communicator.all_reduce
        b_dec = model.b_dec if model.centred else None
        inputs = [batch.x] * len(g.grads)
        square = ops.row_grad_sq(
            g.grads, g.offsets, g.order, inputs, sums.scales, b_dec, None, model.W_enc, 0
        )
        square += ops.row_grad_sq(
            g.values,
            g.offsets,
            g.order,
            g.residuals,
            sums.scales,
            None,
            sums.grad_dot_w,
            model.W_dec,
            0,
        )
        total = all_reduce(square.sum() + sums.grad_b_enc.double().square().sum())
        zero = torch.zeros_like(sums.loss)
        for name, parts in sums.small.items():
            gradient = sum((s * t for s, t in zip(sums.scales, parts, strict=False)), zero)
            if name == "b_dec" and model.centred:
                gradient = gradient - all_reduce(model.W_enc.to(acc).T @ sums.grad_b_enc)
            total = total + gradient.double().square().sum()
        return total.sqrt().to(acc)

    # -------------------------------------------------------------------------------------- update

    def update(
        self,
        batch: Batch,
        chosen: Selection,
        g: Groups,
        sums: Sums,
        hyper: Tensor,
        finite: Tensor,
        columns: int,
    ) -> None:
        """Adam for all parameters, the matrices in one pass over their rows; then the counters."""
        model, state = self.model, self.state
        fired = g.offsets[0][1:] > g.offsets[0][:-1]  # [F]: has a value > 0 (finite loss: no NaN)
        centre_grad = self._update_encoder(batch, g, sums, hyper)
        self._update_decoder(g, sums, hyper, 0, columns == model.d_out)
        if columns != model.d_out:  # the other half, from columns of W_dec still as they were
            g.residuals.clear()
            code = chosen.codes[0]
            decoder = (model.W_dec, model.b_dec, batch.target, columns, model.d_out)
            rest = ops.sparse_residual_slice(code.values, code.indices, *decoder)
            g.residuals.append(self.communicator.exchange_rows(rest))
            if g.sums[0] is None:
                sums.small["b_dec"] = [torch.cat([sums.small["b_dec"][0], g.residuals[0].sum(0)])]
            self._update_decoder(g, sums, hyper, columns, True)
        taken = (finite, hyper)
        ops.vector_update([sums.grad_b_enc], None, None, *taken, *state.of("b_enc"))
        for name, parts in sums.small.items():
            minus = centre_grad if name == "b_dec" else None
            ops.vector_update(parts, sums.scales[: len(parts)], minus, *taken, *state.of(name))
        model.tokens_since_fired.add_(finite, alpha=batch.x.shape[0]).masked_fill_(
            fired & finite, 0
        )
        state.t += finite

    def _update_encoder(self, batch: Batch, g: Groups, sums: Sums, hyper: Tensor) -> Tensor | None:
        """Returns what centring adds to the gradient of b_dec [d_in], None without centring."""
        model, state = self.model, self.state
        centred = model.centred
        grad = None
        if centred:
            grad = torch.empty(model.d_in, dtype=state.acc, device=batch.x.device)
        W_bf16, norms = state.W_bf16 or (None, None)
        ops.row_update(
            g.grads,
            g.offsets,
            g.order,
            [batch.x] * len(g.grads),
            sums.scales,
            model.b_dec if centred else None,
            None,
            sums.grad_b_enc if centred else None,
            *state.of("W_enc"),
            hyper,
            grad,
            0,
            False,
            W_bf16,
            state.rng_state("W_enc"),
            norms,
        )
        return None if grad is None else self.communicator.all_reduce(grad)

    def _update_decoder(self, g: Groups, sums: Sums, hyper: Tensor, first: int, last: bool) -> None:
        """The columns from `first` on that the residuals hold; unit rows after the last ones."""
        state = self.state
        ops.row_update(
            g.values,
            g.offsets,
            g.order,
            g.residuals,
            sums.scales,
            None,
            sums.grad_dot_w,
            None,
            *state.of("W_dec"),
            hyper,
            None,
            first,
            self.model.normalize_decoder and last,
            None,
            state.rng_state("W_dec"),
        )


def _column_sums(residuals: list[Tensor], sums: list[Tensor | None]) -> list[Tensor]:
    """Sums over the tokens [columns] of each residual, where the kernel has not formed them."""
    pairs = zip(residuals, sums, strict=False)
    return [r.sum(0) if done is None else done for r, done in pairs]
