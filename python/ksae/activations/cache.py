# SPDX-License-Identifier: Apache-2.0
"""The on-disk cache of harvested activations.

A folder with `meta.json` and shards `shard_00000.safetensors`, ... Each shard holds whole contexts:
x [rows, d_in], y [rows, d_out] for a transcoder, g with gradients (of the shape of y, or else of
x; see gradients.py), and the origin of each row (tokens, contexts,
positions, int32). A file is written under a temporary name, synced and renamed, the shard before
the meta.json that counts it, so whatever meta.json names is complete. A writer killed at any point
goes on after its last shard. For each shard meta.json has the size and the CRC-32 of the file,
which is compared before the first read of its rows; caches of earlier versions have no CRC-32, and
their content is not checked.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ksae.activations.files import open_tensors
from ksae.activations.sources import BUFFER_TOKENS, ArraySource, RowOrigin
from ksae.errors import UserError, first_line
from ksae.files import checksum, lock
from ksae.version import VERSION

FORMAT = "ksae-activations"
FORMAT_VERSION = 1
META = "meta.json"
SHARD_TOKENS = 65_536  # rows: 150 MB at d=576 in float32


def _write_file(path: Path, data: bytes) -> None:
    """Write atomically: afterwards `path` is the old file or the whole new one."""
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"{path}: no space left to write {len(data) / 2**20:.1f} MiB; free some or choose "
                "another folder, then run the same command to go on"
            ) from None
        raise UserError(f"{path}: cannot write: {first_line(error)}") from None


def _read_meta(folder: Path) -> dict[str, Any]:
    path = folder / META
    if not path.is_file():
        raise UserError(f"{folder}: is not an activation cache of ksae (it has no {META})")
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
        if meta["format"] != FORMAT:
            raise KeyError
        newer = meta["format_version"] > FORMAT_VERSION
        for shard in meta["shards"]:
            _ = shard["file"], shard["rows"], shard["bytes"], shard["contexts_done"]
        _ = meta["complete"], meta["identity"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path}: is not the description of a ksae activation cache") from None
    if newer:
        raise UserError(f"{path}: was written by a newer ksae ({meta.get('ksae')}); update ksae")
    result: dict[str, Any] = meta
    return result


def _check_shards(folder: Path, meta: dict[str, Any]) -> None:
    for shard in meta["shards"]:
        path = folder / shard["file"]
        size = path.stat().st_size if path.is_file() else None
        if size != shard["bytes"]:
            what = "is missing" if size is None else f"has {size} bytes instead of {shard['bytes']}"
            raise UserError(f"{path}: {what}; delete the folder {folder} and harvest again")


class _Contents:
    """Compares each shard with its checksum, once, when it is first asked for."""

    def __init__(self, folder: Path, meta: dict[str, Any]) -> None:
        self._folder, self._shards = folder, meta["shards"]
        self._waiting = {n for n, shard in enumerate(self._shards) if "crc32" in shard}

    def __call__(self, number: int) -> None:
        if number not in self._waiting:
            return
        shard = self._shards[number]
        path = self._folder / shard["file"]
        try:
            found = checksum.of_file(path)
        except OSError as error:
            raise UserError(f"{path}: cannot read: {first_line(error)}") from None
        if found != shard["crc32"]:
            raise UserError(
                f"{path}: is damaged, its content is not what was written; delete the folder "
                f"{self._folder} and harvest again"
            )
        self._waiting.discard(number)


class CacheWriter:
    """Writes a cache folder, or goes on with an unfinished one of the same identity.

    Args:
        folder: created if needed; a folder with anything else in it is refused.
        identity: what the activations are: model, hook, dataset fingerprint, dtype and so on, as
            JSON values. A cache of another identity is refused.
        shard_tokens: rows at which a shard is closed.
    """

    def __init__(
        self, folder: str | Path, identity: dict[str, Any], shard_tokens: int = SHARD_TOKENS
    ) -> None:
        self.folder = Path(folder)
        self.shard_tokens = shard_tokens
        self._pending: list[dict[str, Tensor]] = []
        self._pending_rows = 0
        self._pending_contexts = 0
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            names = {path.name for path in self.folder.iterdir()} - {lock.NAME}
            present = [name for name in names if not name.startswith(".tmp-")]
        except OSError as error:
            raise UserError(f"{folder}: cannot use this folder: {first_line(error)}") from None
        if not present:
            self.meta: dict[str, Any] = {
                "format": FORMAT,
                "format_version": FORMAT_VERSION,
                "ksae": VERSION,
                "identity": identity,
                "complete": False,
                "shards": [],
            }
        else:
            self.meta = _read_meta(self.folder)
            for key in sorted(identity.keys() | self.meta["identity"].keys()):
                old, new = self.meta["identity"].get(key), identity.get(key)
                if old != new:
                    raise UserError(
                        f"{folder}: holds activations with {key} {old}, not {new}; "
                        "choose another folder or delete this one"
                    )
            _check_shards(self.folder, self.meta)
        for leftover in self.folder.glob(".tmp-*"):
            leftover.unlink(missing_ok=True)
        if not present:
            self._write_meta()

    @property
    def complete(self) -> bool:
        return bool(self.meta["complete"])

    @property
    def contexts_done(self) -> int:
        """Contexts already on disk: the number at which to go on."""
        shards = self.meta["shards"]
        return int(shards[-1]["contexts_done"]) if shards else 0

    def append(self, rows: dict[str, Tensor], contexts_done: int) -> None:
        """Add the rows of some contexts: x, tokens, contexts, positions, optionally y and g.
        `contexts_done` counts all contexts appended so far."""
        self._pending.append(rows)
        self._pending_rows += len(rows["x"])
        self._pending_contexts = contexts_done
        if self._pending_rows >= self.shard_tokens:
            self._flush()

    def finish(self) -> None:
        """Write what is left and mark the cache complete."""
        if self._pending_rows:
            self._flush()
        self.meta["complete"] = True
        self._write_meta()

    def _flush(self) -> None:
        joined = {
            name: torch.cat([rows[name] for rows in self._pending]).contiguous()
            for name in self._pending[0]
        }
        name = f"shard_{len(self.meta['shards']):05d}.safetensors"
        data = save(joined)
        _write_file(self.folder / name, data)
        self.meta["shards"].append(
            {
                "file": name,
                "rows": self._pending_rows,
                "bytes": len(data),
                "crc32": zlib.crc32(data),
                "contexts_done": self._pending_contexts,
            }
        )
        self._pending, self._pending_rows = [], 0
        self._write_meta()

    def _write_meta(self) -> None:
        _write_file(self.folder / META, json.dumps(self.meta, indent=1).encode())


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Keep other processes from writing to a cache folder; a finished one is only read."""
    if (folder / META).is_file() and _read_meta(folder)["complete"]:
        yield
        return
    with lock.locked(folder, "harvest"):
        yield


