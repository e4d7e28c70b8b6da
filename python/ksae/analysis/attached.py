# SPDX-License-Identifier: Apache-2.0
"""A coder inside of a language model: spliced in, recorded, steered, ablated and clamped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from ksae.activations import splice
from ksae.coders.code import Code
from ksae.coders.coder import SparseCoder
from ksae.errors import UserError

MODES = ("splice", "with_error", "record")


class Attachment:
    """A coder at a site of a language model. Its edits hold for every forward pass, also those of
    `generate`, until `clear` or the end of the block.

    Attributes:
        code: values and indices [..., k] of the last forward pass, of the shape of the activation
            but for its last dimension; in `generate`, of the last token; for an activation without
            a fixed k the entries [E] and row offsets. With gradients on and a mode other than
            "record", `code.values` is in the graph of the model's output.
    """

    def __init__(self, coder: SparseCoder, mode: str) -> None:
        self.coder, self.mode = coder, mode
        self.code: Code | None = None
        self._shape = torch.Size()  # of the activation, but for its last dimension
        self._input: Tensor | None = None  # of a transcoder in that pass
        self._add: dict[int, float | Tensor] = {}
        self._set: dict[int, float | Tensor] = {}

    def steer(self, latent: int, strength: float | Tensor) -> None:
        """Add strength times the latent's decoder row, whatever its activation. A tensor is
        broadcast over the activation's shape but for its last dimension."""
        self._editable(latent)
        self._add[latent] = strength

    def clamp(self, latent: int, value: float | Tensor) -> None:
        """Give the latent this activation at every token, also where it does not fire. With the
        `activations` of another input of the same shape, this patches the latent."""
        self._editable(latent)
        self._set[latent] = value

    def ablate(self, *latents: int) -> None:
        """Give the latents the activation 0."""
        for latent in latents:
            self.clamp(latent, 0.0)

    def clear(self) -> None:
        """Take all edits back."""
        self._add.clear()
        self._set.clear()

    def activations(self, latent: int) -> Tensor:
        """Of one latent in the last forward pass, before edits: [...] of the activation's shape.

        Raises:
            UserError: there was no forward pass yet.
        """
        self._known(latent)
        if self.code is None:
            raise UserError("attached: the model must have run before activations are read")
        return self._of(self.code, latent)

    def _of(self, code: Code, latent: int) -> Tensor:
        mine = torch.where(code.indices == latent, code.values, 0)
        if code.offsets is None:
            return mine.sum(-1)
        lengths = code.offsets.diff()
        rows = torch.arange(len(lengths), device=lengths.device).repeat_interleave(lengths)
        return mine.new_zeros(len(lengths)).index_add(0, rows, mine).reshape(self._shape)

    def _known(self, latent: int) -> None:
        F = self.coder.d_sae
        if not 0 <= latent < F:
            raise UserError(f"attached: latent must be in [0, {F}), got {latent}")

    def _editable(self, latent: int) -> None:
        self._known(latent)
        if self.mode == "record":
            raise UserError('attached: mode must be "splice" or "with_error" to edit, got "record"')

    def _read(self, x: Tensor) -> Tensor:
        """At the site that the coder reads."""
        self._input = x
        return x

    def _change(self, y: Tensor) -> Tensor:
        """At the site that the coder writes: the activation that the model goes on with."""
        source = y
        if not self.coder.centred:
            if self._input is None:
                raise UserError("attached: target_hook must come after hook in the model")
            source, self._input = self._input, None
        like = self.coder.W_dec
        rows = source.to(like.device, like.dtype)
        code = self.code = Code(*self.coder.encode(rows))
        self._shape = rows.shape[:-1]
        if self.mode == "record":
            return y
        delta = self._delta(code)
        if self.mode == "splice":
            changed = self._decode(code, rows).to(y.device, y.dtype)
        elif torch.is_grad_enabled():
            recon = self._decode(code, rows).to(y.device, y.dtype)
            changed = y.detach() + (recon - recon.detach())  # y to the bit, with recon's gradient
        else:
            changed = y
        if delta is not None:
            changed = changed + delta.to(y.device, y.dtype)
        return changed

    def _decode(self, code: Code, x: Tensor) -> Tensor:
        offsets = {} if code.offsets is None else {"row_offsets": code.offsets}
        if code.offsets is not None:
            x = x.flatten(0, -2)
        recon = self.coder.decode(code.values, code.indices, x, **offsets)
        return recon.reshape(*self._shape, recon.shape[-1])

    def _delta(self, code: Code) -> Tensor | None:
        """What the edits add to the output."""
        steps: list[tuple[int, float | Tensor]] = list(self._add.items())
        steps += [(j, value - self._of(code, j)) for j, value in self._set.items()]
        delta: Tensor | None = None
        for latent, step in steps:
            row = self.coder.W_dec[latent]
            add = step.to(row).unsqueeze(-1) * row if isinstance(step, Tensor) else step * row
            delta = add if delta is None else delta + add
        return delta


@contextmanager
def attached(
    coder: SparseCoder,
    model: nn.Module,
    hook: str,
    *,
    mode: str = "splice",
    target_hook: str | None = None,
    exclude: Iterable[int] | None = None,
) -> Iterator[Attachment]:
    """Within the block the coder takes part in every forward pass of a language model. Several may
    be attached at once, each at its own site.

    Args:
        coder: an autoencoder, or a transcoder with `target_hook`. It may be in training mode; no
            tokens are counted. A GradTopK coder selects without gradients.
        model: a Hugging Face model.
        hook: where the coder reads, see `ksae.activations.hooks`.
        mode: "splice" goes on from the reconstruction; "with_error" from the activation itself,
            whose gradient is that of the reconstruction plus a constant, the error
            (arXiv 2403.19647); "record" changes nothing. Edits need one of the first two.
        target_hook: where a transcoder writes; it must come after `hook` in the model.
        exclude: ids of tokens whose activations stay, see `ksae.activations.splice`: what training
            left out. By default the special tokens that the model's configuration names; () leaves
            none out.

    Raises:
        UserError: an unknown hook or mode, or a transcoder without target_hook. ValueError: the
            coder's width is not the hook's, when the model runs.

    Example:
        with sae.attached(model, "layers.9.resid_post", mode="with_error") as site:
            site.steer(123, 8.0)
            model.generate(**inputs)
    """
    if mode not in MODES:
        raise UserError(f"attached: mode must be one of {', '.join(MODES)}, got {mode!r}")
    if not coder.centred and target_hook is None:
        raise UserError("attached: target_hook must be given for a transcoder, got None")
    if coder.centred and target_hook is not None:
        raise UserError(f"attached: target_hook is for transcoders, got {target_hook!r}")
    site = Attachment(coder, mode)
    with ExitStack() as stack:
        if target_hook is not None:
            stack.enter_context(splice(model, hook, site._read, exclude=()))
        kept = () if mode == "record" else exclude
        stack.enter_context(splice(model, target_hook or hook, site._change, exclude=kept))
        yield site
