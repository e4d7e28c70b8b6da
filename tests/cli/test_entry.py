# SPDX-License-Identifier: Apache-2.0
"""The console script: it answers at once, says its version, and refuses what would be lost."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import ksae
from ksae import cli
from ksae.cli import app
from ksae.errors import RankError

ENVIRONMENT = {**os.environ, "PYTHONPATH": str(Path(ksae.__file__).parents[1])}


def python(code: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["train", "--help"], ["train"]])
def test_help_and_version_import_no_torch(arguments: list[str]):
    said = python(
        f"import sys, ksae_cli; sys.argv = ['ksae', *{arguments}]\n"
        "try: ksae_cli.main()\n"
        "except SystemExit: print('torch' in sys.modules)"
    )
    assert said.splitlines()[-1] == "False"


def test_version_is_printed(capfd):
    assert cli.run(["--version"]) == 0
    assert capfd.readouterr().out == f"ksae {ksae.__version__}\n"


def test_import_ksae_registers_the_ops():
    assert "topk_encode" in python("import ksae, torch; print(torch.ops.ksae.topk_encode)")


def test_an_import_writes_no_code_of_ops():
    """Which was half of what `import ksae` added to the time of `import torch`."""
    code = (
        "import ksae; from ksae.ops import straight, specs; written = []; write = straight._write;"
    )
    code += " straight._write = lambda *a: written.append(a[1].name) or write(*a);"
    code += " before = len(written), sum('_compiled' in vars(s) for s in specs.SPECS);"
    code += " import torch; ksae.topk(torch.ones(1, 2), 1); ksae.topk(torch.ones(1, 2), 1);"
    code += " print(*before, *written)"
    assert python(code).split() == ["0", "0", "topk"]


def test_names_of_the_package_are_there_in_the_console_script():
    assert "True" in python("import ksae_cli, ksae; print(ksae.TopKSAE is ksae.api.TopKSAE)")


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--k", "3", "--lr", "1", "--k", "4"],
        ["train", "--fused", "--no-fused"],
        ["eval", "x", "--tokens", "3", "--tokens=4"],
        ["demo", "--k", "3", "--k", "4"],
    ],
)
def test_option_given_twice_is_an_error_that_names_it(capfd, arguments: list[str]):
    assert cli.run(arguments) == 2
    option = next(a for a in arguments if a.startswith("--") and a != "--lr")
    assert f"Option {option} is given twice" in capfd.readouterr().err


def test_bare_train_prints_a_line_of_usage(capfd):
    assert cli.run(["train"]) == 2
    out, error = capfd.readouterr()
    assert out == "" and error.count("\n") == 1 and error.startswith("usage: ksae train")


def test_bare_ksae_prints_its_help(capfd):
    assert cli.run([]) == 0
    out, error = capfd.readouterr()
    assert "Usage: ksae" in out and error == ""


@pytest.mark.parametrize("after", [False, True], ids=["while it unwinds", "while it is said"])
def test_an_error_that_sigterm_meets_is_still_said_once(capfd, monkeypatch, after: bool):
    """torchrun stops the ranks that are left as they fail."""

    def stop() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    def fail(**_: object) -> None:
        try:
            raise RankError("rank 0 of 2: the exchange of keys")
        finally:
            if not after:
                stop()

    say = app._say
    monkeypatch.setattr(app, "app", fail)
    monkeypatch.setattr(app, "_say", lambda line: (say(line), stop() if after else None))
    before = signal.getsignal(signal.SIGTERM)
    assert cli.run([]) == 1
    assert capfd.readouterr().err == "ksae: error: rank 0 of 2: the exchange of keys\n"
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_without_an_error_ends_with_143(capfd, monkeypatch):
    monkeypatch.setattr(app, "app", lambda **_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(SystemExit) as end:
        cli.run([])
    assert end.value.code == 143 and capfd.readouterr().err == ""
