# SPDX-License-Identifier: Apache-2.0
"""AuxK, the loss that revives dead latents (arXiv 2406.04093), in the libraries' variants."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class AuxK:
    """What a variant of AuxK predicts, from what, and in which unit its error is counted.

    Args:
        bias: the prediction has b_dec, which gets a gradient of it.
        bias_in_target: so has the target, detached.
        unit: of the squared error: "residual" and "target", the total variance of the residual or
            of the target of the coder; "elements", their number, as in loss="mse".
        scaled: times n_dead / (d_out // 2), at most 1.
        signed: pre-activations as they are, without ReLU.
        detached: the residual is a constant; else it passes a gradient to the reconstruction.
    """

    bias: bool = False
    bias_in_target: bool = False
    unit: str = "residual"
    scaled: bool = False
    signed: bool = False
    detached: bool = True

    @property
    def biases(self) -> int:
        """How often b_dec is in the error, less the constant in the target."""
        return int(self.bias and not self.bias_in_target) + int(not self.detached)

    @property
    def bias_gradients(self) -> int:
        """How often the gradient of the prediction goes to b_dec."""
        return int(self.bias) + int(not self.detached)


AUXK = {
    "dictionary_learning": AuxK(),
    "openai": AuxK(bias=True, bias_in_target=True),
    "sparsify": AuxK(bias=True, unit="target", scaled=True),
    "saelens": AuxK(unit="elements", scaled=True, signed=True),
    "batch_topk": AuxK(bias=True, unit="elements", detached=False),
}
