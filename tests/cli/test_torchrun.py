# SPDX-License-Identifier: Apache-2.0
"""`torchrun -m ksae train`: a run of several processes is that of one, survives a kill, and says
what is wrong once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny_lm
import torch

import ksae
from ksae.parallel.checkpoint import read_header
from ksae.runs import log as runlog

pytestmark = pytest.mark.nightly  # many processes

OPTIONS = {
    "d_sae": 131, "k": 4, "batch_size": 240, "steps": 60, "lr": 1e-3, "log_every": 1,
    "checkpoint_every": 20, "dead_after": 2000, "k_aux": 8, "eval_tokens": 200, "timeout": 20,
    "replicas": 1,
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows whose selection no rounding decides: in every step of a run each token's k-th and next
    pre-activation differ by 2.6e-5 of their size or more, 200 times what a float32 rounds off.

    Of seed 0, say, token 111 of step 26 has 1.89550582 (latent 45) and 1.89550572 (latent 84), less
    than the spacing of float32 apart. Two processes, whose weights differ there by 9e-8, choose the
    one and one process the other, which is 8.9e-4 of that step's loss and 2e-5 of later ones.
    """
    path = tmp_path_factory.mktemp("data") / "x.npy"
    gen = torch.Generator().manual_seed(3)
    codes = torch.rand(4000, 64, generator=gen) * (torch.rand(4000, 64, generator=gen) < 0.06)
    np.save(path, (codes @ torch.randn(64, 24, generator=gen)).numpy())
    return path


def command(R: int, data: Path, out: Path, *flags: str, **options: object) -> list[str]:
    """`ksae train`, with one process or started by torchrun."""
    start = [sys.executable, "-m"]
    if R > 1:
        start += ["torch.distributed.run", "--standalone", "--nproc-per-node", str(R), "-m"]
    settings = {"activations": data, "out": out, **OPTIONS, **options}
    pairs = ((f"--{name.replace('_', '-')}", str(value)) for name, value in settings.items())
    return [*start, "ksae", "train", *(word for pair in pairs for word in pair), *flags]


def run(*args: object, **options: object) -> subprocess.CompletedProcess[str]:
    words = command(*args, **options)  # type: ignore[arg-type]
    return subprocess.run(words, capture_output=True, text=True, timeout=200)


