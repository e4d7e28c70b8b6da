# SPDX-License-Identifier: Apache-2.0
"""What makes the gradients of a coder's rows; and their sums over replicas, which each have other
tokens."""

from __future__ import annotations

from typing import Any

import torch

from .. import ops
from ..coders.code import by_row
from ..coders.coder import SparseCoder
from ..parallel.one_device import OneDevice
from ..parallel.shards import Shards
from .phases import Batch, Groups, RowGradients, Selection, Sums


def encoder_rows(model: SparseCoder, batch: Batch, g: Groups, sums: Sums) -> dict[str, Any]:
    """What makes the gradients of the rows of W_enc, as the ops take it."""
    if sums.reduced is not None:
        return sums.reduced.rows(sums.reduced.encoder, model.W_enc, sums.scales)
    centre = model.b_dec if model.centred else None
    return {**g.encoder(batch.x), "scales": sums.scales, "centre": centre}


def decoder_rows(model: SparseCoder, g: Groups, sums: Sums) -> dict[str, Any]:
    """The same of W_dec, for the columns that the residuals hold."""
    if sums.reduced is not None:
        return sums.reduced.rows(sums.reduced.decoder, model.W_dec, sums.scales)
    return {**g.decoder(), "scales": sums.scales, "centre": None}


def over_replicas(
    communicator: OneDevice | Shards,
    model: SparseCoder,
    batch: Batch,
    chosen: Selection,
    g: Groups,
    sums: Sums,
) -> Sums:
    """A replica's sums with the gradients of all, added in the order of replicas."""
    reduced = _row_gradients(communicator, model, batch, chosen, g, sums)
    numbers = {"b_enc, of the pre-activations": sums.grad_b_enc} | sums.more
    if sums.grad_dot_w is not None:
        numbers["along"] = sums.grad_dot_w
    summed = communicator.over_replicas(torch.stack(list(numbers.values())))  # [any, F]
    grad_b_enc, *more = summed
    along = None if sums.grad_dot_w is None else more.pop()
    more_of = dict(zip(sums.more, more, strict=True))
    return sums._replace(grad_b_enc=grad_b_enc, grad_dot_w=along, more=more_of, reduced=reduced)


def _row_gradients(
    communicator: OneDevice | Shards,
    model: SparseCoder,
    batch: Batch,
    chosen: Selection,
    g: Groups,
    sums: Sums,
) -> RowGradients:
    """Without the projection and before clipping, of the rows that one replica has entries of; on
    CUDA, where only the device knows which, of all."""
    counts = torch.stack([o.diff() for o in g.offsets])  # [terms, F]
    fired = torch.stack([counts[0] > 0, (counts > 0).any(0)]).short()
    fired, touched = communicator.over_replicas(fired) > 0
    if touched.is_cuda:
        touched = torch.ones_like(touched)
    latents = touched.nonzero()[:, 0] if not touched.is_cuda else slice(None)
    scales, F, acc = sums.scales, len(touched), sums.scales.dtype
    x = batch.x - model.b_dec if model.centred else batch.x  # rounded, as the encoder reads it
    encoder = torch.zeros(F, model.d_in, dtype=acc, device=x.device)
    decoder = torch.zeros(F, model.d_out, dtype=acc, device=x.device)
    of_encoder = g.of_encoder()[0]
    for i, code in enumerate(chosen.codes):
        values, indices = code.matrices()
        of_token = (indices, F, code.offsets)
        of_pre = scales[i] * of_encoder[i]
        encoder += ops.sparse_decode_backward_weight(x.to(acc), of_pre, *of_token)[0]
        coefficients = scales[i] * values.to(acc)
        if chosen.terms[i].prefixes:  # an entry's row of the residuals is not its token
            assert g.row_of is not None
            order, offsets = by_row(g.row_of[i], len(g.residuals[i]))
            coefficients, indices = (t.reshape(-1)[order, None] for t in (coefficients, indices))
            of_token = (indices, F, offsets)
        decoder += ops.sparse_decode_backward_weight(g.residuals[i], coefficients, *of_token)[0]
    summed = [communicator.over_replicas(t[latents]) for t in (encoder, decoder)]
    ends = torch.zeros(F + 1, dtype=torch.int32, device=x.device)
    ends[1:] = touched.cumsum(0)
    order = torch.arange(len(summed[0]), dtype=torch.int32, device=x.device)
    return RowGradients(summed[0], summed[1], ends, order, len(chosen.terms), fired)
