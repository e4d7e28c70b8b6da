# SPDX-License-Identifier: Apache-2.0
"""What CUDA users are told when something does not fit, without a GPU: devices, drivers, launches,
and that no float32 product is taken in TF32."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from cases import randn
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import ksae
from ksae.backends import cuda, driver
from ksae.ops.specs import BY_NAME


def module(driver: int, devices: int | str = 1) -> Any:
    """A native module with CUDA 13.0 in it, on a machine with that driver."""

    def device_count() -> int:
        if isinstance(devices, str):
            raise RuntimeError(devices)
        return devices

    return SimpleNamespace(
        driver_version=lambda: driver, runtime_version=lambda: 13000, device_count=device_count
    )


@pytest.mark.parametrize(
    ("native", "reason"),
    [
        (module(13000), ""),
        (module(13020), ""),
        (module(13000, 0), "no CUDA device"),
        (module(0, "device_count: CUDA error 35 (old)"), "no CUDA driver is installed"),
        (module(13000, "device_count: CUDA error 3 (x)"), "device_count: CUDA error 3 (x)"),
        (
            module(12040, "device_count: CUDA error 35 (old)"),
            "the driver is too old: it runs CUDA up to 12.4, the kernels are built with 13.0;"
            " update the driver",
        ),
    ],
    ids=["right", "newer", "no device", "no driver", "no start", "old driver"],
)
def test_why_the_kernels_cannot_run(native: Any, reason: str) -> None:
    assert driver.why_not(native) == reason


def test_an_import_asks_for_no_device() -> None:
    asks = module(13000)
    asks.device_count = lambda: pytest.fail("the driver was asked for its devices")
    assert driver.why_not_by_version(asks) == ""


def test_an_old_gpu_is_refused_and_a_new_one_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def capability(device: torch.device) -> tuple[int, int]:
        asked.append(device.index)
        return (7, 5) if device.index else (8, 0)

    monkeypatch.setattr(torch.cuda, "get_device_capability", capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    monkeypatch.setattr(cuda, "_known", set())
    ran = []
    kernels: Any = SimpleNamespace(topk=lambda x, k: ran.append(x.device.index))
    topk = cuda.served("topk", kernels.topk)
    with FakeTensorMode():
        new, old = (torch.empty(3, 9, device=f"cuda:{n}") for n in range(2))
    topk(x=new, k=2)
    topk(x=new, k=2)
    want = r"topk: x must be on a GPU of compute capability 8\.0 or newer, got cuda:1 \(Tesla T4, 7"
    for _ in range(2):
        with pytest.raises(RuntimeError, match=want):
            topk(x=old, k=2)
    assert ran == [0, 0] and asked == [0, 1, 1]


def test_a_failed_launch_names_the_op_that_was_called() -> None:
    text = "select with N=3, F=9, k=2: CUDA error 209 (no kernel image is available)"

    def fails(**args: Any) -> None:
        raise RuntimeError(text)

    topk_encode = cuda.served("topk_encode", fails)
    with pytest.raises(RuntimeError) as caught:
        topk_encode(x=randn(3, 4), W_enc=randn(9, 4), b_enc=randn(9), k=2)
    assert str(caught.value) == f"topk_encode: {text}"
    own = cuda.served("select", fails)
    with pytest.raises(RuntimeError) as caught:
        own()
    assert str(caught.value) == text
    full = torch.OutOfMemoryError("CUDA out of memory")

    def allocates() -> None:
        raise full

    with pytest.raises(torch.OutOfMemoryError):  # torch's own errors stay what they are
        cuda.served("topk", allocates)()


def checked(*args: Any) -> None:
    spec = BY_NAME["topk_encode"]
    spec.check(spec.bind(args))


def test_tensors_on_several_devices_are_refused() -> None:
    """Dispatch goes to CUDA as soon as one tensor is there; the checks name the one that is not."""

    def encode(*devices: str) -> str:
        sizes = ((3, 4), (9, 4), (9,))
        with FakeTensorMode():
            args = [torch.empty(*s, device=d) for s, d in zip(sizes, devices, strict=True)]
            with pytest.raises(ValueError, match=r"^topk_encode: ") as caught:
                checked(*args, 2)
        return str(caught.value).removeprefix("topk_encode: ")

    assert encode("cuda:0", "cpu", "cuda:0") == "W_enc must be on cuda:0, got cpu"
    assert encode("cuda:0", "cuda:0", "cpu") == "b_enc must be on cuda:0, got cpu"
    assert encode("cpu", "cuda:0", "cuda:0") == "W_enc must be on cpu, got cuda:0"
    assert encode("cuda:0", "cuda:1", "cuda:1") == "W_enc must be on cuda:0, got cuda:1"


def test_dtypes_and_k_are_checked_on_cuda_as_everywhere() -> None:
    with FakeTensorMode():
        x, W, b = (torch.empty(*s, device="cuda:0") for s in ((3, 4), (9, 4), (9,)))
        with pytest.raises(TypeError, match=r"^topk_encode: W_enc must be torch.float32, got"):
            checked(x, W.half(), b, 2)
        with pytest.raises(TypeError, match=r"^topk_encode: x must be one of .*, got torch.int32"):
            checked(x.int(), W, b, 2)
        for k in (0, 10):
            want = rf"^topk_encode: k must be in \[1, 9\] for W_enc of shape \[9, 4\], got {k}"
            with pytest.raises(ValueError, match=want):
                checked(x, W, b, k)


class Count(torch.Tensor):
    """Counts how often somebody reads it."""

    read = 0
    __torch_function__ = torch._C._disabled_torch_function_impl  # results are plain tensors

    def __int__(self) -> int:
        Count.read += 1
        return int(self.as_subclass(Tensor))


class Mask(torch.Tensor):
    """Says that it is on a GPU, and counts how often somebody reads its number of True."""

    is_cuda = True
    __torch_function__ = torch._C._disabled_torch_function_impl

    def sum(self) -> Tensor:
        return super().sum().as_subclass(Count)


@pytest.mark.parametrize("dead", [0, 20])
def test_a_module_reads_no_number_of_the_device_while_a_graph_is_recorded(
    monkeypatch: pytest.MonkeyPatch, dead: int
) -> None:
    sae, x, mask = ksae.TopKSAE(8, 40, 3, k_aux=5).eval(), randn(6, 8), torch.arange(40) < dead
    monkeypatch.setattr(ksae.TopKSAE, "dead", property(lambda self: mask.as_subclass(Mask)))
    losses = []
    for recording in (False, True):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda now=recording: now)
        Count.read = 0
        losses.append(sae(x).loss)
        assert Count.read == (0 if recording else 1)
    torch.testing.assert_close(*losses)
