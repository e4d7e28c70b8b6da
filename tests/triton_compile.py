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

from ksae.kernels import encode, grad_encode, product, screen

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


def topk(dtype, N=8192, d=768, F=24576, k=32, **options):
    x, W, b = empty(N, d, dtype=dtype), empty(F, d, dtype=dtype), empty(F, dtype=dtype)
    encode.topk_encode(x, W, b, k, **options)


def grad(dtype, N=8192, d=768, F=24576, k=32):
    x, W, b = empty(N, d, dtype=dtype), empty(F, d, dtype=dtype), empty(F, dtype=dtype)
    grad_encode.grad_topk_encode(x, x, W, b, W, k, 0.5)


def screened(N=8192, d=768, F=24576, k=32):
    x, W, b = (empty(*s, dtype=torch.float32) for s in ((N, d), (F, d), (F,)))
    screen.screened_topk_encode(x, W, b, k)


def one_of_each():
    """Triton makes a constant of a size of one."""
    sizes = {"N": 1, "d": 1, "F": 1, "k": 1}
    topk(torch.bfloat16, **sizes)
    grad(torch.bfloat16, **sizes)
    screened(**sizes)


CASES = {
    "topk-bf16": lambda: topk(torch.bfloat16),
    "topk-fp32": lambda: topk(torch.float32),
    "topk-bf16-k1024": lambda: topk(torch.bfloat16, k=1024),
    "topk-bf16-abs": lambda: topk(torch.bfloat16, activation="abs"),
    "grad-bf16": lambda: grad(torch.bfloat16),
    "grad-fp32": lambda: grad(torch.float32),
    "screen": screened,
    "one-of-each": one_of_each,
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
        print(asked, file=sys.stderr, flush=True)  # the last one is what did not compile
        case, capability = asked.split(", ")
        target.capability = int(capability)
        launched.clear()
        CASES[case]()
        report[asked] = dict(launched)
    print(json.dumps(report))


main()
