# SPDX-License-Identifier: Apache-2.0
"""Memory of large gradients: used again once nobody holds it, never before; no number changes."""

from __future__ import annotations

import gc
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from ksae import ops
from ksae.backends import cpu as native

F, d = (1 << 14) + 1, 513  # more than 32 MiB


@pytest.fixture(autouse=True)
def empty():
    """Nothing spare, before and after."""
    native.calls._spare.clear()
    yield
    gc.collect()
    native.calls._spare.clear()


def gradient(F=F, d=d, dtype=torch.float32):
    grad, values = torch.ones(2, d, dtype=dtype), torch.tensor([[2.0], [3.0]], dtype=dtype)
    indices = torch.tensor([[F - 1], [5]])
    return ops.sparse_decode_backward_weight(grad, values, indices, F)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_gradient_in_used_memory_has_its_numbers(dtype):
    size = F if dtype == torch.float32 else 2 * F
    first = gradient(size, dtype=dtype).fill_(7)
    address = first.data_ptr()
    del first
    again = gradient(size, dtype=dtype)
    assert again.data_ptr() == address and again.dtype == dtype and again.is_contiguous()
    assert again.count_nonzero(dim=1).nonzero().flatten().tolist() == [5, size - 1]
    assert (again[size - 1] == 2).all() and (again[5] == 3).all()


@pytest.mark.parametrize(
    "hold",
    [
        lambda t: t,
        lambda t: t[3:5],
        lambda t: t.numpy(),
        lambda t: t.untyped_storage(),
        lambda t: torch.from_dlpack(t),
        lambda t: torch.nn.Parameter(t),
    ],
    ids=["tensor", "slice", "NumPy", "storage", "DLPack", "parameter"],
)
def test_memory_that_somebody_holds_is_left_alone(hold):
    first = gradient()
    held, address = hold(first), first.data_ptr()
    del first
    second = gradient()
    assert second.data_ptr() != address
    del held
    assert gradient().data_ptr() == address


def spare():
    return [memory.nbytes for kept in native.calls._spare.values() for memory in kept]


def test_what_is_spare_goes_when_it_does_not_serve():
    two = gradient(), gradient(F + 1)
    del two
    assert sorted(spare()) == [4 * F * d, 4 * (F + 1) * d]
    two = gradient(), gradient(F + 1)  # both serve
    assert spare() == []
    del two
    other = gradient(F + 2)
    assert spare() == []
    del other
    assert spare() == [4 * (F + 2) * d]
    small = gradient(64)
    del small
    assert spare() == [4 * (F + 2) * d]


def test_threads_never_share_memory():
    def one(i: int) -> bool:
        mine = gradient().fill_(i)
        other = gradient()
        return bool((mine == i).all()) and other.data_ptr() != mine.data_ptr()

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(one, range(12)))


def test_steps_of_an_optimizer_use_the_same_memory():
    """Autograd takes the gradient as it is, and lets it go with zero_grad."""
    W = torch.nn.Parameter(torch.zeros(F, d))
    optimizer = torch.optim.SGD([W], lr=1.0)
    values, indices = torch.ones(2, 1), torch.tensor([[F - 1], [5]])
    addresses = set()
    for _ in range(3):
        ops.sparse_decode(values, indices, W, None).sum().backward()
        addresses.add(W.grad.data_ptr())
        optimizer.step()
        optimizer.zero_grad()
    assert len(addresses) == 1
    assert W[5, 0] == -3 and W[6, 0] == 0
