# SPDX-License-Identifier: Apache-2.0
"""All that is measured of a saved model, what is left out, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial

from ksae.analysis.evaluate import Evaluation
from ksae.coders.coder import SparseCoder
from ksae.runs.config import DataConfig
from ksae.runs.evaluation import (
    EvalData,
    measure,
    measure_language_model,
    steering,
    why_no_cross_entropy,
)


@dataclass(frozen=True)
class Measured:
    """What `measure_all` returns: metrics by name.

    oracle: with latents selected by gradients. lm: of the language model. shifts: by steering.
    left_out: what is not there -> why.
    """

    result: Evaluation
    oracle: dict[str, float] = field(default_factory=dict)
    lm: dict[str, float] = field(default_factory=dict)
    shifts: dict[str, float] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def numbers(self) -> dict[str, float]:
        """All of them."""
        plain = {"tokens": self.result.tokens, **self.result.metrics}
        return plain | self.oracle | self.lm | self.shifts


def measure_all(
    models: Sequence[SparseCoder],
    data: EvalData,
    config: DataConfig,
    *,
    tokens: int,
    ce_tokens: int,
    steering_latents: int,
    batch_size: int,
    progress: bool,
) -> Measured:
    """Measure the first of `models`; a second one is for steering.

    Args:
        tokens: for reconstruction.
        ce_tokens: for the language model; 0 leaves it out.
        steering_latents: as `steering` takes them; 0 leaves it out.
    """
    sae, left_out = models[0], {}
    measured = partial(
        measure, sae, data.source, tokens=tokens, batch_size=batch_size, progress=progress
    )
    result = measured()
    oracle: dict[str, float] = {}
    if sae.needs_gradient and data.source.has_gradient:
        with_g = measured(oracle=True)
        oracle = {f"{name}_oracle": value for name, value in with_g.metrics.items()}
    elif sae.needs_gradient:
        left_out["selection with gradients"] = f"{data.source.name} holds none"
    lm: dict[str, float] = {}
    shifts: dict[str, float] = {}
    reason = why_no_cross_entropy(data)
    if reason is not None:
        wanted = {"cross-entropy": ce_tokens, "steering": steering_latents}
        left_out |= {name: reason for name, count in wanted.items() if count > 0}
        return Measured(result, oracle, left_out=left_out)
    assert data.language_model is not None and data.contexts is not None
    source = (data.language_model, data.contexts, config)
    if ce_tokens > 0:
        lm = measure_language_model(sae, *source, tokens=ce_tokens, progress=progress)
    if steering_latents > 0:
        shifts = steering(models, *source, data.source, latents=steering_latents)
    return Measured(result, oracle, lm, shifts, left_out)
