# SPDX-License-Identifier: Apache-2.0
"""What is derived from the line of an op (grammar.py): the torch schema, the argument check, the
fake function and the check of latent numbers."""

from __future__ import annotations

import inspect
import operator
import re
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..reference.dtypes import ENTRIES, FLOATS, accumulator
from . import rows
from .grammar import Argument, parse
from .messages import fail, text, wrong_type
from .numbers import is_number, number_check

FIXED = {
    "bool": torch.bool,
    "i32": torch.int32,
    "i64": torch.int64,
    "f32": torch.float32,
    "f64": torch.float64,
    "bf16": torch.bfloat16,
}
INDEX = (torch.int64, torch.int32)
Values = dict[str, Any]  # arguments by name
Dims = dict[Any, Any]  # sizes by name; (name, g) is a list entry's own
Types = dict[str, torch.dtype]  # what T, A and the rules of the op stand for
Size = Callable[[Dims, int], Any]


class Checked(NamedTuple):
    """What a check found out: the tensor that sets type and device, sizes and types."""

    lead: Tensor
    dims: Dims
    types: Types

    @property
    def dtype(self) -> torch.dtype:
        return self.lead.dtype


class Compiled(NamedTuple):
    """What a check runs, and what outputs are made of."""

    checks: list[tuple[str, Callable[..., None]]]  # one an argument, in the order of Spec.order
    of_data: list[str]  # sizes that only the data say
    made: list[tuple[str, list[Size]]]  # type and sizes of each output


