# SPDX-License-Identifier: Apache-2.0
"""The environment variables are documented as they are, and read in one file."""

from __future__ import annotations

import re
from pathlib import Path

from ksae import env

ROOT = Path(__file__).parents[2]


def test_the_table_names_every_variable_with_its_default_and_meaning() -> None:
    table = (ROOT / "docs" / "environment.md").read_text()
    for name, variable in env.VARIABLES.items():
        default = f"`{variable.default}`" if variable.default else "none"
        reader = "users" if variable.for_users else "tests and benchmarks"
        assert f"| `{name}` | {default} | {variable.meaning} | {reader} |" in table
    assert set(re.findall(r"`(KSAE_\w+)` \|", table)) == set(env.VARIABLES)


def test_at_most_three_are_for_users() -> None:
    assert sum(variable.for_users for variable in env.VARIABLES.values()) <= 3


def test_no_other_file_of_the_package_reads_one() -> None:
    pattern = re.compile(r"environ[^\n]*KSAE_|getenv\([^)]*KSAE_")
    for path in sorted((ROOT / "python" / "ksae").rglob("*.py")):
        if path.name != "env.py" and not {"kernels", "bench"} & set(path.parts):
            assert not pattern.search(path.read_text()), path
