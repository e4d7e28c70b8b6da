# SPDX-License-Identifier: Apache-2.0
"""What sharding costs, by formula: writes docs/scale.md, `python -m ksae.bench.studies.scale`."""

from __future__ import annotations

import argparse
from pathlib import Path

from ksae.parallel.cost import (
    Sizes,
    bytes_sent,
    flops,
    state_bytes,
    update_bytes,
    working_bytes,
)

D, K, TOKENS = 4096, 64, 8192
LATENTS = (2**17, 2**20, 2**24)
RANKS = (1, 2, 4, 8, 16, 32, 64)
# Assumed of a device: product, memory and links within and between nodes of 8, a second.
FLOPS, MEMORY, WITHIN, BETWEEN, NODE = 4e14, 4e12, 4e11, 5e10, 8
HEAD = """# Scale: latents spread over devices

This page is written by `python -m ksae.bench.studies.scale` from the formulas of
`python/ksae/parallel/cost.py`. **Nothing on it was measured on a GPU.** That a step sends the
bytes of the formula, within 2 %, is tested with 2, 3 and 4 processes
(`tests/parallel/test_sharding.py`), as is that it gives the numbers of one device.

<!-- run by tests/parallel/test_sharding.py -->
```python
torch.distributed.init_process_group("gloo")  # or "nccl"
sae = ksae.shard(ksae.TopKSAE(d_in=768, d_sae=24576, k=32))
step = ksae.TrainStep(sae, lr=1e-4)
metrics = step(x)  # x: the tokens of this rank
```

`torchrun --nproc-per-node 8 -m ksae train run.yaml` does a whole run; `ksae convert
runs/x/checkpoints/step_00001000 sae.safetensors --to ksae` gathers a checkpoint into one file.

## What is sent

R ranks with n tokens each, N = R n. Rank r holds latents r, r + R, ...: their rows of W_enc and
W_dec, biases, moments, counters. A rank sends in a step, without AuxK, d being the width, k the
active latents and b the bytes of an element of x:

| exchange | bytes a rank sends |
|---|---|
| tokens, to all | (R - 1) n d b |
| candidates (64-bit keys), to the token's rank | (R - 1) n k 8 |
| the k-th key, to all | (R - 1) n 8 |
| partial reconstructions, float32, to the token's rank | (R - 1) n d 4 |
| residual, float32, to all | (R - 1) n d 4 |
| sums for b_dec and the variance | (R - 1) d 16 |

AuxK adds candidates of k_aux dead latents, and partial sums and residuals once more. A skip
connection adds the sum of its gradient, in two exchanges of d_in d_out 4 (R - 1) / R bytes. No
weight and no gradient of a latent is sent.

## A rank, by formula
"""
TAIL = """
## What breaks first

- **The rows of all tokens.** Tokens, partial sums and residuals are N d numbers on every rank,
  and N = R n grows with R: with more ranks take fewer tokens each, as a fixed batch N does.
  They are not yet taken in chunks, so exchange does not hide behind the product; the times
  above are sums.
- **Links between nodes.** Within a node the exchange is small beside the product; between
  nodes, at the assumed rate and with 131,072 latents, it is the larger part.
- **AuxK's candidates**: k_aux is half the width by default, so they are as large as the tokens.
  Fewer dead latents than k_aux make them fewer (on the CPU; on a GPU the number is not read).
- **A few latents a rank.** Each rank keeps min(k, F / R) candidates a token; at F / R near k
  nothing is saved.
- **Small F**: where N is above F, a reduction of dense gradients sends less. Sharding is then
  for the memory alone.
"""


def table(F: int) -> str:
    lines = [
        f"### {F:,} latents",
        "",
        f"d = {D}, k = {K}, bfloat16 weights with float32 masters,"
        f" N = {TOKENS * 8:,} tokens a step.",
        "",
        "| ranks | state, GB | temporaries, GB | product, TFLOP | sent, GB |"
        " product, ms | optimizer, ms | exchange, ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for R in RANKS:
        s = Sizes(R, TOKENS * 8 // R, D, F, K, 2)
        sent = sum(bytes_sent(s).values())
        outside = max(R - NODE, 0) / max(R - 1, 1)  # share that leaves the node
        times = (
            flops(s) / FLOPS,
            update_bytes(s) / MEMORY,
            sent * (1 - outside) / WITHIN + sent * outside / BETWEEN,
        )
        cells = [
            f"{state_bytes(s) / 1e9:.2f}",
            f"{working_bytes(s) / 1e9:.2f}",
            f"{flops(s) / 1e12:.1f}",
            f"{sent / 1e9:.2f}",
            *(f"{t * 1e3:.1f}" for t in times),
        ]
        lines.append(f"| {R} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def page() -> str:
    assumed = (
        f"Times assume {FLOPS / 1e12:.0f} TFLOP/s in the product, {MEMORY / 1e12:.0f} TB/s of"
        f" memory, {WITHIN / 1e9:.0f} GB/s between\ndevices of a node of {NODE} and"
        f" {BETWEEN / 1e9:.0f} GB/s between nodes.\n"
    )
    return HEAD + "\n" + "\n".join([assumed, *map(table, LATENTS)]) + TAIL


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("docs/scale.md"))
    out: Path = parser.parse_args().out
    out.write_text(page(), encoding="utf-8")


if __name__ == "__main__":
    main()
