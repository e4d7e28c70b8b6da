# SPDX-License-Identifier: Apache-2.0
"""Loading from and saving to the Hugging Face Hub, where `huggingface_hub` is installed."""

from __future__ import annotations

import os
import re
import tempfile
from pathlib import Path, PurePosixPath
from typing import Any

from ksae.coders import coder as modules
from ksae.coders import file as model_file
from ksae.errors import UserError, first_line

from .formats.files import WEIGHTS

# Names of files by the formats that are no folders.
_SINGLE = {"openai": "autoencoder.pt", "nvidia": "checkpoint.pt", "gemma-scope": "params.npz"}
_PART = r"[A-Za-z0-9][A-Za-z0-9._-]*"
_ID = re.compile(rf"(hf://)?{_PART}/{_PART}(/.*)?")
_KINDS = (*WEIGHTS, ".json", ".yaml")


def is_id(path: str | os.PathLike[str]) -> bool:
    """Whether `path` reads as `owner/name[/folder]` (or `hf://...`) and is no local path.

    A name that ends as a weights file does, such as runs/x.safetensors, is a local path, and so is
    one of which the first folder is here.
    """
    if not isinstance(path, str) or not _ID.fullmatch(path):
        return False
    if path.startswith("hf://"):
        return True
    first = Path(path.split("/")[0])
    return not first.exists() and not (path.count("/") == 1 and path.endswith(_KINDS))


def local(path: str | os.PathLike[str], revision: str | None = None) -> Path:
    """A path as it is; a name on the Hub once it is fetched -> its place on this machine.

    Raises:
        UserError: as `download`; a revision of a local path, or a path that is not there and whose
            first folder is.
    """
    if is_id(path):
        return download(path, revision)
    place = Path(path)
    if not place.exists() and isinstance(path, str) and _ID.fullmatch(path):
        raise UserError(f"load: no such file: {path} (on the Hub it would be hf://{path})")
    if revision is not None:
        raise UserError(f"load: revision must be None for the local path {path}, got {revision!r}")
    return place


def split(name: str) -> tuple[str, str]:
    """`owner/name/folder/file` -> (owner/name, folder/file).

    Raises:
        UserError: a part that would leave the repository's folder.
    """
    name = name.removeprefix("hf://")
    parts = name.split("/")
    _check_inside(name)
    return "/".join(parts[:2]), "/".join(parts[2:])


def download(name: str | os.PathLike[str], revision: str | None = None) -> Path:
    """Fetch the weights and configurations of `owner/name[/folder or file]` -> local path.

    Raises:
        UserError: huggingface_hub is missing, the repository or folder is, or a file name in it
            would be written outside of its folder.
    """
    repo, inner = split(str(name))
    here = "" if str(name).startswith("hf://") else f"no file or folder {name} is here, and "
    hub = _hub(here)
    try:
        files = hub.HfApi().list_repo_files(repo, revision=revision)
    except Exception as error:  # its errors are of many classes, of several libraries
        raise UserError(f"load: {here}cannot list {repo} on the Hub: {first_line(error)}") from None
    for file in files:
        _check_inside(file)
    folder = inner if inner not in files else str(PurePosixPath(inner).parent)
    folder = "" if folder == "." else folder
    wanted = [f for f in files if f.endswith(_KINDS) and _parent(f) == folder]
    if inner in files:
        wanted = [f for f in wanted if f == inner or f.endswith((".json", ".yaml"))]
    if not any(f.endswith(WEIGHTS) for f in wanted):
        raise UserError(f"load: {repo} has no weights file in {folder or 'its top folder'}")
    local = {}
    for file in wanted:
        try:
            local[file] = Path(hub.hf_hub_download(repo, file, revision=revision))
        except Exception as error:
            raise UserError(f"load: cannot fetch {file} of {repo}: {first_line(error)}") from None
    if inner in files:
        return local[inner]
    return next(iter(local.values())).parent


def save(
    model: modules.SparseCoder,
    repo: str,
    *,
    to: str = "ksae",
    folder: str = "",
    private: bool = False,
    message: str | None = None,
) -> str:
    """Write `model` in the format `to` and upload it to `repo`, created if missing.

    Args:
        repo: `owner/name`.
        to: a format of `ksae.interop.convert`.
        folder: where in the repository.

    Returns:
        What `ksae.load` takes to read it back.

    Raises:
        UserError: huggingface_hub is missing, the Hub refuses, or the format cannot hold the model.
    """
    from . import convert

    if not re.fullmatch(rf"{_PART}/{_PART}", repo):
        raise UserError(f"save: repo must be owner/name, got {repo!r}")
    if folder:
        _check_inside(folder)
    hub = _hub()
    with tempfile.TemporaryDirectory() as scratch:
        own = Path(scratch) / "own" / "model.safetensors"
        model_file.save(model, own)
        out = Path(scratch) / "out"
        if to == "ksae":
            out = own.parent
        else:
            out.mkdir()
            convert.convert(own, out / _SINGLE[to] if to in _SINGLE else out, to)
        try:
            api = hub.HfApi()
            api.create_repo(repo, private=private, exist_ok=True)
            api.upload_folder(
                repo_id=repo,
                folder_path=str(out),
                path_in_repo=folder or None,
                commit_message=message or f"Add a sparse coder in the format {to}",
            )
        except Exception as error:
            raise UserError(f"save: cannot upload to {repo}: {first_line(error)}") from None
    return f"{repo}/{folder}" if folder else repo


def _parent(name: str) -> str:
    parent = str(PurePosixPath(name).parent)
    return "" if parent == "." else parent


def _check_inside(name: str) -> None:
    parts = name.split("/")
    if (
        name.startswith("/")
        or "\\" in name
        or "\0" in name
        or any(p in ("", ".", "..") for p in parts)
    ):
        raise UserError(f"hub: a file name must stay inside its repository, got {name!r}")


def _hub(before: str = "") -> Any:
    try:
        import huggingface_hub
    except ImportError:
        raise UserError(
            f"hub: {before}the Hugging Face Hub needs huggingface_hub: pip install huggingface_hub"
        ) from None
    return huggingface_hub
