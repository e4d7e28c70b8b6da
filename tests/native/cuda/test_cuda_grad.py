# SPDX-License-Identifier: Apache-2.0
"""grad_topk_encode and selection from a list of columns on CUDA, executed by the emulator."""

from __future__ import annotations

import pytest
import torch
from cases import Implementation, assert_same, grad_encode_arguments, integers, randn
from emulation.build import Emulator
from implementations import EMULATED, Emulated

from ksae import reference
from ksae.backends import product as products
from ksae.ops import MODES

pytestmark = pytest.mark.implementations(EMULATED)


@pytest.mark.parametrize("mode", MODES)
def test_in_chunks_of_rows(
    impl: Implementation,
    mode: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each chunk has its own rows of grad, and its own rows without a gradient."""
    F = 130
    args = grad_encode_arguments((19, 17, F, 9), torch.float32, d_out=5, exact=True)
    args[1][3], args[1][11, 2] = 0, torch.nan
    want = reference.grad_topk_encode(*args, 9, 0.5, mode)
    for rows in (1, 5, 19):
        monkeypatch.setattr(products, "chunk_bytes", rows * F * 4 + 3)
        for got, w in zip(impl.grad_topk_encode(*args, 9, 0.5, mode), want, strict=True):
            assert_same(f"{rows} rows", got, w)


def test_bits_do_not_depend_on_the_order_of_threads_and_blocks(
    impl: Implementation,
    emulated: Emulator,
) -> None:
    args = grad_encode_arguments((11, 17, 1500, 40), torch.bfloat16)
    x, _, W_enc, b_enc, _ = args
    results = []
    for seed, blocks in ((1, 1), (2, 3), (77, 5)):
        emulated.seed(seed)
        emulated.blocks_in_flight(blocks)
        out = [t for m in MODES for t in impl.grad_topk_encode(*args, 40, 0.5, m)]
        results.append([*out, *impl.topk_encode(x, W_enc, b_enc, 40, None, b_enc > 0.5)])
    for other in results[1:]:
        assert all(torch.equal(t, o) for t, o in zip(results[0], other, strict=True))


# ---------------------------------------------------------------------------------- list of columns


@pytest.mark.parametrize("F", [1, 31, 1024, 5000])
def test_list_of_columns(impl: Emulated, F: int) -> None:
    for mask in (
        torch.zeros(F, dtype=torch.bool),
        torch.ones(F, dtype=torch.bool),
        randn(F) > 1,
        torch.arange(F) == F - 1,
    ):
        columns = impl.kernels._list_columns(mask)
        count = int(columns[F])
        assert_same("columns", columns[:count], mask.nonzero()[:, 0].int())


@pytest.mark.parametrize("k", [1, 40, 333, 3000])
@pytest.mark.parametrize("listed", [0, 3, 39, 40, 700, 2999])
def test_encode_with_a_mask(impl: Implementation, listed: int, k: int) -> None:
    """Fewer listed than k: the rest are the smallest columns that were not chosen, with value 0;
    columns of -inf are no better than columns that are not listed."""
    N, d, F = 3, 5, 3000
    x, W, b = (integers(*s, seed=i) for i, s in enumerate([(N, d), (F, d), (F,)]))
    b[::7], b[5::11], b[2990] = -torch.inf, torch.nan, torch.inf
    mask = torch.zeros(F, dtype=torch.bool)
    mask[torch.randperm(F, generator=torch.Generator().manual_seed(0))[:listed]] = True
    got, want = (i.topk_encode(x, W, b, k, None, mask) for i in (impl, reference))
    assert_same("values", got[0], want[0])
    assert_same("indices", got[1], want[1])