class Spec:
    """An op: its name, its line and what the line cannot say.

    Args:
        name: of the op.
        line: in the grammar above.
        given: which arguments go together, and types; called once T is known and before any other
            argument is looked at.
        relations: between arguments that are right by themselves.
        types: rules for types that depend on arguments: an expression of arguments, T and A.

    given and relations are called with the op's name and then with what their parameters name:
    arguments, sizes, T and A.
    """

    def __init__(
        self,
        name: str,
        line: str,
        *,
        given: Callable[..., None] | None = None,
        relations: Callable[..., None] | None = None,
        types: dict[str, str] | None = None,
    ) -> None:
        self.name = name
        self.line = line
        self.arguments, self.outputs = parse(line)
        self.names = tuple(a.name for a in self.arguments)
        self.written = tuple(a.name for a in self.arguments if a.written)
        self.hints = frozenset(a.name for a in self.arguments if a.hint)
        self.optional = frozenset(a.name for a in self.arguments if a.optional)
        self.given, self.relations, self.rules = given, relations, types or {}
        self.defaults = self._find_defaults()
        self._find_order()

    # --------------------------------------------------------------------------------------- schema

    def _find_defaults(self) -> Values:
        """Defaults as values: an optional argument has None if all after it have one."""
        found: Values = {}
        for a in reversed(self.arguments):
            if a.default is not None:
                found[a.name] = _default(a)
            elif a.optional and len(found) == len(self.arguments) - self.names.index(a.name) - 1:
                found[a.name] = None
        return found

    @property
    def schema(self) -> str:
        """The signature for torch.library.define."""
        words, alias = [], iter("abcdefghijklmnop")
        for a in self.arguments:
            kind = "Tensor" if a.dims is not None else _scalar(a.type)
            kind += f"({next(alias)}!)" if a.written else ""
            kind += ("[]" if a.many else "") + ("?" if a.optional else "")
            default = self.defaults.get(a.name, ...)
            quoted = f'"{default}"' if isinstance(default, str) else default
            words.append(f"{kind} {a.name}" + ("" if default is ... else f"={quoted}"))
        out = ", ".join(f"Tensor {a.name}" for a in self.outputs)
        return f"({', '.join(words)}) -> " + (f"({out})" if len(self.outputs) != 1 else out)

    def bind(self, args: Sequence[Any]) -> Values:
        """Arguments by name, from those in order; what the dispatcher dropped is the default."""
        values = dict(zip(self.names, args, strict=False))
        if len(args) < len(self.names):
            for name in self.names[len(args) :]:
                values[name] = self.defaults[name]
        return values

    # ---------------------------------------------------------------------------------------- check

    def check(self, values: Values) -> Checked:
        """Refuse arguments that do not fit, before anything is allocated or written."""
        dims: Dims = {}
        op = self.name
        if self._lists:
            self._check_lists(values, dims)
        value = values[self.lead.name]
        lead: Tensor = value[0] if self.lead.many else value
        types = {"T": lead.dtype, "A": accumulator(lead.dtype)}
        self._compiled.checks[0][1](values[self.lead.name], values, dims, types, lead)
        if self.offsets is not None:
            rows.settle(op, self.offsets, values, dims)
        for name, partner in self.partners:
            if (values[name] is None) != (values[partner] is None):
                raise fail(op, name, f"given with {partner}", "one without the other")
        if self.given is not None:
            self.given(op, *self._named(self.given, values, dims, types))
        for rule, expression in self.rules.items():
            types[rule] = eval(expression, {}, {**values, **types})
        for name, run in self._compiled.checks[1:]:
            value = values[name]
            if value is not None:
                run(value, values, dims, types, lead)
        if self.relations is not None:
            self.relations(op, *self._named(self.relations, values, dims, types))
        return Checked(lead, dims, types)

    @staticmethod
    def wanted(hook: Callable[..., None]) -> list[str]:
        """What `given` or `relations` is called with, after the name of the op."""
        return list(inspect.signature(hook).parameters)[1:]

    def _named(
        self, hook: Callable[..., None], values: Values, dims: Dims, types: Types
    ) -> list[Any]:
        known = {**dims, **types, **values}
        return [known.get(name) for name in self.wanted(hook)]

    def fake(self, *args: Any) -> Any:
        """The outputs with nothing in them."""
        lead, dims, types = self.check(self.bind(args))
        for name in self._compiled.of_data:
            dims[name] = torch.library.get_ctx().new_dynamic_size(max=ENTRIES)
        out = tuple(
            lead.new_empty([s(dims, 0) for s in sizes], dtype=FIXED.get(kind) or types[kind])
            for kind, sizes in self._compiled.made
        )
        return out if len(out) > 1 else out[0] if out else None

    def _check_lists(self, values: Values, dims: Dims) -> None:
        first = self.counted
        tensors, own = values[first.name], bool(first.dims) and first.dims != ("...",)
        if not tensors:
            kind = "group" if own else "tensor"
            raise fail(self.name, first.name, f"at least one {kind}", "none")
        for name in self._lists:
            if values[name] is not None and len(values[name]) != len(tensors):
                number = f"{len(tensors)} tensors" if own else f"{len(tensors)}"
                want = f"{number}, one for each of {first.name}"
                raise fail(self.name, name, want, len(values[name]))
        dims["G"] = len(tensors)

    # -------------------------------------------------------------------------------------- compile

    def _find_order(self) -> None:
        """The arguments in the order in which sizes become known."""
        tensors = [a for a in self.arguments if a.dims is not None]
        self._lists = [a.name for a in self.arguments if a.many]
        self.partners = [(a.name, a.partner) for a in self.arguments if a.partner]
        self.indices = [
            (a.name, a.type[6:-1]) for a in tensors if a.type.startswith("index(")
        ]  # index(F)
        leads = [a for a in tensors if a.type == "T"] or [a for a in tensors if a.type == "A"]
        self.lead = leads[0]
        self.counted = next(
            (a for a in tensors if a.many and a.type in ("T", "A", "T|A")), self.lead
        )
        setters = {d[:-1]: a.name for a in tensors for d in a.dims or () if d.endswith("=")}
        ready = [self.lead, *(a for a in self.arguments if a is not self.lead)]
        for a in list(ready):  # after the one that sets a size of it
            for size, setter in setters.items():
                if a.name != setter and size in (a.dims or ()):
                    ready.remove(a)
                    ready.insert(1 + [b.name for b in ready].index(setter), a)
        self.order = ready
        self.offsets = rows.find(self.arguments)

    @cached_property
    def _compiled(self) -> Compiled:
        """One function an argument; made at the first use, for an import uses none."""
        known: dict[str, str] = {"G": ""}  # sizes and who set them
        checks: list[tuple[str, Callable[..., None]]] = []
        of = self.offsets
        for a in self.order:
            if of is not None and a.name == of.name:
                continue
            run = self._checker(a, known)
            if run is not None:
                checks.append((a.name, run))
            if of is not None and a is self.lead:
                known[of.E] = known[of.N] = a.name
        sizes = {n for a in self.outputs for d in a.dims or () for n in _names(d)}
        made = [(a.type, [_size(d) for d in a.dims or ()]) for a in self.outputs]
        return Compiled(checks, sorted(sizes - known.keys()), made)

    def _checker(self, a: Argument, known: dict[str, str]) -> Callable[..., None] | None:
        if a.dims is None:
            if not a.many and is_number(a.type):
                known[a.name] = a.name
            return number_check(self.name, a.name, a.type)
        dims = tuple(d.removesuffix("=") for d in a.dims)
        shape = self._shape_check(a, dims, known)
        kind = self._type_check(a)
        op, name, written = self.name, a.name, a.written

        def one(t: Tensor, label: str, g: int, dims: Dims, types: Types, lead: Tensor) -> None:
            shape(t, label, g, dims)
            kind(t, label, types)
            if t.device != lead.device:
                raise fail(op, label, f"on {lead.device}", t.device)
            if written and not t.is_contiguous():
                got = f"strides {text(t.stride())}"
                raise fail(op, label, "contiguous, for it is written", got)

        def single(t: Tensor, values: Values, dims: Dims, types: Types, lead: Tensor) -> None:
            one(t, name, 0, dims, types, lead)

        def each(ts: Any, values: Values, dims: Dims, types: Types, lead: Tensor) -> None:
            for g, t in enumerate(ts):
                one(t, f"{name}[{g}]", g, dims, types, lead)
                types[name] = ts[0].dtype

        return each if a.many else single

    def _type_check(self, a: Argument) -> Callable[[Tensor, str, Types], None]:
        op = self.name
        if a.type.startswith("index("):

            def index(t: Tensor, label: str, types: Types) -> None:
                if t.dtype not in INDEX:
                    raise wrong_type(op, label, " or ".join(map(str, INDEX)), t)

            return index
        if a is self.lead:
            allowed = FLOATS if a.type == "T" else (torch.float32, torch.float64)
            words = "one of " + ", ".join(map(str, FLOATS)) if a.type == "T" else ""

            def first(t: Tensor, label: str, types: Types) -> None:
                if t.dtype not in allowed:
                    raise wrong_type(op, label, words or " or ".join(map(str, allowed)), t)
                if t.dtype != types["T"]:
                    raise wrong_type(op, label, str(types["T"]), t)

            return first
        wanted = a.type.split("|")

        def like(t: Tensor, label: str, types: Types) -> None:
            for kind in wanted:
                if t.dtype == (FIXED.get(kind) or types[kind]):
                    return
            raise wrong_type(op, label, str(FIXED.get(wanted[0]) or types[wanted[0]]), t)

        return like

    def _shape_check(
        self, a: Argument, dims: tuple[str, ...], known: dict[str, str]
    ) -> Callable[[Tensor, str, int, Dims], None]:
        """Compare with the sizes that are known and set the others."""
        op, rank = self.name, len(dims)
        if dims == ("...",):

            def any_shape(t: Tensor, label: str, g: int, sizes: Dims) -> None:
                if t.shape != sizes.setdefault("...", t.shape):
                    raise fail(op, label, f"of shape {text(sizes['...'])}", text(t.shape))

            return any_shape
        names = [_names(d) for d in dims]
        new = [i for i, used in enumerate(names) if not used <= known.keys()]
        owners = [known.get(n, "") for used in names for n in used if n in known]
        want = self._expected(a, dims, new, owners)
        for i in new:
            (name,) = names[i]
            if not a.optional:
                known[name] = a.name
        if not new:
            expected = _shape(dims)

            def compare(t: Tensor, label: str, g: int, sizes: Dims) -> None:
                if t.shape != expected(sizes, g):
                    raise fail(op, label, want(sizes, g), text(t.shape))

            return compare
        setters = [(i, _key(dims[i]), int(dims[i].endswith("+1"))) for i in new]
        others = [(i, _size(d)) for i, d in enumerate(dims) if i not in new]
        matrix = rank == 2 and not others

        def fill(t: Tensor, label: str, g: int, sizes: Dims) -> None:
            shape = t.shape
            if len(shape) != rank:
                if matrix:
                    raise fail(op, label, "a matrix", f"shape {text(shape)}")
                raise fail(op, label, want(sizes, g), text(shape))
            for i, size in others:
                if shape[i] != size(sizes, g):
                    raise fail(op, label, want(sizes, g), text(shape))
            for i, key, more in setters:
                own = key(g)
                if sizes.setdefault(own, shape[i] - more) != shape[i] - more:
                    raise fail(op, label, want(sizes, g), text(shape))

        return fill

    def _expected(
        self, a: Argument, dims: tuple[str, ...], new: list[int], owners: list[str]
    ) -> Callable[[Dims, int], str]:
        """The words for a shape, in an error."""
        sizes = [_size(d) for d in dims]
        of = "of shape"
        if a.type.startswith("index("):
            of = (
                f"of the shape of {owners[-1]}"
                if not new
                else f"of the shape of the rows of {owners[0]}"
            )

        def words(known: Dims, g: int) -> str:
            return f"{of} [" + ", ".join(_or_star(s, known, g) for s in sizes) + "]"

        return words


