# SPDX-License-Identifier: Apache-2.0
"""Huge pages for large outputs: the advice covers whole pages of theirs, no number changes."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest
import torch

from ksae import native, ops


@pytest.mark.parametrize("offset", [0, 3, 1 << 19], ids=str)
def test_the_advice_stays_inside(offset, monkeypatch):
    seen = []
    libc = SimpleNamespace(
        madvise=lambda start, length, _: seen.append((start.value, length.value))
    )
    monkeypatch.setattr(ctypes, "CDLL", lambda _: libc)
    monkeypatch.setattr(native.mmap, "MADV_HUGEPAGE", 14, raising=False)
    t = torch.empty(offset + (1 << 23) + 1)[offset:]  # 32 MiB and a little
    assert native._huge_pages(t) is t
    ((start, length),) = seen
    page, end = 1 << 21, t.data_ptr() + 4 * t.numel()
    assert start % page == length % page == 0 and length >= 14 * page
    assert t.data_ptr() <= start and start + length <= end
    assert start - t.data_ptr() < page and end - start - length < page


def test_small_outputs_and_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda _: pytest.fail("asked the system"))
    native._huge_pages(torch.empty(1 << 20))
    monkeypatch.delattr(native.mmap, "MADV_HUGEPAGE", raising=False)
    native._huge_pages(torch.empty((1 << 23) + 1))


def test_a_large_gradient_has_its_numbers():
    F, d = (1 << 14) + 1, 513
    grad, values = torch.randn(2, d), torch.tensor([[2.0], [3.0]])
    indices = torch.tensor([[F - 1], [5]])
    grad_W, value_sum = ops.sparse_decode_backward_weight(grad, values, indices, F)
    rows = grad_W.count_nonzero(dim=1).nonzero().flatten()
    assert rows.tolist() == [5, F - 1] and value_sum[5] == 3
    assert torch.equal(grad_W[F - 1], 2 * grad[0]) and torch.equal(grad_W[5], 3 * grad[1])
