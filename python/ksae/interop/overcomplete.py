# SPDX-License-Identifier: Apache-2.0
"""overcomplete's TopKSAE on ksae's kernels: `from ksae.interop.overcomplete import TopKSAE`.

The library's arguments, attributes, parameters and outputs. Linear encoders (the default, and the
tied and untied ones) never build [N, F]; any other encoder runs as it is, and only the decoder
gains. `forward` returns lazy pre-codes and codes, `encode` lazy pre-codes. What differs: a state
dict that is loaded in eval mode takes effect.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .. import functional
from . import lazy, libraries, sparse

if TYPE_CHECKING:
    _Base = nn.Module
    _Dictionary = nn.Module
    _Linear = nn.Module
    _Tieable = nn.Module
else:
    _Base = libraries.base("overcomplete.sae.topk_sae", "TopKSAE", nn.Module)
    _Dictionary = libraries.base("overcomplete.sae.dictionary", "DictionaryLayer", nn.Module)
    _Linear = libraries.base("overcomplete.sae.modules", "MLPEncoder", nn.Module)
    _Tieable = libraries.base("overcomplete.sae.modules", "TieableEncoder", nn.Module)

Code = tuple[Tensor, Tensor]  # values, indices [..., k]


def _on(x: Tensor, p: int) -> Tensor:
    rows: Tensor = x / (x.norm(p=p, dim=1, keepdim=True) + 1e-8)
    return rows


def _within(x: Tensor, p: int) -> Tensor:
    rows: Tensor = x / x.norm(p=p, dim=1, keepdim=True).amax(dim=0, keepdim=True)
    return rows


def normalize_l2(x: Tensor) -> Tensor:
    """Rows of length 1."""
    return _on(x, 2)


def normalize_max_l2(x: Tensor) -> Tensor:
    """Rows of which the longest has length 1."""
    return _within(x, 2)


def normalize_l1(x: Tensor) -> Tensor:
    """Rows of absolute sum 1."""
    return _on(x, 1)


def normalize_max_l1(x: Tensor) -> Tensor:
    """Rows of which the largest has absolute sum 1."""
    return _within(x, 1)


def normalize_identity(x: Tensor) -> Tensor:
    """The rows as they are."""
    return x


NORMALIZATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "l2": normalize_l2,
    "max_l2": normalize_max_l2,
    "l1": normalize_l1,
    "max_l1": normalize_max_l1,
    "identity": normalize_identity,
}


class DictionaryLayer(_Dictionary):
    """overcomplete's DictionaryLayer: [F, d] rows, normalised at each use while training.

    Args:
        in_dimensions: d. nb_concepts: F.
        normalization: "l2", "max_l2", "l1", "max_l1", "identity" or a function of the rows.
        initializer: [F, d], None for Xavier's.
        use_multiplier: train a scalar m; the dictionary is the rows times exp(m).
        device: of the parameters.

    Raises:
        ValueError: an unknown normalization, or an initializer of another shape.
    """

    NORMALIZATIONS = NORMALIZATIONS
    _weights: nn.Parameter  # [F, d]
    multiplier: Tensor  # []

    def __init__(
        self,
        in_dimensions: int,
        nb_concepts: int,
        normalization: str | Callable[[Tensor], Tensor] = "l2",
        initializer: Tensor | None = None,
        use_multiplier: bool = False,
        device: Any = "cpu",
    ) -> None:
        nn.Module.__init__(self)
        self.in_dimensions, self.nb_concepts, self.device = in_dimensions, nb_concepts, device
        if not callable(normalization) and normalization not in NORMALIZATIONS:
            names = ", ".join(NORMALIZATIONS)
            raise ValueError(
                f"DictionaryLayer: normalization must be a function or one of {names}, got"
                f" {normalization!r}"
            )
        if isinstance(normalization, str):
            normalization = NORMALIZATIONS[normalization]
        self.normalization = normalization
        self._weights = nn.Parameter(torch.empty(nb_concepts, in_dimensions, device=device))
        if initializer is None:
            nn.init.xavier_uniform_(self._weights)
        elif initializer.shape != self._weights.shape:
            raise ValueError(
                f"DictionaryLayer: initializer must be of shape {list(self._weights.shape)}, got"
                f" {list(initializer.shape)}"
            )
        else:
            self._weights.data = initializer.detach().clone().to(device)
        zero = torch.tensor(0.0, device=device)
        if use_multiplier:
            self.multiplier = nn.Parameter(zero)
        else:
            self.register_buffer("multiplier", zero)
        self._fused_dictionary: Tensor | None = None

    @torch.no_grad()
    def _normalize(self) -> None:
        """As the library, for the standard normalization without a second [F, d]."""
        if self.normalization is normalize_l2:
            self._weights.data /= self._weights.norm(dim=1, keepdim=True) + 1e-8
        else:
            self._weights.data = self.normalization(self._weights)

    def _rows(self) -> Tensor:
        """The normalised rows [F, d]: normalised in place, but for a graph that is exported, which
        changes no parameter."""
        if torch.compiler.is_exporting():
            return self.normalization(self._weights)
        self._normalize()
        return self._weights

    def get_dictionary(self) -> Tensor:
        """The dictionary [F, d]; in eval mode the one of the moment the mode was entered."""
        if self.training:
            return self._rows() * torch.exp(self.multiplier)
        if self._fused_dictionary is None:
            raise ValueError(
                "DictionaryLayer: eval() must come before evaluation, got no such call"
            )
        return self._fused_dictionary

    def forward(self, z: Tensor) -> Tensor:
        """[..., F] -> [..., d]."""
        code = lazy.known(z)
        if code is None:
            return torch.matmul(z, self.get_dictionary())
        if not self.training:
            rows = self.get_dictionary()
            return lazy.decoded(z, sparse.decode(*code, rows), rows)
        rows, scale = self._rows(), torch.exp(self.multiplier)
        values, indices = code  # scaled here, k numbers a token instead of F rows
        out = sparse.decode(values * scale, indices, rows)
        return lazy.decoded(z, out, rows, 1 / scale.detach())

    def train(self, mode: bool = True) -> DictionaryLayer:
        """Entering eval mode keeps the dictionary of that moment."""
        if not mode:
            self._fused_dictionary = self.get_dictionary()
        nn.Module.train(self, mode)
        return self

    def _load_from_state_dict(self, *args: Any) -> None:
        super()._load_from_state_dict(*args)
        if not self.training:
            self.training = True
            self.train(False)


class LinearEncoder(_Linear):
    """overcomplete's default encoder, `MLPEncoder` without blocks: Linear, then a ReLU."""

    def __init__(self, input_shape: int, n_components: int, device: Any = "cpu") -> None:
        nn.Module.__init__(self)
        self.input_size = self.hidden_dim = input_shape
        self.n_components, self.nb_blocks, self.residual = n_components, 0, False
        self.hidden_activation, self.output_activation = nn.ReLU, nn.ReLU
        self.norm_layer = nn.Identity
        self.mlp_blocks = nn.ModuleList()
        linear = nn.Linear(input_shape, n_components, device=device)
        self.final_block = nn.Sequential(linear, nn.Identity())
        self.final_activation = nn.ReLU()

    def forward(self, x: Tensor) -> Code:
        """Pre-codes and codes [N, F]."""
        pre: Tensor = self.final_block(x)
        return pre, pre.relu()


