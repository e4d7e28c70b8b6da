# SPDX-License-Identifier: Apache-2.0
"""Acceleration in place: the classes of live modules, or a library's names for a script."""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from . import libraries

# What stands in for what: {library: (our module, {(their module, name): our name})}.
CLASSES = {
    "sparsify": ("sparsify", {("sparsify.sparse_coder", "SparseCoder"): "SparseCoder"}),
    "dictionary_learning": (
        "dictionary_learning",
        {("dictionary_learning.trainers.top_k", "AutoEncoderTopK"): "AutoEncoderTopK"},
    ),
    "sae_lens": (
        "saelens",
        {
            ("sae_lens.saes.topk_sae", "TopKSAE"): "TopKSAE",
            ("sae_lens.saes.topk_sae", "TopKTrainingSAE"): "TopKTrainingSAE",
        },
    ),
    "overcomplete": ("overcomplete", {("overcomplete.sae.topk_sae", "TopKSAE"): "TopKSAE"}),
}
FUNCTIONS = {
    "sparsify": {
        ("sparsify.fused_encoder", "fused_encoder"): "fused_encoder",
        ("sparsify.utils", "decoder_impl"): "decoder_impl",
    },
}


def _pairs(library: str, table: dict[tuple[str, str], str]) -> list[tuple[Any, Any]]:
    """(theirs, ours) of a table."""
    ours = importlib.import_module(f"{__package__}.{CLASSES[library][0]}")
    return [
        (getattr(importlib.import_module(path), name), getattr(ours, own))
        for (path, name), own in table.items()
    ]


def accelerate(module: nn.Module) -> dict[str, str]:
    """Put ksae's kernels under the sparse autoencoders of known libraries inside a live module.

    Their class becomes ours; parameters, buffers, hooks and settings stay the very same objects, so
    optimizers and references to the modules stay valid. Subclasses of the libraries' classes, which
    may have changed anything, are left alone. Only libraries that the program has imported count.

    Args:
        module: one of the libraries' modules, or a model that contains some.

    Returns:
        {name of the submodule ("" for `module` itself): new class} for all that were swapped.

    Raises:
        TypeError: `module` is not an nn.Module.

    Example:
        >>> import torch, ksae.interop
        >>> ksae.interop.accelerate(torch.nn.Linear(2, 2))
        {}
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"accelerate: module must be an nn.Module, got {type(module).__name__}")
    swapped = {}
    for library, (own, table) in CLASSES.items():
        if library not in sys.modules or not libraries.installed(library):
            continue
        adopt = importlib.import_module(f"{__package__}.{own}").adopt
        classes = dict(_pairs(library, table))
        for name, m in module.named_modules():
            ours = classes.get(type(m))
            if ours is not None:
                m.__class__ = ours
                adopt(m)
                swapped[name] = f"{ours.__module__}.{ours.__qualname__}"
    return swapped


@contextmanager
def accelerated(library: str) -> Iterator[None]:
    """Let a library's names mean ksae's classes, for a script that is not to be changed.

    Inside, whatever builds one of the library's classes (its trainers, its registries, default
    arguments, the running script) builds ours. Objects built outside stay as they are; see
    `accelerate`. Leaving restores every name.

    Args:
        library: "sparsify", "dictionary_learning", "sae_lens" or "overcomplete".

    Raises:
        ValueError: an unknown library. ImportError: the library is not installed.
    """
    if library not in CLASSES:
        names = ", ".join(CLASSES)
        raise ValueError(f"accelerated: library must be one of {names}, got {library!r}")
    if not libraries.installed(library):
        raise ImportError(f"accelerated: {library} must be installed, got no such package")
    libraries.module(library)
    pairs = _pairs(library, CLASSES[library][1]) + _pairs(library, FUNCTIONS.get(library, {}))
    undo: list[Callable[[], None]] = []
    try:
        for theirs, ours in pairs:
            for holder in _holders(library):
                _replace(holder, theirs, ours, undo)
        yield
    finally:
        for restore in reversed(undo):
            restore()


def _holders(library: str) -> list[types.ModuleType]:
    """The modules of a library, and the script."""
    inside = [m for n, m in sys.modules.items() if n == library or n.startswith(f"{library}.")]
    return [m for m in (*inside, sys.modules.get("__main__")) if isinstance(m, types.ModuleType)]


def _replace(
    module: types.ModuleType, theirs: Any, ours: Any, undo: list[Callable[[], None]]
) -> None:
    """Exchange a module's names, its registries' entries and its functions' defaults."""

    def assign(holder: Any, name: str, new: Any) -> None:
        old = getattr(holder, name)
        setattr(holder, name, new)
        undo.append(lambda: setattr(holder, name, old))

    def exchange(values: tuple[Any, ...]) -> tuple[Any, ...]:
        return tuple(ours if v is theirs else v for v in values)

    for name, value in list(vars(module).items()):
        if value is theirs:
            assign(module, name, ours)
        elif isinstance(value, dict) and not name.startswith("__"):
            for key, entry in list(value.items()):
                if isinstance(entry, tuple) and any(e is theirs for e in entry):
                    value[key] = exchange(entry)
                    undo.append(lambda d=value, k=key, e=entry: d.__setitem__(k, e))  # type: ignore[misc]
        elif isinstance(value, type) and value.__module__ == module.__name__:
            for function in vars(value).values():
                defaults = getattr(function, "__defaults__", None) or ()
                if any(v is theirs for v in defaults):
                    assign(function, "__defaults__", exchange(defaults))
