# SPDX-License-Identifier: Apache-2.0
"""A run goes on with the checkpoints and activations it had, or says what is not as it was, and
shares its folder with no other process."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from ksae.analysis import plots
from ksae.errors import UserError
from ksae.files import container, lock
from ksae.runs import checkpoint
from ksae.runs.config import DataConfig, LogConfig, RunConfig, TrainConfig
from ksae.runs.model_config import ModelConfig
from ksae.runs.start import train

d, N = 8, 600


def config(folder: Path, out: str, **data: object) -> RunConfig:
    return RunConfig(
        out=str(folder / out),
        model=ModelConfig(d_sae=32, k=3, kind="transcoder" if "targets" in data else "sae"),
        data=DataConfig(activations=str(folder / "x.npy"), holdout=0.1, **data),
        train=TrainConfig(
            batch_size=64,
            steps=12,
            warmup=2,
            checkpoint_every=5,
            keep_last=9,
            threads=1,
            prefetch=0,
        ),
        log=LogConfig(every=1, progress=False),
    )


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Activations, targets, and a run `a` of 12 steps that looks as if it was killed after 10."""
    monkeypatch.setattr(plots, "available", lambda: False)  # pictures take most of a second
    rng = np.random.default_rng(0)
    np.save(tmp_path / "x.npy", rng.standard_normal((N, d), dtype=np.float32))
    np.save(tmp_path / "y.npy", rng.standard_normal((N, d - 1), dtype=np.float32))
    train(config(tmp_path, "straight"))
    shutil.copytree(tmp_path / "straight", tmp_path / "a")
    newest(tmp_path / "a").unlink()
    return tmp_path


def newest(out: Path) -> Path:
    return max((out / "checkpoints").iterdir())


def assert_same_run(folder: Path) -> None:
    a, b = newest(folder / "straight"), newest(folder / "a")
    assert a.name == b.name == "step_00000012.safetensors"
    one, other = container.read_header(a), container.read_header(b)
    for header in (one, other):
        header["extra"].pop("identity")
    assert one == other and one["checksums"]  # of every tensor


def zeros(path: Path, count: int = 1000) -> None:
    middle = path.stat().st_size // 2
    with path.open("r+b") as file:
        file.seek(middle)
        assert any(file.read(count))
        file.seek(middle)
        file.write(bytes(count))


def test_a_damaged_newest_checkpoint_is_passed_over(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert newest(folder / "a").name == "step_00000010.safetensors"
    zeros(newest(folder / "a"))
    with caplog.at_level(logging.WARNING, "ksae"):
        assert train(config(folder, "a"), resume=True).steps == 12
    assert "step_00000010.safetensors is damaged" in caplog.text
    assert caplog.text.count("trying the checkpoint before it") == 1
    assert_same_run(folder)


def test_a_run_with_damaged_checkpoints_only_does_not_start_over_in_silence(folder: Path) -> None:
    for path in (folder / "a" / "checkpoints").iterdir():
        zeros(path)
    lines = (folder / "a" / "metrics.jsonl").read_text()
    with pytest.raises(UserError, match="must have a usable checkpoint to resume from, got none"):
        train(config(folder, "a"), resume=True)
    assert (folder / "a" / "metrics.jsonl").read_text() == lines


def test_a_run_does_not_resume_on_other_activations(folder: Path) -> None:
    x = np.load(folder / "x.npy")
    changed = x.copy()
    changed[100:130] = changed[200:230]  # of the same sizes, dtype and mean
    np.save(folder / "x.npy", changed)
    before = sorted(path.name for path in (folder / "a").rglob("*"))
    with pytest.raises(UserError, match=r"the activations must be those of .*step_00000010") as e:
        train(config(folder, "a"), resume=True)
    assert "\n" not in str(e.value) and "the file was replaced" in str(e.value)
    assert sorted(path.name for path in (folder / "a").rglob("*")) == before
    np.save(folder / "x.npy", x[:-10])
    with pytest.raises(UserError, match=r"source.tokens must be 540 as in .*, got 531"):
        train(config(folder, "a"), resume=True)
    np.save(folder / "x.npy", x)
    train(config(folder, "a"), resume=True)
    assert_same_run(folder)


def test_a_transcoder_does_not_resume_on_other_targets(folder: Path) -> None:
    settings = config(folder, "b", targets=str(folder / "y.npy"))
    train(settings)
    newest(folder / "b").unlink()
    y = np.load(folder / "y.npy")
    np.save(folder / "y.npy", -y)
    with pytest.raises(UserError, match="the activations must be those of"):
        train(settings, resume=True)
    np.save(folder / "y.npy", y)
    assert train(settings, resume=True).steps == 12


def test_a_checkpoint_of_before_fingerprints_and_checksums_resumes(folder: Path) -> None:
    path = newest(folder / "a")
    header = container.read_header(path)
    del header["extra"]["identity"]["source"]["values"], header["checksums"]
    with container.open_tensors(path) as file:
        tensors = {name: file.read(name) for name in file.names}
    container.write_tensors(path, tensors, {"ksae": json.dumps(header)})
    assert checkpoint.latest(folder / "a" / "checkpoints") == path
    train(config(folder, "a"), resume=True)
    assert_same_run(folder)


HOLD = """
import sys
from pathlib import Path
from ksae.files.lock import locked
with locked(Path(sys.argv[1]), "train"):
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.mark.parametrize("resume", [True, False])
def test_two_processes_do_not_share_a_folder(resume: bool, folder: Path) -> None:
    out = folder / ("a" if resume else "new")
    command = [sys.executable, "-c", HOLD, str(out)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None and other.stdout.readline() == "locked\n"
        before = sorted(path.name for path in out.rglob("*"))
        with pytest.raises(
            UserError, match=f"{re.escape(str(out))} is in use by process {other.pid}: "
        ):
            train(config(folder, out.name), resume=resume)
        assert sorted(path.name for path in out.rglob("*")) == before
        other.communicate("")
    assert train(config(folder, out.name), resume=resume).steps == 12
    assert not (out / lock.NAME).exists()


def test_a_lock_of_a_killed_process_is_no_hindrance(folder: Path) -> None:
    for out, resume in (("a", True), ("new", False)):
        (folder / out).mkdir(exist_ok=True)
        (folder / out / lock.NAME).write_text("4194305 elsewhere\n")
        assert train(config(folder, out), resume=resume).steps == 12


def test_a_run_holds_its_folder_while_it_trains(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From before the data are made until the last file is written."""
    from ksae.runs import finish, start

    seen = []

    def spy(module: object, name: str) -> None:
        original = getattr(module, name)

        def call(*args: object, **options: object) -> object:
            seen.append((name, (folder / "new" / lock.NAME).read_text().split()[0]))
            return original(*args, **options)

        monkeypatch.setattr(module, name, call)

    spy(start, "open_run_data")
    spy(checkpoint, "save_training")
    spy(finish, "measure_held_out")
    train(config(folder, "new"))
    assert {pid for _, pid in seen} == {str(os.getpid())}
    assert {name for name, _ in seen} == {"open_run_data", "save_training", "measure_held_out"}
