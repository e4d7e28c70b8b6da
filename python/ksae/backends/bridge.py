# SPDX-License-Identifier: Apache-2.0
"""A native op from torch tensors, generated from what states it: its line (ksae.ops.grammar), and
the fields of its native parameters (csrc/include/ksae/op.h).

A field is named as an argument, an output or a size of the line; `dtype` is the storage type T,
`x_dtype` the type of argument x and `x_size` its number of elements. Optional arguments that no
field is named for are not in the signature of the function: the reference serves them.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_OF = {
    "A": torch.float32,  # the reference serves float64
    "f32": torch.float32,
    "f64": torch.float64,
    "i32": torch.int32,
    "i64": torch.int64,
    "bool": torch.bool,
}


def pointer(t: Tensor | None) -> int:
    """0 for None."""
    return 0 if t is None else t.data_ptr()


def guard(t: Tensor) -> contextlib.AbstractContextManager[object]:
    """Launches go to the device of `t`."""
    return torch.cuda.device(t.device) if t.is_cuda else contextlib.nullcontext()


Fields = Sequence[Any]  # names, and those of a list's entries as a tuple


def native(
    spec: Any, fields: Fields, call: Callable[..., Any], run: str, known: Mapping[str, Any]
) -> Callable[..., Any]:
    """The op of `spec` (ksae.ops.spec.Spec) by `call`, which takes the values of `fields`.

    run: the line that calls it, with `values` for them, `like` for a tensor of the call and names
    of `known`.
    """
    names = _Names(spec)
    values = ", ".join(names.value(field) for field in fields)
    used = set(re.findall(r"\w+", values))
    taken = [a for a in spec.names if a in used or a not in spec.optional]
    outputs = [f"{a.name} = {names.new(a)}" for a in spec.outputs]
    source = "\n    ".join(
        [
            f"def {spec.name}({', '.join(_parameter(spec, a) for a in taken)}):",
            f"like = {names.lead}",
            *outputs,
            run.format(values=values),
            f"return {', '.join(a.name for a in spec.outputs) or None}",
        ]
    )
    space: dict[str, Any] = {
        **known,
        "call": call,
        "DTYPES": DTYPES,
        **{f"default_{name}": value for name, value in spec.defaults.items()},
        **{f"dtype_{name}": dtype for name, dtype in _OF.items()},
    }
    exec(compile(source, f"<native {spec.name}>", "exec"), space)
    made: Callable[..., Any] = space[spec.name]
    return made


def _parameter(spec: Any, name: str) -> str:
    return f"{name}=default_{name}" if name in spec.defaults else name


class _Names:
    """Where the values of fields stand in a call of the op."""

    def __init__(self, spec: Any) -> None:
        self.name = spec.name
        self.arguments = {a.name: a for a in spec.arguments}
        self.outputs = {a.name for a in spec.outputs}
        self.lead = self.first(spec.lead)

    @staticmethod
    def first(a: Any) -> str:
        return f"{a.name}[0]" if a.many else str(a.name)

    def value(self, field: Any) -> str:
        if isinstance(field, tuple):
            return self.entries(field)
        if (a := self.arguments.get(field)) is not None:
            if a.dims is None:
                return str(a.name)
            return self.pointer(a.name, a.optional)
        if field in self.outputs:
            return self.pointer(field, False)
        if field == "dtype":
            return f"DTYPES[{self.lead}.dtype]"
        owner, _, what = field.rpartition("_")
        if what == "dtype" and owner in self.arguments:
            return f"DTYPES[{self.first(self.arguments[owner])}.dtype]"
        if what == "size" and owner in self.arguments:
            return f"{self.first(self.arguments[owner])}.numel()"
        return self.size(field)

    @staticmethod
    def pointer(t: str, optional: bool) -> str:
        return f"(0 if {t} is None else {t}.data_ptr())" if optional else f"{t}.data_ptr()"

    def size(self, name: str) -> str:
        """A size from the shape of an argument that is always there."""
        for a in self.arguments.values():
            for i, dim in enumerate(a.dims or ()):
                plain, more = dim.removesuffix("=").removesuffix("+1"), "+1" in dim
                if plain == name and not a.optional:
                    return f"{self.first(a)}.shape[{i}]" + (" - 1" if more else "")
        raise ValueError(f"{self.name}: no argument or size is named {name}")

    def entries(self, fields: Fields) -> str:
        """A list: a tuple for each entry of the arguments that are lists."""
        own, values = [], []
        for field in fields:
            a, of = self.arguments.get(field), field.rpartition("_")
            if a is not None:
                values.append(self.pointer(f"{field}_g", a.optional))
            elif of[2] == "size" and of[0] in self.arguments:
                a = self.arguments[of[0]]
                values.append(f"{a.name}_g.numel()")
            else:
                dim = f"{field}_g"
                a = next(b for b in self.arguments.values() if b.many and dim in (b.dims or ()))
                values.append(f"{a.name}_g.shape[{a.dims.index(dim)}]")
            if a not in own:
                own.append(a)
        count = f"[None] * len({own[0].name})"
        lists = [
            f"{count} if {a.name} is None else {a.name}" if a.optional else a.name for a in own
        ]
        each = ", ".join(f"{a.name}_g" for a in own)
        return f"[({', '.join(values)},) for {each}, in zip({', '.join(lists)})]"

    def new(self, a: Any) -> str:
        """An output with nothing in it."""
        sizes = "".join(f"{self.total(d)}, " for d in a.dims)
        return f"like.new_empty(({sizes})" + (")" if a.type == "T" else f", dtype=dtype_{a.type})")

    def total(self, dim: str) -> str:
        """A size that is named, a number, or one and one more."""
        if dim.isdigit():
            return dim
        return self.size(dim.removesuffix("+1")) + (" + 1" if dim.endswith("+1") else "")
