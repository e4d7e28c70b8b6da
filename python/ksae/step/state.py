# SPDX-License-Identifier: Apache-2.0
"""What a training step keeps between two steps: masters, moments, counts, the bf16 copy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..coders.coder import SparseCoder
from ..ops import accumulator, kept


def check_memory(model: SparseCoder) -> None:
    """Refuse parameters that a step cannot update on their own.

    Raises:
        ValueError: one is tied to another or computed, not contiguous, or overlaps another.
    """
    parameters = dict(model.named_parameters())
    for name in ("W_enc", "b_enc", "W_dec", "b_dec", "W_skip"):
        if name not in parameters and getattr(model, name) is not None:
            own = getattr(model, name)
            tied = [n for n, p in parameters.items() if p is own]
            got = f"that of {tied[0]}" if tied else "one that is computed"
            raise ValueError(f"TrainStep: {name} must be a parameter of its own, got {got}")
    taken: list[tuple[int, int, str]] = []
    for name, p in parameters.items():
        if not p.is_contiguous():
            got = f"strides {list(p.stride())} for shape {list(p.shape)}"
            raise ValueError(f"TrainStep: {name} must be contiguous, got {got}")
        if p.is_meta or p.numel() == 0:
            continue
        start, end = p.data_ptr(), p.data_ptr() + p.numel() * p.element_size()
        for first, last, other in taken:
            if start < last and first < end:
                raise ValueError(
                    f"TrainStep: {name} must have memory of its own, got memory that it shares"
                    f" with {other}"
                )
        taken.append((start, end, name))


class State:
    """The state of Adam for a model's parameters, and what is derived from them.

    Args:
        model: whose parameters are updated.
        betas, eps: of Adam.
        rounded: names of the matrices that have no master and moments of their own dtype.

    parameters: by name, as the model holds them. masters: in `acc`, of those of a smaller dtype.
    theta: what Adam moves. moments: two a parameter. t, lr [] float64 on the device, where a CUDA
    graph reads them at every replay: steps taken and the rate of the next.
    """

    def __init__(
        self,
        model: SparseCoder,
        betas: tuple[float, float],
        eps: float,
        rounded: tuple[str, ...] = (),
    ) -> None:
        self.model = model
        self.parameters: dict[str, Tensor] = dict(model.named_parameters())
        first = model.W_enc
        self.dtype = first.dtype
        self.acc = acc = accumulator(first.dtype)
        # the seeds of those that are rounded stochastically
        self.seeds = {n: torch.tensor(i, device=first.device) for i, n in enumerate(rounded)}
        with torch.no_grad():
            self.masters = {
                n: p.to(acc)
                for n, p in self.parameters.items()
                if acc != first.dtype and n not in self.seeds
            }
        self.theta: Mapping[str, Tensor] = self.parameters | self.masters
        self.moments = {
            n: (torch.zeros_like(p, dtype=kind), torch.zeros_like(p, dtype=kind))
            for n, p in self.parameters.items()
            for kind in [p.dtype if n in self.seeds else acc]
        }
        self.t = torch.zeros((), dtype=torch.float64, device=first.device)
        self.lr = torch.zeros_like(self.t)
        self.constants = torch.tensor([*betas, eps], dtype=torch.float64).to(first.device)
        self.W_bf16: tuple[Tensor, ...] = ()  # of W_enc and its norms, once a step has read them
        self.note_versions()

    def of(self, name: str) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Parameter, master and moments, as the row pass takes them."""
        return self.parameters[name], self.masters.get(name), *self.moments[name]

    @torch.no_grad()
    def keep_above(self, bounds: Mapping[str, float], finite: Tensor) -> None:
        """Raise entries of parameters that an update left below a number, if it was taken."""
        for name, least in bounds.items():
            for t in (self.parameters[name], self.masters.get(name)):
                if t is not None:
                    t.copy_(torch.where(finite, t.clamp(min=least), t))

    def rng_state(self, name: str) -> Tensor | None:
        """Seed and step of the stochastic rounding of a matrix, as the row pass takes them."""
        seed = self.seeds.get(name)
        return None if seed is None else torch.stack([seed, self.t.long()])

    # ---------------------------------------------------------------------------- the bf16 copy

    def keep_bf16_copy(self, k: int, k_aux: int, graded: bool) -> None:
        """From the first step that screens with a bf16 copy on; graded: the selection of k is by a
        gradient, so that only that of k_aux for AuxK, if there is one, screens. Which way serves a
        call is chosen by its k."""
        if self.W_bf16:
            return
        W, aux = self.parameters["W_enc"], k_aux > 0
        if W.is_inference() or self.model.shares_memory:  # writes that no version counts
            return
        serves = not graded or (aux and kept.keeps_bf16_copy(W, k_aux, aux))
        if serves and kept.keeps_bf16_copy(W, k, aux):
            self.W_bf16 = kept.bf16_copy(W)

    def renew_bf16_copy(self) -> None:
        """In place: a CUDA graph knows where it lies."""
        if self.W_bf16:
            for old, new in zip(self.W_bf16, kept.bf16_copy(self.model.W_enc), strict=True):
                old.copy_(new)

    # ------------------------------------------------------------------------ writes from outside

    def note_versions(self) -> None:
        """Parameters are now as the step left them."""
        self._versions = self._read_versions()

    def _read_versions(self) -> dict[str, tuple[Any, ...]]:
        return {
            n: (p.data_ptr(), -1 if p.is_inference() else p._version, p.dtype, p.stride())
            for n, p in self.parameters.items()
        }

    def was_written(self) -> bool:
        """Whether somebody else has replaced or written a parameter since the last step."""
        return self._read_versions() != self._versions

    def _check(self) -> None:
        """Parameters may have been given other memory, as by `.to`, since the step was made."""
        for name, p in self.parameters.items():
            m = self.moments[name][0]
            now, then = (p.dtype, p.device, p.shape), (self.dtype, m.device, m.shape)
            if now != then:
                want, got = (f"{k} {list(s)} on {d}" for k, d, s in (then, now))
                raise ValueError(
                    f"TrainStep: {name} must be {want} as when the step was made, got {got}: make a"
                    " new TrainStep after casting or moving a model"
                )
        check_memory(self.model)

    @torch.no_grad()
    def adopt(self) -> None:
        """Take over parameters that somebody else has replaced or written since the last step."""
        versions = self._read_versions()
        current = dict(self.model.named_parameters())
        for name, p in self.parameters.items():
            if current.get(name) is not p:
                raise ValueError(
                    f"TrainStep: {name} must be the parameter that the step was made for, got a"
                    " new one: make a new TrainStep after replacing parameters"
                )
        if versions != self._versions:
            self._check()  # before anything is written
        for name, master in self.masters.items():
            if versions[name] != self._versions[name]:
                p = self.parameters[name]
                master.copy_(torch.where(master.to(p.dtype) == p, master, p.to(self.acc)))
        if versions["W_enc"] != self._versions["W_enc"]:
            self.renew_bf16_copy()

    # ------------------------------------------------------------------------------ saving, loading

    def state_dict(self) -> dict[str, Tensor]:
        """Steps taken, moments and masters, by name."""
        state = {"t": self.t}
        for name, (m, v) in self.moments.items():
            state |= {f"m.{name}": m, f"v.{name}": v}
        return state | {f"master.{name}": t for name, t in self.masters.items()}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Restore what `state_dict` returned, for a model of the same shapes and dtype."""
        own = self.state_dict()
        if own.keys() != state.keys():
            odd = ", ".join(sorted(own.keys() ^ state.keys()))
            raise ValueError(
                f"TrainStep: state must have the entries of state_dict(), got a difference in {odd}"
            )
        for name, t in own.items():
            if t.shape != state[name].shape:
                want, got = list(t.shape), list(state[name].shape)
                raise ValueError(f"TrainStep: state {name} must be of shape {want}, got {got}")
        for name, t in own.items():
            t.copy_(state[name])
        for name, master in self.masters.items():
            self.parameters[name].copy_(master)
        self.renew_bf16_copy()  # the versions below take in what was written before
        self.note_versions()
