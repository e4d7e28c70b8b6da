# SPDX-License-Identifier: Apache-2.0
"""Conversion between the files of ksae and of other libraries, without loss.

Tensors are transposed at most, never rounded, unless `fold` allows it. What the output depends on
and a target cannot hold is an error. Everything else (training settings, counters, metadata) for
which the target has no place is written beside its files and found again when converting back.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from ksae.coders import coder as modules
from ksae.coders.file import load_own
from ksae.errors import UserError
from ksae.parallel import checkpoint

from .formats import FORMATS, Coder, own
from .formats.files import Source, read_extra, sources, write_extra


class Conversion(NamedTuple):
    """What `convert` did."""

    source: str  # name of the format
    target: str
    path: Path  # the weights file
    coder: Coder


def recognize(path: str | os.PathLike[str]) -> tuple[str, Source]:
    """Name of the format and the weights at `path`, a file or a folder with one model's files.

    Raises:
        UserError: nothing there is a known format, or several files are.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"load: no such file: {path}")
    found = []
    for source in sources(path):
        name = next((name for name, form in FORMATS.items() if form.matches(source)), None)
        if name is not None:
            found.append((name, source))
    if not found:
        raise UserError(
            f"load: {path} must be of one of the formats {', '.join(FORMATS)} (a weights file, "
            "with its config beside it, or their folder), got none of them"
        )
    if len(found) > 1:
        names = ", ".join(source.path.name for _, source in found)
        raise UserError(f"load: {path} holds several models: name one of {names}")
    return found[0]


def is_foreign(path: Path) -> bool:
    """Whether the file or folder is of another library's format."""
    try:
        name, _ = recognize(path)
    except UserError:
        # A broken file: ksae's own reader says what is wrong with a safetensors file.
        return path.is_dir() or _is_zip(path)
    return name != "ksae"


def _is_zip(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(2) in (b"PK", b"\x80\x02")


def read(
    path: str | os.PathLike[str], *, k: int | None = None, as_topk: bool = False
) -> tuple[str, Coder]:
    """Name of the format and description of the model at `path`.

    Args:
        k: for a file that lacks it (OpenAI's FastAutoencoder); must agree with one that has it.
        as_topk: take BatchTopK or Matryoshka, which select by a threshold, as the k largest of each
            token; forgets the threshold.
    """
    name, source = recognize(path)
    coder: Coder = FORMATS[name].read(source)
    extra = read_extra(source.path)
    fields = extra.pop("fields", {})
    coder.extra = {**extra, **coder.extra}
    if not coder.b_dec.any():
        coder.centred = fields.get("centred", coder.centred)
    if coder.k is None and coder.activation == "topk":
        coder.k = k if k is not None else fields.get("k")
        if coder.k is not None and not 1 <= coder.k <= coder.d_sae:
            raise UserError(f"load: k must be in [1, {coder.d_sae}], got {coder.k}")
    elif k is not None and k != coder.k:
        raise UserError(f"load: k must be {coder.k}, as in {source.path}, got {k}")
    if as_topk and coder.activation in ("batchtopk", "matryoshka"):
        coder = replace(coder, activation="topk", threshold=None, group_sizes=None)
    return name, coder


def write(coder: Coder, path: str | os.PathLike[str], to: str, *, fold: bool = False) -> Path:
    """Write `coder` in the format `to`; returns the weights file."""
    if to not in FORMATS:
        raise UserError(f"convert: --to must be one of {', '.join(FORMATS)}, got {to!r}")
    path, form = Path(path), FORMATS[to]
    if form.FOLDER and path.exists() and not path.is_dir():
        raise UserError(f"convert: {path} must be a folder for {to}, got a file")
    if not form.FOLDER and path.is_dir():
        raise UserError(f"convert: {path} must be a file for {to}, got a folder")
    coder = replace(coder, extra={name: dict(rest) for name, rest in coder.extra.items()})
    file: Path = form.write(coder, path, fold)
    native = {"ksae": "ksae", "dictionary-learning": "dictionary_learning"}.get(to, to)
    write_extra(file, {name: rest for name, rest in coder.extra.items() if name != native and rest})
    return file


def convert(
    src: str | os.PathLike[str],
    dst: str | os.PathLike[str],
    to: str,
    *,
    k: int | None = None,
    fold: bool = False,
    as_topk: bool = False,
) -> Conversion:
    """Read `src` in whatever format it is and write it to `dst` in the format `to`.

    Args:
        src: a file or a folder; of a checkpoint of many ranks, all of them.
        dst: a folder for sparsify, saelens, dictionary-learning and circuit-tracer; else a file.
        to: a name in `formats.FORMATS`.
        fold: allow folding b_dec or decoder norms into the encoder where the target needs it.
        k, as_topk: as `read`.

    Raises:
        UserError: the source is of no known format, damaged, or of a kind the target cannot hold.
    """
    if to not in FORMATS:
        raise UserError(f"convert: --to must be one of {', '.join(FORMATS)}, got {to!r}")
    with tempfile.TemporaryDirectory() as folder:
        if checkpoint.is_sharded(src):  # gathered into one file first
            gathered = Path(folder) / "model.safetensors"
            checkpoint.load_whole(src).save(gathered)
            src = gathered
        name, coder = read(src, k=k, as_topk=as_topk)
    return Conversion(name, to, write(coder, dst, to, fold=fold), coder)


def load(
    path: str | os.PathLike[str],
    device: torch.device | str | None = None,
    dtype: torch.dtype | None = None,
    *,
    k: int | None = None,
    fold: bool = False,
    as_topk: bool = False,
) -> modules.SparseCoder:
    """A ksae module from a file or folder of any known format; arguments as `read`, `convert`."""
    name, coder = read(path, k=k, as_topk=as_topk)
    if name == "ksae":
        return load_own(path, device, dtype)
    return own.build(coder, fold).to(device=device, dtype=dtype)
