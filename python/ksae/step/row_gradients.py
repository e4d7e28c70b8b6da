# SPDX-License-Identifier: Apache-2.0
"""The gradients of a coder's rows summed over its replicas, which each have other tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import ops
from ..coders.code import by_row
from ..coders.coder import SparseCoder
from ..parallel.one_device import OneDevice
from ..parallel.shards import Shards
from .phases import Batch, Groups, RowGradients, Selection


def row_gradients(
    communicator: OneDevice | Shards,
    model: SparseCoder,
    batch: Batch,
    chosen: Selection,
    g: Groups,
    scales: Tensor,
) -> RowGradients:
    """Each replica's gradients, without the projection and before clipping, added in the order of
    replicas: of the rows that one of them has entries of; on CUDA, where only the device knows
    which, of all."""
    counts = torch.stack([o.diff() for o in g.offsets])  # [terms, F]
    fired = torch.stack([counts[0] > 0, (counts > 0).any(0)]).short()
    fired, touched = communicator.over_replicas(fired) > 0
    if touched.is_cuda:
        touched = torch.ones_like(touched)
    latents = touched.nonzero()[:, 0] if not touched.is_cuda else slice(None)
    F, acc = len(touched), scales.dtype
    x = batch.x - model.b_dec if model.centred else batch.x  # rounded, as the encoder reads it
    encoder = torch.zeros(F, model.d_in, dtype=acc, device=x.device)
    decoder = torch.zeros(F, model.d_out, dtype=acc, device=x.device)
    for i, code in enumerate(chosen.codes):
        values, indices = code.matrices()
        of_token = (indices, F, code.offsets)
        encoder += ops.sparse_decode_backward_weight(x.to(acc), scales[i] * g.grads[i], *of_token)[
            0
        ]
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
