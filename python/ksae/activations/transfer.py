# SPDX-License-Identifier: Apache-2.0
"""Between host and device without a wait: batches that a GPU fetches by itself, and numbers that
are read when they have arrived.

A number that is read from a device waits for everything that was queued before the reading; one
that was sent off behind its own step waits for that step alone.
"""

from __future__ import annotations

from collections.abc import Mapping

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
