# SPDX-License-Identifier: Apache-2.0
"""A model whose gradients hold attention patterns and the scales of norms fixed, so that what a
latent adds to the residual stream reaches later latents along linear paths only (arXiv 2406.11944).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ksae.activations import find_blocks
from ksae.errors import UserError

QUERY_AND_KEY = ("q_proj", "k_proj", "query", "key", "q_lin", "k_lin")  # one module each
FUSED = "c_attn"  # GPT-2's query, key and value side by side
BY_HEAD = "query_key_value"  # GPT-NeoX's, side by side for each head


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Within the block gradients treat as constants the attention patterns, whose queries and keys
    get none, and the scale by which a norm divides. Outputs stay as they are to the bit.

    Raises:
        UserError: a norm that is no nn.LayerNorm and no RMSNorm; no queries and keys are found in
            the attention of a block (known are those of the Llama, GPT-2, GPT-NeoX, OPT, BERT and
            DistilBERT families and their kin).
    """
    with ExitStack() as stack:
        for module, hook in _hooks(model):
            handle = module.register_forward_hook(hook)
            stack.callback(handle.remove)
        yield


Hook = Callable[[nn.Module, tuple[Any, ...], Any], Any]


def _hooks(model: nn.Module) -> list[tuple[nn.Module, Hook]]:
    found: list[tuple[nn.Module, Hook]] = []
    for module in model.modules():
        name = type(module).__name__
        if type(module) is nn.LayerNorm or name.endswith("RMSNorm"):
            found.append((module, _norm))
        elif "Norm" in name:  # whose gain or centring may be another
            raise UserError(f"frozen: norms must be nn.LayerNorm or an RMSNorm, got {name}")
    _, blocks = find_blocks(model)
    config: Any = getattr(model, "config", None)
    for number, block in enumerate(blocks):
        hooks: list[tuple[nn.Module, Hook]] = []
        for path, module in block.named_modules():
            name = path.rpartition(".")[2]
            if name in QUERY_AND_KEY:
                hooks.append((module, _detached))
            elif name == FUSED:
                hooks.append((module, partial(_values_only, 1)))
            elif name == BY_HEAD and config.model_type == "gpt_neox":
                hooks.append((module, partial(_values_only, config.num_attention_heads)))
        if not hooks:
            raise UserError(
                f"frozen: the attention of block {number} of {type(model).__name__} must have "
                f"{', '.join(QUERY_AND_KEY)}, {FUSED} or {BY_HEAD}, found none"
            )
        found += hooks
    return found


def _detached(_module: nn.Module, _args: tuple[Any, ...], output: Tensor) -> Tensor:
    return output.detach()


def _values_only(groups: int, _module: nn.Module, _args: tuple[Any, ...], out: Tensor) -> Tensor:
    """Of query, key and value side by side in each group, the gradient of value alone."""
    query, key, value = out.reshape(*out.shape[:-1], groups, -1).chunk(3, -1)
    return torch.cat([query.detach(), key.detach(), value], -1).flatten(-2)


def _norm(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    """The output, with the gradient of gain * centred(x) * constant scale."""
    x = args[0]
    with torch.no_grad():
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        if isinstance(module, nn.LayerNorm):
            gain = module.weight
            scale = (wide.var(-1, unbiased=False, keepdim=True) + module.eps).rsqrt()
        else:
            eps = getattr(module, "variance_epsilon", getattr(module, "eps", None))
            eps = torch.finfo(x.dtype).eps if eps is None else eps  # as nn.RMSNorm
            ones = torch.ones_like(x[..., :1, :] if x.ndim > 1 else x)
            gain = module.forward(ones) * (1 + eps) ** 0.5  # also where a gain is stored less one
            scale = (wide.square().mean(-1, keepdim=True) + eps).rsqrt()
        factor = scale if gain is None else scale * gain
    centred = x - x.mean(-1, keepdim=True) if isinstance(module, nn.LayerNorm) else x
    linear: Tensor = (centred * factor).to(output.dtype)
    same: Tensor = output.detach() + (linear - linear.detach())
    return same
