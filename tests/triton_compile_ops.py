# SPDX-License-Identifier: Apache-2.0
"""Compiles the portable kernels for argv[1] (80, 90, ...) at the sizes of shapes A and B; prints
what each costs, as {kernel: {registers, stack, shared, instructions}}."""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ksae.kernels import decode, group, latent, select

capability = int(sys.argv[1])
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
INTEGERS = ("indices_ptr", "position_ptr")  # int64


def pointer(name: str, wide: tuple[str, ...]) -> str:
    if name in INTEGERS or name == "keys_ptr":
        return "*i64"
    if name in ("maxima_ptr", "latent_ptr", "offsets_ptr", "order_ptr"):
        return "*i32"
    if name in ("mask_ptr", "informed_ptr"):
        return "*i8"
    return "*fp32" if name in wide else "*bf16"


def measure(kernel, warps: int, wide: tuple[str, ...] = (), doubles: str = "", **constants):
    """`wide`: arguments that are float32 or point to it."""
    signature = {}
    for name in kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("coefficients", "rows", "values", "grads", "pieces"):
            signature[name] = ("*fp32" if name in wide else "*bf16",)
        elif name in ("offsets", "order"):
            signature[name] = ("*i32",)
        elif name == "ks":
            signature[name] = ("i32",)
        elif name == doubles:
            signature[name] = "*fp64"
        elif name.endswith("_ptr"):
            signature[name] = pointer(name, wide)
        else:
            signature[name] = "fp32" if name in wide else "i32"
    aligned = {}
    for i, name in enumerate(kernel.arg_names):
        if isinstance(signature[name], tuple):
            aligned |= {(i, 0): [["tt.divisibility", 16]]}
        elif signature[name].startswith("*") or name in ("d", "F", "columns"):
            aligned |= {(i,): [["tt.divisibility", 16]]}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    target = GPUTarget("cuda", capability, 32)
    built = triton.compile(source, target=target, options={"num_warps": warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(built.asm["cubin"])
        cubin.flush()
        usage = subprocess.check_output(
            [TOOLS / "cuobjdump", "--dump-resource-usage", cubin.name], text=True
        )
        sass = subprocess.check_output([TOOLS / "nvdisasm", "-c", cubin.name], text=True)
    names = ("LDL", "STL", "ATOM", "ATOMG", "RED")
    return {
        "registers": max(map(int, re.findall(r"REG:(\d+)", usage))),
        "stack": max(map(int, re.findall(r"STACK:(\d+)", usage))),
        "shared": built.metadata.shared,
        "instructions": [name for name in names if re.search(rf"\b{name}\b", sass)],
    }


def selects(F: int, k: int):
    columns = select.group_of(F, k)
    groups = triton.next_power_of_2(triton.cdiv(F, columns))
    capacity = triton.next_power_of_2(k + select.ROUND)
    options = {"BIAS": True, "MASK": False, "MODE": 0, "GROUP": columns}
    wide = ("scores_ptr", "second_ptr", "beta")
    yield "maxima", measure(select.maxima_kernel, 4, wide, **options, TILE=select.TILE)
    options |= {"RELU": True, "GROUPS": groups, "ROUND": select.ROUND, "CAPACITY": capacity}
    warps = 4 if capacity <= 1024 else 8
    yield f"select k={k}", measure(select.select_kernel, warps, wide, **options)


def gathers():
    options = {"BIAS": True, "SLICE": decode.SLICE}
    yield "decode", measure(decode.decode_kernel, 1, **options, TARGET=False)
    yield "residual", measure(decode.decode_kernel, 1, ("out_ptr",), **options, TARGET=True)
    options = {"SKIP": True, "SLOTS": decode.SLOTS, "COLUMNS": decode.COLUMNS}
    yield "values", measure(decode.values_kernel, 1, ("rows_ptr", "out_ptr"), **options)
    options = {"COLUMNS": 1024}
    yield "squares", measure(decode.squares_kernel, 4, ("rows_ptr",), "out_ptr", **options)
    for name in ("keys", "bounds", "order"):
        kernel = getattr(group, f"{name}_kernel")
        yield f"group {name}", measure(kernel, 4, BLOCK=group.BLOCK)


def passes(d: int):
    block = triton.next_power_of_2(d)
    warps = latent.warps(block)
    floats = ("scales_ptr", "parallel_ptr", "master_ptr", "m_ptr", "v_ptr", "hyper_ptr", "pieces")
    encoder, decoder = (*floats, "coefficients"), (*floats, "rows")
    sizes = {"CUT": latent.CUT, "BLOCK": block, "BLOCK_D": block, "GROUPS": 1}
    update = {"FIRST": True, "MASTER": True, "WHOLE": True}
    yield (
        f"encoder {d}",
        measure(
            latent.update_kernel, warps, encoder, **sizes, **update, CENTRE=True, PARALLEL=False,
            NORMALIZE=False,
        ),
    )  # fmt: skip
    yield (
        f"decoder {d}",
        measure(
            latent.update_kernel, warps, decoder, **sizes, **update, CENTRE=False, PARALLEL=True,
            NORMALIZE=True,
        ),
    )  # fmt: skip
    yield (
        f"grad_sq {d}",
        measure(
            latent.grad_sq_kernel, warps, decoder, "out_ptr", **sizes, CENTRE=False, PARALLEL=True
        ),
    )


def sums():
    sizes = {"CUT": latent.CUT, "BLOCK": 512}
    yield "weight", measure(latent.weight_kernel, 1, ("pieces",), **sizes)
    wide = ("rows_ptr", "scale_ptr", "pieces_ptr")
    yield "pieces", measure(latent.pieces_kernel, 1, wide, **sizes, CENTRE=False, SCALED=True)
    wide = ("grads", "scales_ptr", "bias_ptr", "parallel_ptr")
    options = {"GROUPS": 1, "GRADS": True, "SUMS": latent.SUMS}
    yield "sums", measure(latent.sums_kernel, 1, wide, **options)
    wide = ("sums_ptr", "shares_ptr", "scales_ptr", "out_ptr")
    options = {"ROWS": latent.ROWS, "COLUMNS": latent.COLUMNS}
    yield "centre", measure(latent.centre_kernel, 4, wide, **options)
    options = {"GROUPS": 1, "COLUMNS": latent.COLUMNS}
    yield "centre sum", measure(latent.centre_sum_kernel, 4, wide, **options)


print(json.dumps(dict([*selects(131072, 64), *gathers(), *passes(4096), *sums()])))
