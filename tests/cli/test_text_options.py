# SPDX-License-Identifier: Apache-2.0
"""Commands that read text take the same options for it, and hand all of them on."""

from __future__ import annotations

from typing import Any

import pytest
import typer

from ksae.cli.app import app
from ksae.errors import UserError

GIVEN = {
    "model": "lm", "hook": "layers.0.resid_post", "text": "a.txt", "field": "t",
    "separator": "--", "exclude": "1", "model_revision": "r", "model_dtype": "float32",
    "context": 16,
}  # fmt: skip


class Seen(Exception):
    """What a command hands on."""


@pytest.mark.parametrize("name", ["eval", "dashboard"])
def test_every_option_of_the_text_arrives(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def see(data: Any, given: dict[str, Any]) -> None:
        raise Seen({key: value for key, value in given.items() if value is not None})

    monkeypatch.setattr("ksae.runs.evaluation.with_data", see)
    monkeypatch.setattr("ksae.runs.dashboard.with_data", see)
    monkeypatch.setattr("ksae.cli.eval._load", lambda files, device: [])
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    words = [w for key, value in GIVEN.items() for w in ("--" + key.replace("_", "-"), str(value))]
    arguments = ["m.safetensors", *words, *(["--out", "o"] if name == "dashboard" else [])]
    with pytest.raises(Seen) as seen:
        try:
            command.main(arguments, standalone_mode=False)
        except UserError as error:
            pytest.fail(str(error))
    assert seen.value.args[0] == GIVEN