def _default(a: Argument) -> Any:
    if a.type == "bool":
        return a.default == "True"
    return float(a.default or 0) if ".." in a.type else a.default


def _names(dim: str) -> set[str]:
    """The sizes that are named in a dimension."""
    return set(re.findall(r"[A-Za-z_]\w*", dim))


def _or_star(size: Size, known: Dims, g: int) -> str:
    try:
        return str(size(known, g))
    except KeyError:
        return "*"


def _scalar(kind: str) -> str:
    """The schema's name of a type that is not a tensor's."""
    if ".." in kind:
        return "float" if "inf" in kind else "int"
    return "str" if "|" in kind else kind


def _key(dim: str) -> Callable[[int], Any]:
    name = dim.removesuffix("+1")
    return (lambda g: (name, g)) if name.endswith("_g") else (lambda g: name)


def _size(dim: str) -> Size:
    """A function that gives the size that `dim` says, of the known ones."""
    dim = dim.removesuffix("=")
    for sign, apply in (("+", operator.add), ("-", operator.sub), ("*", operator.mul)):
        if sign in dim:
            left, right = map(_size, dim.split(sign))
            return lambda dims, g: apply(left(dims, g), right(dims, g))
    if dim.isdigit():
        return lambda dims, g: int(dim)
    if dim.endswith("_g"):
        return lambda dims, g: dims[dim, g]
    return lambda dims, g: dims[dim]


def _shape(dims: tuple[str, ...]) -> Callable[[Dims, int], Any]:
    """The shape of all dims at once, quickly where they are names."""
    if len(dims) > 1 and all(d.isidentifier() and not d.endswith("_g") for d in dims):
        get = operator.itemgetter(*dims)
        return lambda sizes, g: get(sizes)
    each = [_size(d) for d in dims]
    return lambda sizes, g: tuple([size(sizes, g) for size in each])