@pytest.fixture(scope="module")
def two(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two processes."""
    out = tmp_path_factory.mktemp("runs") / "two"
    done = run(2, data, out)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trained 60 steps, 14,400 tokens") == 1
    return out


def assert_same_losses(one: Path, other: Path, exact: bool) -> None:
    """The same bits; or but for rounding, at every step."""
    lines = [runlog.read(folder / "metrics.jsonl") for folder in (one, other)]
    assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]]
    losses = [[line["loss"] for line in run] for run in lines]
    assert losses[0] == (losses[1] if exact else pytest.approx(losses[1], rel=1e-6))


def test_two_processes_do_the_run_of_one(data: Path, two: Path, tmp_path: Path) -> None:
    assert run(1, data, tmp_path / "one").returncode == 0
    assert_same_losses(two, tmp_path / "one", exact=False)
    a, b = (ksae.load(folder) for folder in (two, tmp_path / "one"))
    assert a.config() == b.config() and len(a.W_enc) == 131
    newest = ksae.load(two / "checkpoints" / "step_00000060")
    assert torch.equal(newest.W_dec, a.W_dec)
    assert sorted(p.name for p in two.iterdir() if p.suffix != ".png") == sorted(
        p.name for p in (tmp_path / "one").iterdir() if p.suffix != ".png"
    )


def test_copies_do_the_run_of_one(data: Path, two: Path, tmp_path: Path) -> None:
    """Of 131 latents and 240 tokens a step copies send less; a run goes on from parts as copies."""
    words = command(2, data, tmp_path / "copies")
    at = words.index("--replicas")
    done = subprocess.run(words[:at] + words[at + 2 :], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    newest = tmp_path / "copies" / "checkpoints" / "step_00000060"
    assert read_header(newest)["ranks"] == 1
    assert_same_losses(two, tmp_path / "copies", exact=False)
    done = run(2, data, tmp_path / "odd", replicas=3)
    said = "train: train.replicas must divide the 2 processes, or be left out, got 3"
    assert f"ksae: error: {said}" in done.stderr and not (tmp_path / "odd").exists()


def test_two_processes_share_a_harvest(tmp_path: Path) -> None:
    """The run of one process, whose model and text are read by both."""
    lm = tiny_lm.save(tmp_path / "lm")
    texts = tmp_path / "texts.txt"
    texts.write_text("\n".join(tiny_lm.text(12, seed) for seed in range(300)))
    harvested = {"model": lm, "hook": "layers.0.resid_post", "text": texts, "context": 16}
    settings = {
        "d_sae": 48, "k": 4, "batch_size": 120, "steps": 30, "log_every": 1, "eval_tokens": 100,
        "holdout": 0.2, "replicas": 1, "threads": 1,
    }  # fmt: skip
    for R in (1, 2):
        words = command(R, tmp_path, tmp_path / str(R))[: -2 * len(OPTIONS) - 4]
        given = {**harvested, **settings, "out": tmp_path / str(R)}
        pairs = ((f"--{name.replace('_', '-')}", str(value)) for name, value in given.items())
        words += [word for pair in pairs for word in pair]
        done = subprocess.run(words, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
    assert_same_losses(tmp_path / "1", tmp_path / "2", exact=False)


def test_smollm2_has_the_fvu_of_one_process(tmp_path: Path) -> None:
    """Harvest, training and evaluation on a real model, but for near-ties that rounding decides."""
    settings = {
        "model": "smollm2-135m", "hook": "layers.9.resid_post", "text": "pydoc", "max_tokens": 4000,
        "d_sae": 2304, "k": 32, "batch_size": 512, "steps": 30, "holdout": 0.2, "eval_tokens": 800,
        "replicas": 1, "threads": 1,
    }  # fmt: skip
    found = []
    for R in (1, 2):
        words = command(R, tmp_path, tmp_path)[: -2 * len(OPTIONS) - 4]
        given = {**settings, "out": tmp_path / str(R)}
        pairs = ((f"--{name.replace('_', '-')}", str(value)) for name, value in given.items())
        words += [word for pair in pairs for word in pair]
        done = subprocess.run(words, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        found.append(json.loads((tmp_path / str(R) / "evaluation.json").read_text())["fvu"])
    assert 0.1 < found[0] < 0.9
    assert found[1] == pytest.approx(found[0], rel=2e-3)


def test_a_killed_rank_ends_all_and_the_run_goes_on(data: Path, two: Path, tmp_path: Path) -> None:
    out = tmp_path / "killed"
    words = command(2, data, out)
    process = subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    until = time.monotonic() + 120
    while not (out / "checkpoints" / "step_00000020").is_dir():
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.01)
    os.kill(rank_1(process.pid), signal.SIGKILL)
    start = time.monotonic()
    _, errors = process.communicate(timeout=60)
    assert time.monotonic() - start < 30
    assert process.returncode != 0
    assert errors.count("ksae: error: rank 0 of 2: the exchange of") == 1, errors
    for R in (2, 1):  # what is left is whole
        copy = tmp_path / f"resumed_{R}"
        subprocess.run(["cp", "-r", str(out), str(copy)], check=True)
        done = run(R, data, copy, "--resume")
        assert done.returncode == 0, done.stderr
        assert "going on after step" in done.stderr
        assert_same_losses(two, copy, exact=R == 2)
        if R == 2:
            assert torch.equal(ksae.load(copy).W_enc, ksae.load(two).W_enc)


def rank_1(launcher: int) -> int:
    """The process of rank 1 among those that torchrun has started."""
    children = Path(f"/proc/{launcher}/task/{launcher}/children").read_text().split()
    for pid in children:
        if b"\0RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes():
            return int(pid)
    raise AssertionError(f"no rank 1 among {children}")


def test_a_mistake_is_said_and_no_file_is_left(data: Path, two: Path, tmp_path: Path) -> None:
    done = run(2, data, tmp_path / "odd", batch_size=241)
    assert done.returncode != 0
    said = "train: train.batch_size must be a multiple of the 2 processes, got 241"
    assert f"ksae: error: {said}" in done.stderr and not (tmp_path / "odd").exists()
    done = run(2, data, two)
    assert done.returncode != 0 and "out must be a new folder" in done.stderr
    assert (two / "model.safetensors").is_file()
