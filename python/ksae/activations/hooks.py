# SPDX-License-Identifier: Apache-2.0
"""Named points inside a Hugging Face model: reading them, and replacing them.

`layers.{i}.` followed by
    resid_pre   the residual stream entering block i
    resid_post  the residual stream leaving block i
    attn_z      the heads' outputs, before the attention's output projection
    attn_out    the attention's output, after that projection
    mlp_in      the input of the MLP, after any norm before it
    mlp_out     the output of the MLP, before any norm after it and before the residual is added
or the path of any module followed by `:in` or `:out`, such as `model.layers.3.mlp.act_fn:out`.

The blocks are found by structure: the outermost ModuleList with as many entries as the
configuration counts layers. The parts of a block go by the names below, which cover the Llama,
GPT-2, GPT-NeoX, OPT, BERT and DistilBERT families and their kin.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from threading import get_ident
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ksae.errors import UserError

# For each point the side of the module and the paths to try inside a block, most specific first.
_ATTENTIONS = ("self_attn", "attention", "attn", "self_attention")
_PROJECTIONS = ("o_proj", "output.dense", "out_proj", "c_proj", "dense", "out_lin", "o")
_PROJECTION_PATHS = (
    "attention.attn.o",  # MPNet
    "attn.attention.out_proj",  # GPT-Neo
    *(f"{a}.{p}" for a in _ATTENTIONS for p in _PROJECTIONS),
)
_MLPS = ("mlp", "ffn", "feed_forward", "block_sparse_moe")
_PARTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "resid_pre": ("in", ("",)),
    "resid_post": ("out", ("",)),
    "attn_z": ("in", _PROJECTION_PATHS),
    "attn_out": ("out", _PROJECTION_PATHS),
    "mlp_in": ("in", (*_MLPS, "intermediate", "fc1")),  # BERT and OPT have no module around both
    "mlp_out": ("out", (*_MLPS, "output.dense", "fc2")),
}


class HookPoint(NamedTuple):
    name: str
    path: str  # of the module
    side: str  # "in" or "out"


class _Stop(Exception):
    """Ends a forward pass when the last hook has been read."""


def find_blocks(model: nn.Module) -> tuple[str, nn.ModuleList]:
    """The path and the list of the model's blocks."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    layers = getattr(config, "num_hidden_layers", None)
    lists = [
        (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and (len(module) == layers or layers is None)
    ]
    if not lists:
        # ALBERT and the like share one block among all layers.
        raise UserError(
            f"hook: no list of blocks was found in {type(model).__name__}; name a module instead, "
            "as in path.of.module:out"
        )
    return min(lists, key=lambda item: (item[0].count("."), -len(item[1])))


def hook_names(model: nn.Module) -> list[str]:
    """Every named point of a model (modules by path come on top of these)."""
    _, blocks = find_blocks(model)
    return [
        f"layers.{i}.{part}"
        for i, block in enumerate(blocks)
        for part in _PARTS
        if _part(block, part) is not None
    ]


def resolve_hook(model: nn.Module, name: str) -> HookPoint:
    """The module a hook name means; an unknown name lists the valid ones."""
    path, colon, side = name.rpartition(":")
    if colon:
        if side in ("in", "out"):
            with suppress(AttributeError):
                model.get_submodule(path)
                return HookPoint(name, path, side)
        raise _unknown(model, name)
    words = name.split(".")
    if len(words) != 3 or words[0] != "layers" or not words[1].isdecimal():
        raise _unknown(model, name)
    parent, blocks = find_blocks(model)
    index, part = int(words[1]), words[2]
    if part not in _PARTS or index >= len(blocks):
        raise _unknown(model, name)
    inner = _part(blocks[index], part)
    if inner is None:
        raise _unknown(model, name)
    return HookPoint(name, ".".join(filter(None, (parent, words[1], inner))), _PARTS[part][0])


def capture(
    model: nn.Module, hooks: Sequence[str], inputs: dict[str, Any], *, stop: bool = True
) -> dict[str, Tensor]:
    """Run the model and return the activation at each hook. The forward pass ends at the last hook
    that is reached; the model is left as it was.

    Args:
        inputs: keyword arguments of the model's forward, input_ids among them.
        stop: end at the last hook; False runs the whole pass.
    """
    points = [resolve_hook(model, name) for name in dict.fromkeys(hooks)]
    found: dict[str, Tensor] = {}

    def reader(point: HookPoint) -> Callable[[Any], Any]:
        def read(value: Any) -> Any:
            # A shared module runs several times; its first run counts.
            if point.name not in found:
                found[point.name] = first(value, point).detach()
                if stop and len(found) == len(points):
                    raise _Stop
                # The model goes on and might work in place.
                found[point.name] = found[point.name].clone()
            return value

        return read

    handles = [attach(model, point, reader(point)) for point in points]
    try:
        with torch.no_grad(), suppress(_Stop):
            model(**without_cache(model, inputs))
    finally:
        for handle in handles:
            handle.remove()
    for point in points:
        if point.name not in found:
            raise UserError(f"hook {point.name}: the forward pass does not reach {point.path}")
    return found


@contextmanager
def splice(
    model: nn.Module,
    hook: str,
    fn: Callable[[Tensor], Tensor],
    *,
    exclude: Iterable[int] | None = None,
) -> Iterator[None]:
    """Within the block, the model goes on from `fn(activation)` at the hook instead of the
    activation [batch, length, d] (OPT's MLP sees [batch * length, d]).

    Args:
        exclude: ids of tokens whose activations stay, as do those of padding: what training left
            out, `contexts.special_ids` or a tokenizer's `all_special_ids`. By default the special
            tokens that the model's configuration names; () replaces all activations.

    Raises:
        UserError: no such hook; a replacement of another shape; with tokens to exclude, a pass
            without input_ids, or activations that are not one a token.
    """
    point = resolve_hook(model, hook)
    excluded = sorted(set(special_ids(model) if exclude is None else exclude))
    passes: list[Tensor] = []  # [batch, length] bool, of the pass that runs
    thread = get_ident()

    def look(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if get_ident() == thread:
            passes[:] = [used(hook, excluded, args, kwargs)]

    def replace(value: Any) -> Any:
        old = first(value, point)
        new = fn(old.clone() if excluded else old)  # it may work in place
        if new.shape != old.shape:
            raise UserError(
                f"hook {hook}: the replacement must have shape {list(old.shape)}, "
                f"got {list(new.shape)}"
            )
        new = new.to(old.dtype)
        if excluded:
            if not passes or passes[0].numel() != old.shape[:-1].numel():
                what = (
                    f"got {list(old.shape)}" if passes else "got a part of the model called alone"
                )
                raise UserError(
                    f"hook {hook}: must give activations of each token for tokens to be excluded, "
                    f"{what}; exclude=() replaces all of them"
                )
            new = torch.where(passes[0].view(*old.shape[:-1], 1).to(old.device), new, old)
        return replaced(value, new)

    handles = [attach(model, point, replace)]
    if excluded:
        handles.append(model.register_forward_pre_hook(look, with_kwargs=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


_SPECIAL = ("bos", "eos", "pad", "cls", "sep", "mask")


def special_ids(model: nn.Module) -> set[int]:
    """The special tokens that a model's configuration names."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    named = (getattr(config, f"{name}_token_id", None) for name in _SPECIAL)
    lists = (ids if isinstance(ids, list | tuple) else [ids] for ids in named)
    return {i for ids in lists for i in ids if isinstance(i, int) and i >= 0}


def used(
    hook: str, excluded: Sequence[int], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor:
    """[batch, length] bool: tokens of a pass that are neither excluded nor padding."""
    ids = kwargs.get("input_ids", args[0] if args else None)
    if not isinstance(ids, Tensor) or ids.is_floating_point():
        raise UserError(
            f"hook {hook}: the model must be given input_ids for tokens to be excluded, got none; "
            "exclude=() replaces all activations"
        )
    found = ~torch.isin(ids, torch.tensor(excluded, dtype=ids.dtype, device=ids.device))
    mask = kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2 and mask.shape[1] >= ids.shape[1]:
        found &= mask[:, -ids.shape[1] :].to(ids.device) != 0  # a cache's tokens come before
    return found


def _part(block: nn.Module, part: str) -> str | None:
    for path in _PARTS[part][1]:
        with suppress(AttributeError):
            block.get_submodule(path)
            return path
    return None


def _unknown(model: nn.Module, name: str) -> UserError:
    try:
        known = hook_names(model)
        last = max(int(hook.split(".")[1]) for hook in known)
        parts = [part for part in _PARTS if f"layers.0.{part}" in known]
        valid = f"layers.{{0..{last}}}.{{{','.join(parts)}}} or path.of.module:in or :out"
    except UserError:
        valid = "path.of.module:in or :out"
    return UserError(f"hook {name!r}: is not in {type(model).__name__}; valid are {valid}")


def attach(model: nn.Module, point: HookPoint, change: Callable[[Any], Any]) -> Any:
    """Call `change` on the module's input or output, and put its result in place. Only in this
    thread: another one may be running the model for purposes of its own."""
    module = model.get_submodule(point.path)
    thread = get_ident()
    if point.side == "out":
        return module.register_forward_hook(
            lambda _module, _args, output: change(output) if get_ident() == thread else None
        )

    def before(
        _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if get_ident() != thread:
            return None
        if args:
            return (change(args[0]), *args[1:]), kwargs
        for name in ("hidden_states", "input", "x"):
            if name in kwargs:
                return args, {**kwargs, name: change(kwargs[name])}
        raise UserError(f"hook {point.name}: {point.path} takes no hidden states as input")

    return module.register_forward_pre_hook(before, with_kwargs=True)


def first(value: Any, point: HookPoint) -> Tensor:
    """The hidden states: the value itself, or the first of a tuple."""
    if type(value) in (tuple, list) and value:
        value = value[0]
    if not isinstance(value, Tensor) or not value.is_floating_point():
        what = f"a tensor of {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise UserError(f"hook {point.name}: must be a tensor of floats, got {what}")
    return value


def replaced(value: Any, new: Tensor) -> Any:
    """`value` with other hidden states."""
    return new if isinstance(value, Tensor) else type(value)((new, *value[1:]))


def without_cache(model: nn.Module, inputs: dict[str, Any]) -> dict[str, Any]:
    """Switch the key-value cache off where the model has one."""
    parameters = inspect.signature(model.forward).parameters
    return {"use_cache": False, **inputs} if "use_cache" in parameters else inputs
