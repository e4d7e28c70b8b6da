# SPDX-License-Identifier: Apache-2.0
"""The fused step in its phases: encode, residual, sums, scalars, update.

Each phase reads sparse codes and terms of the loss, whichever activation and topology they are of.
What shards of the latents exchange goes through the communicator.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import zip_longest

import torch
from torch import Tensor

from .. import ops
from ..coders.activation.base import Goal
from ..coders.code import Code
from ..coders.coder import SparseCoder
from ..coders.predictions import unrectified
from ..coders.terms import Term, aux_width, multi_loss, terms_of
from ..ops import product
from ..parallel.one_device import OneDevice, Pending
from ..parallel.shards import Shards
from .counters import count
from .dead_latents import DeadLatents
from .dense_auxk import dense_auxk, pays
from .entries import of_zeros, pass_on
from .nested import Nested, prefix_metrics, together
from .phases import Batch, Groups, Selection, Sums, columns_at_a_time, weighted_rows
from .row_gradients import decoder_rows, encoder_rows, over_replicas
from .state import State
from .unfused import Metrics


class FusedStep:
    """One step at a time on the parameters and the state of a TrainStep, without a dense gradient.

    Args:
        model, state: what is updated.
        clip_norm, clip, decoder_lr: as of TrainStep.
        communicator: between the shards of the model's latents and its replicas.
    """

    def __init__(
        self,
        model: SparseCoder,
        state: State,
        clip_norm: float | None,
        communicator: OneDevice | Shards,
        clip: str = "above",
        decoder_lr: float = 1.0,
    ) -> None:
        self.model, self.state, self.clip_norm, self.clip = model, state, clip_norm, clip
        self.decoder_lr = decoder_lr
        self.communicator, self.is_whole = communicator, communicator.size == 1
        self.is_one = self.is_whole and communicator.replicas == 1
        self.latents = model.W_enc.shape[0]  # of this rank
        # one reading of the residual less
        self.sums_in_decode = model.W_enc.is_cuda and self.is_one
        # rows that the decoder's gradient gathers, of half the bytes
        self.rounds = self.sums_in_decode and state.acc != state.dtype and not model.prefixes
        # on CUDA only the device knows how many are dead; of ranks, nobody does
        self.dead_latents: DeadLatents | None = None
        self.asks_for_dead = not model.W_enc.is_cuda
        if model.W_enc.is_cuda and self.is_one and model.auxk_alpha > 0:
            self.dead_latents = DeadLatents(model)
        self.nested = Nested(model, state.acc, communicator) if model.prefixes else None

    @torch.no_grad()
    def step(self, x: Tensor, y: Tensor, grad: Tensor | None) -> tuple[Metrics, Tensor]:
        """A step on x [N, d_in] of the ranks that share the latents and y [n, d_out] of this one,
        grad [N, d_out].

        Returns metrics, and whether all was finite, [] bool.
        """
        model, acc = self.model, self.state.acc
        target = y
        if model.W_skip is not None:
            target = y.to(acc) - product(self.communicator.own(x), model.W_skip.T)
        batch = Batch(x, y, target, grad, self.communicator.start_variance(y))
        chosen = self.encode(batch)
        columns = self.columns(batch, chosen)
        groups = self.residual(batch, chosen, columns)
        sums, metrics = self.sums(batch, chosen, groups)
        model.activation.observe(model, chosen.codes[0])
        hyper, finite, scales, of_decoder = self.scalars(
            batch, chosen, groups, sums, metrics, columns
        )
        sums = sums._replace(scales=scales)
        self.update(batch, chosen, groups, sums, hyper, of_decoder, finite, columns)
        fired = None if sums.reduced is None else sums.reduced.fired
        counted = (sums.loss, finite, groups.offsets[0], fired, self.tokens(batch))
        metrics |= count(model, self.state, self.is_one, self.dead_latents, *counted)
        return metrics, finite

    # -------------------------------------------------------------------------------------- encode

    def encode(self, batch: Batch) -> Selection:
        """The code of each term: prefixes of one selection, and for AuxK that of dead latents."""
        model, communicator = self.model, self.communicator
        asks = not self.is_one or (self.asks_for_dead and model.auxk_alpha > 0)
        n_dead = communicator.over_latents(model.dead.sum()) if asks else None
        most = None if self.dead_latents is None else self.dead_latents.most()
        k_aux = aux_width(model, n_dead if self.asks_for_dead else most)
        if k_aux and n_dead is None:
            n_dead = model.dead.sum()
        terms = sorted(terms_of(model, k_aux), key=lambda term: term.of_residual)
        ks = [term.k for term in terms if term.aux is None]
        dense = (most or 0) if pays(terms[-1], most, model.W_enc) else 0
        k, k_aux = min(max(ks), self.latents), 0 if dense else min(k_aux, self.latents)
        if model.activation.reads_copy:
            self.state.keep_bf16_copy(k, k_aux, batch.grad is not None)
        how = (batch.grad, self.state.W_bf16)
        chosen = communicator.select(model, batch.x, k, k_aux, *how)
        values, indices, by, *pre = chosen[0]
        first, *more = communicator.codes(values, indices, by, ks)
        first = replace(first, pre=pre[0]) if pre else first
        prefixes = iter([first, *more])
        codes: list[Code] = []
        for term in terms:
            if term.aux is None:
                codes.append(next(prefixes))
                continue
            if dense:
                break
            aux_values, aux_indices, by = chosen[1]
            if term.aux.signed:
                aux_values = unrectified(model, batch.x, aux_values, aux_indices, model.dead)
            (code,) = communicator.codes(aux_values, aux_indices, by, [term.k])
            codes.append(code if term.of_residual else together(codes[0], code))
        return Selection(terms, codes, n_dead, dense)

    def tokens(self, batch: Batch) -> int:
        """Of all ranks."""
        return len(batch.x) * self.communicator.replicas

    # ------------------------------------------------------------------------------------ residual

    def columns(self, batch: Batch, chosen: Selection) -> int:
        """How many columns of the residual exist at a time."""
        whole = len(chosen.terms) > 1 or bool(self.clip_norm) or not self.is_one
        return columns_at_a_time(self.model, whole, not self.is_one, bool(self.state.masters))

    def residual(self, batch: Batch, chosen: Selection, columns: int) -> Groups:
        """Each term's residual, the gradients of its values, and its code grouped by latent."""
        model, communicator, groups = self.model, self.communicator, Groups()
        groups.variance = batch.variance()
        whole = model.activation.penalized or any(term.of_residual for term in chosen.terms)
        rounds, N, d = self.rounds and not whole, self.tokens(batch), model.d_out
        for term, code in zip_longest(chosen.terms, chosen.codes):
            target, variance = batch.target, groups.variance
            if term.of_residual:
                target = -self._whole_residual(batch, chosen, groups)  # y - recon
                variance = communicator.variance(target)
            if code is None:
                dead = (model.dead, chosen.most_dead)
                groups.dense = dense_auxk(model, batch.x, target, term, *dead)
                groups.sq_errors.append(groups.dense.sq_error)
                below = term.denominator(N, d, groups.variance, variance, chosen.n_dead)
                groups.denominators.append(below)
                continue
            of_term = (term, code, target, groups, columns, rounds)
            residual, square, grads, sums = self._residual(*of_term)
            if groups.residuals and columns < model.d_out:
                groups.whole.append(residual)
                residual = residual[:, :columns].contiguous()
            pair = code.matrices()
            offsets, order = ops.group_by_latent(*pair, self.latents)
            groups.values.append(pair[0])
            groups.grads.append(grads)
            groups.offsets.append(offsets)
            groups.order.append(order)
            groups.residuals.append(residual)
            groups.sq_errors.append(square)
            groups.sums.append(sums)
            below = term.denominator(N, d, groups.variance, variance, chosen.n_dead)
            groups.denominators.append(below)
        if self.nested is not None:
            terms = chosen.terms[: len(chosen.codes)]
            groups.row_of = self.nested.row_of(terms, chosen.codes, len(batch.y))
        if any(code.offsets is not None for code in chosen.codes):
            groups.token_of = [code.rows().reshape(-1).int() for code in chosen.codes]
            groups.row_of = groups.row_of or groups.token_of
        return groups

    def _residual(
        self, term: Term, code: Code, target: Tensor, groups: Groups, columns: int, rounds: bool
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """A term's residual, its squares [N], its values' gradients, and its sums where the kernel
        forms them: the first columns, all of them in terms after the first."""
        model, sums = self.model, None
        if term.prefixes:
            assert self.nested is not None
            residual, squares, grads = self.nested.residual(code, model, target, columns)
            groups.prefix_errors = squares.sum(1)
            return residual, self.nested.weigh(squares), grads, None
        if self.sums_in_decode and not term.of_residual:
            sums = torch.empty(model.d_out, dtype=self.state.acc, device=target.device)
        bias: Tensor | None = None if term.biases == 0 else model.b_dec
        if term.biases > 1:
            bias = term.biases * model.b_dec
        columns = model.d_out if groups.residuals else columns
        narrow = torch.empty_like(target, dtype=self.state.dtype) if rounds else None
        residual, square, grads = self.communicator.residual(
            code, model.W_dec, bias, target, 0 if rounds else columns, sums, narrow
        )
        return residual if narrow is None else narrow, square, grads, sums

    def _whole_residual(self, batch: Batch, chosen: Selection, g: Groups) -> Tensor:
        """That of the reconstruction, [N, d]."""
        model, code = self.model, chosen.codes[0]
        found = self.communicator.own(g.residuals[0])[-len(batch.y) :]  # of the last prefix
        if found.shape[1] == model.d_out:
            return found
        decoder = (model.W_dec, model.b_dec, batch.target, 0, model.d_out, code.offsets)
        whole: Tensor = ops.sparse_residual_slice(*code.matrices(), *decoder)
        return whole

    # ---------------------------------------------------------------------------------------- sums

    def sums(self, batch: Batch, chosen: Selection, g: Groups) -> tuple[Sums, Metrics]:
        """Loss and metrics; sums over the tokens that make the gradients of the small parameters,
        and of each decoder row its product with its gradient."""
        model, acc, N = self.model, self.state.acc, self.tokens(batch)
        small, active = self._total(batch, chosen, g)
        weights = [term.weight for term in chosen.terms]
        errors, parts, loss, scales = ops.loss_terms(g.sq_errors, g.denominators, weights)
        named = {term.name: part for term, part in zip(chosen.terms, parts, strict=True)}
        fvu = parts[0]
        if g.prefix_errors is not None:
            fvu = (g.prefix_errors[-1] / g.variance).to(acc)
        elif not chosen.terms[0].by_variance:
            fvu = errors[0] / g.variance
        metrics: Metrics = {
            "loss": loss,
            "fvu": fvu,
            "auxk_loss": named.get("auxk", torch.zeros_like(loss)),
        }
        if not self.is_one:  # else `count` counts them
            assert chosen.n_dead is not None
            metrics |= {"l0": active.to(acc) / N, "dead": chosen.n_dead.to(acc) / model.d_sae}
        if (other := multi_loss(model, named)) is not None:
            metrics["multi_topk_loss"] = other
        metrics |= prefix_metrics(model, g.prefix_errors, g.variance)
        own = scales[: len(g.values)]
        grad_b_enc, grad_dot_w = ops.latent_sums(g.values, g.grads, g.offsets, g.order, own)
        more, norms = dict[str, Tensor](), None
        if model.activation.penalized:
            penalty, more, norms = self._pass_on(batch, chosen, g, scales[0], active)
            metrics["loss"] = loss = loss + penalty
            coefficients, *grouped = g.of_encoder()
            pre = [_pre(chosen.codes[0])[:, None], *g.values[1:]]
            grad_b_enc, _ = ops.latent_sums(pre, coefficients, *grouped, own)
        if g.dense is not None:
            grad_b_enc += scales[-1] * g.dense.of_latents(g.dense.b_enc)
            grad_dot_w += scales[-1] * g.dense.of_latents(g.dense.along)
        if "b_enc" in more:
            more["b_enc"] = more["b_enc"] + grad_b_enc
        along = None if norms is None else -norms
        along = grad_dot_w if model.normalize_decoder else along
        sums = Sums(loss, scales, grad_b_enc, along, more, small, None)
        if self.communicator.replicas > 1:
            sums = over_replicas(self.communicator, model, batch, chosen, g, sums)
        return sums, metrics

    def _total(
        self, batch: Batch, chosen: Selection, g: Groups
    ) -> tuple[dict[str, list[Tensor]], Tensor]:
        """Sums over the tokens of all ranks: squares, in their place; `_small`; and the number of
        entries that are not 0, []."""
        small, active = self._small(batch, chosen, g), g.offsets[0][-1]
        if self.is_one:
            return small, active
        prefixes = [] if g.prefix_errors is None else [g.prefix_errors]
        b_dec, W_skip, G = small["b_dec"], small.get("W_skip", []), len(g.sq_errors)
        parts = [active, *(e.sum()[None] for e in g.sq_errors), *b_dec, *W_skip, *prefixes]
        active, *sums = self.communicator.totals(parts)
        g.sq_errors = sums[:G]
        if prefixes:
            g.prefix_errors = sums.pop()
        small["b_dec"] = sums[G : G + len(b_dec)]
        if W_skip:
            small["W_skip"] = sums[G + len(b_dec) :]
        return small, active

    def _pass_on(
        self, batch: Batch, chosen: Selection, g: Groups, scale: Tensor, active: Tensor
    ) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
        """The penalty [] and gradients of the activation's parameters [F] and of the decoder's
        norms, times these; those of the pre-activations go to `g`."""
        model, code, grads = self.model, chosen.codes[0], g.grads[0][:, 0]
        if model.activation.keeps_zeros:
            assert g.row_of is not None
            grads = of_zeros(model, code, g.residuals[0], grads, g.row_of[0])
        elsewhere = (active - g.offsets[0][-1]).to(grads.dtype)
        goal = Goal(batch.x, batch.target, g.denominators[0], self.tokens(batch), elsewhere)
        passed = pass_on(model, goal, code, grads, scale)
        grouped = (g.offsets[0], g.order[0])
        if model.activation.opens_more:
            grouped = ops.group_by_latent(_pre(code)[:, None], code.indices[:, None], self.latents)
        g.through.append((passed.grads[:, None], *grouped))
        return passed.penalty, passed.more, passed.norms

    def _small(self, batch: Batch, chosen: Selection, g: Groups) -> dict[str, list[Tensor]]:
        """Of each term that b_dec is in: what makes the gradients of b_dec and W_skip, for the
        columns that there are, of this rank's tokens."""
        own = self.communicator.own
        n, b_dec, W_skip = len(batch.y), [], []
        for term, residual, done in zip(chosen.terms, g.residuals, g.sums, strict=False):
            rows = own(residual)[:n]  # of the first prefix
            if term.bias_gradients:
                total = rows.sum(0) if done is None else done
                b_dec.append(total if term.bias_gradients == 1 else term.bias_gradients * total)
            if self.model.W_skip is not None and not term.of_residual:
                inputs = own(batch.x)
                rows = rows.to(inputs.dtype) if rows.is_cuda else rows  # one product in bf16
                W_skip.append(product(rows.T, inputs))
        if g.dense is not None and (counts := chosen.terms[-1].bias_gradients):
            b_dec.append(counts * g.dense.bias)
        return {"b_dec": b_dec, "W_skip": W_skip} if W_skip else {"b_dec": b_dec}

    # ------------------------------------------------------------------------------------- scalars

    def scalars(
        self,
        batch: Batch,
        chosen: Selection,
        groups: Groups,
        sums: Sums,
        metrics: Metrics,
        columns: int,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Adam's numbers for this step, whether all is finite, [] bool, the scales of the terms,
        and Adam's numbers for the decoder."""
        norm = None
        if self.clip_norm is not None:
            norm = self._gradient_norm(batch, chosen, groups, sums, columns)
            metrics["grad_norm"] = norm
        state, before = self.state, sums.scales
        if sums.reduced is not None:  # whose scale is 1
            before = torch.cat([before, torch.ones_like(before[:1])])
        rates = (state.lr, state.t, state.constants, self.decoder_lr, self.clip == "always")
        clipped = (sums.loss, norm, self.clip_norm)
        return ops.adam_scalars(*clipped, before, *rates)  # type: ignore[no-any-return]

    def _gradient_norm(
        self, batch: Batch, chosen: Selection, g: Groups, sums: Sums, columns: int
    ) -> Tensor:
        """Of all gradients, before clipping, []."""
        model, acc, over_latents = self.model, self.state.acc, self.communicator.over_latents
        encoder = encoder_rows(model, batch, g, sums)
        square = ops.row_grad_sq(**encoder, grad_dot_w=None, W=model.W_enc, start=0)
        for start in range(0, model.d_out, columns):
            self._take_columns(batch, chosen, g, sums, start, columns)
            square += ops.row_grad_sq(
                **decoder_rows(self.model, g, sums), grad_dot_w=sums.grad_dot_w, W=model.W_dec,
                start=start,
            )  # fmt: skip
        more = {"b_enc": sums.grad_b_enc} | sums.more  # the activation may have another for b_enc
        of_latents = square.sum()
        for gradient in more.values():
            of_latents = of_latents + gradient.double().square().sum()
        total = over_latents(of_latents)
        zero = torch.zeros_like(sums.loss)
        for name, parts in sums.small.items():
            gradient = sum((s * t for s, t in zip(sums.scales, parts, strict=False)), zero)
            if name == "b_dec" and model.centred:
                gradient = gradient - over_latents(weighted_rows(model.W_enc, sums.grad_b_enc))
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
        of_decoder: Tensor,
        finite: Tensor,
        columns: int,
    ) -> None:
        """Adam for all parameters, the matrices in one pass over their rows."""
        model, state = self.model, self.state
        centre_grad = self._update_encoder(batch, g, sums, hyper)
        for start in range(0, model.d_out, columns):
            self._take_columns(batch, chosen, g, sums, start, columns)
            self._update_decoder(g, sums, of_decoder, start, start + columns >= model.d_out)
        for name, gradient in ({"b_enc": sums.grad_b_enc} | sums.more).items():
            ops.vector_update([gradient], None, None, finite, hyper, *state.of(name))
        for name, parts in sums.small.items():
            minus = centre_grad() if centre_grad and name == "b_dec" else None
            scales = sums.scales[: len(parts)]
            ops.vector_update(parts, scales, minus, finite, hyper, *state.of(name))

    def _update_encoder(self, batch: Batch, g: Groups, sums: Sums, hyper: Tensor) -> Pending | None:
        """Returns what centring adds to the gradient of b_dec [d_in], None without centring."""
        model, state = self.model, self.state
        centred = model.centred
        grad = sums.grad_b_enc.new_empty(model.d_in) if centred else None
        W, master, m, v = state.of("W_enc")
        W_bf16, norms = state.W_bf16 or (None, None)
        ops.row_update(
            **encoder_rows(model, batch, g, sums), grad_dot_w=None,
            grad_b_enc=sums.grad_b_enc if centred else None,
            W=W, master=master, m=m, v=v, hyper=hyper, grad_b_dec=grad, start=0, normalize=False,
            W_bf16=W_bf16, rng_state=state.rng_state("W_enc"), norms=norms,
        )  # fmt: skip
        return None if grad is None else self.communicator.start_over_latents(grad)

    def _take_columns(
        self, batch: Batch, chosen: Selection, g: Groups, sums: Sums, start: int, columns: int
    ) -> None:
        """Residuals of the columns from `start` on, of which W_dec is as it was; no others stay."""
        if g.start == start:
            return
        model, code = self.model, chosen.codes[0]
        part = (batch.target, start, min(start + columns, model.d_out))
        g.residuals.clear()
        g.start = start
        if self.nested is not None:
            rest = self.nested.slice(code, model, *part)
        else:
            decoder = (model.W_dec, model.b_dec)
            rest = ops.sparse_residual_slice(*code.matrices(), *decoder, *part, code.offsets)
        g.residuals.append(rest)
        g.residuals += [whole[:, start : part[2]].contiguous() for whole in g.whole]
        for name, parts in self._small(batch, chosen, g).items():
            if len(sums.small[name][0]) == start:
                pairs = zip(sums.small[name], parts, strict=True)
                sums.small[name] = [torch.cat(pair) for pair in pairs]

    def _update_decoder(self, g: Groups, sums: Sums, hyper: Tensor, first: int, last: bool) -> None:
        """The columns from `first` on that the residuals hold; unit rows after the last ones."""
        state = self.state
        W, master, m, v = state.of("W_dec")
        ops.row_update(
            **decoder_rows(self.model, g, sums), grad_dot_w=sums.grad_dot_w, grad_b_enc=None,
            W=W, master=master, m=m, v=v, hyper=hyper, grad_b_dec=None, start=first,
            normalize=self.model.normalize_decoder and last, rng_state=state.rng_state("W_dec"),
        )  # fmt: skip


def _pre(code: Code) -> Tensor:
    assert code.pre is not None
    return code.pre