class TieableEncoder(_Tieable):
    """overcomplete's TieableEncoder: rows of its own, or those of a dictionary.

    Args:
        in_dimensions: d. nb_concepts: F. bias: train one.
        tied_to: the dictionary layer, None for own weights. weight_init: [F, d], None for Xavier's.
        device: of the parameters.
    """

    def __init__(
        self,
        in_dimensions: int,
        nb_concepts: int,
        bias: bool = False,
        tied_to: Any = None,
        weight_init: Tensor | None = None,
        device: Any = "cpu",
    ) -> None:
        nn.Module.__init__(self)
        self.tied_to = tied_to
        weight = None
        if tied_to is None:
            weight = nn.Parameter(torch.empty(nb_concepts, in_dimensions, device=device))
            if weight_init is None:
                nn.init.xavier_uniform_(weight)
            else:
                weight.data.copy_(weight_init)
        self.register_parameter("weight", weight)
        zeros = nn.Parameter(torch.zeros(nb_concepts, device=device)) if bias else None
        self.register_parameter("bias", zeros)

    def forward(self, x: Tensor) -> Code:
        """Pre-codes and codes [N, F]."""
        rows, bias = _tieable(self)
        pre = nn.functional.linear(x, rows, bias)
        return pre, pre.relu()


def _tieable(encoder: Any) -> tuple[Tensor, Tensor | None]:
    rows = encoder.weight if encoder.tied_to is None else encoder.tied_to.get_dictionary()
    return rows, encoder.bias


