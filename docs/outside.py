# SPDX-License-Identifier: Apache-2.0
"""Puts into the site what stands outside docs/: the changelog, how to contribute, the results.

Links to them then resolve under one path in the tree and on the site.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = ("CHANGELOG.md", "CONTRIBUTING.md", "bench/README.md", "bench/results/**/*.*")


def on_files(files: Files, config: Any) -> Files:
    """Add them under their path from the root."""
    for pattern in OUTSIDE:
        for path in sorted(ROOT.glob(pattern)):
            uri = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, uri, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """A link that leaves docs/ for the root means a file that was put beside it."""
    depth = page.file.src_uri.count("/")
    return markdown.replace("](" + "../" * (depth + 1), "](" + "../" * depth)
