# SPDX-License-Identifier: Apache-2.0
"""The meaning of every op, in plain torch, written to be read.

N tokens, d width, F latents, k active latents a token. T is the storage type (float32, bfloat16,
float16 or float64). Sums are accumulated in float32, and in float64 where T is float64. These
functions are the default kernels on every device, the oracle of the tests and the baseline of the
benchmarks; a faster kernel that differs from them is wrong.

Selection: larger first, equal scores by the smaller index, NaN before everything, -0 equal to +0.
An entry with value 0 contributes nothing to any product, even if the other factor is not finite.
"""

from .batch_topk import batch_topk_encode
from .decode import (
    sparse_decode,
    sparse_decode_backward_values,
    sparse_decode_backward_weight,
    sparse_residual,
    sparse_residual_slice,
)
from .dtypes import accumulator
from .encode import (
    grad_topk_encode,
    scored_encode,
    threshold_encode,
    topk_encode,
    topk_encode_aux,
)
from .group import group_by_latent, latent_sums, rows_of
from .prefixes import prefix_residual, prefix_residual_slice
from .rounding import stochastic_bfloat16
from .rows import bf16_norms, row_grad_sq, row_update
from .scalars import adam_scalars, loss_terms, total_variance, vector_update
from .topk import topk

__all__ = [
    "accumulator",
    "adam_scalars",
    "batch_topk_encode",
    "bf16_norms",
    "grad_topk_encode",
    "group_by_latent",
    "latent_sums",
    "loss_terms",
    "prefix_residual",
    "prefix_residual_slice",
    "row_grad_sq",
    "row_update",
    "rows_of",
    "scored_encode",
    "sparse_decode",
    "sparse_decode_backward_values",
    "sparse_decode_backward_weight",
    "sparse_residual",
    "sparse_residual_slice",
    "stochastic_bfloat16",
    "threshold_encode",
    "topk",
    "topk_encode",
    "topk_encode_aux",
    "total_variance",
    "vector_update",
]