def _linear(encoder: nn.Module) -> tuple[Tensor, Tensor] | None:
    """Weight [F, d] and bias [F] of an encoder that is one linear map and a ReLU, unheard."""
    if any(m._forward_hooks or m._forward_pre_hooks for m in encoder.modules()):
        return None
    if type(encoder).forward in (TieableEncoder.forward, getattr(_Tieable, "forward", None)):
        rows, bias = _tieable(encoder)
        return rows, rows.new_zeros(rows.shape[0]) if bias is None else bias
    if type(encoder).forward not in (LinearEncoder.forward, getattr(_Linear, "forward", None)):
        return None
    block: Any = encoder.final_block
    plain = type(block[0]) is nn.Linear and type(block[1]) is nn.Identity
    if encoder.mlp_blocks or not plain or type(encoder.final_activation) is not nn.ReLU:
        return None
    return block[0].weight, block[0].bias


class TopKSAE(_Base):
    """overcomplete's TopKSAE: arguments, attributes and outputs as there.

    Args:
        input_shape: d, or (tokens, d), or (d, height, width) with an encoder for it.
        nb_concepts: F.
        top_k: active concepts a token, default a tenth of F.
        encoder_module: a module x -> (pre_codes, codes) [N, F], a name in the library's factory
            (which needs the library), or None for a linear map and a ReLU.
        dictionary_params: arguments of `DictionaryLayer`.
        device: of the parameters.

    Raises:
        ValueError: top_k out of range, or an input_shape that does not fit.
        ImportError: an encoder by name without the library.
    """

    def __init__(
        self,
        input_shape: int | Sequence[int],
        nb_concepts: int,
        top_k: int | None = None,
        encoder_module: str | nn.Module | None = None,
        dictionary_params: dict[str, Any] | None = None,
        device: Any = "cpu",
    ) -> None:
        nn.Module.__init__(self)
        top_k = max(nb_concepts // 10, 1) if top_k is None else top_k
        if not 1 <= top_k <= nb_concepts:
            raise ValueError(
                f"TopKSAE: top_k must be in [1, {nb_concepts}], the number of concepts, got {top_k}"
            )
        d = _channels(input_shape)
        self.nb_concepts, self.device, self.top_k = nb_concepts, device, top_k
        self.fitted = False
        self._fitted_info: dict[str, Any] = {}
        self.encoder = _encoder(encoder_module, input_shape, nb_concepts, device)
        self.dictionary = DictionaryLayer(d, nb_concepts, device=device, **dictionary_params or {})

    def _code(self, x: Tensor) -> tuple[Tensor, Code]:
        """Pre-codes [N, F], lazy where the encoder is linear, and the code."""
        weights = None if lazy.plain() else _linear(self.encoder)
        if weights is None:
            pre_codes, codes = self.encoder(x)
            return pre_codes, functional.topk(codes, self.top_k)
        pre_codes = lazy.pre_activations(x, *weights, relu=False)
        code = functional.topk_encode(x, *weights, self.top_k)
        lazy.selected(pre_codes, *code)
        return pre_codes, code

    def encode(self, x: Tensor) -> Code:
        """Pre-codes and codes [N, F] of x [N, d]; the pre-codes are computed when read."""
        pre_codes, code = self._code(x)
        return pre_codes, sparse.scatter(*code, self.nb_concepts)

    def decode(self, z: Tensor) -> Tensor:
        """Reconstruction [N, d] of a code [N, F]."""
        out: Tensor = self.dictionary(z)
        return out

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Pre-codes, codes [N, F], both lazy, and the reconstruction [N, d]."""
        pre_codes, code = self._code(x)
        codes = lazy.code(*code, self.nb_concepts)
        return pre_codes, codes, self.decode(codes)

    def get_dictionary(self) -> Tensor:
        """The dictionary [F, d]."""
        rows: Tensor = self.dictionary.get_dictionary()
        return rows

    def fit(self, x: Tensor) -> None:
        """As in the library, there is none: `train_sae` trains.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError("TopKSAE: fit must be train_sae or a loop of one's own, got fit")

    def tied(self, bias: bool = False) -> TopKSAE:
        """Encode with the rows of the dictionary; returns self."""
        return self._encode_with(bias, tied_to=self.dictionary)

    def untied(self, bias: bool = False, copy_from_dictionary: bool = True) -> TopKSAE:
        """Encode with rows of its own, at first the dictionary's or random; returns self."""
        rows = self.get_dictionary().detach() if copy_from_dictionary else None
        return self._encode_with(bias, weight_init=rows)

    def _encode_with(self, bias: bool, **source: Any) -> TopKSAE:
        d = self.dictionary.in_dimensions
        self.encoder = TieableEncoder(d, self.nb_concepts, bias, device=self.device, **source)
        return self


def _channels(input_shape: int | Sequence[int]) -> int:
    """d of a shape without the batch."""
    if isinstance(input_shape, int):
        return input_shape
    if len(input_shape) not in (2, 3):
        raise ValueError(f"TopKSAE: input_shape must have 1 to 3 dimensions, got {input_shape}")
    return input_shape[1] if len(input_shape) == 2 else input_shape[0]


def _encoder(
    module: str | nn.Module | None, input_shape: int | Sequence[int], nb_concepts: int, device: Any
) -> nn.Module:
    if isinstance(module, nn.Module):
        return module
    if module is None or module == "linear":
        if not isinstance(input_shape, int):
            raise ValueError(
                f"TopKSAE: input_shape must be an integer for a linear encoder, got {input_shape}"
            )
        return LinearEncoder(input_shape, nb_concepts, device)
    factory = libraries.module("overcomplete.sae.factory")
    if factory is None:
        raise ImportError(
            f"TopKSAE: overcomplete must be installed for encoder_module {module!r}, got no such"
            " package"
        )
    encoder: nn.Module = factory.EncoderFactory.create_module(
        module, input_shape, nb_concepts, device=device
    )
    return encoder


def adopt(module: Any) -> None:
    """Make a swapped instance of the library's class what ours is."""
    layer: Any = module.dictionary
    kind: type = type(layer)
    if kind is not _Dictionary:
        return  # a dictionary of another kind keeps its class: dense codes are decoded by it
    table: dict[str, Any] = getattr(_Dictionary, "NORMALIZATIONS", {})
    theirs = {id(function): name for name, function in table.items()}
    name = theirs.get(id(layer.normalization))
    if name in NORMALIZATIONS:
        layer.normalization = NORMALIZATIONS[name]
    layer.__class__ = DictionaryLayer
