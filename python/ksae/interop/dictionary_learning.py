# SPDX-License-Identifier: Apache-2.0
"""saprmarks' dictionary_learning on ksae's kernels: `TopKTrainer(dict_class=AutoEncoderTopK, ...)`
with `from ksae.interop.dictionary_learning import AutoEncoderTopK`.

`encode(x)` returns the dense code as there. With `return_topk=True`, which the trainer asks for,
the dense code and the post-ReLU activations are lazy: the decoder and AuxK work on the selected
latents, and any other use builds the tensor. `TopKTrainer(fused=True)` is the library's trainer
without its passes over dense gradients.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import functional
from ..coders import TopKSAE
from ..coders.code import has_numbers
from ..errors import UserError
from ..step.train_step import TrainStep
from . import lazy, libraries, sparse
from .formats.dictionary_learning import KEYS
from .formats.files import pick

_PATH = "dictionary_learning.trainers.top_k"
if TYPE_CHECKING:
    _Base = nn.Module

    class _Trainer:
        def __init__(self, *args: Any, **kwargs: Any) -> None: ...
        def __getattr__(self, name: str) -> Any: ...
        def update(self, step: int, x: Tensor) -> float: ...

else:
    _Base = libraries.base(_PATH, "AutoEncoderTopK", nn.Module)
    _Trainer = libraries.base(_PATH, "TopKTrainer", object)


class Decoder(nn.Linear):
    """nn.Linear(F, d, bias=False) that reads the code where it is known.

    `weight` is [d, F], a view of storage in which each latent is one row.
    """

    def forward(self, f: Tensor) -> Tensor:
        """[..., F] -> [..., d]."""
        return self.with_bias(f, None)

    def with_bias(self, f: Tensor, bias: Tensor | None) -> Tensor:
        """The same plus `bias` [d]."""
        code = lazy.known(f)
        if code is not None:
            rows = sparse.latent_rows(self.weight)
            return lazy.decoded(f, sparse.decode(*code, rows, bias), rows)
        out = nn.functional.linear(f, self.weight)
        return out if bias is None else out + bias


class AutoEncoderTopK(_Base):
    """dictionary_learning's AutoEncoderTopK: arguments, attributes and outputs as there.

    Args:
        activation_dim: d. dict_size: F. k: active latents a token.

    Raises:
        ValueError: k is no integer in [1, dict_size].
    """

    k: Tensor  # int32 scalar
    threshold: Tensor  # float32 scalar, -1: unset

    def __init__(self, activation_dim: int, dict_size: int, k: int) -> None:
        nn.Module.__init__(self)
        if not isinstance(k, int) or not 1 <= k <= dict_size:
            raise ValueError(
                f"AutoEncoderTopK: k must be an integer in [1, {dict_size}], the number of"
                f" latents, got {k!r}"
            )
        self.activation_dim, self.dict_size = activation_dim, dict_size
        self.register_buffer("k", torch.tensor(k, dtype=torch.int32))
        self._k = k
        self.register_buffer("threshold", torch.tensor(-1.0))
        self.decoder = Decoder(dict_size, activation_dim, bias=False)
        with torch.no_grad():
            weight = self.decoder.weight
            weight /= weight.norm(dim=0, keepdim=True) + torch.finfo(weight.dtype).eps
        self.decoder.weight = sparse.transposed(weight)
        self.encoder = nn.Linear(activation_dim, dict_size)
        self.encoder.weight.data = self.decoder.weight.data.T.clone()
        self.encoder.bias.data.zero_()
        self.b_dec = nn.Parameter(torch.zeros(activation_dim))

    def _topk(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """values, indices [..., k]."""
        x = x.to(torch.promote_types(x.dtype, self.b_dec.dtype))
        encoder = self.encoder
        return functional.topk_encode(x, encoder.weight, encoder.bias, self._count(), self.b_dec)

    def _count(self) -> int:
        """k. A graph that is being recorded gets the number that was last seen, and asserts when it
        runs that the buffer still holds it."""
        if has_numbers(self.k):
            self._k = int(self.k)
        else:
            said = f"AutoEncoderTopK: k must be {self._k}, for which this graph was recorded"
            torch.ops.aten._assert_async.msg(self.k == self._k, said)
        return self._k

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if not self.k.is_meta:
            self._k = int(self.k)

    def encode(self, x: Tensor, return_topk: bool = False, use_threshold: bool = False) -> Any:
        """The code of x [..., d].

        Args:
            return_topk: also the selection and the activations.
            use_threshold: f keeps all activations above `threshold` instead of the k largest.

        Returns:
            f [..., F], or f, top_acts [..., k], top_indices [..., k], post_relu_acts [..., F].
        """
        encoder = self.encoder
        if use_threshold:
            post_relu = nn.functional.linear(x - self.b_dec, encoder.weight, encoder.bias).relu()
            f = post_relu * (post_relu > self.threshold)
            if not return_topk:
                return f
            return (f, *functional.topk(post_relu, self._count()), post_relu)
        values, indices = self._topk(x)
        if not return_topk:
            return sparse.scatter(values, indices, self.dict_size)
        weights = encoder.weight, encoder.bias, self.b_dec
        post_relu = lazy.pre_activations(x, *weights, relu=True)
        lazy.selected(post_relu, values, indices)
        return lazy.code(values, indices, self.dict_size), values, indices, post_relu

    def decode(self, x: Tensor) -> Tensor:
        """Reconstruction [..., d] of a code [..., F]."""
        return self.decoder.with_bias(x, self.b_dec)

    def forward(self, x: Tensor, output_features: bool = False) -> Any:
        """x_hat [..., d], or x_hat and the dense code [..., F]."""
        values, indices = self._topk(x)
        if output_features and torch.is_grad_enabled():  # x_hat is a function of f
            f = sparse.scatter(values, indices, self.dict_size)
            return self.decode(f), f
        x_hat = sparse.decode(values, indices, sparse.latent_rows(self.decoder.weight), self.b_dec)
        return (
            (x_hat, sparse.scatter(values, indices, self.dict_size)) if output_features else x_hat
        )

    def scale_biases(self, scale: float) -> None:
        """For activations that are `scale` times as large."""
        self.encoder.bias.data *= scale
        self.b_dec.data *= scale
        if self.threshold >= 0:
            self.threshold *= scale

    @classmethod
    def from_pretrained(
        cls, path: str | os.PathLike[str], k: int | None = None, device: Any = None
    ) -> AutoEncoderTopK:
        """Read an `ae.pt`; nothing in it is executed.

        Raises:
            ValueError: k is given and is not that of the file.
            UserError: the file or a tensor is missing, or the format does not have it.
        """
        if not os.path.isfile(path):
            raise UserError(f"load: no such file: {os.fspath(path)}")
        state = torch.load(path, weights_only=True, map_location="cpu")
        if not isinstance(state, dict):
            got = type(state).__name__
            raise UserError(f"load: {os.fspath(path)} must hold a dict, got {got}")
        state = pick(state, KEYS - {"k"}, {"k", "threshold"}, os.fspath(path))
        F, d = state["encoder.weight"].shape
        stored = int(state["k"]) if "k" in state else k
        if stored is None:
            raise ValueError(
                f"AutoEncoderTopK: k must be given for {path}, which has none, got None"
            )
        if k is not None and k != stored:
            raise ValueError(f"AutoEncoderTopK: k must be {stored}, as in {path}, got {k}")
        autoencoder = cls(d, F, stored)
        autoencoder.load_state_dict(state)
        return autoencoder if device is None else autoencoder.to(device)


class _Coder(TopKSAE):
    """A trainer's autoencoder as `TrainStep` wants it: the same memory, the trainer's counters.

    TrainStep's loss is the mean over all entries, the trainer's the sum over d: all of it, AuxK,
    clipping and Adam's eps included, is divided by d, which Adam does not see.
    """

    shares_memory = True

    def __init__(self, trainer: Any) -> None:
        ae = trainer.ae
        d, F = ae.activation_dim, ae.dict_size
        alpha, k_aux = trainer.auxk_alpha / d, max(trainer.top_k_aux, 1)
        super().__init__(d, F, int(ae.k), loss="mse", auxk_alpha=alpha, k_aux=k_aux, device="meta")
        for name, p in self.views(ae).items():
            setattr(self, name, nn.Parameter(p))
        self.tokens_since_fired = torch.zeros(F, dtype=torch.long, device=self.b_dec.device)
        self.trainer = (trainer,)  # in a tuple: no state of this module
        self.code: tuple[Tensor, Tensor] | None = None

    @staticmethod
    def views(ae: Any) -> dict[str, Tensor]:
        """The autoencoder's parameters by our names."""
        W_dec = sparse.latent_rows(ae.decoder.weight)
        views = {"W_enc": ae.encoder.weight, "b_enc": ae.encoder.bias, "W_dec": W_dec}
        return {name: p.data for name, p in {**views, "b_dec": ae.b_dec}.items()}

    @property
    def dead(self) -> Tensor:
        (trainer,) = self.trainer
        mask: Tensor = trainer.num_tokens_since_fired >= trainer.dead_feature_threshold
        return mask

    def select(
        self, rows: Tensor, k: int, grad: Tensor | None, W_bf16: tuple[Tensor, ...] = ()
    ) -> tuple[Tensor, Tensor]:
        assert self.code is not None
        return self.code


