# SPDX-License-Identifier: Apache-2.0
"""The folder of a dashboard: a page, a style, scripts, and data that scripts load on demand.

Data are scripts too, `ksae.put(name, value)`: a page opened from a disk may load no other files.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from functools import partial
from importlib import resources
from pathlib import Path
from typing import IO, Any

from ksae.errors import UserError
from ksae.files.atomic import write_atomic

PAGE = "index.html"
ASSETS = ("style.css", "data.js", "widgets.js", "table.js", "latent.js", "main.js")


def check(out: Path) -> None:
    """Make `out`, and see that it holds nothing but perhaps an earlier dashboard.

    Raises:
        UserError: it is a file, cannot be written, or holds anything else.
    """
    try:
        if out.exists() and not out.is_dir():
            raise UserError(f"dashboard: out must be a folder, got the file {out}")
        out.mkdir(parents=True, exist_ok=True)
        others = {path.name for path in out.iterdir()} - {PAGE, *ASSETS, "data"}
        if others:
            raise UserError(
                f"dashboard: out must be a new folder or a dashboard, got {out} with "
                f"{min(others)} in it"
            )
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise UserError(f"dashboard: cannot use {out} as out: {error.strerror}") from None


def clear(out: Path) -> None:
    """Take an earlier dashboard's page and data away: no page is there until all of it is."""
    try:
        (out / PAGE).unlink(missing_ok=True)
        if (out / "data").exists():
            shutil.rmtree(out / "data")
    except OSError as error:
        raise UserError(f"dashboard: cannot use {out} as out: {error.strerror}") from None


def write(out: Path, name: str, value: Any) -> int:
    """One piece of data; returns its bytes."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    text = f"ksae.put({json.dumps(name)},{text.replace('<', chr(92) + 'u003c')});\n"
    data = text.encode("utf-8", "replace")
    path = out / "data" / f"{name}.js"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    except OSError as error:
        raise UserError(f"dashboard: cannot write {path}: {error.strerror}") from None
    return len(data)


def read(out: Path, name: str) -> Any:
    """What `write` wrote.

    Raises:
        UserError: there is no such piece, or it is not one.
    """
    path = out / "data" / f"{name}.js"
    start, end = f"ksae.put({json.dumps(name)},", ");\n"
    try:
        text = path.read_text(encoding="utf-8")
        if not (text.startswith(start) and text.endswith(end)):
            raise ValueError
        return json.loads(text[len(start) : -len(end)])
    except OSError as error:
        raise UserError(f"{out}: must be a dashboard, but {path}: {error.strerror}") from None
    except ValueError:
        raise UserError(f"{out}: must be a dashboard, but {path} is not as it was") from None


def finish(out: Path) -> int:
    """The page and its parts, which make the folder a dashboard; returns their bytes."""
    size = 0
    for name in (*ASSETS, PAGE):
        data = resources.files(__package__).joinpath("assets", name).read_bytes()
        write_atomic(out / name, partial(_put, data))
        size += len(data)
    return size


def _put(data: bytes, file: IO[bytes]) -> None:
    file.write(data)
