# SPDX-License-Identifier: Apache-2.0
"""Files of models and training state: exact round trips, damaged files, full disks, kill -9."""

from __future__ import annotations

import errno
import logging
import os
import pickle
import resource
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

import ksae
from ksae.coders import file as model_file
from ksae.errors import UserError
from ksae.files import atomic, container
from ksae.runs import checkpoint

d, F, k = 6, 20, 3


def same(a: torch.nn.Module, b: torch.nn.Module) -> bool:
    old, new = a.state_dict(), b.state_dict()
    return old.keys() == new.keys() and all(
        old[n].dtype == new[n].dtype and torch.equal(old[n], new[n]) for n in old
    )


def trained(model: ksae.SparseCoder, steps: int = 3, **options: object) -> ksae.TrainStep:
    step = ksae.TrainStep(model, lr=1e-2, **options)
    for seed in range(steps):
        g = torch.Generator().manual_seed(seed)
        x = torch.randn(16, model.d_in, generator=g)
        y = None if model.centred else torch.randn(16, model.d_out, generator=g)
        step(x, y)
    return step


def refused(call: object, *words: str) -> str:
    """The message of the UserError that `call()` raises: one line that holds the words."""
    with pytest.raises(UserError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message


MODELS = {
    "sae": lambda: ksae.TopKSAE(d, F, k),
    "sae-options": lambda: ksae.TopKSAE(
        d, F, k, loss="mse", auxk_alpha=0.0, k_aux=7, dead_after=5, multi_topk=True
    ),
    "sae-bf16": lambda: ksae.TopKSAE(d, F, k, dtype=torch.bfloat16),
    "sae-f16": lambda: ksae.TopKSAE(d, F, k, dtype=torch.float16),
    "transcoder": lambda: ksae.Transcoder(d, d + 3, F, k),
    "transcoder-skip": lambda: ksae.Transcoder(d, d + 3, F, k, skip=True),
}


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_a_model_comes_back_as_it_was(make, tmp_path):
    model = make()
    trained(model)
    path = tmp_path / "model.safetensors"
    model.save(path)
    rng = torch.get_rng_state()
    back = ksae.load(path)
    assert torch.equal(rng, torch.get_rng_state())  # loading draws no random numbers
    assert type(back) is type(model) and back.config() == model.config()
    assert same(model, back)
    assert all(p.requires_grad for p in back.parameters())
    x = torch.randn(5, d)
    assert torch.equal(model(x).recon, back(x).recon)


def test_other_readers_see_the_tensors(tmp_path):
    model = ksae.TopKSAE(d, F, k, dtype=torch.bfloat16)
    model_file.save(model, tmp_path / "m.safetensors", {"hook": "layers.3.resid_post"})
    tensors = safetensors.torch.load_file(tmp_path / "m.safetensors")
    assert tensors.keys() == model.state_dict().keys()
    assert torch.equal(tensors["W_dec"], model.W_dec)
    extra = container.read_header(tmp_path / "m.safetensors")["extra"]
    assert extra == {"hook": "layers.3.resid_post"}


def test_load_converts_and_takes_folders_and_checkpoints(tmp_path):
    model = ksae.TopKSAE(d, F, k)
    step = trained(model)
    model.save(tmp_path / "model.safetensors")
    half = ksae.load(tmp_path, dtype=torch.bfloat16)
    assert half.W_enc.dtype == torch.bfloat16 and half.tokens_since_fired.dtype == torch.int64
    assert torch.equal(half.W_enc, model.W_enc.bfloat16())
    path = checkpoint.step_path(tmp_path, 3)
    checkpoint.save_training(path, model, step, {})
    assert same(ksae.load(path), model)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "unfused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["f32", "bf16"])
def test_a_training_checkpoint_goes_on_with_the_same_bits(fused, dtype, tmp_path):
    model = ksae.TopKSAE(d, F, k, dtype=dtype)
    step = trained(model, fused=fused, clip_norm=0.5)
    state = {"step": 3, "rng": torch.get_rng_state(), "nested": {1: [1.5, None, ("a", True)]}}
    path = checkpoint.step_path(tmp_path, 3)
    checkpoint.save_training(path, model, step, state)

    other = ksae.TopKSAE(d, F, k, dtype=dtype)
    other_step = ksae.TrainStep(other, lr=1e-2, fused=fused, clip_norm=0.5)
    back = checkpoint.load_training(path, other, other_step)
    assert torch.equal(back.pop("rng"), state.pop("rng"))
    assert back == state  # keys of any type, tuples and lists
    x = torch.randn(16, d)
    for _ in range(2):
        assert torch.equal(step(x)["loss"], other_step(x)["loss"])
    assert same(model, other)
    moments, others = step.state_dict(), other_step.state_dict()
    assert all(torch.equal(moments[n], others[n]) for n in moments)


def test_damaged_and_foreign_files_are_refused_in_one_line(tmp_path):
    model = ksae.TopKSAE(d, F, k)
    good, bad = tmp_path / "good.safetensors", tmp_path / "bad.safetensors"
    model.save(good)
    data = good.read_bytes()
    for size in [0, 1, 7, 8, 9, 100, len(data) // 2, len(data) - 1]:
        bad.write_bytes(data[:size])
        refused(lambda: ksae.load(bad), str(bad))
    assert "truncated" in refused(lambda: ksae.load(bad))
    bad.write_bytes(data + b"x")
    refused(lambda: ksae.load(bad), "after its end")
    bad.write_bytes(pickle.dumps({"a": 1}) * 10)
    refused(lambda: ksae.load(bad), str(bad), "must be a safetensors file")
    safetensors.torch.save_file({"W": torch.ones(2)}, bad)
    refused(lambda: ksae.load(bad), str(bad), "another library")
    refused(lambda: ksae.load(tmp_path / "none"), "no such file")
    refused(lambda: ksae.load(tmp_path), "no such file", "model.safetensors")

    def rewritten(**changes: object) -> Path:
        header = {**container.read_header(good), **changes}
        container.write(bad, dict(model.state_dict()), header)
        return bad

    refused(lambda: ksae.load(rewritten(format=99)), "99", "update ksae")
    refused(lambda: ksae.load(rewritten(**{"class": "Output"})), "'Output'")
    wide = {**model.config(), "d_sae": F + 1}
    del wide["class"]
    refused(lambda: ksae.load(rewritten(config=wide)), "W_enc", str([F, d]), str([F + 1, d]))
    refused(lambda: ksae.load(rewritten(config={**wide, "k": 0})), "k must be in")
    refused(lambda: checkpoint.load_training(good, model, None), "training checkpoint")
    container.write(bad, {"W_enc": model.W_enc}, container.read_header(good))
    refused(lambda: ksae.load(bad), "b_enc")


def test_the_newest_whole_checkpoint_is_found(tmp_path, caplog):
    model = ksae.TopKSAE(d, F, k)
    step = ksae.TrainStep(model)
    assert checkpoint.latest(tmp_path / "none") is None
    for n in (9, 10, 100_000_000):
        checkpoint.save_training(checkpoint.step_path(tmp_path, n), model, step, {"step": n})
    newest = checkpoint.step_path(tmp_path, 100_000_000)
    assert checkpoint.latest(tmp_path) == newest
    newest.write_bytes(newest.read_bytes()[:-1])
    with caplog.at_level(logging.WARNING, "ksae"):
        assert checkpoint.latest(tmp_path) == checkpoint.step_path(tmp_path, 10)
    assert "truncated" in caplog.text  # said, not passed over in silence
    (tmp_path / "step_x.safetensors").touch()
    checkpoint.prune(tmp_path, 2)
    assert not checkpoint.step_path(tmp_path, 9).exists() and newest.exists()
    (tmp_path / ".step_00000011.safetensors.abc.tmp").touch()
    atomic.clean(tmp_path)
    assert not list(tmp_path.glob(".*"))


def test_a_failed_write_leaves_the_file_that_was_there(tmp_path, monkeypatch):
    old, new = ksae.TopKSAE(d, F, k), ksae.TopKSAE(d, F, k)
    path = tmp_path / "model.safetensors"
    old.save(path)

    # A real refusal by the system: files may not grow beyond 1000 bytes.
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        message = refused(lambda: new.save(path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(path) in message and "File too large" in message

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(atomic.os, "fsync", full)
    refused(lambda: new.save(path), str(path), "No space left on device")
    monkeypatch.undo()
    refused(lambda: new.save(path / "below" / "m.safetensors"), "cannot write")
    assert [p.name for p in tmp_path.iterdir()] == [path.name]  # no temporary is left
    assert same(ksae.load(path), old)


def test_the_file_and_then_its_folder_are_on_disk(tmp_path, monkeypatch):
    """A renamed file whose folder was not synced may be gone after a power failure."""
    events, fsync, replace = [], os.fsync, os.replace

    def synced(fd: int) -> None:
        at = os.fstat(fd)
        folder = stat.S_ISDIR(at.st_mode) and at.st_ino == tmp_path.stat().st_ino
        events.append("folder" if folder else "file")
        fsync(fd)

    def renamed(*args) -> None:
        events.append("rename")
        replace(*args)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", renamed)
    ksae.TopKSAE(d, F, k).save(tmp_path / "m.safetensors")
    assert events == ["file", "rename", "folder"]


def test_files_have_the_usual_permissions(tmp_path):
    ksae.TopKSAE(d, F, k).save(tmp_path / "m.safetensors")
    (tmp_path / "plain").touch()
    modes = [stat.S_IMODE((tmp_path / n).stat().st_mode) for n in ("m.safetensors", "plain")]
    assert modes[0] == modes[1]


# A child saves checkpoints as fast as it can and is killed at a random moment, again and again.
KILLED = """
import os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
import ksae
from ksae.coders import file as model_file
from ksae.files import atomic, container
from ksae.runs import checkpoint

folder = Path(sys.argv[1])
model = ksae.TopKSAE(64, 2048, 4)
step = ksae.TrainStep(model)
random.seed(0)
done, torn = 0, 0
for _ in range(15):
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        n = done
        while True:
            n += 1
            model.b_dec.data.fill_(n)
            checkpoint.save_training(
                checkpoint.step_path(folder, n), model, step, {"step": n, "x": torch.tensor([n])}
            )
            os.write(write, n.to_bytes(8, "little"))
            checkpoint.prune(folder, 2)
    first = os.read(read, 8)  # at least one is whole
    time.sleep(random.uniform(0, 0.05))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(write)
    announced = first + os.read(read, 1 << 20)
    done = int.from_bytes(announced[-8:], "little")
    torn += len(list(folder.glob(".*.tmp")))
    newest = checkpoint.latest(folder)
    assert newest is not None
    other = ksae.TopKSAE(64, 2048, 4)
    state = checkpoint.load_training(newest, other, ksae.TrainStep(other))
    assert state["step"] >= done, (state, done)  # what was announced is there
    assert state["x"].item() == state["step"] and bool((other.b_dec == state["step"]).all())
    done = state["step"]
    atomic.clean(folder)
    assert not list(folder.glob(".*.tmp"))
print("torn", torn, "steps", done)
"""


def test_kill_9_during_saves_never_loses_a_checkpoint(tmp_path):
    child = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True
    )
    assert child.returncode == 0, child.stderr
    assert "trying the checkpoint before" not in child.stderr  # nothing torn under a final name
    torn = int(child.stdout.split()[1])
    assert torn > 0, "no kill came in the middle of a save: " + child.stdout
