# SPDX-License-Identifier: Apache-2.0
"""What ptxas says of the CUDA kernels: nothing spills, nothing lies in local memory, and registers
stay within bounds; and how many loads are on their way at once where speed is the memory's. Where
there is no nvcc, the package has to say that the module was not built."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

import ksae

ROOT = Path(__file__).parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
# Registers a thread on sm_90. With 64 a multiprocessor holds 1024 threads.
MOST_REGISTERS = 64
OTHER_REGISTERS = {
    "screen_kernel": 72,  # 896 threads: the margin and the row's bounds beside the keys
    "backward_values_kernel": 48,
    "count_kernel": 40,
    "latent_kernel": 80,  # moments and rows are on their way at once: 768 threads
    "move_kernel": 48,
    "offsets_kernel": 24,
    "pieces_kernel": 72,
    "shares_kernel": 80,
    "sum_pieces_kernel": 40,
    "sums_kernel": 40,
    "tiles_kernel": 40,
}
# Bytes that a thread asks for in wide loads before it waits at a branch, by symbol: kernels of
# rows that may be read four numbers at a time. With 16 bytes, latency alone would set the speed.
AHEAD = {
    r"(backward_values|centre|decode|latent|residual|shares)_kernel.*Lb1EEEv": 64,
    r"select_kernel.*Lb0EEEv": 64,
}
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,5}\*/ +(?:@!?U?P\w+ )?([A-Z][\w.]+)")
ENTRY = re.compile(
    r"Compiling entry function '(?P<symbol>\w+)'.*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers",
    re.S,
)


def kernel_name(symbol: str) -> str:
    """The name in a mangled symbol, where its length stands before it."""
    for digits in re.finditer(r"\d+", symbol):
        for start in range(digits.start(), digits.end()):
            name = symbol[digits.end() :][: int(symbol[start : digits.end()])]
            if re.fullmatch(r"[a-z]\w*_kernel", name):
                return name
    raise AssertionError(f"{symbol} must be named ..._kernel")


@pytest.mark.nightly
@pytest.mark.parametrize("source", SOURCES, ids=lambda p: p.name)
def test_ptxas_report(source, tmp_path):
    nvcc = shutil.which(os.environ.get("CUDACXX", "nvcc"))
    if nvcc is None:
        cuda = ksae.config()["cuda"]
        assert not cuda["built"] and "no nvcc" in cuda["reason"]
        return
    # for the device alone: nothing compiles the host's side
    command = [nvcc, "-std=c++17", "-O3", "-arch=sm_90", "-Xptxas", "-v", "-cubin", str(source)]
    command += [f"-I{ROOT}/csrc/include", "-o", str(tmp_path / "out.cubin")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    text = source.read_text()
    kernels = text.count("__global__")
    reports = [match.groupdict() for match in ENTRY.finditer(done.stdout + done.stderr)]
    names = {kernel_name(r["symbol"]) for r in reports}
    assert len(names) == kernels, f"{kernels} kernels in {source.name}, reports of {sorted(names)}"
    assert all(re.search(rf"\b{name}\(", text) for name in names), sorted(names)
    faults = []
    for r in reports:
        name = kernel_name(r["symbol"])
        most = OTHER_REGISTERS.get(name, MOST_REGISTERS)
        if int(r["stack"]) or int(r["stores"]) or int(r["loads"]) or int(r["registers"]) > most:
            faults.append(
                f"{r['symbol']}: {r['stack']} bytes of stack, {r['stores']} + {r['loads']} bytes "
                f"spilled, {r['registers']} registers of at most {most}"
            )
    assert not faults, "\n".join(faults)
    wanted = [
        (r["symbol"], n) for r in reports for p, n in AHEAD.items() if re.search(p, r["symbol"])
    ]
    if wanted:
        ahead = bytes_ahead(tmp_path / "out.cubin")
        assert not [f"{s}: {ahead[s]} bytes" for s, least in wanted if ahead[s] < least]


def bytes_ahead(cubin: Path) -> dict[str, int]:
    """Most bytes of wide loads between two branches of each kernel."""
    found = importlib.util.find_spec("triton")
    assert found is not None and found.origin is not None
    tool = Path(found.origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    sass = subprocess.check_output(
        [tool, "--dump-sass", cubin], text=True, stderr=subprocess.DEVNULL
    )
    most = {}
    for function in sass.split("Function : ")[1:]:
        ahead, symbol = [0], function.split(maxsplit=1)[0]
        for name in INSTRUCTION.findall(function):
            if name.startswith(("BRA", "EXIT", "BAR", "CALL", "RET")):
                ahead.append(0)
            elif name.startswith("LDG"):
                ahead[-1] += {".128": 16, "E.64": 8}.get(name[-4:], 0)
        most[symbol] = max(ahead)
    return most


def test_every_bound_is_of_a_kernel():
    text = "".join(path.read_text() for path in SOURCES)
    assert all(re.search(rf"\b{name}\(", text) for name in OTHER_REGISTERS)
