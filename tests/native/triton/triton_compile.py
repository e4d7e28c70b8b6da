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
from cases import row_arguments
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import ksae
from ksae.backends import serving as gpu
from ksae.backends.triton import Kernels
from ksae.kernels import grad_topk_encode as grad_encode
from ksae.kernels import product, screen
from ksae.kernels import topk_encode as encode
from ksae.ops import straight
from ksae.ops.specs import BY_NAME
from ksae.parallel import one_device
from ksae.step import counters
from ksae.step import fused as step

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
USAGE = ("REG", "STACK", "LOCAL")
NAMES = ("HGMMA", "UTCHMMA", "HMMA", "FFMA", "LDL", "STL")
A = {"N": 8192, "d": 4096, "F": 131072, "k": 64}
B = {"N": 8192, "d": 768, "F": 24576, "k": 32}
T16, T32 = torch.bfloat16, torch.float32


class Served:
    """The ops as the table calls their kernels: by name, with the arguments that they take."""

    def __getattr__(self, op):
        kernel, spec = getattr(Kernels(), op), BY_NAME[op]
        own = straight.named(kernel, spec)

        def run(*args, **more):
            values = {**spec.defaults, **dict(zip(spec.names, args, strict=False)), **more}
            return kernel(**{name: values[name] for name in own})

        return run


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
        sass = ""
        if re.search(r"\bdot\b|\btt\.dot\b", kernel.asm["ttir"]):  # a third of a second each
            sass = subprocess.check_output([TOOLS / "nvdisasm", "-c", cubin.name], text=True)
    most = {name: max(map(int, re.findall(rf"{name}:(\d+)", usage))) for name in USAGE}
    return {
        "registers": most["REG"],
        "memory": most["STACK"] + most["LOCAL"],  # where what is spilled lies
        "shared": kernel.metadata.shared,
        "product": bool(sass),
        "instructions": [name for name in NAMES if re.search(rf"\b{name}\b", sass)],
        "atomics": bool(re.search(r"\b(atom|red)\.", kernel.asm["ptx"])),
    }


def empty(*shape, dtype=T16):
    return torch.empty(*shape, dtype=dtype, device="meta")


def encoder(dtype, N, d, F):
    return empty(N, d, dtype=dtype), empty(F, d, dtype=dtype), empty(F, dtype=dtype)


def topk(dtype, N, d, F, k):
    encode.topk_encode(*encoder(dtype, N, d, F), k)


def grad(dtype, N, d, F, k):
    x, W, b = encoder(dtype, N, d, F)
    grad_encode.grad_topk_encode(x, x, W, b, W, k, 0.5)


def screened(N, d, F, k):
    screen.screened_topk_encode(*encoder(T32, N, d, F), k)


def stored(N, d, F, k):
    """As the table screens float32: after products that a library makes."""
    Kernels().screened_topk_encode(*encoder(T32, N, d, F), k)


def one_of_each():
    """Triton makes a constant of a size of one."""
    sizes = {"N": 1, "d": 1, "F": 1, "k": 1}
    topk(T16, **sizes)
    grad(T16, **sizes)
    screened(**sizes)
    stored(**sizes)


def selection(dtype, N, d, F, k):
    x, W, b = encoder(dtype, N, d, F)
    Kernels().topk_encode(x, W, b, k, b[:d])


def selections(dtype, N, d, F, k):
    """By a gradient, and under a mask."""
    x, W, b = encoder(dtype, N, d, F)
    Kernels().topk_encode_aux(x, W, b, k, k, b > 0, b[:d], x, W, 0.5)


def gradients(dtype, N, d, F, k):
    """What autograd calls."""
    kernels = Kernels()
    x, W, b = encoder(dtype, N, d, F)
    values, indices = empty(N, k, dtype=dtype), empty(N, k, dtype=torch.int64)
    kernels.sparse_decode(values, indices, W, b[:d])
    kernels.sparse_decode_backward_values(x, indices, W)
    kernels.sparse_decode_backward_weight(x, values, indices, F)


def rows(dtype, N, d, F, k):
    """Gradients and the row pass of codes with row offsets."""
    kernels = Kernels()
    x, W, b = encoder(dtype, N, d, F)
    E, offsets = N * k, empty(N + 1, dtype=torch.int64)
    code = (empty(E, 1, dtype=dtype), empty(E, 1, dtype=torch.int64))
    kernels.sparse_decode(*code, W, b[:d], offsets)
    kernels.sparse_residual(*code, W, None, x, d, None, offsets)
    kernels.sparse_decode_backward_values(x, code[1], W, offsets)
    kernels.sparse_decode_backward_weight(x, *code, F, offsets)
    a = row_arguments(dtype, "decoder", N=1, d=1, F=5, ks=(1,))
    wide = empty(F, d, dtype=T32)
    group = {"coefficients": [code[0]], "offsets": [empty(F + 1, dtype=torch.int32)]}
    group |= {"order": [empty(E, dtype=torch.int32)], "rows": [empty(N, d, dtype=T32)]}
    a |= group | {"scales": empty(1, dtype=T32), "grad_dot_w": empty(F, dtype=T32)}
    a |= {"W": W, "master": wide, "m": wide, "v": wide, "hyper": empty(8, dtype=T32)}
    kernels.row_update(*a.values(), row_of=[empty(E, dtype=torch.int32)])


def training(dtype, N, d, F, k, clip_norm=None, **options):
    """A fused step, its encoding left out; one of float32 writes the bf16 copy."""
    step.ops = one_device.ops = counters.ops = Served()
    gpu.screens = lambda W, k, aux: dtype == T32
    gpu.bf16_copy = screen.bf16_copy
    sae = ksae.TopKSAE(d, F, k, **options, dtype=dtype, device="meta")
    train = ksae.TrainStep(sae, clip_norm=clip_norm)
    train._fused.asks_for_dead = False  # it would count them
    train._fused.step(empty(N, d, dtype=dtype), empty(N, d, dtype=dtype), None)


def float32_product():
    """As where torch may take TF32."""
    product.float32_product(empty(2048, 768, dtype=T32), empty(24576, 768, dtype=T32).T)


CASES = {
    "topk-bf16": lambda: topk(T16, **B),
    "topk-fp32": lambda: topk(T32, **B),
    "topk-bf16-k1024": lambda: topk(T16, **B | {"k": 1024}),
    "grad-bf16": lambda: grad(T16, **B),
    "grad-fp32": lambda: grad(T32, **B),
    "screen": lambda: screened(**B),
    "stored": lambda: stored(**A),
    "stored-k1024": lambda: stored(**A | {"k": 1024}),
    "screen-k1024": lambda: screened(**B | {"k": 1024}),
    "product-fp32": float32_product,
    "one-of-each": one_of_each,
    "selection-bf16": lambda: selection(T16, **A),
    "selections-bf16": lambda: selections(T16, **A),
    "gradients-bf16": lambda: gradients(T16, **A),
    "rows-bf16": lambda: rows(T16, **A),
    "step-bf16": lambda: training(T16, **A, auxk_alpha=1, clip_norm=1),
    "step-bf16-halves": lambda: training(T16, **A, auxk_alpha=0),
    "step-fp32": lambda: training(T32, **B, auxk_alpha=1, clip_norm=1),
}


def main():
    target, launched, costs = Driver(), {}, {}
    driver.set_active(target)
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        if kernel not in costs:
            costs[kernel] = cost(kernel)
        of_this = launched.setdefault(self.__name__, [])
        if costs[kernel] not in of_this:
            of_this.append(costs[kernel])

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
