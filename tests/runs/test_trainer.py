# SPDX-License-Identifier: Apache-2.0
"""The training loop on real numbers: exact resumption, signals, faults, what a run leaves."""

from __future__ import annotations

import dataclasses
import errno
import importlib.util
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from small_runs import (
    CONFIG,
    F,
    activations,
    assert_same_run,
    d,
    k,
    model,
    records,
    refused,
    run,
)
from torch import Tensor

import ksae
from ksae.activations import ArraySource, fingerprint
from ksae.activations.transfer import Readback, staged
from ksae.runs import checkpoint
from ksae.runs import config as runconfig
from ksae.runs.config import LogConfig, RunConfig
from ksae.runs.resume import compare
from ksae.runs.start import train
from ksae.runs.trainer import Interrupted


class Signalling(ArraySource):
    """Sends this process a signal while it makes batch `at`."""

    def __init__(self, x: Tensor, at: int, signum: int) -> None:
        super().__init__([x], name="signalling")
        self.at, self.signum = at, signum

    def batches(
        self, batch_size: int, *, seed: int = 0, start_step: int = 0
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        stream = super().batches(batch_size, seed=seed, start_step=start_step)
        for step, batch in enumerate(stream, start_step):
            if step == self.at:
                os.kill(os.getpid(), self.signum)
            yield batch


def test_a_run_learns_and_leaves_its_files(tmp_path):
    config = dataclasses.replace(CONFIG, steps=120, prefetch=2, eval_tokens=90)
    held = ArraySource([activations(100, seed=1)])
    result = run(tmp_path / "a", config, holdout=held, log=LogConfig(every=10, progress=False))
    lines = records(tmp_path / "a")
    assert [line["step"] for line in lines] == list(range(10, 121, 10))
    assert lines[-1]["fvu"] < 0.6 * lines[0]["fvu"]
    assert {"loss", "fvu", "auxk_loss", "l0", "dead", "grad_norm", "lr", "tokens"} <= lines[
        0
    ].keys()
    assert result.steps == 120 and result.tokens == 120 * 64 == lines[-1]["tokens"]
    assert result.metrics["fvu"] == lines[-1]["fvu"]
    back = ksae.load(result.model_path)
    assert torch.equal(back.W_enc, result.model.W_enc)
    kept = sorted(p.name for p in (tmp_path / "a" / "checkpoints").iterdir())
    assert kept == ["step_00000119.safetensors", "step_00000120.safetensors"]
    evaluation = json.loads((tmp_path / "a" / "evaluation.json").read_text())
    assert evaluation["tokens"] == 90 and evaluation["fvu"] == result.evaluation["fvu"]
    assert all(picture.stat().st_size > 1000 for picture in result.plots)
    assert len(result.plots) == 2


def test_biases_start_from_the_data(tmp_path):
    x = activations()
    config = dataclasses.replace(CONFIG, steps=0, warmup=0, init_tokens=10**6)
    result = run(tmp_path / "a", config, ArraySource([x]))
    from ksae.coders.initialize import geometric_median

    torch.testing.assert_close(result.model.b_dec.data, geometric_median(x))
    untouched = dataclasses.replace(config, init_tokens=0)
    assert not run(tmp_path / "b", untouched).model.b_dec.any()
    assert records(tmp_path / "b") == []


@pytest.mark.parametrize("prefetch", [0, 2])
@pytest.mark.parametrize(
    ("fused", "dtype"),
    [(True, torch.float32), (True, torch.bfloat16), (False, torch.float32)],
    ids=["fused", "fused-bf16", "unfused"],
)
def test_interrupted_and_resumed_is_the_same_run(tmp_path, fused, dtype, prefetch):
    config = dataclasses.replace(CONFIG, fused=fused, prefetch=prefetch)
    run(tmp_path / "straight", config, coder=model(dtype=dtype))
    source = Signalling(activations(), 9, signal.SIGTERM)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Interrupted) as caught:
        run(tmp_path / "resumed", config, source, model(dtype=dtype))
    assert signal.getsignal(signal.SIGTERM) is before
    stopped = caught.value
    assert stopped.exit_code == 143 and stopped.path.exists() and "--resume" in str(stopped)
    if prefetch == 0:
        assert stopped.step == 10  # the step in progress was finished
    assert 0 < len(records(tmp_path / "resumed")) == stopped.step < 20

    torch.manual_seed(99)  # whatever the new process starts from
    fresh = ksae.TopKSAE(d, F, k, dead_after=300, dtype=dtype)
    run(tmp_path / "resumed", config, coder=fresh, resume=True)
    assert_same_run(tmp_path / "straight", tmp_path / "resumed")
    run(tmp_path / "resumed", config, coder=fresh, resume=True)  # a finished run stays as it is
    assert_same_run(tmp_path / "straight", tmp_path / "resumed")


