# SPDX-License-Identifier: Apache-2.0
"""Between host and device without a wait: batches that a GPU fetches by itself, and numbers that
are read when they have arrived.

A number that is read from a device waits for everything that was queued before the reading; one
that was sent off behind its own step waits for that step alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor


def staged(t: Tensor, device: torch.device, dtype: torch.dtype | None = None) -> Tensor:
    """t, ready for a copy to `device` that the host does not wait for.

    For a GPU a tensor of the host is converted to `dtype` here, for torch would do it during the
    copy, and lies in pinned memory; everything else stays as it is.
    """
    if device.type != "cuda" or t.is_cuda:
        return t
    return t.to(dtype or t.dtype).pin_memory()


class CopyStream:
    """Copies to a device; to a GPU on a stream of their own, beside what runs on the current one.

    The host asks for a batch when the step before is queued: the copy runs beside that step, and
    the next one waits for it on the device.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream: torch.cuda.Stream | None = None  # made by the first copy

    def __call__(
        self, tensors: Sequence[Tensor | None], dtypes: Sequence[torch.dtype | None]
    ) -> list[Tensor | None]:
        """The tensors on the device, each in its dtype; None: as it is."""
        pairs = list(zip(tensors, dtypes, strict=True))
        there = self.device.type != "cuda" or any(t is not None and t.is_cuda for t in tensors)
        if there:  # made on the current stream, behind which they are copied
            return [self._to(t, dtype) for t, dtype in pairs]
        if self._stream is None:
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):
            placed = [self._to(t, dtype) for t, dtype in pairs]
            done = self._stream.record_event()
        current = torch.cuda.current_stream(self.device)
        current.wait_event(done)
        for t in placed:
            if t is not None:
                t.record_stream(current)  # or its memory would be reused too early
        return placed

    def _to(self, t: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
        return None if t is None else t.to(self.device, dtype or t.dtype, non_blocking=True)


class Readback:
    """Numbers (0-d tensors) on their way to the host, sent off behind what is queued now."""

    def __init__(self, numbers: Mapping[str, Tensor]) -> None:
        self._numbers = {name: t.to("cpu", non_blocking=True) for name, t in numbers.items()}
        self._arrived = [
            torch.cuda.current_stream(device).record_event()
            for device in {t.device for t in numbers.values() if t.is_cuda}
        ]

    def get(self) -> dict[str, float]:
        """Wait until they have arrived."""
        for event in self._arrived:
            event.synchronize()
        return {name: float(t) for name, t in self._numbers.items()}
