# SPDX-License-Identifier: Apache-2.0
"""The content of models and checkpoints: whatever is not what was written is refused by name."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch

import ksae
from ksae.errors import UserError
from ksae.files import container
from ksae.runs import checkpoint

FIXTURES = Path(__file__).parents[1] / "coders" / "fixtures"
HEADER = {"format": 1, "version": "0", "class": "", "config": {}, "kind": ""}


def training(d: int, F: int) -> tuple[ksae.TopKSAE, ksae.TrainStep]:
    torch.manual_seed(0)
    model = ksae.TopKSAE(d, F, 3)
    step = ksae.TrainStep(model, lr=1e-2, clip_norm=1.0)
    for _ in range(3):
        step(torch.randn(16, d))
    return model, step


def spans(path: Path) -> dict[str, tuple[int, int]]:
    """Where each tensor's bytes begin and end in a safetensors file."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    entries = json.loads(data[8:start])
    del entries["__metadata__"]
    offsets = {name: entry["data_offsets"] for name, entry in entries.items()}
    return {name: (start + begin, start + end) for name, (begin, end) in offsets.items()}


def overwrite(path: Path, begin: int, data: bytes) -> None:
    with path.open("r+b") as file:
        file.seek(begin)
        file.write(data)


@pytest.mark.parametrize("name", ["W_enc", "W_dec", "optimizer.m.W_dec", "optimizer.v.W_enc"])
def test_40_kb_of_zeros_in_a_checkpoint_are_noticed(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, step = training(64, 512)
    older, newer = (checkpoint.step_path(tmp_path, n) for n in (3, 4))
    for path in (older, newer):
        checkpoint.save_training(path, model, step, {"step": 3})
    assert checkpoint.latest(tmp_path) == newer
    overwrite(newer, spans(newer)[name][0] + 4096, bytes(40_000))
    with pytest.raises(UserError, match=f"{newer} is damaged: the content of {name} is not"):
        checkpoint.load_training(newer, model, step)
    if name in model.state_dict():
        with pytest.raises(UserError, match=f"{newer} is damaged: the content of {name} is not"):
            ksae.load(newer)
    else:
        ksae.load(newer)  # the model's own tensors are what was written
    with caplog.at_level(logging.WARNING, "ksae"):
        assert checkpoint.latest(tmp_path) == older
    assert "damaged" in caplog.text and "trying the checkpoint before it" in caplog.text
    assert checkpoint.load_training(older, model, step) == {"step": 3}


def test_one_bit_of_any_tensor_is_noticed(tmp_path: Path) -> None:
    model, step = training(6, 20)
    path = checkpoint.step_path(tmp_path, 3)
    state = {"step": 3, "rng": torch.get_rng_state(), "empty": torch.empty(0)}
    checkpoint.save_training(path, model, step, state)
    place = spans(path)
    assert len(place) > 12
    for name, (begin, end) in place.items():
        for at in {begin, (begin + end) // 2, end - 1} if end > begin else ():
            byte = path.read_bytes()[at]
            overwrite(path, at, bytes([byte ^ 64]))
            with pytest.raises(UserError, match=f"the content of {name} is not"):
                checkpoint.load_training(path, model, step)
            overwrite(path, at, bytes([byte]))
    back = checkpoint.load_training(path, model, step)
    assert back["step"] == 3 and back["empty"].shape == (0,)


def test_a_damaged_checkpoint_changes_no_model(tmp_path: Path) -> None:
    model, step = training(6, 20)
    path = checkpoint.step_path(tmp_path, 3)
    checkpoint.save_training(path, model, step, {"step": 3})
    overwrite(path, spans(path)["optimizer.v.b_dec"][0], b"\xff")
    other, other_step = training(6, 20)
    other.b_dec.data.fill_(7.0)
    before = {name: tensor.clone() for name, tensor in other.state_dict().items()}
    with pytest.raises(UserError, match="damaged"):
        checkpoint.load_training(path, other, other_step)
    assert all(torch.equal(before[name], t) for name, t in other.state_dict().items())


def test_files_without_checksums_still_load() -> None:
    """Those that earlier versions wrote."""
    files = sorted(FIXTURES.glob("*.safetensors"))
    assert len(files) >= 7
    for path in files:
        assert "checksums" not in container.read_header(path)
        ksae.load(path)
        with container.open_tensors(path) as file:
            file.verify()


def test_tensors_that_share_memory_or_are_views_are_written(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    tensors = {
        "base": base,
        "same": base,
        "transposed": base.T,
        "part": base[1:],
        "row": base[0],
        "broadcast": base[:1].expand(3, 4),
        "number": torch.tensor(5),
        "empty": torch.empty(0, 4),
        "flags": torch.tensor([True, False]),
        "half": base.bfloat16(),
    }
    path = tmp_path / "x.safetensors"
    container.write(path, tensors, HEADER)
    with container.open_tensors(path) as file:
        assert file.names == tensors.keys()
        file.verify()
        for name, tensor in tensors.items():
            back = file.read(name)
            assert back.dtype == tensor.dtype and torch.equal(back, tensor), name
    assert safetensors.torch.load_file(path).keys() == tensors.keys()


# The peak is that of the save alone: writing 5 to clear_refs sets it to what is in use now.
PEAK = """
import sys
from pathlib import Path
import torch
from ksae.files import container

def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

header = {"format": 1, "version": "0", "class": "", "config": {}, "kind": ""}
path = Path(sys.argv[1])
container.write(path, {"a": torch.ones(10)}, header)
tensors = {name: torch.ones(8, 1 << 20) for name in "abcd"}  # 32 MiB each
Path("/proc/self/clear_refs").write_text("5")
before = peak()
container.write(path, tensors, header)
saved = peak() - before
copies = [tensor.clone() for tensor in tensors.values()]
print(saved, peak() - before)
"""


def test_a_save_holds_no_second_copy(tmp_path: Path) -> None:
    if not Path("/proc/self/clear_refs").exists():
        pytest.skip("this system does not reset the peak of a process")
    child = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path / "x.safetensors")],
        capture_output=True,
        text=True,
        check=True,
    )
    saved, copied = map(int, child.stdout.split())  # KiB
    assert copied > 120_000  # the measure sees a copy
    assert saved < 16_000  # half of one tensor