def test_ctrl_c_before_the_first_step(tmp_path):
    with pytest.raises(Interrupted) as caught:
        run(tmp_path / "a", source=Signalling(activations(), 0, signal.SIGINT))
    assert caught.value.exit_code == 130 and caught.value.step == 0
    run(tmp_path / "a", resume=True)
    run(tmp_path / "straight")
    assert_same_run(tmp_path / "straight", tmp_path / "a")


def test_numbers_and_batches_of_the_host_stay_as_they_are():
    numbers = {"loss": torch.tensor(0.5), "count": torch.tensor(3)}
    assert Readback(numbers).get() == {"loss": 0.5, "count": 3.0}
    x = torch.randn(3, 2)
    assert staged(x, torch.device("cpu"), torch.bfloat16) is x  # a later copy converts it


def test_a_transcoder_with_skip_resumes(tmp_path):
    x = activations()
    y = x.roll(1, 1)[:, :5].square()

    def coder() -> ksae.Transcoder:
        torch.manual_seed(0)
        return ksae.Transcoder(d, 5, F, k, skip=True, auxk_alpha=0.1, dead_after=100)

    run(tmp_path / "a", source=ArraySource([x], [y]), coder=coder())
    run(tmp_path / "b", source=ArraySource([x], [y]), coder=coder())
    checkpoint.step_path(tmp_path / "b" / "checkpoints", 20).unlink()  # as if killed after step 14
    run(tmp_path / "b", source=ArraySource([x], [y]), coder=coder(), resume=True)
    assert_same_run(tmp_path / "a", tmp_path / "b")
    assert records(tmp_path / "a")[-1]["fvu"] < 1


