# SPDX-License-Identifier: Apache-2.0
"""The libraries that ksae stands in for: found if installed, never required."""

from __future__ import annotations

import importlib
import importlib.util
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import metadata
from types import ModuleType
from typing import Any, NamedTuple

from torch._subclasses.fake_tensor import FakeTensor


class Library(NamedTuple):
    """An import name's distribution, and the versions [first, past) that the tests ran with."""

    distribution: str
    first: tuple[int, int]
    past: tuple[int, int]


LIBRARIES = {
    "sparsify": Library("eai-sparsify", (1, 3), (1, 4)),
    "dictionary_learning": Library("dictionary-learning", (0, 1), (0, 2)),
    "sae_lens": Library("sae-lens", (6, 50), (6, 55)),
    "overcomplete": Library("overcomplete", (0, 3), (0, 4)),
}
_warned: set[str] = set()


def installed(name: str) -> bool:
    """Whether the library is there; a version outside the tested range warns once."""
    if name in sys.modules:
        found = sys.modules[name] is not None
    else:
        found = importlib.util.find_spec(name) is not None
    library = LIBRARIES.get(name)
    if found and library is not None and name not in _warned:
        _check_version(name, library)
    return found


def _check_version(name: str, library: Library) -> None:
    _warned.add(name)
    try:
        version = metadata.version(library.distribution)
    except metadata.PackageNotFoundError:  # a source tree, or another package of that name
        return
    numbers = [int(n) for n in re.findall(r"\d+", version)[:2]]
    if not library.first <= tuple(numbers) < library.past:
        first, past = (".".join(map(str, v)) for v in (library.first, library.past))
        warnings.warn(
            f"ksae.interop: {library.distribution} must be of version >= {first}, < {past} to be"
            f" as tested, got {version}",
            stacklevel=3,
        )


@contextmanager
def _own_fake_tensors() -> Iterator[None]:
    """What torch compiles with stays as it was: nnsight 0.3, which dictionary_learning imports,
    gives fake tensors a constructor that torch calls otherwise today, and compiling then fails in
    the whole process."""
    before = dict(vars(FakeTensor))
    try:
        yield
    finally:
        for name, value in dict(vars(FakeTensor)).items():
            if name not in before:
                delattr(FakeTensor, name)
            elif value is not before[name]:
                setattr(FakeTensor, name, before[name])


def module(path: str) -> ModuleType | None:
    """The module `path` of an installed library, None without the library."""
    if not installed(path.split(".")[0]):
        return None
    with _own_fake_tensors():
        return importlib.import_module(path)


def base(path: str, name: str, otherwise: type) -> Any:
    """Class `name` of module `path`, so that isinstance holds; `otherwise` without the library."""
    found = module(path)
    return otherwise if found is None else getattr(found, name)