class TopKTrainer(_Trainer):
    """dictionary_learning's TopKTrainer, with its loop's dense passes as an option.

    Args:
        fused: take each step with `ksae.TrainStep`: the same losses, projection, clipping, Adam,
            unit norm, counters, threshold and schedule, without a dense gradient. `dict_class` has
            to be `AutoEncoderTopK` of this module, the default. Adam's moments are then in
            `fused_step.state_dict()`, `optimizer` has none, and `pre_norm_auxk_loss` stays -1.
        Others as in the library.

    Raises:
        ImportError: the library is not installed.
        ValueError: fused with another dict_class.
    """

    def __init__(self, *args: Any, fused: bool = False, **kwargs: Any) -> None:
        if not libraries.installed("dictionary_learning"):
            raise ImportError(
                "TopKTrainer: dictionary-learning must be installed, got no such package"
            )
        if len(args) < 7:  # its position in the library's signature
            kwargs.setdefault("dict_class", AutoEncoderTopK)
        super().__init__(*args, **kwargs)
        self.fused_step: TrainStep | None = None
        if fused:
            if not isinstance(self.ae, AutoEncoderTopK):
                name = type(self.ae).__name__
                raise ValueError(
                    "TopKTrainer: dict_class must be ksae's AutoEncoderTopK to be fused, got"
                    f" {name}"
                )
            d = self.ae.activation_dim
            self.fused_step = TrainStep(_Coder(self), decoder_lr=1.0, eps=1e-8 / d, clip_norm=1 / d)

    def update(self, step: int, x: Tensor) -> float:
        """One training step on x [N, d]; the loss."""
        if self.fused_step is None:
            return super().update(step, x)
        train: Any = self.fused_step
        ae, coder = self.ae, train.model
        if step == 0:
            median = libraries.module(_PATH).geometric_median(x)  # type: ignore[union-attr]
            ae.b_dec.data.copy_(median)
        for name, data in _Coder.views(ae).items():  # where somebody gave them other memory
            getattr(coder, name).data = data
        x = x.to(self.device)
        with torch.no_grad():
            coder.code = values, indices = ae._topk(x)
            if step > self.threshold_start_step:
                self.update_threshold(values)
            self.effective_l0 = values.shape[1]
            since: Tensor = self.num_tokens_since_fired
            since += x.shape[0]
            since[indices.flatten()] = 0
            self.dead_features = int(coder.dead.sum()) if self.auxk_alpha > 0 else -1
        train.lr = self.scheduler.get_last_lr()[0]
        metrics = train(x)
        coder.code = None
        self.optimizer.step()  # without gradients: only the schedule counts its steps
        self.scheduler.step()
        return float(metrics["loss"] * ae.activation_dim)


def adopt(module: Any) -> None:
    """Make a swapped instance of the library's class what ours is."""
    module._k = int(module.k)
    module.decoder.__class__ = Decoder
    sparse.latent_rows(module.decoder.weight)
