# SPDX-License-Identifier: Apache-2.0
"""Compiles what the Triton ops launch, for a GPU that is not there; prints what each kernel costs.

usage: triton_compile.py "CASE, CAPABILITY"...; the tensors are of shape only, and the launch
functions run as they are: a launch compiles its kernel and goes no further.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from ksae.kernels import encode, grad_encode, product

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
NAMES = ("HGMMA", "UTCHMMA", "HMMA", "FFMA", "LDL", "STL")


class Driver:
    """Says which GPU is there."""

    capability = 90

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return self.capability

    def get_current_stream(self, device):
        return 0


def cost(kernel):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage = subprocess.check_output(
            [TOOLS / "cuobjdump", "--dump-resource-usage", cubin.name], text=True
        )
        sass = subprocess.check_output([TOOLS / "nvdisasm", "-c", cubin.name], text=True)
    return {
        "registers": max(map(int, re.findall(r"REG:(\d+)", usage))),
        "stack": max(map(int, re.findall(r"STACK:(\d+)", usage))),
        "shared": kernel.metadata.shared,
        "instructions": [name for name in NAMES if re.search(rf"\b{name}\b", sass)],
    }


def empty(*shape, dtype):
    return torch.empty(*shape, dtype=dtype, device="meta")


def topk(dtype, k=32, **options):
    N, d, F = 8192, 768, 24576
    encode.topk_encode(
        empty(N, d, dtype=dtype), empty(F, d, dtype=dtype), empty(F, dtype=dtype), k, **options
    )


def grad(dtype):
    N, d, F = 8192, 768, 24576
    x, W, b = empty(N, d, dtype=dtype), empty(F, d, dtype=dtype), empty(F, dtype=dtype)
    grad_encode.grad_topk_encode(x, x, W, b, W, 32, 0.5)


CASES = {
    "topk-bf16": lambda: topk(torch.bfloat16),
    "topk-fp32": lambda: topk(torch.float32),
    "topk-bf16-k1024": lambda: topk(torch.bfloat16, k=1024),
    "topk-bf16-abs": lambda: topk(torch.bfloat16, activation="abs"),
    "grad-bf16": lambda: grad(torch.bfloat16),
    "grad-fp32": lambda: grad(torch.float32),
}


def main():
    target, launched, costs = Driver(), {}, {}
    driver.set_active(target)
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel not in costs:
            costs[kernel] = cost(kernel)
        launched[self.__name__] = costs[kernel]

    JITFunction.run = compile_only
    product.capability = lambda x: target.capability // 10
    report = {}
    for asked in sys.argv[1:]:
        case, capability = asked.split(", ")
        target.capability = int(capability)
        launched.clear()
        CASES[case]()
        report[asked] = dict(launched)
    print(json.dumps(report))


main()
