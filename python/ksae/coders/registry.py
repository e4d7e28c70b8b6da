# SPDX-License-Identifier: Apache-2.0
"""Names of coder classes in files, and the constructors that they stand for."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from .activation import Activation

if TYPE_CHECKING:
    from .coder import SparseCoder

_Class = TypeVar("_Class", bound="type[SparseCoder]")
_CLASSES: dict[str, type[SparseCoder]] = {}
_NAMES: dict[tuple[str, type[Activation]], str] = {}


def register(*activations: type[Activation]) -> Callable[[_Class], _Class]:
    """A class decorator: files of this topology with these activations name this class."""

    def enter(cls: _Class) -> _Class:
        _CLASSES[cls.__name__] = cls
        for activation in activations:
            _NAMES[cls.topology, activation] = cls.__name__
        return cls

    return enter


def name_of(model: SparseCoder) -> str:
    """The name that files give to a model, whose class rebuilds it from its `config()`."""
    return _NAMES.get((model.topology, type(model.activation)), type(model).__name__)


def is_named(model: SparseCoder) -> bool:
    """Whether the model's class in files stands for its activation too."""
    return (model.topology, type(model.activation)) in _NAMES


def find(name: str) -> type[SparseCoder] | None:
    """The class of that name, None if there is none."""
    return _CLASSES.get(name)


def of(topology: str, activation: type[Activation]) -> type[SparseCoder]:
    """The class of a topology ("sae" or "transcoder") with an activation."""
    return _CLASSES[_NAMES[topology, activation]]
