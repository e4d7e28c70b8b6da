# SPDX-License-Identifier: Apache-2.0
"""Options of a launch."""

from __future__ import annotations

import torch


def registers(most: int) -> dict[str, int]:
    """Lets a thread have `most` registers.

    Left alone, ptxas aims at one more warp on a multiprocessor and spills a number or two for it.
    """
    return {} if torch.version.hip else {"maxnreg": most}