def test_a_truncated_newest_checkpoint_falls_back_to_the_one_before(tmp_path):
    run(tmp_path / "a")
    run(tmp_path / "b")
    newest = checkpoint.step_path(tmp_path / "b" / "checkpoints", 20)
    newest.write_bytes(newest.read_bytes()[:-100])
    with (tmp_path / "b" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 21, "lo')  # a half line of a killed run
    run(tmp_path / "b", resume=True)
    assert_same_run(tmp_path / "a", tmp_path / "b")


def test_a_loss_that_is_not_finite_stops_and_keeps_the_last_good_checkpoint(tmp_path):
    # The rate rises through the warm-up until a step overflows.
    wild = dataclasses.replace(
        CONFIG, steps=200, warmup=200, decay=0.0, lr=1e38, clip_norm=None, checkpoint_every=1
    )
    out = tmp_path / "wild"
    coder = model(normalize_decoder=False)
    refused(lambda: run(out, wild, coder=coder), "must be finite", "lower train.lr", " step ")
    kept = checkpoint.latest(out / "checkpoints")
    assert kept is not None and not (out / "model.safetensors").exists()
    assert all(p.isfinite().all() for p in ksae.load(kept).parameters())
    data = kept.read_bytes()
    coder = model(normalize_decoder=False)
    refused(lambda: run(out, wild, coder=coder, resume=True), "must be finite", " step ")
    assert kept.read_bytes() == data


def test_a_step_that_overflows_late_names_the_step_and_the_checkpoint(tmp_path):
    class Spike(ArraySource):
        """Finite activations, but for one batch so large that their variance overflows."""

        def batches(
            self, batch_size: int, *, seed: int = 0, start_step: int = 0
        ) -> Iterator[tuple[Tensor, Tensor | None]]:
            stream = super().batches(batch_size, seed=seed, start_step=start_step)
            for step, (x, y) in enumerate(stream, start_step):
                yield (x * 1e30 if step == 11 else x), y

    config = dataclasses.replace(CONFIG, init_tokens=64)
    source = Spike([activations()])
    refused(lambda: run(tmp_path / "a", config, source), "step 12", "step_00000007", "is kept")
    assert [line["step"] for line in records(tmp_path / "a")] == list(range(1, 12))
    assert [p.name for p in (tmp_path / "a" / "checkpoints").iterdir()] == [
        "step_00000007.safetensors"
    ]


def test_activations_that_are_not_finite_are_named(tmp_path):
    x = activations()
    x[400, 2] = float("nan")
    config = dataclasses.replace(CONFIG, init_tokens=0)
    refused(lambda: run(tmp_path / "a", config, ArraySource([x])), "row 400", "non-finite")
    assert not list((tmp_path / "a").glob("checkpoints/*")) or checkpoint.latest(
        tmp_path / "a" / "checkpoints"
    )
    large = activations()
    large[:, 0] = 1e6  # finite as it is read, not in the weights' dtype
    half = ksae.TopKSAE(d, F, k, dtype=torch.float16)
    source = ArraySource([large])
    refused(lambda: run(tmp_path / "b", config, source, half), "float16", "step 1")
    half = ksae.TopKSAE(d, F, k, dtype=torch.float16)
    refused(lambda: run(tmp_path / "c", CONFIG, source, half), "float16", "first batches")


def test_a_bad_row_deep_in_the_data_loses_no_step(tmp_path):
    """It is found when it is read: the steps before it are saved, and go on once it is mended."""
    good = activations(5000)
    bad = good.clone()
    numbers = ArraySource([torch.arange(5000.0)[:, None]]).batches(64, seed=CONFIG.seed)
    fifth, _ = next(itertools.islice(numbers, 4, None))
    row = next(int(r) for r in fifth if int(r) not in fingerprint.sampled(5000).tolist())
    bad[row, 2] = float("inf")
    config = dataclasses.replace(CONFIG, init_tokens=64, prefetch=2)
    run(tmp_path / "a", config, ArraySource([good]))
    words = (f"row {row} holds a non-finite", "the 4 steps so far are saved", "step_00000004")
    refused(lambda: run(tmp_path / "b", config, ArraySource([bad])), *words)
    assert [line["step"] for line in records(tmp_path / "b")] == [1, 2, 3, 4]
    refused(lambda: run(tmp_path / "b", config, ArraySource([bad]), resume=True), *words)
    run(tmp_path / "b", config, ArraySource([good]), resume=True)
    assert_same_run(tmp_path / "a", tmp_path / "b")


class Empty(ArraySource):
    def batches(
        self, batch_size: int, *, seed: int = 0, start_step: int = 0
    ) -> Iterator[tuple[Tensor, Tensor | None]]:
        return iter(())


def test_data_that_does_not_fit_is_refused(tmp_path):
    x = activations()
    wide = ArraySource([torch.randn(50, d + 1)])
    refused(lambda: run(tmp_path / "a", source=wide), f"d_in = {d}", str(d + 1))
    transcoder = ksae.Transcoder(d, 5, F, k)
    refused(lambda: run(tmp_path / "a", coder=transcoder), "must have targets")
    narrow = ArraySource([x], [x[:, :4]])
    refused(lambda: run(tmp_path / "a", source=narrow, coder=transcoder), "d_out = 5", "got 4")
    assert not (tmp_path / "a").exists()
    refused(lambda: run(tmp_path / "a", source=Empty([x], name="nothing")), "nothing", "step 1")


def test_directories_are_not_mixed_up(tmp_path):
    run(tmp_path / "a")
    refused(lambda: run(tmp_path / "a"), "new folder", str(tmp_path / "a"), "resume")
    refused(lambda: run(tmp_path / "none", resume=True), "run to resume", str(tmp_path / "none"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").touch()
    refused(lambda: run(tmp_path / "other", resume=True), "run to resume")
    (tmp_path / "file").touch()
    refused(lambda: run(tmp_path / "file"), str(tmp_path / "file"))
    (tmp_path / "empty").mkdir()
    run(tmp_path / "empty", dataclasses.replace(CONFIG, steps=5))
    (tmp_path / "stopped-early").mkdir()
    run(tmp_path / "stopped-early", dataclasses.replace(CONFIG, steps=5), resume=True)


def test_a_full_disk_ends_the_run_and_loses_nothing(tmp_path, monkeypatch):
    full = []

    class Filling(ArraySource):
        def batches(
            self, batch_size: int, *, seed: int = 0, start_step: int = 0
        ) -> Iterator[tuple[Tensor, Tensor | None]]:
            stream = super().batches(batch_size, seed=seed, start_step=start_step)
            for step, batch in enumerate(stream, start_step):
                if step == 10:
                    full.append(True)
                yield batch

    really = os.fsync

    def fsync(fd: int) -> None:
        if full and "safetensors" in os.readlink(f"/proc/self/fd/{fd}"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        really(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    source = Filling([activations()])
    refused(lambda: run(tmp_path / "a", source=source), "step_00000014", "No space left on device")
    names = [p.name for p in (tmp_path / "a" / "checkpoints").iterdir()]
    assert names == ["step_00000007.safetensors"]  # and no temporary
    monkeypatch.undo()
    run(tmp_path / "a", resume=True)
    run(tmp_path / "straight")
    assert_same_run(tmp_path / "straight", tmp_path / "a")


def test_a_resumed_run_must_be_the_same_run(tmp_path):
    run(tmp_path / "a", dataclasses.replace(CONFIG, decay=0.0))

    def again(coder: ksae.SparseCoder | None = None, n: int = 500, **changes: object) -> None:
        config = dataclasses.replace(CONFIG, **{"decay": 0.0, **changes})
        run(tmp_path / "a", config, ArraySource([activations(n)]), coder, resume=True)

    refused(lambda: again(lr=1e-3), "train.lr must be 0.003", "got 0.001", "step_00000020")
    refused(lambda: again(seed=1), "train.seed")
    refused(lambda: again(steps=30, decay=0.1), "train.decay")
    refused(lambda: again(n=400), "source.tokens", "500", "400")
    refused(lambda: again(ksae.TopKSAE(d, F, k + 1)), "model.")
    again(checkpoint_every=3, keep_last=5, prefetch=1, steps=25)  # steps are free without decay
    run(tmp_path / "b", dataclasses.replace(CONFIG, decay=0.0, steps=25))
    assert records(tmp_path / "a") == records(tmp_path / "b")
    compare({"train": {"lr": 1}}, {"train": {"lr": 1, "threads": 3}}, "x")
    # runs that were started before there was the setting
    compare({"train": {"lr": 1}}, {"train": {"lr": 1, "clip": "above", "decoder_lr": 1.0}}, "x")
    refused(lambda: compare({}, {"train": {"decoder_lr": 3.0}}, "x"), "decoder_lr must be 1.0")
    refused(lambda: again(clip="above"), "train.clip must be 'always'", "got 'above'")


def test_services_that_are_not_installed_are_named(tmp_path):
    for name, setting in (("tensorboard", {"tensorboard": True}), ("wandb", {"wandb": "project"})):
        if importlib.util.find_spec(name) is None:
            log = LogConfig(progress=False, **setting)
            refused(lambda log=log, name=name: run(tmp_path / name, log=log), name, "pip install")
    if importlib.util.find_spec("tensorboard") is not None:
        run(tmp_path / "board", log=LogConfig(progress=False, tensorboard=True))
        assert list((tmp_path / "board" / "tensorboard").iterdir())


def test_progress_without_a_terminal_is_ten_lines(tmp_path, capsys):
    run(tmp_path / "a", log=LogConfig(every=1))
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert len(said) == 10 and "fvu" in said[0] and "tokens/s" in said[0]


def run_config(tmp_path: Path, **data: object) -> RunConfig:
    np.save(tmp_path / "x.npy", activations(2000).numpy())
    return runconfig.from_dict(
        {
            "out": str(tmp_path / "out"),
            "model": {"d_sae": F, "k": k, "dead_after": 300},
            "data": {"activations": str(tmp_path / "x.npy"), "holdout": 0.1, **data},
            "train": {**dataclasses.asdict(CONFIG), "eval_tokens": 100, "device": "cpu"},
            "log": {"every": 1, "progress": False},
        }
    )


def test_a_configuration_is_written_and_reproduces_the_run(tmp_path):
    config = run_config(tmp_path)
    result = train(config)
    assert result.evaluation["fvu"] > 0
    again = runconfig.read(tmp_path / "out" / "run.yaml")
    assert again == config
    again.out = str(tmp_path / "again")
    train(again)
    assert_same_run(tmp_path / "out", tmp_path / "again")
    refused(lambda: train(config), "new folder")
    changed = runconfig.override(config, {"data.holdout": 0.2})
    refused(lambda: train(changed, resume=True), "resume: data.holdout must be 0.1", "got 0.2")


def test_configurations_that_no_data_fit(tmp_path):
    config = run_config(tmp_path)
    for key, value, *words in (
        ("model.kind", "transcoder", "data.targets"),
        ("data.targets", config.data.activations, "model.kind = sae"),
        ("data.activations", None, "data.model"),
        ("data.model", "smollm2-135m", "data.model", "data.activations"),
        ("data.activations", str(tmp_path / "none.npy"), "none.npy"),
        ("data.holdout", 0.9999, "data.holdout"),
        ("train.device", "abacus", "train.device", "abacus"),
    ):
        changed = runconfig.override(config, {key: value, "out": str(tmp_path / "new")})
        refused(lambda changed=changed: train(changed), *words)


# What the command line does with a run's end.
CHILD = """
import sys
from ksae.runs import config as runconfig
from ksae.runs.start import train
from ksae.runs.trainer import Interrupted
try:
    train(runconfig.read(sys.argv[1]), resume=len(sys.argv) > 2)
except Interrupted as stopped:
    print(stopped, file=sys.stderr)
    sys.exit(stopped.exit_code)
"""


LONGER = {"train.steps": 200, "train.checkpoint_every": 10, "train.prefetch": 2}


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("straight")
    return train(runconfig.override(run_config(folder), LONGER)).out


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL], ids=["term", "kill"])
def test_a_killed_process_resumes_to_the_same_bits(tmp_path, straight, signum):
    same_data = {"data.activations": str(straight.parent / "x.npy")}
    config = runconfig.override(run_config(tmp_path), {**LONGER, **same_data})
    runconfig.write(config, tmp_path / "run.yaml")
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD, str(tmp_path / "run.yaml")], stderr=subprocess.PIPE, text=True
    )
    path = checkpoint.step_path(tmp_path / "out" / "checkpoints", 10)
    while not path.exists() and child.poll() is None:
        time.sleep(0.001)
    child.send_signal(signum)
    _, said = child.communicate()
    if signum == signal.SIGTERM:
        assert child.returncode == 143, said
        assert "SIGTERM" in said and "--resume" in said and "Traceback" not in said
    else:
        assert child.returncode == -9
    assert not (tmp_path / "out" / "model.safetensors").exists()
    train(config, resume=True)
    assert_same_run(straight, tmp_path / "out")
