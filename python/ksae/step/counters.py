# SPDX-License-Identifier: Apache-2.0
"""What the fused step counts after an update: steps, tokens since each latent fired, dead ones."""

from __future__ import annotations

from torch import Tensor

from .. import ops
from ..coders.coder import SparseCoder
from .dead_latents import DeadLatents
from .state import State
from .unfused import Metrics


def count(
    model: SparseCoder,
    state: State,
    is_one: bool,
    dead_latents: DeadLatents | None,
    loss: Tensor,
    taken: Tensor,
    offsets: Tensor,
    fired: Tensor | None,
    N: int,
) -> Metrics:
    """The counters after a step of N tokens, and what one device counts with them.

    offsets [F+1]: of the first term's code, grouped; fired [F] bool: which latents have fired,
    where the offsets are not those of all tokens.
    """
    since = model.tokens_since_fired
    if not is_one:
        if fired is None:
            fired = offsets[1:] > offsets[:-1]  # has a value (finite loss: no NaN)
        since.add_(taken, alpha=N).masked_fill_(fired & taken, 0)
        state.t += taken
        return {}
    within = 0 if dead_latents is None else dead_latents.within(N)
    l0, dead, soon = ops.count_tokens(
        loss, taken, offsets, since, state.t, N, model.dead_after, within
    )
    if dead_latents is not None:
        dead_latents.after_step(N, soon)
    return {"l0": l0, "dead": dead}
