# SPDX-License-Identifier: Apache-2.0
"""What a fused step on a GPU moves and launches, by formula: each launch of the code as it stands,
beside the least that the step could move. No GPU is needed.

    python -m ksae.bench.gpu.traffic

Bytes are those of the device's memory: each tensor of a launch once, but what cannot stay in L2
between two launches again in each. Rows gathered from a table are counted apart, at the rate of L2.
The minimum is a step that writes no scores, reads each table once, forms the centre's sum in the
pass over W_enc and keeps the residual in the weights' dtype. Times are the largest of bytes,
gathered bytes and flops over the ceilings of CEILINGS: estimates, not measurements.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from ksae.backends import product as products
from ksae.step.dense_auxk import L2, PRODUCT

from ..harness.shapes import Shape
from ..suites import latents

A, B = Shape("A", 8192, 4096, 131072, 64), Shape("B", 8192, 768, 24576, 32)
# One H200: bytes/s of a copy and flop/s of a bf16 product, measured; bytes/s from L2, assumed.
CEILINGS = {"copy": 4.3e12, "product": PRODUCT[2], "gather": L2}
F32, F64, I32, I64 = 4, 8, 4, 8
SHARES, SHARE = 3072, 8  # of latents, for grad_b_dec (kMostShares of the row pass on CUDA)
GROUPING = 9  # bits of a key that a pass of group_by_latent sorts by (csrc/cuda/group_by_latent.cu)


class Launches(NamedTuple):
    """One line of the table: launches of one kind."""

    phase: str
    what: str
    source: str  # file: function
    launches: int
    bytes: float
    minimum: float = 0
    gathered: float = 0
    flops: float = 0

    @property
    def ms(self) -> float:
        parts = (
            self.bytes / CEILINGS["copy"],
            self.gathered / CEILINGS["gather"],
            self.flops / CEILINGS["product"],
        )
        return 1e3 * max(parts)


def step(shape: Shape, itemsize: int) -> list[Launches]:
    """The native launches of a step without clipping and with AuxK idle; itemsize of the weights: 2
    of bfloat16 with masters, 4 of float32, screened."""
    return [*encode(shape, itemsize), *residual(shape, itemsize), *update(shape, itemsize)]


def encode(shape: Shape, s: int) -> Iterable[Launches]:
    N, d, F, k = shape.N, shape.d, shape.F, shape.k
    chunks = -(-N // products._rows_of_chunk(N, F))
    code = N * k * (s + I64)
    file = "backends/product.py"
    yield Launches("encode", "x - b_dec", f"{file}: Encode", 1, 2 * N * d * s, N * d * s)
    product = {"flops": 2 * N * F * d, "minimum": F * d * 2 + code}
    if s == F32:
        copy = "csrc/cuda/bf16_copy.cu: bf16_copy_kernel"
        yield Launches("encode", "bf16 copy of x", copy, 1, N * d * (F32 + 2))
        cuda = "csrc/cuda/screened_select.cu"
        yield Launches("encode", "norms of groups", f"{cuda}: groups_kernel", 1, 3 * F * F32)
    W = chunks * F * d * 2  # it does not stay in L2 from one chunk to the next
    scores = N * F * F32
    yield Launches(
        "encode", "product", f"{file}: product", chunks, W + N * d * 2 + scores, **product
    )
    if s == F32:
        rescored = N * 2 * k * d * F32
        # rows of W_enc that a chunk's tokens meet
        met = chunks * F * (1 - (1 - 2 * k / F) ** (N / chunks)) * d * F32
        yield Launches(
            "encode", "select and float32 scores", f"{cuda}: screen_kernel", chunks,
            scores + met + code, 0, rescored,
        )  # fmt: skip
        redo = "csrc/cuda/screened_redo.cu: redo_kernel, merge_kernel"
        yield Launches("encode", "rows without proof: none", redo, 2, 0)
    else:
        select = "csrc/cuda/topk.cu: select_kernel"
        yield Launches("encode", "select", select, chunks, scores + code)


def residual(shape: Shape, s: int) -> Iterable[Launches]:
    N, d, F, k = shape.N, shape.d, shape.F, shape.k
    code, touched = N * k * (s + I64), F * (1 - (1 - k / F) ** N)
    variance = "csrc/cuda/total_variance.cu: shares_kernel, columns_kernel"
    yield Launches("residual", "variance of the target", variance, 2, N * d * s)
    small = N * F64 + N * k * F32
    yield Launches(
        "residual", "residual, its sums, the values' gradients",
        "csrc/cuda/sparse_decode.cu: residual_kernel", 2,
        code + touched * d * s + N * d * (s + s) + small,
        code + touched * d * s + N * d * (s + s) + small,
        N * k * d * s, 4 * N * k * d,
    )  # fmt: skip
    passes = -(-(F - 1).bit_length() // GROUPING)
    moved = passes * N * k * (2 * I32 + 2 * I32) + code + (F + 1) * I32
    yield Launches(
        "residual", "grouping by latent", "csrc/cuda/group_by_latent.cu: launch_pass",
        3 * passes + 1, moved, code + N * k * I32 + (F + 1) * I32,
    )  # fmt: skip
    yield Launches("residual", "loss", "csrc/cuda/loss_terms.cu: terms_kernel", 1, N * F64)


def update(shape: Shape, s: int) -> Iterable[Launches]:
    N, d, F, k = shape.N, shape.d, shape.F, shape.k
    entries = N * k * (I32 + s + F32) + 2 * F * F32
    sums = "csrc/cuda/latent_sums.cu: sum_pieces_kernel, sums_kernel"
    yield Launches("update", "sums of latents", sums, 2, entries, entries)
    scalars = "csrc/cuda/adam_scalars.cu: adam_kernel"
    yield Launches("update", "scalars of Adam", scalars, 1, 0)
    adam = F * d * (6 * F32 + (0 if s == F32 else 2))
    copied = F * d * 2 if s == F32 else 0  # the copy that the next screening reads
    group = N * k * (I32 + F32)
    parts = -(-F // max(-(-F // SHARES), SHARE)) * d * F32  # written here, read to be added
    yield Launches(
        "update", "W_enc, parts of the centre's gradient", latents.SOURCE, 2,
        adam + copied + group + N * d * s + parts, adam + copied + group + N * d * s,
        N * k * d * s, 2 * N * k * d,
    )  # fmt: skip
    added = "csrc/cuda/column_sums.cu: column_sums_kernel"
    yield Launches("update", "the centre's gradient", added, 1, parts)
    yield Launches(
        "update", "W_dec", latents.SOURCE, 2,
        adam + group + N * d * s, adam + group + N * d * s, N * k * d * s, 2 * N * k * d,
    )  # fmt: skip
    vectors = "csrc/cuda/vector_update.cu: vector_kernel"
    yield Launches("update", "b_enc and b_dec", vectors, 2, 7 * F * F32, 7 * F * F32)
    counters = "csrc/cuda/count_tokens.cu: count_latents_kernel, add_counts_kernel"
    yield Launches("update", "counters", counters, 1 + (F > 32768), F * 20, F * 20)


def totals(lines: Iterable[Launches]) -> tuple[int, float, float, float]:
    """Launches, bytes, the minimum, milliseconds."""
    lines = list(lines)
    count, moved = sum(line.launches for line in lines), sum(line.bytes for line in lines)
    return count, moved, sum(line.minimum for line in lines), sum(line.ms for line in lines)


def table(shape: Shape, itemsize: int) -> str:
    kind = {2: "bfloat16", 4: "float32"}[itemsize]
    lines = step(shape, itemsize)
    text = [
        f"Shape {shape.name}: N={shape.N}, d={shape.d}, F={shape.F}, k={shape.k}, {kind}",
        "",
        "| phase | what | launches | MB | minimum MB | gathered MB | est. ms | source |",
        "|---|---|---:|---:|---:|---:|---:|---|",
    ]
    for x in lines:
        numbers = f"{x.bytes / 1e6:.1f} | {x.minimum / 1e6:.1f} | {x.gathered / 1e6:.1f}"
        head = f"| {x.phase} | {x.what} | {x.launches} | {numbers}"
        text.append(f"{head} | {x.ms:.3f} | {x.source} |")
    count, moved, least, ms = totals(lines)
    text.append(f"| step | | {count} | {moved / 1e6:.1f} | {least / 1e6:.1f} | | {ms:.3f} | |")
    text.append("")
    text.append(
        f"{moved / least:.2f} times the minimum; 1.15 is wanted. Beside these launches, two of"
        " torch's own: tests/bench/test_traffic.py counts them."
    )
    return "\n".join(text)


if __name__ == "__main__":
    print("\n\n".join(table(shape, itemsize) for shape in (A, B) for itemsize in (2, 4)))