class CacheSource(ArraySource):
    """The rows of a finished cache folder, memory-mapped. `meta` is its meta.json."""

    meta: dict[str, Any]


def open_cache(folder: str | Path, *, buffer_tokens: int = BUFFER_TOKENS) -> CacheSource:
    """Open a finished cache folder; nothing is read but the headers. A shard is compared with its
    checksum when rows of it are first read."""
    folder = Path(folder)
    meta = _read_meta(folder)
    if not meta["complete"]:
        done = sum(shard["rows"] for shard in meta["shards"])
        raise UserError(
            f"{folder}: is unfinished ({done} rows); run the harvest again with the same arguments "
            "to complete it"
        )
    _check_shards(folder, meta)
    shards = [open_tensors(folder / shard["file"]) for shard in meta["shards"]]
    for shard, tensors in zip(meta["shards"], shards, strict=True):
        wanted = {"x", "tokens", "contexts", "positions"}
        if not wanted <= tensors.keys() or any(len(t) != shard["rows"] for t in tensors.values()):
            raise UserError(f"{folder / shard['file']}: does not match {META}; harvest again")
    source = CacheSource(
        [tensors["x"] for tensors in shards],
        [tensors["y"] for tensors in shards] if shards and "y" in shards[0] else None,
        [tensors["g"] for tensors in shards] if shards and "g" in shards[0] else None,
        name=str(folder),
        mapped=True,
        buffer_tokens=buffer_tokens,
        origin=RowOrigin(
            [tensors["tokens"] for tensors in shards],
            [tensors["contexts"] for tensors in shards],
            [tensors["positions"] for tensors in shards],
        ),
        verify=_Contents(folder, meta),
        identity=meta["identity"],
    )
    source.meta = meta
    return source
