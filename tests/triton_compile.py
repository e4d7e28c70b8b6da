# SPDX-License-Identifier: Apache-2.0
"""Compiles the gate for argv[1] (80, 90, ...) and argv[2] (bf16, fp32); prints what it costs."""

import importlib.util
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

path = Path(__file__).parents[1] / "kernels" / "encode.py"
spec = importlib.util.spec_from_file_location("encode", path)
encode = importlib.util.module_from_spec(spec)
sys.modules["encode"] = encode
spec.loader.exec_module(encode)

capability, element = int(sys.argv[1]), sys.argv[2]
tiles = encode.BLACKWELL_TILES if capability == 100 else encode.TILES
block_n, block_f, block_d, warps, stages = tiles[2 if element == "bf16" else 4]
kernel = encode.gate_kernel
constants = {"MASK": False, "CAPACITY": 512}
constants |= {"BLOCK_N": block_n, "BLOCK_F": block_f, "BLOCK_D": block_d}
signature = dict.fromkeys(kernel.arg_names, "i32") | dict.fromkeys(constants, "constexpr")
signature |= dict.fromkeys(("x_ptr", "w_ptr", "b_ptr", "mask_ptr"), f"*{element}")
signature |= {"tau_ptr": "*fp32", "count_ptr": "*i32", "keys_ptr": "*i64"}
aligned = [i for i, name in enumerate(kernel.arg_names) if name not in constants]
source = ASTSource(
    fn=kernel,
    signature=signature,
    constexprs=constants,
    attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
)
built = triton.compile(
    source,
    target=GPUTarget("cuda", capability, 32),
    options={"num_warps": warps, "num_stages": stages},
)
tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
    cubin.write(built.asm["cubin"])
    cubin.flush()
    usage = subprocess.check_output(
        [tools / "cuobjdump", "--dump-resource-usage", cubin.name], text=True
    )
    sass = subprocess.check_output([tools / "nvdisasm", "-c", cubin.name], text=True)
names = ("HGMMA", "UTCHMMA", "HMMA", "FFMA", "LDL", "STL")
report = {
    "registers": max(map(int, re.findall(r"REG:(\d+)", usage))),
    "stack": max(map(int, re.findall(r"STACK:(\d+)", usage))),
    "shared": built.metadata.shared,
    "instructions": [name for name in names if re.search(rf"\b{name}\b", sass)],
}
print(json.dumps(report))
