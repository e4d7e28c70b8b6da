# SPDX-License-Identifier: Apache-2.0
"""Copies to a device: on a CPU the tensors themselves, to a GPU by a stream of their own, for which
objects stand here that note what they are asked; test_cuda_hardware.py has the real ones."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from ksae.activations.transfer import CopyStream

GPU = torch.device("cuda", 0)


class Stream:
    """A stream that notes what it is asked, in one list for all."""

    def __init__(self, name: str, said: list[str]) -> None:
        self.name, self.said = name, said

    def record_event(self) -> str:
        self.said.append(f"{self.name} records")
        return f"event of {self.name}"

    def wait_event(self, event: str) -> None:
        self.said.append(f"{self.name} waits for the {event}")


class Rows:
    """A tensor of the host, or with there=True of the GPU."""

    dtype = torch.float32

    def __init__(self, said: list[str], there: bool = False) -> None:
        self.said, self.is_cuda = said, there

    def to(self, device: torch.device, dtype: torch.dtype, non_blocking: bool) -> Rows:
        self.said.append(f"{dtype} to {device.type}" + (" without a wait" if non_blocking else ""))
        return Rows(self.said, True)

    def record_stream(self, stream: Stream) -> None:
        self.said.append(f"kept for {stream.name}")


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []

    @contextlib.contextmanager
    def on(stream: Stream) -> Iterator[None]:
        said.append(f"on {stream.name}")
        yield
        said.append("back")

    main = Stream("main", said)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("copies", said))
    monkeypatch.setattr(torch.cuda, "stream", on)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: main)
    return said


def test_a_batch_of_the_host_is_copied_on_a_stream_of_its_own(said: list[str]) -> None:
    copies = CopyStream(GPU)
    rows: list[Any] = [Rows(said), None, Rows(said)]
    for _ in range(2):
        x, y, g = copies(rows, [torch.bfloat16, torch.bfloat16, None])
        assert x is not None and y is None and g is not None
        assert said == [
            "on copies",
            "torch.bfloat16 to cuda without a wait",
            "torch.float32 to cuda without a wait",
            "copies records",
            "back",
            "main waits for the event of copies",
            "kept for main",
            "kept for main",
        ]
        said.clear()


def test_what_is_on_the_gpu_stays_on_the_current_stream(said: list[str]) -> None:
    """It was made there: another stream would have to wait for it."""
    rows: list[Any] = [Rows(said, there=True), Rows(said)]
    CopyStream(GPU)(rows, [None, None])
    assert said == ["torch.float32 to cuda without a wait"] * 2


def test_on_a_cpu_nothing_is_copied() -> None:
    x = torch.ones(2, 3)
    same, wider, none = CopyStream(torch.device("cpu"))([x, x, None], [None, torch.float64, None])
    assert same is x and none is None
    assert wider is not None and wider.dtype == torch.float64
