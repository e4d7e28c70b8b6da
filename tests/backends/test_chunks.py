# SPDX-License-Identifier: Apache-2.0
"""How many rows an encode on a GPU scores at once, and what it says where they do not fit."""

from __future__ import annotations

import pytest
import torch
from cases import randn
from torch import Tensor

from ksae.backends import product as products

CUDA = torch.device("cuda", 0)
B, A, MILLION = 24576, 131072, 1 << 20


@pytest.fixture(autouse=True)
def plenty(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_free_memory", lambda device: 100 << 30)


@pytest.mark.parametrize("N,F", [(0, 5), (1, 5), (8192, B), (8193, B), (300, 10**8)])
def test_chunks_are_even_and_within_the_memory(
    monkeypatch: pytest.MonkeyPatch, N: int, F: int
) -> None:
    monkeypatch.setattr(products, "chunk_bytes", 256 << 20)
    rows, most = products._rows_of_chunk(N, F), max(products.chunk_bytes // (4 * F), 1)
    assert 1 <= rows <= most
    assert -(-N // rows) == -(-N // most)  # no more of them than must be
    assert N % rows == 0 or rows > N or rows - N % rows < 128 * (N // rows + 1)


@pytest.mark.parametrize(
    ("N", "F", "rows"),
    [(8192, A, 2048), (8192, B, 8192), (16384, B, 8192), (8192, MILLION, 2048), (100, A, 100)],
)
def test_a_chunk_has_rows_enough_for_the_device(N: int, F: int, rows: int) -> None:
    """At B 1 GiB holds 10922 rows: of 16384 the second chunk would be short, so they are even."""
    assert products._rows_of_chunk(N, F, CUDA) == rows
    assert products._rows_of_chunk(N, F) == rows


def test_half_of_the_free_memory_bounds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """By halves: the same rows on every run, but where memory is short."""
    for free, rows in ((8 << 30, 1024), (9 << 30, 1024), (16 << 30, 2048), (10, 1)):
        monkeypatch.setattr(products, "_free_memory", lambda device, free=free: free)
        assert products._rows_of_chunk(8192, MILLION, CUDA) == rows
        assert products._rows_of_chunk(2730, B, CUDA) == 2730  # 256 MiB are not asked for
    for free, rows in ((1 << 30, 4096), (100 << 20, 512)):
        monkeypatch.setattr(products, "_free_memory", lambda device, free=free: free)
        assert products._rows_of_chunk(8192, B, CUDA) == rows


def test_the_environment_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "chunk_bytes", 4 * MILLION * 64)
    assert products._rows_of_chunk(8192, MILLION, CUDA) == 64


def test_what_does_not_fit_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def product(a: Tensor, b: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 21.00 KiB.\nmore")

    monkeypatch.setattr(products, "product", product)
    with pytest.raises(torch.OutOfMemoryError) as found:
        products._scores(randn(6, 4), randn(900, 4))
    message = str(found.value)
    assert "scores of a chunk [6, 900] take 21600 bytes on cpu" in message
    assert "KSAE_CHUNK_BYTES=10800 makes chunks of 3 rows" in message
    assert message.endswith("(CUDA out of memory. Tried to allocate 21.00 KiB.)")
